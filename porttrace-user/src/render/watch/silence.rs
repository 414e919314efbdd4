//! The verdict of a connection without an answer, and what was not seen of any: how far it came, as far as that is seen.

use super::predicted::{expectation, is_beyond_rules, refused_by_kernel};
use super::words::{Mood, duration, who};
use super::{Context, Report, inside};
use crate::core::correlate::judge::Reached;
use crate::core::model::flow::Proto;
use crate::core::model::trace::Verdict;

/// `tries`: how often it was sent.
pub(super) fn silent(reached: Reached, tries: usize, report: &Report, context: &Context<'_>) -> (Mood, String) {
    let what = match report.flow.original.proto {
        Proto::Tcp => "SYN",
        Proto::Sctp => "INIT",
        _ => "the datagram",
    };
    let times = if tries > 1 { format!(" {tries} times") } else { String::new() };
    let wait = duration(context.silence_ns);
    let udp = report.flow.original.proto == Proto::Udp;
    let mood = if udp { Mood::Unsure } else { Mood::Bad };
    let end = report.flow.destination();
    let to = who(end, report, context);
    // Where eBPF decides, a packet that it rewrites looks like none of this connection, and so does its answer.
    if is_beyond_rules(report) && !matches!(reached, Reached::Left { .. } | Reached::LocalIn) {
        let text = format!("unknown: {what} was seen{times}, but not what became of it, and no answer in {wait}");
        return (Mood::Unsure, text);
    }
    match (reached, misses(report, context)) {
        (Reached::Entered { .. } | Reached::Confirmed, Some(end)) if report.flow.input_ifindex().is_some() => {
            let way = match reached {
                Reached::Entered { ifindex } => format!("entered {}{times}", context.interfaces.name(ifindex)),
                _ => format!("passed all rules{times}"),
            };
            let text = format!("no answer: {what} {way}, nothing came back in {wait}; {end}");
            owed_by_sockets(mood, text, report)
        }
        // What comes back to a process of this node would not be seen either.
        (Reached::Sent, Some(end)) => {
            (Mood::Unsure, format!("unknown: {what} was sent by a local process{times}; {end}"))
        }
        (Reached::Confirmed, _) if report.flow.input_ifindex().is_none() => (
            Mood::Unsure,
            format!("unknown: {what} passed all rules{times} towards {to}, and nothing further was seen"),
        ),
        (Reached::Entered { ifindex }, _) => {
            let interface = context.interfaces.name(ifindex);
            let expectation = expectation(report);
            (
                Mood::Bad,
                format!("lost on this node: {what} entered {interface}{times} and went no further{expectation}"),
            )
        }
        (Reached::Sent, None) => {
            let expectation = expectation(report);
            (Mood::Bad, format!("lost on this node: {what} was sent by a local process and never left{expectation}"))
        }
        (Reached::PostRouting, _) => {
            let asks = if end.is_ipv4() { "ARP" } else { "NDP" };
            let text = format!(
                "no answer: {what} passed all rules{times} towards {to}, but left by no interface in {wait}, as where \
                 nobody answers for an address on its link ({asks})"
            );
            (Mood::Bad, text)
        }
        (Reached::Left { .. } | Reached::Confirmed, _) => {
            let way = match reached {
                Reached::Left { ifindex } => format!("left {}{times} for {to}", context.interfaces.name(ifindex)),
                _ => format!("passed all rules{times} towards {to} (where it went was not seen)"),
            };
            let inside = inside::silent(report, context);
            let text = format!("no answer: {what} {way}, nothing came back in {wait}{inside}");
            (mood, if udp { format!("{text} (a UDP server need not answer)") } else { text })
        }
        (Reached::LocalIn, _) => {
            let text =
                format!("no answer: {what} was handed to this node's own sockets{times}, nothing came back in {wait}");
            owed_by_sockets(mood, text, report)
        }
    }
}

/// The verdict on what this node's sockets got, with what keeps them from answering by its routes.
fn owed_by_sockets(mood: Mood, text: String, report: &Report) -> (Mood, String) {
    match report.story.answer_end.as_ref().map(refused_by_kernel) {
        Some(why) if !why.is_empty() => (Mood::Bad, format!("{text}: their answer cannot leave{why}")),
        _ => (mood, text),
    }
}

/// How the request ends by the rules, where that would not have been seen.
pub(super) fn misses(report: &Report, context: &Context<'_>) -> Option<String> {
    let end = context.sight.misses(report.flow.original, report.story.branch.as_ref())?;
    Some(match end {
        Verdict::Forwarded { interface, to, .. } => {
            format!("by the rules it went on to {} by {interface}, which is not seen here", to.destination())
        }
        _ => "by the rules this node's own sockets got it, which is not seen here".to_owned(),
    })
}

/// Whom the node's address stands for by the rules, where the rewrite was not seen: ` (by the rules that is 10.244.1.9:80)`.
pub(super) fn stands_for(report: &Report, context: &Context<'_>) -> String {
    match context.sight.misses(report.flow.original, report.story.branch.as_ref()) {
        Some(Verdict::Forwarded { to, .. }) if report.flow.reply.is_none() => {
            format!(" (by the rules that is {})", who(to.destination(), report, context))
        }
        _ => String::new(),
    }
}
