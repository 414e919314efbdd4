//! The simulator against reality: flows that were sent through nodes with real kube-proxy and CNI rules, what conntrack
//! recorded of them, and the rules that the kernel itself says they hit.

use flate2::read::GzDecoder;
use porttrace_user::core::model::flow::{Proto, Tuple};
use porttrace_user::core::model::name::Name;
use porttrace_user::core::model::state::NodeState;
use porttrace_user::core::model::trace::{Branch, Hop, Packet, RuleRef, Trace, Verdict};
use porttrace_user::core::parse::{self, Files};
use porttrace_user::core::simulate::Simulator;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

#[path = "recorded/traces.rs"]
mod traces;

const CASES: [(&str, &str); 5] = [
    ("iptables-nft", "broken"),
    ("iptables-nft", "fixed"),
    ("iptables-legacy", "broken"),
    ("nftables", "broken"),
    ("nftables", "fixed"),
];

#[derive(Deserialize)]
struct Flow {
    client: String,
    label: String,
    proto: Proto,
    src: IpAddr,
    #[serde(default)]
    sport: u16,
    dst: IpAddr,
    dport: u16,
    result: String,
    refused_by: Option<String>,
    conntrack: BTreeMap<String, Vec<Entry>>,
    #[serde(default)]
    nft_trace: Vec<String>,
    #[serde(default)]
    xt_trace: Vec<String>,
    #[serde(default)]
    legacy_trace: Vec<traces::LegacyStep>,
}

#[derive(Deserialize)]
struct Entry {
    orig: Ends,
    reply: Ends,
}

#[derive(Deserialize)]
struct Ends {
    src: IpAddr,
    dst: IpAddr,
    #[serde(default)]
    sport: u16,
    #[serde(default)]
    dport: u16,
}

impl Ends {
    fn tuple(&self, proto: Proto) -> Tuple {
        Tuple { proto, src: self.src, sport: self.sport, dst: self.dst, dport: self.dport }
    }
}

/// A node of a case, ready to be asked.
struct Node {
    state: NodeState,
    simulator: Simulator,
}

impl Node {
    fn read(folder: &Path) -> Self {
        let files: Files = fs::read_dir(folder)
            .expect("a folder of a node")
            .map(|file| {
                let file = file.expect("a file");
                (file.file_name().to_string_lossy().into_owned(), fs::read(file.path()).expect("readable"))
            })
            .collect();
        let mut state = parse::state(&files);
        // Each flow was the first of its connection.
        state.conntrack = Some(Vec::new());
        // And the state was recorded before or after others filled them.
        state.sets_move = true;
        let simulator = Simulator::new(&state);
        Self { state, simulator }
    }

    fn owns(&self, address: IpAddr) -> bool {
        self.state.addresses.iter().flatten().any(|own| own.address == address) || address.is_loopback()
    }

    /// The interface behind which `address` lives.
    fn interface(&self, address: IpAddr) -> Option<Name> {
        let routes =
            self.state.routes.iter().flatten().filter(|route| route.table == "main" && route.dst.contains(&address));
        let best = routes.max_by_key(|route| route.dst.prefix_len())?;
        best.nexthops.first()?.interface.as_deref().map(Name::from)
    }

    /// Whether the chain of a policy has no rules.
    fn is_empty(&self, rule: &RuleRef) -> bool {
        let rulesets =
            self.state.all_rules().filter(|ruleset| ruleset.family == rule.family && ruleset.flavour == rule.flavour);
        let mut tables = rulesets.flat_map(|ruleset| &ruleset.tables).filter(|table| *rule.table == *table.name);
        tables.any(|table| table.chain(&rule.chain).is_some_and(|chain| chain.rules.is_empty()))
    }

    fn trace(&self, tuple: Tuple) -> Trace {
        self.simulator.trace(&self.first_packet(tuple))
    }

    fn first_packet(&self, tuple: Tuple) -> Packet {
        let input = if self.owns(tuple.src) { None } else { self.interface(tuple.src) };
        Packet::first_of(tuple, input)
    }
}

fn folder(variant: &str, phase: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/recorded").join(variant).join(phase)
}

