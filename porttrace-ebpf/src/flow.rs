//! TC: which packets belong to a watched connection, and which of those are worth an event.

use crate::emit::{body, describe_packet, reserve, submit};
use crate::maps::{SCRATCH, add, find, insert, is_predicted, port_bits, shows_data};
use crate::packet::{Bytes, ICMP, ICMPV6, PLAIN_TCP, PLAIN_UDP, Packet, SCTP, TCP, UDP, parse, plain};
use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_skb_load_bytes_relative};
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use porttrace_ebpf::machine::opaque;
use porttrace_ebpf::table::{Known, Place, Way};
use porttrace_ebpf::{
    CT_REPLY, Event, Head, Kind, PORT_SCTP, PORT_TCP, PORT_UDP, PREDICTED, ROLE_OPENING, ROLE_PREDICTED,
    ROLE_PREDICTED_REPLY, ROLE_REPLY,
};

/// Packets with payload shown for each tuple; later ones are only counted.
const SHOWN: u16 = 8;
/// A datagram flow that was silent for so long is shown anew.
const IDLE_NS: i64 = 10_000_000_000;

/// Ethernet protocols as they stand in `__sk_buff.protocol`.
const IPV4: u32 = 0x0800u16.to_be() as u32;
const IPV6: u32 = 0x86ddu16.to_be() as u32;
const VLAN: u32 = 0x8100u16.to_be() as u32;
const QINQ: u32 = 0x88a8u16.to_be() as u32;

struct FromNetwork {
    skb: *const core::ffi::c_void,
}

impl Bytes for FromNetwork {
    const FILTER: bool = true;

    #[inline(always)]
    fn read(&self, offset: u32, to: *mut u8, len: u32) -> bool {
        // Relative to the network header: devices with and without Ethernet header look alike.
        unsafe { bpf_skb_load_bytes_relative(self.skb, offset, to.cast(), len, BPF_HDR_START_NET as u32) == 0 }
    }
}

/// A packet at an interface.
#[inline(always)]
pub fn sighting(ctx: &TcContext, side: Kind) {
    let bytes = FromNetwork { skb: ctx.as_ptr() };
    if !is_candidate(ctx, &bytes) {
        return;
    }
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return };
    // SAFETY: see `SCRATCH`.
    let [packet, quoted] = unsafe { &mut *scratch };
    if !is_plain(ctx, packet) {
        let Some(base) = ip_header(ctx, &bytes, side) else { return };
        if !parse(&bytes, base, false, packet) {
            return;
        }
    }
    match packet.tuple.proto {
        ICMP | ICMPV6 => icmp(ctx, &bytes, packet, quoted, side),
        _ => flow(ctx, packet, side),
    }
}

/// Whether it is a packet that [`plain`] reads, and then has.
#[inline(always)]
fn is_plain(ctx: &TcContext, packet: &mut Packet) -> bool {
    if ctx.skb.protocol() != IPV4 {
        return false;
    }
    match ethernet::<PLAIN_TCP>(ctx, IPV4) {
        Some(header) => plain(header, packet),
        None => ethernet::<PLAIN_UDP>(ctx, IPV4).is_some_and(|header| plain(header, packet)),
    }
}

/// Whether a packet is worth parsing: it has a port that is watched, or is an ICMP error, or is something that is not common
/// enough to be told here. Nearly all packets of a node end here.
#[inline(always)]
fn is_candidate(ctx: &TcContext, bytes: &FromNetwork) -> bool {
    match ctx.skb.protocol() {
        IPV4 => match ethernet::<24>(ctx, IPV4) {
            Some(header) if header[0] == 0x45 => {
                is_candidate_l4(header[9], [header[20], header[21], header[22], header[23]])
            }
            _ => {
                let Some(header) = crate::packet::read::<[u32; 6], _>(bytes, 0) else { return false };
                let options = header[0].to_ne_bytes()[0] != 0x45;
                options || is_candidate_l4(header[2].to_ne_bytes()[1], header[5].to_ne_bytes())
            }
        },
        IPV6 => match ethernet::<44>(ctx, IPV6) {
            Some(header) if header[0] >> 4 == 6 => {
                is_candidate_v6(header[6], [header[40], header[41], header[42], header[43]])
            }
            _ => {
                let Some(header) = crate::packet::read::<[u32; 11], _>(bytes, 0) else { return false };
                is_candidate_v6(header[1].to_ne_bytes()[2], header[10].to_ne_bytes())
            }
        },
        _ => true,
    }
}

