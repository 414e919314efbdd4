//! Packets as bytes: crafting those to send, reading the headers of those that come back.

use crate::fuzz::scenario::Probe;
use pnet::packet::ip::IpNextHeaderProtocol;
use pnet::packet::ipv4::{self, MutableIpv4Packet};
use pnet::packet::ipv6::MutableIpv6Packet;
use pnet::packet::tcp::{self, MutableTcpPacket};
use pnet::packet::udp::{self, MutableUdpPacket};
use pnet::packet::{icmp, icmpv6};
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;

/// The packet from its network header on, with right checksums. Its length is `packet.length`, or the headers' if that is
/// less. The probe's id is in the IPv4 identification or the IPv6 flow label, and in the TCP sequence number.
pub fn craft(probe: &Probe) -> Vec<u8> {
    let tuple = probe.packet.tuple;
    let header = if tuple.dst.is_ipv4() { V4_HEADER } else { V6_HEADER };
    let length = (probe.packet.length as usize).max(header + least(tuple.proto));
    let mut bytes = vec![0; length];
    // Something for `-m string` to find, in some packets that have room for it.
    if probe.id.is_multiple_of(4) && length >= header + least(tuple.proto) + 4 && tuple.proto != Proto::Sctp {
        bytes[length - 4..].copy_from_slice(b"kube");
    }
    transport(&mut bytes[header..], probe);
    match (tuple.src, tuple.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => network_v4(&mut bytes, probe, src, dst),
        (IpAddr::V6(src), IpAddr::V6(dst)) => network_v6(&mut bytes, probe, src, dst),
        _ => {}
    }
    bytes
}

/// Shortest packet of a protocol, in bytes from the network header on.
pub const fn shortest(proto: Proto, v6: bool) -> u32 {
    (least(proto) + if v6 { V6_HEADER } else { V4_HEADER }) as u32
}

const fn least(proto: Proto) -> usize {
    match proto {
        Proto::Tcp => 20,
        // A common header and an INIT chunk.
        Proto::Sctp => 32,
        _ => 8,
    }
}

fn transport(bytes: &mut [u8], probe: &Probe) {
    let tuple = probe.packet.tuple;
    match tuple.proto {
        Proto::Tcp => tcp_segment(bytes, probe),
        Proto::Udp => udp_datagram(bytes, tuple),
        Proto::Sctp => sctp_init(bytes, tuple),
        Proto::Icmp => echo(bytes, 8, probe.id),
        Proto::Icmpv6 => echo(bytes, 128, probe.id),
        Proto::Other(_) => {}
    }
    let sum = match (tuple.proto, tuple.src, tuple.dst) {
        (Proto::Icmp, ..) => icmp::IcmpPacket::new(bytes).map(|packet| icmp::checksum(&packet)),
        (Proto::Icmpv6, IpAddr::V6(src), IpAddr::V6(dst)) => {
            icmpv6::Icmpv6Packet::new(bytes).map(|packet| icmpv6::checksum(&packet, &src, &dst))
        }
        _ => None,
    };
    if let Some(sum) = sum {
        bytes[2..4].copy_from_slice(&sum.to_be_bytes());
    }
}

fn tcp_segment(bytes: &mut [u8], probe: &Probe) {
    let tuple = probe.packet.tuple;
    let Some(mut segment) = MutableTcpPacket::new(bytes) else { return };
    segment.set_source(tuple.sport);
    segment.set_destination(tuple.dport);
    segment.set_sequence(u32::from(probe.id) << 12);
    segment.set_data_offset(5);
    segment.set_flags(probe.packet.tcp_flags);
    segment.set_window(64240);
    let segment_view = segment.to_immutable();
    let sum = match (tuple.src, tuple.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => tcp::ipv4_checksum(&segment_view, &src, &dst),
        (IpAddr::V6(src), IpAddr::V6(dst)) => tcp::ipv6_checksum(&segment_view, &src, &dst),
        _ => 0,
    };
    segment.set_checksum(sum);
}

