//! Traffic policies, source ranges, and which addresses a NodePort is served on.

use super::samples::From;
use super::services::{endpoints, of_service, port_name, served};
use super::{Checked, Evidence, Finding, Scene, Severity};
use crate::core::kube::owners::ClaimKind;
use crate::core::model::cluster::{Service, ServicePort};
use crate::core::model::flow::Family;
use crate::core::model::native::Value;
use crate::core::model::rules::{MatchKind, Target};
use crate::core::model::trace::{DropReason, Verdict};
use crate::core::quantity;
use crate::core::world::World;
use std::net::{IpAddr, SocketAddr};

/// `externalTrafficPolicy: Local` and no endpoint on this node.
pub(super) fn external(scene: &Scene<'_, '_>) -> Checked {
    let found = |service: &Service| service.external_local && service.is_external();
    without_local(scene, "externalTrafficPolicy", found, "connections from outside to this node are dropped")
}

/// `internalTrafficPolicy: Local` and no endpoint on this node.
pub(super) fn internal(scene: &Scene<'_, '_>) -> Checked {
    let dropped = "connections to its ClusterIP from this node and its pods are dropped";
    without_local(scene, "internalTrafficPolicy", |service| service.internal_local, dropped)
}

fn without_local(scene: &Scene<'_, '_>, policy: &str, wanted: impl Fn(&Service) -> bool, what: &str) -> Checked {
    let world = scene.world;
    world.facts.asked_services()?;
    world.facts.cluster.slices.get()?;
    let Some(here) = world.facts.state.name.as_deref() else { return Err("this node's name is not known".to_owned()) };
    let mut found = Vec::new();
    for service in served(scene).filter(|service| wanted(service)) {
        for port in &service.ports {
            let endpoints = endpoints(world, service, port);
            let mut used: Vec<_> = endpoints.iter().filter(|(_, one)| one.ready).collect();
            if used.is_empty() {
                used = endpoints.iter().filter(|(_, one)| one.serving && one.terminating).collect();
            }
            // kube-proxy also uses local endpoints that are terminating but serve (proxy/topology.go, CategorizeEndpoints).
            let local = endpoints
                .iter()
                .any(|(_, one)| one.node.as_deref() == Some(here) && (one.ready || one.serving && one.terminating));
            if used.is_empty() || local {
                continue;
            }
            let mut nodes: Vec<&str> = used.iter().filter_map(|(_, one)| one.node.as_deref()).collect();
            nodes.sort_unstable();
            nodes.dedup();
            let sentence = format!(
                "Service {} has {policy}: Local and no endpoint on {here}: {what} (endpoints are on {})",
                port_name(service, port),
                nodes.join(", ")
            );
            let change =
                format!("send clients to {}, run a pod of it here, or set {policy}: Cluster", nodes.join(" or "));
            let cause = format!(
                "Service {} has {policy}: Local and no endpoint on {here} (endpoints are on {})",
                port_name(service, port),
                nodes.join(", ")
            );
            let finding = of_service(Severity::Warning, service, sentence, change).because(cause);
            found.push(finding.with(dropping(world, service, port)));
        }
    }
    Ok(found)
}

/// The rule that drops for want of local endpoints.
fn dropping(world: &World<'_>, service: &Service, port: &ServicePort) -> Option<Evidence> {
    let wanted = format!("{} has no local endpoints", port_name(service, port));
    let mut claims = world.owners.all();
    let claim = claims.find(|claim| matches!(&claim.kind, ClaimKind::Refused { why, .. } if *why == wanted))?;
    claim.rule.as_ref().map(|rule| Evidence::rule(world, rule))
}

