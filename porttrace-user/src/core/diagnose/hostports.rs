//! hostPorts: several owners of one port, and hostIPs.

use super::{Checked, Evidence, Finding, Scene, Severity};
use crate::core::kube::owners::ClaimKind;
use crate::core::model::flow::Family;
use crate::core::model::native::{Expr, Field, Statement, Verdict};
use crate::core::model::rules::{Chain, Rule, Target};
use crate::core::model::trace::{Flavour, Hook};
use crate::core::ports::{Kind, Port, PortClaim, Wins};
use crate::core::world::World;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Ports that two kinds of claims meet on, with a claim of each.
fn pairs<'s>(
    scene: &'s Scene<'_, '_>,
    one: Kind,
    other: Kind,
) -> impl Iterator<Item = (&'s Port, &'s PortClaim, &'s PortClaim)> {
    scene.samples.ports.iter().filter(|port| port.address.is_none()).filter_map(move |port| {
        let first = port.claims.iter().find(|claim| claim.kind == one)?;
        let second = port.claims.iter().find(|claim| claim.kind == other && overlap(first, claim))?;
        Some((port, first, second))
    })
}

fn overlap(one: &PortClaim, other: &PortClaim) -> bool {
    let addresses = match (one.only, other.only) {
        (Some(one), Some(other)) => one == other,
        _ => true,
    };
    addresses && one.families.iter().any(|family| other.families.contains(family))
}

fn is_native(claim: &PortClaim) -> bool {
    claim.rule.as_ref().is_some_and(|rule| rule.flavour == Flavour::Nftables)
}

/// `the hostPort wins now`, in words.
fn who_wins(first: &PortClaim, second: &PortClaim) -> String {
    match (first.wins, second.wins) {
        (Wins::Yes, Wins::No) => format!("the {} wins now", first.kind.name()),
        (Wins::No, Wins::Yes) => format!("the {} wins now", second.kind.name()),
        (Wins::Partly, Wins::Partly) if is_native(first) || is_native(second) => {
            "who wins depends on whose nftables chains were made last, which the rules do not show (kube-proxy's are made anew when it starts)"
                .to_owned()
        }
        _ => "who wins depends on the address".to_owned(),
    }
}

/// The place of a chain's jump among the rules of PREROUTING.
fn jump_place(world: &World<'_>, chain: &str) -> Option<u32> {
    let nat = world.facts.state.rulesets.iter().filter(|set| set.family == Family::V4).flat_map(|set| &set.tables);
    let prerouting = nat.filter(|table| table.name == "nat").find_map(|table| table.chain("PREROUTING"))?;
    let at = prerouting.rules.iter().position(|rule| super::stale::jumps_to(&rule.text.read(), chain))?;
    u32::try_from(at + 1).ok()
}

/// One port is both a hostPort and a NodePort.
pub(super) fn and_node_port(scene: &Scene<'_, '_>) -> Checked {
    let kube = jump_place(scene.world, "KUBE-SERVICES");
    let cni = jump_place(scene.world, "CNI-HOSTPORT-DNAT").or_else(|| jump_place(scene.world, "KUBE-HOSTPORTS"));
    Ok(pairs(scene, Kind::HostPort, Kind::NodePort)
        .map(|(port, host, node)| {
            // kube-proxy puts its jump first, but leaves one that is there in its place (proxier.go, EnsureRule with Prepend).
            let later = match (kube, cni) {
                (Some(kube), Some(cni)) if kube < cni => "; a restart of kube-proxy does not change that",
                (Some(_), Some(_)) => {
                    "; once kube-proxy has to write its jump anew, it puts it first and the NodePort wins"
                }
                _ => "",
            };
            let sentence = format!(
                "{} {} is both hostPort of {} and NodePort of {}: {}{later}",
                port.proto,
                port.port,
                host.who,
                node.who,
                who_wins(host, node)
            );
            let change = format!(
                "give one of them another port: NodePorts come from 30000–32767, so keep hostPort {} out of it",
                port.port
            );
            both(scene, port, host, node, Severity::Error, sentence, change)
        })
        .collect())
}