fn udp_datagram(bytes: &mut [u8], tuple: Tuple) {
    let length = bytes.len() as u16;
    let Some(mut datagram) = MutableUdpPacket::new(bytes) else { return };
    datagram.set_source(tuple.sport);
    datagram.set_destination(tuple.dport);
    datagram.set_length(length);
    let view = datagram.to_immutable();
    let sum = match (tuple.src, tuple.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => udp::ipv4_checksum(&view, &src, &dst),
        (IpAddr::V6(src), IpAddr::V6(dst)) => udp::ipv6_checksum(&view, &src, &dst),
        _ => 0,
    };
    datagram.set_checksum(sum);
}

/// An INIT chunk with one stream each way. A longer packet carries the rest as one padding parameter (RFC 4820).
fn sctp_init(bytes: &mut [u8], tuple: Tuple) {
    let chunk = bytes.len() - 12;
    bytes[0..2].copy_from_slice(&tuple.sport.to_be_bytes());
    bytes[2..4].copy_from_slice(&tuple.dport.to_be_bytes());
    bytes[12] = 1;
    bytes[14..16].copy_from_slice(&(chunk as u16).to_be_bytes());
    bytes[16..20].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&65536_u32.to_be_bytes());
    bytes[24..26].copy_from_slice(&1_u16.to_be_bytes());
    bytes[26..28].copy_from_slice(&1_u16.to_be_bytes());
    if chunk >= 24 {
        bytes[32..34].copy_from_slice(&0x8005_u16.to_be_bytes());
        bytes[34..36].copy_from_slice(&(chunk as u16 - 20).to_be_bytes());
    }
    let sum = crc32c(bytes);
    bytes[8..12].copy_from_slice(&sum.to_le_bytes());
}

/// SCTP's checksum (RFC 3309).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

fn echo(bytes: &mut [u8], kind: u8, id: u16) {
    bytes[0] = kind;
    bytes[4..6].copy_from_slice(&id.to_be_bytes());
    bytes[6..8].copy_from_slice(&1_u16.to_be_bytes());
}

fn network_v4(bytes: &mut [u8], probe: &Probe, src: Ipv4Addr, dst: Ipv4Addr) {
    let length = bytes.len() as u16;
    let Some(mut packet) = MutableIpv4Packet::new(bytes) else { return };
    packet.set_version(4);
    packet.set_header_length(5);
    packet.set_dscp(probe.packet.tos >> 2);
    packet.set_ecn(probe.packet.tos & 3);
    packet.set_total_length(length);
    packet.set_identification(probe.id);
    packet.set_ttl(probe.packet.ttl);
    packet.set_next_level_protocol(IpNextHeaderProtocol(probe.packet.tuple.proto.number()));
    packet.set_source(src);
    packet.set_destination(dst);
    packet.set_checksum(ipv4::checksum(&packet.to_immutable()));
}

fn network_v6(bytes: &mut [u8], probe: &Probe, src: Ipv6Addr, dst: Ipv6Addr) {
    let length = (bytes.len() - V6_HEADER) as u16;
    let Some(mut packet) = MutableIpv6Packet::new(bytes) else { return };
    packet.set_version(6);
    packet.set_traffic_class(probe.packet.tos);
    packet.set_flow_label(u32::from(probe.id));
    packet.set_payload_length(length);
    packet.set_next_header(IpNextHeaderProtocol(probe.packet.tuple.proto.number()));
    packet.set_hop_limit(probe.packet.ttl);
    packet.set_source(src);
    packet.set_destination(dst);
}

/// What headers (possibly cut short) say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headers {
    pub id: u16,
    pub tuple: Tuple,
    pub ttl: u8,
    /// A refusal that some node's kernel made: how iptables calls it, and the id of the probe that it answers.
    pub refuses: Option<(String, u16)>,
}

