//! Every claim to a port of this node, and which of several wins now.

use super::kube::owners::{Claim, ClaimKind};
use super::model::flow::{Family, Proto};
use super::model::trace::{Action, Branch, Hop, RuleRef, Trace, Verdict};
use super::reach::{self, Outcome, Reach};
use super::world::World;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// A port of this node, on all its addresses or on one, and who claims it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Port {
    pub proto: Proto,
    pub port: u16,
    /// An externalIP or a LoadBalancer's address; `None`: the node's own addresses.
    pub address: Option<IpAddr>,
    pub claims: Vec<PortClaim>,
    /// What becomes of a connection from outside, by the rules.
    pub outside: Reach,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortClaim {
    pub kind: Kind,
    /// `default/frontend:http`, a pod's name or address, `name/pid` of a process.
    pub who: String,
    /// The address that it is restricted to (hostIP, a listener's address); `None`: all.
    pub only: Option<IpAddr>,
    /// Where its rules lead: the pod's endpoint of a hostPort.
    pub to: Option<SocketAddr>,
    /// How many endpoints its rules have, of a Service.
    pub endpoints: Option<usize>,
    pub families: Vec<Family>,
    pub rule: Option<RuleRef>,
    /// Whether connections from outside come to it now.
    pub wins: Wins,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    NodePort,
    HostPort,
    ExternalIp,
    LoadBalancer,
    /// An externalIP or a LoadBalancer's address: native rules do not tell which.
    External,
    /// kube-proxy refuses it: no endpoints.
    Refused,
    /// A process of this node.
    Listener,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::NodePort => "NodePort",
            Self::HostPort => "hostPort",
            Self::ExternalIp => "externalIP",
            Self::LoadBalancer => "LoadBalancer",
            Self::External => "external",
            Self::Refused => "refused",
            Self::Listener => "process",
        }
    }
}

/// Which of several claims gets the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Wins {
    Yes,
    No,
    /// In some branches.
    Partly,
    /// It is for other clients than those outside (127.0.0.1), or nothing tells.
    Unasked,
}

/// All claims of a node, by port, for clients from outside. Listeners on loopback addresses alone are left out: nobody else can
/// reach them.
pub fn ports(world: &World<'_>) -> Vec<Port> {
    of_claims(world, world.owners.all(), None)
}

/// The same for one client: who wins, and what `outside` says, is what this client meets in its family.
pub fn ports_for(world: &World<'_>, client: Option<IpAddr>) -> Vec<Port> {
    of_claims(world, world.owners.all(), client)
}

/// The claims to one port, whatever the protocol or address.
pub fn of_port(world: &World<'_>, port: u16) -> Vec<Port> {
    of_claims(world, world.owners.claims(port), None)
}

fn of_claims<'c>(world: &World<'_>, claims: impl Iterator<Item = &'c Claim>, client: Option<IpAddr>) -> Vec<Port> {
    let mut all: BTreeMap<(u16, Proto, Option<IpAddr>), Vec<&Claim>> = BTreeMap::new();
    for claim in claims {
        if let Some(address) = place(world, claim) {
            all.entry((claim.port, claim.proto, address)).or_default().push(claim);
        }
    }
    // A port that only sockets on loopback hold is no port of the node.
    let ports = all.into_iter();
    ports.map(|((port, proto, address), claims)| one(world, client, proto, port, address, &claims)).collect()
}

/// Whether a claim is to a port of the node (`Some(None)`), to an address that leads here, or to neither.
fn place(world: &World<'_>, claim: &Claim) -> Option<Option<IpAddr>> {
    match &claim.kind {
        ClaimKind::HostPort { .. } | ClaimKind::NodePort { .. } => Some(None),
        ClaimKind::Listener { address, .. } => (!address.is_loopback()).then_some(None),
        ClaimKind::ServicePort { address, .. } => external(world, claim, *address).map(|_| Some(*address)),
        ClaimKind::Refused { address: None, .. } => Some(None),
        ClaimKind::Refused { address: Some(address), .. } => {
            (!is_cluster_ip(world, claim, *address)).then_some(Some(*address))
        }
    }
}

