//! Connections that fail: who said no, and how.

use crate::world::{DEADLINE, PORT, World, config, read_until, seen, summary, v4, v6};
use porttrace_ebpf::Kind;
use porttrace_tests::netns::Netns;
use porttrace_tests::privilege;
use porttrace_user::core::model::event::Event;
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::io::ErrorKind;
use std::net::SocketAddr;

const SYN: u8 = 2;
const RST_ACK: u8 = 0x14;

/// A connection attempt from a fixed source port, and how it ended.
fn attempt(from: &Netns, own: SocketAddr, to: SocketAddr) -> anyhow::Result<ErrorKind> {
    from.run_in(|| -> anyhow::Result<ErrorKind> {
        let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&own.into())?;
        match socket.connect_timeout(&to.into(), DEADLINE.min(std::time::Duration::from_millis(300))) {
            Ok(()) => anyhow::bail!("{to} answered"),
            Err(error) => Ok(error.kind()),
        }
    })?
}

fn count(events: &[Event], kind: Kind) -> usize {
    events.iter().filter(|event| event.kind == kind).count()
}

#[test]
fn a_reset_by_the_pod_is_seen_on_its_whole_way_also_when_the_port_is_used_again() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("rst").unwrap();
    for at in [v4(), v6()] {
        let (own, to) = (SocketAddr::from((at.client, 40_000)), SocketAddr::from((at.node, PORT)));
        let send = || {
            for _ in 0..3 {
                assert_eq!(attempt(&world.client, own, to)?, ErrorKind::ConnectionRefused);
            }
            Ok(())
        };
        let refused = |events: &[Event]| {
            events.iter().filter(|event| event.kind == Kind::TcEgress && event.l4_flags == RST_ACK).count() >= 3
        };
        let (_, events) = world.watch(&config(), send, refused).unwrap();
        let text = summary(&events).join("\n");
        let original = Tuple::new(Proto::Tcp, own, to);
        assert_eq!(seen(&events, Kind::TcIngress, original, SYN), 3, "{text}");
        assert_eq!(seen(&events, Kind::TcEgress, original.inverted(), RST_ACK), 3, "{text}");
        assert_eq!(count(&events, Kind::AfterSnat) + count(&events, Kind::Confirmed), 3, "{text}");
        // The pod sent it, not this node's TCP.
        assert_eq!(count(&events, Kind::ResetSent), 0, "{text}");
    }
}

#[test]
fn a_reset_by_the_node_names_its_sender_and_the_drop() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("closed").unwrap();
    world.node.exec("iptables -t nat -F".split(' ')).unwrap();
    let (own, to) = (SocketAddr::from((v4().client, 40_001)), SocketAddr::from((v4().node, PORT)));
    world
        .with_probe(&config(), async |probe| {
            assert_eq!(attempt(&world.client, own, to)?, ErrorKind::ConnectionRefused);
            let mut events = Vec::new();
            read_until(probe, &mut events, |events| count(events, Kind::Dropped) >= 1).await?;
            let text = summary(&events).join("\n");
            let original = Tuple::new(Proto::Tcp, own, to);
            let dropped = events.iter().find(|event| event.kind == Kind::Dropped).unwrap();
            assert_eq!(dropped.packet, Some(original), "{text}");
            assert_eq!(probe.reason_name(Kind::Dropped, dropped.reason), Some("NO_SOCKET"), "{text}");
            assert_eq!(seen(&events, Kind::TcEgress, original.inverted(), RST_ACK), 1, "{text}");
            // Linux before 6.11 fires the tracepoint only where there is a socket.
            if probe.reason_name(Kind::ResetSent, 0).is_some() {
                assert_eq!(seen(&events, Kind::ResetSent, original, SYN), 1, "{text}");
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_dropped_packet_names_its_reason() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("drop").unwrap();
    world.node.exec("iptables -I FORWARD -p tcp -j DROP".split(' ')).unwrap();
    world.node.exec("iptables -I OUTPUT -p tcp -j DROP".split(' ')).unwrap();
    let to = SocketAddr::from((v4().node, PORT));
    for (from, own) in [(&world.client, v4().client), (&world.node, v4().node)] {
        let own = SocketAddr::from((own, 40_002));
        world
            .with_probe(&config(), async |probe| {
                assert_ne!(attempt(from, own, to)?, ErrorKind::ConnectionRefused);
                let mut events = Vec::new();
                read_until(probe, &mut events, |events| count(events, Kind::Dropped) >= 1).await?;
                let text = summary(&events).join("\n");
                let dropped = events.iter().find(|event| event.kind == Kind::Dropped).unwrap();
                assert_eq!(dropped.packet.map(|packet| packet.source()), Some(own), "{text}");
                assert_eq!(probe.reason_name(Kind::Dropped, dropped.reason), Some("NETFILTER_DROP"), "{text}");
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn a_rejection_is_seen_as_the_icmp_error_that_it_is() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("reject").unwrap();
    for (tool, at, kind, code) in [("iptables", v4(), 3, 3), ("ip6tables", v6(), 1, 4)] {
        world.node.exec([tool].into_iter().chain("-I FORWARD -p tcp -j REJECT".split(' '))).unwrap();
        let (own, to) = (SocketAddr::from((at.client, 40_003)), SocketAddr::from((at.node, PORT)));
        let send = || attempt(&world.client, own, to);
        let (_, events) = world.watch(&config(), send, |events| count(events, Kind::IcmpError) >= 1).unwrap();
        let text = summary(&events).join("\n");
        let error = events.iter().find(|event| event.kind == Kind::IcmpError).unwrap();
        assert_eq!(error.packet, Some(Tuple::new(Proto::Tcp, own, to)), "{text}");
        assert_eq!((error.icmp_type, error.icmp_code), (kind, code));
        assert_eq!(error.icmp_sender, Some(at.node));
        assert_eq!((error.ifindex, error.out_ifindex != 0), (0, true), "it left");
    }
}