/// One port is a hostPort, and a process of the node listens there.
pub(super) fn and_process(scene: &Scene<'_, '_>) -> Checked {
    if scene.world.facts.state.sockets.is_none() {
        return Err("the node's own sockets are not known".to_owned());
    }
    Ok(pairs(scene, Kind::HostPort, Kind::Listener)
        .map(|(port, host, process)| {
            let sentence = format!(
                "{} {} is hostPort of {}, and {} of this node listens there too: {}, so that nobody but hostPort's rules is asked",
                port.proto,
                port.port,
                host.who,
                process.who,
                who_wins(host, process)
            );
            let sentence = sentence.replace(", so that nobody but hostPort's rules is asked", if process.wins == Wins::No { ", and the process is never asked" } else { "" });
            let change = format!("move the process or the hostPort to another port than {}", port.port);
            both(scene, port, host, process, Severity::Warning, sentence, change)
        })
        .collect())
}

/// One port is a NodePort, and a process of the node listens there (other than kube-proxy's own health checks).
pub(super) fn node_port_and_process(scene: &Scene<'_, '_>) -> Checked {
    if scene.world.facts.state.sockets.is_none() {
        return Err("the node's own sockets are not known".to_owned());
    }
    let ours = |process: &PortClaim| process.who.starts_with("kube-proxy");
    Ok(pairs(scene, Kind::NodePort, Kind::Listener)
        // Before 1.27 kube-proxy held a socket on each NodePort itself.
        .filter(|(_, _, process)| !ours(process))
        .map(|(port, node, process)| {
            let sentence = format!(
                "{} {} is NodePort of {}, and {} of this node listens there too: {}",
                port.proto,
                port.port,
                node.who,
                process.who,
                who_wins(node, process)
            );
            let change = format!(
                "move the process out of the range of NodePorts, or give the Service another nodePort than {}",
                port.port
            );
            both(scene, port, node, process, Severity::Warning, sentence, change)
        })
        .collect())
}

fn both(
    scene: &Scene<'_, '_>,
    port: &Port,
    one: &PortClaim,
    other: &PortClaim,
    severity: Severity,
    sentence: String,
    change: String,
) -> Finding {
    let rules =
        [one, other].into_iter().filter_map(|claim| claim.rule.as_ref()).map(|rule| Evidence::rule(scene.world, rule));
    let socket = [one, other].into_iter().filter(|claim| claim.kind == Kind::Listener).map(|claim| {
        let address = claim.only.map_or_else(|| "*".to_owned(), |only| only.to_string());
        Evidence::new("socket", claim.who.clone(), format!("{} {address}:{}", port.proto, port.port))
    });
    let mut finding = Finding::new(severity, sentence, change).with(rules).with(socket).port(port.proto, port.port);
    for claim in [one, other] {
        if let Some(service) = super::service_of(&claim.who).filter(|_| claim.kind == Kind::NodePort) {
            finding = finding.service(&service);
        }
        if let Some(to) = claim.to {
            finding = finding.pod(scene.world.facts.pod_at(to.ip()).map(|pod| &pod.name)).address(to.ip());
        }
    }
    finding
}

/// Two pods ask for one hostPort.
pub(super) fn twice(scene: &Scene<'_, '_>) -> Checked {
    let mut found = Vec::new();
    for port in scene.samples.ports.iter().filter(|port| port.address.is_none()) {
        for family in [Family::V4, Family::V6] {
            let hosts: Vec<&PortClaim> = port
                .claims
                .iter()
                .filter(|claim| claim.kind == Kind::HostPort && claim.families.contains(&family))
                .collect();
            let [first, rest @ ..] = hosts.as_slice() else { continue };
            let Some(second) = rest.iter().find(|other| overlap(first, other) && other.to != first.to) else {
                continue;
            };
            // A leftover is a finding of its own, which says what to do about it.
            if [first, second].iter().any(|claim| claim.to.is_some_and(|to| super::stale::is_stale(scene.world, to))) {
                continue;
            }
            let (one, other) = (named(scene.world, first), named(scene.world, second));
            let sentence = format!(
                "{} {} is hostPort of both {one} and {other}: {one} wins now, as its rule comes first",
                port.proto, port.port
            );
            let change =
                "give one of the pods another hostPort; if one of them is gone, remove its leftover rules".to_owned();
            found.push(both(scene, port, first, second, Severity::Error, sentence, change));
            break;
        }
    }
    Ok(found)
}