fn comment(world: &World<'_>, claim: &Claim) -> String {
    claim.rule.as_ref().and_then(|at| world.rule(at)?.comment()).unwrap_or_default()
}

fn is_cluster_ip(world: &World<'_>, claim: &Claim, address: IpAddr) -> bool {
    let known = world.facts.cluster.services.iter().any(|service| service.cluster_ips.contains(&address));
    // kube-proxy writes refusals of ClusterIPs to KUBE-SERVICES, all others to KUBE-EXTERNAL-SERVICES.
    known || claim.rule.as_ref().is_some_and(|rule| &*rule.chain == "KUBE-SERVICES" && &*rule.table == "filter")
}

/// Which external address of a Service it is; `None` for a ClusterIP.
fn external(world: &World<'_>, claim: &Claim, address: IpAddr) -> Option<Kind> {
    for service in &world.facts.cluster.services {
        if service.cluster_ips.contains(&address) {
            return None;
        }
        if service.external_ips.contains(&address) {
            return Some(Kind::ExternalIp);
        }
        if service.ingress.iter().any(|ingress| ingress.ip == address) {
            return Some(Kind::LoadBalancer);
        }
    }
    if claim.leads_to.as_ref().is_some_and(|chain| chain.starts_with("external-")) {
        return Some(Kind::External);
    }
    let comment = comment(world, claim);
    if comment.ends_with("external IP") {
        Some(Kind::ExternalIp)
    } else if comment.ends_with("loadbalancer IP") {
        Some(Kind::LoadBalancer)
    } else {
        None
    }
}

fn one(
    world: &World<'_>,
    client: Option<IpAddr>,
    proto: Proto,
    port: u16,
    address: Option<IpAddr>,
    claims: &[&Claim],
) -> Port {
    let source = |family| client.filter(|one| Family::of(*one) == family).unwrap_or(World::outsider(family));
    let mut traces: BTreeMap<(Family, Option<IpAddr>), Trace> = BTreeMap::new();
    let mut found: Vec<PortClaim> = Vec::new();
    for claim in claims {
        for family in families(claim) {
            let mut shown = PortClaim { families: vec![family], ..shown(world, claim) };
            let loopback = shown.only.is_some_and(|only| only.is_loopback());
            let dst = shown.only.or(address).or_else(|| world.node_address(family));
            if let Some(dst) = dst.filter(|dst| !loopback && Family::of(*dst) == family) {
                let trace =
                    traces.entry((family, Some(dst))).or_insert_with(|| world.trace(proto, source(family), dst, port));
                shown.wins = winner(claim, trace);
            }
            add(&mut found, shown);
        }
    }
    let outside = outside(world, &traces);
    Port { proto, port, address, claims: merged(found), outside }
}

/// Of several rules for one claim (kube-proxy writes another for 127.0.0.1) the one that packets meet counts.
fn add(found: &mut Vec<PortClaim>, claim: PortClaim) {
    let same = |old: &&mut PortClaim| {
        (old.kind, &old.who, old.only, &old.families) == (claim.kind, &claim.who, claim.only, &claim.families)
    };
    match found.iter_mut().find(same) {
        Some(old) if old.wins == Wins::No && claim.wins != Wins::No => *old = claim,
        Some(_) => {}
        None => found.push(claim),
    }
}

/// One claim for both families where both come to the same.
fn merged(found: Vec<PortClaim>) -> Vec<PortClaim> {
    let mut merged: Vec<PortClaim> = Vec::new();
    for claim in found {
        let same = |old: &&mut PortClaim| {
            (old.kind, &old.who, old.only, old.wins) == (claim.kind, &claim.who, claim.only, claim.wins)
        };
        match merged.iter_mut().find(same) {
            Some(old) => {
                old.families.extend(claim.families);
                old.families.sort_unstable();
                old.families.dedup();
            }
            None => merged.push(claim),
        }
    }
    merged
}

