//! The table of watched connections, which programs on all CPUs and user space read and write at once: buckets of a few slots, in
//! BPF arrays. An insertion takes the place of what was not looked up for longest, about so: each bucket has a hand that goes round
//! its slots and passes over, once, those that were looked up since it came by.
//!
//! The kernel's own LRU hash takes some 500 ns for an insertion, and a call for a look-up. Here both are some dozen instructions,
//! which neither refuse nor wait; what they take is mostly the way of memory to the CPU. So what is read to find a slot lies apart,
//! in an array small enough for the CPU's caches; a slot itself is only written to by an insertion, for which nobody waits. In
//! return it is in each bucket for itself that the oldest goes.
//!
//! Nobody locks. Two insertions never take one slot, since the hand moves atomically; a slot that is being written has no tag.
//! Who still holds a slot that is given to another connection counts a packet for that one: as with the kernel's LRU hash.

use crate::machine::{clear, fetch_add, opaque};
use crate::{ROLE_IGNORED, WireTuple};
use core::ptr::{addr_of, addr_of_mut};

/// Slots of a bucket.
pub const WAYS: usize = 8;

/// What the kernel side knows of a watched connection as it looks at one place.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Track {
    /// As [`crate::Event::ct_id`]; 0 until a conntrack hook has seen the connection.
    pub ct_id: u64,
    /// A `ROLE_*`: that of way 0. The other one's is the same with its lowest bit turned.
    pub role: u64,
    pub ways: [Way; 2],
}

/// What TC saw of one way of a [`Track`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// When TC last saw a datagram, `bpf_ktime_get_coarse_ns`; 0 for other protocols.
    pub last_ns: u64,
    /// How many packets there were at the interface `ifindex`, as far as anybody asks: 0, 1, or 3 for more.
    pub packets: u64,
    /// Of L4 payload, at that interface.
    pub bytes: u64,
    /// The interface that counts: the first one at which TC saw the tuple; 0: none yet.
    pub ifindex: u32,
    /// [`crate::Kind::TcIngress`] or [`crate::Kind::TcEgress`]: on which side of the interface is counted.
    pub side: u16,
    /// Packets with payload that were shown to user space since the connection began (or woke up).
    pub shown: u16,
}

/// A tuple and its inverse in one: the words of the tuple whose source comes first, in some order.
type Key = [u64; 5];

/// Two cache lines.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    key: Key,
    track: Track,
}

/// An element of map `TRACKED`: what a bucket's slots are looked for by. All-zero is an empty bucket's.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Index {
    /// For each slot some bits of its key's hash; 0: nothing is there.
    tags: [u32; WAYS],
    /// A bit for each slot: looked up since the hand came by.
    used: u64,
    /// Counts up; the slot where the next insertion begins to look is its remainder.
    hand: u64,
}

/// An element of map `SLOTS`: what the [`Index`] with the same number leads to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Slots([Slot; WAYS]);

/// A bucket's two parts.
#[derive(Clone, Copy)]
pub struct Bucket {
    pub index: *mut Index,
    pub slots: *mut Slots,
}

/// Where a tuple and its inverse are remembered.
pub struct Place {
    key: Key,
    hash: u64,
    /// Which of the two the tuple is.
    way: u64,
}

impl Place {
    #[inline(always)]
    pub fn of(tuple: &WireTuple) -> Self {
        let (key, way) = undirected(tuple.words());
        let hash = hash(&key);
        Self { key, hash, way }
    }

    /// Number of the bucket, in a table whose number of buckets is a power of two, at most 65,536: one more than `mask`.
    #[inline(always)]
    pub const fn bucket(&self, mask: u32) -> u32 {
        (self.hash >> 48) as u32 & mask
    }

    /// Never 0.
    #[inline(always)]
    const fn tag(&self) -> u32 {
        self.hash as u32 | 1
    }

    /// What is remembered there.
    ///
    /// # Safety
    /// `bucket` points to the parts of a bucket, which live as long as the answer is used.
    #[inline(always)]
    pub unsafe fn find(&self, bucket: Bucket) -> Option<Known> {
        // SAFETY: it is the caller's promise.
        let tags = unsafe { addr_of!((*bucket.index).tags).cast::<[u64; WAYS / 2]>().read_volatile() };
        // The slots are other cache lines.
        let number = first_of(tags, self.tag())?;
        // SAFETY: as above, and the slot is one of the bucket's.
        let (track, key) = unsafe {
            let slot = addr_of_mut!((*bucket.slots).0[number as usize]);
            (addr_of_mut!((*slot).track), addr_of!((*slot).key).read())
        };
        if !is_same(&key, &self.key) {
            return None;
        }
        let bit = 1 << number;
        // SAFETY: as above. Written only where it changes something: the line is read by all CPUs.
        unsafe {
            let used = addr_of_mut!((*bucket.index).used);
            if used.read() & bit == 0 {
                used.write(used.read() | bit);
            }
        }
        Some(Known { track, way: self.way })
    }

