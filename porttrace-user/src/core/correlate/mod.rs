//! Joins the probe's events to connections. Fed with events and time; keeps no clock of its own.
//!
//! A connection is known by its conntrack tuples: a packet belongs to it when its tuple is the original or the reply tuple,
//! either of them inverted, or the state in between (destination rewritten, source not yet). Its outcome is reported once,
//! a little after the answer (so that the answer's own way back is part of it) or when its deadline passes; an answer that
//! comes after the deadline amends it; its end is reported last.

pub mod alike;
pub mod drops;
pub mod flow;
pub mod fold;
pub mod inside;
pub mod judge;
mod react;
pub mod route;
pub mod sight;
pub mod story;
pub mod unexplained;

use crate::core::model::event::Event;
use crate::core::model::flow::{Proto, Tuple};
use flow::{ACK, End, Flow, RST, SYN, Stage, Way};
use foldhash::{HashMap, HashMapExt as _};
use porttrace_ebpf::Kind;
use react::{Change, react};
use std::collections::{BTreeMap, BTreeSet};

/// Time limits, nanoseconds, and size limits.
#[derive(Clone, Debug)]
pub struct Limits {
    /// A connection without an answer is reported after this.
    pub silence_ns: u64,
    /// What is still waited for after an answer, a refusal or a drop.
    pub grace_ns: u64,
    /// A reported connection without a sign of life is forgotten after this.
    pub forget_ns: u64,
    /// Connections held at once; beyond it the oldest is reported early and counted.
    pub max_flows: usize,
    /// Of those, connections whose outcome is not known yet, and of which all that was seen is held, some 2 KiB each; beyond it
    /// those that are due first are reported early and counted.
    pub max_open: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            silence_ns: 1_000_000_000,
            grace_ns: 60_000_000,
            forget_ns: 300_000_000_000,
            max_flows: 65_536,
            max_open: 16_384,
        }
    }
}

/// What the correlator has to say.
#[derive(Clone, Debug)]
pub enum Update {
    /// The outcome of a connection is known (or its deadline passed).
    Reported(Box<Flow>),
    /// A connection that was reported without an answer got one after all.
    Amended(Box<Flow>),
    /// A connection that was reported before has ended.
    Ended { id: u64, original: Tuple, start_ns: u64, end: End },
}

/// Counts of what could not be kept or placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections reported before their time because too many were open at once.
    pub evicted: u64,
    /// Events that belong to no connection that is watched.
    pub strays: u64,
}

/// What is seen of a connection that is forwarded and answered: its SYN by both interfaces and three hooks, and the answer and
/// the end by both interfaces.
const USUAL_SIGHTINGS: usize = 9;

/// The joiner; see the module.
#[derive(Debug)]
pub struct Correlator {
    limits: Limits,
    ports: BTreeSet<u16>,
    flows: BTreeMap<u64, Box<Flow>>,
    /// How many of them wait for their outcome.
    open: usize,
    /// Tuple in either direction → the newest flow that can carry it. Looked up only, never listed.
    index: HashMap<Undirected, u64>,
    /// (when, flow): outcomes to report and flows to forget.
    timers: BTreeSet<(u64, u64)>,
    next_id: u64,
    updates: Vec<Update>,
    counts: Counts,
}

impl Correlator {
    pub fn new(ports: impl IntoIterator<Item = u16>, limits: Limits) -> Self {
        Self {
            limits,
            ports: ports.into_iter().collect(),
            flows: BTreeMap::new(),
            open: 0,
            index: HashMap::new(),
            timers: BTreeSet::new(),
            next_id: 1,
            updates: Vec::new(),
            counts: Counts::default(),
        }
    }

    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Connections held now.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Takes one event. Events of one CPU come in order; across CPUs they may swap by microseconds.
    pub fn push(&mut self, event: Event) {
        let Some((id, way)) = self.place(&event) else {
            self.counts.strays += 1;
            return;
        };
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let learned = event.conntrack.as_ref().is_some_and(|entry| flow.learn(entry));
        flow.is_followed |=
            matches!(event.kind, Kind::AfterConntrack | Kind::AfterDnat | Kind::AfterSnat | Kind::NatSetup);
        let changes = react(flow, &event, way, &self.limits);
        match flow.stage {
            Stage::Open | Stage::Late => flow.add(event, way),
            Stage::Unanswered if event.kind == Kind::Dropped => flow.keep_drop(event, way),
            // Told; only its end is waited for.
            Stage::Unanswered | Stage::Reported | Stage::Ended => flow.last_ns = flow.last_ns.max(event.time_ns),
        }
        if learned {
            self.index.extend(flow.tuples().map(|tuple| (Undirected::of(tuple), id)));
        }
        match changes {
            Change::None => {}
            Change::DecideBy(at) => {
                self.timers.remove(&(flow.decide_at, id));
                flow.decide_at = at;
                self.timers.insert((at, id));
            }
            Change::Ended(end) => {
                let update = Update::Ended { id, original: flow.original, start_ns: flow.start_ns, end };
                flow.stage = Stage::Ended;
                self.updates.push(update);
            }
        }
    }

