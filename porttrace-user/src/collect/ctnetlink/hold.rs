//! Puts conntrack's events in their place among the packets that they are about, and finds out which packets at predicted
//! addresses are of watched connections.
//!
//! The kernel tells of an entry before the packet that made it leaves (`nf_conntrack_confirm` is the last hook of POSTROUTING and
//! of LOCAL_IN), but by another way than packets are told. So: whoever has read both ways to their ends knows of every entry
//! whose packet left until then. Events are held until that is so, then handed out in order.

use super::older::Older;
use super::{Told, of_entry, opens, tuples};
use crate::core::model::event::{Conntrack, Event};
use crate::core::model::flow::{Proto, Tuple};
use porttrace_ebpf::Kind;
use std::collections::{BTreeMap, HashMap, VecDeque};

/// An entry whose packet nobody saw is told after this.
const LONELY_NS: u64 = 20_000_000;
/// A packet at a predicted address that no entry claims is given up after this.
const UNCLAIMED_NS: u64 = 50_000_000;
/// A packet that opened a connection is looked for at most so long afterwards.
const RECENT_NS: u64 = 100_000_000;
/// A claim holds so long; by then the kernel side knows the tuple's role.
const CLAIM_NS: u64 = 2_000_000_000;
/// Openings of one tuple that are remembered at once.
const OPENINGS: usize = 4;

/// Events that wait for their turn; see the module. Times are CLOCK_MONOTONIC, nanoseconds.
#[derive(Debug, Default)]
pub struct Hold {
    ports: Vec<u16>,
    netns: u32,
    /// By time, then in order of arrival.
    waiting: BTreeMap<(u64, u64), Waiting>,
    /// At predicted addresses, and their time has come, but nobody claimed them yet.
    unclaimed: BTreeMap<(u64, u64), Event>,
    /// Entries that are still without a place, and since when.
    lonely: Vec<(u64, Conntrack)>,
    /// When packets with this tuple opened something, without an entry so far.
    openings: Expiring<VecDeque<u64>>,
    /// Tuples of entries that were told.
    claims: Expiring<()>,
    /// Where ends of entries with this original tuple wait.
    ends: Expiring<VecDeque<(u64, u64)>>,
    older: Older,
    sequence: u64,
}

#[derive(Debug)]
enum Waiting {
    Packet { event: Event, predicted: bool },
    Entry(Event),
}

/// What a release brings.
#[derive(Debug, Default)]
pub struct Released {
    /// In order.
    pub events: Vec<Event>,
    /// Tuples at predicted addresses that are of no watched connection.
    pub foreign: Vec<Tuple>,
}

impl Hold {
    /// `netns` is the namespace that all events are from; `older`: what conntrack knew before the session.
    pub fn new(ports: &[u16], netns: u32, older: Vec<Conntrack>) -> Self {
        Self { ports: ports.to_vec(), netns, older: Older::new(netns, older), ..Self::default() }
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.unclaimed.is_empty() && self.lonely.is_empty()
    }

    /// Takes a packet's event. `predicted`: only its address speaks for it.
    pub fn packet(&mut self, event: Event, predicted: bool) {
        if let Some(tuple) = event.packet.filter(|_| opens(&event)) {
            let times = self.openings.entry(tuple, event.time_ns + RECENT_NS);
            if times.len() < OPENINGS {
                times.push_back(event.time_ns);
            }
        }
        self.wait(event.time_ns, Waiting::Packet { event, predicted });
    }

    /// Takes what conntrack told at `now_ns`.
    pub fn entry(&mut self, told: Told, now_ns: u64) {
        self.older.forget(&told.entry);
        for tuple in tuples(&told.entry) {
            self.claims.entry(tuple, now_ns + CLAIM_NS);
        }
        match told.gone {
            Some((orig_bytes, reply_bytes)) => {
                let event =
                    Event { orig_bytes, reply_bytes, ..of_entry(self.netns, Kind::Destroyed, told.entry, now_ns) };
                let key = self.wait(now_ns, Waiting::Entry(event));
                self.ends.entry(told.entry.original, now_ns + RECENT_NS).push_back(key);
            }
            None => {
                let entry = Conntrack { is_new: true, ..told.entry };
                if !self.place(entry) {
                    self.lonely.push((now_ns, entry));
                }
            }
        }
    }

    /// Hands out what happened until `until_ns`: both ways must have been read to their ends after that moment.
    pub fn release(&mut self, until_ns: u64, now_ns: u64) -> Released {
        for (since, entry) in std::mem::take(&mut self.lonely) {
            if self.place(entry) {
                continue;
            }
            if now_ns.saturating_sub(since) > LONELY_NS {
                let event = of_entry(self.netns, Kind::Confirmed, entry, since);
                self.wait(since, Waiting::Entry(event));
            } else {
                self.lonely.push((since, entry));
            }
        }
        let rest = self.waiting.split_off(&(until_ns.saturating_add(1), 0));
        let due = std::mem::replace(&mut self.waiting, rest);
        let mut released = Released::default();
        let mut turn: BTreeMap<(u64, u64), Waiting> = std::mem::take(&mut self.unclaimed)
            .into_iter()
            .map(|(key, event)| (key, Waiting::Packet { event, predicted: true }))
            .collect();
        turn.extend(due);
        for (key, waiting) in turn {
            match waiting {
                Waiting::Entry(event) => released.events.push(event),
                Waiting::Packet { event, predicted } => self.judge(key, event, predicted, now_ns, &mut released),
            }
        }
        // What happened later may be known by one of the two ways only, however long ago that is by now.
        self.openings.expire(until_ns);
        self.claims.expire(until_ns);
        self.ends.expire(until_ns);
        released
    }

