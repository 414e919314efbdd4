//! Every rewrite of a watched port is told, with both tuples: as many as clients made connections, to the last one.
//!
//! `PORTTRACE_COMPLETENESS=20000` makes so many connections of each kind; the default is small, for every run of the tests.

use anyhow::{Context, Result};
use porttrace_ebpf::Kind;
use porttrace_tests::lab::topology::{HOST_PORT, NodeName, service};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::privilege::may_run;
use porttrace_user::collect::probe::{Backend, ConntrackBackend, Lost, Probe, ProbeConfig};
use porttrace_user::collect::ruleset;
use porttrace_user::core::kube::targets::nat_targets;
use porttrace_user::core::model::event::Event;
use porttrace_user::core::model::flow::{Proto, Tuple};
use socket2::{Domain, Socket, Type};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(120);
const FIRST_PORT: u16 = 10_000;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// Connections of each kind.
fn wanted() -> u16 {
    std::env::var("PORTTRACE_COMPLETENESS").ok().and_then(|text| text.parse().ok()).unwrap_or(2_000)
}

/// What the clients made: how many connections with each original tuple.
type Made = BTreeMap<Tuple, u64>;

/// Sends from each source port once, to each of the addresses: the same ports again and again, as fast as it goes.
fn send(lab: &Lab, count: u16) -> Result<Made> {
    let node = Origin::OtherNode.target(false);
    let own: Ipv4Addr = NodeName::Worker2.v4();
    let targets = [
        (Proto::Tcp, HOST_PORT),
        (Proto::Udp, HOST_PORT),
        (Proto::Tcp, service::FRONTEND_NODE_PORT),
        (Proto::Udp, service::DNS_NODE_PORT),
    ];
    lab.netns(Origin::OtherNode)?.run_in(|| {
        let mut made = Made::new();
        for (proto, port) in targets {
            let to = SocketAddr::new(node, port);
            for number in 0..count {
                let from = SocketAddr::from((own, FIRST_PORT + number));
                one(proto, from, to).with_context(|| format!("{proto} {from} to {to}"))?;
                *made.entry(Tuple::new(proto, from, to)).or_default() += 1;
            }
        }
        Ok(made)
    })?
}

fn one(proto: Proto, from: SocketAddr, to: SocketAddr) -> Result<()> {
    let kind = if proto == Proto::Tcp { Type::STREAM } else { Type::DGRAM };
    let socket = Socket::new(Domain::IPV4, kind, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    socket.connect(&to.into())?;
    if proto == Proto::Udp {
        socket.send(b"ping")?;
    }
    Ok(())
}

/// Runs a probe while the clients send, until everything was told or lost; events, and what was lost.
fn watch(lab: &Lab, backend: Backend, count: u16) -> Result<(ConntrackBackend, Made, Vec<Event>, Lost)> {
    let ports = [HOST_PORT, service::FRONTEND_NODE_PORT, service::DNS_NODE_PORT];
    let (ready, sent) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let clients = scope.spawn(|| {
            while !ready.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            let made = send(lab, count);
            sent.store(true, Ordering::Release);
            made
        });
        let outcome = lab.node(NodeName::Worker3).run_in(|| -> Result<_> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let started = Probe::start(&ProbeConfig { backend, ..ProbeConfig::new(ports) });
                ready.store(true, Ordering::Release);
                let mut probe = started?;
                let (rules, _, _) = ruleset::read_all();
                probe.predict(&nat_targets(&rules, &ports))?;
                let mut events = Vec::new();
                let deadline = Instant::now() + DEADLINE;
                while !sent.load(Ordering::Acquire) {
                    anyhow::ensure!(Instant::now() < deadline, "the clients do not end");
                    probe.read(&mut events).await?;
                }
                probe.read_now(&mut events)?;
                Ok((probe.info().conntrack_backend, events, probe.lost()?))
            })
        });
        let made = clients.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let (runs, events, lost) = outcome??;
        Ok((runs, made, events, lost))
    })
}

/// Connections whose rewrite was told: by original tuple, each with the reply tuple that it got.
fn rewrites(events: &[Event]) -> BTreeMap<Tuple, Vec<Tuple>> {
    let mut told: BTreeMap<Tuple, Vec<Tuple>> = BTreeMap::new();
    for event in events {
        let Some(entry) = event.conntrack else { continue };
        let is_final = match event.kind {
            Kind::Confirmed => entry.is_new,
            // A datagram makes its entry, a SYN opens a connection; on POSTROUTING once.
            Kind::AfterSnat => entry.is_new || event.l4_flags & (SYN | ACK) == SYN,
            _ => false,
        };
        if is_final && !entry.is_reply {
            told.entry(entry.original).or_default().push(entry.reply);
        }
    }
    told
}

fn nothing_is_missing(backend: Backend, expected: &[ConntrackBackend]) {
    if !may_run("the probe") {
        return;
    }
    let count = wanted();
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, quiet: true, ..LabOptions::default() }).unwrap();
    let began = Instant::now();
    let (runs, made, events, lost) = watch(&lab, backend, count).unwrap();
    let took = began.elapsed();
    assert!(expected.contains(&runs), "{runs}");
    let told = rewrites(&events);
    let captured: usize = made.keys().filter_map(|tuple| told.get(tuple)).map(Vec::len).sum();
    let sent: u64 = made.values().sum();
    println!(
        "{runs}: {sent} connections in {:.1} s ({:.0}/s), {captured} rewrites, {} events, lost {lost:?}",
        took.as_secs_f64(),
        sent as f64 / took.as_secs_f64(),
        events.len()
    );
    assert_eq!(sent, 4 * u64::from(count));
    assert_eq!(lost, Lost::default(), "with default buffers nothing is lost");
    let missing: Vec<&Tuple> = made.keys().filter(|tuple| !told.contains_key(tuple)).take(5).collect();
    assert!(missing.is_empty(), "not told: {missing:?}");
    assert_eq!(captured as u64, sent, "each once");
    for (original, replies) in &told {
        assert!(replies.iter().all(|reply| reply.source() != original.destination()), "{original} was not rewritten");
    }
}

#[test]
fn every_rewrite_by_hooks() {
    nothing_is_missing(Backend::Auto, &[ConntrackBackend::Netfilter, ConntrackBackend::Kprobe]);
}

#[test]
fn every_rewrite_by_conntracks_events() {
    nothing_is_missing(Backend::Ctnetlink, &[ConntrackBackend::Ctnetlink]);
}
