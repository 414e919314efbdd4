//! Reading `sk_buff` and `nf_conn` through offsets, where no direct access exists.

use crate::maps::{offset, port_bits};
use crate::packet::{ACK, Bytes, Packet, SYN, TCP, parse};
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use porttrace_ebpf::{CT_NEW, CT_REPLY, Event, HAS_CONNTRACK, WireTuple};

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

/// A value in kernel memory; zero when the address cannot be read.
#[inline(always)]
pub fn peek<T>(address: u64) -> T {
    let mut value = core::mem::MaybeUninit::<T>::zeroed();
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
}

#[inline(always)]
pub fn packet_of<A: Access>(skb: u64, packet: &mut Packet) -> bool {
    parse(&Linear::of::<A>(skb), 0, false, packet)
}

/// Whether the packet may be a SYN without ACK or an SCTP INIT, for little: when in doubt, yes.
#[inline(always)]
pub fn may_open(skb: u64) -> bool {
    let head: u64 = Typed::read(skb + offset!(skb_head));
    let network: u16 = Typed::read(skb + offset!(skb_network_header));
    // Up to the flags of a TCP header behind an IPv4 header without options.
    let header: [u8; 34] = peek(head + u64::from(network));
    header[0] != 0x45 || header[9] != TCP || header[33] & (SYN | ACK) == SYN
}

/// Whether the packet may go to a watched port, for little: when in doubt, yes.
#[inline(always)]
pub fn may_be_watched(skb: u64) -> bool {
    let head: u64 = Typed::read(skb + offset!(skb_head));
    let network: u16 = Typed::read(skb + offset!(skb_network_header));
    // Up to the ports behind an IPv4 header without options.
    let header: [u8; 24] = peek(head + u64::from(network));
    header[0] != 0x45 || port_bits([header[22], header[23]]) != 0
}

/// `skb->_nfct`: address of the `nf_conn` (0: none) and `enum ip_conntrack_info`.
#[inline(always)]
pub fn conntrack_of<A: Access>(skb: u64) -> (u64, u64) {
    let nfct: u64 = A::read(skb + offset!(skb_nfct));
    (nfct & !7, nfct & 7)
}

/// The ports and protocol of a `struct nf_conntrack_tuple`, whose layout is the same since Linux 2.6
/// (include/net/netfilter/nf_conntrack_tuple.h; the loader compares it with BTF).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ports {
    pub sport: [u8; 2],
    l3num: u16,
    dst: [u32; 4],
    pub dport: [u8; 2],
    pub proto: u8,
    dir: u8,
}

/// Offset of [`Ports`] in the structure: behind the source address.
const PORTS: u64 = 16;

#[inline(always)]
pub fn original_ports(ct: u64) -> Ports {
    peek(tuple_at(ct, 0) + PORTS)
}

/// Copies the tuple of a direction (0 original, 1 reply) to `to`. In place and by words: programs have little stack.
#[inline(always)]
pub fn copy_tuple(ct: u64, direction: u64, to: &mut WireTuple) {
    let words = core::ptr::from_mut(to).cast::<u32>();
    unsafe {
        bpf_probe_read_kernel(words.cast(), size_of::<WireTuple>() as u32, tuple_at(ct, direction) as *const _);
        // Source address (4 words), source port and family, destination address (4 words), destination port and protocol.
        let (sport, dport) = (words.add(4).read(), words.add(9).read());
        for index in 4..8 {
            words.add(index).write(words.add(index + 1).read());
        }
        let family = if sport >> 16 == 2 { 4 } else { 6 };
        words.add(8).write((sport & 0xffff) | dport << 16);
        words.add(9).write((dport >> 16 & 0xff) | family << 8);
    }
}

#[inline(always)]
fn tuple_at(ct: u64, direction: u64) -> u64 {
    ct + offset!(ct_tuplehash) + offset!(tuplehash_tuple) + direction * offset!(ct_tuplehash_size)
}

#[inline(always)]
pub fn status_of(ct: u64) -> u32 {
    peek(ct + offset!(ct_status))
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
pub fn ifindex_of(dev: u64) -> u32 {
    if dev == 0 { 0 } else { peek(dev + offset!(dev_ifindex)) }
}

/// Fills in the entry's half of an event.
#[inline(always)]
pub fn describe_conntrack(event: &mut Event, ct: u64, info: u64, status: u32) {
    event.ct_id = id_of(ct);
    copy_tuple(ct, 0, &mut event.original);
    copy_tuple(ct, 1, &mut event.reply);
    event.ct_status = status;
    event.ct_mark = if offset!(ct_mark) == 0 { 0 } else { peek(ct + offset!(ct_mark)) };
    event.flags |= HAS_CONNTRACK;
    if status & CONFIRMED == 0 {
        event.flags |= CT_NEW;
    }
    // IP_CT_IS_REPLY = 3, IP_CT_NEW_REPLY is gone, IP_CT_UNTRACKED = 7 never has an entry.
    if info >= 3 {
        event.flags |= CT_REPLY;
    }
}
