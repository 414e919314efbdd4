//! Conntrack's table, and who else decides about packets.

use super::{Checked, Evidence, Finding, Scene, Severity};
use crate::core::kube::ebpf::Network;
use crate::core::kube::owners::{Claim, ClaimKind};
use crate::core::kube::server::{IPVS_ADVICE, NATIVE_ADVICE};
use crate::core::model::flow::{Family, Proto};
use crate::core::model::state::ConntrackEntry;
use crate::core::model::trace::Flavour;
use crate::core::world::World;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

/// More than this share of the table is used: new connections are dropped when it is full.
const NEARLY: f64 = 0.9;

/// conntrack's table is nearly full.
pub(super) fn conntrack_full(scene: &Scene<'_, '_>) -> Checked {
    let Some(sysctls) = &scene.world.facts.state.sysctls else {
        return Err("the node's settings (sysctl) are not known".to_owned());
    };
    let number = |key: &str| sysctls.get(key).and_then(|value| value.trim().parse::<u64>().ok());
    const COUNT: &str = "net.netfilter.nf_conntrack_count";
    const MAX: &str = "net.netfilter.nf_conntrack_max";
    let (Some(count), Some(max)) = (number(COUNT), number(MAX)) else {
        return Err("nf_conntrack_count and nf_conntrack_max are not known".to_owned());
    };
    if max == 0 || (count as f64) < NEARLY * max as f64 {
        return Ok(Vec::new());
    }
    let sentence = format!(
        "conntrack's table is nearly full ({count} of {max}): when it is, the first packets of new connections are dropped"
    );
    let change = format!(
        "raise {MAX} (kube-proxy's conntrack.maxPerCore), or find who opens so many connections (`conntrack -L`)"
    );
    let evidence = [Evidence::setting(scene.world, COUNT), Evidence::setting(scene.world, MAX)];
    let cause = format!("conntrack's table is nearly full ({count} of {max})");
    Ok(vec![Finding::new(Severity::Error, sentence, change).because(cause).with(evidence).of_node()])
}

/// A UDP entry that leads where the rules no longer lead: it lives on as long as the client keeps sending.
pub(super) fn stale_udp(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let Some(entries) = &world.facts.state.conntrack else {
        return Err("conntrack's entries are not known".to_owned());
    };
    let claims: BTreeMap<u16, Vec<&Claim>> = world
        .owners
        .all()
        .filter(|claim| claim.proto == Proto::Udp && claim.rule.is_some())
        .fold(BTreeMap::new(), |mut by_port: BTreeMap<u16, Vec<&Claim>>, claim| {
            by_port.entry(claim.port).or_default().push(claim);
            by_port
        });
    let mut found: BTreeMap<(SocketAddr, SocketAddr), (usize, &ConntrackEntry, String, &Claim)> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| entry.original.proto == Proto::Udp) {
        let at = entry.original.destination();
        let to = entry.reply.source();
        let claims = claims.get(&at.port()).map(Vec::as_slice).unwrap_or_default();
        let mut fits = claims.iter().filter(|claim| meets(world, claim, at)).peekable();
        let Some(first) = fits.peek().copied() else { continue };
        if fits.any(|claim| leads(world, claim, to)) {
            continue;
        }
        found.entry((at, to)).or_insert_with(|| (0, entry, name(world, first), first)).0 += 1;
    }
    Ok(found
        .into_iter()
        .map(|((at, to), (count, entry, who, claim))| {
            let (where_to, why) = if to == at {
                ("untranslated".to_owned(), "it was made before the rules were")
            } else {
                (format!("to {to}"), "which is no endpoint of it any more")
            };
            let many = if count > 1 { format!(" ({count} such entries)") } else { String::new() };
            let sentence = format!(
                "a conntrack entry still sends udp {at} ({who}) {where_to}, {why}: its client's packets are lost as long as it keeps sending{many}"
            );
            let change = format!("`conntrack -D -p udp --orig-dst {} --orig-port-dst {}`, or have the client use another source port", at.ip(), at.port());
            let text = format!("{}, reply {}", entry.original, entry.reply);
            let cause = format!("an old conntrack entry still sends udp {at} ({who}) {where_to}, {why}");
            let mut finding = Finding::new(Severity::Error, sentence, change)
                .because(cause)
                .with([Evidence::new("entry", "conntrack", text)])
                .with(claim.rule.iter().map(|rule| Evidence::rule(world, rule)))
                .port(Proto::Udp, at.port());
            if let Some(service) = super::service_of(&who) {
                finding = finding.service(&service);
            }
            finding
        })
        .collect())
}

/// Whether a claim is about this destination.
fn meets(world: &World<'_>, claim: &Claim, at: SocketAddr) -> bool {
    let own = || world.facts.is_own(at.ip()) == Some(true);
    claim.family == Family::of(at.ip())
        && match &claim.kind {
            ClaimKind::ServicePort { address, .. } => *address == at.ip(),
            ClaimKind::NodePort { .. } => own(),
            ClaimKind::HostPort { host_ip, .. } => host_ip.map_or_else(own, |host_ip| host_ip == at.ip()),
            ClaimKind::Refused { .. } | ClaimKind::Listener { .. } => false,
        }
}

