//! What is told of one connection: its story by the rules as they are, its outcome, and why.

use super::{HOUSEKEEPING, Session};
use crate::commands::watch::intake::while_reading;
use crate::commands::watch::output::Clock;
use crate::commands::watch::probing::sight;
use crate::commands::watch::reading::MOMENT;
use porttrace_ebpf::Kind;
use porttrace_user::core::correlate::drops::Answer;
use porttrace_user::core::correlate::flow::Flow;
use porttrace_user::core::correlate::inside::Inside;
use porttrace_user::core::correlate::judge::{Outcome, judge};
use porttrace_user::core::correlate::story::{Story, tell};
use porttrace_user::core::model::trace::{Packet, Trace};
use porttrace_user::render::watch::{Context, Report};
use std::collections::BTreeMap;

impl Session<'_> {
    /// Tells a connection, or (`amends`) what became of one that was told as unanswered.
    pub(super) async fn report(&mut self, flow: Flow, amends: bool) -> anyhow::Result<()> {
        // What a pod saw of it must be taken from there.
        let is_usual = !amends && self.inside.is_none();
        if is_usual && self.is_counted(&flow).await {
            return Ok(());
        }
        let outcome = judge(&flow, &self.interfaces);
        let has_failed = !matches!(outcome, Outcome::Answered { .. } | Outcome::JoinedLate);
        let (mut trace, mut story) = self.compare(&flow, &outcome);
        // Before a failure is explained, or anything else than the rules say, what may have changed a moment ago is read again.
        if (has_failed || story.contradicts() || story.left_open) && self.catch_up(&flow).await? {
            (trace, story) = self.compare(&flow, &outcome);
        }
        let inside = self.look_inside(&flow).await;
        let drop_reasons = self.drop_reasons(&flow, inside.as_deref());
        // What the pod's own rules did is not for the node's facts to explain.
        let finding = if inside.as_deref().is_some_and(Inside::explains) {
            None
        } else {
            let reason = match &outcome {
                Outcome::Dropped { reason, .. } => drop_reasons.get(reason).map(String::as_str),
                _ => None,
            };
            self.diagnosis.of((&flow, &outcome, &story, trace.as_ref()), reason, &self.rules, &self.pods)
        };
        let context = Context {
            interfaces: &self.interfaces,
            owners: &self.rules.owners,
            pods: self.pods.sockets(),
            workloads: &self.pods.workloads,
            drop_reasons: &drop_reasons,
            sight: sight(self.probe.info().conntrack_backend),
            silence_ns: self.limits.silence_ns,
        };
        let report = Report { flow, story, outcome, finding, inside };
        if amends {
            return Ok(self.printer.amend(&report, &context)?);
        }
        let shape = self.printer.report(&report, &context, Clock::now())?;
        self.alike.learn(&report, trace.as_ref(), &self.rules, shape);
        Ok(())
    }

    /// Counts a connection that is like one that was told, where those are only counted; false when it is to be told.
    async fn is_counted(&mut self, flow: &Flow) -> bool {
        let mut like = self.alike.find(flow, &self.rules, &self.pods);
        if like.as_ref().is_some_and(|told| told.has_failed) {
            self.pods.refresh(flow.destination().ip()).await;
            self.rules.follow_settings(flow.last_ns, HOUSEKEEPING).await;
            like = self.alike.find(flow, &self.rules, &self.pods);
        }
        like.is_some_and(|told| self.printer.count(&told.shape, flow, Clock::now()))
    }

    /// Reads again what may be why a connection came out as it did: rules, routes, settings, what listens here and in the pod that
    /// it was sent to. True when the node's own changed.
    async fn catch_up(&mut self, flow: &Flow) -> anyhow::Result<bool> {
        let before = self.rules.generation;
        let Self { rules, probe, correlator, events, .. } = self;
        let note = while_reading(rules.follow_until(flow.last_ns), probe, correlator, events).await?;
        self.tell_change(note)?;
        self.rules.follow_settings(flow.last_ns, MOMENT).await;
        self.rules.follow_sockets(flow.last_ns).await;
        self.pods.refresh(flow.destination().ip()).await;
        Ok(self.rules.generation != before)
    }

    /// What the rules say of a connection, and its story by them.
    fn compare(&self, flow: &Flow, outcome: &Outcome) -> (Option<Trace>, Story) {
        let trace = self.predict(flow);
        let mut story = tell(flow, trace.as_ref(), &self.interfaces, self.args.verbose > 0);
        let sight = sight(self.probe.info().conntrack_backend);
        if let Some(answer) = Answer::missed(flow, outcome, story.branch.as_ref(), sight, &self.interfaces) {
            story.tell_answer(&answer.trace(&self.rules.simulator));
        }
        (trace, story)
    }

    /// The connection as the pod saw it that it was sent to, if that is followed.
    async fn look_inside(&mut self, flow: &Flow) -> Option<Box<Inside>> {
        let pods = self.inside.as_mut()?;
        let mut inside = pods.tell(flow, self.args.verbose > 0).await?;
        if let Some((addresses, sockets)) = pods.listeners(&mut inside).await {
            // The pod's own word counts, whatever else has its address.
            self.pods.hear(addresses, &sockets);
        }
        Some(Box::new(inside))
    }

    /// The kernel's names of the drop reasons that occur in a connection.
    fn drop_reasons(&self, flow: &Flow, inside: Option<&Inside>) -> BTreeMap<u32, String> {
        let inside = inside.into_iter().flat_map(|inside| &inside.flow.sightings);
        flow.sightings
            .iter()
            .chain(inside)
            .filter(|seen| seen.event.kind == Kind::Dropped)
            .filter_map(|seen| {
                let name = self.probe.reason_name(Kind::Dropped, seen.event.reason)?;
                Some((seen.event.reason, name.to_owned()))
            })
            .collect()
    }

    /// What the rules say about the connection's first packet; nothing for a connection that is older than the session, or
    /// when they could not be read.
    fn predict(&self, flow: &Flow) -> Option<Trace> {
        if flow.joined_late || !self.rules.knows(flow.original.family()) {
            return None;
        }
        let input = flow.input_ifindex().map(|index| self.interfaces.name(index).into());
        let packet = Packet::first_of(flow.original, input);
        Some(self.rules.simulator.trace(&packet))
    }
}
