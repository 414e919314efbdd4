//! Connections that succeed: every station, exact tuples, the way back, bytes.

use crate::world::{
    Addresses, POD_PORT, PORT, World, config, conntrack_entries, datagram, observed_entries, read_until, request, seen,
    summary, v4, v6,
};
use porttrace_ebpf::Kind;
use porttrace_tests::privilege;
use porttrace_user::collect::probe::{Backend, ProbeConfig};
use porttrace_user::core::model::event::Event;
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

const FIN: u8 = 1;
const SYN: u8 = 2;
const SYN_ACK: u8 = 0x12;

fn family(at: &Addresses) -> &'static str {
    if at.node.is_ipv4() { "ipv4" } else { "ipv6" }
}

fn fins(events: &[Event], kind: Kind) -> usize {
    events.iter().filter(|event| event.kind == kind && event.l4_flags & FIN != 0).count()
}

/// Both FINs at both interfaces.
fn closed(events: &[Event]) -> bool {
    fins(events, Kind::TcIngress) >= 2 && fins(events, Kind::TcEgress) >= 2
}

#[test]
fn a_forwarded_connection_is_seen_at_every_station() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("path").unwrap();
    world.serve().unwrap();
    for addresses in [v4(), v6()] {
        forwarded(&world, &addresses);
    }
}

fn forwarded(world: &World, at: &Addresses) {
    let send = || request(&world.client, (at.node, PORT).into());
    let (own, events) = world.watch(&config(), send, closed).unwrap();
    let text = summary(&events).join("\n");
    let listed = conntrack_entries(&world.node, family(at), Proto::Tcp, PORT).unwrap();
    assert_eq!(observed_entries(&events), listed, "{text}");
    let (original, reply) = listed.into_iter().next().unwrap();
    assert_eq!((original.source(), original.destination()), (own, (at.node, PORT).into()));
    assert_eq!((reply.source(), reply.dst), ((at.pod, POD_PORT).into(), at.node_to_pod));

    assert_eq!(seen(&events, Kind::TcIngress, original, SYN), 1, "{text}");
    assert_eq!(seen(&events, Kind::TcEgress, reply.inverted(), SYN), 1, "{text}");
    assert_eq!(seen(&events, Kind::TcIngress, reply, SYN_ACK), 1, "{text}");
    assert_eq!(seen(&events, Kind::TcEgress, original.inverted(), SYN_ACK), 1, "{text}");
    for event in &events {
        let back = event.packet == Some(reply) || event.packet == Some(original.inverted());
        assert_eq!(event.is_reply, back, "{event:?}");
    }
    let half = Tuple { dst: at.pod, dport: POD_PORT, ..original };
    match events.iter().find(|event| event.kind == Kind::Confirmed) {
        // At conntrack's functions: the destination's rewrite, then the source's, then the final entry with its packet.
        Some(confirmed) => {
            assert_eq!(confirmed.packet, Some(reply.inverted()), "{text}");
            let setups: Vec<_> = events.iter().filter(|event| event.kind == Kind::NatSetup).collect();
            assert_eq!(setups.iter().map(|event| event.reason).collect::<Vec<_>>(), [1, 0], "{text}");
            assert_eq!(setups[0].conntrack.map(|entry| entry.reply), Some(half.inverted()), "{text}");
        }
        None => {
            assert_eq!(seen(&events, Kind::AfterConntrack, original, SYN), 1, "{text}");
            assert_eq!(seen(&events, Kind::AfterDnat, half, SYN), 1, "{text}");
            assert_eq!(seen(&events, Kind::AfterSnat, reply.inverted(), SYN), 1, "{text}");
        }
    }
    // Five bytes each way, counted once although they cross two interfaces.
    let last = events.iter().rfind(|event| event.l4_flags & FIN != 0).unwrap();
    assert_eq!((last.orig_bytes, last.reply_bytes), (5, 5), "{text}");
}

