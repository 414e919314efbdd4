//! Conntrack: entries of watched connections, as NETFILTER programs or kprobes see them.

use crate::emit::{body, describe_packet, reserve, submit};
use crate::flow::is_watched;
use crate::maps::{Seen, find, forget, is_taken_care_of, netns, offset, pass_over, set_seen, track};
use crate::packet::{Packet, SCTP, TCP, UDP};
use crate::route::describe_route;
use crate::skb::{
    Access, CONFIRMED, Cast, DST_NAT, DYING, SRC_NAT, Typed, Untyped, conntrack_netns, conntrack_of,
    describe_conntrack, id_of, ifindex_of, may_be_watched, may_open, original_ports, packet_at_hook, packet_of, peek,
    status_of, tuple_of,
};
use core::ffi::c_void;
use porttrace_ebpf::table::{Known, Place};
use porttrace_ebpf::{Event, Kind, ROLE_IGNORED, ROLE_OPENING, ROLE_REPLY};

/// `IP_CT_RELATED`.
const RELATED: u64 = 1;
/// `IP_CT_NEW`.
const NEW: u64 = 2;
/// `IP_CT_IS_REPLY`.
const REPLY: u64 = 3;

/// `struct bpf_nf_ctx`.
#[repr(C)]
struct NfContext {
    state: u64,
    skb: u64,
}

/// A NETFILTER hook. Rejects first: all packets of the node come by here.
#[inline(always)]
pub fn hook(ctx: *mut c_void, kind: Kind) {
    // SAFETY: the kernel hands over a `struct bpf_nf_ctx`.
    let NfContext { state, skb } = unsafe { ctx.cast::<NfContext>().read() };
    let (ct, info) = conntrack_of::<Typed>(skb);
    // Only the first look at a connection cares for replies: it may have begun before the probe did.
    let first_look = matches!(kind, Kind::AfterConntrack);
    if ct == 0 {
        return untracked(&NfContext { state, skb }, kind);
    }
    if info >= REPLY && !first_look {
        return;
    }
    let id = id_of(ct);
    // Entries are used again and again: what was known of this one holds until it begins anew. It is then not even asked for: that
    // may have to come from afar, and takes longer than all the rest.
    if !(first_look && (info == NEW || info == RELATED)) {
        let seen = Seen::of(id);
        if seen.is_passed_over() {
            return;
        }
        if !first_look && seen.is_watched() {
            let is_new = info == NEW && status_of::<Cast>(ct) & CONFIRMED == 0;
            if !is_new && (seen == Seen::watched(true) || !may_open(skb)) {
                return;
            }
        }
    }
    let ports = original_ports::<Cast>(ct);
    if is_watched(ports.dport, ports.proto) {
        watched(&NfContext { state, skb }, ct, info, ports.proto, kind);
        return;
    }
    pass_over(id);
    if first_look && info == NEW && is_watched(ports.sport, ports.proto) {
        remember::<Cast>(ct, ROLE_IGNORED, 0, 0);
    }
}

/// A packet without an entry: conntrack looks at nothing in a namespace whose rules do not ask for it, as in most pods. Where the
/// packet was routed is still worth telling, of the one that opens a connection.
#[inline(always)]
fn untracked(at: &NfContext, kind: Kind) {
    if !matches!(kind, Kind::LocalIn | Kind::AfterSnat) || !may_be_watched(at.skb) {
        return;
    }
    if begins(at.skb) {
        emit_hook(at, 0, 0, 0, kind);
    }
}

/// Whether the packet opens a connection to a watched port, or is the first datagram that TC saw of one.
///
/// A function of its own, as those below: what follows is then verified once, and not once for every kind of packet.
#[inline(never)]
fn begins(skb: u64) -> bool {
    let mut packet = Packet::blank();
    if !packet_of::<Typed>(skb, &mut packet) || !is_watched(packet.tuple.dport, packet.tuple.proto) {
        return false;
    }
    let is_first = |mut known: Known| known.role() == ROLE_OPENING && known.way().packets <= 1;
    packet.opens() || packet.tuple.proto == UDP && find(&Place::of(&packet.tuple)).is_some_and(is_first)
}