fn nodes(folder: &Path) -> BTreeMap<String, Node> {
    fs::read_dir(folder.join("nodes"))
        .expect("nodes")
        .map(|node| {
            let node = node.expect("a node");
            (node.file_name().to_string_lossy().into_owned(), Node::read(&node.path()))
        })
        .collect()
}

fn flows(file: &Path) -> Vec<Flow> {
    let mut text = String::new();
    GzDecoder::new(fs::File::open(file).expect("flows")).read_to_string(&mut text).expect("gzip");
    text.lines().map(|line| serde_json::from_str(line).expect("a flow")).collect()
}

/// The node that a flow meets first, if it meets one: the client's own, or the one that owns or routes the destination.
fn first_node<'a>(flow: &Flow, nodes: &'a BTreeMap<String, Node>) -> Option<(&'a str, &'a Node)> {
    let named = |name: &str| nodes.get_key_value(name).map(|(name, node)| (name.as_str(), node));
    if flow.src == flow.dst && flow.client.starts_with("pod-")
        || flow.dst.is_loopback() && flow.client.starts_with("pod-")
    {
        return None;
    }
    match flow.client.rsplit_once('-') {
        Some((_, "a")) => named("worker3"),
        Some((_, "b")) => named("worker2"),
        Some((_, "c")) => named("worker"),
        _ if flow.client.starts_with("worker") => named(&flow.client),
        _ => {
            let owner = nodes.iter().find(|(_, node)| node.owns(flow.dst) && !flow.dst.is_loopback());
            // The outside clients have routes for the external addresses by worker3, and nothing else by a node.
            let external =
                matches!(flow.dst, IpAddr::V4(four) if matches!(four.octets(), [198, 51, 100, _] | [203, 0, 113, _]));
            owner.map(|(name, node)| (name.as_str(), node)).or_else(|| named("worker3").filter(|_| external))
        }
    }
}

fn fits(branch: &Branch, reply: &Tuple) -> bool {
    let mut expected = *reply;
    if branch.sport_chosen {
        expected.dport = branch.reply_tuple.dport;
    }
    let arrived = matches!(branch.verdict, Verdict::Delivered { .. } | Verdict::Forwarded { .. });
    // What the node sends to itself is confirmed at POSTROUTING, before it comes back by lo and meets INPUT
    // (`nf_confirm`, priority NF_IP_PRI_CONNTRACK_CONFIRM): a REJECT there leaves an entry.
    let confirmed = arrived || branch.hops.iter().any(|hop| matches!(hop, Hop::Transmit { .. }));
    confirmed && branch.reply_tuple == expected && branch.final_tuple == expected.inverted()
}

