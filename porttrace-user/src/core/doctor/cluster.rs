//! Who makes the rules: kube-proxy and its mode, portmap and its backend, networks that forward in eBPF.

use super::facts::{Cluster, Facts, Program};
use super::{Check, Group, Status};
use crate::core::quantity::count;
use std::collections::BTreeSet;

pub fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![kube_proxy(facts), portmap(facts)];
    checks.extend(ebpf(&facts.cluster));
    checks.extend(programs(&facts.cluster.programs));
    checks
}

/// kube-proxy's modes of which there is a trace on the node, and what the trace is.
fn modes(facts: &Facts) -> Vec<(&'static str, String)> {
    let (rules, cluster) = (&facts.rules, &facts.cluster);
    let mut modes = Vec::new();
    if rules.native.iter().any(|table| matches!(table.as_str(), "ip kube-proxy" | "ip6 kube-proxy")) {
        modes.push(("nftables", "a table kube-proxy of native nftables rules".to_owned()));
    }
    if cluster.ipvs_interface || cluster.ipvs_services > 0 {
        let what = if cluster.ipvs_interface { "kube-ipvs0" } else { "IPVS" };
        modes.push(("ipvs", format!("{what} with {}", count(cluster.ipvs_services, "virtual service"))));
    }
    let chains: usize = rules.sets.iter().map(|set| set.services).sum();
    // In IPVS mode there is a chain KUBE-SERVICES too, but none of a Service.
    let jumps = rules.sets.iter().any(|set| set.kube_services) && modes.is_empty();
    if chains > 0 || jumps {
        let flavours: BTreeSet<&str> =
            rules.sets.iter().filter(|set| set.kube_services).map(|set| set.flavour.as_str()).collect();
        let flavours: Vec<&str> = flavours.into_iter().collect();
        modes.push((
            "iptables",
            format!("chains of {} in iptables-{}", count(chains, "Service"), flavours.join(" and ")),
        ));
    }
    modes
}

fn kube_proxy(facts: &Facts) -> Check {
    let check = |status, text| Check::new(Group::Cluster, "kube-proxy", status, text);
    let said = facts.cluster.daemons.iter().find_map(|daemon| {
        let mode = daemon.proxy_mode.as_deref()?;
        Some((mode, format!("{} (pid {}) runs in {mode} mode", daemon.name, daemon.pid)))
    });
    let runs = facts.cluster.daemons.iter().find(|daemon| daemon.name == "kube-proxy");
    let modes = modes(facts);
    let traces: Vec<String> = modes.iter().map(|(mode, trace)| format!("{mode} mode by {trace}")).collect();
    let check = match (&said, modes.as_slice()) {
        (None, []) if !facts.rights.missing.is_empty() => {
            return check(Status::Unknown, "unknown: rules stay hidden from who lacks CAP_NET_ADMIN".to_owned());
        }
        (None, []) => {
            let text = match runs {
                Some(daemon) => format!("it runs (pid {}), but no rules of it are here", daemon.pid),
                None => "no trace of it: neither rules nor a process".to_owned(),
            };
            return check(Status::Note, text);
        }
        (None, [_]) => check(Status::Good, traces.join("; ")),
        (Some((_, text)), []) => check(Status::Note, format!("{text}, but no rules of it are here")),
        (Some((mode, text)), [(only, trace)]) if mode == only => check(Status::Good, format!("{text}: {trace}")),
        (Some((_, text)), _) => leftovers(check(Status::Warning, format!("{text}; there is {}", traces.join("; ")))),
        (None, _) => leftovers(check(Status::Warning, format!("traces of several modes: {}", traces.join("; ")))),
    };
    let mode = said.as_ref().map(|(mode, _)| *mode).into_iter().chain(modes.iter().map(|(mode, _)| *mode));
    not_followed(check, &mode.collect(), can_read_native(facts))
}

/// Native rules are read with `nft`.
fn can_read_native(facts: &Facts) -> bool {
    facts.rules.tools.contains_key("nft")
}

fn leftovers(check: Check) -> Check {
    check
        .costs("rules that a former mode left behind still act on packets")
        .advice("`kube-proxy --cleanup` removes them; or reboot the node")
}

/// Modes whose rules are not followed make predictions worthless, however healthy they are.
fn not_followed(mut check: Check, modes: &BTreeSet<&str>, reads_native: bool) -> Check {
    let mut foreign = Vec::new();
    if modes.contains("ipvs") {
        foreign.push("ipvs is not followed yet");
    }
    if modes.contains("nftables") && !reads_native {
        foreign.push("native nftables rules cannot be read without nft");
    }
    if foreign.is_empty() {
        return check;
    }
    check.status = Status::Warning;
    let cost = format!("{}: do not trust predictions about Services here", foreign.join(", and "));
    check.costs = Some(check.costs.map_or(cost.clone(), |earlier| format!("{earlier}; {cost}")));
    check.advice.get_or_insert_with(|| "go by what was observed: sightings, NAT and verdicts hold".to_owned());
    check
}