/// A packet of a watched entry: worth an event when it makes the entry, opens a connection, or is the first one seen.
#[inline(always)]
fn watched(at: &NfContext, ct: u64, info: u64, proto: u8, kind: Kind) {
    // An ICMP error about the connection carries its entry too.
    if info == RELATED || info == RELATED + REPLY {
        return;
    }
    let first_look = matches!(kind, Kind::AfterConntrack);
    let status = status_of::<Cast>(ct);
    let is_new = status & CONFIRMED == 0;
    let id = id_of(ct);
    if first_look && (is_new || info == NEW && Seen::of(id).is_passed_over()) {
        forget(id);
    }
    let opens_anew = |proto| proto == SCTP || proto == TCP && may_open(at.skb);
    if !is_new && (!first_look || Seen::of(id).is_watched()) && !opens_anew(proto) {
        return;
    }
    // Of the entry's tuples the one that has the packet's addresses, either way round.
    let direction = u64::from(info >= REPLY || matches!(kind, Kind::AfterSnat));
    let late = !is_new && !opens(at.skb);
    if late && !(first_look && is_unknown(ct, direction, id)) {
        if first_look {
            set_seen(id, Seen::watched(proto == UDP));
        }
        return;
    }
    emit_hook(at, ct, info, status, kind);
    // Between the two halves of NAT TC sees nothing.
    if matches!(kind, Kind::AfterConntrack | Kind::AfterSnat) {
        remember::<Cast>(ct, ROLE_OPENING | direction, direction, id);
    }
    if late {
        remember::<Cast>(ct, ROLE_OPENING | direction ^ 1, direction ^ 1, id);
    }
}

/// What is told of a call, so that two programs at one function do not tell it twice: bits that no address has.
const CONFIRM: u64 = 2;
const DELETE: u64 = 3;

/// `nf_nat_setup_info` begins: with `maniptype` SRC (0) the destination half is done and the tuples tell what it did.
///
/// `PAIRED`, here and below: two programs are at the function ([`is_taken_care_of`]).
#[inline(always)]
pub fn nat_setup<const PAIRED: bool>(ct: u64, maniptype: u32) {
    if !is_watched_here(ct) || PAIRED && is_taken_care_of(ct | u64::from(maniptype & 1), id_of(ct)) {
        return;
    }
    if maniptype == 0 {
        if status_of::<Untyped>(ct) & DST_NAT != 0 {
            emit_entry(Kind::NatSetup, ct, 0, 1);
        }
        remember::<Untyped>(ct, ROLE_REPLY, 1, id_of(ct));
    }
    remember::<Untyped>(ct, ROLE_OPENING, 0, id_of(ct));
}

/// `__nf_conntrack_confirm` begins: both halves of NAT are done.
#[inline(always)]
pub fn confirm<const PAIRED: bool>(skb: u64) {
    let (ct, info) = conntrack_of::<Untyped>(skb);
    if info >= REPLY {
        return;
    }
    if !is_watched_here(ct) {
        if ct != 0 && is_ephemeral_here(ct) {
            remember::<Untyped>(ct, ROLE_IGNORED, 0, 0);
        }
        return;
    }
    let status = status_of::<Untyped>(ct);
    if status & CONFIRMED != 0 || PAIRED && is_taken_care_of(ct | CONFIRM, id_of(ct)) {
        return;
    }
    if status & SRC_NAT != 0 {
        emit_entry(Kind::NatSetup, ct, 0, 0);
    }
    emit_entry(Kind::Confirmed, ct, skb, 0);
    remember::<Untyped>(ct, ROLE_OPENING, 0, id_of(ct));
    remember::<Untyped>(ct, ROLE_REPLY, 1, id_of(ct));
}

/// `nf_ct_delete` begins; it may be called for an entry that is already dying.
#[inline(always)]
pub fn destroy<const PAIRED: bool>(ct: u64) {
    if !is_watched_here(ct) || status_of::<Untyped>(ct) & (DYING | CONFIRMED) != CONFIRMED {
        return;
    }
    if PAIRED && is_taken_care_of(ct | DELETE, id_of(ct)) {
        return;
    }
    let Some(mut entry) = reserve::<Event>(Kind::Destroyed) else { return };
    let event = body(&mut entry);
    describe_conntrack::<Untyped>(event, ct, 0, status_of::<Untyped>(ct));
    let extensions: u64 = peek(ct + offset!(ct_ext));
    if extensions != 0 {
        let place: u8 = peek(extensions + offset!(ext_acct));
        if place != 0 {
            // struct nf_conn_acct: packets and bytes of the original direction, then of the reply.
            let counters: [u64; 4] = peek(extensions + u64::from(place));
            (event.head.orig_bytes, event.head.reply_bytes) = (counters[1], counters[3]);
        }
    }
    submit(entry);
}

