//! Entries of connections that are older than the session: each is told with the first packet that is seen of it.

use super::{of_entry, opens, tuples};
use crate::core::model::event::{Conntrack, Event};
use crate::core::model::flow::{Proto, Tuple};
use porttrace_ebpf::Kind;
use std::collections::HashMap;

/// Those of which no packet was seen yet.
#[derive(Debug, Default)]
pub struct Older {
    /// The namespace that all events are from.
    netns: u32,
    entries: Vec<Conntrack>,
    /// Where in `entries`, by all tuples of a packet.
    places: HashMap<Tuple, u32>,
}

impl Older {
    pub fn new(netns: u32, entries: Vec<Conntrack>) -> Self {
        let all = (0..).zip(&entries);
        let places = all.flat_map(|(place, entry)| tuples(entry).map(|tuple| (tuple, place))).collect();
        Self { netns, entries, places }
    }

    /// The entry that a packet with this tuple is of.
    pub fn find(&self, tuple: &Tuple) -> Option<Conntrack> {
        self.places.get(tuple).and_then(|place| self.entries.get(*place as usize)).copied()
    }

    /// The entry was told, or another one has one of its tuples.
    pub fn forget(&mut self, entry: &Conntrack) {
        for tuple in tuples(entry) {
            // Not only under this tuple: what is left of it would be told yet.
            let Some(older) = self.find(&tuple) else { continue };
            for tuple in tuples(&older) {
                self.places.remove(&tuple);
            }
        }
    }

    /// What is to be told before this event, where hooks tell of new entries themselves: the entry of its packet, once.
    pub fn before(&mut self, told: &Event) -> Option<Event> {
        if self.places.is_empty() {
            return None;
        }
        if let (Kind::NatSetup | Kind::Confirmed | Kind::Destroyed, Some(entry)) = (told.kind, told.conntrack) {
            self.forget(&entry);
            return None;
        }
        let entry = self.find(&told.packet?)?;
        // A SYN makes an entry of its own, of which the hooks tell soon. If they do not, the next packet is of this one still.
        if opens(told) && entry.original.proto != Proto::Udp {
            return None;
        }
        self.forget(&entry);
        Some(of_entry(self.netns, Kind::Confirmed, entry, told.time_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ACK, SYN};
    use super::*;

    fn tuple(from: &str, to: &str) -> Tuple {
        Tuple::new(Proto::Tcp, from.parse().unwrap(), to.parse().unwrap())
    }

    /// A hostPort's: what the client sent, and what the pod answers.
    fn entry(is_new: bool) -> Conntrack {
        let original = tuple("10.0.0.1:40000", "10.0.0.2:9088");
        let reply = tuple("10.244.1.9:80", "10.0.0.1:40000");
        Conntrack { original, reply, id: 7, status: 0, mark: 0, is_new, is_reply: false }
    }

    fn packet(tuple: Tuple, flags: u8) -> Event {
        let blank = of_entry(1, Kind::TcIngress, entry(false), 5);
        Event { packet: Some(tuple), conntrack: None, l4_flags: flags, ..blank }
    }

    #[test]
    fn it_is_told_once_before_a_packet_of_either_way_and_either_side_of_nat() {
        for seen in tuples(&entry(false)) {
            let mut older = Older::new(1, vec![entry(false)]);
            let told = older.before(&packet(seen, ACK)).unwrap();
            assert_eq!((told.kind, told.conntrack, told.time_ns), (Kind::Confirmed, Some(entry(false)), 5));
            assert_eq!(tuples(&entry(false)).map(|tuple| older.before(&packet(tuple, ACK))), [const { None }; 6]);
        }
    }

    #[test]
    fn others_and_those_that_begin_anew_are_not_it() {
        let mut older = Older::new(1, vec![entry(false)]);
        assert_eq!(older.before(&packet(tuple("10.0.0.1:40001", "10.0.0.2:9088"), ACK)), None);
        assert_eq!(older.before(&packet(entry(false).original, SYN)), None);
        // No hook told of a new entry: the SYN was of the older one.
        assert!(older.before(&packet(entry(false).original, ACK)).is_some());
    }

    #[test]
    fn a_new_entry_takes_its_place_and_its_end_is_the_end() {
        for kind in [Kind::NatSetup, Kind::Confirmed, Kind::Destroyed] {
            let mut older = Older::new(1, vec![entry(false)]);
            assert_eq!(older.before(&packet(entry(false).original, SYN)), None);
            // Elsewhere than before: what is left of the older one is forgotten too.
            let elsewhere = Conntrack { reply: tuple("10.244.1.10:80", "10.0.0.1:40000"), ..entry(true) };
            assert_eq!(older.before(&of_entry(1, kind, elsewhere, 6)), None);
            assert_eq!(tuples(&entry(false)).map(|tuple| older.before(&packet(tuple, ACK))), [const { None }; 6]);
        }
    }
}
