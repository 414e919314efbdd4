//! Settings and policies of the node that stop packets on their way.

use super::samples::{From, Sample};
use super::{Checked, Evidence, Finding, Scene, Severity};
use crate::core::model::flow::{Family, Proto, Tuple};
use crate::core::model::trace::{Branch, DropReason, Hop, RuleRef, Verdict};
use crate::core::quantity;
use crate::core::world::World;
use std::collections::BTreeMap;

/// Forwarding is off.
pub(super) fn ip_forward(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let Some(sysctls) = &world.facts.state.sysctls else {
        return Err("the node's settings (sysctl) are not known".to_owned());
    };
    let off = |key: &str| sysctls.get(key).is_some_and(|value| value.trim() == "0");
    let mut found = Vec::new();
    for (family, key) in [(Family::V4, "net.ipv4.ip_forward"), (Family::V6, "net.ipv6.conf.all.forwarding")] {
        let pods = world.local_pods(family);
        let claims = world.owners.all().any(|claim| claim.family == family && claim.rule.is_some());
        // Without pods and Services of a family nothing has to be forwarded.
        if !off(key) || pods.is_empty() && !claims || family == Family::V6 && pods.is_empty() {
            continue;
        }
        let sentence = format!("{key} is 0: this node forwards nothing, so that no pod can be reached or reach others");
        let change = format!("set {key}=1 (`sysctl -w {key}=1`, and in /etc/sysctl.d for the next boot)");
        let cause = format!("{key} is 0: this node forwards nothing");
        let evidence = [Evidence::setting(world, key)];
        found.push(Finding::new(Severity::Error, sentence, change).because(cause).with(evidence).of_node());
    }
    Ok(found)
}

/// Clients beyond one interface come in by another.
pub(super) fn rp_filter(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let state = &world.facts.state;
    if state.sysctls.is_none() || state.routes.is_none() || state.links.is_none() {
        return Err("settings (sysctl), routes or links are not known".to_owned());
    }
    let mut found = Vec::new();
    // The filter asks after the rewrite (net/ipv4/fib_frontend.c): a NodePort may be dropped where a process is reached.
    let mut samples =
        scene.samples.all.iter().filter(|sample| sample.from == From::Outside && sample.proto == Proto::Tcp);
    let dport = samples.next().map_or(80, |sample| sample.port);
    for (address, interface) in world.own_addresses().filter(|(address, _)| address.is_ipv4()) {
        let link = state.links.iter().flatten().find(|link| link.name == interface);
        // Only by a network card (or what stands for one) clients from elsewhere come in.
        let outward =
            link.is_some_and(|link| link.up && matches!(link.kind.as_str(), "" | "bond" | "vlan" | "macvlan" | "team"));
        if !outward || world.uplink(Family::V4) == Some(interface) {
            continue;
        }
        let tuple = Tuple { proto: Proto::Tcp, src: World::outsider(Family::V4), sport: 40_000, dst: address, dport };
        let trace = world.arriving(tuple, interface);
        let dropped = |branch: &Branch| matches!(branch.verdict, Verdict::Dropped { reason: DropReason::RpFilter, .. });
        if trace.branches.is_empty() || !trace.branches.iter().all(dropped) {
            continue;
        }
        let back = world.uplink(Family::V4).unwrap_or("another interface");
        let sentence = format!(
            "connections from elsewhere that arrive by {interface} (to {address}) are dropped by rp_filter: the route back to their clients leads out by {back}"
        );
        let change = format!(
            "`sysctl -w net.ipv4.conf.{interface}.rp_filter=2` (loose; routing replies of {address} by {interface} would help processes of the node, but no NodePort or hostPort)"
        );
        let settings = ["net.ipv4.conf.all.rp_filter".to_owned(), format!("net.ipv4.conf.{interface}.rp_filter")];
        let evidence = settings.iter().map(|key| Evidence::setting(world, key));
        found.push(Finding::new(Severity::Warning, sentence, change).with(evidence).of_node().address(address));
    }
    Ok(found)
}