fn outcomes(trace: &Trace) -> String {
    let lines = trace.branches.iter().map(|branch| {
        format!(
            "    {} {:?} reply {} ({})",
            branch.probability, branch.verdict, branch.reply_tuple, branch.sport_chosen
        )
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Every conntrack entry of every flow, on every node, is the outcome of a branch; and where no entry was made, no packet
/// could get through.
#[test]
fn what_conntrack_recorded_is_among_the_branches() {
    let (mut held, mut refused) = (0, 0);
    let mut wrong = Vec::new();
    for (variant, phase) in CASES {
        let folder = folder(variant, phase);
        let nodes = nodes(&folder);
        for flow in flows(&folder.join("flows.jsonl.gz")) {
            for (name, entries) in &flow.conntrack {
                let Some(node) = nodes.get(name) else { continue };
                for entry in entries {
                    let reply = entry.reply.tuple(flow.proto);
                    let trace = node.trace(entry.orig.tuple(flow.proto));
                    let masquerade = reply.dst != entry.orig.src;
                    held += 1;
                    let good = |branch: &&Branch| {
                        fits(branch, &reply) && branch.masquerade == masquerade && listens(branch, &flow)
                    };
                    if !trace.branches.iter().any(|branch| good(&branch)) {
                        let orig = entry.orig.tuple(flow.proto);
                        wrong.push(format!(
                            "{variant}/{phase} {name} {}: {orig}, reply {reply}\n{}",
                            flow.label,
                            outcomes(&trace)
                        ));
                    }
                }
            }
            let Some((name, node)) = first_node(&flow, &nodes).filter(|(name, _)| !flow.conntrack.contains_key(*name))
            else {
                continue;
            };
            if flow.result.starts_with("HTTP") || flow.result == "udp-reply" {
                continue;
            }
            let tuple = Tuple { proto: flow.proto, src: flow.src, sport: flow.sport, dst: flow.dst, dport: flow.dport };
            let trace = node.trace(tuple);
            refused += 1;
            let icmp = flow.refused_by.as_deref() == Some("icmp");
            // REJECT in OUTPUT drops too (`nft_reject_ipv4_eval`): a process that sends a datagram hears of that first.
            let heard = icmp || flow.result == "error:EPERM";
            let good = |branch: &Branch| match branch.verdict {
                Verdict::Rejected { .. } => heard,
                Verdict::Dropped { .. } => !icmp,
                _ => false,
            };
            if !trace.branches.iter().any(good) {
                wrong.push(format!(
                    "{variant}/{phase} {name} {} from {}: {tuple} {} without an entry\n{}",
                    flow.label,
                    flow.client,
                    flow.result,
                    outcomes(&trace)
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {held} entries and {refused} refusals:\n{}", wrong.len(), wrong.join("\n"));
    assert!(held > 1000 && refused > 20, "{held} entries and {refused} refusals were compared");
}

/// A TCP flow that the node itself answered by RST found no listener; one that it served found one.
fn listens(branch: &Branch, flow: &Flow) -> bool {
    match branch.verdict {
        Verdict::Delivered { listening: Some(listening), .. } if flow.proto == Proto::Tcp => {
            listening == flow.result.starts_with("HTTP")
        }
        _ => true,
    }
}

/// The rules that the kernel says the first packet hit on worker3 are, in the same order, those of a branch.
#[test]
fn the_kernels_own_traces_name_the_same_rules() {
    let (mut nft, mut xt, mut legacy) = (0, 0, 0);
    let mut wrong = Vec::new();
    for (variant, phase) in CASES {
        let folder = folder(variant, phase);
        let node = Node::read(&folder.join("nodes/worker3"));
        for flow in flows(&folder.join("traces.jsonl.gz")) {
            let sent = Tuple { proto: flow.proto, src: flow.src, sport: flow.sport, dst: flow.dst, dport: flow.dport };
            let recorded = flow.conntrack.get("worker3").and_then(|entries| entries.first());
            let tuple = recorded.map_or(sent, |entry| entry.orig.tuple(flow.proto));
            // In which order nat chains were asked shows in the rules alone, where the outcome is the same.
            let trace = node.simulator.trace_every_order(&node.first_packet(tuple));
            let mut compare = |kernel: Vec<String>, ours: &dyn Fn(&Branch) -> Vec<String>, whole: bool| {
                let good = |branch: &Branch| {
                    let ours = ours(branch);
                    if whole { ours == kernel } else { contains_in_order(&ours, &kernel) }
                };
                if !trace.branches.iter().any(good) {
                    let nearest = trace.branches.iter().map(ours).next().unwrap_or_default();
                    let (kernel, ours) = (kernel.join("\n    "), nearest.join("\n    "));
                    wrong.push(format!(
                        "{variant}/{phase} {}: {tuple}\n  kernel\n    {kernel}\n  ours\n    {ours}",
                        flow.label
                    ));
                }
            };
            if !flow.nft_trace.is_empty() {
                nft += 1;
                compare(
                    traces::nft_steps(&flow.nft_trace),
                    &|branch| traces::branch_steps(branch, &|rule| node.is_empty(rule)),
                    true,
                );
            }
            if !flow.xt_trace.is_empty() {
                // xtables-monitor loses lines and dies in mid-trace; what it did print must be there, in order.
                xt += 1;
                compare(traces::xt_texts(&flow.xt_trace), &traces::branch_texts, false);
            }
            if !flow.legacy_trace.is_empty() {
                legacy += 1;
                compare(traces::legacy_steps(&flow.legacy_trace), &traces::branch_numbers, true);
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {nft} nft, {xt} xt and {legacy} legacy traces:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(nft > 300 && xt > 200 && legacy > 60, "{nft} nft, {xt} xt and {legacy} legacy traces were compared");
}

fn contains_in_order(all: &[String], some: &[String]) -> bool {
    let mut all = all.iter();
    some.iter().all(|wanted| all.any(|have| have == wanted))
}
