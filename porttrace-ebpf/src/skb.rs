//! Reading `sk_buff` and `nf_conn` through offsets, where no direct access exists.

use crate::maps::{offset, port_bits};
use crate::packet::{ACK, Bytes, PLAIN_TCP, PLAIN_UDP, Packet, SYN, TCP, parse, plain};
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use porttrace_ebpf::{CALL_RDONLY_CAST, CT_NEW, CT_REPLY, Event, HAS_CONNTRACK, WireTuple};

/// `IPS_CONFIRMED`.
pub const CONFIRMED: u32 = 1 << 3;
pub const SRC_NAT: u32 = 1 << 4;
pub const DST_NAT: u32 = 1 << 5;
pub const DYING: u32 = 1 << 9;

/// How the members of a structure are read that the kernel hands to a program.
pub trait Access {
    fn read<T>(address: u64) -> T;
}

/// The address is a pointer whose type the verifier knows (NETFILTER, `tp_btf`): a plain load.
pub struct Typed;

impl Access for Typed {
    #[inline(always)]
    fn read<T>(address: u64) -> T {
        // SAFETY: the verifier checks that the member is there and of this size.
        unsafe { core::ptr::read_volatile(address as *const T) }
    }
}

/// The address is a number (kprobes).
pub struct Untyped;

impl Access for Untyped {
    #[inline(always)]
    fn read<T>(address: u64) -> T {
        peek(address)
    }
}

/// The address is a number that the verifier is made to take for that of a structure, `struct rtnl_link_stats64`, which is nothing
/// but 25 words: plain loads, where the helper takes 30 ns. What cannot be read is zero here too. A read must not cross from
/// one word to the next, so `T` is a number, or words. NETFILTER programs only: their kernels (Linux 6.4) all have the function.
pub struct Cast;

impl Access for Cast {
    #[inline(always)]
    fn read<T>(address: u64) -> T {
        // SAFETY: the loader makes it a call of a function of this type.
        let cast: extern "C" fn(u64, u64) -> u64 = unsafe { core::mem::transmute(CALL_RDONLY_CAST as usize) };
        let words = cast(address, offset!(words_type));
        // SAFETY: the kernel catches the faults of loads from such an address.
        unsafe { core::ptr::read_volatile(words as *const T) }
    }
}

/// A value in kernel memory; zero when the address cannot be read.
#[inline(always)]
pub fn peek<T>(address: u64) -> T {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper fills it in either case.
    unsafe {
        bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, address as *const _);
        value.assume_init()
    }
}

/// An skb's linear part, from its network header on.
pub struct Linear {
    start: u64,
    length: u32,
}

impl Linear {
    #[inline(always)]
    pub fn of<A: Access>(skb: u64) -> Self {
        let head: u64 = A::read(skb + offset!(skb_head));
        let data: u64 = A::read(skb + offset!(skb_data));
        let length: u32 = A::read(skb + offset!(skb_len));
        let paged: u32 = A::read(skb + offset!(skb_data_len));
        let network: u16 = A::read(skb + offset!(skb_network_header));
        let start = head + u64::from(network);
        let end = data + u64::from(length.wrapping_sub(paged));
        Self { start, length: if end > start { (end - start) as u32 } else { 0 } }
    }
}

impl Bytes for Linear {
    const FILTER: bool = false;

    #[inline(always)]
    fn read(&self, offset: u32, to: *mut u8, len: u32) -> bool {
        offset + len <= self.length
            && unsafe { bpf_probe_read_kernel(to.cast(), len, (self.start + u64::from(offset)) as *const _) == 0 }
    }

    #[inline(always)]
    fn forgotten(value: u64) -> u64 {
        peek(&raw const value as u64)
    }
}

#[inline(always)]
pub fn packet_of<A: Access>(skb: u64, packet: &mut Packet) -> bool {
    parse(&Linear::of::<A>(skb), 0, false, packet)
}

/// What a packet begins with, for NETFILTER programs: words of its IPv4 header and what follows. Those behind its end are anything.
#[inline(always)]
fn head_of<const N: usize>(skb: u64) -> [u64; N] {
    let head: u64 = Typed::read(skb + offset!(skb_head));
    let network: u16 = Typed::read(skb + offset!(skb_network_header));
    Cast::read(head + u64::from(network))
}

/// As [`packet_of`], and faster for what nearly all packets are.
#[inline(always)]
pub fn packet_at_hook(skb: u64, packet: &mut Packet) -> bool {
    let linear = Linear::of::<Typed>(skb);
    if linear.length >= PLAIN_UDP as u32 {
        // What is behind the end of a short datagram is not looked at.
        let words: [u64; PLAIN_TCP / 8] = Cast::read(linear.start);
        // SAFETY: plain bytes of the same size.
        let header: [u8; PLAIN_TCP] = unsafe { core::mem::transmute(words) };
        if (header[9] != TCP || linear.length >= PLAIN_TCP as u32) && plain(&header, packet) {
            return true;
        }
    }
    parse(&linear, 0, false, packet)
}

/// Whether the packet may be a SYN without ACK or an SCTP INIT, for little: when in doubt, yes.
#[inline(always)]
pub fn may_open(skb: u64) -> bool {
    let words = head_of::<5>(skb);
    let (first, second, last) = (words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[4].to_ne_bytes());
    // Behind an IPv4 header without options.
    first[0] != 0x45 || second[1] != TCP || last[1] & (SYN | ACK) == SYN
}