/// Reads a network header and what is there of the transport header.
pub fn headers(network: &[u8], transport: &[u8]) -> Option<Headers> {
    let (id, proto, src, dst, ttl) = addresses(network)?;
    let proto = Proto::from_number(proto);
    let port = |at: usize| Some(u16::from_be_bytes([*transport.get(at)?, *transport.get(at + 1)?]));
    let ports = if proto.has_ports() { (port(0)?, port(2)?) } else { (0, 0) };
    let tuple = Tuple { proto, src, sport: ports.0, dst, dport: ports.1 };
    // A probe may carry RST itself; its sequence number tells it from the kernel's answers.
    let own =
        proto == Proto::Tcp && id != 0 && transport.get(4..8) == Some((u32::from(id) << 12).to_be_bytes().as_slice());
    let refuses = if own { None } else { refusal(proto, transport) };
    Some(Headers { id, tuple, ttl, refuses })
}

/// As [`headers`], from one run of bytes.
pub fn headers_of(packet: &[u8]) -> Option<Headers> {
    let split = if packet.first()? >> 4 == 4 { V4_HEADER } else { V6_HEADER };
    (packet.len() >= split).then(|| headers(&packet[..split], &packet[split..]))?
}

fn addresses(network: &[u8]) -> Option<(u16, u8, IpAddr, IpAddr, u8)> {
    if let Some(head) = network.first_chunk::<V6_HEADER>().filter(|head| head[0] >> 4 == 6) {
        let address = |at: usize| -> Option<IpAddr> { Some(<[u8; 16]>::try_from(head.get(at..at + 16)?).ok()?.into()) };
        return Some((u16::from_be_bytes([head[2], head[3]]), head[6], address(8)?, address(24)?, head[7]));
    }
    let head = network.first_chunk::<V4_HEADER>().filter(|head| head[0] >> 4 == 4)?;
    let address = |at: usize| IpAddr::from([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    Some((u16::from_be_bytes([head[4], head[5]]), head[9], address(12), address(16), head[8]))
}

fn refusal(proto: Proto, transport: &[u8]) -> Option<(String, u16)> {
    match proto {
        Proto::Tcp if transport.get(13)? & 4 != 0 => {
            let acknowledged = u32::from_be_bytes(*transport.get(8..12)?.first_chunk()?);
            Some(("tcp-reset".into(), (acknowledged >> 12) as u16))
        }
        Proto::Icmp if *transport.first()? == 3 => {
            let id = u16::from_be_bytes(*transport.get(12..14)?.first_chunk()?);
            Some((icmp_name(*transport.get(1)?), id))
        }
        Proto::Icmpv6 if *transport.first()? == 1 => {
            let id = u16::from_be_bytes(*transport.get(10..12)?.first_chunk()?);
            Some((icmpv6_name(*transport.get(1)?), id))
        }
        Proto::Icmp if *transport.first()? == 11 => {
            Some(("icmp-time-exceeded".into(), u16::from_be_bytes(*transport.get(12..14)?.first_chunk()?)))
        }
        Proto::Icmpv6 if *transport.first()? == 3 => {
            Some(("icmp6-time-exceeded".into(), u16::from_be_bytes(*transport.get(10..12)?.first_chunk()?)))
        }
        _ => None,
    }
}

fn icmp_name(code: u8) -> String {
    match code {
        0 => "icmp-net-unreachable",
        1 => "icmp-host-unreachable",
        2 => "icmp-proto-unreachable",
        3 => "icmp-port-unreachable",
        9 => "icmp-net-prohibited",
        10 => "icmp-host-prohibited",
        13 => "icmp-admin-prohibited",
        code => return format!("icmp-unreachable-{code}"),
    }
    .into()
}

fn icmpv6_name(code: u8) -> String {
    match code {
        0 => "icmp6-no-route",
        1 => "icmp6-adm-prohibited",
        3 => "icmp6-addr-unreachable",
        4 => "icmp6-port-unreachable",
        5 => "icmp6-policy-fail",
        6 => "icmp6-reject-route",
        code => return format!("icmp6-unreachable-{code}"),
    }
    .into()
}
