//! The packet path: one packet through a node's state, every hop and every outcome.
//!
//! A [`Simulator`] is made once from a state; [`Simulator::trace`] walks a packet along the hook timeline. Where two things
//! can happen (a random choice, a match that nobody can decide) the path forks and both are followed.

mod bridge;
mod client_port;
mod compiled;
mod config;
mod conn;
mod decide;
mod fib;
mod index;
mod input;
mod ipvs;
mod matches;
mod nat;
mod nat_hash;
mod native;
mod orders;
mod output;
mod path;
mod routing;
mod run;
mod sender;
mod sets;
mod source;
mod source6;
mod targets;
mod unfollowed;
mod walk;

pub use compiled::Simulator;
pub use ipvs::in_use as ipvs_in_use;

use crate::core::model::hops::Path;
use crate::core::model::state::ConntrackEntry;
use crate::core::model::trace::{Decisions, Fraction, Hook, Packet, RouteKind, Trace};
use run::Run;
use std::sync::Arc;
use walk::{Stage, Walk};

impl Simulator {
    /// All that can happen to the packet.
    pub fn trace(&self, packet: &Packet) -> Trace {
        self.trace_orders(Question::of(packet), true)
    }

    /// The same for a packet of a connection that conntrack knows by this entry, whatever the state says of entries.
    pub fn trace_of(&self, packet: &Packet, entry: &ConntrackEntry) -> Trace {
        self.trace_orders(Question { entry: Some(entry), ..Question::of(packet) }, true)
    }

    /// The same without the index over long chains: every rule is looked at. For tests.
    pub fn trace_linear(&self, packet: &Packet) -> Trace {
        self.trace_orders(Question { linear: true, ..Question::of(packet) }, true)
    }

    /// As [`Simulator::trace`], with a branch for every order in which rulesets of both flavours can stand, also where the
    /// outcome is the same. For tests.
    pub fn trace_every_order(&self, packet: &Packet) -> Trace {
        self.trace_orders(Question::of(packet), false)
    }

    fn trace_once(&self, question: Question<'_>, order: u8) -> Trace {
        let packet = question.packet;
        let mut run = Run::new(self, question, order);
        let mut walk = Box::new(start(packet, Path::begin(Arc::clone(&self.lists), packet.tuple)));
        let next = run.receive(&mut walk);
        run.follow(walk, next);
        let assumptions = run.assumptions.into_iter().map(Into::into).collect();
        let unfollowed = unfollowed::unfollowed(&self.unfollowed, packet.tuple.family());
        Trace { packet: packet.clone(), branches: run.branches, assumptions, unfollowed }
    }
}

/// What a simulator is asked.
#[derive(Clone, Copy)]
struct Question<'q> {
    packet: &'q Packet,
    /// The packet's, instead of those of the state.
    entry: Option<&'q ConntrackEntry>,
    /// Without the index over long chains.
    linear: bool,
}

impl<'q> Question<'q> {
    const fn of(packet: &'q Packet) -> Self {
        Self { packet, entry: None, linear: false }
    }
}

fn start(packet: &Packet, path: Path) -> Walk<'_> {
    Walk {
        packet,
        tuple: packet.tuple,
        input: packet.input.as_ref(),
        phys_in: None,
        output: None,
        hook_output: None,
        output_unknown: false,
        gateway: None,
        to_self: false,
        mark: packet.mark,
        ttl: packet.ttl,
        tos: packet.tos,
        local: packet.input.is_none(),
        arrived_as: RouteKind::Unicast,
        looped: false,
        bridged: false,
        flooded: false,
        conn: conn::Conn::begins(packet.tuple),
        replaced: None,
        leaves_as: RouteKind::Unicast,
        copied: None,
        nat_by: None,
        remembered: Vec::new(),
        probability: Fraction::ONE,
        decisions: Decisions::new(),
        path,
        stage: Stage { hook: Hook::Output, entry: 0, nat: 0 },
        frames: walk::Frames::new(),
        way: None,
        again: None,
        before_mangle: None,
    }
}

#[cfg(test)]
mod tests;
