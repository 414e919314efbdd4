//! What stands above and below the live log: what the port is here, what runs, and the sum at the end.

use super::words;
use crate::core::kube::owners::{Claim, ClaimKind, Owners};
use crate::core::kube::server::Server;
use crate::core::model::flow::Proto;
use crate::core::model::state::NodeState;
use crate::core::quantity::count;
use crate::render::style::{Style, columns, wrap};
use std::collections::BTreeSet;
use std::net::SocketAddr;

/// What is known as soon as the probes are attached, before the rules are read.
#[derive(Clone, Debug)]
pub struct Opening<'a> {
    pub ports: &'a [u16],
    pub node: &'a str,
    pub kernel: &'a str,
    /// One sentence on the probes: which, on how many interfaces, how fast.
    pub probes: &'a str,
}

/// Everything else that the header tells.
#[derive(Clone, Debug)]
pub struct Header<'a> {
    pub ports: &'a [u16],
    pub owners: &'a Owners,
    pub state: &'a NodeState,
    /// One sentence on the rules: how many of which flavour, how fast.
    pub rules: String,
    /// With `--into-pods`: the pods that are followed inside.
    pub inside: Option<Vec<String>>,
    /// What does not work here and what that costs, a sentence each.
    pub warnings: &'a [String],
    pub ready_ns: u64,
}

/// The first lines: from now on nothing is missed.
pub fn opening(opening: &Opening<'_>, style: Style) -> String {
    let ports: Vec<String> = opening.ports.iter().map(u16::to_string).collect();
    let title = format!("porttrace watch {}", ports.join(" "));
    let place = format!("{} · kernel {}", opening.node, opening.kernel);
    let gap = style.width.saturating_sub(columns(&title) + columns(&place)).max(2);
    let title = format!("{}{}{}\n", style.bold(&title), " ".repeat(gap), style.dim(place));
    title + &entry("probes", opening.probes, style)
}

/// The rest of the header, with a final line that says that the log begins.
pub fn header(header: &Header<'_>, style: Style) -> String {
    let mut out = String::new();
    for &port in header.ports {
        for (label, text) in what_it_is(header.owners, header.state, port) {
            out.push_str(&entry(&label, &text, style));
        }
    }
    out.push_str(&entry("rules", &header.rules, style));
    if let Some(pods) = &header.inside {
        let said =
            if pods.is_empty() { "no pod of this node is where the rules lead".to_owned() } else { pods.join(", ") };
        out.push_str(&entry("inside pods", &said, style));
    }
    for warning in header.warnings {
        out.push_str(&entry("!", warning, style));
    }
    out.push_str(&entry("marks", super::block::LEGEND, style));
    out.push_str(&style.dim(format!("ready after {}; Ctrl-C ends\n\n", words::duration(header.ready_ns))));
    out
}

/// Who claims a port, with a label for each; where no rule does that is known to, what others may do with it.
fn what_it_is(owners: &Owners, state: &NodeState, port: u16) -> Vec<(String, String)> {
    const MOST: usize = 4;
    let mut claims = merged(owners.claims(port));
    if owners.claims(port).any(|claim| !matches!(claim.kind, ClaimKind::Listener { .. })) {
        return claims;
    }
    let targets: BTreeSet<SocketAddr> = owners.may_lead(port).into_iter().map(|(_, to)| to).collect();
    if !targets.is_empty() {
        let said: Vec<String> = targets.iter().take(MOST).map(SocketAddr::to_string).collect();
        let more = targets.len().saturating_sub(MOST);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let what = "no hostPort, NodePort or Service port, but a DNAT rule of another kind may send it to";
        claims.insert(0, (port.to_string(), format!("{what} {}{more}", said.join(" or "))));
    } else if claims.is_empty() {
        let what = "claims it (as hostPort, NodePort or Service port), and no process listens on it";
        let said = match Server::of(state, port) {
            Server::Ipvs(servers) => format!("IPVS takes it (virtual server {servers}), which is not followed"),
            Server::Native(tables) => {
                format!("no rule of this node that could be read {what}; native nftables rules may ({tables})")
            }
            Server::Ebpf(network) => format!("no rule of this node {what}; {} may serve it in eBPF", network.name()),
            Server::Nobody => format!("no rule of this node {what}"),
        };
        claims.push((port.to_string(), said));
    }
    claims
}