fn named(world: &World<'_>, claim: &PortClaim) -> String {
    let facts = world.facts;
    let pods_known = facts.cluster.pods.known().is_some() || facts.sandboxes.known().is_some();
    match claim.to {
        Some(to) if pods_known && facts.name_at(to.ip()).is_none() => format!("{} (no pod that is known)", to.ip()),
        _ => claim.who.clone(),
    }
}

/// A hostIP that this node does not have.
pub(super) fn host_ip(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let facts = world.facts;
    if facts.state.addresses.is_none() {
        return Err("the node's addresses are not known".to_owned());
    }
    let elsewhere = |address: IpAddr| facts.is_own(address) == Some(false);
    let mut found = BTreeMap::new();
    for claim in world.owners.all() {
        if let ClaimKind::HostPort { host_ip: Some(host_ip), to, .. } = &claim.kind
            && elsewhere(*host_ip)
        {
            let evidence: Vec<Evidence> = claim.rule.iter().map(|rule| Evidence::rule(world, rule)).collect();
            found.insert(
                (claim.proto, claim.port, *host_ip),
                (facts.name_at(to.ip()).unwrap_or_else(|| to.to_string()), evidence),
            );
        }
    }
    let here = facts.cluster.pods.iter().filter(|pod| pod.node.is_some() && pod.node == facts.state.name);
    for pod in here {
        for port in pod.containers.iter().flat_map(|container| &container.ports) {
            if let (Some(host_port), Some(host_ip)) =
                (port.host_port, port.host_ip.filter(|address| elsewhere(*address)))
            {
                let evidence = Evidence::new(
                    "object",
                    format!("pod {}", pod.name),
                    format!("hostPort {host_port}, hostIP {host_ip}"),
                );
                found
                    .entry((port.proto, host_port, host_ip))
                    .or_insert_with(|| (pod.name.to_string(), Vec::new()))
                    .1
                    .push(evidence);
            }
        }
    }
    let own: Vec<String> = world.own_addresses().map(|(address, _)| address.to_string()).take(4).collect();
    Ok(found
        .into_iter()
        .map(|((proto, port, host_ip), (who, evidence))| {
            let sentence = format!("hostPort {port}/{proto} of {who} is for hostIP {host_ip}, which this node does not have: nobody reaches it");
            let change = format!("leave hostIP out, or set it to an address of this node ({})", own.join(", "));
            Finding::new(Severity::Error, sentence, change).with(evidence).port(proto, port)
        })
        .collect())
}

/// portmap's nftables backend of 1.6.1 to 1.8 rewrites what is only forwarded.
pub(super) fn catches_forwarded(scene: &Scene<'_, '_>) -> Checked {
    let state = &scene.world.facts.state;
    if !state.knows_native || state.unfollowed().any(|base| base.table == "cni_hostport") {
        return Err("native nftables rules are not known".to_owned());
    }
    let mut found = Vec::new();
    for table in state.native_rules.iter().flat_map(|set| &set.tables) {
        let asked = |chain: &&Chain| chain.base.is_some_and(|base| base.hook == Hook::Prerouting);
        let Some(chain) = table.chains.iter().find(asked).filter(|_| table.name.ends_with(" cni_hostport")) else {
            continue;
        };
        let Some(rule) = chain.rules.iter().find(|rule| jumps_unasked(rule)) else { continue };
        let sentence = format!(
            "portmap's nftables rules ({}) rewrite every packet to a hostPort's number, also one that is only forwarded through this node",
            table.name
        );
        let change = "update the CNI plugins to 1.9 or later, and recreate the pods with hostPorts".to_owned();
        let place = format!("{} {}", table.name, chain.name());
        found.push(
            Finding::new(Severity::Error, sentence, change)
                .with([Evidence::new("rule", place, rule.text.read().to_string())])
                .of_node(),
        );
    }
    Ok(found)
}

/// Whether a native rule leads to another chain without asking whether the destination is this node's (portmap_nftables.go of 1.9
/// does, by `fib daddr type local`).
fn jumps_unasked(rule: &Rule) -> bool {
    let Target::Native(all) = &rule.target else { return false };
    let mut asks = false;
    let mut jumps = false;
    for statement in &all.0 {
        statement.walk(&mut |part| asks |= matches!(part, Expr::Field(Field::FibType { source: false, .. })));
        jumps |= matches!(statement, Statement::Verdict(Verdict::Jump(_) | Verdict::Goto(_)));
    }
    jumps && !asks
}
