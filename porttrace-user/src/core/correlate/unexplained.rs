//! Connections that were answered though the rules say that they cannot be: they went a way that no rule explains.

use super::flow::{Flow, Way};
use super::judge::{Outcome, judge};
use super::story::{Certainty, Line, Story, What};
use crate::core::model::interfaces::Interfaces;
use crate::core::model::trace::{Branch, Trace, Verdict};
use porttrace_ebpf::Kind;

impl Story {
    /// What was seen is not what the rules say.
    pub const fn contradicts(&self) -> bool {
        self.disagrees || self.is_unexplained
    }

    /// Says, before what came back, that no rule explains the answer, where that is so.
    pub(super) fn with_unexplained(mut self, flow: &Flow, trace: Option<&Trace>, interfaces: &Interfaces) -> Self {
        let Some(branch) = &self.branch else { return self };
        let is_forbidden = trace.is_some_and(|trace| trace.branches.iter().all(|branch| forbids(branch, flow)));
        if !is_forbidden || !matches!(judge(flow, interfaces), Outcome::Answered { .. }) {
            return self;
        }
        let comes_back = |line: &Line| matches!(line.what, What::Packet { way: Way::Reply, .. });
        let at = self.lines.iter().position(comes_back).unwrap_or(self.lines.len());
        let what = What::Unexplained { predicted: branch.verdict.clone() };
        self.lines.insert(at, Line { offset_ns: None, certainty: Certainty::Differs, what });
        self.is_unexplained = true;
        self
    }
}

/// Whether a connection with this branch gets no answer, as far as the rules and the listening sockets tell.
fn forbids(branch: &Branch, flow: &Flow) -> bool {
    // Where netfilter saw it as it was sent, or it was handed to this node's own sockets, only what listens is another by now.
    let went_as_predicted =
        || flow.reply.is_some() || flow.sightings.iter().any(|seen| seen.event.kind == Kind::LocalIn);
    match &branch.verdict {
        Verdict::Rejected { .. } | Verdict::Dropped { .. } => true,
        Verdict::Delivered { listening, .. } => *listening == Some(false) && !went_as_predicted(),
        Verdict::Forwarded { .. } | Verdict::Unknown { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::flow::{ACK, SYN};
    use super::super::story::tell;
    use super::super::tests::{CLIENT, ETH0, MS, TO_CLIENT, event, interfaces, reported, trace, tuple, with_conntrack};
    use super::*;
    use crate::core::model::event::Event;

    #[test]
    fn an_answer_against_the_rules_is_told_before_it() {
        let seen = |more: &[Event]| {
            let mut events = vec![event(1000, Kind::TcIngress, ETH0, CLIENT, SYN)];
            events.extend_from_slice(more);
            events.push(event(36_000, Kind::TcEgress, ETH0, TO_CLIENT, SYN | ACK));
            reported(events, 200 * MS)
        };
        let ends = |verdicts: &[Verdict]| {
            let mut trace = trace(CLIENT);
            let branch = trace.branches.remove(0);
            trace.branches.extend(verdicts.iter().map(|verdict| Branch { verdict: verdict.clone(), ..branch.clone() }));
            trace
        };
        let closed = Verdict::Delivered { to: tuple(CLIENT), listening: Some(false) };
        let open = Verdict::Delivered { to: tuple(CLIENT), listening: Some(true) };
        let story = tell(&seen(&[]), Some(&ends(std::slice::from_ref(&closed))), &interfaces(), false);
        assert!(story.is_unexplained && !story.disagrees);
        let [_, said, answer] = story.lines.as_slice() else { panic!("{:?}", story.lines) };
        assert_eq!(
            (said.certainty, &said.what),
            (Certainty::Differs, &What::Unexplained { predicted: closed.clone() })
        );
        assert!(matches!(answer.what, What::Packet { way: Way::Reply, .. }));
        // What netfilter saw, or the node's sockets got, only met another listener; what may listen, listens.
        let handed = event(2000, Kind::LocalIn, ETH0, CLIENT, SYN);
        let tracked = with_conntrack(event(2000, Kind::AfterConntrack, ETH0, CLIENT, SYN), CLIENT, TO_CLIENT);
        for (flow, verdicts) in [
            (seen(&[handed]), vec![closed.clone()]),
            (seen(&[tracked]), vec![closed.clone()]),
            (seen(&[]), vec![closed, open]),
        ] {
            assert!(!tell(&flow, Some(&ends(&verdicts)), &interfaces(), false).is_unexplained, "{verdicts:?}");
        }
    }
}