    /// The newest connection that this tuple opened, with what was seen of it and not yet reported.
    pub fn opened_by(&self, original: Tuple) -> Option<&Flow> {
        let flow = self.flows.get(self.index.get(&Undirected::of(original))?)?;
        (flow.original == original).then_some(flow)
    }

    /// Lets time pass until `now_ns` and hands out what there is to say, in order of time.
    pub fn tick(&mut self, now_ns: u64) -> Vec<Update> {
        while let Some(&(at, id)) = self.timers.first() {
            if at > now_ns {
                break;
            }
            self.timers.pop_first();
            self.expire(at, id);
        }
        std::mem::take(&mut self.updates)
    }

    /// Reports every connection that is still open, as at the end of a session, and answers that have just come late.
    pub fn finish(&mut self) -> Vec<Update> {
        let pending: Vec<(u64, Stage)> = self.flows.values().map(|flow| (flow.id, flow.stage)).collect();
        for (id, stage) in pending {
            match stage {
                Stage::Open => self.report(id),
                Stage::Late => self.amend(id),
                Stage::Unanswered | Stage::Reported | Stage::Ended => {}
            }
        }
        std::mem::take(&mut self.updates)
    }

    /// When [`Self::tick`] next has work; `None`: nothing is pending.
    pub fn next_deadline(&self) -> Option<u64> {
        self.timers.first().map(|&(at, _)| at)
    }

