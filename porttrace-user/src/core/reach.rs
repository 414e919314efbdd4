//! Whether a connection would come about: the simulator's verdict, joined with what listens at the end of the way.

use super::kube::owners::ClaimKind;
use super::model::flow::{Proto, Tuple};
use super::model::trace::{Branch, DropReason, Hop, Manip, RuleRef, Trace, Verdict};
use super::world::World;
use serde::Serialize;
use std::net::{IpAddr, SocketAddr};

/// How an attempt would end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Somebody answers.
    Works,
    /// Refused: a RST, an ICMP error.
    Refused,
    /// Nothing comes back.
    Silent,
    /// It depends on chance or on something that is not known: some ways work, others do not.
    Depends,
    /// The facts do not say.
    Unknown,
}

/// An outcome, why, and the rule that decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reach {
    pub outcome: Outcome,
    /// One sentence without a full stop.
    pub reason: String,
    /// The rule that translated, dropped or rejected; `None` where none did.
    pub rule: Option<RuleRef>,
    /// Where the packet ends up, in the branches that arrive somewhere.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ends: Vec<SocketAddr>,
}

/// Tries a connection in thought.
pub fn reach(world: &World<'_>, proto: Proto, src: IpAddr, dst: IpAddr, dport: u16) -> Reach {
    of_trace(world, &world.trace(proto, src, dst, dport))
}

/// The same for a trace that is there already.
pub fn of_trace(world: &World<'_>, trace: &Trace) -> Reach {
    let reach = by_rules(world, trace);
    match world.replaced() {
        Some(network) if !is_plain(world, trace, &reach) => Reach {
            outcome: Outcome::Unknown,
            reason: format!("{} decides in eBPF; by the rules alone: {}", network.name(), reach.reason),
            ..reach
        },
        _ => reach,
    }
}

/// Whether it was decided by what listens at the very address and port that were asked for, and these are no Service's: that is
/// so whoever serves Services.
fn is_plain(world: &World<'_>, trace: &Trace, reach: &Reach) -> bool {
    let asked = &trace.packet.tuple;
    let own = world.facts.is_own(asked.dst) == Some(true);
    let listens = reach.outcome == Outcome::Works;
    let is_closed = reach.outcome == Outcome::Refused && !own && reach.rule.is_none();
    reach.ends == [asked.destination()]
        && (listens || is_closed)
        && !(own && world.with_node_port(asked.dport, Some(asked.proto)).next().is_some())
}

fn by_rules(world: &World<'_>, trace: &Trace) -> Reach {
    let each: Vec<Reach> = trace.branches.iter().map(|branch| of_branch(world, trace, branch)).collect();
    let Some(first) = each.first() else {
        return Reach {
            outcome: Outcome::Unknown,
            reason: "no way was found".to_owned(),
            rule: None,
            ends: Vec::new(),
        };
    };
    let mut ends: Vec<SocketAddr> = each.iter().flat_map(|one| one.ends.clone()).collect();
    ends.sort_unstable();
    ends.dedup();
    if each.iter().all(|one| one.outcome == first.outcome) {
        let reason = if ends.len() > 1 && first.outcome == Outcome::Works {
            format!("{} endpoints: {}", ends.len(), short(&ends))
        } else {
            first.reason.clone()
        };
        return Reach { outcome: first.outcome, reason, rule: first.rule.clone(), ends };
    }
    // Whatever the known ways come to, rules that are not followed may lead elsewhere first.
    let is_open = |branch: &&Branch| matches!(branch.verdict, Verdict::Unknown { .. });
    let open = each.iter().zip(&trace.branches).find(|(_, branch)| is_open(branch)).map(|(reach, _)| reach);
    let mut known = each.iter().zip(&trace.branches).filter(|(_, branch)| !is_open(branch)).map(|(reach, _)| reach);
    if let (Some(open), Some(one)) = (open, known.next())
        && known.all(|other| other.outcome == one.outcome)
    {
        let else_so = format!("{}; otherwise: {}", open.reason, one.reason);
        return Reach { outcome: Outcome::Unknown, reason: else_so, rule: one.rule.clone(), ends };
    }
    let works = each.iter().filter(|one| one.outcome == Outcome::Works).count();
    let worst = each.iter().find(|one| one.outcome != Outcome::Works).unwrap_or(first);
    // What fails in some branches is worth more words than what is not known in others.
    let worst = each.iter().find(|one| matches!(one.outcome, Outcome::Refused | Outcome::Silent)).unwrap_or(worst);
    let fails = matches!(worst.outcome, Outcome::Refused | Outcome::Silent);
    let outcome = if fails { Outcome::Depends } else { Outcome::Unknown };
    let reason = format!("works in {works} of {} ways; else {}", each.len(), worst.reason);
    Reach { outcome, reason, rule: worst.rule.clone(), ends }
}

