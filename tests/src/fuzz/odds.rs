//! Random branches: the probabilities that the simulator gives, against how often the kernel takes each.

use super::kernel::path::Path;
use super::kernel::wire::shortest;
use super::run::{Round, run};
use super::scenario::{Chain, Link, Node, Probe, Rule, Scenario, Table, Tables};
use crate::lab::topology::{NodeName, OUTSIDE_V4, service};
use crate::lab::{Lab, LabOptions, Origin};
use crate::peer::{Connect, Transport};
use anyhow::{Context, Result, ensure};
use porttrace_user::collect::live;
use porttrace_user::core::model::flow::{Family, Proto, Tuple};
use porttrace_user::core::model::trace::{Packet, Verdict};
use porttrace_user::core::simulate::Simulator;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// How often each destination was taken, and with what probability it should be.
#[derive(Debug)]
pub struct Odds {
    pub connections: usize,
    /// Destination → expected share and observed count.
    pub outcomes: BTreeMap<IpAddr, (f64, usize)>,
}

impl Odds {
    /// Pearson's χ², with one degree of freedom less than there are outcomes.
    pub fn chi_square(&self) -> f64 {
        let term = |(share, count): &(f64, usize)| {
            let expected = share * self.connections as f64;
            (*count as f64 - expected).powi(2) / expected
        };
        self.outcomes.values().map(term).sum()
    }
}

/// Sends `count` new connections to a Service with `endpoints` endpoints, as kube-proxy balances them.
pub fn balance(endpoints: u8, count: u16) -> Result<Odds> {
    let outcome = run(&scenario(endpoints, count))?;
    let mut odds = Odds { connections: 0, outcomes: BTreeMap::new() };
    for round in &outcome.rounds {
        expected(round, &mut odds)?;
        for path in round.paths.values() {
            let to = arrived(path).context("a connection did not arrive")?;
            let seen = odds.outcomes.get_mut(&to).context("a connection arrived where no branch leads")?;
            seen.1 += 1;
            odds.connections += 1;
        }
    }
    Ok(odds)
}

/// Opens `count` real connections from outside to the lab's NodePort with three endpoints, through the rules that a real
/// kube-proxy wrote, and asks the simulator with the state that porttrace itself collects on the node.
pub fn node_port(count: usize) -> Result<Odds> {
    let lab = Lab::up(LabOptions::default())?;
    let node = lab.node(NodeName::Worker3);
    let live::Node { state, .. } = node.run_in(|| live::node(live::Options::default()))?;
    let to = SocketAddr::new(NodeName::Worker3.v4().into(), service::FRONTEND_NODE_PORT);
    let tuple = Tuple::new(Proto::Tcp, SocketAddr::new(OUTSIDE_V4.into(), 40_000), to);
    let trace = Simulator::new(&state).trace(&Packet::first_of(tuple, Some("eth0".into())));
    let mut odds = Odds { connections: 0, outcomes: BTreeMap::new() };
    for branch in &trace.branches {
        let share = odds.outcomes.entry(branch.final_tuple.dst).or_insert((0.0, 0));
        share.0 += branch.probability.as_f64();
    }
    for _ in 0..count {
        let answer = lab.connect(Origin::Outside, &Connect::new(Transport::Tcp, to))?;
        let server = answer.server_local.with_context(|| format!("no answer: {answer:?}"))?;
        odds.outcomes.get_mut(&server.ip()).context("a connection arrived where no branch leads")?.1 += 1;
        odds.connections += 1;
    }
    Ok(odds)
}

fn arrived(path: &Path) -> Option<IpAddr> {
    Some(path.arrivals.first()?.tuple.dst)
}

/// The branches of the first probe; every probe has the same.
fn expected(round: &Round, odds: &mut Odds) -> Result<()> {
    let probe = round.probes.first().context("no connection to send")?;
    let trace = Simulator::new(&round.state).trace(&probe.packet);
    for branch in &trace.branches {
        let Verdict::Forwarded { to, .. } = &branch.verdict else { continue };
        odds.outcomes.entry(to.dst).or_insert((branch.probability.as_f64(), 0));
    }
    let sum: f64 = odds.outcomes.values().map(|(share, _)| share).sum();
    ensure!((sum - 1.0).abs() < 1e-9, "the branches' probabilities add up to {sum}");
    Ok(())
}

fn scenario(endpoints: u8, count: u16) -> Scenario {
    let chain =
        |name: &str, policy: Option<&str>, rules| Chain { name: name.into(), policy: policy.map(String::from), rules };
    let dispatch = Rule::new(&["-d 10.96.0.10/32", "-p tcp", "-m tcp --dport 80"], "-j KUBE-SVC-ODDS");
    let choose = |at: u8| {
        let left = f64::from(endpoints - at);
        let random = format!("-m statistic --mode random --probability {:.10}", 1.0 / left);
        let matches: &[&str] = if at + 1 < endpoints { &[&random] } else { &[] };
        Rule::new(matches, &format!("-j KUBE-SEP-{at}"))
    };
    let mut chains = vec![
        chain("PREROUTING", Some("ACCEPT"), vec![dispatch]),
        chain("KUBE-SVC-ODDS", None, (0..endpoints).map(choose).collect()),
    ];
    chains.extend((0..endpoints).map(|at| {
        let rule = Rule::new(&["-p tcp", "-m tcp"], &format!("-j DNAT --to-destination 10.244.1.{}:8080", at + 10));
        chain(&format!("KUBE-SEP-{at}"), None, vec![rule])
    }));
    let node = Node {
        links: ["eth0", "veth1"].map(|name| Link { name: name.into(), bridge: None }).into(),
        ip: vec!["addr add 172.18.0.3/16 dev eth0".into(), "addr add 10.244.1.1/24 dev veth1".into()],
        sysctls: vec![("ipv4/ip_forward".into(), "1".into())],
        ..Node::default()
    };
    let rules = vec![Tables { family: Family::V4, legacy: false, tables: vec![Table { name: "nat".into(), chains }] }];
    let probe = |id: u16| {
        let tuple = Tuple::new(Proto::Tcp, ([172, 18, 0, 4], 20_000 + id).into(), ([10, 96, 0, 10], 80).into());
        let mut packet = Packet::first_of(tuple, Some("eth0".into()));
        packet.length = shortest(Proto::Tcp, false);
        Probe { id, packet, uid: 0, mac: 1 }
    };
    Scenario { name: "odds".into(), node, rules, probes: (1..=count).map(probe).collect(), ..Scenario::default() }
}
