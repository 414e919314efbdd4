//! Ring-buffer records.

use crate::maps::{EVENTS, count_lost, netns, wake_bytes};
use crate::packet::Packet;
use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::maps::ring_buf::RingBufEntry;
use porttrace_ebpf::machine::clear;
use porttrace_ebpf::{Event, HAS_PACKET, Head, Kind, WIRE_VERSION};

/// What a record consists of.
pub trait Record: 'static {
    fn head(&mut self) -> &mut Head;
}

impl Record for Event {
    #[inline(always)]
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

impl Record for Head {
    #[inline(always)]
    fn head(&mut self) -> &mut Head {
        self
    }
}

/// A zeroed record with kind, time and namespace set; what does not fit is counted.
#[inline(always)]
pub fn reserve<R: Record>(kind: Kind) -> Option<RingBufEntry<R>> {
    let Some(mut entry) = EVENTS.reserve::<R>(0) else {
        count_lost();
        return None;
    };
    // SAFETY: the record is of this size.
    unsafe { clear(entry.as_mut_ptr().cast(), size_of::<R>() / 8) };
    let head = body(&mut entry).head();
    // Here and not before: a look at the clock waits for what is read before it.
    head.time_ns = unsafe { bpf_ktime_get_ns() };
    head.kind = kind as u8;
    head.version = WIRE_VERSION;
    head.netns = netns();
    Some(entry)
}

/// Hands a record over. The reader looks by itself every few milliseconds, and waking it costs more than all the rest of an
/// event: it is woken only when the buffer fills.
#[inline(always)]
pub fn submit<R: Record>(entry: RingBufEntry<R>) {
    let waiting = EVENTS.query(u64::from(BPF_RB_AVAIL_DATA));
    // What the record takes, its own header included.
    let bytes = size_of::<R>() as u64 + 8;
    let passed = waiting & u64::from(wake_bytes().wrapping_sub(1)) < bytes;
    entry.submit(u64::from(if passed { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP }));
}

#[inline(always)]
pub fn body<R: Record>(entry: &mut RingBufEntry<R>) -> &mut R {
    // SAFETY: `reserve` zeroed it and all-zero is a value of every field.
    unsafe { entry.assume_init_mut() }
}

#[inline(always)]
pub fn describe_packet(head: &mut Head, packet: &Packet) {
    head.packet = packet.tuple;
    head.flags |= HAS_PACKET;
    head.length = packet.length;
    head.payload = packet.payload;
    head.tcp_seq = packet.seq;
    head.tcp_ack = packet.ack;
    head.l4_flags = packet.l4_flags;
    head.ttl = packet.ttl;
    head.icmp_type = packet.icmp_type;
    head.icmp_code = packet.icmp_code;
}
