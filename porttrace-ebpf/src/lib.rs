//! The wire: what kernel programs and user space say to each other. Fixed-size, `repr(C)`, no dependencies.
//!
//! Addresses and ports are byte arrays in network order (an IPv4 address fills the first four bytes, the rest are 0), so
//! that neither side ever swaps bytes by accident. Every struct spells its padding out; sizes are asserted below.
#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod machine;
pub mod table;

/// Layout version of [`Event`] and its [`Head`]; stands in every event and in every recording.
pub const WIRE_VERSION: u8 = 3;

/// A protocol, two addresses, two ports: one direction of a connection, as `nf_conntrack_tuple` has it.
///
/// For ICMP `sport` holds the identifier and `dport` type (first byte) and code (second byte).
///
/// Aligned, or the kernel side would have to read it byte by byte.
#[repr(C, align(8))]
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

impl WireTuple {
    /// Of IPv4 addresses and a pair of ports, all as they stand in a packet.
    #[inline(always)]
    pub const fn v4(src: u32, dst: u32, ports: u32, proto: u8) -> Self {
        Self::of_words([src as u64, 0, dst as u64, 0, ports as u64 | (proto as u64) << 32 | 4 << 40])
    }

    /// The inverse of [`Self::words`].
    #[inline(always)]
    pub const fn of_words(words: [u64; 5]) -> Self {
        // SAFETY: plain bytes of the same size.
        unsafe { core::mem::transmute(words) }
    }

    /// The tuple as it lies in memory.
    #[inline(always)]
    pub const fn words(&self) -> [u64; 5] {
        // SAFETY: plain bytes of the same size.
        unsafe { core::mem::transmute(*self) }
    }
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
/// `flags`: the packet goes to (or comes from) an address that the rules may rewrite a watched connection to. Whether it is of
/// one is for conntrack to say. Only with [`Predicted`] addresses.
pub const PREDICTED: u8 = 16;

/// One thing that the kernel did: what every ring-buffer record begins with, and all that there is in one of TC that is no ICMP
/// error. Together with the record's own header little more than two cache lines: writing those takes most of an event's time.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
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
    /// Network namespace inode number.
    pub netns: u32,
    /// Interface of the sighting; in a NETFILTER event the input interface (0: none).
    pub ifindex: u32,
    /// Output interface in a NETFILTER event (0: none or not yet known), and with a unicast route in [`Kind::Confirmed`].
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
    /// The route that the kernel took for the packet: `RTN_*` (include/uapi/linux/rtnetlink.h); 0: not told. In events of LOCAL_IN
    /// and POSTROUTING, and in [`Kind::Confirmed`].
    pub route_type: u8,
    /// 4 or 6: the route leads by a gateway, which need not be of the packet's family; 0: it does not.
    pub next_hop_family: u8,
    pub pad: [u8; 2],
}

/// A whole ring-buffer record. Where only its [`Head`] is sent, all the rest is zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    pub head: Head,
    /// The entry's tuples at this point (`tuplehash[0]`, `tuplehash[1]`). In [`Kind::IcmpError`] `original` is the packet that
    /// quotes the other one.
    pub original: WireTuple,
    pub reply: WireTuple,
    /// The gateway of the route that the kernel took, filled as `next_hop_family` says.
    pub next_hop: [u8; 16],
}

impl Event {
    /// What a record tells: its head, and the whole where that was sent. `None` when it has more or fewer bytes than any has, or does
    /// not lie as the kernel lays them.
    pub fn in_record(record: &[u8]) -> Option<(&Head, Option<&Self>)> {
        let start = record.as_ptr();
        if !start.cast::<Self>().is_aligned() {
            return None;
        }
        // SAFETY: the record is aligned and as long as what it is taken for, of which every bit pattern is a value.
        match record.len() {
            HEAD => Some((unsafe { &*start.cast::<Head>() }, None)),
            WHOLE => Some(unsafe { &*start.cast::<Self>() }).map(|whole| (&whole.head, Some(whole))),
            _ => None,
        }
    }
}

/// Lengths of records.
const WHOLE: usize = size_of::<Event>();
const HEAD: usize = size_of::<Head>();

