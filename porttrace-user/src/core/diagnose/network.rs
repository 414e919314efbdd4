//! Replies that go astray: masquerading, hairpins, bridges, and packets that are too big.

use super::samples::{From, Sample};
use super::{Checked, Evidence, Finding, Scene, Severity};
use crate::core::kube::owners::ClaimKind;
use crate::core::model::flow::Family;
use crate::core::model::state::Link;
use crate::core::model::trace::{Branch, Hop, Manip, Verdict};
use crate::core::quantity;
use crate::core::world::World;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// A translated packet leaves with a source to which no reply finds its way back through this node.
pub(super) fn masquerade(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let mut found: BTreeMap<&str, (String, Vec<&Sample>, Vec<Evidence>)> = BTreeMap::new();
    for sample in &scene.samples.all {
        for branch in &sample.trace.branches {
            let Some((kind, why)) = astray(world, sample, branch) else { continue };
            let (_, samples, _) = found.entry(kind).or_insert_with(|| (why, Vec::new(), rules(world, branch)));
            if samples.last().is_none_or(|last| !std::ptr::eq(*last, sample)) {
                samples.push(sample);
            }
        }
    }
    Ok(found
        .into_iter()
        .map(|(kind, (why, samples, evidence))| {
            // Everybody else gets through; CRI-O means it so.
            let severity = if kind == "localhost" { Severity::Warning } else { Severity::Error };
            let more = if samples.len() > 1 { format!(" (and so for {})", quantity::count(samples.len() - 1, "other port")) } else { String::new() };
            let sentence = format!("{}: {why}{more}", samples[0].what);
            let change = "restore the masquerade rules: KUBE-MARK-MASQ and KUBE-POSTROUTING are kube-proxy's (its clusterCIDR must be right), CNI-HOSTPORT-SETMARK and CNI-HOSTPORT-MASQ are portmap's, CRIO-HOSTPORTS-MASQ is CRI-O's".to_owned();
            let finding = samples.iter().fold(Finding::new(severity, sentence, change), |finding, sample| finding.port(sample.proto, sample.port));
            finding.with(evidence)
        })
        .collect())
}

/// Whether the reply would be lost, and in what way.
fn astray(world: &World<'_>, sample: &Sample, branch: &Branch) -> Option<(&'static str, String)> {
    let Verdict::Forwarded { to, .. } = &branch.verdict else { return None };
    let translated = branch.hops.iter().any(|hop| matches!(hop, Hop::Rewrite { what: Manip::Dnat, .. }));
    if !translated || branch.masquerade {
        return None;
    }
    let leaves = world.behind(to.dst).is_none();
    match sample.from {
        From::Itself if branch.final_tuple.src == to.dst => {
            let why = format!(
                "when pod {} asks for it, the packet comes back to it from its own address and the answer never leaves the pod (no masquerade for the hairpin)",
                to.dst
            );
            Some(("hairpin", why))
        }
        From::Localhost if branch.final_tuple.src.is_loopback() => {
            let why = format!(
                "from 127.0.0.1 the packet goes to {} with that source, and the answer goes astray (no masquerade)",
                to.dst
            );
            Some(("localhost", why))
        }
        From::Outside if leaves && world.is_other_nodes(to.dst) => {
            let why = format!(
                "a client's packet goes on to {} on another node with the client's source, and the answer bypasses this node (no masquerade)",
                to.dst
            );
            Some(("reply", why))
        }
        _ => None,
    }
}

/// The rules that translated.
fn rules(world: &World<'_>, branch: &Branch) -> Vec<Evidence> {
    let rewrites = branch.hops.iter().filter_map(|hop| match hop {
        Hop::Rewrite { by: Some(by), .. } => Some(Evidence::rule(world, by)),
        _ => None,
    });
    let source = Evidence::new("path", "leaves as", branch.final_tuple.to_string());
    rewrites.chain([source]).collect()
}

/// Ports of bridges behind which pods are, by bridge.
fn bridged<'f>(world: &World<'f>) -> BTreeMap<&'f str, (BTreeSet<IpAddr>, Vec<&'f Link>)> {
    let links = world.facts.state.links.as_deref().unwrap_or_default();
    let mut found: BTreeMap<&str, (BTreeSet<IpAddr>, Vec<&Link>)> = BTreeMap::new();
    for pod in [Family::V4, Family::V6].into_iter().flat_map(|family| world.local_pods(family)) {
        let Some(bridge) = links.iter().find(|link| link.name == pod.interface && link.kind == "bridge") else {
            continue;
        };
        let ports = || links.iter().filter(|link| link.master.as_deref() == Some(&bridge.name)).collect();
        found.entry(&bridge.name).or_insert_with(|| (BTreeSet::new(), ports())).0.insert(pod.address);
    }
    found
}

/// Hairpin mode is off on bridge ports whose pods are endpoints.
pub(super) fn hairpin(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    if world.facts.state.links.is_none() {
        return Err("the node's links are not known".to_owned());
    }
    let mut found = Vec::new();
    for (bridge, (pods, ports)) in bridged(world) {
        let off: Vec<&str> =
            ports.iter().filter(|port| port.hairpin == Some(false)).map(|port| port.name.as_str()).collect();
        let Some((example, what)) = pods.iter().find_map(|pod| Some((*pod, leads_to(world, *pod)?))) else { continue };
        if off.is_empty() {
            continue;
        }
        let sentence = format!(
            "hairpin mode is off on {} of {} ports of bridge {bridge}: a pod there (as {example}) cannot reach itself through {what}",
            off.len(),
            ports.len()
        );
        let change = format!(
            "set hairpinMode: true in the CNI's bridge configuration (`bridge link set dev {} hairpin on` for one port), or use promiscMode",
            off[0]
        );
        let evidence =
            off.iter().take(3).map(|port| Evidence::new("link", *port, format!("port of {bridge}, hairpin off")));
        found.push(Finding::new(Severity::Warning, sentence, change).with(evidence).of_node());
    }
    Ok(found)
}