fn short(ends: &[SocketAddr]) -> String {
    let shown: Vec<String> = ends.iter().take(3).map(ToString::to_string).collect();
    let more = if ends.len() > 3 { ", …" } else { "" };
    format!("{}{more}", shown.join(", "))
}

fn of_branch(world: &World<'_>, trace: &Trace, branch: &Branch) -> Reach {
    let rule = decider(branch);
    let end = |outcome, reason: String| Reach { outcome, reason, rule: rule.clone(), ends: Vec::new() };
    match &branch.verdict {
        Verdict::Delivered { to, listening } => {
            Reach { ends: vec![to.destination()], ..delivered(branch, to, *listening, rule) }
        }
        Verdict::Forwarded { to, next_hop, interface } => {
            let (outcome, reason) = forwarded(world, trace, branch, to, *next_hop, interface);
            Reach { outcome, reason, rule, ends: vec![to.destination()] }
        }
        Verdict::Rejected { with, by: Some(_) } => end(Outcome::Refused, format!("a rule rejects it ({with})")),
        Verdict::Rejected { with, by: None } => {
            end(Outcome::Refused, format!("this node's kernel refuses it ({with})"))
        }
        Verdict::Dropped { reason, .. } => end(Outcome::Silent, drop_reason(reason)),
        Verdict::Unknown { because, .. } => end(Outcome::Unknown, because.clone()),
    }
}

/// The rule that made the difference: the one that ended the way, else the last one that translated the destination.
fn decider(branch: &Branch) -> Option<RuleRef> {
    match &branch.verdict {
        Verdict::Rejected { by: Some(by), .. }
        | Verdict::Dropped { by: Some(by), .. }
        | Verdict::Unknown { by: Some(by), .. } => {
            return Some(by.clone());
        }
        _ => {}
    }
    branch.hops.iter().rev().find_map(|hop| match hop {
        Hop::Rewrite { what: Manip::Dnat, by, .. } => by.clone(),
        _ => None,
    })
}

fn drop_reason(reason: &DropReason) -> String {
    match reason {
        DropReason::Rule => "a rule drops it".to_owned(),
        DropReason::NoRoute => "no route leads on".to_owned(),
        DropReason::Blackhole => "a blackhole route takes it".to_owned(),
        DropReason::RpFilter => "the reverse path filter (rp_filter) drops it".to_owned(),
        DropReason::Martian => "a loopback address on the wire is dropped (route_localnet is off)".to_owned(),
        DropReason::ForwardingDisabled => "forwarding is off".to_owned(),
        DropReason::NoAddress => "masquerading finds no address on the way out".to_owned(),
        DropReason::Ttl => "its TTL is used up".to_owned(),
        DropReason::TooBig => "it is too big for the way".to_owned(),
        DropReason::Other { text } => text.clone(),
    }
}

fn delivered(branch: &Branch, to: &Tuple, listening: Option<bool>, rule: Option<RuleRef>) -> Reach {
    let listener = branch.hops.iter().find_map(|hop| match hop {
        Hop::Deliver { listener, .. } => listener.as_deref(),
        _ => None,
    });
    let (outcome, reason) = match listening {
        Some(true) => {
            // Without its process the simulator names a socket by its address.
            let process = listener.filter(|name| name.contains('/'));
            let name =
                process.map_or_else(|| "a process of this node".to_owned(), |name| format!("{name} of this node"));
            (Outcome::Works, format!("{name} listens on {}", to.destination()))
        }
        Some(false) => (Outcome::Refused, format!("nothing on this node listens on {} {}", to.proto, to.destination())),
        None => {
            (Outcome::Unknown, format!("it ends at this node's {}; what listens there is not known", to.destination()))
        }
    };
    Reach { outcome, reason, rule, ends: Vec::new() }
}

fn forwarded(
    world: &World<'_>,
    trace: &Trace,
    branch: &Branch,
    to: &Tuple,
    next_hop: IpAddr,
    interface: &str,
) -> (Outcome, String) {
    let whom = whom(world, to.dst);
    if branch.final_tuple.src.is_loopback() {
        let text = format!(
            "it reaches {whom} from {}, where no answer can come back to: nothing masquerades it",
            branch.final_tuple.src
        );
        return (Outcome::Silent, text);
    }
    if branch.final_tuple.src == to.dst {
        return (
            Outcome::Silent,
            format!("{whom} would get it from its own address, and its answer would never leave it"),
        );
    }
    if is_bypassed(world, branch, to) {
        return (Outcome::Silent, bypassed(&whom));
    }
    if let Some(cluster) = untranslated(world, trace, to) {
        return (Outcome::Silent, cluster);
    }
    if let Some(state) = dead_neighbour(world, interface, next_hop) {
        return (
            Outcome::Silent,
            format!("{next_hop} does not answer on {interface} (its neighbour entry is {state})"),
        );
    }
    if let Some(known) = listening(world, to.proto, to.dst, to.dport, &whom) {
        return known;
    }
    if let Some(gone) = left_behind(world, to, interface).or_else(|| gone(world, to.dst, interface)) {
        return (Outcome::Silent, gone);
    }
    if world.facts.balancer_at(to.dst).is_some() {
        let text = format!("{whom} gets it, k3s's load balancer: rules inside that pod send it on to its Service");
        return (Outcome::Unknown, text);
    }
    (Outcome::Unknown, format!("it goes on to {whom} by {interface}; what listens on {} there is not known", to.dport))
}

