//! Headers: from bytes to a tuple and what the log shows of a packet. Bounded, IPv4 and IPv6.

use crate::maps::port_bits;
use porttrace_ebpf::WireTuple;
use porttrace_ebpf::machine::clear;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

const FIN: u8 = 1;
pub const SYN: u8 = 2;
const RST: u8 = 4;
pub const ACK: u8 = 16;

/// Extension headers that are followed before a packet counts as unreadable.
const EXTENSION_HEADERS: u32 = 6;
/// An answer of `skip_extensions`: protocol 59, "no next header".
const NO_HEADER: u64 = 59;

/// Where header bytes come from; offsets count from the network header.
pub trait Bytes {
    /// Whether packets are given up as soon as their ports show that they are of no watched connection.
    const FILTER: bool;

    /// Fills `to` (`len` bytes); `false` when the packet has no such bytes.
    fn read(&self, offset: u32, to: *mut u8, len: u32) -> bool;

    /// The value, of which the verifier may then know nothing any more: it would walk what follows once for every way to it.
    #[inline(always)]
    fn forgotten(value: u64) -> u64 {
        value
    }
}

#[inline(always)]
pub fn read<T, B: Bytes>(bytes: &B, offset: u32) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    bytes.read(offset, value.as_mut_ptr().cast(), size_of::<T>() as u32).then(|| unsafe { value.assume_init() })
}

/// A packet with ports, or an ICMP message.
#[derive(Clone, Copy)]
pub struct Packet {
    pub tuple: WireTuple,
    pub length: u32,
    pub payload: u32,
    pub seq: u32,
    pub ack: u32,
    /// Offset of the L4 header from the network header.
    pub l4: u32,
    pub l4_flags: u8,
    pub ttl: u8,
    pub icmp_type: u8,
    pub icmp_code: u8,
}

impl Packet {
    /// One that is to be filled in.
    #[inline(always)]
    pub fn blank() -> Self {
        let mut packet = core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: all-zero is a value of every field.
        unsafe {
            clear(packet.as_mut_ptr().cast(), size_of::<Self>() / 8);
            packet.assume_init()
        }
    }

    /// The packet that opens a connection, whatever came before: SYN without ACK, SCTP INIT.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        match self.tuple.proto {
            TCP => self.l4_flags & (SYN | ACK) == SYN,
            SCTP => self.l4_flags == 1,
            _ => false,
        }
    }

    /// A packet that changes a connection's state and is always shown.
    #[inline(always)]
    pub fn is_milestone(&self) -> bool {
        match self.tuple.proto {
            TCP => self.l4_flags & (SYN | FIN | RST) != 0,
            // Everything but DATA, SACK and heartbeats.
            SCTP => !matches!(self.l4_flags, 0 | 3 | 4 | 5),
            _ => false,
        }
    }
}

/// Length of what [`plain`] reads: an IPv4 header without options and a TCP header, or that of UDP.
pub const PLAIN_TCP: usize = 40;
pub const PLAIN_UDP: usize = 28;

/// Reads what nearly all packets are, TCP or UDP behind an IPv4 header without options, from its first bytes; `false` for anything
/// else, which [`parse`] takes more time for.
#[inline(always)]
pub fn plain<const N: usize>(header: &[u8; N], packet: &mut Packet) -> bool {
    let length = u32::from(u16::from_be_bytes([header[2], header[3]]));
    // Not the first fragment: no ports.
    if header[0] != 0x45 || (header[6] & 0x1f) | header[7] != 0 {
        return false;
    }
    let l4_length = match header[9] {
        TCP if N >= PLAIN_TCP => u32::from(header[32] >> 4) * 4,
        UDP => 8,
        _ => return false,
    };
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    packet.tuple = WireTuple::v4(word(12), word(16), word(20), header[9]);
    packet.length = length;
    packet.payload = length.saturating_sub(20 + l4_length);
    packet.l4 = 20;
    packet.ttl = header[8];
    (packet.icmp_type, packet.icmp_code) = (0, 0);
    (packet.seq, packet.ack, packet.l4_flags) =
        if header[9] == TCP { (u32::from_be(word(24)), u32::from_be(word(28)), header[33]) } else { (0, 0, 0) };
    true
}

/// The IP header's part of a packet: addresses, protocol, where L4 begins.
struct Network {
    tuple: WireTuple,
    length: u32,
    l4: u32,
    ttl: u8,
}

/// Reads the packet whose network header is at `base` into `packet`; `false` for anything without ports or ICMP type: other
/// protocols, non-first fragments, truncated headers. `lenient`: a quoted packet, of which only 8 bytes of L4 are sure.
///
/// A function of its own, its result in memory: what follows is then verified once, and not once for every kind of packet.
#[inline(never)]
pub fn parse<B: Bytes>(bytes: &B, base: u32, lenient: bool, packet: &mut Packet) -> bool {
    let Some(header) = read::<[u32; 5], B>(bytes, base) else { return false };
    let network = match header[0].to_ne_bytes()[0] >> 4 {
        4 => ipv4(&header, base),
        6 => ipv6(bytes, &header, base),
        _ => None,
    };
    let Some(network) = network else { return false };
    transport(bytes, &network, base, lenient, packet).is_some()
}

