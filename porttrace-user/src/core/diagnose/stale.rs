//! hostPorts whose pod is gone: portmap's and CRI-O's chains that nobody removed.

use super::{Checked, Evidence, Finding, Scene, Severity};
use crate::core::kube::hash;
use crate::core::kube::owners::{Claim, ClaimKind};
use crate::core::model::flow::{Family, Proto};
use crate::core::model::name::Name;
use crate::core::model::trace::Flavour;
use crate::core::ports::{Kind, Port, Wins};
use crate::core::world::World;
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// A chain of portmap or CRI-O whose pod is gone.
pub(super) fn stale(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let facts = world.facts;
    if facts.sandboxes.known().is_none() && facts.cluster.pods.known().is_none() && facts.listeners.known().is_none() {
        return Err("neither pods nor sandboxes nor the pods' network namespaces are known".to_owned());
    }
    let mut found: BTreeMap<(Name, Proto, u16, SocketAddr), Finding> = BTreeMap::new();
    for claim in world.owners.all() {
        let ClaimKind::HostPort { to, network, sandbox, chain, .. } = &claim.kind else { continue };
        let by = Maker::of(claim, chain, network.as_deref());
        let Some(proofs) = gone(world, *to, &by, sandbox.as_deref(), chain) else { continue };
        let shadows = shadowed(scene, claim, *to);
        let shadow = shadows.as_deref().map_or_else(String::new, |who| format!(", and hides that of {who}"));
        let sentence = format!(
            "hostPort {}/{} still leads to {to}, which is no pod's any more{shadow}: packets to it are lost",
            claim.port, claim.proto
        );
        let lines = by.removal(world, claim, chain);
        let change = format!("remove the leftover ({}): {lines}", by.missed());
        let finding = Finding::new(Severity::Error, sentence, change)
            .because(format!("no pod has {} any more{shadow}", to.ip()))
            .with(claim.rule.iter().map(|rule| Evidence::rule(world, rule)))
            .with(proofs)
            .port(claim.proto, claim.port)
            .address(to.ip());
        found.insert((chain.clone(), claim.proto, claim.port, *to), finding);
    }
    Ok(found.into_values().collect())
}

/// Who made a hostPort's chain, and of what its name is a hash.
enum Maker<'c> {
    Portmap {
        network: Option<&'c str>,
    },
    /// portmap's native rules, which name the sandbox in a comment.
    Native {
        sandbox: Option<&'c str>,
        handle: u32,
    },
    Crio {
        port: u16,
        proto: String,
        host_ip: String,
    },
}

impl<'c> Maker<'c> {
    fn of(claim: &'c Claim, chain: &str, network: Option<&'c str>) -> Self {
        let ClaimKind::HostPort { host_ip, sandbox, .. } = &claim.kind else { return Self::Portmap { network } };
        if let Some(rule) = claim.rule.as_ref().filter(|rule| rule.flavour == Flavour::Nftables) {
            let handle = rule.rule().map_or(0, |rule| rule.line);
            return Self::Native { sandbox: sandbox.as_deref(), handle };
        }
        if !chain.starts_with(hash::CRIO) {
            return Self::Portmap { network };
        }
        let host_ip = host_ip.map_or_else(String::new, |host_ip| host_ip.to_string());
        Self::Crio { port: claim.port, proto: claim.proto.to_string(), host_ip }
    }

    /// Whether a sandbox's chain has this name.
    fn names(&self, sandbox: &str, chain: &str) -> bool {
        match self {
            Self::Portmap { network } => network.is_some_and(|network| hash::portmap_chain(network, sandbox) == chain),
            Self::Native { sandbox: of, .. } => *of == Some(sandbox),
            // A hostIP of all addresses stands in the hash, and not in the rules.
            Self::Crio { port, proto, host_ip } => [host_ip.as_str(), "0.0.0.0", "::"]
                .iter()
                .any(|host_ip| hash::crio_chain(sandbox, *port, proto, host_ip) == chain),
        }
    }

    /// The command lines that take the leftover away.
    fn removal(&self, world: &World<'_>, claim: &Claim, chain: &str) -> String {
        match self {
            Self::Portmap { .. } => removal(world, claim.family, "CNI-HOSTPORT-DNAT", chain),
            Self::Crio { .. } => removal(world, claim.family, "KUBE-HOSTPORTS", chain),
            Self::Native { handle, .. } => {
                let table = claim.rule.as_ref().map_or_else(String::new, |rule| rule.table.to_string());
                format!("`nft delete rule {table} {chain} handle {handle}`")
            }
        }
    }

