//! Ring-buffer records.

use crate::maps::{EVENTS, count, netns, wake_bytes};
use crate::packet::Packet;
use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::maps::ring_buf::RingBufEntry;
use porttrace_ebpf::machine::clear;
use porttrace_ebpf::{Event, HAS_PACKET, Kind, STAT_EMITTED, STAT_LOST_RING, WIRE_VERSION};

/// What an event takes in the ring buffer, its header included.
const RECORD: u64 = size_of::<Event>() as u64 + 8;

/// A zeroed record with kind, time and namespace set; what does not fit is counted.
#[inline(always)]
pub fn reserve(kind: Kind) -> Option<RingBufEntry<Event>> {
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        count(STAT_LOST_RING);
        return None;
    };
    // SAFETY: the record is of this size.
    unsafe { clear::<{ size_of::<Event>() / 8 }>(entry.as_mut_ptr().cast()) };
    let event = body(&mut entry);
    event.time_ns = unsafe { bpf_ktime_get_ns() };
    event.kind = kind as u8;
    event.version = WIRE_VERSION;
    event.netns = netns();
    Some(entry)
}

/// Hands a record over. The reader looks by itself every few milliseconds, and waking it costs more than all the rest of an
/// event: it is woken only when the buffer fills.
#[inline(always)]
pub fn submit(entry: RingBufEntry<Event>) {
    count(STAT_EMITTED);
    let waiting = EVENTS.query(u64::from(BPF_RB_AVAIL_DATA));
    let passed = waiting & u64::from(wake_bytes().wrapping_sub(1)) < RECORD;
    entry.submit(u64::from(if passed { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP }));
}

#[inline(always)]
pub fn body(entry: &mut RingBufEntry<Event>) -> &mut Event {
    // SAFETY: `reserve` zeroed it and all-zero is a value of every field.
    unsafe { entry.assume_init_mut() }
}

#[inline(always)]
pub fn describe_packet(event: &mut Event, packet: &Packet) {
    event.packet = packet.tuple;
    event.flags |= HAS_PACKET;
    event.length = packet.length;
    event.payload = packet.payload;
    event.tcp_seq = packet.seq;
    event.tcp_ack = packet.ack;
    event.l4_flags = packet.l4_flags;
    event.ttl = packet.ttl;
    event.icmp_type = packet.icmp_type;
    event.icmp_code = packet.icmp_code;
}