impl Port {
    /// Whether claims of different owners meet on it.
    pub fn is_contested(&self) -> bool {
        let meet = |one: &PortClaim, other: &PortClaim| {
            one.owner() != other.owner()
                && one.only.is_none_or(|only| other.only.is_none_or(|other| only == other))
                && one.families.iter().any(|family| other.families.contains(family))
        };
        self.claims.iter().enumerate().any(|(at, one)| self.claims[at + 1..].iter().any(|other| meet(one, other)))
    }
}

impl PortClaim {
    /// The Service, pod or process behind it, without what kube-proxy's comments say of it.
    pub fn owner(&self) -> &str {
        self.who.split(' ').next().unwrap_or_default()
    }
}

/// What an outsider meets: by IPv4 where there is such a claim.
fn outside(world: &World<'_>, traces: &BTreeMap<(Family, Option<IpAddr>), Trace>) -> Reach {
    match traces.values().next() {
        Some(trace) => reach::of_trace(world, trace),
        None => Reach {
            outcome: Outcome::Unknown,
            reason: "it is for clients on this node only, or the node's address is not known".to_owned(),
            rule: None,
            ends: Vec::new(),
        },
    }
}

fn families(claim: &Claim) -> Vec<Family> {
    match &claim.kind {
        // A dual-stack wildcard; whether it is IPv6 only shows when the packet comes to it.
        ClaimKind::Listener { address: IpAddr::V6(any), .. } if any.is_unspecified() => vec![Family::V4, Family::V6],
        _ => vec![claim.family],
    }
}

fn shown(world: &World<'_>, claim: &Claim) -> PortClaim {
    let plain = |kind, who| PortClaim {
        kind,
        who,
        only: None,
        to: None,
        endpoints: None,
        families: Vec::new(),
        rule: claim.rule.clone(),
        wins: Wins::Unasked,
    };
    match &claim.kind {
        ClaimKind::HostPort { to, host_ip, .. } => {
            let who = world.facts.called(to.ip());
            PortClaim { only: *host_ip, to: Some(*to), ..plain(Kind::HostPort, who) }
        }
        ClaimKind::NodePort { service, endpoints } => {
            PortClaim { endpoints: Some(*endpoints), ..plain(Kind::NodePort, service.to_string()) }
        }
        ClaimKind::ServicePort { service, address, endpoints } => {
            let kind = external(world, claim, *address).unwrap_or(Kind::ExternalIp);
            PortClaim { endpoints: Some(*endpoints), ..plain(kind, service.to_string()) }
        }
        ClaimKind::Refused { why, .. } => plain(Kind::Refused, why.clone()),
        ClaimKind::Listener { address, process } => {
            let who = process.clone().unwrap_or_else(|| "a process".to_owned());
            PortClaim { only: Some(*address).filter(|address| !address.is_unspecified()), ..plain(Kind::Listener, who) }
        }
    }
}

/// Whether the branches of a trace come to a claim: through its rule, or to its socket.
fn winner(claim: &Claim, trace: &Trace) -> Wins {
    let comes = trace.branches.iter().filter(|branch| comes_to(claim, branch)).count();
    match comes {
        0 => Wins::No,
        all if all == trace.branches.len() => Wins::Yes,
        _ => Wins::Partly,
    }
}

fn comes_to(claim: &Claim, branch: &Branch) -> bool {
    match &claim.rule {
        Some(of) => branch.hops.iter().any(|hop| match (hop, &claim.leads_to) {
            (Hop::Rule { rule, action: Action::Jump { chain } | Action::Goto { chain }, .. }, Some(to)) => {
                rule == of && *chain.chain == **to
            }
            (Hop::Rule { rule, .. }, _) => rule == of,
            _ => false,
        }),
        None => matches!(&branch.verdict, Verdict::Delivered { to, listening: Some(true) } if to.dport == claim.port),
    }
}
