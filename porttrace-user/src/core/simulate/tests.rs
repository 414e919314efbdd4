//! What the model says of small states, each about one thing.

use super::Simulator;
use crate::core::model::flow::{Family, Proto, Tuple};
use crate::core::model::state::NodeState;
use crate::core::model::trace::{Branch, DropReason, Flavour, Fraction, Hop, Packet, Trace, Verdict};
use crate::core::parse::{Files, iptables, state};
use std::net::IpAddr;
use std::sync::Arc;

mod agreement;
mod kernel;
mod matching;
mod nat;
mod native;
mod paths;

const ADDRESSES: &str = r#"[
    {"ifindex":1,"ifname":"lo","flags":["LOOPBACK","UP"],"addr_info":[
        {"family":"inet","local":"127.0.0.1","prefixlen":8,"scope":"host"},{"family":"inet6","local":"::1","prefixlen":128,"scope":"host"}]},
    {"ifindex":2,"ifname":"eth0","flags":["UP"],"addr_info":[
        {"family":"inet","local":"172.18.0.3","prefixlen":16,"scope":"global"},
        {"family":"inet6","local":"fc00::3","prefixlen":64,"scope":"global"}]},
    {"ifindex":3,"ifname":"veth1","flags":["UP"],"addr_info":[{"family":"inet","local":"10.244.1.1","prefixlen":32,"scope":"global"}]}]"#;
const ROUTES: &str = r#"[
    {"dst":"default","gateway":"172.18.0.1","dev":"eth0"},
    {"dst":"10.244.1.9","dev":"veth1","scope":"host"},
    {"dst":"172.18.0.0/16","dev":"eth0","scope":"link","prefsrc":"172.18.0.3"},
    {"type":"blackhole","dst":"10.9.0.0/16"},{"type":"unreachable","dst":"10.8.0.0/16"},{"type":"prohibit","dst":"10.7.0.0/16"}]"#;
const SYSCTLS: &str = "net.ipv4.ip_forward = 1\nnet.ipv4.conf.all.rp_filter = 0\nnet.ipv4.conf.all.route_localnet = 0\n\
                       net.ipv4.conf.all.accept_local = 0\nnet.ipv6.conf.all.forwarding = 1\n";

/// A node with eth0 (172.18.0.3) and a pod 10.244.1.9 behind veth1; `rules` are iptables-save text, `changes` are more or other files.
fn node(rules: &str, changes: &[(&str, &str)]) -> NodeState {
    let mut files: Files = [
        ("ip-addr.json", ADDRESSES),
        ("ip-route.json", ROUTES),
        ("ip6-route.json", r#"[{"dst":"fc00::/64","dev":"eth0"},{"dst":"default","gateway":"fc00::1","dev":"eth0"}]"#),
        ("sysctl.txt", SYSCTLS),
        ("conntrack.txt", ""),
        ("ss.txt", "tcp LISTEN 0 128 0.0.0.0:22 0.0.0.0:*\n"),
    ]
    .iter()
    .chain(changes)
    .map(|(name, text)| (name.to_string(), text.as_bytes().to_vec()))
    .collect();
    files.retain(|_, text| text != b"-");
    let mut state = state(&files);
    let (ruleset, problems) = iptables::parse(rules, "test", Flavour::IptablesNft, Family::V4);
    assert_eq!(problems, [], "{rules}");
    state.rulesets = vec![Arc::new(ruleset)];
    state
}

fn tuple(text: &str) -> Tuple {
    let (src, dst) = text.split_once(" > ").expect("source > destination");
    let parse = |text: &str| text.parse().expect("address:port");
    Tuple::new(Proto::Tcp, parse(src), parse(dst))
}

/// A SYN that comes by `input`, or that the node sends when it is empty.
fn packet(text: &str, input: &str) -> Packet {
    Packet::first_of(tuple(text), (!input.is_empty()).then(|| input.into()))
}

fn trace(state: &NodeState, packet: &Packet) -> Trace {
    Simulator::new(state).trace(packet)
}

/// The only branch.
fn only(state: &NodeState, packet: &Packet) -> Branch {
    let mut trace = trace(state, packet);
    assert_eq!(trace.branches.len(), 1, "{:#?}", trace.branches);
    trace.branches.remove(0)
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Chain and number of each rule that acted, `chain:number`, policies as `chain:policy`.
fn rules(branch: &Branch) -> Vec<String> {
    let step = |hop: &Hop| match hop {
        Hop::Rule { rule, .. } => {
            Some(format!("{}:{}", rule.chain, rule.number().map_or("policy".into(), |number| number.to_string())))
        }
        _ => None,
    };
    branch.hops.iter().filter_map(step).collect()
}

fn notes(branch: &Branch) -> String {
    let note = |hop: &Hop| match hop {
        Hop::Note { text } => Some(text.clone()),
        _ => None,
    };
    branch.hops.iter().filter_map(note).collect::<Vec<_>>().join("; ")
}