/// One aligned entry, wrapped under itself.
fn entry(label: &str, text: &str, style: Style) -> String {
    const LABEL: usize = 12;
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

/// Claims in words. What differs only in protocol or target (IPv4 and IPv6) is one line.
fn merged<'a>(claims: impl Iterator<Item = &'a Claim>) -> Vec<(String, String)> {
    struct Group {
        port: u16,
        protos: BTreeSet<Proto>,
        targets: Vec<String>,
        tail: String,
    }
    let mut groups: Vec<Group> = Vec::new();
    for claim in claims {
        let (target, tail) = words_of(&claim.kind);
        match groups.iter_mut().find(|group| group.port == claim.port && group.tail == tail) {
            Some(group) => {
                group.protos.insert(claim.proto);
                if !group.targets.contains(&target) {
                    group.targets.push(target);
                }
            }
            None => groups.push(Group {
                port: claim.port,
                protos: BTreeSet::from([claim.proto]),
                targets: vec![target],
                tail,
            }),
        }
    }
    groups
        .into_iter()
        .map(|group| {
            let protos: Vec<String> = group.protos.iter().map(Proto::to_string).collect();
            (format!("{}/{}", group.port, protos.join("+")), format!("{}{}", group.targets.join(" and "), group.tail))
        })
        .collect()
}

/// A claim as what it leads to, and the rest of the sentence.
fn words_of(kind: &ClaimKind) -> (String, String) {
    match kind {
        ClaimKind::HostPort { to, host_ip, network, sandbox, chain } => {
            let mut tail = format!(": a hostPort, by {chain}");
            if let Some(address) = host_ip {
                tail.push_str(&format!(", only on {address}"));
            }
            if let Some(sandbox) = sandbox {
                let short: String = sandbox.chars().take(13).collect();
                let network = network.as_ref().map_or_else(String::new, |network| format!("network {network}, "));
                tail.push_str(&format!(" ({network}sandbox {short})"));
            }
            (format!("→ {to}"), tail)
        }
        ClaimKind::NodePort { service, endpoints } => {
            (format!("NodePort of {service}"), format!(", {}", count(*endpoints, "endpoint")))
        }
        ClaimKind::ServicePort { service, address, endpoints } => {
            (format!("port of {service} on {address}"), format!(", {}", count(*endpoints, "endpoint")))
        }
        ClaimKind::Refused { why, .. } => (format!("refused by kube-proxy: {why}"), String::new()),
        ClaimKind::Listener { address, process: Some(process) } => {
            (address.to_string(), format!(": {process} of this node listens"))
        }
        ClaimKind::Listener { address, process: None } => {
            (address.to_string(), ": a process of this node listens".to_owned())
        }
    }
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
    let total = count(summary.connections, "connection");
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::flow::Family;
    use crate::core::model::trace::Flavour;
    use crate::core::parse::iptables::parse;
    use crate::core::parse::ipvs::servers;
    use crate::core::parse::nftables::bases;
    use crate::core::parse::notes::Notes;
    use std::sync::Arc;

    #[test]
    fn a_port_of_somebodys_own_rule_is_not_nobodys() {
        let rules = "*nat
:PREROUTING ACCEPT [0:0]
-A PREROUTING -p tcp -m tcp --dport 9088 -j DNAT --to-destination 10.99.1.9:80
COMMIT
";
        let (ruleset, _) = parse(rules, "rules", Flavour::IptablesNft, Family::V4);
        let state = NodeState { rulesets: vec![Arc::new(ruleset)], ..NodeState::default() };
        let said = |port| {
            what_it_is(&Owners::of(&state), &state, port)
                .into_iter()
                .map(|(_, text)| text)
                .collect::<Vec<_>>()
                .join("\n")
        };
        assert!(said(9088).ends_with("a DNAT rule of another kind may send it to 10.99.1.9:80"), "{}", said(9088));
        assert!(said(9099).starts_with("no rule of this node claims it"), "{}", said(9099));
    }

    #[test]
    fn where_native_rules_may_claim_a_port_nobody_says_that_none_does() {
        let hooks = "ip kube-proxy nat-prerouting nat prerouting -100 dnat";
        let native = bases(hooks, &mut Notes::new("nft-hooks.txt"));
        let ipvs =
            servers("Prot LocalAddress:Port Scheduler Flags\nTCP  172.18.0.3:30080 rr\n", &mut Notes::new("ip_vs.txt"));
        let state = NodeState { native, ipvs, ..NodeState::default() };
        let said = |port| what_it_is(&Owners::of(&state), &state, port).remove(0).1;
        assert!(said(9088).ends_with("listens on it; native nftables rules may (ip kube-proxy)"), "{}", said(9088));
        assert_eq!(said(30080), "IPVS takes it (virtual server tcp 172.18.0.3:30080), which is not followed");
    }
}
