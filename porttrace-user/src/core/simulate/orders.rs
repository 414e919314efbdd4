//! Chains of equal priority: rules of iptables-legacy and iptables-nft side by side, and nat chains of native nftables rules beside
//! those and each other. The chain that was registered last is asked first (`nf_hook_entries_grow`, net/netfilter/core.c), and all
//! base chains of an iptables table are registered together. When that was, no dump tells, and kube-proxy makes its native chains
//! anew when it starts: every order is walked, and what comes out the same is told once.

use super::compiled::{TableData, base_chains};
use super::{Question, Simulator};
use crate::core::model::flow::Family;
use crate::core::model::rules::Policy;
use crate::core::model::trace::{Branch, Decision, Flavour, Hook, Trace};

/// Tables whose base chains have one priority in both flavours; the bit of a table in an order says that its chains stand the
/// other way round. (Table security does not: 50 and 150.)
const TABLES: [&str; 4] = ["raw", "mangle", "nat", "filter"];

/// The bit of native chains. Where it is not set they come before those of iptables, the last table of the listing first, as they
/// were registered if nobody made chains anew; else behind those, the other way round.
const NATIVE: u8 = 1 << TABLES.len();

/// The bit of a table.
fn bit(table: &TableData) -> u8 {
    if table.flavour == Flavour::Nftables {
        return NATIVE;
    }
    TABLES.iter().position(|name| *name == &*table.name).map_or(0, |at| 1 << at)
}

/// Where a table's base chains stand among those of the same priority.
pub(super) fn place(order: u8, table: &TableData) -> i32 {
    let number = i32::from(table.number);
    match (order & bit(table) != 0, table.flavour) {
        (false, Flavour::Nftables) => -1 - number,
        (true, _) if table.flavour != Flavour::Nftables => i32::from(u16::MAX) - number,
        // Behind those of iptables, whichever way round these are.
        (true, _) => 2 * i32::from(u16::MAX) + number,
        (false, _) => number,
    }
}

/// The tables of a family in which two rulesets have something to say at the same hook. Of native chains only those of type nat
/// count: of two others each is asked, whichever comes first.
pub(super) fn open(tables: &[TableData], family: Family) -> u8 {
    let speaks = |table: &TableData, chain: u32| {
        table.chain(chain).is_some_and(|chain| !chain.rules.is_empty() || chain.policy == Some(Policy::Drop))
    };
    let mut open = 0;
    for hook in [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting] {
        let mut seen = 0;
        let mut nat = Vec::new();
        for base in base_chains(tables, family, hook) {
            let table = &tables[usize::from(base.table)];
            if !speaks(table, base.chain) {
                continue;
            }
            if base.is_nat {
                let native = table.flavour == Flavour::Nftables;
                let meets =
                    nat.iter().any(|(priority, is_native)| *priority == base.priority && (native || *is_native));
                open |= if meets { NATIVE } else { 0 };
                nat.push((base.priority, native));
            }
            if table.flavour != Flavour::Nftables {
                let bit = bit(table);
                open |= seen & bit;
                seen |= bit;
            }
        }
    }
    open
}

impl Simulator {
    pub(super) fn trace_orders(&self, asked: Question<'_>, merge: bool) -> Trace {
        let open = self.open_orders(asked.packet.tuple.family());
        let mut trace = self.trace_once(asked, 0);
        if open == 0 {
            return trace;
        }
        let orders: Vec<u8> = (0..=open).filter(|order| order & !open == 0).collect();
        let mut found: Vec<(Branch, Vec<u8>)> = trace.branches.drain(..).map(|branch| (branch, vec![0])).collect();
        for &order in &orders[1..] {
            for branch in self.trace_once(asked, order).branches {
                match found.iter_mut().find(|(known, of)| merge && !of.contains(&order) && alike(known, &branch)) {
                    Some((_, of)) => of.push(order),
                    None => found.push((branch, vec![order])),
                }
            }
        }
        let same = found.iter().all(|(_, of)| of.len() == orders.len());
        trace.branches = found.into_iter().map(|(branch, of)| labelled(branch, &of, orders.len(), open)).collect();
        if same {
            trace.assumptions.push(format!("{}; the outcome is the same either way", question(open)));
        }
        trace
    }
}

fn alike(one: &Branch, two: &Branch) -> bool {
    one.verdict == two.verdict
        && one.final_tuple == two.final_tuple
        && one.reply_tuple == two.reply_tuple
        && one.probability == two.probability
        && one.decisions == two.decisions
        && one.sport_chosen == two.sport_chosen
}

/// Says of which orders a branch is the outcome, unless it is that of all.
fn labelled(mut branch: Branch, of: &[u8], all: usize, open: u8) -> Branch {
    if of.len() == all {
        return branch;
    }
    let place = |order: &u8| {
        let mut turned: Vec<&str> = names(open & order & !NATIVE).collect();
        if order & NATIVE != 0 {
            turned.push("native nat chains");
        }
        match turned.as_slice() {
            [] => "in the order of the state".to_owned(),
            turned => format!("the other way round in {}", turned.join(", ")),
        }
    };
    let places: Vec<String> = of.iter().map(place).collect();
    let text = format!("{}: here {}", question(open), places.join(", or "));
    branch.decisions.insert(0, Decision::Order { text });
    branch
}

fn names(bits: u8) -> impl Iterator<Item = &'static str> {
    (0..).zip(TABLES).filter(move |(at, _)| bits & 1 << at != 0).map(|(_, name)| name)
}

fn question(open: u8) -> String {
    let tables: Vec<&str> = names(open).collect();
    let mut parts = Vec::new();
    if !tables.is_empty() {
        parts.push(format!("iptables legacy and iptables-nft both have rules in {}", tables.join(", ")));
    }
    if open & NATIVE != 0 {
        parts.push("several nat chains stand at one priority".to_owned());
    }
    format!("{}; which the kernel asks first depends on which was made last", parts.join(", and "))
}