/// Whether a claim's rules can lead there.
fn leads(world: &World<'_>, claim: &Claim, to: SocketAddr) -> bool {
    match &claim.kind {
        ClaimKind::HostPort { to: pod, .. } => *pod == to,
        ClaimKind::ServicePort { service, endpoints, .. } | ClaimKind::NodePort { service, endpoints } => {
            let known = world.owners.endpoints_of(Proto::Udp, service);
            // Without comments (above 1,000 endpoints) nothing can be said.
            known.contains(&to) || known.is_empty() && *endpoints > 0
        }
        _ => true,
    }
}

fn name(world: &World<'_>, claim: &Claim) -> String {
    match &claim.kind {
        ClaimKind::ServicePort { service, .. } | ClaimKind::NodePort { service, .. } => service.to_string(),
        ClaimKind::HostPort { to, .. } => {
            format!("hostPort of {}", world.facts.name_at(to.ip()).unwrap_or_else(|| to.ip().to_string()))
        }
        _ => String::new(),
    }
}

/// Both iptables flavours hold rules.
pub(super) fn both_flavours(scene: &Scene<'_, '_>) -> Checked {
    let mut rules: BTreeMap<(Family, Flavour), (usize, BTreeSet<&str>)> = BTreeMap::new();
    for set in &scene.world.facts.state.rulesets {
        for table in &set.tables {
            let chains = table.chains.iter().filter(|chain| !chain.rules.is_empty());
            let entry = rules.entry((set.family, set.flavour)).or_default();
            for chain in chains {
                entry.0 += chain.rules.len();
                // Docker and firewalls may hold a few rules of the other flavour; kube-proxy and portmap in both is worse.
                if chain.name().starts_with("KUBE-") || chain.name().starts_with("CNI-") {
                    entry.1.insert(&table.name);
                }
            }
        }
    }
    let mut found = Vec::new();
    for (family, word) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
        let of = |flavour| rules.get(&(family, flavour)).filter(|(count, _)| *count > 0);
        let (Some(nft), Some(legacy)) = (of(Flavour::IptablesNft), of(Flavour::IptablesLegacy)) else { continue };
        let both = !nft.1.is_empty() && !legacy.1.is_empty();
        let severity = if both { Severity::Error } else { Severity::Warning };
        let whose = if both { ", Kubernetes' in both" } else { "" };
        let sentence = format!(
            "{word} rules stand in iptables-nft ({}) and in iptables-legacy ({}) at once{whose}: each packet meets both, and `iptables -L` shows one",
            nft.0, legacy.0
        );
        let change = "find who writes the other flavour (`iptables-legacy-save`, `iptables-nft-save`), make all use one, and flush what is left over".to_owned();
        let evidence = [("iptables-nft", nft.0), ("iptables-legacy", legacy.0)]
            .map(|(name, count)| Evidence::new("rule", name, format!("{count} rules")));
        found.push(Finding::new(severity, sentence, change).with(evidence).of_node());
    }
    Ok(found)
}

/// Cilium or Calico serves Services in eBPF instead of kube-proxy.
pub(super) fn replaced(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let Some(links) = &world.facts.state.links else { return Err("the node's links are not known".to_owned()) };
    let Some(network) = world.replaced() else { return Ok(Vec::new()) };
    let signs = links.iter().map(|link| link.name.as_str()).filter(|name| Network::making(name) == Some(network));
    let evidence = signs.map(|name| Evidence::new("link", name, format!("made by {}", network.name())));
    let cause = format!("{} serves {} in eBPF, and kube-proxy has no rules", network.name(), network.serves());
    let finding = Finding::new(Severity::Warning, network.sentence(), network.advice().to_owned());
    Ok(vec![finding.because(cause).with(evidence).of_node()])
}

/// Native nftables rules may decide where connections go, and could not be read.
pub(super) fn native(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let Some(sentence) = world.native_sentence() else { return Ok(Vec::new()) };
    let bases = world.facts.state.native.iter().filter(|base| base.is_dnat());
    let evidence = bases.map(|base| {
        let place = format!("nftables {} {}", base.table(), base.chain);
        Evidence::new("rule", place, format!("type {} hook {} priority {}", base.kind, base.hook, base.priority))
    });
    Ok(vec![Finding::new(Severity::Warning, sentence, NATIVE_ADVICE.to_owned()).with(evidence).of_node()])
}

/// kube-proxy in IPVS mode: the kernel's virtual servers decide, which are not followed.
pub(super) fn ipvs(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let configured = world.facts.proxy.known().is_some_and(|config| config.mode == "ipvs");
    let Some(links) = &world.facts.state.links else { return Err("the node's links are not known".to_owned()) };
    let link = links.iter().find(|link| link.name == "kube-ipvs0");
    let mut evidence: Vec<Evidence> = link
        .map(|link| Evidence::new("link", link.name.clone(), "kube-proxy's addresses in IPVS mode"))
        .into_iter()
        .collect();
    if configured {
        evidence.push(Evidence::new("object", "kube-proxy's configuration", "mode: ipvs"));
    }
    if evidence.is_empty() {
        return Ok(Vec::new());
    }
    let sentence = "kube-proxy runs in IPVS mode, which porttrace does not follow: what it predicts for Services does not hold on this node".to_owned();
    Ok(vec![Finding::new(Severity::Warning, sentence, IPVS_ADVICE.to_owned()).with(evidence).of_node()])
}
