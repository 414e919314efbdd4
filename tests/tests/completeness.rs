//! Every rewrite of a watched port is told, with both tuples, to the last one: as many as the clients made connections, as
//! conntrack counted, and the very ones that the servers saw.
//!
//! `PORTTRACE_COMPLETENESS=20000` makes so many connections of each kind; the default is small, for every run of the tests. Where so
//! many come faster than a buffer is read, what was lost must be counted, to the last one.

use anyhow::{Context, Result};
use porttrace_ebpf::Kind;
use porttrace_tests::bpf::{held_by, usage};
use porttrace_tests::lab::topology::{DNS, FRONTEND, HOST_PORT, NodeName, service};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::load::{
    Batch, Made, Mode, NewConnections, Pace, RawSender, Servers, Until, entries, make, stay_on_one_cpu,
};
use porttrace_tests::peer::Transport;
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::backend;
use porttrace_user::collect::probe::{Backend, ConntrackBackend, Lost, Probe, ProbeConfig};
use porttrace_user::collect::ruleset;
use porttrace_user::core::kube::targets::nat_targets;
use porttrace_user::core::model::event::Event;
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(120);
const FIRST_PORT: u16 = 10_000;
/// TCP uses each port so often: what conntrack keeps of a reset connection is in the way of the next one.
const ROUNDS: u16 = 2;
const CLIENTS: u16 = 2;
const PORTS: [u16; 3] = [HOST_PORT, service::FRONTEND_NODE_PORT, service::DNS_NODE_PORT];
const TARGETS: [(Proto, u16); 4] = [
    (Proto::Tcp, HOST_PORT),
    (Proto::Udp, HOST_PORT),
    (Proto::Tcp, service::FRONTEND_NODE_PORT),
    (Proto::Udp, service::DNS_NODE_PORT),
];
/// Source ports of each sender of the node's own connections.
const OWN_PORTS: u16 = 20_000;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// So many of each kind are in no buffer's way, however fast they come.
const FEW: u16 = 2_000;

/// Connections of each kind; even.
fn wanted() -> u16 {
    let given = std::env::var("PORTTRACE_COMPLETENESS").ok().and_then(|text| text.parse::<u16>().ok());
    given.unwrap_or(FEW).next_multiple_of(ROUNDS)
}

/// How often each source port is used, and the batch that does so.
fn batch((proto, port): (Proto, u16), count: u16) -> (u16, Batch) {
    let rounds = if proto == Proto::Tcp { ROUNDS } else { 1 };
    let ports = FIRST_PORT..FIRST_PORT + count / rounds;
    let to = SocketAddrV4::new(NodeName::Worker3.v4(), port);
    (rounds, Batch { proto, from: NodeName::Worker2.v4(), ports, to })
}

/// Lets all who will send know the addresses on their links. The first connection's packets would wait for that, one after the
/// other, and its reset may then leave before the last ACK of its handshake: its server never has the connection, and conntrack,
/// which saw an ACK last, takes the next one from its port for the same (`nf_conntrack_tcp_packet`).
fn acquaint(lab: &Lab) -> Result<()> {
    let node = NodeName::Worker3;
    let closed = 1;
    for (from, to) in [
        (lab.netns(Origin::OtherNode)?, node.v4()),
        (lab.node(node), node.pod_v4(FRONTEND)),
        (lab.node(node), node.pod_v4(DNS)),
    ] {
        let outcome = from.run_in(|| TcpStream::connect_timeout(&(to, closed).into(), DEADLINE))?;
        let error = outcome.err().with_context(|| format!("{to}:{closed} is open"))?;
        anyhow::ensure!(error.kind() == ErrorKind::ConnectionRefused, "{to}:{closed}: {error}");
    }
    Ok(())
}

/// Sends everything: how many connections with each original tuple, and how fast.
fn send(lab: &Lab, servers: &Servers, count: u16) -> Result<(BTreeMap<Tuple, u64>, Made)> {
    let netns = lab.netns(Origin::OtherNode)?;
    let (mut tuples, mut all) = (BTreeMap::new(), Made::default());
    for target in TARGETS {
        let (rounds, batch) = batch(target, count);
        let until = Until::Rounds(u32::from(rounds));
        let made = make(netns, &batch.split(CLIENTS), until, Pace::AsFastAsPossible, servers)?;
        println!(
            "  {} to {}: {} in {:.2} s, {:.0}/s",
            target.0,
            target.1,
            made.connections,
            made.took.as_secs_f64(),
            made.rate()
        );
        all = Made { connections: all.connections + made.connections, took: all.took + made.took };
        tuples.extend(batch.ports.clone().map(|port| (batch.tuple(port), u64::from(rounds))));
    }
    Ok((tuples, all))
}

