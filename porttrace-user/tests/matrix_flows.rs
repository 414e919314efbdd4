//! The matrix against what happened: flows that were really sent through nodes with these rules.

use flate2::read::GzDecoder;
use porttrace_user::collect::snapshot;
use porttrace_user::core::matrix::{self, Client, ClientKind, Way, WayKind};
use porttrace_user::core::model::facts::Facts;
use porttrace_user::core::model::flow::Proto;
use porttrace_user::core::parse;
use porttrace_user::core::reach::Outcome;
use porttrace_user::core::world::World;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

const CASES: [&str; 5] =
    ["iptables-nft/broken", "iptables-nft/fixed", "iptables-legacy/broken", "nftables/broken", "nftables/fixed"];

#[derive(Deserialize)]
struct Flow {
    client: String,
    label: String,
    proto: Proto,
    src: IpAddr,
    dst: IpAddr,
    dport: u16,
    result: String,
    conntrack: BTreeMap<String, serde_json::Value>,
}

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/recorded").join(case)
}

fn nodes(case: &str) -> BTreeMap<String, Facts> {
    let nodes = fs::read_dir(folder(case).join("nodes")).expect("nodes");
    nodes
        .map(|node| {
            let node = node.expect("a node");
            let files = snapshot::read_files(&node.path()).expect("a recorded node");
            (node.file_name().to_string_lossy().into_owned(), parse::facts(&files))
        })
        .collect()
}

fn flows(case: &str) -> Vec<Flow> {
    let mut text = String::new();
    let file = fs::File::open(folder(case).join("flows.jsonl.gz")).expect("flows");
    GzDecoder::new(file).read_to_string(&mut text).expect("gzip");
    text.lines().map(|line| serde_json::from_str(line).expect("a flow")).collect()
}

/// The node whose matrix covers a flow: the one that it meets first and that decides, else none.
fn node_of<'a>(flow: &Flow, worlds: &'a BTreeMap<String, World<'a>>) -> Option<&'a World<'a>> {
    let own = |world: &&World<'_>| world.facts.is_own(flow.dst) == Some(true) && !flow.dst.is_loopback();
    let client = match flow.client.rsplit_once('-').map(|(_, end)| end) {
        Some("a") => Some("worker3"),
        Some("b") => Some("worker2"),
        Some("c") => Some("worker"),
        _ if flow.client.starts_with("worker") => Some(flow.client.as_str()),
        _ => None,
    };
    // A packet that starts on a node is decided there, unless it is for another node's address.
    let elsewhere = worlds.values().find(own).filter(|world| world.facts.state.name.as_deref() != client);
    match (elsewhere, client) {
        (Some(world), _) => Some(world),
        (None, Some(client)) => worlds.get(client),
        (None, None) => worlds.get("worker3"),
    }
}

fn client(flow: &Flow, world: &World<'_>) -> Client {
    let here = world.facts.state.name.clone().unwrap_or_default();
    let pod = flow.client.starts_with("pod-");
    let local = world.behind(flow.src).is_some();
    let kind = match flow.client.as_str() {
        name if name == here && flow.src.is_loopback() && !flow.dst.is_loopback() => ClientKind::ThisNodeLoopback,
        name if name == here => ClientKind::ThisNode,
        name if name.starts_with("worker") => ClientKind::OtherNode,
        _ if pod && local && flow.src == flow.dst => ClientKind::PodItself,
        _ if pod && local => ClientKind::PodHere,
        _ if pod => ClientKind::PodElsewhere,
        _ => ClientKind::Outside,
    };
    Client { kind, address: flow.src, name: Some(flow.client.clone()) }
}

/// What kind of address it is, as the matrix names it.
fn way(flow: &Flow, world: &World<'_>) -> Way {
    let services = &world.facts.cluster.services;
    let kind = match flow.dst {
        dst if dst.is_loopback() => WayKind::Loopback,
        dst if world.facts.is_own(dst) == Some(true) => WayKind::NodePort,
        dst if services.iter().any(|service| service.cluster_ips.contains(&dst)) => WayKind::ClusterIp,
        dst if world.facts.cluster.pods.iter().any(|pod| pod.ips.contains(&dst)) => WayKind::Pod,
        _ => WayKind::External,
    };
    Way { kind, proto: flow.proto, to: SocketAddr::new(flow.dst, flow.dport), what: flow.label.clone() }
}

fn happened(flow: &Flow) -> Outcome {
    match flow.result.as_str() {
        "refused" => Outcome::Refused,
        "timeout" => Outcome::Silent,
        result if result.starts_with("HTTP") || result == "udp-reply" => Outcome::Works,
        other => panic!("a result that nobody knows: {other}"),
    }
}

/// Every flow that met the node which its matrix is about came out as that matrix says.
#[test]
fn every_flow_came_out_as_the_matrix_says() {
    let mut wrong = Vec::new();
    let (mut told, mut unknown, mut uncovered, mut depends) = (0, BTreeMap::<String, usize>::new(), 0, 0);
    for case in CASES {
        let nodes = nodes(case);
        let worlds: BTreeMap<String, World<'_>> =
            nodes.iter().map(|(name, facts)| (name.clone(), World::new(facts))).collect();
        for flow in flows(case) {
            if flow.result.starts_with("error") {
                continue;
            }
            let Some(world) = node_of(&flow, &worlds) else {
                uncovered += 1;
                continue;
            };
            let client = client(&flow, world);
            let way = way(&flow, world);
            let Some(cell) = matrix::cell(world, &client, &way) else {
                uncovered += 1;
                continue;
            };
            let node = world.facts.state.name.clone().unwrap_or_default();
            let met = flow.conntrack.contains_key(&node);
            let (said, happened) = (cell.reach.outcome, happened(&flow));
            let agrees = match said {
                Outcome::Unknown => {
                    let why = cell.reach.reason;
                    // Each is left open for a fact that this node does not have.
                    let fact = [
                        "whether its packets come to this node",
                        "it goes on to",
                        "the rules of the client's own node",
                    ];
                    assert!(
                        fact.iter().any(|start| why.starts_with(start)),
                        "{} from {}: {why}",
                        flow.label,
                        flow.client
                    );
                    *unknown.entry(format!("{:?} {:?} {why}", client.kind, way.kind)).or_default() += 1;
                    continue;
                }
                // By chance or by what is not known: each of the outcomes is one of those.
                Outcome::Depends => {
                    depends += 1;
                    true
                }
                said => said == happened,
            };
            told += 1;
            if !agrees {
                wrong.push(format!(
                    "{case} on {node} {} from {} ({:?}) {} to {}: {}, but the matrix says {said:?}: {} (met the node: {met})",
                    flow.label, flow.client, client.kind, flow.src, way.to, flow.result, cell.reach.reason
                ));
            }
        }
    }
    let unknown: Vec<String> = unknown.into_iter().map(|(what, count)| format!("{count} {what}")).collect();
    assert!(
        wrong.is_empty(),
        "{} of {told} flows:\n{}\nunknown:\n{}",
        wrong.len(),
        wrong.join("\n"),
        unknown.join("\n")
    );
    println!("{told} told, {depends} of them by chance, {uncovered} uncovered, unknown:\n{}", unknown.join("\n"));
    assert!(told > 700 && depends < told / 20, "{told} flows were compared, {depends} of them by chance");
}
