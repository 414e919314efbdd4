//! The probe against the kernel: real packets through a node that rewrites them.

mod world;

use porttrace_ebpf::Kind;
use porttrace_tests::privilege;
use porttrace_user::collect::probe::ProbeConfig;
use porttrace_user::core::model::event::Event;
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use world::{Addresses, POD_PORT, PORT, World, conntrack_entries, request, summary, v4, v6};

const FIN: u8 = 1;
const SYN: u8 = 2;
const SYN_ACK: u8 = 0x12;

fn tcp(src: (std::net::IpAddr, u16), dst: (std::net::IpAddr, u16)) -> Tuple {
    Tuple::new(Proto::Tcp, SocketAddr::from(src), SocketAddr::from(dst))
}

fn seen(events: &[Event], kind: Kind, packet: Tuple, flags: u8) -> usize {
    events.iter().filter(|event| event.kind == kind && event.packet == Some(packet) && event.l4_flags == flags).count()
}

#[test]
fn a_forwarded_connection_is_seen_at_every_station() {
    if !privilege::may_run("the probe") {
        return;
    }
    for addresses in [v4(), v6()] {
        forwarded(&addresses);
    }
}

fn forwarded(at: &Addresses) {
    let world = World::new("path").unwrap();
    world.serve().unwrap();
    let own = std::sync::Mutex::new(None);
    let send = || {
        *own.lock().unwrap() = Some(request(&world.client, (at.node, PORT).into())?);
        Ok(())
    };
    let fins = |events: &[Event]| events.iter().filter(|event| event.l4_flags & FIN != 0).count() >= 4;
    let events = world.watch(&ProbeConfig::new([PORT]), send, fins).unwrap();
    let own = own.into_inner().unwrap().unwrap();
    let text = summary(&events).join("\n");
    let original = tcp((at.client, own.port()), (at.node, PORT));
    let (family, tables) = if at.node.is_ipv4() { ("ipv4", "iptables") } else { ("ipv6", "ip6tables") };
    let listed = conntrack_entries(&world.node, family, Proto::Tcp, PORT).unwrap();
    let observed: BTreeSet<(Tuple, Tuple)> = events
        .iter()
        .filter(|event| event.kind == Kind::AfterSnat)
        .filter_map(|event| event.conntrack)
        .map(|entry| (entry.original, entry.reply))
        .collect();
    assert_eq!(observed, listed, "{tables}\n{text}");
    let (_, reply) = listed.into_iter().next().unwrap();
    assert_eq!(reply.source(), (at.pod, POD_PORT).into());
    assert_eq!(reply.dst, at.node_to_pod);

    assert_eq!(seen(&events, Kind::TcIngress, original, SYN), 1, "{text}");
    assert_eq!(seen(&events, Kind::AfterConntrack, original, SYN), 1, "{text}");
    let half = Tuple { dst: at.pod, dport: POD_PORT, ..original };
    assert_eq!(seen(&events, Kind::AfterDnat, half, SYN), 1, "{text}");
    assert_eq!(seen(&events, Kind::AfterSnat, reply.inverted(), SYN), 1, "{text}");
    assert_eq!(seen(&events, Kind::TcEgress, reply.inverted(), SYN), 1, "{text}");
    assert_eq!(seen(&events, Kind::TcIngress, reply, SYN_ACK), 1, "{text}");
    assert_eq!(seen(&events, Kind::TcEgress, original.inverted(), SYN_ACK), 1, "{text}");
    for event in &events {
        let back = event.packet == Some(reply) || event.packet == Some(original.inverted());
        assert_eq!(event.is_reply, back, "{event:?}");
    }
}
