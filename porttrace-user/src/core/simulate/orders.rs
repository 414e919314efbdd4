//! Rules of iptables-legacy and iptables-nft side by side. At equal priority the chain that was registered last is asked first
//! (`nf_hook_entries_grow`, net/netfilter/core.c), and all base chains of a table are registered together. When that was, no
//! dump tells: every order is walked, and what comes out the same is told once.

use super::compiled::{TableData, base_chains};
use super::{Question, Simulator};
use crate::core::model::flow::Family;
use crate::core::model::rules::Policy;
use crate::core::model::trace::{Branch, Decision, Hook, Trace};

/// Tables whose base chains have one priority in both flavours; the bit of a table in an order says that its chains stand the
/// other way round. (Table security does not: 50 and 150.)
pub(super) const TABLES: [&str; 4] = ["raw", "mangle", "nat", "filter"];

/// The bit of a table.
pub(super) fn bit(table: &str) -> u8 {
    TABLES.iter().position(|name| *name == table).map_or(0, |at| 1 << at)
}

/// The tables of a family in which two rulesets have something to say at the same hook.
pub(super) fn open(tables: &[TableData], family: Family) -> u8 {
    let speaks = |table: &TableData, chain: u32| {
        table.chain(chain).is_some_and(|chain| !chain.rules.is_empty() || chain.policy == Some(Policy::Drop))
    };
    let mut open = 0;
    for hook in [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting] {
        let mut seen = 0;
        for (_, base) in base_chains(tables, family, hook) {
            let table = &tables[usize::from(base.table)];
            if speaks(table, base.chain) {
                let bit = bit(&table.name);
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
}

/// Says of which orders a branch is the outcome, unless it is that of all.
fn labelled(mut branch: Branch, of: &[u8], all: usize, open: u8) -> Branch {
    if of.len() == all {
        return branch;
    }
    let place = |order: &u8| match TABLES.iter().filter(|table| order & bit(table) != 0).copied().collect::<Vec<_>>() {
        turned if turned.is_empty() => "in the order of the state".to_owned(),
        turned => format!("the other way round in {}", turned.join(", ")),
    };
    let places: Vec<String> = of.iter().map(place).collect();
    let text = format!("{}: here {}", question(open), places.join(", or "));
    branch.decisions.insert(0, Decision::Order { text });
    branch
}

fn question(open: u8) -> String {
    let tables: Vec<&str> = TABLES.into_iter().filter(|table| open & bit(table) != 0).collect();
    format!(
        "iptables legacy and iptables-nft both have rules in {}; which of them the kernel asks first depends on which was \
         loaded last",
        tables.join(", ")
    )
}
