//! Single facts about the kernel that the simulator, or what is said about it, rests on.

use super::kernel::wire::shortest;
use super::run::{Round, run};
use super::scenario::{Chain, Link, Node, Probe, Rule, Scenario, Table, Tables};
use crate::netns::Netns;
use anyhow::{Context, Result};
use porttrace_user::core::model::flow::{Family, Proto, Tuple};
use porttrace_user::core::model::trace::{Packet, Verdict};
use porttrace_user::core::simulate::Simulator;
use std::net::{SocketAddr, UdpSocket};

/// Whether a packet from outside to 127.0.0.1 was delivered.
#[derive(Debug, PartialEq, Eq)]
pub struct Localnet {
    pub kernel: bool,
    pub simulator: bool,
}

/// Sends one with these settings of `net.ipv4.conf.all.route_localnet` and `net.ipv4.conf.eth0.route_localnet`.
pub fn localnet(all: u8, own: u8) -> Result<Localnet> {
    let mut node = plain();
    node.sysctls.push(("ipv4/conf/all/route_localnet".into(), all.to_string()));
    node.sysctls.push(("ipv4/conf/eth0/route_localnet".into(), own.to_string()));
    let tuple = Tuple::new(Proto::Udp, ([172, 18, 0, 4], 2000).into(), ([127, 0, 0, 1], 80).into());
    let round = once(node, Vec::new(), tuple)?;
    let delivered = |segment: &super::kernel::path::Segment| segment.chain == "input-last";
    let kernel = round.paths.values().flat_map(|path| &path.segments).any(delivered);
    let trace = Simulator::new(&round.state).trace(&round.probes.first().context("a packet")?.packet);
    let simulator = trace.branches.iter().all(|branch| matches!(branch.verdict, Verdict::Delivered { .. }));
    Ok(Localnet { kernel, simulator })
}

/// Where a packet went that rules of both flavours would rewrite: iptables-nft to port 1001, iptables-legacy to 1002.
#[derive(Debug)]
pub struct Order {
    pub kernel: SocketAddr,
    /// Destination ports of the branches, sorted.
    pub simulator: Vec<u16>,
}

/// Loads the two flavours one after the other.
pub fn flavours(legacy_first: bool) -> Result<Order> {
    let tables = |legacy: bool| {
        let port = if legacy { 1002 } else { 1001 };
        let rule = Rule::new(&["-p udp", "-m udp --dport 80"], &format!("-j DNAT --to-destination 10.1.0.20:{port}"));
        let chain = Chain { name: "PREROUTING".into(), policy: Some("ACCEPT".into()), rules: vec![rule] };
        Tables { family: Family::V4, legacy, tables: vec![Table { name: "nat".into(), chains: vec![chain] }] }
    };
    let tuple = Tuple::new(Proto::Udp, ([172, 18, 0, 4], 2000).into(), ([172, 18, 0, 3], 80).into());
    let round = once(plain(), [legacy_first, !legacy_first].map(tables).into(), tuple)?;
    let arrival = round.paths.values().flat_map(|path| &path.arrivals).next().context("the packet did not arrive")?;
    let trace = Simulator::new(&round.state).trace(&round.probes.first().context("a packet")?.packet);
    let mut simulator: Vec<u16> = trace.branches.iter().map(|branch| branch.final_tuple.dport).collect();
    simulator.sort_unstable();
    Ok(Order { kernel: arrival.tuple.destination(), simulator })
}

/// How many packets left a namespace with a mark, and arrived in another with and without one.
#[derive(Debug, PartialEq, Eq)]
pub struct Marks {
    pub left_with: u64,
    pub arrived_with: u64,
    pub arrived_without: u64,
}

/// Sends one marked packet over a veth pair.
pub fn mark_across() -> Result<Marks> {
    let (here, there) = (Netns::new("here")?, Netns::new("there")?);
    here.exec(["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", there.name()])?;
    for (netns, link, address) in [(&here, "v0", "192.0.2.1/30"), (&there, "v1", "192.0.2.2/30")] {
        netns.exec(["ip", "addr", "add", address, "dev", link])?;
        netns.exec(["ip", "link", "set", link, "up"])?;
    }
    let count = "udp dport 4000 meta mark 0x4000 counter name with; udp dport 4000 meta mark 0 counter name without;";
    for (netns, hook) in [(&here, "postrouting"), (&there, "prerouting")] {
        let text = format!(
            "table ip seen {{ counter with {{ }}; counter without {{ }}; chain c {{ type filter hook {hook} priority 0; {count} }}; }};\n"
        );
        netns.exec_with(["nft", "-f", "-"], &text)?;
    }
    here.exec(["iptables", "-t", "mangle", "-A", "OUTPUT", "-p", "udp", "-j", "MARK", "--set-mark", "0x4000"])?;
    let receiver = there.run_in(|| UdpSocket::bind("192.0.2.2:4000"))??;
    receiver.set_read_timeout(Some(std::time::Duration::from_secs(10)))?;
    let sender = here.run_in(|| UdpSocket::bind("192.0.2.1:0"))??;
    sender.send_to(b"marked", "192.0.2.2:4000")?;
    receiver.recv_from(&mut [0; 16]).context("waiting for the packet")?;
    let packets = |netns: &Netns, name: &str| -> Result<u64> {
        let text = netns.exec(["nft", "list", "counter", "ip", "seen", name])?;
        text.split("packets ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).context("a counter")
    };
    Ok(Marks {
        left_with: packets(&here, "with")?,
        arrived_with: packets(&there, "with")?,
        arrived_without: packets(&there, "without")?,
    })
}

/// A router with eth0 (172.18.0.3/16) and eth1 (10.1.0.1/24) that forwards.
fn plain() -> Node {
    Node {
        links: ["eth0", "eth1"].map(|name| Link { name: name.into(), bridge: None }).into(),
        ip: vec!["addr add 172.18.0.3/16 dev eth0".into(), "addr add 10.1.0.1/24 dev eth1".into()],
        sysctls: vec![("ipv4/ip_forward".into(), "1".into())],
        ..Node::default()
    }
}

/// One packet from eth0's neighbour.
fn once(node: Node, rules: Vec<Tables>, tuple: Tuple) -> Result<Round> {
    let mut packet = Packet::first_of(tuple, Some("eth0".into()));
    packet.length = shortest(tuple.proto, false);
    let probes = vec![Probe { id: 1, packet, uid: 0, mac: 1 }];
    let outcome = run(&Scenario { name: "fact".into(), node, rules, probes, ..Scenario::default() })?;
    outcome.rounds.into_iter().next().context("no round")
}