    /// Remembers that the tuple, with `role`, and its inverse belong to a watched connection (or, with `ROLE_IGNORED`, do not).
    /// `first`: what TC saw of the tuple's way.
    ///
    /// # Safety
    /// As [`Self::find`].
    #[inline(always)]
    pub unsafe fn insert(&self, bucket: Bucket, role: u64, ct_id: u64, first: Option<Way>) {
        // SAFETY: the parts of a bucket are there, and a number below `WAYS` is one of its slots'.
        unsafe {
            let number = take_slot(bucket.index);
            let tag = addr_of_mut!((*bucket.index).tags[number as usize]);
            let slot = addr_of_mut!((*bucket.slots).0[number as usize]);
            tag.write_volatile(0);
            let track = addr_of_mut!((*slot).track);
            addr_of_mut!((*slot).key).write(self.key);
            addr_of_mut!((*track).ct_id).write(ct_id);
            addr_of_mut!((*track).role).write(role ^ self.way);
            let ways = addr_of_mut!((*track).ways).cast::<Way>();
            clear(ways.cast(), size_of::<[Way; 2]>() / 8);
            if let Some(first) = first {
                ways.add((self.way & 1) as usize).write(first);
            }
            publish(tag, self.tag());
        }
    }
}

/// The slot that an insertion is to fill. Passes over those that were looked up, which are then to be looked up again.
///
/// # Safety
/// `index` points to a bucket's.
#[inline(always)]
unsafe fn take_slot(index: *mut Index) -> u64 {
    // SAFETY: it is the caller's promise.
    let (used, hand) = unsafe { (addr_of_mut!((*index).used), addr_of_mut!((*index).hand)) };
    // SAFETY: as above.
    let (looked_up, begin) = unsafe { (used.read() & SLOTS, hand.read() % WAYS as u64) };
    // Bits in the order in which the hand comes by. Not quite once round: where the last insertion went, which nobody may have looked
    // up yet, is left alone. When all others were looked up it is the first one's turn, and the hand is behind it again.
    let others = SLOTS >> 1;
    let turned = looked_up >> begin | looked_up << (WAYS as u64 - begin);
    let free = !turned & others;
    let passed = lowest(free) | free.wrapping_sub(1) >> 63 << 3;
    let cleared = ((1 << passed) - 1) & others;
    let cleared = cleared << begin | cleared >> (WAYS as u64 - begin);
    // SAFETY: as above. Should another insertion move the hand meanwhile, then nobody looked whether this one's slot was used.
    unsafe {
        if cleared != 0 {
            used.write(used.read() & !cleared);
        }
        (fetch_add(hand, passed + 1) + passed) & (WAYS as u64 - 1)
    }
}

/// What is remembered of a packet's connection.
pub struct Known {
    track: *mut Track,
    /// Which of its ways the packet goes.
    way: u64,
}

impl Known {
    /// A `ROLE_*`: the packet's.
    #[inline(always)]
    pub fn role(&self) -> u64 {
        unsafe { (*self.track).role ^ self.way }
    }

    #[inline(always)]
    pub fn set_role(&self, role: u64) {
        unsafe { (*self.track).role = role ^ self.way };
    }

    #[inline(always)]
    pub fn is_ignored(&self) -> bool {
        self.role() >= ROLE_IGNORED
    }

    #[inline(always)]
    pub fn ct_id(&self) -> u64 {
        unsafe { (*self.track).ct_id }
    }

    #[inline(always)]
    pub fn set_ct_id(&self, ct_id: u64) {
        unsafe { (*self.track).ct_id = ct_id };
    }

    /// The packet's way.
    #[inline(always)]
    pub fn way(&mut self) -> &mut Way {
        // SAFETY: the value of a map lives as long as the program runs; a way is 0 or 1.
        unsafe { &mut (*self.track).ways[(self.way & 1) as usize] }
    }

    /// The way of its answers.
    #[inline(always)]
    pub fn back(&mut self) -> &mut Way {
        // SAFETY: as above.
        unsafe { &mut (*self.track).ways[(self.way & 1 ^ 1) as usize] }
    }
}