fn portmap(facts: &Facts) -> Check {
    let check = |status, text| Check::new(Group::Cluster, "hostports", status, text);
    let chains: Vec<String> = facts
        .rules
        .sets
        .iter()
        .filter(|set| set.host_ports > 0)
        .map(|set| format!("{} in iptables-{} IPv{}", set.host_ports, set.flavour, set.family))
        .collect();
    let native: Vec<&str> =
        facts.rules.native.iter().map(String::as_str).filter(|table| table.contains("cni_hostport")).collect();
    let configured = configured(&facts.cluster);
    let tail = if configured.is_empty() { String::new() } else { format!(" ({configured})") };
    match (chains.is_empty(), native.is_empty()) {
        (false, true) => check(Status::Good, format!("portmap's chains: {}{tail}", chains.join(", "))),
        (is_empty, false) => {
            let mut text = format!("portmap's nftables backend: table {}", native.join(", "));
            if !is_empty {
                text += &format!("; and its iptables backend: {}", chains.join(", "));
            }
            if can_read_native(facts) {
                return check(Status::Good, text + &tail);
            }
            check(Status::Warning, text + &tail)
                .costs("its rules cannot be read without nft: hostPorts in them are seen, not predicted")
                .advice("install nft; sightings, NAT and verdicts hold")
        }
        (true, true) if !facts.rights.missing.is_empty() => {
            check(Status::Unknown, format!("unknown, as the rules are{tail}"))
        }
        (true, true) => check(Status::Note, format!("no hostPort of CNI's portmap is here{tail}")),
    }
}

fn configured(cluster: &Cluster) -> String {
    let of_one = |file: &str, plugins: &[String], backend: Option<&str>| {
        let backend = backend.map_or(String::new(), |backend| format!(", portmap by {backend}"));
        format!("{file}: {}{backend}", plugins.join(" + "))
    };
    let all: Vec<String> = cluster
        .cni
        .iter()
        .map(|config| of_one(&config.file, &config.plugins, config.portmap_backend.as_deref()))
        .collect();
    all.join("; ")
}

/// Networks that take packets out of netfilter's way.
fn ebpf(cluster: &Cluster) -> Option<Check> {
    let mut signs: Vec<String> = Vec::new();
    let mut names = BTreeSet::new();
    let mut sign = |name: &'static str, text: String| {
        names.insert(name);
        signs.push(text);
    };
    for interface in &cluster.ebpf_interfaces {
        sign(network_of(interface), format!("interface {interface}"));
    }
    for pin in &cluster.ebpf_pins {
        sign(network_of(pin), format!("pins under {pin}"));
    }
    let programs: Vec<&Program> = cluster.programs.iter().filter(|program| is_network(&program.name)).collect();
    if let Some(first) = programs.first() {
        sign(
            network_of(&first.name),
            format!("{} programs on interfaces ({} on {})", programs.len(), first.name, first.interface),
        );
    }
    if names.is_empty() {
        return agents(cluster);
    }
    for daemon in cluster.daemons.iter().filter(|daemon| is_agent(&daemon.name)) {
        signs.push(format!("{} (pid {})", daemon.name, daemon.pid));
    }
    let names: Vec<&str> = names.into_iter().collect();
    let text = format!("{} forwards in eBPF: {}", names.join(" and "), signs.join(", "));
    Some(
        Check::new(Group::Cluster, "ebpf-network", Status::Warning, text)
            .costs(
                "packets may never meet netfilter: what the rules predict need not happen, and NAT done in eBPF is not \
                 observed",
            )
            .advice("go by the TC sightings; `cilium bpf lb list` or `calico-node -bpf nat dump` tell the rest"),
    )
}

fn agents(cluster: &Cluster) -> Option<Check> {
    let agents: Vec<String> = cluster
        .daemons
        .iter()
        .filter(|daemon| is_agent(&daemon.name))
        .map(|daemon| format!("{} (pid {})", daemon.name, daemon.pid))
        .collect();
    let text = format!("{}, without programs of its own on interfaces: netfilter decides", agents.join(", "));
    (!agents.is_empty()).then(|| Check::new(Group::Cluster, "ebpf-network", Status::Good, text))
}

fn is_agent(name: &str) -> bool {
    matches!(name, "cilium-agent" | "calico-node" | "antrea-agent" | "ovnkube")
}

/// Cilium's programs are called `cil_…`, Calico's `cali_…` or `calico_…`.
fn is_network(program: &str) -> bool {
    program.starts_with("cil_") || program.starts_with("cali")
}

fn network_of(sign: &str) -> &'static str {
    if sign.contains("cali") { "Calico" } else { "Cilium" }
}

fn programs(programs: &[Program]) -> Option<Check> {
    const MOST: usize = 4;
    let others: Vec<String> = programs
        .iter()
        .filter(|program| !is_network(&program.name))
        .map(|program| {
            let name = if program.name.is_empty() { "unnamed" } else { &program.name };
            format!("{name} ({} {})", program.interface, program.place)
        })
        .collect();
    if others.is_empty() {
        return None;
    }
    let rest = others.len().saturating_sub(MOST);
    let mut text = format!("TC and XDP programs of others: {}", others[..others.len().min(MOST)].join(", "));
    if rest > 0 {
        text += &format!(" and {rest} more");
    }
    let xdp = programs.iter().any(|program| program.place == "xdp");
    let check = Check::new(Group::Cluster, "other-programs", Status::Note, text);
    Some(if xdp {
        check.costs("what an XDP program drops or redirects never comes to TC: it is not seen")
    } else {
        check.costs("watch attaches before them; a packet that one of them redirects skips netfilter")
    })
}
