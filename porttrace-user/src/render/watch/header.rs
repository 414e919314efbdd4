//! What stands above and below the live log: what the port is here, what runs, and the sum at the end.

use super::words;
use crate::core::kube::owners::{Claim, ClaimKind, Owners};
use crate::core::model::flow::Family;
use crate::render::style::{Style, columns, wrap};

/// Everything the header tells.
#[derive(Clone, Debug)]
pub struct Header<'a> {
    pub ports: &'a [u16],
    pub node: &'a str,
    pub kernel: &'a str,
    pub owners: &'a Owners,
    /// One sentence on the probes: which, on how many interfaces, how fast.
    pub probes: String,
    /// One sentence on the rules: how many of which flavour, how fast.
    pub rules: String,
    /// What does not work here and what that costs, a sentence each.
    pub warnings: &'a [String],
    pub ready_ns: u64,
}

/// The header, with a final line that says that the log begins.
pub fn header(header: &Header<'_>, style: Style) -> String {
    let ports: Vec<String> = header.ports.iter().map(u16::to_string).collect();
    let title = format!("porttrace watch {}", ports.join(" "));
    let place = format!("{} · kernel {}", header.node, header.kernel);
    let gap = style.width.saturating_sub(columns(&title) + columns(&place)).max(2);
    let mut out = format!("{}{}{}\n", style.bold(&title), " ".repeat(gap), style.dim(place));
    for &port in header.ports {
        let claims = merged(header.owners.claims(port));
        if claims.is_empty() {
            let text = "nothing on this node claims it: no hostPort, NodePort or Service rule, no listener";
            out.push_str(&entry(&port.to_string(), text, style));
        }
        for (label, text) in claims {
            out.push_str(&entry(&label, &text, style));
        }
    }
    out.push_str(&entry("probes", &header.probes, style));
    out.push_str(&entry("rules", &header.rules, style));
    for warning in header.warnings {
        out.push_str(&entry("!", warning, style));
    }
    out.push_str(&entry("marks", super::block::LEGEND, style));
    out.push_str(&style.dim(format!("ready after {}; Ctrl-C ends\n\n", words::duration(header.ready_ns))));
    out
}

/// One aligned entry, wrapped under itself.
fn entry(label: &str, text: &str, style: Style) -> String {
    const LABEL: usize = 9;
    let mut out = String::new();
    for (index, line) in wrap(text, style.width.saturating_sub(LABEL + 4)).iter().enumerate() {
        let label = if index == 0 { label } else { "" };
        let painted = if label == "!" {
            style.warn(format!("{label:<LABEL$}"))
        } else {
            style.accent(format!("{label:<LABEL$}"))
        };
        out.push_str(&format!("  {painted}  {line}\n"));
    }
    out
}

/// Claims in words; IPv4 and IPv6 claims that say the same are one line.
fn merged<'a>(claims: impl Iterator<Item = &'a Claim>) -> Vec<(String, String)> {
    let mut lines: Vec<(String, String, Vec<Family>)> = Vec::new();
    for claim in claims {
        let (label, text) = (format!("{}/{}", claim.port, claim.proto), words_of(&claim.kind));
        match lines.iter_mut().find(|(other, same, _)| *other == label && *same == text) {
            Some((_, _, families)) => families.push(claim.family),
            None => lines.push((label, text, vec![claim.family])),
        }
    }
    lines.into_iter().map(|(label, text, _)| (label, text)).collect()
}

fn words_of(kind: &ClaimKind) -> String {
    match kind {
        ClaimKind::HostPort { to, host_ip, network, sandbox, chain } => {
            let mut text = format!("hostPort → {to} by {chain}");
            if let Some(address) = host_ip {
                text.push_str(&format!(", only on {address}"));
            }
            if let (Some(network), Some(sandbox)) = (network, sandbox) {
                let short: String = sandbox.chars().take(13).collect();
                text.push_str(&format!(" (network {network}, sandbox {short})"));
            }
            text
        }
        ClaimKind::NodePort { service, endpoints } => {
            format!("NodePort of {service}, {}", count(*endpoints, "endpoint"))
        }
        ClaimKind::ServicePort { service, address, endpoints } => {
            format!("port of {service} on {address}, {}", count(*endpoints, "endpoint"))
        }
        ClaimKind::Refused { why } => format!("refused by kube-proxy: {why}"),
        ClaimKind::Listener { address, process: Some(process) } => {
            format!("{process} of this node listens on {address}")
        }
        ClaimKind::Listener { address, process: None } => format!("a process of this node listens on {address}"),
    }
}

/// `1 endpoint`, `3 endpoints`.
pub fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// The sum at the end of a session.
#[derive(Clone, Debug)]
pub struct Summary<'a> {
    pub connections: u64,
    pub duration_ns: u64,
    /// (verdict, the connection that was told, how many, went well).
    pub shapes: Vec<(String, u64, u64, words::Mood)>,
    /// What was lost, a sentence each; empty: nothing.
    pub lost: &'a [String],
}

pub fn summary(summary: &Summary<'_>, style: Style) -> String {
    let total = count(usize::try_from(summary.connections).unwrap_or(usize::MAX), "connection");
    let mut out = style.bold(format!("{total} in {}\n", words::duration(summary.duration_ns)));
    const MOST: usize = 20;
    for (verdict, like, times, mood) in summary.shapes.iter().take(MOST) {
        let room = style.width.saturating_sub(14);
        for (index, line) in wrap(&format!("{} {verdict} (#{like})", mood.mark()), room).iter().enumerate() {
            let times = if index == 0 { format!("{times:>8} ×") } else { " ".repeat(10) };
            out.push_str(&format!("{times}  {}\n", super::block::paint(*mood, style, line)));
        }
    }
    if summary.shapes.len() > MOST {
        let rest: u64 = summary.shapes.iter().skip(MOST).map(|(_, _, times, _)| times).sum();
        out.push_str(&format!("{rest:>8} ×  in {} more kinds\n", summary.shapes.len() - MOST));
    }
    if summary.lost.is_empty() {
        out.push_str(&style.dim("nothing was lost\n"));
    }
    for lost in summary.lost {
        out.push_str(&format!("{}\n", style.bad(format!("! {lost}"))));
    }
    out
}
