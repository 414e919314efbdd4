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
use crate::core::model::trace::{Packet, Trace};
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