/// `loadBalancerSourceRanges` that leave the client out.
pub(super) fn source_ranges(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    world.facts.asked_services()?;
    let Some(client) = scene.client else {
        let any = served(scene).any(|service| !service.source_ranges.is_empty());
        return if any { Err("no client was named (--from ADDRESS)".to_owned()) } else { Ok(Vec::new()) };
    };
    let out = |service: &&Service| {
        !service.source_ranges.is_empty() && service.source_ranges.iter().all(|net| !net.contains(&client))
    };
    Ok(served(scene)
        .filter(out)
        .map(|service| {
            let ranges: Vec<String> = service.source_ranges.iter().map(ToString::to_string).collect();
            let ranges = ranges.join(", ");
            let sentence = format!(
                "loadBalancerSourceRanges of Service {} ({ranges}) leave {client} out: its connections to the load balancer's address are dropped",
                service.name
            );
            let change = format!("add {client} to loadBalancerSourceRanges, or use the NodePort, which they do not guard");
            let object = Evidence::new("object", format!("Service {}", service.name), format!("loadBalancerSourceRanges {ranges}"));
            let cause = format!("loadBalancerSourceRanges of Service {} ({ranges}) leave {client} out", service.name);
            of_service(Severity::Warning, service, sentence, change).because(cause).with([object]).with(firewall(world, service))
        })
        .collect())
}

/// kube-proxy's rule that drops what KUBE-FW- did not accept.
fn firewall(world: &World<'_>, service: &Service) -> Option<Evidence> {
    let wanted = format!("{}:", service.name);
    for set in &world.facts.state.rulesets {
        for table in set.tables.iter().filter(|table| table.name == "filter") {
            let Some(chain) = table.chain("KUBE-PROXY-FIREWALL") else { continue };
            for (number, rule) in (1u32..).zip(&chain.rules) {
                if rule.target == Target::Drop && rule.comment().is_some_and(|comment| comment.starts_with(&wanted)) {
                    return Some(Evidence::new(
                        "rule",
                        format!("filter KUBE-PROXY-FIREWALL #{number}"),
                        rule.text.to_string(),
                    ));
                }
            }
        }
    }
    None
}

/// kube-proxy serves NodePorts on some addresses only (`--nodeport-addresses`), and one of the node's is not among them.
pub(super) fn node_port_addresses(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    if world.facts.state.addresses.is_none() {
        return Err("the node's addresses are not known".to_owned());
    }
    let config = world.facts.proxy.known();
    let configured = config.map(|config| config.node_port_addresses.as_slice()).unwrap_or_default();
    let primary = config.is_some_and(|config| config.node_port_primary);
    let (mut served, mut rules) = jumps(world);
    if rules.is_empty() && configured.is_empty() && !primary {
        return Ok(Vec::new());
    }
    served.sort_unstable();
    let mut found = Vec::new();
    let any = scene
        .samples
        .ports
        .iter()
        .find(|port| port.claims.iter().any(|claim| claim.kind == crate::core::ports::Kind::NodePort));
    let Some(example) = any else { return Ok(found) };
    for family in [Family::V4, Family::V6] {
        let Some(address) = asked(scene, family).or_else(|| world.node_address(family)) else { continue };
        let of_family = served.iter().filter(|one| Family::of(**one) == family).count();
        let in_rules = rules.is_empty() || of_family == 0 || served.contains(&address);
        let is_primary = world.node_address(family) == Some(address);
        let in_config = configured.is_empty() && !primary
            || configured.iter().any(|net| net.contains(&address))
            || primary && is_primary;
        if in_rules && in_config {
            continue;
        }
        let shown: Vec<String> = if configured.is_empty() && !primary {
            served.iter().map(ToString::to_string).collect()
        } else {
            let primary = primary.then(|| "the node's primary addresses".to_owned());
            primary.into_iter().chain(configured.iter().map(ToString::to_string)).collect()
        };
        let sentence = format!(
            "NodePorts (as {}) are served on {} only, which leaves the node's address {address} out",
            example.port,
            shown.join(", ")
        );
        let change = format!("add {address} to kube-proxy's nodePortAddresses, or leave it empty for all addresses");
        let config =
            Evidence::new("object", "kube-proxy's configuration", format!("nodePortAddresses {}", shown.join(", ")));
        let config = Some(config).filter(|_| !configured.is_empty() || primary);
        let finding = Finding::new(Severity::Error, sentence, change).with(config).with(std::mem::take(&mut rules));
        found.push(finding.of_node().address(address));
    }
    Ok(found)
}

/// The address of this node that a connection asked for.
fn asked(scene: &Scene<'_, '_>, family: Family) -> Option<IpAddr> {
    scene.only.as_ref()?;
    let asked = scene.samples.all.first()?.trace.packet.tuple.dst;
    let ours = !asked.is_loopback() && scene.world.facts.is_own(asked) == Some(true);
    Some(asked).filter(|_| ours && Family::of(asked) == family)
}