    fn expire(&mut self, at: u64, id: u64) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        match flow.stage {
            Stage::Open => self.report(id),
            Stage::Late => self.amend(id),
            Stage::Unanswered | Stage::Reported if flow.last_ns + self.limits.forget_ns > at => {
                flow.decide_at = flow.last_ns + self.limits.forget_ns;
                self.timers.insert((flow.decide_at, id));
            }
            Stage::Unanswered | Stage::Reported | Stage::Ended => self.forget(id),
        }
    }

    fn report(&mut self, id: u64) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        self.timers.remove(&(flow.decide_at, id));
        self.open -= 1;
        let waits = !flow.answered && !flow.joined_late && flow.end.is_none();
        let told = flow.take_story();
        if waits {
            // Says where the request came from, should an answer follow.
            flow.sightings = told.sightings.first().cloned().into_iter().collect();
        }
        self.updates.push(Update::Reported(Box::new(told)));
        self.keep(id, if waits { Stage::Unanswered } else { Stage::Reported });
    }

    /// Reports the late answer.
    fn amend(&mut self, id: u64) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let told = flow.take_story();
        self.updates.push(Update::Amended(Box::new(told)));
        self.keep(id, Stage::Reported);
    }

    /// Keeps a flow that was told, for what may follow.
    fn keep(&mut self, id: u64, stage: Stage) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let (stage, keep) = match flow.end {
            Some(_) => (Stage::Ended, self.limits.grace_ns),
            None => (stage, self.limits.forget_ns),
        };
        self.timers.remove(&(flow.decide_at, id));
        flow.stage = stage;
        flow.decide_at = flow.last_ns + keep;
        self.timers.insert((flow.decide_at, id));
    }

    fn forget(&mut self, id: u64) {
        let Some(flow) = self.flows.remove(&id) else { return };
        self.timers.remove(&(flow.decide_at, id));
        for tuple in flow.tuples().map(Undirected::of) {
            if self.index.get(&tuple) == Some(&id) {
                self.index.remove(&tuple);
            }
        }
    }

    /// The flow of an event and the way of its packet; opens a new flow where the event begins one.
    fn place(&mut self, event: &Event) -> Option<(u64, Way)> {
        let packet = event.packet.or_else(|| event.conntrack.map(|entry| entry.original));
        let known = event
            .conntrack
            .and_then(|entry| self.index.get(&Undirected::of(entry.original)))
            .or_else(|| packet.and_then(|tuple| self.index.get(&Undirected::of(tuple))))
            .copied();
        if let Some(id) = known
            && let Some(flow) = self.flows.get(&id)
            && !begins_anew(flow, event)
        {
            // A tuple that is not known yet is one after NAT: conntrack knows which way it goes.
            let by_entry =
                || if event.conntrack.is_some_and(|entry| entry.is_reply) { Way::Reply } else { Way::Request };
            return Some((id, packet.and_then(|tuple| flow.way_of(tuple)).unwrap_or_else(by_entry)));
        }
        self.open(event, packet?)
    }

    fn open(&mut self, event: &Event, packet: Tuple) -> Option<(u64, Way)> {
        if matches!(event.kind, Kind::Destroyed | Kind::IcmpError) {
            return None;
        }
        let (original, way) = match event.conntrack {
            Some(entry) if entry.is_reply => (entry.original, Way::Reply),
            Some(entry) => (entry.original, Way::Request),
            None if self.ports.contains(&packet.dport) || !self.ports.contains(&packet.sport) => (packet, Way::Request),
            None => (packet.inverted(), Way::Reply),
        };
        if self.flows.len() >= self.limits.max_flows {
            self.evict();
        }
        if self.flows.len() == self.limits.max_flows / 2 {
            self.size_index();
        }
        if self.open >= self.limits.max_open {
            self.hurry();
        }
        self.open += 1;
        let id = self.next_id;
        self.next_id += 1;
        let tcp = original.proto == Proto::Tcp;
        let creates_entry = event.conntrack.is_some_and(|entry| entry.is_new && !entry.is_reply);
        let is_first = way == Way::Request && (!tcp || creates_entry || event.l4_flags & (SYN | ACK) == SYN);
        let decide_at = event.time_ns + self.limits.silence_ns;
        let flow = Flow {
            id,
            original,
            reply: None,
            entry_was_new: None,
            is_followed: false,
            joined_late: !is_first,
            first_seq: event.tcp_seq,
            start_ns: event.time_ns,
            last_ns: event.time_ns,
            sightings: Vec::with_capacity(USUAL_SIGHTINGS),
            more_sightings: 0,
            stage: Stage::Open,
            answered: false,
            decide_at,
            end: None,
        };
        self.index.extend(flow.tuples().map(|tuple| (Undirected::of(tuple), id)));
        self.timers.insert((decide_at, id));
        self.flows.insert(id, Box::new(flow));
        Some((id, way))
    }

    /// Gives the index its final size. Left alone it would take that at some later moment, when what was removed has left it so
    /// full of gaps that it counts as full; with twice the room it closes its gaps in place.
    fn size_index(&mut self) {
        /// The original tuple, the reply's, and the state between the two halves of NAT.
        const TUPLES: usize = 3;
        let room = 2 * TUPLES * self.limits.max_flows;
        self.index.reserve(room.saturating_sub(self.index.len()));
    }

    /// Reports the open connections that are due first: a part of them, so that the way past those that are told is not gone for
    /// each.
    fn hurry(&mut self) {
        let is_open = |id: &u64| self.flows.get(id).is_some_and(|flow| flow.stage == Stage::Open);
        let due = self.timers.iter().map(|(_, id)| *id).filter(is_open);
        let due: Vec<u64> = due.take(self.limits.max_open.div_ceil(16)).collect();
        self.counts.evicted += due.len() as u64;
        due.into_iter().for_each(|id| self.report(id));
    }

    fn evict(&mut self) {
        let Some(id) = self.flows.keys().next().copied() else { return };
        if self.flows.get(&id).is_some_and(|flow| flow.stage == Stage::Open) {
            self.counts.evicted += 1;
            self.report(id);
        }
        self.forget(id);
    }
}

/// A tuple of either direction: a packet and its answer have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Undirected(Tuple);

impl Undirected {
    fn of(tuple: Tuple) -> Self {
        Self(tuple.min(tuple.inverted()))
    }
}

/// A new connection on tuples that an older one had: a fresh SYN, or a fresh conntrack entry.
fn begins_anew(flow: &Flow, event: &Event) -> bool {
    if event.conntrack.is_some_and(|entry| entry.is_reply) || event.packet.is_some_and(|packet| packet != flow.original)
    {
        return false;
    }
    if !flow.is_tcp() {
        return flow.stage != Stage::Open && event.conntrack.is_some_and(|entry| entry.is_new);
    }
    let is_syn = event.l4_flags & (SYN | ACK | RST) == SYN;
    is_syn && (event.tcp_seq != flow.first_seq || flow.joined_late)
}

#[cfg(test)]
mod tests;
