//! A state made ready for walking: base chains on the hook timeline, names to share, indices over long chains.

use super::client_port;
use super::config::Config;
use super::index::{Index, LONG};
use super::ipvs::Ipvs;
use super::native;
use super::orders;
use super::routing::Routing;
use super::sets::Sets;
use crate::core::kube::ebpf::{self, Network};
use crate::core::model::flow::Family;
use crate::core::model::name::Name;
use crate::core::model::rules::{Chain, Ruleset};
use crate::core::model::state::{NativeBase, NodeState, RecentEntry};
use crate::core::model::steps::{Lists, RuleAt};
use crate::core::model::trace::{Chains, Flavour, Hook, RuleRef};
use foldhash::HashMap;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A node's state, compiled. Packets are walked through it without changing it, so that many threads can share one; each
/// thread does better with one of its own, because what a trace shares with its simulator is counted.
#[derive(Debug)]
pub struct Simulator {
    pub(super) tables: Vec<TableData>,
    /// What the steps of a walk point into.
    pub(super) lists: Arc<Lists>,
    /// One for each order of base chains with equal priority (see [`orders`]).
    timelines: Vec<Timeline>,
    pub(super) routing: Routing,
    pub(super) config: Config,
    pub(super) sets: Sets,
    pub(super) ipvs: Ipvs,
    pub(super) native: Vec<NativeBase>,
    pub(super) recent: Option<BTreeMap<String, Vec<RecentEntry>>>,
    /// Tables in which the order of the two iptables flavours decides and is not known, for IPv4 and IPv6.
    open_orders: [u8; 2],
    pub(super) assumptions: Vec<String>,
    minds_client_ports: bool,
}

/// Entries by family and hook ([`slot`]), in the order in which the kernel calls them.
type Timeline = [Vec<Entry>; 2 * HOOKS.len()];

const fn slot(family: Family, hook: Hook) -> usize {
    match family {
        Family::V4 => hook as usize,
        Family::V6 => hook as usize + HOOKS.len(),
    }
}

/// One step of a hook.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    /// `nf_conntrack_in`, priority -200.
    Conntrack,
    Chain(BaseChain),
    /// The NAT dispatcher at -100 (destination) or +100 (source), with the nat chains in their own order.
    Nat(Vec<BaseChain>),
    /// `ip_vs_remote_request` at LOCAL_IN, priority 99, and `ip_vs_local_request` at LOCAL_OUT, priority -98
    /// (net/netfilter/ipvs/ip_vs_core.c, `ip_vs_ops4`).
    Ipvs,
    /// A base chain of native nftables rules that may send connections elsewhere: a place in [`Simulator::native`].
    Native(u16),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct BaseChain {
    pub(super) table: u16,
    pub(super) chain: u32,
    /// The mangle table re-routes in OUTPUT when it changed the packet (`ipt_mangle_out`).
    pub(super) reroutes: bool,
}

/// One table of one ruleset.
#[derive(Debug)]
pub(super) struct TableData {
    /// Its place among the tables.
    number: u16,
    pub(super) flavour: Flavour,
    pub(super) family: Family,
    pub(super) name: Name,
    chains: Arc<Chains>,
    indices: HashMap<u32, Index>,
}

impl TableData {
    /// Its chain at a hook.
    fn base(&self, hook: Hook) -> Option<u32> {
        (0..)
            .map_while(|at| Some((at, self.chain(at)?)))
            .find_map(|(at, chain)| (chain.name() == hook.name()).then_some(at))
    }

    pub(super) fn chain(&self, chain: u32) -> Option<&Chain> {
        self.chains.chain(chain)
    }

    pub(super) fn index(&self, chain: u32) -> Option<&Index> {
        self.indices.get(&chain)
    }

    pub(super) fn chain_name(&self, chain: u32) -> &str {
        self.chain(chain).map_or("", Chain::name)
    }

    /// Where a rule is; `None` for the chain's policy.
    pub(super) fn at(&self, chain: u32, rule: Option<u32>) -> RuleAt {
        RuleAt { table: self.number, chain, number: rule.map_or(0, |rule| rule + 1) }
    }
}

impl Simulator {
    /// Compiles a state. Costs about as much as a walk over all rules; the rules themselves are shared, not copied.
    pub fn new(state: &NodeState) -> Self {
        let sources = state.rulesets.iter().flat_map(|ruleset| (0..ruleset.tables.len()).map(move |at| (ruleset, at)));
        let tables: Vec<TableData> =
            (0..).zip(sources).map(|(number, (ruleset, at))| table(number, ruleset, at)).collect();
        let routing = Routing::new(state);
        let mut assumptions = routing.assumptions.clone();
        if state.rulesets.is_empty() {
            assumptions.push("no iptables rules are part of the state: the packet meets none".into());
        }
        let open_orders = [Family::V4, Family::V6].map(|family| orders::open(&tables, family));
        let ipvs = Ipvs::new(state);
        assumptions.extend(ipvs.in_use());
        assumptions.extend(native::sentences(&state.native));
        assumptions.extend(ebpf::serving(state).map(Network::sentence));
        Self {
            timelines: (0..=open_orders[0] | open_orders[1])
                .map(|order| timeline(&tables, order, ipvs.in_use().is_some(), &state.native))
                .collect(),
            ipvs,
            native: state.native.clone(),
            open_orders,
            lists: Arc::new(Lists {
                tables: tables.iter().map(|table| Arc::clone(&table.chains)).collect(),
                routes: routing.words(),
            }),
            tables,
            routing,
            config: Config::new(state),
            sets: Sets::new(state.sets.as_ref()),
            recent: state.recent.clone(),
            assumptions,
            minds_client_ports: client_port::matters(state),
        }
    }

