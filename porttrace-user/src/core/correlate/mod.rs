//! Joins the probe's events to connections. Fed with events and time; keeps no clock of its own.
//!
//! A connection is known by its conntrack tuples: a packet belongs to it when its tuple is the original or the reply tuple,
//! either of them inverted, or the state in between (destination rewritten, source not yet). Its outcome is reported once,
//! a little after the answer (so that the answer's own way back is part of it) or when its deadline passes; an answer that
//! comes after the deadline amends it; its end is reported last.

pub mod alike;
mod branch;
pub mod drops;
pub mod flow;
pub mod fold;
mod held;
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
use held::{Held, Place};
use porttrace_ebpf::Kind;
use react::{Change, react};
use std::collections::BTreeSet;

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
    held: Held,
    /// How many of them wait for their outcome.
    open: usize,
    next_id: u64,
    updates: Vec<Update>,
    counts: Counts,
}

impl Correlator {
    pub fn new(ports: impl IntoIterator<Item = u16>, limits: Limits) -> Self {
        Self {
            limits,
            ports: ports.into_iter().collect(),
            held: Held::default(),
            open: 0,
            next_id: 1,
            updates: Vec::new(),
            counts: Counts::default(),
        }
    }

    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Connections held now.
    pub const fn len(&self) -> usize {
        self.held.len()
    }

    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes one event. Events of one CPU come in order; across CPUs they may swap by microseconds.
    pub fn push(&mut self, event: Event) {
        let Some((place, way)) = self.place(&event) else {
            self.counts.strays += 1;
            return;
        };
        if let Some(entry) = &event.conntrack {
            self.held.learn(place, entry);
        }
        let Some(flow) = self.held.get_mut(place) else { return };
        flow.is_followed |=
            matches!(event.kind, Kind::AfterConntrack | Kind::AfterDnat | Kind::AfterSnat | Kind::NatSetup);
        let changes = react(flow, &event, way, &self.limits);
        match flow.stage {
            Stage::Open | Stage::Late => flow.add(event, way),
            Stage::Unanswered if event.kind == Kind::Dropped => flow.keep_drop(event, way),
            // Told; only its end is waited for.
            Stage::Unanswered | Stage::Reported | Stage::Ended => flow.last_ns = flow.last_ns.max(event.time_ns),
        }
        match changes {
            Change::None => {}
            Change::DecideBy(at) => self.held.set_due(place, at),
            Change::Ended(end) => {
                let update = Update::Ended { id: flow.id, original: flow.original, start_ns: flow.start_ns, end };
                flow.stage = Stage::Ended;
                self.updates.push(update);
            }
        }
    }

    /// The newest connection that this tuple opened, with what was seen of it and not yet reported.
    pub fn opened_by(&self, original: Tuple) -> Option<&Flow> {
        let flow = self.held.get(self.held.find(original)?)?;
        (flow.original == original).then_some(flow)
    }

    /// Lets time pass until `now_ns` and hands out what there is to say, in order of time.
    pub fn tick(&mut self, now_ns: u64) -> Vec<Update> {
        while let Some((at, place)) = self.held.take_due(now_ns) {
            self.expire(at, place);
        }
        std::mem::take(&mut self.updates)
    }

    /// Reports every connection that is still open, as at the end of a session, and answers that have just come late.
    pub fn finish(&mut self) -> Vec<Update> {
        let pending: Vec<(Place, Stage)> = self.held.by_age().map(|(place, flow)| (place, flow.stage)).collect();
        for (place, stage) in pending {
            match stage {
                Stage::Open => self.report(place),
                Stage::Late => self.amend(place),
                Stage::Unanswered | Stage::Reported | Stage::Ended => {}
            }
        }
        std::mem::take(&mut self.updates)
    }

    /// When [`Self::tick`] next has work; `None`: nothing is pending.
    pub fn next_deadline(&self) -> Option<u64> {
        self.held.first_due()
    }