/// The addresses for which KUBE-SERVICES goes on to KUBE-NODEPORTS, and those of kube-proxy's native set for that; none where it does
/// so for every local address.
fn jumps(world: &World<'_>) -> (Vec<IpAddr>, Vec<Evidence>) {
    let (mut addresses, mut rules) = (Vec::new(), Vec::new());
    for table in world.facts.state.native_rules.iter().flat_map(|set| &set.tables) {
        let set = table.sets.iter().find(|set| *set.name == *"nodeport-ips");
        let Some(set) = set.filter(|_| table.name.ends_with(" kube-proxy")) else { continue };
        let mut of_set: Vec<IpAddr> = set
            .elements()
            .filter_map(|(key, ..)| match key {
                [Value::Address(address)] => Some(*address),
                _ => None,
            })
            .collect();
        of_set.sort_unstable();
        let listed = of_set.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        rules.push(Evidence::new("rule", format!("set nodeport-ips of {}", table.name), listed));
        addresses.extend(of_set);
    }
    for set in &world.facts.state.rulesets {
        let Some(table) = set.tables.iter().find(|table| table.name == "nat") else { continue };
        let Some(chain) = table.chain("KUBE-SERVICES") else { continue };
        for (number, rule) in (1u32..).zip(&chain.rules) {
            let leads = matches!(rule.target, Target::Jump(to) if table.chains.get(to as usize).is_some_and(|to| to.name() == "KUBE-NODEPORTS"));
            let local = rule.matches.iter().any(|one| matches!(one.kind, MatchKind::AddrType { .. }));
            if leads
                && !local
                && let Some(address) = crate::core::kube::owners::destination_of(rule)
            {
                addresses.push(address);
                rules.push(Evidence::new("rule", format!("nat KUBE-SERVICES #{number}"), rule.text.to_string()));
            }
        }
    }
    (addresses, rules)
}

/// 127.0.0.1:PORT does not lead to a NodePort or hostPort.
pub(super) fn localhost(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    if world.facts.state.sysctls.is_none() {
        return Err("the node's settings (sysctl) are not known".to_owned());
    }
    if world.facts.proxy.known().is_some_and(|config| config.mode == "nftables") {
        let sentence = "kube-proxy in nftables mode serves no NodePort on 127.0.0.1".to_owned();
        let change = "use the node's address instead of 127.0.0.1".to_owned();
        let evidence = Evidence::new("object", "kube-proxy's configuration", "mode: nftables");
        return Ok(vec![Finding::new(Severity::Note, sentence, change).with([evidence]).of_node()]);
    }
    let martian = |verdict: &Verdict| matches!(verdict, Verdict::Dropped { reason: DropReason::Martian, .. });
    let mut lost: Vec<(&str, SocketAddr, crate::core::model::flow::Proto, u16)> = Vec::new();
    for sample in scene.samples.all.iter().filter(|sample| sample.from == From::Localhost) {
        if let Some(branch) = sample.trace.branches.iter().find(|branch| martian(&branch.verdict)) {
            lost.push((&sample.what, branch.final_tuple.destination(), sample.proto, sample.port));
        }
    }
    let Some((what, to, proto, port)) = lost.first().copied() else { return Ok(Vec::new()) };
    let more = if lost.len() > 1 {
        format!(", and the same goes for {}", quantity::count(lost.len() - 1, "other port"))
    } else {
        String::new()
    };
    let sentence = format!(
        "127.0.0.1:{port} ({what}) is rewritten to {to}, but a packet from 127.0.0.1 may not leave the node: route_localnet is 0{more}"
    );
    let change = "use the node's address instead of 127.0.0.1; or set net.ipv4.conf.all.route_localnet=1 (kube-proxy's --iptables-localhost-nodeports does)".to_owned();
    let evidence = Evidence::setting(world, "net.ipv4.conf.all.route_localnet");
    let finding =
        lost.iter().fold(Finding::new(Severity::Warning, sentence, change), |finding, one| finding.port(one.2, one.3));
    let cause = "route_localnet is 0: a packet from 127.0.0.1 may not leave the node".to_owned();
    Ok(vec![finding.because(cause).with([evidence]).port(proto, port)])
}