/// Whether the entry is of a watched port and of this namespace.
#[inline(always)]
pub fn is_watched_here(ct: u64) -> bool {
    if ct == 0 {
        return false;
    }
    let ports = original_ports::<Untyped>(ct);
    is_watched(ports.dport, ports.proto) && conntrack_netns(ct) == netns()
}

/// Whether the entry's source port, but not its destination port, is a watched one.
#[inline(always)]
fn is_ephemeral_here(ct: u64) -> bool {
    let ports = original_ports::<Untyped>(ct);
    is_watched(ports.sport, ports.proto) && conntrack_netns(ct) == netns()
}

/// Whether TC has not yet been told that this tuple of the entry belongs to it.
#[inline(never)]
fn is_unknown(ct: u64, direction: u64, id: u64) -> bool {
    find(&Place::of(&tuple_of::<Cast>(ct, direction))).is_none_or(|known| known.ct_id() != id)
}

#[inline(never)]
fn opens(skb: u64) -> bool {
    let mut packet = Packet::blank();
    packet_of::<Typed>(skb, &mut packet) && packet.opens()
}

/// Fills in the packet's half of an event, if it can be read.
#[inline(never)]
fn describe(event: &mut Event, skb: u64) -> bool {
    let mut packet = Packet::blank();
    let is_read = packet_at_hook(skb, &mut packet);
    if is_read {
        describe_packet(&mut event.head, &packet);
    }
    is_read
}

/// Tracks one of the entry's own tuples and its inverse. With `ROLE_IGNORED`: the watched port is only the connection's
/// source port, and its replies must not look as if they opened one.
#[inline(never)]
fn remember<A: Access>(ct: u64, role: u64, direction: u64, id: u64) {
    track(&tuple_of::<A>(ct, direction), role, id);
}

#[inline(always)]
fn emit_hook(at: &NfContext, ct: u64, info: u64, status: u32, kind: Kind) {
    let NfContext { state, skb } = *at;
    let Some(mut entry) = reserve::<Event>(kind) else { return };
    let event = body(&mut entry);
    if !describe(event, skb) {
        entry.discard(0);
        return;
    }
    if ct != 0 {
        describe_conntrack::<Cast>(event, ct, info, status);
    }
    event.head.mark = Typed::read(skb + offset!(skb_mark));
    event.head.hook = Typed::read(state + offset!(state_hook));
    // Not as typed pointers: for each of those the verifier searches all of the kernel's types for one of another name
    // (`btf_nested_type_is_trusted`, kernel/bpf/btf.c), every time it comes by.
    let [from, to]: [u64; 2] = Cast::read(state + offset!(state_in));
    (event.head.ifindex, event.head.out_ifindex) = (ifindex_of::<Cast>(from), ifindex_of::<Cast>(to));
    // Before, there is no route yet, or one that DNAT may change.
    if matches!(kind, Kind::LocalIn | Kind::AfterSnat) {
        describe_route::<Typed, Cast>(event, skb);
    }
    submit(entry);
}

/// An event of a kprobe; `skb` is 0 where the function has none.
#[inline(always)]
fn emit_entry(kind: Kind, ct: u64, skb: u64, reason: u32) {
    let Some(mut entry) = reserve::<Event>(kind) else { return };
    let event = body(&mut entry);
    describe_conntrack::<Untyped>(event, ct, 0, status_of::<Untyped>(ct));
    event.head.reason = reason;
    if skb != 0 {
        let mut packet = Packet::blank();
        if packet_of::<Untyped>(skb, &mut packet) {
            describe_packet(&mut event.head, &packet);
            describe_route::<Untyped, Untyped>(event, skb);
        }
        event.head.mark = peek(skb + offset!(skb_mark));
    }
    submit(entry);
}