/// Opens connections of the node's own, each new, until it is told to stop: one sender on each CPU.
fn connect_from_the_node(lab: &Lab, stop: &AtomicBool) -> Result<()> {
    let to = SocketAddrV4::new(NodeName::Worker2.v4(), 9);
    let send = |number: u16| {
        stay_on_one_cpu(number.into())?;
        let mut sender = RawSender::new(NodeName::Worker3.v4(), to)?;
        for port in (0..OWN_PORTS).map(|port| FIRST_PORT + number * OWN_PORTS + port).cycle() {
            if stop.load(Ordering::Acquire) {
                return Ok(());
            }
            sender.send(port)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..CLIENTS)
            .map(|number| scope.spawn(move || lab.node(NodeName::Worker3).run_in(|| send(number))?))
            .collect();
        senders
            .into_iter()
            .try_for_each(|sender| sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// What a probe told.
struct Told {
    runs: ConntrackBackend,
    /// Reply tuples by original tuple.
    rewrites: BTreeMap<Tuple, Vec<Tuple>>,
    /// Entries that went.
    gone: u64,
    events: u64,
    lost: Lost,
}

/// Runs a probe while `clients` send, until everything was told or lost.
fn watch<T: Send>(lab: &Lab, config: &ProbeConfig, clients: impl FnOnce() -> Result<T> + Send) -> Result<(Told, T)> {
    let (ready, sent) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let clients = scope.spawn(|| {
            while !ready.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            let made = clients();
            sent.store(true, Ordering::Release);
            made
        });
        let outcome = lab.node(NodeName::Worker3).run_in(|| -> Result<_> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let started = Probe::start(config);
                ready.store(true, Ordering::Release);
                let mut probe = started?;
                let (rules, _) = ruleset::read_all();
                probe.predict(&nat_targets(&rules, &config.ports))?;
                let mut told = Told {
                    runs: probe.info().conntrack_backend,
                    rewrites: BTreeMap::new(),
                    gone: 0,
                    events: 0,
                    lost: Lost::default(),
                };
                let mut events = Vec::new();
                let deadline = Instant::now() + DEADLINE;
                while !sent.load(Ordering::Acquire) {
                    anyhow::ensure!(Instant::now() < deadline, "the clients do not end");
                    probe.read(&mut events).await?;
                    told.take(&mut events);
                }
                probe.read_rest(&mut events)?;
                told.take(&mut events);
                told.lost = probe.lost()?;
                Ok(told)
            })
        });
        let made = clients.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((outcome??, made))
    })
}

impl Told {
    /// Keeps of each connection the rewrite that is final.
    fn take(&mut self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            self.events += 1;
            self.gone += u64::from(event.kind == Kind::Destroyed);
            let Some(entry) = event.conntrack else { continue };
            let is_final = match event.kind {
                Kind::Confirmed => entry.is_new,
                // A datagram makes its entry, a SYN opens a connection; on POSTROUTING once.
                Kind::AfterSnat => entry.is_new || event.l4_flags & (SYN | ACK) == SYN,
                _ => false,
            };
            if is_final && !entry.is_reply {
                self.rewrites.entry(entry.original).or_default().push(entry.reply);
            }
        }
    }

    /// Of what was lost, that which may have told of a rewrite.
    const fn lost_rewrites(&self) -> u64 {
        match self.runs {
            ConntrackBackend::Ctnetlink => self.lost.conntrack_full,
            _ => self.lost.ring_full,
        }
    }

    fn rewrites(&self) -> u64 {
        self.rewrites.values().map(|replies| replies.len() as u64).sum()
    }

    /// Client and server as the server must see them, and how often.
    fn arrivals(&self) -> BTreeMap<(Proto, SocketAddr, SocketAddr), u64> {
        let mut all = BTreeMap::new();
        for reply in self.rewrites.values().flatten() {
            *all.entry((reply.proto, reply.destination(), reply.source())).or_default() += 1;
        }
        all
    }
}

