//! What a verdict says of the pod's own view of a connection.

use super::predicted::refused_by_kernel;
use super::words::{dropper, duration, rule_name};
use super::{Context, Report};
use crate::core::correlate::inside::Inside;
use crate::core::correlate::judge::{Outcome, Reached, Refuser};
use crate::core::model::trace::{DropReason, Verdict};

/// Where the pod sent an answered connection on to, if it did: ` (pod x passes it on to 10.96.0.10:80)`.
pub(super) fn passed_on(report: &Report) -> String {
    let onward = report.inside.as_deref().and_then(|inside| Some((inside, inside.flow.dnat().flatten()?)));
    onward.map_or_else(String::new, |(inside, to)| format!(" ({} passes it on to {})", pod(inside), to.destination()))
}

/// Why the pod refused; `None`: its view says no more than that nothing listens.
pub(super) fn refused(report: &Report) -> Option<String> {
    let inside = report.inside.as_deref()?;
    let Outcome::Refused { by, from, .. } = inside.outcome else { return None };
    match (by, verdict(inside)) {
        (Refuser::Behind { .. }, _) => Some(format!(": {} passes it on to {from}, which refuses it", pod(inside))),
        (Refuser::ThisNode, Some(Verdict::Rejected { by: Some(rule), .. })) => {
            Some(format!(": inside {}, {} rejects it", pod(inside), rule_name(rule)))
        }
        _ => None,
    }
}

/// How far a connection without an answer came inside the pod.
pub(super) fn silent(report: &Report, context: &Context<'_>) -> String {
    let Some(inside) = report.inside.as_deref() else { return String::new() };
    let pod = pod(inside);
    match &inside.outcome {
        Outcome::Dropped { reason, .. } => {
            let by = match verdict(inside) {
                Some(Verdict::Dropped { by: Some(rule), .. }) => format!(" by {}", rule_name(rule)),
                _ => String::new(),
            };
            let why = if is_elsewhere(inside) {
                format!(": {} is not its address", inside.flow.original.dst)
            } else {
                String::new()
            };
            format!("; inside {pod} it was dropped{by} ({}){why}", context.drop_reason(*reason))
        }
        Outcome::Silent { reached: Reached::LocalIn, .. } => {
            format!("; inside {pod} it was handed to the pod's own sockets{}", why_unanswered(inside))
        }
        Outcome::Silent { reached: Reached::Left { ifindex }, .. } => {
            let to = inside.flow.destination();
            format!(
                "; {pod} sent it on to {to} by {}, and no answer came back there either",
                inside.interfaces.name(*ifindex)
            )
        }
        Outcome::Silent { reached, .. } => {
            match inside.sight.misses(inside.flow.original, inside.story.branch.as_ref()) {
                Some(Verdict::Forwarded { interface, to, .. }) => {
                    format!(
                        "; inside {pod} it arrived, and by its rules it went on to {} by {interface}",
                        to.destination()
                    )
                }
                Some(_) => format!(
                    "; inside {pod} it arrived, and by its rules the pod's own sockets got it{}",
                    why_unanswered(inside)
                ),
                None if *reached == Reached::PostRouting => {
                    format!("; inside {pod} it passed all rules and left by no interface")
                }
                None if *reached == Reached::Confirmed => {
                    format!("; inside {pod} it passed all rules, and where it went was not seen")
                }
                None => format!("; inside {pod} it arrived and went no further{}", expectation(inside)),
            }
        }
        Outcome::Answered { by, after_ns } => {
            format!("; {by} answered inside {pod} after {}, and the answer did not get here", duration(*after_ns))
        }
        Outcome::AnswerLost { by, entered: None, .. } => {
            format!("; {by} answered inside {pod}, which dropped the answer itself{}", why_lost(inside))
        }
        Outcome::AnswerLost { by, entered: Some(entered), .. } => {
            let interface = inside.interfaces.name(*entered);
            format!(
                "; {by} answered, but the answer entered {interface} of {pod} and never left it{}",
                why_lost(inside)
            )
        }
        Outcome::Refused { .. } | Outcome::JoinedLate => String::new(),
    }
}

/// What keeps the pod's sockets from answering, by its routes.
fn why_unanswered(inside: &Inside) -> String {
    let why = inside.story.answer_end.as_ref().map(refused_by_kernel).filter(|why| !why.is_empty());
    why.map_or_else(String::new, |why| format!(", whose answer cannot leave{why}"))
}

/// What the pod's rules say of an answer that it dropped.
fn why_lost(inside: &Inside) -> String {
    match (inside.story.answer_dropped_by(), &inside.story.answer_end) {
        (Some(by), _) => format!(": {}", dropper(by)),
        (None, Some(end)) => refused_by_kernel(end),
        (None, None) => String::new(),
    }
}

/// By the pod's routes, what it got is for somebody else.
fn is_elsewhere(inside: &Inside) -> bool {
    let is_rewritten = inside.flow.dnat().flatten().is_some();
    let passes_on = matches!(
        verdict(inside),
        Some(Verdict::Forwarded { .. } | Verdict::Dropped { reason: DropReason::ForwardingDisabled, by: None })
    );
    passes_on && !is_rewritten
}

/// What the pod's rules say about a packet that vanished there.
fn expectation(inside: &Inside) -> String {
    match verdict(inside) {
        Some(Verdict::Dropped { by: Some(rule), .. }) => format!(": {} drops it", rule_name(rule)),
        Some(Verdict::Unknown { because, .. }) => format!("; the rules leave it open: {because}"),
        Some(end) => refused_by_kernel(end),
        None => String::new(),
    }
}

fn verdict(inside: &Inside) -> Option<&Verdict> {
    inside.story.branch.as_ref().map(|branch| &branch.verdict)
}

/// `pod default/frontend`.
fn pod(inside: &Inside) -> String {
    format!("pod {}", inside.name)
}
