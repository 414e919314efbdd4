//! The kernel side's table of watched connections, written to from here.

use super::mapping::Mapping;
use super::{ProbeError, wire_tuple};
use crate::core::model::flow::Tuple;
use aya::maps::MapData;
use nix::sys::mman::ProtFlags;
use porttrace_ebpf::table::{Bucket, Index, Place, Slots, WAYS};

/// Number of buckets for so many tuples: a power of two.
pub const fn buckets_for(tuples: u32) -> u32 {
    let buckets = tuples.div_ceil(WAYS as u32).next_power_of_two();
    if buckets > MOST_BUCKETS { MOST_BUCKETS } else { buckets }
}

/// As [`Place::bucket`] says.
const MOST_BUCKETS: u32 = 1 << 16;

/// Maps `TRACKED` and `SLOTS`.
pub struct Tracked {
    index: Mapping,
    slots: Mapping,
    /// Their number.
    count: u32,
}

impl Tracked {
    /// Of so many buckets.
    pub fn of(index: &MapData, slots: &MapData, count: u32) -> Result<Self, ProbeError> {
        let mapped = |map, size: usize| {
            Mapping::of(map, count as usize * size, 0, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
                .map_err(|error| ProbeError::Io { what: "mapping the table of connections", error })
        };
        Ok(Self { index: mapped(index, size_of::<Index>())?, slots: mapped(slots, size_of::<Slots>())?, count })
    }

    /// Gives a tuple this role, and its inverse the other one. Keeps what was counted.
    pub fn set_role(&self, tuple: &Tuple, role: u64) {
        let place = Place::of(&wire_tuple(tuple));
        let number = place.bucket(self.count - 1) as usize;
        // SAFETY: the bucket is one of those that are mapped, and stays so until this is dropped.
        unsafe {
            let bucket = Bucket {
                index: self.index.start::<Index>().as_ptr().add(number),
                slots: self.slots.start::<Slots>().as_ptr().add(number),
            };
            match place.find(bucket) {
                Some(known) => known.set_role(role),
                None => place.insert(bucket, role, 0, None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use porttrace_ebpf::{ROLE_OPENING, ROLE_REPLY, WireTuple};
    use proptest::prelude::*;
    use std::thread;

    #[derive(Default)]
    struct Parts {
        index: Index,
        slots: Slots,
    }

    impl Parts {
        /// Good as long as these are not moved.
        fn bucket(&mut self) -> Bucket {
            Bucket { index: &raw mut self.index, slots: &raw mut self.slots }
        }
    }

    /// A connection that is told from others by `number`.
    fn tuple(number: u32) -> WireTuple {
        WireTuple::v4(0x0100_000a, 0x0200_000a + (number >> 16), number << 16 | 0x5000, 6)
    }

    fn inverse(of: WireTuple) -> WireTuple {
        WireTuple { src: of.dst, dst: of.src, sport: of.dport, dport: of.sport, ..of }
    }

    /// What is found, as identity and role.
    fn find(bucket: Bucket, tuple: &WireTuple) -> Option<(u64, u64)> {
        // SAFETY: the bucket's parts outlive the call.
        unsafe { Place::of(tuple).find(bucket) }.map(|known| (known.ct_id(), known.role()))
    }

    fn insert(bucket: Bucket, number: u32) {
        // SAFETY: as above.
        unsafe { Place::of(&tuple(number)).insert(bucket, ROLE_OPENING, number.into(), None) };
    }

    /// Few values, so that ends are often equal in part.
    fn end() -> impl Strategy<Value = ([u8; 16], [u8; 2])> {
        let byte = prop_oneof![Just(0), Just(1), Just(0x7f), Just(0x80), Just(0xff)];
        let address = (byte.clone(), byte.clone(), byte.clone()).prop_map(|(first, middle, last)| {
            let mut address = [0; 16];
            (address[0], address[7], address[15]) = (first, middle, last);
            address
        });
        (address, [byte.clone(), byte])
    }

    proptest! {
        #[test]
        fn a_tuple_and_its_inverse_differ_in_their_role_alone(here in end(), there in end(), proto in 1u8..3) {
            let from = WireTuple { src: here.0, sport: here.1, dst: there.0, dport: there.1, proto, family: 6, pad: [0; 2] };
            let mut parts = Parts::default();
            let bucket = parts.bucket();
            let other = WireTuple { proto: 3, ..from };
            // SAFETY: the bucket's parts outlive the call.
            unsafe { Place::of(&from).insert(bucket, ROLE_OPENING, 7, None) };
            prop_assert_eq!(find(bucket, &from), Some((7, ROLE_OPENING)));
            let back = if here == there { ROLE_OPENING } else { ROLE_REPLY };
            prop_assert_eq!(find(bucket, &inverse(from)), Some((7, back)));
            prop_assert_eq!(find(bucket, &other), None);
            prop_assert_eq!(Place::of(&from).bucket(0xffff), Place::of(&inverse(from)).bucket(0xffff));
        }
    }

    #[test]
    fn a_bucket_holds_as_many_as_it_has_slots_and_forgets_the_oldest() {
        let mut parts = Parts::default();
        let bucket = parts.bucket();
        let slots = WAYS as u32;
        (0..slots).for_each(|number| insert(bucket, number));
        insert(bucket, slots);
        assert_eq!(find(bucket, &tuple(0)), None);
        for number in 1..=slots {
            assert_eq!(find(bucket, &tuple(number)), Some((number.into(), ROLE_OPENING)), "{number}");
        }
    }

    #[test]
    fn each_is_told_from_those_beside_it() {
        for first in (0..200_000).step_by(WAYS) {
            let mut parts = Parts::default();
            let bucket = parts.bucket();
            let numbers = first..first + WAYS as u32;
            numbers.clone().for_each(|number| insert(bucket, number));
            for number in numbers {
                assert_eq!(find(bucket, &tuple(number)), Some((number.into(), ROLE_OPENING)), "{number}");
            }
        }
    }

    #[test]
    fn what_is_looked_up_stays() {
        let mut parts = Parts::default();
        let bucket = parts.bucket();
        insert(bucket, 0);
        for number in 1..1000 {
            assert!(find(bucket, &tuple(0)).is_some(), "forgotten after {number}");
            insert(bucket, number);
        }
    }

    #[test]
    fn the_newest_stay_where_all_are_looked_up() {
        let mut parts = Parts::default();
        let bucket = parts.bucket();
        for number in 0..1000u32 {
            insert(bucket, number);
            for newest in number.saturating_sub(4)..=number {
                assert!(find(bucket, &tuple(newest)).is_some(), "{newest} forgotten after {number}");
            }
        }
    }

    #[test]
    fn an_insertion_does_not_take_the_place_of_the_last_one() {
        let mut parts = Parts::default();
        let bucket = parts.bucket();
        for number in 0..1000u32 {
            // All but the last one are looked up.
            for older in number.saturating_sub(2 * WAYS as u32)..number.saturating_sub(1) {
                find(bucket, &tuple(older));
            }
            insert(bucket, number);
            let last = number.saturating_sub(1);
            assert!(find(bucket, &tuple(last)).is_some(), "{last} forgotten after {number}");
        }
    }

    #[test]
    fn connections_are_spread_over_the_buckets() {
        let count = buckets_for(32_768);
        let mut full = vec![0u32; count as usize];
        for number in 0..32_768 {
            full[Place::of(&tuple(number)).bucket(count - 1) as usize] += 1;
        }
        // By chance the fullest of 4096 buckets has some 23 of 8 expected.
        assert!(full.iter().all(|found| *found < 32), "{:?}", full.iter().max());
    }

    #[test]
    fn insertions_at_the_same_time_take_slots_of_their_own() {
        struct Shared(Bucket);
        // SAFETY: that is what is tested.
        unsafe impl Sync for Shared {}
        for _ in 0..5000 {
            let mut parts = Parts::default();
            let bucket = parts.bucket();
            let shared = &Shared(bucket);
            thread::scope(|scope| {
                for first in [0, 4] {
                    scope.spawn(move || (first..first + 4).for_each(|number| insert(shared.0, number)));
                }
            });
            for number in 0..8 {
                assert_eq!(find(bucket, &tuple(number)), Some((number.into(), ROLE_OPENING)), "{number}");
            }
        }
    }

    #[test]
    fn there_is_room_for_as_many_as_are_asked_for() {
        assert_eq!(buckets_for(32_768), 4096);
        assert_eq!(buckets_for(1), 1);
        assert_eq!(buckets_for(9), 2);
        assert_eq!(buckets_for(1 << 20), MOST_BUCKETS);
    }
}