/// What the servers noted: client and server, and how often.
fn arrivals(servers: &Servers) -> BTreeMap<(Proto, SocketAddr, SocketAddr), u64> {
    let mut all = BTreeMap::new();
    for served in servers.log() {
        let proto = if served.proto == Transport::Tcp { Proto::Tcp } else { Proto::Udp };
        *all.entry((proto, served.saw, served.local)).or_default() += 1;
    }
    all
}

/// Waits until the servers took what is still on its way.
fn all_served(servers: &Servers, sent: u64) {
    let deadline = Instant::now() + DEADLINE;
    while servers.served() < sent {
        assert!(Instant::now() < deadline, "{} of {sent} arrived", servers.served());
        std::thread::yield_now();
    }
}

/// Where so many come at once that a buffer runs full: what was told and what was counted as lost are all that there was, and by
/// conntrack's events just that.
fn all_lost_is_counted(told: &Told, sent: u64, gone: u64) {
    let (rewrites, lost) = (told.rewrites(), told.lost_rewrites());
    if told.runs == ConntrackBackend::Ctnetlink {
        assert_eq!(rewrites + told.gone + lost, sent + gone, "{rewrites} told, {} gone, {:?}", told.gone, told.lost);
    } else {
        // An event tells one rewrite at most.
        assert!(rewrites + lost >= sent, "{rewrites} told, {:?}", told.lost);
    }
}

/// How much waits for porttrace to read it, at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Default,
    /// Less than comes between two looks.
    Little,
}

fn nothing_is_missing(backend: Backend, expected: &[ConntrackBackend], room: Room) {
    if !may_run("the probe") {
        return;
    }
    let count = wanted();
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, bare: true, ..LabOptions::default() }).unwrap();
    let node = lab.node(NodeName::Worker3);
    // So that every entry is still there to be compared at the end.
    for kind in ["udp_timeout", "tcp_timeout_close"] {
        node.exec(["sysctl", "-qw", &format!("net.netfilter.nf_conntrack_{kind}=300")]).unwrap();
    }
    let servers = Servers::in_pods(&lab, Mode::Log).unwrap();
    let counted = NewConnections::count(node, &lab.tools, &PORTS).unwrap();
    acquaint(&lab).unwrap();
    let mut config = ProbeConfig { backend, ..ProbeConfig::new(PORTS) };
    if room == Room::Little {
        config.ring_bytes = 4 << 10;
    }
    let (told, (made, all)) = watch(&lab, &config, || send(&lab, &servers, count)).unwrap();
    println!(
        "{}: {} connections, {:.0}/s, {} rewrites, {} events, lost {:?}",
        told.runs,
        all.connections,
        all.rate(),
        told.rewrites(),
        told.events,
        told.lost
    );
    assert!(expected.contains(&told.runs), "{}", told.runs);
    assert_eq!(all.connections, 4 * u64::from(count));
    all_served(&servers, all.connections);
    let wrong = told.rewrites.iter().find(|(tuple, to)| made.get(tuple).is_none_or(|times| *times < to.len() as u64));
    assert_eq!(wrong, None, "more often than sent");
    assert!(room == Room::Little || count > FEW || told.lost.total() == 0, "with default buffers: {:?}", told.lost);
    assert!(room == Room::Default || told.lost_rewrites() > 0, "with so little room some must be lost");
    if told.lost_rewrites() > 0 {
        // TCP's entries of one round go in the next.
        return all_lost_is_counted(&told, all.connections, u64::from(count / ROUNDS * (ROUNDS - 1)) * 2);
    }

    // The clients: every connection once.
    let missing: Vec<&Tuple> = made.keys().filter(|tuple| !told.rewrites.contains_key(tuple)).take(5).collect();
    assert!(missing.is_empty(), "not told: {missing:?}");
    let wrong: Vec<_> =
        told.rewrites.iter().filter(|(tuple, to)| made.get(tuple) != Some(&(to.len() as u64))).take(5).collect();
    assert!(wrong.is_empty(), "not as often as sent: {wrong:?}");
    // The node's netfilter: as many new connections of each protocol.
    assert_eq!(counted.read().unwrap(), [2 * u64::from(count); 2]);
    // The servers: these clients at these addresses, each as often.
    assert!(told.arrivals() == arrivals(&servers), "the servers saw others than were told");
    // Conntrack: its entries have the tuples that were told last.
    for (proto, port) in TARGETS {
        let entries = entries(node, proto, port).unwrap();
        let mut of_port = told.rewrites.iter().filter(|(tuple, _)| tuple.proto == proto && tuple.dport == port);
        let differs = of_port.find(|(tuple, replies)| entries.get(tuple) != replies.last());
        assert_eq!(differs, None, "conntrack's entry is {:?}", differs.and_then(|(tuple, _)| entries.get(tuple)));
    }
}