    /// What no sandbox has to do with any more.
    fn unclaimed(&self, chain: &str, made_for: Option<&str>) -> String {
        let short = made_for.map(|id| id.get(..13).unwrap_or(id));
        match (self, short) {
            (Self::Native { .. }, Some(id)) => format!("no sandbox of the runtime is {id}, for which it was made"),
            (_, Some(id)) => format!("no sandbox of the runtime hashes to {chain}; it was made for {id}"),
            (_, None) => format!("no sandbox of the runtime hashes to {chain}"),
        }
    }

    const fn missed(&self) -> &'static str {
        match self {
            Self::Portmap { .. } | Self::Native { .. } => "CNI DEL never came for its sandbox",
            Self::Crio { .. } => "CRI-O did not remove it with its sandbox",
        }
    }
}

/// The command lines that take a chain away, in the order in which they must be given. Rules are named by their text: numbers
/// change when a pod comes or goes.
fn removal(world: &World<'_>, family: Family, entries: &str, chain: &str) -> String {
    let tool = if family == Family::V4 { "iptables" } else { "ip6tables" };
    let sets = world.facts.state.rulesets.iter().filter(|set| set.family == family);
    let tables = sets.flat_map(|set| &set.tables).filter(|table| table.name == "nat");
    let entries = tables.filter_map(|table| table.chain(entries)).flat_map(|entries| &entries.rules);
    let jumps = entries.map(|rule| rule.text.read()).filter(|text| jumps_to(text, chain));
    let deletions = jumps.filter_map(|text| Some(format!("`{tool} -t nat -D {}`", text.as_str().strip_prefix("-A ")?)));
    let lines: Vec<String> =
        deletions.chain(["-F", "-X"].map(|what| format!("`{tool} -t nat {what} {chain}`"))).collect();
    lines.join(", ")
}

/// Whether a rule's text ends in a jump to this chain.
pub(super) fn jumps_to(text: &str, chain: &str) -> bool {
    text.strip_suffix(chain).is_some_and(|rest| rest.ends_with("-j "))
}

/// Whether a hostPort's endpoint is a gone pod's.
pub(super) fn is_stale(world: &World<'_>, at: SocketAddr) -> bool {
    world.owners.all().any(|claim| match &claim.kind {
        ClaimKind::HostPort { to, network, sandbox, chain, .. } if *to == at => {
            gone(world, at, &Maker::of(claim, chain, network.as_deref()), sandbox.as_deref(), chain).is_some()
        }
        _ => false,
    })
}

/// Proofs that the pod behind a chain is gone; `None` when something says that it is there, or nothing says anything.
fn gone(
    world: &World<'_>,
    to: SocketAddr,
    by: &Maker<'_>,
    sandbox: Option<&str>,
    chain: &str,
) -> Option<Vec<Evidence>> {
    let facts = world.facts;
    let mut proofs = Vec::new();
    if let Some(sandboxes) = facts.sandboxes.known() {
        let live = sandboxes.iter().filter(|one| one.ready);
        if live.clone().any(|one| by.names(&one.id, chain) || one.ips.contains(&to.ip())) {
            return None;
        }
        proofs.push(Evidence::new("object", "container runtime", by.unclaimed(chain, sandbox)));
    }
    if let Some(pods) = facts.cluster.pods.known() {
        if pods.iter().any(|pod| pod.ips.contains(&to.ip())) {
            return None;
        }
        proofs.push(Evidence::new("object", "pods", format!("none of {} has {}", pods.len(), to.ip())));
    }
    if let Some(namespaces) = facts.listeners.known() {
        if namespaces.sockets(to.ip()).is_some() {
            return None;
        }
        proofs.push(Evidence::new(
            "socket",
            "network namespaces",
            format!("none that was looked into has {}", to.ip()),
        ));
    }
    if world.behind(to.ip()).is_none()
        && let Some(interface) = world.interface_towards(to.ip())
    {
        proofs.push(Evidence::new("route", to.ip().to_string(), format!("leads out by {interface}, not to a pod")));
    }
    (!proofs.is_empty()).then_some(proofs)
}

/// Whose hostPort stands behind this one in the rules.
fn shadowed(scene: &Scene<'_, '_>, claim: &Claim, to: SocketAddr) -> Option<String> {
    let port = port(scene, claim.proto, claim.port)?;
    let others = port
        .claims
        .iter()
        .filter(|other| other.kind == Kind::HostPort && other.to.is_some_and(|at| at.ip() != to.ip()));
    let mut loses =
        others.filter(|other| other.wins == Wins::No && other.to.is_some_and(|at| Family::of(at.ip()) == claim.family));
    loses.next().map(|other| other.who.clone())
}

fn port<'s>(scene: &'s Scene<'_, '_>, proto: Proto, port: u16) -> Option<&'s Port> {
    scene.samples.ports.iter().find(|one| one.port == port && one.proto == proto && one.address.is_none())
}