    /// Whether two packets may go other ways although they differ in nothing but the port that they come from.
    pub const fn minds_client_ports(&self) -> bool {
        self.minds_client_ports
    }

    /// A rule in words.
    pub(super) fn rule(&self, at: RuleAt) -> Option<RuleRef> {
        self.lists.rule(at)
    }

    pub(super) fn entry(&self, order: u8, family: Family, hook: Hook, at: usize) -> Option<&Entry> {
        self.timelines.get(usize::from(order))?.get(slot(family, hook))?.get(at)
    }

    pub(super) const fn open_orders(&self, family: Family) -> u8 {
        match family {
            Family::V4 => self.open_orders[0],
            Family::V6 => self.open_orders[1],
        }
    }
}

fn table(number: u16, ruleset: &Arc<Ruleset>, at: usize) -> TableData {
    let source = &ruleset.tables[at];
    let long = source.chains.iter().enumerate().filter(|(_, chain)| chain.rules.len() >= LONG);
    TableData {
        number,
        flavour: ruleset.flavour,
        family: ruleset.family,
        name: source.name.clone(),
        indices: long.filter_map(|(at, chain)| Some((at as u32, Index::new(&chain.rules)?))).collect(),
        chains: Arc::new(Chains::Of(Arc::clone(ruleset), at)),
    }
}

/// Priority of a table's base chain at a hook, `None` where the table has none (`enum nf_ip_hook_priorities`). iptables-nft
/// puts table security behind the NAT of INPUT (`xtables_ipv4`, iptables/nft.c); in the legacy flavour it comes before.
fn priority(table: &str, flavour: Flavour, hook: Hook) -> Option<i32> {
    use Hook::{Input, Output, Postrouting, Prerouting};
    match (table, hook) {
        ("raw", Prerouting | Output) => Some(-300),
        ("mangle", _) => Some(-150),
        ("nat", Prerouting | Output) => Some(-100),
        ("nat", Input | Postrouting) => Some(100),
        ("filter", Hook::Forward | Input | Output) => Some(0),
        ("security", Hook::Forward | Input | Output) if flavour == Flavour::IptablesLegacy => Some(50),
        ("security", Hook::Forward | Input | Output) => Some(150),
        _ => None,
    }
}

const HOOKS: [Hook; 5] = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];

pub(super) fn base_chains(tables: &[TableData], family: Family, hook: Hook) -> Vec<(i32, BaseChain)> {
    let mut found = Vec::new();
    for (at, table) in tables.iter().enumerate().filter(|(_, table)| table.family == family) {
        let Some(priority) = priority(&table.name, table.flavour, hook) else { continue };
        if let Some(chain) = table.base(hook) {
            let reroutes = hook == Hook::Output && *table.name == *"mangle";
            found.push((priority, BaseChain { table: at as u16, chain, reroutes }));
        }
    }
    found
}

fn timeline(tables: &[TableData], order: u8, ipvs: bool, native: &[NativeBase]) -> Timeline {
    let mut timeline = Timeline::default();
    for family in [Family::V4, Family::V6] {
        for hook in HOOKS {
            let mut chains = base_chains(tables, family, hook);
            let turned = |base: &BaseChain| order & orders::bit(&tables[usize::from(base.table)].name) != 0;
            let place = |base: &BaseChain| if turned(base) { u16::MAX - base.table } else { base.table };
            chains.sort_by_key(|(priority, base)| (*priority, place(base)));
            timeline[slot(family, hook)] = entries(hook, &chains, ipvs, &native::dnat(native, family, hook));
        }
    }
    timeline
}

/// `native`: chains of type nat, which are asked beside those of the NAT step; which of them first is not known.
fn entries(hook: Hook, chains: &[(i32, BaseChain)], ipvs: bool, native: &[u16]) -> Vec<Entry> {
    let tracked = matches!(hook, Hook::Prerouting | Hook::Output);
    let nat = match hook {
        Hook::Prerouting | Hook::Output => Some(-100),
        Hook::Input | Hook::Postrouting => Some(100),
        Hook::Forward => None,
    };
    let between = |from: i32, to: i32| {
        let nat = nat.unwrap_or(i32::MAX);
        chains.iter().filter(move |(priority, _)| (from..to).contains(priority) && *priority != nat)
    };
    let plain = |from: i32, to: i32| between(from, to).map(|(_, chain)| Entry::Chain(*chain));
    let nat_step = nat.map(|nat| {
        let list = chains.iter().filter(|(priority, _)| *priority == nat);
        (nat, Entry::Nat(list.map(|(_, chain)| *chain).collect()))
    });
    let mut entries: Vec<Entry> = plain(i32::MIN, -200).collect();
    if tracked {
        entries.push(Entry::Conntrack);
    }
    match nat_step {
        Some((nat, step)) => {
            let takes = |at: Hook| (ipvs && hook == at).then_some(Entry::Ipvs);
            entries.extend(plain(-200, nat).chain(takes(Hook::Input)));
            entries.extend(native.iter().map(|place| Entry::Native(*place)));
            entries.push(step);
            entries.extend(takes(Hook::Output).into_iter().chain(plain(nat, i32::MAX)));
        }
        None => entries.extend(plain(-200, i32::MAX)),
    }
    entries
}