    /// Does what was due for a connection `at` this time.
    fn expire(&mut self, at: u64, place: Place) {
        let Some(flow) = self.held.get(place) else { return };
        let forget_at = flow.last_ns + self.limits.forget_ns;
        match flow.stage {
            Stage::Open => self.report(place),
            Stage::Late => self.amend(place),
            Stage::Unanswered | Stage::Reported if forget_at > at => self.held.set_due(place, forget_at),
            Stage::Unanswered | Stage::Reported | Stage::Ended => self.held.remove(place),
        }
    }

    fn report(&mut self, place: Place) {
        let Some(flow) = self.held.get_mut(place) else { return };
        self.open -= 1;
        let waits = !flow.answered && !flow.joined_late && flow.end.is_none();
        let told = flow.take_story();
        if waits {
            // Says where the request came from, should an answer follow.
            flow.sightings = told.sightings.first().cloned().into_iter().collect();
        }
        self.updates.push(Update::Reported(Box::new(told)));
        self.keep(place, if waits { Stage::Unanswered } else { Stage::Reported });
    }

    /// Reports the late answer.
    fn amend(&mut self, place: Place) {
        let Some(flow) = self.held.get_mut(place) else { return };
        let told = flow.take_story();
        self.updates.push(Update::Amended(Box::new(told)));
        self.keep(place, Stage::Reported);
    }

    /// Keeps a flow that was told, for what may follow.
    fn keep(&mut self, place: Place, stage: Stage) {
        let Some(flow) = self.held.get_mut(place) else { return };
        let (stage, keep) = match flow.end {
            Some(_) => (Stage::Ended, self.limits.grace_ns),
            None => (stage, self.limits.forget_ns),
        };
        flow.stage = stage;
        let due_at = flow.last_ns + keep;
        self.held.set_due(place, due_at);
    }

    /// The flow of an event and the way of its packet; opens a new flow where the event begins one.
    fn place(&mut self, event: &Event) -> Option<(Place, Way)> {
        let packet = event.packet.or_else(|| event.conntrack.map(|entry| entry.original));
        let known = event
            .conntrack
            .and_then(|entry| self.held.find(entry.original))
            .or_else(|| packet.and_then(|tuple| self.held.find(tuple)));
        if let Some(place) = known
            && let Some(flow) = self.held.get(place)
            && !begins_anew(flow, event)
        {
            // A tuple that is not known yet is one after NAT: conntrack knows which way it goes.
            let by_entry =
                || if event.conntrack.is_some_and(|entry| entry.is_reply) { Way::Reply } else { Way::Request };
            return Some((place, packet.and_then(|tuple| flow.way_of(tuple)).unwrap_or_else(by_entry)));
        }
        self.open(event, packet?)
    }

    fn open(&mut self, event: &Event, packet: Tuple) -> Option<(Place, Way)> {
        if matches!(event.kind, Kind::Destroyed | Kind::IcmpError) {
            return None;
        }
        let (original, way) = match event.conntrack {
            Some(entry) if entry.is_reply => (entry.original, Way::Reply),
            Some(entry) => (entry.original, Way::Request),
            None if self.ports.contains(&packet.dport) || !self.ports.contains(&packet.sport) => (packet, Way::Request),
            None => (packet.inverted(), Way::Reply),
        };
        if self.held.len() >= self.limits.max_flows {
            self.evict();
        }
        if self.held.len() == self.limits.max_flows / 2 {
            self.held.expect(self.limits.max_flows);
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
            due_at: event.time_ns + self.limits.silence_ns,
            end: None,
        };
        Some((self.held.add(flow), way))
    }

    /// Reports the open connections that are due first: a part of them, so that the way past those that are told is not gone for
    /// each.
    fn hurry(&mut self) {
        let open = self.held.by_due().filter(|(_, flow)| flow.stage == Stage::Open).map(|(place, _)| place);
        let due: Vec<Place> = open.take(self.limits.max_open.div_ceil(16)).collect();
        self.counts.evicted += due.len() as u64;
        due.into_iter().for_each(|place| self.report(place));
    }

    fn evict(&mut self) {
        let Some(place) = self.held.oldest() else { return };
        if self.held.get(place).is_some_and(|flow| flow.stage == Stage::Open) {
            self.counts.evicted += 1;
            self.report(place);
        }
        self.held.remove(place);
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
