//! The connections that are held: found by what their packets carry, by what is due next, and by age.

use super::flow::Flow;
use crate::core::model::event::Conntrack;
use crate::core::model::flow::Tuple;
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use std::collections::{BTreeSet, VecDeque};
use std::hash::{BuildHasher as _, Hasher as _};
use std::net::IpAddr;

/// Where a connection is held. When it is gone, another one may be held there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place(u32);

/// In [`Flow::due_at`].
const NOTHING_DUE: u64 = 0;

/// All connections that are held.
#[derive(Debug, Default)]
pub(super) struct Held {
    places: Vec<Option<Box<Flow>>>,
    vacant: Vec<Place>,
    /// Every tuple of a connection, in either direction, and where the newest connection is held that it can be of.
    ///
    /// Not the tuples themselves: 64 bits of a hash that nobody outside can foresee do not meet by chance.
    tuples: HashTable<(u64, Place)>,
    seed: RandomState,
    /// What is due, by time (`Flow::due_at`) and number.
    due: BTreeSet<(u64, u64, Place)>,
    /// By age; those that are gone are still in it, for a while.
    opened: VecDeque<(u64, Place)>,
    count: usize,
}

impl Held {
    pub(super) const fn len(&self) -> usize {
        self.count
    }

    pub(super) fn get(&self, place: Place) -> Option<&Flow> {
        self.places.get(place.0 as usize)?.as_deref()
    }

    pub(super) fn get_mut(&mut self, place: Place) -> Option<&mut Flow> {
        self.places.get_mut(place.0 as usize)?.as_deref_mut()
    }

    /// The newest connection that a packet with this tuple can be of.
    pub(super) fn find(&self, tuple: Tuple) -> Option<Place> {
        let hash = self.hash(tuple);
        self.tuples.find(hash, |known| known.0 == hash).map(|known| known.1)
    }

    /// Holds one more, due when it says.
    pub(super) fn add(&mut self, flow: Flow) -> Place {
        let place = self.vacant.pop().unwrap_or_else(|| {
            self.places.push(None);
            // So many connections fit in no memory.
            Place(u32::try_from(self.places.len() - 1).unwrap_or(u32::MAX))
        });
        if self.opened.len() >= 2 * self.places.len() {
            let places = &self.places;
            self.opened.retain(|(id, place)| is_at(places, *place, *id));
        }
        self.opened.push_back((flow.id, place));
        self.due.insert((flow.due_at, flow.id, place));
        for tuple in flow.tuples() {
            self.lead(tuple, place);
        }
        if let Some(room) = self.places.get_mut(place.0 as usize) {
            *room = Some(Box::new(flow));
            self.count += 1;
        }
        place
    }

    /// Tells the connection what a conntrack entry says of it.
    pub(super) fn learn(&mut self, place: Place, entry: &Conntrack) {
        let Some(flow) = self.get_mut(place) else { return };
        let before = flow.rewritten();
        if !flow.learn(entry) {
            return;
        }
        let now = flow.rewritten();
        for tuple in before.into_iter().flatten().filter(|tuple| !now.contains(&Some(*tuple))) {
            self.lead_no_more(tuple, place);
        }
        for tuple in now.into_iter().flatten().filter(|tuple| !before.contains(&Some(*tuple))) {
            self.lead(tuple, place);
        }
    }

    /// Something is due for the connection at this time, and not before.
    pub(super) fn set_due(&mut self, place: Place, at: u64) {
        let Some(flow) = self.get_mut(place) else { return };
        let (before, id) = (std::mem::replace(&mut flow.due_at, at), flow.id);
        if before != NOTHING_DUE {
            self.due.remove(&(before, id, place));
        }
        self.due.insert((at, id, place));
    }

    /// When something is due first.
    pub(super) fn first_due(&self) -> Option<u64> {
        self.due.first().map(|&(at, ..)| at)
    }

    /// What is due first, if it is by now, and since when. Nothing is due for that connection then.
    pub(super) fn take_due(&mut self, now: u64) -> Option<(u64, Place)> {
        let (at, _, place) = *self.due.first().filter(|(at, ..)| *at <= now)?;
        self.due.pop_first();
        if let Some(flow) = self.get_mut(place) {
            flow.due_at = NOTHING_DUE;
        }
        Some((at, place))
    }

    /// All for which something is due, the first first.
    pub(super) fn by_due(&self) -> impl Iterator<Item = (Place, &Flow)> {
        self.due.iter().filter_map(|&(_, _, place)| Some((place, self.get(place)?)))
    }

    /// All, the oldest first.
    pub(super) fn by_age(&self) -> impl Iterator<Item = (Place, &Flow)> {
        self.opened.iter().filter_map(|&(id, place)| Some((place, self.get(place).filter(|flow| flow.id == id)?)))
    }

    pub(super) fn oldest(&mut self) -> Option<Place> {
        while let Some(&(id, place)) = self.opened.front() {
            if is_at(&self.places, place, id) {
                return Some(place);
            }
            self.opened.pop_front();
        }
        None
    }

    pub(super) fn remove(&mut self, place: Place) {
        let Some(flow) = self.places.get_mut(place.0 as usize).and_then(Option::take) else { return };
        self.count -= 1;
        if flow.due_at != NOTHING_DUE {
            self.due.remove(&(flow.due_at, flow.id, place));
        }
        for tuple in flow.tuples() {
            self.lead_no_more(tuple, place);
        }
        self.vacant.push(place);
    }

