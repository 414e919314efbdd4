//! Which rule dropped a packet, where the rules that are predicted for it name one.

use super::flow::{Flow, Sighting, Way};
use super::judge::{Outcome, Reached};
use super::sight::Sight;
use super::story::{Story, What};
use crate::core::model::interfaces::Interfaces;
use crate::core::model::state::ConntrackEntry;
use crate::core::model::trace::{Branch, Hook, Hop, Packet, RuleRef, Trace, Verdict};
use crate::core::simulate::Simulator;
use porttrace_ebpf::Kind;

/// A DROP rule or policy, and the hook in which the packet met it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DroppedBy {
    pub hook: Hook,
    pub rule: RuleRef,
}

impl DroppedBy {
    /// The end of a branch; `None` where no rule drops the packet.
    pub fn in_branch(branch: &Branch) -> Option<Self> {
        let Verdict::Dropped { by: Some(by), .. } = &branch.verdict else { return None };
        branch.hops.iter().rev().find_map(|hop| match hop {
            Hop::Rule { hook, rule, .. } if rule == by => Some(Self { hook: *hook, rule: rule.clone() }),
            _ => None,
        })
    }
}

/// An answer that did not get back to the client, as it began or entered: what to ask the rules to learn why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    packet: Packet,
    /// `None`: conntrack did not know it (ctstate INVALID).
    entry: Option<ConntrackEntry>,
}

impl Answer {
    /// The one that did not get back in a connection that came out so: where a socket here got the request (seen, or by its
    /// branch where `sight` would not have shown it), what that owes.
    pub fn missed(
        flow: &Flow,
        outcome: &Outcome,
        branch: Option<&Branch>,
        sight: Sight,
        interfaces: &Interfaces,
    ) -> Option<Self> {
        let was_delivered = match outcome {
            Outcome::Silent { reached: Reached::LocalIn, .. } => true,
            Outcome::Silent { reached: Reached::Entered { .. } | Reached::Confirmed, .. } => {
                matches!(sight.misses(flow.original, branch), Some(Verdict::Delivered { .. }))
            }
            _ => false,
        };
        if was_delivered { Some(Self::owed(flow)) } else { Self::dropped(flow, interfaces) }
    }

    /// The one that was seen to be dropped. `None`: nothing of that kind was seen, or where it entered was not.
    fn dropped(flow: &Flow, interfaces: &Interfaces) -> Option<Self> {
        let dropped = |seen: &&Sighting| seen.event.kind == Kind::Dropped && seen.way == Way::Reply;
        let event = &flow.sightings.iter().find(dropped)?.event;
        let entered = flow.seen(Way::Reply).find(|seen| seen.event.kind == Kind::TcIngress);
        let is_own = || event.ifindex == 0 || flow.sightings.iter().any(|seen| seen.event.kind == Kind::LocalIn);
        // Behind the last hook the drop itself has the output interface.
        let (tuple, input) = match (entered, event.conntrack) {
            (Some(entered), _) => (entered.event.packet?, Some(entered.event.ifindex)),
            (None, Some(entry)) if is_own() => (entry.reply, None),
            // Few pods use conntrack.
            (None, None) if is_own() => (event.packet?, None),
            (None, None) => (event.packet?, Some(event.ifindex)),
            (None, Some(_)) => return None,
        };
        let packet = Packet::first_of(tuple, input.map(|ifindex| interfaces.name(ifindex).into()));
        let known = event.conntrack;
        let entry = known.map(|one| ConntrackEntry { mark: one.mark, ..ConntrackEntry::of(one.original, one.reply) });
        Some(Self { packet: Packet { tcp_flags: event.l4_flags, ..packet }, entry })
    }

    /// The one that sockets here owe to a request which was handed to them. Without a route back nothing is sent
    /// (`inet_csk_route_req`, net/ipv4/inet_connection_sock.c), and nothing is said of it.
    fn owed(flow: &Flow) -> Self {
        let reply = flow.reply.unwrap_or_else(|| flow.original.inverted());
        Self { packet: Packet::first_of(reply, None), entry: Some(ConntrackEntry::of(flow.original, reply)) }
    }

    /// What the rules say of it.
    pub fn trace(&self, simulator: &Simulator) -> Trace {
        match &self.entry {
            Some(entry) => simulator.trace_of(&self.packet, entry),
            None => simulator.trace(&self.packet),
        }
    }
}

impl Story {
    /// Takes over how an answer ends by the rules, where its trace can end in one way only; names the rule that drops it, if one does.
    pub fn tell_answer(&mut self, trace: &Trace) {
        let [only] = trace.branches.as_slice() else { return };
        self.take_dropper(Way::Reply, DroppedBy::in_branch(only));
        self.answer_end = Some(only.verdict.clone());
    }

    /// Names the rule that drops the request by prediction.
    pub(super) fn with_dropper(mut self) -> Self {
        let named = self.branch.as_ref().and_then(DroppedBy::in_branch);
        self.take_dropper(Way::Request, named);
        self
    }

    fn take_dropper(&mut self, way: Way, named: Option<DroppedBy>) {
        for line in &mut self.lines {
            if let What::Drop { way: of, by, .. } = &mut line.what
                && *of == way
            {
                by.clone_from(&named);
            }
        }
    }

    /// The rule that dropped the answer, if one was named.
    pub fn answer_dropped_by(&self) -> Option<&DroppedBy> {
        self.lines.iter().find_map(|line| match &line.what {
            What::Drop { way: Way::Reply, by, .. } => by.as_ref(),
            _ => None,
        })
    }
}