/// What a tuple and its inverse have in common, and which of the two this one is (0 or 1): the end whose address is less, taken as
/// words of memory, comes first; at one address the end with the lesser port.
///
/// Without a branch: the verifier would walk all that follows once for either way.
#[inline(always)]
fn undirected([a, b, c, d, rest]: Key) -> (Key, u64) {
    // Source address, destination address; source port, destination port, what both ways share.
    let (sport, dport) = (rest & 0xffff, rest >> 16 & 0xffff);
    let way = borrow(c, a, borrow(d, b, borrow(dport, sport, 0)));
    // All ones where the ends change places: what differs between them then turns.
    let turn = opaque(way.wrapping_neg());
    let (upper, lower, ports) = ((a ^ c) & turn, (b ^ d) & turn, (sport ^ dport) & turn);
    ([a ^ upper, b ^ lower, c ^ upper, d ^ lower, rest ^ ports ^ ports << 16], way)
}

/// 1 when `a - b - carry` (a carry of 0 or 1) is less than nothing.
#[inline(always)]
const fn borrow(a: u64, b: u64, carry: u64) -> u64 {
    let rest = a.wrapping_sub(b).wrapping_sub(carry);
    ((!a & b) | ((!a | b) & rest)) >> 63
}

/// Addresses and ports times odd numbers, so that what differs in a few bits differs in the upper ones; then mixed once more.
#[inline(always)]
const fn hash([a, b, c, d, rest]: &Key) -> u64 {
    let sum = a
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(b.wrapping_mul(0xc2b2_ae3d_27d4_eb4f))
        .wrapping_add(c.wrapping_mul(0xd6e8_feb8_6659_fd93))
        .wrapping_add(d.wrapping_mul(0xa076_1d64_78bd_642f))
        .wrapping_add(rest.wrapping_mul(0xe703_7ed1_a0b4_28db));
    (sum ^ sum >> 32).wrapping_mul(0x8ebc_6af0_9c88_c6e3)
}

/// Of the slots with this tag the first one's number. Without a branch for each: the verifier would walk all that follows once a slot.
#[inline(always)]
fn first_of(tags: [u64; WAYS / 2], tag: u32) -> Option<u64> {
    const ONES: u64 = 0x0000_0001_0000_0001;
    let tag = ONES * u64::from(tag);
    let mut found = 0;
    for (pair, both) in tags.into_iter().enumerate() {
        // The uppermost bit of each half that is the tag; that of the upper one may be wrong where the lower one is.
        let same = both ^ tag;
        let same = same.wrapping_sub(ONES) & !same & ONES << 31;
        found |= (same >> 31 | same >> 62) << (2 * pair);
    }
    // The upper halves' bits are also where the first shift left them.
    let found = found & SLOTS;
    if found == 0 {
        return None;
    }
    // The verifier does not know that it is no more.
    Some(opaque(lowest(found)) & (WAYS as u64 - 1))
}

/// A bit for each slot.
const SLOTS: u64 = (1 << WAYS) - 1;

/// The number of the lowest of eight bits that is set; 0 where none is. What the compiler makes of `trailing_zeros` looks it up in
/// memory.
#[inline(always)]
const fn lowest(bits: u64) -> u64 {
    // Of a de Bruijn sequence the three bits that the lowest one moves to the front, and which one moves which.
    const SEQUENCE: u64 = 0b0001_0111;
    const MOVED_BY: u64 = 0x5637_4210;
    let front = ((bits & bits.wrapping_neg()) * SEQUENCE) >> 5 & 7;
    MOVED_BY >> (4 * front) & 7
}

/// Without a branch for each word.
#[inline(always)]
fn is_same(one: &Key, other: &Key) -> bool {
    let ([a, b, c, d, e], [f, g, h, i, j]) = (one, other);
    opaque((a ^ f) | (b ^ g) | (c ^ h) | (d ^ i) | (e ^ j)) == 0
}

/// Writes the tag when the slot is written. The kernel side leaves the order to the compiler, which keeps it, and to the packet's own way
/// from one CPU to another: until then nobody else looks for this key.
///
/// # Safety
/// `tag` points to an aligned tag.
#[inline(always)]
unsafe fn publish(tag: *mut u32, value: u32) {
    #[cfg(not(target_arch = "bpf"))]
    core::sync::atomic::fence(core::sync::atomic::Ordering::Release);
    // SAFETY: it is the caller's promise.
    unsafe { tag.write_volatile(value) };
}

const _: () = assert!(size_of::<Track>() == 80);
const _: () = assert!(size_of::<Slot>() == 128);
const _: () = assert!(size_of::<Index>() == 64);
const _: () = assert!(size_of::<Slots>() == WAYS * 128);