/// filter FORWARD ends in its policy DROP.
pub(super) fn forward_policy(scene: &Scene<'_, '_>) -> Checked {
    let by_policy = |by: &RuleRef| by.number().is_none() && &*by.chain == "FORWARD" && &*by.table == "filter";
    Ok(dropped(scene, by_policy)
        .into_values()
        .map(|(by, samples)| {
            let sentence = format!(
                "the policy DROP of filter FORWARD takes what no rule accepts: {} is dropped on its way to the pod{}",
                samples[0].what,
                more(samples.len())
            );
            let change = "let the CNI or a rule of yours accept traffic to and from the pods' network in FORWARD, or set the policy to ACCEPT (`iptables -P FORWARD ACCEPT`)";
            let cause = "the policy DROP of filter FORWARD takes what no rule accepts".to_owned();
            let finding = Finding::new(Severity::Error, sentence, change.to_owned()).because(cause);
            about(finding, &samples).with([Evidence::rule(scene.world, &by)]).of_node()
        })
        .collect())
}

/// Chains of network policies, by the prefixes of those who write them.
const POLICIES: [(&str, &str); 5] = [
    ("cali-", "Calico"),
    ("KUBE-ROUTER-", "kube-router"),
    ("KUBE-NWPLCY-", "kube-router"),
    ("KUBE-POD-FW-", "kube-router"),
    ("WEAVE-NPC", "Weave"),
];

fn writer(chain: &str) -> Option<&'static str> {
    POLICIES.iter().find(|(prefix, _)| chain.starts_with(prefix)).map(|(_, name)| *name)
}

/// A NetworkPolicy's chain drops or rejects.
pub(super) fn network_policy(scene: &Scene<'_, '_>) -> Checked {
    Ok(dropped(scene, |by| writer(&by.chain).is_some())
        .into_values()
        .map(|(by, samples)| {
            let name = writer(&by.chain).unwrap_or("a plugin");
            let client = scene.client.map_or_else(|| "outside".to_owned(), |client| client.to_string());
            let sentence = format!(
                "a network policy ({name}'s chain {}) drops connections from {client} to {}{}",
                by.chain,
                samples[0].what,
                more(samples.len())
            );
            let change =
                "allow these clients in a NetworkPolicy that selects the pod, if they are meant to come in".to_owned();
            about(Finding::new(Severity::Warning, sentence, change), &samples).with([Evidence::rule(scene.world, &by)])
        })
        .collect())
}

type Dropped<'s> = BTreeMap<RuleRef, (RuleRef, Vec<&'s Sample>)>;

/// Samples from outside (or the one that was seen) that a rule ends, by the rule.
fn dropped<'s>(scene: &'s Scene<'_, '_>, wanted: impl Fn(&RuleRef) -> bool) -> Dropped<'s> {
    let mut found = Dropped::new();
    for sample in scene.samples.all.iter().filter(|sample| matches!(sample.from, From::Outside | From::Within)) {
        for branch in &sample.trace.branches {
            let by = match &branch.verdict {
                Verdict::Dropped { reason: DropReason::Rule, by: Some(by) }
                | Verdict::Rejected { by: Some(by), .. } => by,
                _ => continue,
            };
            if wanted(by) && (translated(branch) || scene.only.is_some()) {
                let (_, samples) = found.entry(by.clone()).or_insert_with(|| (by.clone(), Vec::new()));
                if samples.last().is_none_or(|last| !std::ptr::eq(*last, sample)) {
                    samples.push(sample);
                }
            }
        }
    }
    found
}

fn translated(branch: &Branch) -> bool {
    branch.hops.iter().any(|hop| matches!(hop, Hop::Rewrite { .. }))
}

fn more(count: usize) -> String {
    if count > 1 { format!(", and {}", quantity::count(count - 1, "other port")) } else { String::new() }
}

fn about(finding: Finding, samples: &[&Sample]) -> Finding {
    samples.iter().fold(finding, |finding, sample| finding.port(sample.proto, sample.port))
}
