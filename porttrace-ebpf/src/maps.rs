//! Maps and load-time constants.

use crate::packet::Packet;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf};
use porttrace_ebpf::table::{Bucket, Index, Known, Place, Slots, Way};
use porttrace_ebpf::{Offsets, PORT_TRACKED, PORTS_ARE_KNOWN, Predicted, ROLE_IGNORED, WireTuple};

/// Events to user space; the loader sets the size.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(8 << 20, 0);

/// Watched connections; the loader sets the number of buckets. User space writes to both parts too.
#[map]
static TRACKED: Array<Index> = Array::with_max_entries(4096, BPF_F_MMAPABLE);
#[map]
static SLOTS: Array<Slots> = Array::with_max_entries(4096, BPF_F_MMAPABLE);

/// One less than the number of buckets.
#[unsafe(no_mangle)]
static TRACKED_MASK: u32 = 0;

/// `PORT_*` bits for each port; filled in when everything is attached. User space sets some later too.
#[map]
static PORTS: Array<[u8; 65_536]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Events for which the ring buffer had no room.
#[map]
static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Addresses that the rules may rewrite watched connections to, for conntrack backends that learn of a rewrite only later.
#[map]
static PREDICTED: HashMap<Predicted, u8> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// Where TC programs parse a packet and the packet that it quotes. TC runs with softirqs off, so one CPU is in one TC program
/// at a time; the other programs have no such promise and use their stack.
#[map]
pub static SCRATCH: PerCpuArray<[Packet; 2]> = PerCpuArray::with_max_entries(1, 0);

/// What is known of conntrack entries ([`Seen`], turned into their identities' bits), at places that follow from the identities. A
/// packet of such an entry needs no closer look. Another entry may take the place, and then the look is taken once more.
#[map]
static SEEN: Array<u64> = Array::with_max_entries(SEEN_PLACES, 0);

const SEEN_PLACES: u32 = 1 << 14;

/// Calls of conntrack's functions that one of a pair of programs has taken care of; see [`is_taken_care_of`].
#[map]
static CALLS: PerCpuArray<[u64; CALLS_PLACES]> = PerCpuArray::with_max_entries(1, 0);

const CALLS_PLACES: usize = 64;

#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::ZERO;

/// Inode number of the network namespace that is watched.
#[unsafe(no_mangle)]
static NETNS: u32 = 0;

/// 1 where the tracepoint `tcp_send_reset` has a third argument, the reason (Linux 6.11).
#[unsafe(no_mangle)]
static RESET_HAS_REASON: u32 = 0;

/// `SKB_DROP_REASON_QUEUE_PURGE`: a socket that closes frees what was delivered to it. `u32::MAX` where the
/// kernel has no such reason, so that one comparison is enough: every other one doubles what the verifier has to walk.
#[unsafe(no_mangle)]
static QUEUE_PURGE: u32 = u32::MAX;

/// The reader is woken when so many more bytes (a power of two) wait for it.
#[unsafe(no_mangle)]
static WAKE_BYTES: u32 = 0;

/// 1: packets with payload of open TCP connections are shown too, the first few of each.
#[unsafe(no_mangle)]
static SHOW_DATA: u32 = 1;

/// The offset of one member, a constant to the verifier because the section is frozen before programs are loaded.
macro_rules! offset {
    ($member:ident) => {
        u64::from($crate::maps::load(unsafe { &raw const (*$crate::maps::offsets()).$member }))
    };
}
pub(crate) use offset;

/// 1 when map `PREDICTED` is in use.
#[unsafe(no_mangle)]
static PREDICTS: u32 = 0;

#[inline(always)]
pub fn offsets() -> *const Offsets {
    &raw const OFFSETS
}

/// Volatile, so that the compiler does not fold the value that the loader replaces.
#[inline(always)]
pub fn load(word: *const u32) -> u32 {
    unsafe { core::ptr::read_volatile(word) }
}

#[inline(always)]
pub fn netns() -> u32 {
    load(&raw const NETNS)
}

#[inline(always)]
pub fn queue_purge() -> u32 {
    load(&raw const QUEUE_PURGE)
}

#[inline(always)]
pub fn wake_bytes() -> u32 {
    load(&raw const WAKE_BYTES)
}

#[inline(always)]
pub fn shows_data() -> bool {
    load(&raw const SHOW_DATA) != 0
}

/// What is known of a conntrack entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Seen(u64);

impl Seen {
    /// Nobody watches it.
    const PASSED_OVER: Self = Self(!0);

    /// It is watched, and TC knows it; packets of one that is not of `datagrams` may open a connection anew.
    #[inline(always)]
    pub fn watched(datagrams: bool) -> Self {
        Self(u64::from(datagrams))
    }

    #[inline(always)]
    pub fn of(ct_id: u64) -> Self {
        Self(SEEN.get(seen_place(ct_id)).map_or(2, |seen| *seen ^ ct_id))
    }

    #[inline(always)]
    pub fn is_watched(self) -> bool {
        self.0 <= 1
    }

    #[inline(always)]
    pub fn is_passed_over(self) -> bool {
        self == Self::PASSED_OVER
    }
}

#[inline(always)]
pub fn set_seen(ct_id: u64, seen: Seen) {
    write_seen(ct_id, ct_id ^ seen.0);
}

#[inline(always)]
pub fn pass_over(ct_id: u64) {
    if port_bits([0; 2]) & PORTS_ARE_KNOWN != 0 {
        set_seen(ct_id, Seen::PASSED_OVER);
    }
}

/// The entry is another connection's now.
#[inline(always)]
pub fn forget(ct_id: u64) {
    write_seen(ct_id, 0);
}

