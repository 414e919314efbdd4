//! Probe events, decoded from the wire.

use super::flow::{Proto, Tuple};
use super::trace::RouteKind;
use porttrace_ebpf::{self as wire, Kind, WireTuple};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use thiserror::Error;

/// One thing that the kernel did, with the wire's byte arrays turned into addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub time_ns: u64,
    pub kind: Kind,
    /// The packet as it looked at this point; for [`Kind::IcmpError`] the packet that the error quotes.
    pub packet: Option<Tuple>,
    pub conntrack: Option<Conntrack>,
    /// The packet travels against the direction that opened the connection, as far as the probe knows.
    pub is_reply: bool,
    /// Who sent the ICMP error, in [`Kind::IcmpError`].
    pub icmp_sender: Option<IpAddr>,
    /// Network namespace inode number.
    pub netns: u32,
    /// Interface of the sighting, or input interface; 0: none.
    pub ifindex: u32,
    /// Output interface of a NETFILTER event, and of the route of an entry that a kprobe saw confirmed; 0: none.
    pub out_ifindex: u32,
    /// The route that the kernel took for the packet, where the event tells it.
    pub route: Option<RouteTaken>,
    /// Netfilter hook number of a NETFILTER event.
    pub hook: u8,
    pub mark: u32,
    pub reason: u32,
    /// Bytes from the network header on.
    pub length: u32,
    /// Bytes of L4 payload.
    pub payload: u32,
    /// TCP flags byte; for SCTP the first chunk's type.
    pub l4_flags: u8,
    pub tcp_seq: u32,
    pub tcp_ack: u32,
    pub ttl: u8,
    pub icmp_type: u8,
    pub icmp_code: u8,
    /// Bytes so far, as [`wire::Head::orig_bytes`] says.
    pub orig_bytes: u64,
    pub reply_bytes: u64,
}

/// The conntrack entry that an event's packet belongs to, as it was at that moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conntrack {
    pub original: Tuple,
    pub reply: Tuple,
    /// Identity of the entry while it lives; 0 when unknown.
    pub id: u64,
    pub status: u32,
    pub mark: u32,
    /// Not yet confirmed: this packet creates the entry.
    pub is_new: bool,
    /// The packet travels in the reply direction.
    pub is_reply: bool,
}

/// A routing decision as the packet carried it; its interface is [`Event::out_ifindex`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteTaken {
    pub kind: RouteKind,
    /// `None`: the destination is on the link, or is this node itself.
    pub gateway: Option<IpAddr>,
}

/// Why bytes from the ring buffer (or a recording) are not an event.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    #[error("event of {found} bytes: the probe and this porttrace were built from different sources")]
    Size { found: usize },
    #[error("event layout version {found}, this porttrace reads version {}", wire::WIRE_VERSION)]
    Version { found: u8 },
    #[error("event kind {found} is not known to this porttrace")]
    Kind { found: u8 },
}

impl Event {
    /// Of what a record tells, see [`wire::Event::in_record`].
    pub fn decode(head: &wire::Head, whole: Option<&wire::Event>) -> Result<Self, DecodeError> {
        if head.version != wire::WIRE_VERSION {
            return Err(DecodeError::Version { found: head.version });
        }
        let kind = Kind::from_u8(head.kind).ok_or(DecodeError::Kind { found: head.kind })?;
        Ok(Self {
            time_ns: head.time_ns,
            kind,
            packet: (head.flags & wire::HAS_PACKET != 0).then(|| tuple(&head.packet)).flatten(),
            conntrack: whole.and_then(conntrack),
            is_reply: head.flags & wire::CT_REPLY != 0,
            icmp_sender: whole
                .filter(|_| kind == Kind::IcmpError)
                .and_then(|whole| tuple(&whole.original))
                .map(|outer| outer.src),
            netns: head.netns,
            ifindex: head.ifindex,
            out_ifindex: head.out_ifindex,
            route: route(head, whole),
            hook: head.hook,
            mark: head.mark,
            reason: head.reason,
            length: head.length,
            payload: head.payload,
            l4_flags: head.l4_flags,
            tcp_seq: head.tcp_seq,
            tcp_ack: head.tcp_ack,
            ttl: head.ttl,
            icmp_type: head.icmp_type,
            icmp_code: head.icmp_code,
            orig_bytes: head.orig_bytes,
            reply_bytes: head.reply_bytes,
        })
    }
}

/// The entry of an event's packet, if the event has it.
fn conntrack(whole: &wire::Event) -> Option<Conntrack> {
    let head = &whole.head;
    if head.flags & wire::HAS_CONNTRACK == 0 {
        return None;
    }
    Some(Conntrack {
        original: tuple(&whole.original)?,
        reply: tuple(&whole.reply)?,
        id: head.ct_id,
        status: head.ct_status,
        mark: head.ct_mark,
        is_new: head.flags & wire::CT_NEW != 0,
        is_reply: head.flags & wire::CT_REPLY != 0,
    })
}

fn tuple(raw: &WireTuple) -> Option<Tuple> {
    Some(Tuple {
        proto: Proto::from_number(raw.proto),
        src: address(raw.family, &raw.src)?,
        sport: u16::from_be_bytes(raw.sport),
        dst: address(raw.family, &raw.dst)?,
        dport: u16::from_be_bytes(raw.dport),
    })
}

fn address(family: u8, bytes: &[u8; 16]) -> Option<IpAddr> {
    match family {
        4 => Some(IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))),
        6 => Some(IpAddr::V6(Ipv6Addr::from(*bytes))),
        _ => None,
    }
}

/// The route of an event; `None` also for a type that ends no path (RTN_NAT, RTN_XRESOLVE).
fn route(head: &wire::Head, whole: Option<&wire::Event>) -> Option<RouteTaken> {
    let kind = match head.route_type {
        1 => RouteKind::Unicast,
        2 => RouteKind::Local,
        3 => RouteKind::Broadcast,
        4 => RouteKind::Anycast,
        5 => RouteKind::Multicast,
        6 => RouteKind::Blackhole,
        7 => RouteKind::Unreachable,
        8 => RouteKind::Prohibit,
        _ => return None,
    };
    Some(RouteTaken { kind, gateway: whole.and_then(|whole| address(head.next_hop_family, &whole.next_hop)) })
}
