//! A state made ready for walking: base chains on the hook timeline, names to share, indices over long chains.

use super::client_port;
use super::config::Config;
use super::index::{Index, LONG};
use super::ipvs::Ipvs;
use super::orders;
use super::routing::Routing;
use super::sets::Sets;
use super::unfollowed;
use crate::core::kube::ebpf::{self, Network};
use crate::core::model::flow::Family;
use crate::core::model::name::Name;
use crate::core::model::native::{BaseKind, Set, Source};
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
    /// Native rules that could not be read.
    pub(super) unfollowed: Vec<NativeBase>,
    /// See [`NodeState::sets_move`].
    pub(super) sets_move: bool,
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
    /// A base chain of native nftables rules that are not followed and may send connections elsewhere: a place in
    /// [`Simulator::unfollowed`].
    Unfollowed(u16),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct BaseChain {
    pub(super) table: u16,
    pub(super) chain: u32,
    /// The mangle table re-routes in OUTPUT when it changed the packet (`ipt_mangle_out`), and so do native chains of type route.
    pub(super) reroutes: bool,
    /// Asked in the NAT step, where `priority` decides only among such chains.
    pub(super) is_nat: bool,
    pub(super) priority: i32,
}

/// One table of one ruleset.
#[derive(Debug)]
pub(super) struct TableData {
    /// Its place among the tables.
    pub(super) number: u16,
    pub(super) flavour: Flavour,
    pub(super) family: Family,
    pub(super) name: Name,
    chains: Arc<Chains>,
    indices: HashMap<u32, Index>,
}

impl TableData {
    /// Its chains at a hook.
    fn bases(&self, hook: Hook) -> impl Iterator<Item = BaseChain> {
        let chains = (0..).map_while(|at| Some((at, self.chain(at)?)));
        chains.filter_map(move |(chain, of)| {
            let (kind, priority) = match of.base {
                Some(base) => (base.hook == hook).then_some((base.kind, base.priority))?,
                None if self.flavour == Flavour::Nftables || of.name() != hook.name() => return None,
                None => kind_and_priority(&self.name, self.flavour, hook)?,
            };
            let reroutes = hook == Hook::Output && kind == BaseKind::Route;
            Some(BaseChain { table: self.number, chain, reroutes, is_nat: kind == BaseKind::Nat, priority })
        })
    }

    /// One of its sets.
    pub(super) fn set(&self, at: u32) -> Option<&Set> {
        self.chains.table()?.sets.get(at as usize)
    }

    /// A set of its own, or one that stands in a rule.
    pub(super) fn source<'t>(&'t self, source: &'t Source) -> Option<&'t Set> {
        self.chains.table()?.source(source)
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
        let sources = state.all_rules().flat_map(|ruleset| (0..ruleset.tables.len()).map(move |at| (ruleset, at)));
        let tables: Vec<TableData> =
            (0..).zip(sources).map(|(number, (ruleset, at))| table(number, ruleset, at)).collect();
        let routing = Routing::new(state);
        let mut assumptions = routing.assumptions.clone();
        if tables.is_empty() {
            assumptions.push("no iptables rules are part of the state: the packet meets none".into());
        }
        let open_orders = [Family::V4, Family::V6].map(|family| orders::open(&tables, family));
        let ipvs = Ipvs::new(state);
        assumptions.extend(ipvs.in_use());
        let unfollowed: Vec<NativeBase> = state.unfollowed().cloned().collect();
        assumptions.extend(unfollowed::sentences(&unfollowed));
        assumptions.extend(ebpf::serving(state).map(Network::sentence));
        Self {
            timelines: (0..=open_orders[0] | open_orders[1])
                .map(|order| timeline(&tables, order, ipvs.in_use().is_some(), &unfollowed))
                .collect(),
            ipvs,
            unfollowed,
            sets_move: state.sets_move,
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

/// Type and priority of a table's base chain at a hook, `None` where the table has none (`enum nf_ip_hook_priorities`). iptables-nft
/// puts table security behind the NAT of INPUT (`xtables_ipv4`, iptables/nft.c); in the legacy flavour it comes before.
fn kind_and_priority(table: &str, flavour: Flavour, hook: Hook) -> Option<(BaseKind, i32)> {
    use Hook::{Input, Output, Postrouting, Prerouting};
    Some(match (table, hook) {
        ("raw", Prerouting | Output) => (BaseKind::Filter, -300),
        ("mangle", _) => (BaseKind::Route, -150),
        ("nat", Prerouting | Output) => (BaseKind::Nat, -100),
        ("nat", Input | Postrouting) => (BaseKind::Nat, 100),
        ("filter", Hook::Forward | Input | Output) => (BaseKind::Filter, 0),
        ("security", Hook::Forward | Input | Output) if flavour == Flavour::IptablesLegacy => (BaseKind::Filter, 50),
        ("security", Hook::Forward | Input | Output) => (BaseKind::Filter, 150),
        _ => return None,
    })
}

const HOOKS: [Hook; 5] = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];

pub(super) fn base_chains(tables: &[TableData], family: Family, hook: Hook) -> Vec<BaseChain> {
    tables.iter().filter(|table| table.family == family).flat_map(|table| table.bases(hook)).collect()
}

fn timeline(tables: &[TableData], order: u8, ipvs: bool, unfollowed: &[NativeBase]) -> Timeline {
    let mut timeline = Timeline::default();
    for family in [Family::V4, Family::V6] {
        for hook in HOOKS {
            let mut chains = base_chains(tables, family, hook);
            chains.sort_by_key(|base| (base.priority, orders::place(order, &tables[usize::from(base.table)])));
            let unfollowed = unfollowed::dnat(unfollowed, family, hook);
            timeline[slot(family, hook)] = entries(hook, &chains, ipvs, &unfollowed);
        }
    }
    timeline
}

/// `unfollowed`: chains of type nat, which are asked beside those of the NAT step; which of them first is not known.
fn entries(hook: Hook, chains: &[BaseChain], ipvs: bool, unfollowed: &[u16]) -> Vec<Entry> {
    let tracked = matches!(hook, Hook::Prerouting | Hook::Output);
    let nat = match hook {
        Hook::Prerouting | Hook::Output => Some(-100),
        Hook::Input | Hook::Postrouting => Some(100),
        Hook::Forward => None,
    };
    let plain = |from: i32, to: i32| {
        let between = chains.iter().filter(move |base| !base.is_nat && (from..to).contains(&base.priority));
        between.map(|base| Entry::Chain(*base))
    };
    let mut entries: Vec<Entry> = plain(i32::MIN, -200).collect();
    if tracked {
        entries.push(Entry::Conntrack);
    }
    match nat {
        Some(nat) => {
            let takes = |at: Hook| (ipvs && hook == at).then_some(Entry::Ipvs);
            entries.extend(plain(-200, nat).chain(takes(Hook::Input)));
            entries.extend(unfollowed.iter().map(|place| Entry::Unfollowed(*place)));
            entries.push(Entry::Nat(chains.iter().filter(|base| base.is_nat).copied().collect()));
            entries.extend(takes(Hook::Output).into_iter().chain(plain(nat, i32::MAX)));
        }
        None => entries.extend(plain(-200, i32::MAX)),
    }
    entries
}
