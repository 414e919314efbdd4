//! How fast the simulator is on a dump of 5,000 Services with 4 endpoints each and one with 1,000.
//!
//! `cargo run --release -p porttrace-user --example bench_sim [-- --command PORTTRACE | --write FILE | --parse FILE]` prints one
//! `name value unit` a line. Work of one thread is given in that thread's CPU time, so that a busy machine does not blur it;
//! batches, which the command at PORTTRACE does, in wall time. `--write` only writes the dump, so that iptables' tools can be
//! measured on the same file.

#[path = "bench_sim/batch.rs"]
mod batch;
#[path = "bench_sim/generator.rs"]
mod generator;

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};
use porttrace_user::core::kube::owners::Owners;
use porttrace_user::core::model::flow::{Family, Proto, Tuple};
use porttrace_user::core::model::rules::Ruleset;
use porttrace_user::core::model::state::{Address, NextHop, NodeState, RouteEntry};
use porttrace_user::core::model::trace::{Flavour, Packet, RouteKind};
use porttrace_user::core::parse::iptables;
use porttrace_user::core::simulate::Simulator;
use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let services = generator::services(5_000, 4, 1_000);
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => measure(&services, None),
        ["--command", command] => measure(&services, Some(Path::new(command))),
        ["--write", file] => {
            fs::write(file, generator::dump(&services)).with_context(|| format!("could not write {file}"))
        }
        ["--parse", file] => {
            let text = fs::read_to_string(file).with_context(|| format!("could not read {file}"))?;
            measure_parse(&text).map(drop)
        }
        _ => bail!("usage: bench_sim [--command PORTTRACE | --write FILE | --parse FILE]"),
    }
}

fn measure(services: &[generator::Service], command: Option<&Path>) -> Result<()> {
    let dump = generator::dump(services);
    let state = node(measure_parse(&dump)?);
    let (begin, before) = (now()?, allocated());
    let simulator = Simulator::new(&state);
    report("compile", (now()? - begin) * 1e3, "ms");
    report("compile_memory", allocated() - before, "MiB");
    let (begin, before) = (now()?, allocated());
    let owners = Owners::of(&state);
    report("claims", (now()? - begin) * 1e3, "ms");
    report("claims_memory", allocated() - before, "MiB");
    drop(owners);
    measure_packets(&simulator, services)?;
    command.map_or(Ok(()), |command| batch::measure(command, &dump, |number| packet(services, number)))
}

fn report(name: &str, value: f64, unit: &str) {
    println!("{name} {value:.3} {unit}");
}

/// CPU time of this thread in seconds.
fn now() -> Result<f64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("could not read the thread's CPU time")?;
    Ok(time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
}