/// Whether the packet may go to a watched port, for little: when in doubt, yes.
#[inline(always)]
pub fn may_be_watched(skb: u64) -> bool {
    let words = head_of::<3>(skb);
    let (first, last) = (words[0].to_ne_bytes(), words[2].to_ne_bytes());
    // Behind an IPv4 header without options.
    first[0] != 0x45 || port_bits([last[6], last[7]]) != 0
}

/// `skb->_nfct`: address of the `nf_conn` (0: none) and `enum ip_conntrack_info`.
#[inline(always)]
pub fn conntrack_of<A: Access>(skb: u64) -> (u64, u64) {
    let nfct: u64 = A::read(skb + offset!(skb_nfct));
    (nfct & !7, nfct & 7)
}

/// The ports and protocol of a `struct nf_conntrack_tuple`, whose layout is the same since Linux 2.6
/// (include/net/netfilter/nf_conntrack_tuple.h; the loader compares it with BTF).
#[derive(Clone, Copy)]
pub struct Ports {
    pub sport: [u8; 2],
    pub dport: [u8; 2],
    pub proto: u8,
}

/// Those of the original direction.
#[inline(always)]
pub fn original_ports<A: Access>(ct: u64) -> Ports {
    // Behind the source address (2 words) source port, family and destination address; destination port and protocol follow.
    let [first, _, last]: [u64; 3] = A::read(tuple_at(ct, 0) + 16);
    let ([a, b, ..], [_, _, _, _, c, d, proto, _]) = (first.to_ne_bytes(), last.to_ne_bytes());
    Ports { sport: [a, b], dport: [c, d], proto }
}

/// The tuple of a direction (0 original, 1 reply).
#[inline(always)]
pub fn tuple_of<A: Access>(ct: u64, direction: u64) -> WireTuple {
    let [src, more, first, middle, last]: [u64; 5] = A::read(tuple_at(ct, direction));
    // AF_INET is 2, AF_INET6 is 10.
    let family = 4 + (first >> 18 & 2);
    let rest = first & 0xffff | (last >> 32 & 0xffff) << 16 | (last >> 48 & 0xff) << 32 | family << 40;
    WireTuple::of_words([src, more, first >> 32 | middle << 32, middle >> 32 | last << 32, rest])
}

#[inline(always)]
fn tuple_at(ct: u64, direction: u64) -> u64 {
    ct + offset!(ct_tuplehash) + offset!(tuplehash_tuple) + direction * offset!(ct_tuplehash_size)
}

#[inline(always)]
pub fn status_of<A: Access>(ct: u64) -> u32 {
    A::read(ct + offset!(ct_status))
}

/// An identity that is not the address itself.
#[inline(always)]
pub fn id_of(ct: u64) -> u64 {
    (ct >> 3).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Network namespace of a `possible_net_t` at `address`.
#[inline(always)]
fn net_inum<A: Access>(address: u64) -> u32 {
    let net: u64 = A::read(address);
    if net == 0 { 0 } else { A::read(net + offset!(net_inum)) }
}

#[inline(always)]
pub fn conntrack_netns(ct: u64) -> u32 {
    net_inum::<Untyped>(ct + offset!(ct_net))
}

/// Network namespace and interface of a packet in a `tp_btf` program; a packet that a socket of this host sends has no device
/// before routing is done, so the socket and the route are asked too.
#[inline(always)]
pub fn place_of(skb: u64) -> (u32, u32) {
    let dev: u64 = Typed::read(skb + offset!(skb_dev));
    if dev != 0 {
        return (net_inum::<Typed>(dev + offset!(dev_net)), Typed::read(dev + offset!(dev_ifindex)));
    }
    let sk: u64 = Typed::read(skb + offset!(skb_sk));
    if sk != 0 {
        return (net_inum::<Untyped>(sk + offset!(sock_net)), 0);
    }
    let dst: u64 = Typed::read::<u64>(skb + offset!(skb_refdst)) & !1;
    if dst == 0 {
        return (0, 0);
    }
    let dev: u64 = peek(dst + offset!(dst_dev));
    if dev == 0 { (0, 0) } else { (net_inum::<Untyped>(dev + offset!(dev_net)), 0) }
}

/// 0 for no device.
#[inline(always)]
pub fn ifindex_of<A: Access>(dev: u64) -> u32 {
    if dev == 0 { 0 } else { A::read(dev + offset!(dev_ifindex)) }
}

/// Fills in the entry's half of an event.
#[inline(always)]
pub fn describe_conntrack<A: Access>(event: &mut Event, ct: u64, info: u64, status: u32) {
    event.head.ct_id = id_of(ct);
    event.original = tuple_of::<A>(ct, 0);
    event.reply = tuple_of::<A>(ct, 1);
    event.head.ct_status = status;
    event.head.ct_mark = if offset!(ct_mark) == 0 { 0 } else { A::read(ct + offset!(ct_mark)) };
    event.head.flags |= HAS_CONNTRACK;
    if status & CONFIRMED == 0 {
        event.head.flags |= CT_NEW;
    }
    // IP_CT_IS_REPLY = 3, IP_CT_NEW_REPLY is gone, IP_CT_UNTRACKED = 7 never has an entry.
    if info >= 3 {
        event.head.flags |= CT_REPLY;
    }
}