/// The Service or hostPort that leads to a pod.
fn leads_to(world: &World<'_>, pod: IpAddr) -> Option<String> {
    let by_host_port = world.owners.all().find_map(|claim| match &claim.kind {
        ClaimKind::HostPort { to, .. } if to.ip() == pod => Some(format!("hostPort {}", claim.port)),
        _ => None,
    });
    by_host_port.or_else(|| {
        [crate::core::model::flow::Proto::Tcp, crate::core::model::flow::Proto::Udp].into_iter().find_map(|proto| {
            world.owners.served_ports(proto, pod).first().map(|(_, service)| format!("Service {service}"))
        })
    })
}

/// Bridged packets skip iptables, so that replies of pods on the same bridge are not translated back.
pub(super) fn bridge_nf(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    if world.facts.state.links.is_none() || world.facts.state.sysctls.is_none() {
        return Err("links or settings (sysctl) are not known".to_owned());
    }
    const KEY: &str = "net.bridge.bridge-nf-call-iptables";
    let value = world.facts.state.sysctls.as_ref().and_then(|all| all.get(KEY)).map(|value| value.trim());
    let mut found = Vec::new();
    for (bridge, (pods, _)) in bridged(world) {
        let served: Vec<&IpAddr> = pods.iter().filter(|pod| leads_to(world, **pod).is_some()).collect();
        // Without br_netfilter the setting is not there at all, and bridged packets skip iptables as well.
        if value == Some("1") || pods.iter().filter(|pod| pod.is_ipv4()).count() < 2 || served.is_empty() {
            continue;
        }
        let sentence = format!(
            "bridged packets skip iptables ({KEY} is {}): a pod on {bridge} that asks a Service is answered by a pod on the same bridge (as {}) directly, from an address that it did not ask",
            value.unwrap_or("not there: br_netfilter is not loaded"),
            served[0]
        );
        let (load, place) = match value {
            None => ("`modprobe br_netfilter`, then ", "modules-load.d and sysctl.d"),
            Some(_) => ("", "sysctl.d"),
        };
        let change = format!("{load}`sysctl -w {KEY}=1` (and in /etc/{place} for the next boot)");
        found.push(Finding::new(Severity::Error, sentence, change).with([Evidence::setting(world, KEY)]).of_node());
    }
    Ok(found)
}

/// Bytes that tunnels add to a packet (VXLAN and Geneve without options: 50, IPv6 outside: 70; IPIP: 20; WireGuard: 60).
const fn overhead(kind: &[u8]) -> u32 {
    match kind {
        b"vxlan" | b"geneve" => 50,
        b"ipip" => 20,
        b"wireguard" => 60,
        _ => 0,
    }
}

/// Packets that a pod may send are too big for the way to other nodes.
pub(super) fn mtu(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let Some(links) = &world.facts.state.links else { return Err("the node's links are not known".to_owned()) };
    let link = |name: &str| links.iter().find(|link| link.name == name);
    let mut found = Vec::new();
    for family in [Family::V4, Family::V6] {
        let Some((remote, _)) = world.remote_pod(family) else { continue };
        let Some(out) = world.interface_towards(remote).and_then(link) else { continue };
        let way = world.route(remote).and_then(|route| route.mtu).map_or(out.mtu, |mtu| mtu.min(out.mtu));
        let under = world.uplink(family).and_then(link).filter(|under| under.name != out.name);
        let tunnel = overhead(out.kind.as_bytes());
        let room = under.filter(|_| tunnel > 0).map(|under| under.mtu.saturating_sub(tunnel));
        let pods = world.local_pods(family);
        let largest =
            pods.iter().filter_map(|pod| link(&pod.interface)).map(|link| (link.mtu, link.name.as_str())).max();
        let (mtu, name) = match (room.filter(|room| way > *room), largest) {
            (Some(room), _) => (room, out.name.as_str()),
            (None, Some((mtu, name))) if mtu > way => (way, name),
            _ => continue,
        };
        let sentence = format!(
            "packets to pods of other nodes (as {remote}) may be too big: {name} allows more than the {mtu} bytes that fit through {}: large answers stall where ICMP does not get through",
            if room.is_some_and(|room| way > room) { world.uplink(family).unwrap_or("the uplink") } else { &out.name }
        );
        let change = format!("set the CNI's MTU to {mtu} or less and recreate the pods");
        let shown = [Some(out), under, link(name)].into_iter().flatten().map(|link| (link.name.clone(), link));
        let shown: BTreeMap<String, &Link> = shown.collect();
        let evidence = shown.into_values().map(|link| {
            Evidence::new("link", link.name.clone(), format!("{} mtu {}", link.kind, link.mtu).trim().to_owned())
        });
        found.push(Finding::new(Severity::Warning, sentence, change).with(evidence).of_node());
        break;
    }
    Ok(found)
}