/// The packet travels in the direction that opened the connection.
pub const ROLE_OPENING: u64 = 2;
/// The packet travels against it.
pub const ROLE_REPLY: u64 = 3;
/// The packet goes to a [`Predicted`] address.
pub const ROLE_PREDICTED: u64 = 4;
/// The packet comes back from one.
pub const ROLE_PREDICTED_REPLY: u64 = 5;
/// The watched port is only this connection's ephemeral source port; from here on either way.
pub const ROLE_IGNORED: u64 = 6;

/// Where the rules may send watched connections: the key of map `PREDICTED`, in which it is enough to be there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Predicted {
    pub address: [u8; 16],
    pub port: [u8; 2],
    pub proto: u8,
    /// 4 or 6.
    pub family: u8,
}

/// Bits of map `PORTS` (a byte for each port): watched for TCP, UDP, SCTP.
pub const PORT_TCP: u8 = 1;
pub const PORT_UDP: u8 = 2;
pub const PORT_SCTP: u8 = 4;
/// The server's port of some tracked tuple, so that packets of all other ports need no look-up.
pub const PORT_TRACKED: u8 = 8;
/// At port 0, which nobody uses: the map is filled in. Until then nothing is concluded from a port that has no bits.
pub const PORTS_ARE_KNOWN: u8 = 16;

/// Offsets of kernel structure members, found in BTF at start, in bytes. The global `OFFSETS` of the kernel side.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    pub skb_dev: u32,
    pub skb_sk: u32,
    pub skb_refdst: u32,
    pub skb_nfct: u32,
    pub skb_len: u32,
    pub skb_data_len: u32,
    pub skb_head: u32,
    pub skb_data: u32,
    pub skb_network_header: u32,
    pub skb_mark: u32,
    pub ct_tuplehash: u32,
    /// Size of a `struct nf_conntrack_tuple_hash`.
    pub ct_tuplehash_size: u32,
    pub tuplehash_tuple: u32,
    pub ct_status: u32,
    pub ct_net: u32,
    /// 0: this kernel has no `nf_conn.mark`.
    pub ct_mark: u32,
    pub ct_ext: u32,
    /// `NF_CT_EXT_ACCT`, an index and not an offset.
    pub ext_acct: u32,
    pub net_inum: u32,
    pub dev_ifindex: u32,
    pub dev_net: u32,
    pub sock_net: u32,
    pub dst_dev: u32,
    pub dst_flags: u32,
    pub state_hook: u32,
    /// Of `nf_hook_state.in`; `out` follows it.
    pub state_in: u32,
    /// Of `struct rtable`; 0: this kernel's IPv4 routes are not told.
    pub rt_type: u32,
    pub rt_gw_family: u32,
    pub rt_gw: u32,
    /// Of `struct rt6_info`; 0: this kernel's IPv6 routes are not told.
    pub rt6_flags: u32,
    pub rt6_gateway: u32,
    /// Not an offset: the id of `struct rtnl_link_stats64`, as which `bpf_rdonly_cast` lets NETFILTER programs read memory.
    pub words_type: u32,
}

/// Stands for a call of the kernel function `bpf_rdonly_cast`, whose number differs from kernel to kernel; the loader puts it there.
pub const CALL_RDONLY_CAST: i32 = 0x0ca5_7000;

/// Number of words in [`Offsets`].
pub const OFFSET_WORDS: usize = size_of::<Offsets>() / 4;

impl Offsets {
    pub const ZERO: Self = zeroed_offsets();

    /// The offsets as the loader hands them over.
    pub const fn words(self) -> [u32; OFFSET_WORDS] {
        // SAFETY: `repr(C)`, nothing but u32.
        unsafe { core::mem::transmute(self) }
    }
}

const fn zeroed_offsets() -> Offsets {
    // SAFETY: `repr(C)`, nothing but u32.
    unsafe { core::mem::transmute([0u32; OFFSET_WORDS]) }
}

const _: () = assert!(size_of::<WireTuple>() == 40);
const _: () = assert!(HEAD == 128);
const _: () = assert!(WHOLE == 224);
const _: () = assert!(size_of::<Predicted>() == 20);
