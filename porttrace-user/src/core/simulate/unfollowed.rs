//! Native nftables rules that could not be read. Where they may send a connection elsewhere the path forks; of the rest it is said
//! that they are taken to change nothing.

use super::run::{Next, Run};
use super::walk::Walk;
use crate::core::model::flow::Family;
use crate::core::model::state::NativeBase;
use crate::core::model::trace::{Decision, Hook, Unfollowed, Verdict};
use std::collections::{BTreeMap, BTreeSet};

/// What is not followed of each table, a sentence each.
pub(super) fn sentences(native: &[NativeBase]) -> impl Iterator<Item = String> {
    let mut tables: BTreeMap<String, BTreeSet<Hook>> = BTreeMap::new();
    for base in native {
        tables.entry(base.table()).or_default().insert(base.hook);
    }
    tables.into_iter().map(|(table, hooks)| {
        let hooks: Vec<&str> = hooks.into_iter().map(Hook::name).collect();
        let hooks = hooks.join(", ");
        format!("the native nftables rules of table {table} at {hooks} could not be read: what they drop or change is not foreseen")
    })
}

/// Those that may send connections of a family elsewhere at a hook, as places in the list.
pub(super) fn dnat(native: &[NativeBase], family: Family, hook: Hook) -> Vec<u16> {
    let asked = |base: &NativeBase| base.hook == hook && base.is_dnat() && base.meets(family);
    (0..).zip(native).filter(|(_, base)| asked(base)).map(|(place, _)| place).collect()
}

/// What packets of a family may meet of them.
pub(super) fn unfollowed(native: &[NativeBase], family: Family) -> Unfollowed {
    let met = || native.iter().filter(|base| base.meets(family));
    let tables: BTreeSet<String> = met().map(NativeBase::table).collect();
    Unfollowed { tables: tables.into_iter().collect(), may_snat: met().any(NativeBase::is_snat) }
}

impl<'s> Run<'s> {
    /// The chain may rewrite the destination of what opens a connection, or leave it alone.
    pub(super) fn unfollowed(&mut self, walk: &mut Walk<'s>, place: u16) -> Next {
        walk.stage.entry += 1;
        let is_asked = walk.conn.tracked() && !walk.conn.dst_done;
        if let Some(base) = self.sim.unfollowed.get(usize::from(place)).filter(|_| is_asked) {
            let (chain, table) = (&base.chain, base.table());
            let text = format!("chain {chain} of nftables table {table} rewrites its destination");
            let decision = |taken| Decision::Assumed { rule: None, text: text.clone(), taken };
            let mut other = walk.fork();
            other.decide(decision(true));
            let because =
                format!("chain {chain} of nftables table {table} may send it elsewhere: its rules could not be read");
            self.finish(other, Verdict::Unknown { because, by: None });
            walk.decide(decision(false));
        }
        Next::Go
    }
}
