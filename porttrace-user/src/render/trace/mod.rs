//! A simulation as text: the verdict, then a tree of hops.

mod fold;
pub mod json;
mod lines;
pub mod tree;
pub mod words;

use super::style::Style;
use crate::core::kube::owners::Owners;
use crate::core::model::flow::Proto;
use crate::core::model::state::NodeState;
use crate::core::model::trace::{Packet, RuleRef, Trace};
use crate::core::near_miss::NearMiss;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

/// What the printer knows besides the trace.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    pub style: Style,
    pub owners: &'a Owners,
    pub state: &'a NodeState,
    /// 1: rules in full.
    pub verbose: u8,
    /// Print every branch instead of folding those that are alike.
    pub all: bool,
}

impl Context<'_> {
    fn name_of(&self, proto: Proto, address: SocketAddr) -> Option<String> {
        self.owners.name_of(proto, address)
    }

    /// Where a rule comes from that stands at no known number.
    fn whence(rule: &RuleRef) -> Option<&'static str> {
        let line = rule.rule()?.line;
        (!rule.chain()?.numbered).then_some(if line == 0 { "assumed" } else { "pasted" })
    }

    /// The state of a neighbour that does not answer.
    fn neighbour(&self, interface: &str, address: IpAddr) -> Option<&str> {
        let mut neighbours = self.state.neighbours.iter().flatten();
        let found = neighbours.find(|n| n.address == address && n.interface == interface)?;
        matches!(found.state.as_str(), "FAILED" | "INCOMPLETE").then_some(found.state.as_str())
    }
}

/// `tcp 172.18.0.4:40000 → 172.18.0.3:30080, arriving by eth0`.
pub fn packet(packet: &Packet) -> String {
    let mark = if packet.mark == 0 { String::new() } else { format!(", mark {:#x}", packet.mark) };
    match &packet.input {
        Some(interface) => {
            format!("{} {}, arriving by {}{mark}", packet.tuple.proto, packet.tuple, words::clean(interface))
        }
        None => format!("{} {}, sent by this node{mark}", packet.tuple.proto, packet.tuple),
    }
}

/// The whole simulation: verdict, tree, what was assumed.
pub fn text(trace: &Trace, context: &Context<'_>) -> String {
    let mut out = headline(trace, context);
    out.push('\n');
    if let Some(root) = tree::build(&trace.branches) {
        lines::tree(&root, context, &mut out);
    }
    assumptions(&trace.assumptions, context, &mut out);
    out
}

/// `✓ leaves by … `, then the packet.
pub fn headline(trace: &Trace, context: &Context<'_>) -> String {
    let style = context.style;
    let (mood, sentence) = words::summary(&trace.branches.iter().collect::<Vec<_>>(), context);
    let mut out = String::new();
    for (i, line) in super::style::wrap(&sentence, style.width.saturating_sub(2)).iter().enumerate() {
        let mark = if i == 0 { mood.mark() } else { " " };
        let _ = writeln!(out, "{} {}", lines::mooded(style, mood, mark), lines::mooded(style, mood, line));
    }
    let _ = writeln!(out, "  {}", style.dim(packet(&trace.packet)));
    out
}

/// So many near misses of one chain are printed; the others are counted.
const MISSES: usize = 4;

/// The rules that the packet passed although they nearly matched.
pub fn near_misses(misses: &[NearMiss], context: &Context<'_>) -> String {
    let style = context.style;
    let mut out = String::from("\nnearly matched\n");
    if misses.is_empty() {
        out.push_str("  no rule that names this port or address failed by a single condition\n");
    }
    let mut chains: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for miss in misses {
        let count = chains.entry((&miss.rule.table, &miss.rule.chain)).or_default();
        *count += 1;
        if *count > MISSES && !context.all {
            continue;
        }
        let failed = style.bold(format!("not {}", words::conditions(&miss.failed)));
        let _ = writeln!(out, "  {}  {failed}", words::clean(&words::place(&miss.rule)));
        let text = words::clean(&miss.text);
        for line in super::style::wrap(&text, style.width.saturating_sub(6)) {
            let _ = writeln!(out, "      {}", style.dim(line));
        }
    }
    for ((table, chain), count) in chains.into_iter().filter(|(_, count)| *count > MISSES && !context.all) {
        let _ = writeln!(out, "  … and {} more in {table} {} (--all shows each)", count - MISSES, words::clean(chain));
    }
    out
}

fn assumptions(assumptions: &[String], context: &Context<'_>, out: &mut String) {
    if assumptions.is_empty() {
        return;
    }
    let _ = writeln!(out, "\nassumed");
    for sentence in assumptions {
        for (i, line) in
            super::style::wrap(&words::clean(sentence), context.style.width.saturating_sub(4)).iter().enumerate()
        {
            let _ = writeln!(out, "  {} {line}", if i == 0 { "-" } else { " " });
        }
    }
}