#[test]
fn datagrams_have_the_tuples_that_conntrack_lists() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("udp").unwrap();
    world.serve().unwrap();
    for at in [v4(), v6()] {
        let answered = |events: &[Event]| {
            events.iter().filter(|event| event.kind == Kind::TcEgress && event.is_reply).count() >= 1
        };
        let (_, events) = world.watch(&config(), || datagram(&world.client, (at.node, PORT).into()), answered).unwrap();
        let text = summary(&events).join("\n");
        let listed = conntrack_entries(&world.node, family(&at), Proto::Udp, PORT).unwrap();
        assert_eq!(observed_entries(&events), listed, "{text}");
        let (original, reply) = listed.into_iter().next().unwrap();
        for (kind, packet) in [
            (Kind::TcIngress, original),
            (Kind::TcEgress, reply.inverted()),
            (Kind::TcIngress, reply),
            (Kind::TcEgress, original.inverted()),
        ] {
            assert_eq!(seen(&events, kind, packet, 0), 1, "{kind:?} {packet}\n{text}");
        }
    }
}

#[test]
fn a_connection_of_the_node_itself_is_seen_on_its_way_out() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("local").unwrap();
    world.serve().unwrap();
    for at in [v4(), v6()] {
        let closed = |events: &[Event]| fins(events, Kind::TcIngress) >= 1 && fins(events, Kind::TcEgress) >= 1;
        let (_, events) = world.watch(&config(), || request(&world.node, (at.node, PORT).into()), closed).unwrap();
        let text = summary(&events).join("\n");
        let listed = conntrack_entries(&world.node, family(&at), Proto::Tcp, PORT).unwrap();
        assert_eq!(observed_entries(&events), listed, "{text}");
        let (_, reply) = listed.into_iter().next().unwrap();
        assert_eq!(seen(&events, Kind::TcEgress, reply.inverted(), SYN), 1, "{text}");
        assert_eq!(seen(&events, Kind::TcIngress, reply, SYN_ACK), 1, "{text}");
    }
}

#[test]
fn a_connection_older_than_the_probe_is_found_by_its_entry() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("older").unwrap();
    world.serve().unwrap();
    let at = v4();
    let to = SocketAddr::from((at.node, PORT));
    let mut stream = world.client.run_in(|| TcpStream::connect(to)).unwrap().unwrap();
    let events = world
        .with_probe(&config(), async |probe| {
            stream.write_all(b"hello")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read_to_string(&mut String::new())?;
            let mut events = Vec::new();
            read_until(probe, &mut events, |events| fins(events, Kind::TcEgress) >= 1).await?;
            Ok(events)
        })
        .unwrap();
    let text = summary(&events).join("\n");
    // By a hook that all packets come by; or, where the hooks are at functions that run for new entries, from conntrack's table.
    let entries: Vec<_> =
        events.iter().filter(|event| matches!(event.kind, Kind::AfterConntrack | Kind::Confirmed)).collect();
    assert_eq!(entries.len(), 1, "{text}");
    let entry = entries[0].conntrack.unwrap();
    assert!(!entry.is_new);
    let listed = conntrack_entries(&world.node, "ipv4", Proto::Tcp, PORT).unwrap();
    assert_eq!(listed.into_iter().collect::<Vec<_>>(), [(entry.original, entry.reply)]);
    assert!(seen(&events, Kind::TcEgress, entry.reply.inverted(), 0x18) >= 1, "{text}");
}

#[test]
fn of_many_older_connections_only_some_are_followed_and_that_is_said() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("many").unwrap();
    world.serve().unwrap();
    let to = SocketAddr::from((v4().node, PORT));
    let _streams = [(); 3].map(|()| world.client.run_in(|| TcpStream::connect(to)).unwrap().unwrap());
    let config = ProbeConfig { backend: Backend::Ctnetlink, tracked: 8, ..config() };
    let said = world.with_probe(&config, async |probe| Ok(probe.info().degradations.clone())).unwrap();
    let wanted = "of 3 connections older than this session only 2 are followed";
    assert!(said.iter().any(|one| one == wanted), "{said:?}");
}

#[test]
fn the_kernel_side_logs_only_when_asked() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("log").unwrap();
    world.serve().unwrap();
    for asked in [false, true] {
        let mut config = config();
        config.kernel_log = asked;
        let lines = world
            .with_probe(&config, async |probe| {
                request(&world.client, (v4().node, PORT).into())?;
                Ok(probe.kernel_log())
            })
            .unwrap();
        let expected = "tracking a connection of protocol 6 to port 9088";
        assert_eq!(lines.iter().any(|line| line.contains(expected)), asked, "{lines:?}");
    }
}
