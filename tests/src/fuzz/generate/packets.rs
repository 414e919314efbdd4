//! Random packets: from neighbours and from the router itself, mostly first packets of a connection.

use super::node::{PORTS, Pool, World};
use crate::fuzz::kernel::wire::shortest;
use crate::fuzz::rng::Rng;
use crate::fuzz::scenario::Probe;
use porttrace_user::core::model::flow::{Family, Proto, Tuple};
use porttrace_user::core::model::trace::Packet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// `count` packets with ids from 1, each with a source port of its own.
pub fn probes(rng: &mut Rng, world: &World, count: usize) -> Vec<Probe> {
    (1..=count as u16).map(|id| probe(rng, world, id)).collect()
}

fn probe(rng: &mut Rng, world: &World, id: u16) -> Probe {
    let family = if rng.percent(60) { Family::V4 } else { Family::V6 };
    let pool = world.pool(family);
    let local = rng.percent(25);
    let (input, src, dst) = if local { from_inside(rng, pool) } else { from_outside(rng, world, pool) };
    let tuple = ports(rng, family, src, dst, id);
    let mut packet = Packet::first_of(tuple, input.as_deref().map(Into::into));
    if tuple.proto == Proto::Tcp && rng.percent(15) {
        packet.tcp_flags = *rng.choose(&[0x10, 0x04, 0x01, 0x12, 0x14, 0x18, 0x00, 0x29]);
    }
    packet.length = shortest(tuple.proto, family == Family::V6) + if rng.percent(50) { rng.range(0, 300) } else { 20 };
    packet.length = if tuple.proto == Proto::Sctp { packet.length.next_multiple_of(4) } else { packet.length };
    if rng.percent(25) {
        packet.tos = *rng.choose(&[0x10, 0x28, 0x08, 0xb8]);
    }
    if rng.percent(6) {
        packet.ttl = rng.range(1, 3) as u8;
    }
    if local && rng.percent(20) {
        packet.mark = *rng.choose(&[1, 0x4000, 0x2000]);
    }
    Probe {
        id,
        packet,
        uid: if local && rng.percent(40) { *rng.choose(&[1000, 65534]) } else { 0 },
        mac: rng.range(1, 4) as u8,
    }
}

fn from_inside(rng: &mut Rng, pool: &Pool) -> (Option<String>, String, String) {
    let dst = pool.destination(rng);
    (None, rng.choose(&pool.own).clone(), dst)
}

/// Mostly from the interface where the source really is.
fn from_outside(rng: &mut Rng, world: &World, pool: &Pool) -> (Option<String>, String, String) {
    let (link, host) = rng.choose(&pool.hosts).clone();
    // What a host behind a bridge port sends to itself never reaches the bridge.
    let fits = |dst: &String| !link.starts_with("port") || *dst != host;
    let dst = std::iter::repeat_with(|| pool.destination(rng)).find(fits).unwrap_or_default();
    match rng.below(20) {
        0 if !link.starts_with("port") => (Some(rng.choose(&world.node.links[..4]).name.clone()), host, dst),
        1 => (Some(link), rng.choose(&pool.own).clone(), dst),
        2 => (Some(link), rng.choose(&pool.others).clone(), dst),
        _ => (Some(link), host, dst),
    }
}

fn ports(rng: &mut Rng, family: Family, src: String, dst: String, id: u16) -> Tuple {
    let fallback = || if family == Family::V4 { IpAddr::from(Ipv4Addr::LOCALHOST) } else { Ipv6Addr::LOCALHOST.into() };
    let address = |text: String| text.parse().unwrap_or_else(|_| fallback());
    let proto = match rng.below(20) {
        0..=8 => Proto::Tcp,
        9..=15 => Proto::Udp,
        16..=17 => Proto::Sctp,
        _ if family == Family::V4 => Proto::Icmp,
        _ => Proto::Icmpv6,
    };
    let (sport, dport) = if proto.has_ports() { (20_000 + id, *rng.choose(&PORTS)) } else { (0, 0) };
    Tuple { proto, src: address(src), sport, dst: address(dst), dport }
}
