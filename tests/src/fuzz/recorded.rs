//! Recorded nodes: their rules, addresses and routes in a router of ours, and packets to everything that their rules name.

use super::kernel::wire::shortest;
use super::rng::Rng;
use super::scenario::{Chain, Link, Node, Probe, Rule, Scenario, Table, Tables};
use anyhow::{Context, Result};
use porttrace_user::core::kube::owners::{ClaimKind, Owners};
use porttrace_user::core::model::flow::{Family, Proto, Tuple};
use porttrace_user::core::model::native::Value;
use porttrace_user::core::model::state::{NodeState, RouteEntry};
use porttrace_user::core::model::trace::{Packet, RouteKind};
use porttrace_user::core::parse::{Files, state};
use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

/// Reads a recorded node (a directory of a snapshot's files) as a scenario of `count` packets.
pub fn scenario(directory: &Path, seed: u64, count: usize) -> Result<Scenario> {
    let mut files = Files::new();
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        files.insert(entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?);
    }
    let text = |name: &str| String::from_utf8_lossy(files.get(name).map_or(&[][..], Vec::as_slice)).into_owned();
    let rules = vec![
        Tables::from_save(&text("iptables-save.txt"), Family::V4),
        Tables::from_save(&text("ip6tables-save.txt"), Family::V6),
    ];
    let listing = native(&text("nft-ruleset.txt"));
    let state = state(&files);
    let node = node(&state)?;
    let targets = targets(&rules, &state);
    let mut rng = Rng::new(seed);
    let probes = (1..=count as u16).filter_map(|id| probe(&mut rng, &state, &targets, id)).collect();
    let tail: Vec<_> = directory.iter().rev().take(4).map(|part| part.to_string_lossy()).collect();
    let name = tail.iter().rev().map(AsRef::as_ref).collect::<Vec<_>>().join("/");
    Ok(Scenario { name: format!("{name}, seed {seed}"), node, rules, listing, probes, ..Scenario::default() })
}