#[test]
fn every_rewrite_by_hooks() {
    let hooks = [ConntrackBackend::Netfilter, ConntrackBackend::Fentry, ConntrackBackend::Kprobe];
    nothing_is_missing(backend(), &hooks, Room::Default);
}

#[test]
fn every_rewrite_by_conntracks_events() {
    nothing_is_missing(Backend::Ctnetlink, &[ConntrackBackend::Ctnetlink], Room::Default);
}

#[test]
fn every_rewrite_that_conntracks_queue_cannot_hold_is_counted() {
    nothing_is_missing(Backend::Ctnetlink, &[ConntrackBackend::Ctnetlink], Room::Little);
}

/// How often the kernel left out one of our programs at conntrack's functions so far.
fn left_out() -> Result<u64> {
    let programs = usage(&held_by(std::process::id())?)?;
    Ok(programs.iter().filter(|program| program.name.starts_with("fe_")).map(|program| program.left_out).sum())
}

/// The node opens connections itself, and packets of watched ones come by interrupts meanwhile, as from a network card: here from a
/// timer of `netem`. What the kernel leaves out of programs at its functions then must be made up for.
#[test]
#[ignore = "needs the module sch_netem, which the kernel of the virtual machine has"]
fn every_rewrite_while_packets_interrupt_connections_of_the_node() {
    if !may_run("the probe") {
        return;
    }
    let count = wanted();
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, bare: true, ..LabOptions::default() }).unwrap();
    let servers = Servers::in_pods(&lab, Mode::Log).unwrap();
    acquaint(&lab).unwrap();
    let client = lab.netns(Origin::OtherNode).unwrap();
    client
        .exec(["tc", "qdisc", "replace", "dev", "eth0", "root", "netem", "delay", "200us", "limit", "60000"])
        .unwrap();
    // So that the node's own ports can soon be used anew, and the table does not fill.
    lab.node(NodeName::Worker3).exec(["sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=1"]).unwrap();
    let config = ProbeConfig { backend: backend(), ..ProbeConfig::new(PORTS) };
    // Until the kernel left something out, which takes the longer, the faster the machine is.
    let send = || -> Result<u64> {
        let mut sent = 0;
        for first in (FIRST_PORT..50_000).step_by(count.into()) {
            let (_, all) = batch((Proto::Udp, HOST_PORT), count);
            let all = Batch { ports: first..first + count, ..all };
            sent += make(client, &all.split(CLIENTS), Until::Rounds(1), Pace::AsFastAsPossible, &servers)?.connections;
            if config.backend != Backend::Fentry || left_out()? > 0 {
                break;
            }
        }
        Ok(sent)
    };
    let clients = || {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let own = scope.spawn(|| connect_from_the_node(&lab, &stop));
            let sent = send();
            stop.store(true, Ordering::Release);
            own.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            let sent = sent?;
            all_served(&servers, sent);
            Ok((sent, left_out()?))
        })
    };
    let (told, (sent, left_out)) = watch(&lab, &config, clients).unwrap();
    println!(
        "{}: {sent} connections, {} rewrites, {left_out} times left out, lost {:?}",
        told.runs,
        told.rewrites(),
        told.lost
    );
    assert_eq!(told.lost.total(), 0, "{:?}", told.lost);
    assert!(left_out > 0 || told.runs != ConntrackBackend::Fentry, "nothing was interrupted");
    assert!(told.arrivals() == arrivals(&servers), "{} of {sent} told", told.rewrites());
}