/// The IP header of an Ethernet frame and what follows it, where they can be read without a helper, which takes most of the time
/// of a packet that nobody watches. `None` when in doubt: the bytes are not side by side, or it is no Ethernet frame. The
/// device's type is not to be had here, but its header says enough: no station's address begins like an IPv4 header (0x45 is
/// odd, a group's address), and frames to addresses that begin like an IPv6 header take the longer way.
#[inline(always)]
fn ethernet<'packet, const N: usize>(ctx: &'packet TcContext, protocol: u32) -> Option<&'packet [u8; N]> {
    const HEADER: usize = 14;
    let (start, end) = (ctx.data(), ctx.data_end());
    if start + HEADER + N > end {
        return None;
    }
    // SAFETY: the bytes lie between the packet's start and its end.
    let (frame, network) = unsafe { (&*(start as *const [u8; HEADER]), &*((start + HEADER) as *const [u8; N])) };
    let like_ip = if protocol == IPV4 { frame[0] == 0x45 } else { frame[0] >> 4 == 6 };
    let ethertype = u32::from(u16::from_ne_bytes([frame[12], frame[13]]));
    (!like_ip && ethertype == protocol).then_some(network)
}

/// `next`: the header that follows IPv6's; `head`: its first bytes.
#[inline(always)]
fn is_candidate_v6(next: u8, head: [u8; 4]) -> bool {
    match next {
        TCP | UDP | SCTP => is_candidate_l4(next, head),
        // Errors are the types below 128 (RFC 4443).
        ICMPV6 => head[0] < 128,
        _ => true,
    }
}

/// `head`: the first bytes behind the IP header.
#[inline(always)]
fn is_candidate_l4(proto: u8, head: [u8; 4]) -> bool {
    match proto {
        TCP | UDP | SCTP => port_bits([head[0], head[1]]) | port_bits([head[2], head[3]]) != 0,
        ICMP => matches!(head[0], 3 | 4 | 11 | 12),
        _ => false,
    }
}

/// Whether a connection to this port is watched.
#[inline(always)]
pub fn is_watched(port: [u8; 2], proto: u8) -> bool {
    let bit = match proto {
        TCP => PORT_TCP,
        UDP => PORT_UDP,
        SCTP => PORT_SCTP,
        _ => 0,
    };
    port_bits(port) & bit != 0
}

/// Where the IP header begins, counted from the kernel's network header.
#[inline(always)]
fn ip_header(ctx: &TcContext, bytes: &FromNetwork, side: Kind) -> Option<u32> {
    match ctx.skb.protocol() {
        IPV4 | IPV6 => Some(0),
        // Tags in the packet: at egress the network header is already behind them. At ingress the kernel took the outer
        // tag off (`skb_vlan_untag`); an inner one is 4 bytes.
        VLAN | QINQ if matches!(side, Kind::TcEgress) => Some(0),
        VLAN | QINQ => {
            let ethertype: [u8; 2] = crate::packet::read(bytes, 2)?;
            matches!(u16::from_be_bytes(ethertype), 0x0800 | 0x86dd).then_some(4)
        }
        _ => None,
    }
}

#[inline(always)]
fn flow(ctx: &TcContext, packet: &Packet, side: Kind) {
    let opens = packet.opens() && is_watched(packet.tuple.dport, packet.tuple.proto);
    let place = Place::of(&packet.tuple);
    let known = find(&place);
    let begins = match &known {
        Some(known) => opens && known.role() != ROLE_OPENING,
        None => opens || packet.tuple.proto == UDP && is_watched(packet.tuple.dport, UDP),
    };
    let role = if begins_predicted(packet, known.as_ref()) {
        Some(ROLE_PREDICTED)
    } else if begins {
        debug!(
            ctx,
            "tracking a connection of protocol {} to port {}",
            packet.tuple.proto,
            u16::from_be_bytes(packet.tuple.dport)
        );
        Some(ROLE_OPENING)
    } else {
        None
    };
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    // Datagrams are told by how long ago the last one came, about so: to ask for the exact time would take longer than to count.
    let now = if packet.tuple.proto == UDP { unsafe { bpf_ktime_get_coarse_ns() } } else { 0 };
    let mut known = match (known, role) {
        (None, Some(role)) => {
            let mut first =
                Way { last_ns: now, packets: 1, bytes: packet.payload.into(), ifindex, side: side as u16, shown: 0 };
            if is_shown(&mut first, packet) {
                show(ctx, packet, side, &About { ct_id: 0, role, own: first.bytes, back: 0 });
            }
            // Last: what is written to comes from afar, and nobody waits for it any more.
            return insert(&place, &packet.tuple, role, 0, Some(first));
        }
        (None, None) => return,
        (Some(known), Some(role)) => {
            known.set_role(role);
            known
        }
        (Some(known), None) if known.is_ignored() => return,
        (Some(known), None) => known,
    };
    if opens || known.role() == ROLE_PREDICTED && packet.opens() {
        restart(&mut known, ifindex, side);
    }
    count_packet(known.way(), packet, now, ifindex, side);
    if is_shown(known.way(), packet) {
        let (own, back) = (known.way().bytes, known.back().bytes);
        show(ctx, packet, side, &About { ct_id: known.ct_id(), role: known.role(), own, back });
    }
}

