//! The wire: what kernel programs and user space say to each other. Fixed-size, `repr(C)`, no dependencies.
//!
//! Addresses and ports are byte arrays in network order (an IPv4 address fills the first four bytes, the rest are 0), so
//! that neither side ever swaps bytes by accident. Every struct spells its padding out; sizes are asserted below.
#![no_std]

/// Layout version of [`Event`]; stands in every event and in every recording.
pub const WIRE_VERSION: u8 = 1;

/// A protocol, two addresses, two ports: one direction of a connection, as `nf_conntrack_tuple` has it.
///
/// For ICMP `sport` holds the identifier and `dport` type (first byte) and code (second byte).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WireTuple {
    pub src: [u8; 16],
    pub dst: [u8; 16],
    pub sport: [u8; 2],
    pub dport: [u8; 2],
    /// IP protocol number (6 TCP, 17 UDP, 132 SCTP, 1 ICMP, 58 ICMPv6); 0 in a tuple that is not filled in.
    pub proto: u8,
    /// 4 or 6; 0 in a tuple that is not filled in.
    pub family: u8,
    pub pad: [u8; 2],
}

/// Where in the kernel an [`Event`] was made; the numbers are part of the wire.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// TC saw the packet enter an interface, before netfilter (`ifindex`, `packet`; byte counts as in `orig_bytes`).
    TcIngress = 1,
    /// TC saw the packet leave an interface, after netfilter.
    TcEgress = 2,
    /// NETFILTER program, PREROUTING or OUTPUT, just after conntrack (priority -199): `original` and `reply` are set.
    AfterConntrack = 3,
    /// NETFILTER program, PREROUTING or OUTPUT, just after NAT's destination half (priority -99).
    AfterDnat = 4,
    /// NETFILTER program, LOCAL_IN or POSTROUTING, just after NAT's source half (priority 101).
    AfterSnat = 5,
    /// NETFILTER program, LOCAL_IN before everything: the packet was routed to this node itself.
    LocalIn = 6,
    /// kprobe `nf_nat_setup_info`: `reason` is 0 for SRC and 1 for DST (`enum nf_nat_manip_type`), tuples are those after it.
    NatSetup = 7,
    /// kprobe `__nf_conntrack_confirm`: the entry enters the table, its tuples are final.
    Confirmed = 8,
    /// The conntrack entry is gone; `orig_bytes`… are its accounting where `nf_conntrack_acct` is on.
    Destroyed = 9,
    /// `tp_btf/kfree_skb`: the kernel dropped the packet; `reason` is `enum skb_drop_reason`.
    Dropped = 10,
    /// `tp_btf/tcp_send_reset`: this node's TCP answers RST.
    ResetSent = 11,
    /// TC saw an ICMP error whose inner packet belongs to a watched connection; `packet` is the inner tuple, as the error
    /// quotes it. `ifindex` is set when it entered, `out_ifindex` when it left.
    IcmpError = 12,
}

impl Kind {
    /// The kind with this number, `None` for a number that this version does not know.
    pub const fn from_u8(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::TcIngress,
            2 => Self::TcEgress,
            3 => Self::AfterConntrack,
            4 => Self::AfterDnat,
            5 => Self::AfterSnat,
            6 => Self::LocalIn,
            7 => Self::NatSetup,
            8 => Self::Confirmed,
            9 => Self::Destroyed,
            10 => Self::Dropped,
            11 => Self::ResetSent,
            12 => Self::IcmpError,
            _ => return None,
        })
    }
}

/// `flags`: `packet` was read.
pub const HAS_PACKET: u8 = 1;
/// `flags`: `original`, `reply`, `ct_status`, `ct_mark` and `ct_id` were read from an `nf_conn`.
pub const HAS_CONNTRACK: u8 = 2;
/// `flags`: the conntrack entry is not yet confirmed: this is the packet that creates it.
pub const CT_NEW: u8 = 4;
/// `flags`: the packet travels against the direction that opened the connection. With [`HAS_CONNTRACK`] conntrack says so
/// (`ctinfo >= IP_CT_IS_REPLY`); in a TC event the probe knows it from the packet that it saw first.
pub const CT_REPLY: u8 = 8;

/// One thing that the kernel did, as one fixed-size ring-buffer record.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// `bpf_ktime_get_ns` (CLOCK_MONOTONIC), nanoseconds.
    pub time_ns: u64,
    /// Identity of the conntrack entry while it lives (address of its `nf_conn`, hashed); 0 when unknown.
    pub ct_id: u64,
    /// In [`Kind::Destroyed`]: the entry's accounting, bytes from the network header on, in the original and the reply
    /// direction. In TC events: bytes of L4 payload that the probe counted so far in the direction that opened the
    /// connection and in the other, this packet included, each byte at one interface only.
    pub orig_bytes: u64,
    pub reply_bytes: u64,
    /// The packet as it looked at this point.
    pub packet: WireTuple,
    /// The entry's tuples at this point (`tuplehash[0]`, `tuplehash[1]`).
    pub original: WireTuple,
    pub reply: WireTuple,
    /// Network namespace inode number.
    pub netns: u32,
    /// Interface of the sighting; in a NETFILTER event the input interface (0: none).
    pub ifindex: u32,
    /// Output interface in a NETFILTER event (0: none or not yet known).
    pub out_ifindex: u32,
    /// `skb->mark`.
    pub mark: u32,
    /// `nf_conn.mark`.
    pub ct_mark: u32,
    /// `nf_conn.status` (`IPS_*` bits).
    pub ct_status: u32,
    /// Drop reason or manip type, by kind; 0 otherwise.
    pub reason: u32,
    /// Bytes of the packet from its network header on.
    pub length: u32,
    pub tcp_seq: u32,
    pub tcp_ack: u32,
    /// Bytes of L4 payload.
    pub payload: u32,
    /// A [`Kind`].
    pub kind: u8,
    /// `HAS_*` and `CT_*` bits.
    pub flags: u8,
    /// TCP flags byte (FIN 1, SYN 2, RST 4, PSH 8, ACK 16); for SCTP the type of the first chunk.
    pub l4_flags: u8,
    /// Netfilter hook number (0 PREROUTING … 4 POSTROUTING) in NETFILTER events.
    pub hook: u8,
    pub ttl: u8,
    pub icmp_type: u8,
    pub icmp_code: u8,
    /// [`WIRE_VERSION`].
    pub version: u8,
    pub pad: [u8; 4],
}

const _: () = assert!(size_of::<WireTuple>() == 40);
const _: () = assert!(size_of::<Event>() == 208);