/// What this process has allocated and not freed, in MiB.
fn allocated() -> f64 {
    // SAFETY: it takes nothing and returns numbers.
    let info = unsafe { libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as f64 / f64::from(1 << 20)
}

fn measure_parse(text: &str) -> Result<Ruleset> {
    let before = allocated();
    let mut best = f64::MAX;
    let mut ruleset = None;
    for round in 0..5 {
        drop(ruleset.take());
        let begin = now()?;
        let (parsed, problems) = iptables::parse(text, "generated", Flavour::IptablesLegacy, Family::V4);
        best = best.min((now()? - begin) * 1e3);
        if round == 0 {
            report("parse_memory", allocated() - before, "MiB");
            report("diagnostics", problems.len() as f64, "lines");
        }
        ruleset = Some(parsed);
    }
    let ruleset = ruleset.context("five rounds")?;
    let rules: usize = ruleset.tables.iter().flat_map(|table| &table.chains).map(|chain| chain.rules.len()).sum();
    report("rules", rules as f64, "rules");
    report("parse", best, "ms");
    Ok(ruleset)
}

fn node(ruleset: Ruleset) -> NodeState {
    let address = |interface: &str, text: [u8; 4], prefix| Address {
        interface: interface.into(),
        address: IpAddr::V4(Ipv4Addr::from(text)),
        prefix,
        scope: if text[0] == 127 { "host".into() } else { "global".into() },
        secondary: false,
    };
    let route = |dst: &str, gateway: Option<[u8; 4]>| RouteEntry {
        kind: RouteKind::Unicast,
        dst: dst.parse().unwrap_or_default(),
        table: "main".into(),
        nexthops: vec![NextHop {
            interface: Some("eth0".into()),
            gateway: gateway.map(|gateway| IpAddr::V4(Ipv4Addr::from(gateway))),
            weight: 1,
            dead: false,
        }],
        prefsrc: None,
        metric: 0,
        tos: 0,
        src: None,
        scope: "global".into(),
        mtu: None,
    };
    let sysctls =
        [("net.ipv4.ip_forward", "1"), ("net.ipv4.conf.all.route_localnet", "1"), ("net.ipv4.conf.all.rp_filter", "0")];
    NodeState {
        rulesets: vec![Arc::new(ruleset)],
        addresses: Some(vec![address("lo", [127, 0, 0, 1], 8), address("eth0", [172, 18, 0, 3], 16)]),
        routes: Some(vec![route("172.18.0.0/16", None), route("0.0.0.0/0", Some([172, 18, 0, 1]))]),
        sysctls: Some(sysctls.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()),
        conntrack: Some(Vec::new()),
        recent: Some(BTreeMap::new()),
        sockets: Some(Vec::new()),
        ..NodeState::default()
    }
}

/// A packet from another node: to the NodePort of Services in turn, or to a closed port.
fn packet(services: &[generator::Service], number: usize) -> Packet {
    let service = &services[number * 7919 % (services.len() - 1)];
    let (dport, udp) = if number % 8 == 7 { (9, false) } else { (service.node_port, service.udp) };
    let tuple = Tuple {
        proto: if udp { Proto::Udp } else { Proto::Tcp },
        src: IpAddr::V4(Ipv4Addr::new(172, 18, 0, 4)),
        sport: 1024 + (number % 60_000) as u16,
        dst: IpAddr::V4(Ipv4Addr::new(172, 18, 0, 3)),
        dport,
    };
    Packet::first_of(tuple, Some("eth0".into()))
}

fn measure_packets(simulator: &Simulator, services: &[generator::Service]) -> Result<()> {
    let mut branches = 0;
    let rounds = 20_000;
    let begin = now()?;
    for number in 0..rounds {
        branches += simulator.trace(&packet(services, number)).branches.len();
    }
    let each = (now()? - begin) / rounds as f64;
    report("trace_of_a_nodeport_all_branches", each * 1e6, "us");
    report("branches_each", branches as f64 / rounds as f64, "branches");
    report("one_branch", each * 1e6 * rounds as f64 / branches as f64, "us");

    let closed = packet(services, 7);
    let begin = now()?;
    for _ in 0..rounds {
        assert_eq!(simulator.trace(&closed).branches.len(), 1);
    }
    report("one_packet", (now()? - begin) / rounds as f64 * 1e6, "us");

    let big = services.last().context("a Service")?;
    let mut packet = closed;
    packet.tuple.dst = IpAddr::V4(Ipv4Addr::from(big.cluster_ip));
    packet.tuple.dport = 80;
    let (mut walked, mut read) = (f64::MAX, f64::MAX);
    for _ in 0..200 {
        let begin = now()?;
        let trace = simulator.trace(&packet);
        walked = walked.min((now()? - begin) * 1e3);
        assert_eq!(trace.branches.len(), big.endpoints);
        let hops: usize = trace.branches.iter().map(|branch| branch.hops.len()).sum();
        read = read.min((now()? - begin) * 1e3);
        assert!(hops > big.endpoints * 10);
    }
    report("all_branches_of_1000_endpoints", walked, "ms");
    report("the_same_with_all_hops_in_words", read, "ms");
    Ok(())
}