#[inline(always)]
fn write_seen(ct_id: u64, value: u64) {
    if let Some(seen) = SEEN.get_ptr_mut(seen_place(ct_id)) {
        unsafe { *seen = value };
    }
}

/// The upper bits: identities are products, their lower bits are alike.
#[inline(always)]
fn seen_place(ct_id: u64) -> u32 {
    (ct_id >> (64 - SEEN_PLACES.ilog2())) as u32
}

/// Of a pair of programs at one function: whether the other one has already taken care of this call, which is then forgotten. Else
/// the caller is to.
///
/// The kernel leaves a program out where it is running on that CPU already (`__bpf_prog_enter_recur` in kernel/bpf/trampoline.c): a
/// task opens a connection, an interrupt brings another one's first packet. Of two programs it leaves out one then, whichever
/// was interrupted, and the other one takes care of the packet that came. Three deep is nobody without a preemptible kernel.
///
/// `call`: an address, with lowest bits that tell the function. After a call that came to one program only, its address stays
/// behind; the next call with it turns that round, and still is taken care of once.
#[inline(always)]
pub fn is_taken_care_of(call: u64, ct_id: u64) -> bool {
    let Some(calls) = CALLS.get_ptr_mut(0) else { return false };
    // The upper bits, as above.
    let place = (ct_id >> (64 - CALLS_PLACES.ilog2())) as usize;
    // SAFETY: a CPU's own; a softirq that comes between is another call's.
    let last = unsafe { &mut (*calls)[place % CALLS_PLACES] };
    let is_done = *last == call;
    *last = if is_done { 0 } else { call };
    is_done
}

#[inline(always)]
pub fn reset_has_reason() -> bool {
    load(&raw const RESET_HAS_REASON) != 0
}

/// Whether the rules may rewrite a watched connection to this tuple's destination.
#[inline(always)]
pub fn is_predicted(tuple: &WireTuple) -> bool {
    if load(&raw const PREDICTS) == 0 {
        return false;
    }
    let key = Predicted { address: tuple.dst, port: tuple.dport, proto: tuple.proto, family: tuple.family };
    PREDICTED.get_ptr(&key).is_some()
}

#[inline(always)]
pub fn port_bits(port: [u8; 2]) -> u8 {
    match PORTS.get_ptr(0) {
        Some(ports) => unsafe { *ports.cast::<u8>().add(place(port)) },
        None => 0,
    }
}

/// Sets [`PORT_TRACKED`]; it is never cleared, a stale bit costs one look-up a packet.
#[inline(always)]
pub fn mark_port(port: [u8; 2]) {
    if let Some(ports) = PORTS.get_ptr_mut(0) {
        let byte = unsafe { ports.cast::<u8>().add(place(port)) };
        // Written only where it changes something: all packets read these lines, on all CPUs.
        unsafe {
            if *byte & PORT_TRACKED == 0 {
                *byte |= PORT_TRACKED;
            }
        }
    }
}

/// Where a port's bits are. Read back from the stack as 16 bits: the verifier of Linux 6.1 does not know that a byte swap of
/// 16 bits leaves less than 65,536 (`BPF_END` in `adjust_scalar_min_max_vals`, kernel/bpf/verifier.c, sets no bounds).
#[inline(always)]
fn place(port: [u8; 2]) -> usize {
    let place = u16::from_be_bytes(port);
    usize::from(unsafe { core::ptr::read_volatile(&raw const place) })
}

#[inline(always)]
pub fn count_lost() {
    if let Some(counter) = LOST.get_ptr_mut(0) {
        // The counter is this CPU's own, but a softirq may come between its reading and writing.
        add(unsafe { &mut *counter }, 1);
    }
}

/// Adds atomically.
#[inline(always)]
pub fn add(counter: &mut u64, amount: u64) {
    // SAFETY: one aligned word of a map value. core has no fetch_add for this target.
    unsafe { core::arch::asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) amount) };
}

/// Where tuples are remembered.
#[inline(always)]
fn bucket_of(place: &Place) -> Option<Bucket> {
    let number = place.bucket(load(&raw const TRACKED_MASK));
    Some(Bucket { index: TRACKED.get_ptr_mut(number)?, slots: SLOTS.get_ptr_mut(number)? })
}

/// What is remembered at a place.
#[inline(always)]
pub fn find(place: &Place) -> Option<Known> {
    // SAFETY: the elements of an array stay where they are.
    unsafe { place.find(bucket_of(place)?) }
}

/// Remembers that `tuple`, with `role`, and its inverse belong to a watched connection (or, with `ROLE_IGNORED`, do not).
/// `first`: what TC saw of its way.
#[inline(always)]
pub fn insert(place: &Place, tuple: &WireTuple, role: u64, ct_id: u64, first: Option<Way>) {
    // Packets of an ignored connection have the watched port anyway.
    if role < ROLE_IGNORED {
        mark_port(if role & 1 == 0 { tuple.dport } else { tuple.sport });
    }
    if let Some(bucket) = bucket_of(place) {
        // SAFETY: as above.
        unsafe { place.insert(bucket, role, ct_id, first) };
    }
}

/// Remembers it whether or not it was known; a function of its own: inlined, its copies would not fit on a program's 512 bytes of
/// stack.
#[inline(never)]
pub fn track(tuple: &WireTuple, role: u64, ct_id: u64) {
    let place = Place::of(tuple);
    let Some(known) = find(&place) else {
        return insert(&place, tuple, role, ct_id, None);
    };
    known.set_role(role);
    if ct_id != 0 {
        known.set_ct_id(ct_id);
    }
}