    /// Makes room for the tuples of so many connections. Left alone, the table would take that at some later moment, when what was
    /// removed has left it so full of gaps that it counts as full; with twice the room it closes its gaps in place.
    pub(super) fn expect(&mut self, connections: usize) {
        /// The original tuple, the reply's, and the state between the two halves of NAT.
        const TUPLES: usize = 3;
        let room = 2 * TUPLES * connections;
        self.tuples.reserve(room.saturating_sub(self.tuples.len()), |known| known.0);
    }

    /// Nothing is left of what was held.
    #[cfg(test)]
    pub(super) fn is_clean(&self) -> bool {
        self.count == 0 && self.tuples.is_empty() && self.due.is_empty() && self.places.iter().all(Option::is_none)
    }

    fn lead(&mut self, tuple: Tuple, place: Place) {
        let hash = self.hash(tuple);
        self.tuples.entry(hash, |known| known.0 == hash, |known| known.0).insert((hash, place));
    }

    /// The tuple leads there no more, if it did: it may be a newer connection's.
    fn lead_no_more(&mut self, tuple: Tuple, place: Place) {
        let known = (self.hash(tuple), place);
        if let Ok(entry) = self.tuples.find_entry(known.0, |other| *other == known) {
            entry.remove();
        }
    }

    /// The same for a packet and its answer.
    fn hash(&self, tuple: Tuple) -> u64 {
        let end = |address, port: u16| {
            let mut hasher = self.seed.build_hasher();
            match address {
                IpAddr::V4(address) => hasher.write_u64(u64::from(address.to_bits()) << 16 | u64::from(port)),
                IpAddr::V6(address) => {
                    hasher.write_u128(address.to_bits());
                    hasher.write_u16(port);
                }
            }
            hasher.finish()
        };
        let ends = end(tuple.src, tuple.sport).wrapping_add(end(tuple.dst, tuple.dport));
        ends.rotate_left(u32::from(tuple.proto.number()) % 64)
    }
}

fn is_at(places: &[Option<Box<Flow>>], place: Place, id: u64) -> bool {
    places.get(place.0 as usize).and_then(Option::as_deref).is_some_and(|flow| flow.id == id)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{CLIENT, ETH0, FROM_POD, TO_CLIENT, TO_POD, event, tuple, with_conntrack};
    use super::super::{Correlator, Limits};
    use super::*;
    use porttrace_ebpf::Kind;

    const OTHER_POD: &str = "10.244.1.7:8081 → 172.18.0.4:60218";

    /// A connection from [`CLIENT`].
    fn flow(id: u64) -> Flow {
        let mut correlator = Correlator::new([9088], Limits::default());
        correlator.push(event(1000, Kind::TcIngress, ETH0, CLIENT, 2));
        Flow { id, ..correlator.opened_by(tuple(CLIENT)).expect("it was opened").clone() }
    }

    fn entry(reply: &str) -> Conntrack {
        with_conntrack(event(2000, Kind::AfterDnat, ETH0, TO_POD, 2), CLIENT, reply).conntrack.expect("an entry")
    }

    #[test]
    fn a_tuple_leads_to_the_newest_and_not_away_from_it() {
        let mut held = Held::default();
        let old = held.add(flow(1));
        let new = held.add(flow(2));
        assert_eq!((held.find(tuple(CLIENT)), held.find(tuple(TO_CLIENT))), (Some(new), Some(new)));
        held.remove(old);
        assert_eq!(held.find(tuple(CLIENT)), Some(new));
        held.remove(new);
        assert!(held.is_clean());
    }

    #[test]
    fn what_nat_made_of_it_leads_to_it_and_what_nat_took_back_does_not() {
        let mut held = Held::default();
        let place = held.add(flow(1));
        held.learn(place, &entry(TO_CLIENT));
        assert_eq!(held.find(tuple(FROM_POD)), None);
        held.learn(place, &entry(FROM_POD));
        assert_eq!((held.find(tuple(FROM_POD)), held.find(tuple(TO_POD))), (Some(place), Some(place)));
        held.learn(place, &entry(OTHER_POD));
        assert_eq!((held.find(tuple(FROM_POD)), held.find(tuple(OTHER_POD))), (None, Some(place)));
        held.remove(place);
        assert!(held.is_clean(), "and whoever is held there next is not taken for it");
    }

    #[test]
    fn the_order_of_age_does_not_grow_with_those_that_are_gone() {
        let mut held = Held::default();
        let oldest = held.add(flow(1));
        for id in 2..1000 {
            let place = held.add(flow(id));
            held.remove(place);
        }
        let newest = held.add(flow(1000));
        assert!(held.places.len() == 2 && held.opened.len() <= 4, "{held:?}");
        assert_eq!((held.oldest(), held.by_age().count()), (Some(oldest), 2));
        held.remove(oldest);
        assert_eq!(held.oldest(), Some(newest));
    }

    #[test]
    fn what_is_due_is_handed_out_once_in_order() {
        let mut held = Held::default();
        let (one, other) = (held.add(flow(1)), held.add(flow(2)));
        held.set_due(one, 30);
        held.set_due(other, 20);
        assert_eq!((held.first_due(), held.take_due(10)), (Some(20), None));
        assert_eq!(
            (held.take_due(40), held.take_due(40), held.take_due(40)),
            (Some((20, other)), Some((30, one)), None)
        );
        held.set_due(other, 50);
        held.remove(one);
        held.remove(other);
        assert!(held.is_clean());
    }
}