/// The native tables of a listing: those of iptables-nft are loaded by its own tool.
fn native(listing: &str) -> String {
    let mut kept = String::new();
    let mut is_native = false;
    for line in listing.lines() {
        if let Some(table) = line.strip_prefix("table ") {
            is_native = !(table.starts_with("ip nat ") || table.starts_with("ip6 nat "));
        }
        if is_native {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

impl Tables {
    /// From a dump; each rule is one piece.
    pub fn from_save(text: &str, family: Family) -> Self {
        let mut tables = Self { family, legacy: false, tables: Vec::new() };
        for line in text.lines() {
            // `iptables-save -c` writes the counters first.
            let line = if line.starts_with('[') { line.split_once("] ").map_or(line, |(_, rest)| rest) } else { line };
            if let Some(name) = line.strip_prefix('*') {
                tables.tables.push(Table { name: name.trim().into(), chains: Vec::new() });
            } else if let (Some(rest), Some(table)) = (line.strip_prefix(':'), tables.tables.last_mut()) {
                let mut words = rest.split_whitespace();
                let name = words.next().unwrap_or_default().into();
                let policy = words.next().filter(|policy| *policy != "-").map(String::from);
                table.chains.push(Chain { name, policy, rules: Vec::new() });
            } else if let (Some(rest), Some(table)) = (line.strip_prefix("-A "), tables.tables.last_mut()) {
                let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                let rule = Rule { matches: vec![rest.into()], target: String::new() };
                table
                    .chains
                    .iter_mut()
                    .filter(|chain| chain.name == name)
                    .for_each(|chain| chain.rules.push(rule.clone()));
            }
        }
        tables
    }
}

fn node(state: &NodeState) -> Result<Node> {
    let mut node = Node::default();
    let links = state.links.as_ref().context("the recording has no links")?;
    node.links = links
        .iter()
        .filter(|link| !link.loopback)
        .map(|link| Link { name: link.name.clone(), bridge: link.master.clone() })
        .collect();
    for address in state.addresses.iter().flatten().filter(|address| address.scope == "global") {
        let nodad = if address.address.is_ipv6() { " nodad" } else { "" };
        node.ip.push(format!("addr add {}/{} dev {}{nodad}", address.address, address.prefix, address.interface));
    }
    let routes: Vec<&RouteEntry> = state
        .routes
        .iter()
        .flatten()
        .filter(|route| route.table == "main" && route.kind == RouteKind::Unicast)
        .filter(|route| !route.dst.to_string().starts_with("fe80"))
        .collect();
    // Those without a gateway first: the others need them.
    for gateway in [false, true] {
        node.ip.extend(routes.iter().filter_map(|route| line(route, gateway)));
    }
    for (key, value) in state.sysctls.iter().flatten() {
        let settings = ["rp_filter", "route_localnet", "ip_forward", "forwarding", "src_valid_mark"];
        let wanted =
            settings.iter().any(|setting| key.rsplit('.').next() == Some(setting)) && !key.contains(".default.");
        if let Some(key) = key.strip_prefix("net.").filter(|_| wanted) {
            node.sysctls.push((key.replace('.', "/"), value.clone()));
        }
    }
    // `all.forwarding` sets every other one, so that it comes first.
    node.sysctls.sort_by_key(|(key, _)| !key.contains("/all/") && !key.ends_with("ip_forward"));
    node.accounting = vec!["localhost_nps_accepted_pkts".into(), "ct_state_invalid_dropped_pkts".into()];
    Ok(node)
}

fn line(route: &RouteEntry, with_gateway: bool) -> Option<String> {
    let [hop] = route.nexthops.as_slice() else { return None };
    let interface = hop.interface.as_ref()?;
    if hop.gateway.is_some() != with_gateway {
        return None;
    }
    let via = hop.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
    let family = if route.dst.addr().is_ipv6() { "-6 " } else { "" };
    let source = route.prefsrc.map(|source| format!(" src {source}")).unwrap_or_default();
    Some(format!("{family}route replace {}{via} dev {interface}{source} metric {}", route.dst, route.metric))
}

/// Where packets go: protocol, address (`None`: one of the node's own), port.
type Target = (Family, Proto, Option<IpAddr>, u16);

fn targets(rules: &[Tables], state: &NodeState) -> Vec<Target> {
    let mut targets = BTreeSet::new();
    for tables in rules {
        let lines = tables.tables.iter().flat_map(|table| &table.chains).flat_map(|chain| &chain.rules);
        for rule in lines.flat_map(|rule| &rule.matches) {
            let after = |option: &str| rule.split(&format!("{option} ")).nth(1).and_then(|rest| rest.split(' ').next());
            let Some(proto) = after("-p").and_then(Proto::from_name).filter(|proto| proto.has_ports()) else {
                continue;
            };
            let address = after("-d").filter(|_| !rule.contains("! -d")).and_then(|net| net.split('/').next());
            for port in after("--dport").or(after("--dports")).into_iter().flat_map(|ports| ports.split([',', ':'])) {
                let Ok(port) = port.parse() else { continue };
                targets.insert((tables.family, proto, address.and_then(|address| address.parse().ok()), port));
            }
        }
    }
    let native = state.native_rules.iter().flat_map(|set| set.tables.iter().map(|table| (set.family, table)));
    for (family, table) in native {
        for key in table.sets.iter().flat_map(|set| set.elements().map(|(key, ..)| key)) {
            let (address, proto, port) = match key {
                [Value::Address(address), Value::Number(proto), Value::Number(port)] => (Some(*address), proto, port),
                [Value::Number(proto), Value::Number(port)] => (None, proto, port),
                _ => continue,
            };
            let (Ok(proto), Ok(port)) = (u8::try_from(*proto), u16::try_from(*port)) else { continue };
            targets.insert((family, Proto::from_number(proto), address, port));
        }
    }
    let owners = Owners::of(state);
    let host_ports = owners.all().filter(|claim| matches!(claim.kind, ClaimKind::HostPort { .. }));
    targets.extend(host_ports.map(|claim| (claim.family, claim.proto, None, claim.port)));
    // Pods directly, and a port that no rule knows.
    for route in state.routes.iter().flatten().filter(|route| route.table == "main") {
        let family = Family::of(route.dst.addr());
        targets.extend([80, 8081, 7].map(|port| (family, Proto::Tcp, Some(route.dst.addr()), port)));
    }
    targets.into_iter().filter(|(_, _, address, _)| address.is_none_or(|address| !address.is_unspecified())).collect()
}

fn probe(rng: &mut Rng, state: &NodeState, targets: &[Target], id: u16) -> Option<Probe> {
    let (family, proto, address, port) = *rng.choose(targets);
    let own: Vec<IpAddr> = state
        .addresses
        .iter()
        .flatten()
        .filter(|one| one.scope != "link" && Family::of(one.address) == family)
        .map(|one| one.address)
        .collect();
    let dst = address.unwrap_or_else(|| *rng.choose(&own));
    let (input, src) = match rng.below(4) {
        0 => (None, *rng.choose(&own)),
        1 => pod(rng, state, family)?,
        _ => (Some("eth0".to_string()), outside(rng, family)),
    };
    let tuple = Tuple { proto, src, sport: 20_000 + id, dst, dport: port };
    let mut packet = Packet::first_of(tuple, input.as_deref().map(Into::into));
    packet.length = shortest(proto, family == Family::V6) + 20;
    Some(Probe { id, packet, uid: 0, mac: 1 })
}

/// A pod of this node: a host route to an interface that is not the uplink.
fn pod(rng: &mut Rng, state: &NodeState, family: Family) -> Option<(Option<String>, IpAddr)> {
    let pods: Vec<(String, IpAddr)> = state
        .routes
        .iter()
        .flatten()
        .filter(|route| route.table == "main" && route.dst.prefix_len() >= 32 && Family::of(route.dst.addr()) == family)
        .filter_map(|route| Some((route.nexthops.first()?.interface.clone()?, route.dst.addr())))
        .filter(|(interface, _)| interface != "eth0")
        .collect();
    let (interface, address) = pods.get(rng.below(pods.len().max(1)))?;
    Some((Some(interface.clone()), *address))
}

fn outside(rng: &mut Rng, family: Family) -> IpAddr {
    let (v4, v6) = *rng.choose(&[
        (IpAddr::from([172, 18, 0, 4]), [4_u16, 0]),
        (IpAddr::from([172, 18, 0, 100]), [0x100, 0]),
        (IpAddr::from([10, 244, 3, 5]), [5, 1]),
    ]);
    match (family, v6) {
        (Family::V4, _) => v4,
        (Family::V6, [host, 0]) => IpAddr::from([0xfc00, 0xf853, 0xccd, 0xe793, 0, 0, 0, host]),
        (Family::V6, [host, _]) => IpAddr::from([0xfd00, 0x10, 0x244, 3, 0, 0, 0, host]),
    }
}
