//! The ports of a node: who claims each, who wins, and what a client from outside meets.

use super::style::{Style, columns, wrap};
use super::trace::words::clean;
use crate::core::explain::wins;
use crate::core::model::flow::Family;
use crate::core::ports::{Kind, Port, PortClaim, Wins};
use crate::core::reach::Outcome;
use serde::Serialize;
use std::fmt::Write;

/// `porttrace ports --json`.
#[derive(Debug, Serialize)]
pub struct Answer<'a> {
    pub schema: u32,
    pub kind: &'static str,
    pub node: Option<&'a str>,
    pub ports: &'a [Port],
    /// Parts of the facts that were not there, a sentence each.
    pub missing: &'a [String],
}

/// Version of the JSON of `ports`, `explain` and `matrix`.
pub const SCHEMA: u32 = 1;

/// A mark for an outcome, in its colour.
pub fn mark(style: Style, outcome: Outcome) -> String {
    match outcome {
        Outcome::Works => style.good("✓"),
        Outcome::Refused | Outcome::Silent => style.bad("✗"),
        Outcome::Depends => style.warn("~"),
        Outcome::Unknown => style.warn("?"),
    }
}

/// All ports, one or more lines each.
pub fn text(node: Option<&str>, ports: &[Port], missing: &[String], style: Style) -> String {
    let mut out = String::new();
    let node = node.unwrap_or("this node");
    let several = ports.iter().filter(|port| port.is_contested()).count();
    let mut heading = format!("{} ports are claimed on {}", ports.len(), clean(node));
    if several > 0 {
        let _ = write!(heading, ", {several} of them more than once");
    }
    let _ = writeln!(out, "{}", style.bold(heading));
    let _ = writeln!(out, "{}", style.dim("✓ ✗ ? ~ : what a client from outside would meet, as far as the facts tell"));
    for port in ports {
        one(port, style, &mut out);
    }
    missing_parts(missing, style, &mut out);
    out
}

/// What was not there to look at.
pub fn missing_parts(missing: &[String], style: Style, out: &mut String) {
    if missing.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{}", style.bold("not known"));
    for sentence in missing {
        for (i, line) in wrap(&clean(sentence), style.width.saturating_sub(4)).iter().enumerate() {
            let _ = writeln!(out, "  {} {line}", if i == 0 { "-" } else { " " });
        }
    }
}

fn one(port: &Port, style: Style, out: &mut String) {
    let place = match port.address {
        Some(address) => format!("{address}:{}/{}", port.port, port.proto),
        None => format!("{}/{}", port.port, port.proto),
    };
    let several = port.is_contested();
    for (i, claim) in port.claims.iter().enumerate() {
        let lead = if i == 0 {
            format!("{} {}", mark(style, port.outside.outcome), style.bold(format!("{place:<11}")))
        } else {
            " ".repeat(13)
        };
        let state = if several { format!("  {}", styled_wins(style, claim.wins)) } else { String::new() };
        let long = if i == 0 && columns(&place) > 11 { format!("\n{}", " ".repeat(13)) } else { String::new() };
        let _ = writeln!(out, "{lead}{long} {:<12} {}{state}", claim.kind.name(), self::claim(port, claim));
    }
    if port.outside.outcome != Outcome::Works && !port.outside.reason.is_empty() {
        for line in wrap(&clean(&port.outside.reason), style.width.saturating_sub(14)) {
            let _ = writeln!(out, "{}{}", " ".repeat(14), style.dim(line));
        }
    }
}

fn styled_wins(style: Style, state: Wins) -> String {
    match state {
        Wins::Yes => style.good(wins(state)),
        Wins::No => style.warn(wins(state)),
        _ => wins(state).to_owned(),
    }
}

/// `default/frontend-a → 10.244.1.9:8081, on 127.0.0.1 only`.
pub fn claim(port: &Port, claim: &PortClaim) -> String {
    let mut text = clean(&claim.who);
    if let Some(to) = claim.to {
        let _ = write!(text, " → {to}");
    }
    if let Some(count) = claim.endpoints.filter(|_| claim.kind != Kind::Refused) {
        let _ = write!(text, ", {count} {}", if count == 1 { "endpoint" } else { "endpoints" });
    }
    if let Some(only) = claim.only {
        let _ = write!(text, ", on {only} only");
    }
    match claim.families.as_slice() {
        [Family::V6] => text.push_str(", IPv6"),
        // Worth a word only where the other family comes to something else.
        [Family::V4] if port.claims.iter().any(|other| other.families == [Family::V6]) => text.push_str(", IPv4"),
        _ => {}
    }
    text
}