/// What an event says of the connection beside the packet; `own` and `back`: bytes that went the packet's way and the other one.
struct About {
    ct_id: u64,
    role: u64,
    own: u64,
    back: u64,
}

/// A packet that may open a connection to an address that the rules name, and whose connection is not known yet.
#[inline(always)]
fn begins_predicted(packet: &Packet, known: Option<&Known>) -> bool {
    if !is_predicted(&packet.tuple) {
        return false;
    }
    match known {
        Some(known) => packet.opens() && !matches!(known.role(), ROLE_OPENING | ROLE_PREDICTED),
        None => packet.opens() || packet.tuple.proto == UDP,
    }
}

/// What a tuple's role says of an event about it.
#[inline(always)]
pub fn flags_of(role: u64) -> u8 {
    match role {
        ROLE_REPLY => CT_REPLY,
        ROLE_PREDICTED => PREDICTED,
        ROLE_PREDICTED_REPLY => PREDICTED | CT_REPLY,
        _ => 0,
    }
}

/// A SYN at the interface that counts: a new connection, maybe with a port used before.
#[inline(always)]
fn restart(known: &mut Known, ifindex: u32, side: Kind) {
    let way = known.way();
    if way.ifindex != ifindex || way.side != side as u16 {
        return;
    }
    let none = opaque(0);
    (way.packets, way.bytes, way.shown) = (none, none, 0);
    let back = known.back();
    (back.packets, back.bytes, back.shown) = (none, none, 0);
}

#[inline(always)]
fn count_packet(way: &mut Way, packet: &Packet, now: u64, ifindex: u32, side: Kind) {
    if packet.tuple.proto == UDP {
        // Less than nothing where another CPU has just seen a later time.
        if now.wrapping_sub(way.last_ns).cast_signed() > IDLE_NS {
            way.shown = 0;
        }
        way.last_ns = now;
    }
    if way.ifindex == 0 {
        way.ifindex = ifindex;
        way.side = side as u16;
    }
    if way.ifindex == ifindex && way.side == side as u16 {
        way.packets = (way.packets << 1 | 1) & 3;
        // The packets of one flow may be on several CPUs at once.
        add(&mut way.bytes, u64::from(packet.payload));
    }
}

#[inline(always)]
fn is_shown(way: &mut Way, packet: &Packet) -> bool {
    if packet.is_milestone() {
        return true;
    }
    let data = packet.payload != 0 && (shows_data() || packet.tuple.proto != TCP);
    if !(data || packet.tuple.proto == UDP) || way.shown >= SHOWN {
        return false;
    }
    way.shown += 1;
    true
}

/// A function of its own: it is called in two places.
#[inline(never)]
fn show(ctx: &TcContext, packet: &Packet, side: Kind, about: &About) {
    let Some(mut entry) = reserve::<Head>(side) else { return };
    let head = body(&mut entry);
    describe_packet(head, packet);
    let skb = unsafe { &*ctx.skb.skb };
    head.ifindex = skb.ifindex;
    head.mark = skb.mark;
    head.ct_id = about.ct_id;
    head.flags |= flags_of(about.role);
    (head.orig_bytes, head.reply_bytes) =
        if head.flags & CT_REPLY != 0 { (about.back, about.own) } else { (about.own, about.back) };
    submit(entry);
}

/// ICMP errors quote the packet that they are about: is that one of ours?
#[inline(always)]
fn icmp(ctx: &TcContext, bytes: &FromNetwork, outer: &Packet, inner: &mut Packet, side: Kind) {
    let is_error = match outer.tuple.proto {
        ICMP => matches!(outer.icmp_type, 3 | 4 | 11 | 12),
        _ => matches!(outer.icmp_type, 1..=4),
    };
    if !is_error {
        return;
    }
    if !parse(bytes, outer.l4 + 8, true, inner) {
        return;
    }
    let Some(known) = find(&Place::of(&inner.tuple)) else { return };
    if known.is_ignored() {
        return;
    }
    let Some(mut entry) = reserve::<Event>(Kind::IcmpError) else { return };
    let event = body(&mut entry);
    describe_packet(&mut event.head, inner);
    let skb = unsafe { &*ctx.skb.skb };
    if matches!(side, Kind::TcIngress) {
        event.head.ifindex = skb.ifindex;
    } else {
        event.head.out_ifindex = skb.ifindex;
    }
    event.original = outer.tuple;
    (event.head.icmp_type, event.head.icmp_code) = (outer.icmp_type, outer.icmp_code);
    (event.head.mark, event.head.length, event.head.ttl) = (skb.mark, outer.length, outer.ttl);
    event.head.ct_id = known.ct_id();
    event.head.flags |= flags_of(known.role());
    submit(entry);
}
