//! Drops and resets. The tracepoints fire for the whole kernel: only packets of this namespace count.

use crate::conntrack::is_watched_here;
use crate::emit::{body, describe_packet, reserve, submit};
use crate::flow::{flags_of, is_watched};
use crate::maps::{find, netns, offset, port_bits, queue_purge, reset_has_reason};
use crate::packet::Packet;
use crate::skb::{Access as _, Typed, Untyped, conntrack_of, describe_conntrack, packet_of, place_of, status_of};
use aya_ebpf::programs::BtfTracePointContext;
use porttrace_ebpf::table::Place;
use porttrace_ebpf::{Event, Kind, ROLE_IGNORED, ROLE_OPENING, ROLE_REPLY};

/// `enum ip_conntrack_info` (include/uapi/linux/netfilter/nf_conntrack_common.h).
const ESTABLISHED: u64 = 0;
const NEW: u64 = 2;
const ESTABLISHED_REPLY: u64 = 3;

#[inline(always)]
pub fn dropped(skb: u64, reason: u32) {
    if reason == queue_purge() {
        return;
    }
    report(Kind::Dropped, skb, reason);
}

#[inline(always)]
pub fn reset_sent(ctx: &BtfTracePointContext) {
    let reason = if reset_has_reason() { ctx.arg(2) } else { 0 };
    report(Kind::ResetSent, ctx.arg(1), reason);
}

#[inline(always)]
fn report(kind: Kind, skb: u64, reason: u32) {
    if skb == 0 {
        return;
    }
    let (place, ifindex) = place_of(skb);
    if place != netns() {
        return;
    }
    let mut packet = Packet::blank();
    if !packet_of::<Typed>(skb, &mut packet) {
        return;
    }
    let (ct, info) = conntrack_of::<Typed>(skb);
    let role = role_of(&packet, ct, info);
    if role >= ROLE_IGNORED {
        return;
    }
    let Some(mut entry) = reserve::<Event>(kind) else { return };
    let event = body(&mut entry);
    describe_packet(&mut event.head, &packet);
    if ct != 0 {
        describe_conntrack::<Untyped>(event, ct, info, status_of::<Untyped>(ct));
    }
    event.head.flags |= flags_of(role);
    event.head.ifindex = ifindex;
    event.head.mark = Typed::read(skb + offset!(skb_mark));
    event.head.reason = reason;
    submit(entry);
}

/// Role of a watched packet, `ROLE_IGNORED` for all others.
#[inline(always)]
fn role_of(packet: &Packet, ct: u64, info: u64) -> u64 {
    if port_bits(packet.tuple.dport) | port_bits(packet.tuple.sport) != 0 {
        match find(&Place::of(&packet.tuple)) {
            Some(known) => return known.role(),
            None if packet.opens() && is_watched(packet.tuple.dport, packet.tuple.proto) => return ROLE_OPENING,
            None => {}
        }
    }
    // kprobes track the rewritten tuple only when the source half of NAT begins; who is dropped before that (FORWARD) is known
    // by its entry. ICMP errors about the connection carry the entry too.
    match info {
        ESTABLISHED | NEW if is_watched_here(ct) => ROLE_OPENING,
        ESTABLISHED_REPLY if is_watched_here(ct) => ROLE_REPLY,
        _ => ROLE_IGNORED,
    }
}