/// Whether a translated packet goes on to another node's pod with its client's own source, when that client is not behind this
/// node: the answer takes another way, and nobody translates it back.
pub fn is_bypassed(world: &World<'_>, branch: &Branch, to: &Tuple) -> bool {
    let translated = branch.hops.iter().any(|hop| matches!(hop, Hop::Rewrite { what: Manip::Dnat, .. }));
    let source = branch.final_tuple.src;
    translated
        && !branch.masquerade
        && world.facts.is_own(source) == Some(false)
        && world.behind(source).is_none()
        && world.behind(to.dst).is_none()
        && world.is_other_nodes(to.dst)
}

/// What becomes of it, in words.
pub fn bypassed(whom: &str) -> String {
    format!(
        "it goes on to {whom} on another node with the client's source, and the answer bypasses this node (no masquerade)"
    )
}

/// `default/frontend-a (10.244.1.9)`.
pub fn whom(world: &World<'_>, address: IpAddr) -> String {
    match world.facts.name_at(address) {
        Some(name) => format!("{name} ({address})"),
        None => address.to_string(),
    }
}

/// What listens at an address and port of a pod, if anybody looked.
pub fn listening(world: &World<'_>, proto: Proto, address: IpAddr, port: u16, whom: &str) -> Option<(Outcome, String)> {
    let pods = world.facts.listeners.known()?;
    if pods.listens(proto, address, port)? {
        return Some((Outcome::Works, format!("{whom} listens on {proto} {port}")));
    }
    let others = pods.ports(proto, address).unwrap_or_default();
    let others: Vec<String> = others.iter().map(|(port, _)| port.to_string()).collect();
    let what = if pods.only_on_loopback(proto, address, port) {
        format!("{whom} listens on {proto} {port} on 127.0.0.1 only")
    } else if others.is_empty() {
        format!("nothing listens on {proto} {port} in {whom}, nor on any other {proto} port")
    } else {
        format!("nothing listens on {proto} {port} in {whom}, but on {}", others.join(", "))
    };
    Some((Outcome::Refused, what))
}

/// A Service's address that nobody translated: the packet leaks out of the node.
fn untranslated(world: &World<'_>, trace: &Trace, to: &Tuple) -> Option<String> {
    if to.dst != trace.packet.tuple.dst {
        return None;
    }
    let service = world.facts.cluster.services.iter().find(|service| service.cluster_ips.contains(&to.dst))?;
    let has = service.ports.iter().any(|port| port.port == to.dport && port.proto == to.proto);
    Some(if has {
        format!(
            "no rule takes {} of Service {}: kube-proxy has not written it, and the packet leaves the node",
            to.dport, service.name
        )
    } else {
        format!("Service {} has no {} port {}: the packet leaves the node as it is", service.name, to.proto, to.dport)
    })
}

fn dead_neighbour<'w>(world: &World<'w>, interface: &str, address: IpAddr) -> Option<&'w str> {
    let mut neighbours = world.facts.state.neighbours.iter().flatten();
    let found = neighbours.find(|one| one.address == address && one.interface == interface)?;
    matches!(found.state.as_str(), "FAILED" | "INCOMPLETE").then_some(found.state.as_str())
}

/// A hostPort leads to pods of its own node only (portmap): what leaves the node for one is for a pod that is gone.
fn left_behind(world: &World<'_>, to: &Tuple, interface: &str) -> Option<String> {
    let is_host_port = world
        .owners
        .all()
        .any(|claim| matches!(&claim.kind, ClaimKind::HostPort { to: at, .. } if *at == to.destination()));
    (is_host_port && world.route(to.dst).is_some() && world.behind(to.dst).is_none()).then(|| {
        format!("no pod of this node has {} any more: the packet leaves by {interface}, where nobody answers", to.dst)
    })
}

/// An address of this node's pod range that no pod has.
pub fn gone(world: &World<'_>, address: IpAddr, interface: &str) -> Option<String> {
    let node = world.facts.cluster.nodes.iter().find(|node| Some(&node.name) == world.facts.state.name.as_ref())?;
    let ours = node.pod_cidrs.iter().any(|net| net.contains(&address));
    let pods = world.facts.cluster.pods.known()?;
    let has = pods.iter().any(|pod| pod.ips.contains(&address));
    (ours && !has).then(|| format!("no pod has {address}: the packet leaves by {interface}, where nobody answers"))
}