    fn judge(&mut self, key: (u64, u64), event: Event, predicted: bool, now_ns: u64, released: &mut Released) {
        let Some(tuple) = event.packet else { return released.events.push(event) };
        let older = self.older.find(&tuple);
        // A SYN makes an entry of its own, of which we may not have heard yet.
        let begins = opens(&event) && tuple.proto != Proto::Udp;
        // Watched by its port, whatever the rules say.
        let by_port = self.ports.contains(if event.is_reply { &tuple.sport } else { &tuple.dport });
        // What a packet itself carries of its entry is better than any claim.
        let own = event.conntrack.is_some_and(|entry| self.ports.contains(&entry.original.dport));
        let claimed = own || self.claims.contains(&tuple);
        let waits = if older.is_some() { begins && !by_port } else { predicted };
        if waits && !claimed && now_ns.saturating_sub(event.time_ns) <= UNCLAIMED_NS {
            self.unclaimed.insert(key, event);
            return;
        }
        if let Some(entry) = older.filter(|_| !(begins && by_port)) {
            self.older.forget(&entry);
            for tuple in tuples(&entry) {
                self.claims.entry(tuple, now_ns + CLAIM_NS);
            }
            released.events.push(of_entry(self.netns, Kind::Confirmed, entry, event.time_ns));
        } else if predicted && !claimed && !by_port {
            released.foreign.push(tuple);
            return;
        }
        released.events.push(event);
    }

    /// Puts a new entry behind the packet that opened it, as that was sent; or before the first packet that was seen of it
    /// rewritten. `false`: none was seen.
    fn place(&mut self, entry: Conntrack) -> bool {
        let [original, _, _, rewritten, between, _] = tuples(&entry);
        let sent = self.openings.take_first(&original);
        let left = [rewritten, between].into_iter().filter(|tuple| *tuple != original);
        let left: Vec<u64> = left.filter_map(|tuple| self.openings.take_first(&tuple)).collect();
        let time = sent.or_else(|| left.into_iter().min().map(|time| time.saturating_sub(1)));
        let Some(time) = time else { return false };
        self.end_before(original, time);
        let event = of_entry(self.netns, Kind::Confirmed, entry, time);
        self.wait(time, Waiting::Entry(event));
        true
    }

    /// The ends of entries that had the same tuple were told before the new one, so they came before its first packet.
    fn end_before(&mut self, original: Tuple, time: u64) {
        let Some((_, keys)) = self.ends.values.get_mut(&original) else { return };
        for key in std::mem::take(keys) {
            if key.0 >= time
                && let Some(Waiting::Entry(event)) = self.waiting.remove(&key)
            {
                let time = time.saturating_sub(1);
                self.wait(time, Waiting::Entry(Event { time_ns: time, ..event }));
            }
        }
    }

    fn wait(&mut self, time: u64, waiting: Waiting) -> (u64, u64) {
        self.sequence += 1;
        let key = (time, self.sequence);
        self.waiting.insert(key, waiting);
        key
    }
}

/// Values by tuple that are forgotten after their time. Looked up only, never listed.
#[derive(Debug, Default)]
struct Expiring<T> {
    values: HashMap<Tuple, (u64, T)>,
    /// In order of insertion, which is nearly that of time.
    order: VecDeque<(u64, Tuple)>,
}

impl<T: Default> Expiring<T> {
    /// The value, made where there is none; it then stays until `until_ns`.
    fn entry(&mut self, tuple: Tuple, until_ns: u64) -> &mut T {
        let (known_until, value) = self.values.entry(tuple).or_default();
        if *known_until < until_ns {
            *known_until = until_ns;
            self.order.push_back((until_ns, tuple));
        }
        value
    }

    fn contains(&self, tuple: &Tuple) -> bool {
        self.values.contains_key(tuple)
    }

    fn expire(&mut self, now_ns: u64) {
        while let Some((until, tuple)) = self.order.front().copied().filter(|(until, _)| *until < now_ns) {
            self.order.pop_front();
            if self.values.get(&tuple).is_some_and(|(known_until, _)| *known_until == until) {
                self.values.remove(&tuple);
            }
        }
    }
}

impl Expiring<VecDeque<u64>> {
    /// The earliest time of this tuple, which is then used up.
    fn take_first(&mut self, tuple: &Tuple) -> Option<u64> {
        self.values.get_mut(tuple)?.1.pop_front()
    }
}

#[cfg(test)]
#[path = "hold_tests.rs"]
mod tests;