#[inline(always)]
fn ipv4(header: &[u32; 5], base: u32) -> Option<Network> {
    let word0 = header[0].to_ne_bytes();
    let fragment = header[1].to_ne_bytes();
    if u16::from_be_bytes([fragment[2] & 0x1f, fragment[3]]) != 0 {
        return None;
    }
    let ttl_proto = header[2].to_ne_bytes();
    let ihl = u32::from(word0[0] & 15) * 4;
    if ihl < 20 {
        return None;
    }
    Some(Network {
        tuple: WireTuple::v4(header[3], header[4], 0, ttl_proto[1]),
        length: u32::from(u16::from_be_bytes([word0[2], word0[3]])),
        l4: base + ihl,
        ttl: ttl_proto[0],
    })
}

#[inline(always)]
fn ipv6<B: Bytes>(bytes: &B, header: &[u32; 5], base: u32) -> Option<Network> {
    // Payload length, next header, hop limit.
    let word1 = header[1].to_ne_bytes();
    let addresses: [[u8; 16]; 2] = read(bytes, base + 8)?;
    let (next, l4) = match word1[2] {
        next @ (TCP | UDP | SCTP | ICMPV6) => (next, base + 40),
        next => {
            let found = B::forgotten(skip_extensions(bytes, next, base + 40));
            (found as u8, (found >> 8) as u32)
        }
    };
    Some(Network {
        tuple: WireTuple {
            src: addresses[0],
            dst: addresses[1],
            sport: [0; 2],
            dport: [0; 2],
            proto: next,
            family: 6,
            pad: [0; 2],
        },
        length: u32::from(u16::from_be_bytes([word1[0], word1[1]])) + 40,
        l4,
        ttl: word1[3],
    })
}

/// Follows extension headers from `l4` on: protocol in the low byte of the answer, its offset above. One number, so that
/// the verifier does not walk the rest of the program once for every chain of headers.
#[inline(never)]
fn skip_extensions<B: Bytes>(bytes: &B, mut next: u8, mut l4: u32) -> u64 {
    for _ in 0..EXTENSION_HEADERS {
        if !matches!(next, 0 | 43 | 44 | 51 | 60) {
            break;
        }
        // Next header, length, and of a fragment header the offset.
        let Some(extension) = read::<[u8; 4], B>(bytes, l4) else { return NO_HEADER };
        l4 += match next {
            // The fragment header has no length; only a first fragment has the ports.
            44 if u16::from_be_bytes([extension[2], extension[3]]) & 0xfff8 != 0 => return NO_HEADER,
            44 => 8,
            // The authentication header counts in 4 bytes minus 2, the others in 8 bytes beyond the first 8.
            51 => (u32::from(extension[1]) + 2) * 4,
            _ => (u32::from(extension[1]) + 1) * 8,
        };
        next = extension[0];
    }
    u64::from(l4) << 8 | u64::from(next)
}

#[inline(always)]
fn transport<B: Bytes>(bytes: &B, network: &Network, base: u32, lenient: bool, packet: &mut Packet) -> Option<()> {
    packet.tuple = network.tuple;
    packet.length = network.length;
    packet.l4 = network.l4;
    packet.ttl = network.ttl;
    (packet.seq, packet.ack, packet.l4_flags, packet.icmp_type, packet.icmp_code) = (0, 0, 0, 0, 0);
    let head: [[u8; 2]; 4] = read(bytes, network.l4)?;
    let header_length = match network.tuple.proto {
        TCP | UDP | SCTP => {
            if B::FILTER && port_bits(head[0]) | port_bits(head[1]) == 0 {
                return None;
            }
            packet.tuple.sport = head[0];
            packet.tuple.dport = head[1];
            l4_details(bytes, packet, head, lenient)?
        }
        ICMP | ICMPV6 => {
            [packet.icmp_type, packet.icmp_code] = head[0];
            packet.tuple.sport = head[2];
            packet.tuple.dport = head[0];
            8
        }
        _ => return None,
    };
    packet.payload = network.length.saturating_sub(network.l4 - base + header_length);
    Some(())
}

/// Fills in what the protocol has beyond ports and returns the length of its header.
#[inline(always)]
fn l4_details<B: Bytes>(bytes: &B, packet: &mut Packet, head: [[u8; 2]; 4], lenient: bool) -> Option<u32> {
    match packet.tuple.proto {
        TCP => {
            packet.seq = u32::from_be_bytes([head[2][0], head[2][1], head[3][0], head[3][1]]);
            if lenient {
                return Some(20);
            }
            let rest: [u8; 6] = read(bytes, packet.l4 + 8)?;
            packet.ack = u32::from_be_bytes([rest[0], rest[1], rest[2], rest[3]]);
            packet.l4_flags = rest[5];
            Some(u32::from(rest[4] >> 4) * 4)
        }
        SCTP => {
            packet.l4_flags = if lenient { 0 } else { read(bytes, packet.l4 + 12)? };
            Some(12)
        }
        _ => Some(8),
    }
}
