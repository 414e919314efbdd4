//! Which rule dropped a packet, where the rules that are predicted for it name one.

use super::flow::{Flow, Way};
use super::story::{Story, What};
use crate::core::model::interfaces::Interfaces;
use crate::core::model::trace::{Branch, Hook, Hop, Packet, RuleRef, Trace, Verdict};
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

/// An answer that was dropped without conntrack knowing it (ctstate INVALID): as a packet to ask the rules about, without any
/// entry. `None`: nothing of that kind was seen.
pub fn unknown_answer(flow: &Flow, interfaces: &Interfaces) -> Option<Packet> {
    let dropped = flow.sightings.iter().map(|seen| (seen, &seen.event)).find(|(seen, event)| {
        event.kind == Kind::Dropped && seen.way == Way::Reply && event.conntrack.is_none() && event.ifindex != 0
    });
    let (_, event) = dropped?;
    let packet = Packet::first_of(event.packet?, Some(interfaces.name(event.ifindex).into()));
    Some(Packet { tcp_flags: event.l4_flags, ..packet })
}

impl Story {
    /// Names the rule that drops the packets of one way, where the trace of such a packet can only end there.
    pub fn name_dropper(&mut self, way: Way, trace: &Trace) {
        let [only] = trace.branches.as_slice() else { return };
        self.take_dropper(way, DroppedBy::in_branch(only));
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
