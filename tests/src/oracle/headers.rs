//! Tuples from packet headers as trace messages quote them.

use porttrace_user::core::model::flow::{Proto, Tuple};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The tuple of a whole packet, from its IPv4 or IPv6 header on.
pub fn of_packet(packet: &[u8]) -> Option<Tuple> {
    let length = match packet.first()? >> 4 {
        4 => usize::from(packet[0] & 0xf) * 4,
        6 => 40,
        _ => return None,
    };
    of_headers(packet.get(..length)?, packet.get(length..)?)
}

/// The tuple of a network and a transport header. Extension headers of IPv6 are not walked: the lab sends none.
pub fn of_headers(network: &[u8], transport: &[u8]) -> Option<Tuple> {
    let (proto, src, dst) = match network.first()? >> 4 {
        4 => (*network.get(9)?, v4(network.get(12..16)?)?, v4(network.get(16..20)?)?),
        6 => (*network.get(6)?, v6(network.get(8..24)?)?, v6(network.get(24..40)?)?),
        _ => return None,
    };
    let proto = Proto::from_number(proto);
    let port = |at: usize| Some(u16::from_be_bytes(transport.get(at..at + 2)?.try_into().ok()?));
    let (sport, dport) = if proto.has_ports() { (port(0)?, port(2)?) } else { (0, 0) };
    Some(Tuple { proto, src, sport, dst, dport })
}

fn v4(bytes: &[u8]) -> Option<IpAddr> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into())
}

fn v6(bytes: &[u8]) -> Option<IpAddr> {
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into())
}
