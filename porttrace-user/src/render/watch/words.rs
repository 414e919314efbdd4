//! The words of the live log: verdict sentences, packet labels, durations, sizes.

use super::predicted::{drop_words, expectation, predicted_end, refused_by_kernel};
use super::{Context, Report, inside, listener, silence};
use crate::core::correlate::drops::DroppedBy;
use crate::core::correlate::flow::{ACK, FIN, RST, SYN, Sighting, Way};
use crate::core::correlate::judge::{Outcome, Refusal, Refuser};
use crate::core::correlate::story::PacketSeen;
use crate::core::diagnose::Severity;
use crate::core::model::flow::Proto;
use crate::core::model::trace::{Action, Hop, RuleRef, Verdict};
use porttrace_ebpf::Kind;
use std::net::SocketAddr;

/// How a verdict is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Good,
    Bad,
    Unsure,
}

impl Mood {
    pub const fn mark(self) -> &'static str {
        match self {
            Self::Good => "✓",
            Self::Bad => "✗",
            Self::Unsure => "?",
        }
    }
}

/// The verdict in one sentence: what was seen, and the finding that explains it. `timed` adds how long it took.
pub fn verdict(report: &Report, context: &Context<'_>, timed: bool) -> (Mood, String) {
    let (mood, text) = seen(report, context, timed);
    match &report.finding {
        None => (mood, text),
        Some(finding) => {
            let text = format!("{text}; {}: {}", finding.id, finding.brief());
            (if finding.severity == Severity::Error { Mood::Bad } else { mood }, text)
        }
    }
}

fn seen(report: &Report, context: &Context<'_>, timed: bool) -> (Mood, String) {
    let time = |after_ns: u64| if timed { format!(" after {}", duration(after_ns)) } else { String::new() };
    match &report.outcome {
        Outcome::Answered { by, after_ns } => {
            let onward = inside::passed_on(report);
            let stands_for = silence::stands_for(report, context);
            (Mood::Good, format!("answered by {}{stands_for}{onward}{}", who(*by, report, context), time(*after_ns)))
        }
        Outcome::Refused { by, from, how, after_ns } => {
            (Mood::Bad, refused(*by, *from, *how, &time(*after_ns), report, context))
        }
        Outcome::AnswerLost { by, entered, .. } => {
            let lost = entered.map_or_else(
                || "this node dropped the answer".to_owned(),
                |entered| {
                    let interface = context.interfaces.name(entered);
                    format!("the answer entered {interface} and never left towards the client")
                },
            );
            (Mood::Bad, format!("{} answered, but {lost}{}", who(*by, report, context), why_lost(report)))
        }
        Outcome::Dropped { reason, .. } => (Mood::Bad, dropped(*reason, report, context)),
        Outcome::Silent { reached, tries } => silence::silent(*reached, *tries, report, context),
        Outcome::JoinedLate => {
            (Mood::Unsure, "already open when porttrace began: its first packet was not seen".to_owned())
        }
    }
}

/// The verdict of a connection whose answer came after it was told as unanswered.
pub fn late(verdict: &str) -> String {
    format!("late, after it was called unanswered: {verdict}")
}

/// What to change, where the evidence is plain.
pub fn advice(report: &Report, context: &Context<'_>) -> Option<String> {
    if let Some(finding) = &report.finding {
        return Some(finding.change.clone());
    }
    let Outcome::Refused { by, from, how, .. } = &report.outcome else { return None };
    if let (Refuser::ThisNode | Refuser::Unseen, Some(Verdict::Rejected { by: Some(rule), .. })) =
        (by, predicted_end(report))
    {
        return comment_of(report, rule).contains("has no endpoints").then(|| {
            "give the Service a ready endpoint: does its selector match a pod, and is that pod ready?".to_owned()
        });
    }
    let closed = matches!(by, Refuser::Behind { .. } | Refuser::Unseen) && how.is_port_closed();
    if closed { listener::advice(*from, report, context) } else { None }
}

/// `10.244.1.9:80 (default/frontend)`.
pub(super) fn who(address: SocketAddr, report: &Report, context: &Context<'_>) -> String {
    match context.owners.name_of(report.flow.original.proto, address) {
        Some(name) => format!("{address} ({name})"),
        None => address.to_string(),
    }
}

fn refused(by: Refuser, from: SocketAddr, how: Refusal, after: &str, report: &Report, context: &Context<'_>) -> String {
    let answer = match how {
        Refusal::TcpReset => "RST".to_owned(),
        Refusal::SctpAbort => "ABORT".to_owned(),
        Refusal::Icmp { v6, kind, code } => format!("ICMP {}", icmp(v6, kind, code)),
    };
    match by {
        Refuser::Client => format!("given up by the client: it sent RST{after}, before any answer"),
        Refuser::Behind { ifindex } => {
            let interface = context.interfaces.name(ifindex);
            let why = why_closed(from, how, report, context);
            format!("refused by {} behind {interface} ({answer}{after}){why}", who(from, report, context))
        }
        Refuser::Unseen
            if !matches!(predicted_end(report), Some(Verdict::Rejected { .. } | Verdict::Delivered { .. })) =>
        {
            if let Some(end) = silence::misses(report, context) {
                return format!("refused ({answer}{after}); {end}");
            }
            let why = why_closed(from, how, report, context);
            format!(
                "refused by {} or on the way there, which was not seen ({answer}{after}){why}",
                who(from, report, context)
            )
        }
        Refuser::ThisNode | Refuser::Unseen => match predicted_end(report) {
            Some(Verdict::Rejected { with, by: Some(rule) }) => {
                format!("rejected by {}{} with {with}{after}", rule_name(rule), comment_of(report, rule))
            }
            _ if how.is_port_closed() => format!("refused by this node ({answer}{after}): nothing listens on {from}"),
            Some(Verdict::Rejected { by: None, .. }) if report.finding.is_none() => {
                format!("refused by this node ({answer}{after}){}", expectation(report))
            }
            _ => {
                let why = dropped_because(report, context).map(|why| format!(": {why}")).unwrap_or_default();
                format!("refused by this node ({answer}{after}){why}")
            }
        },
    }
}

/// What the pod says of a refusal, or what is known of who listens there.
fn why_closed(from: SocketAddr, how: Refusal, report: &Report, context: &Context<'_>) -> String {
    match (inside::refused(report), &report.finding) {
        (Some(why), _) => why,
        (None, None) if how.is_port_closed() => listener::no_listener(from, report, context),
        _ => String::new(),
    }
}

/// What the rules say of an answer that was dropped.
fn why_lost(report: &Report) -> String {
    match (report.story.answer_dropped_by(), &report.story.answer_end) {
        (Some(by), _) => format!(": dropped {}", dropper(by)),
        (None, Some(end)) if report.finding.is_none() => refused_by_kernel(end),
        _ => String::new(),
    }
}

fn dropped(reason: u32, report: &Report, context: &Context<'_>) -> String {
    let name = context.drop_reason(reason);
    // A reason of the kernel's own is another one, whatever a rule would have done later.
    let by_rules = matches!(name.as_str(), "NETFILTER_DROP" | "NOT_SPECIFIED") || name.starts_with("reason ");
    match predicted_end(report).filter(|_| by_rules) {
        Some(Verdict::Dropped { by: Some(rule), .. }) => {
            format!("dropped by {}{}; the kernel says {name}", rule_name(rule), comment_of(report, rule))
        }
        // REJECT answers at most so often (net.ipv4.icmp_ratelimit); then it only drops.
        Some(Verdict::Rejected { by: Some(rule), .. }) => {
            let rule_and_comment = format!("{}{}", rule_name(rule), comment_of(report, rule));
            format!("rejected by {rule_and_comment} without an answer; the kernel says {name}")
        }
        _ => match kernel_reason(&name, report) {
            Some(words) => format!("dropped by this node: {words} ({name})"),
            None if report.finding.is_none() => format!("dropped by this node: {name}{}", expectation(report)),
            None => format!("dropped by this node: {name}"),
        },
    }
}

/// The kernel's common reasons in words (include/net/dropreason-core.h).
fn kernel_reason(name: &str, report: &Report) -> Option<String> {
    let to = report.flow.destination();
    Some(match name {
        "NO_SOCKET" => format!("nothing listens on {to}"),
        "IP_INNOROUTES" | "IP_OUTNOROUTES" => format!("no route to {}", to.ip()),
        "IP_RPFILTER" => format!("rp_filter: the way back to {} leads elsewhere", report.flow.original.src),
        "IP_LOCAL_SOURCE" | "IP_INVALID_SOURCE" | "IP_LOCALNET" => {
            "a martian address (127/8 needs route_localnet)".to_owned()
        }
        "NETFILTER_DROP" => match (predicted_end(report), report.story.unfollowed.as_slice()) {
            // Netfilter routes anew what it rewrote, and then drops it for no rule's sake.
            (Some(Verdict::Dropped { reason, by: None }), _) => {
                format!("netfilter; predicted: {}", drop_words(reason))
            }
            (_, []) => "netfilter, and no rule that porttrace read explains it".to_owned(),
            (_, tables) => format!(
                "netfilter, and no rule that porttrace read explains it; native nftables rules may ({}), which could not be read",
                tables.join(", ")
            ),
        },
        "NEIGH_FAILED" | "NEIGH_QUEUEFULL" | "NEIGH_DEAD" => format!("{} does not answer on its link", to.ip()),
        "PKT_TOO_BIG" => "it is too big for the next link".to_owned(),
        "XFRM_POLICY" => "an IPsec policy".to_owned(),
        "SOCKET_RCVBUFF" => format!("the receive buffer of the socket on {to} is full"),
        "TCP_LISTEN_OVERFLOW" => format!("the accept queue of {to} is full"),
        _ => return None,
    })
}

/// Why the kernel says that it dropped the request, where that is a plain reason.
fn dropped_because(report: &Report, context: &Context<'_>) -> Option<String> {
    let is_request = |seen: &&Sighting| seen.event.kind == Kind::Dropped && seen.way == Way::Request;
    let drop = report.flow.sightings.iter().find(is_request)?;
    kernel_reason(&context.drop_reason(drop.event.reason), report)
}

/// `filter KUBE-FORWARD #1`, or `filter FORWARD policy`.
pub fn rule_name(rule: &RuleRef) -> String {
    match rule.number() {
        Some(number) => format!("{} {} #{number}", rule.table, rule.chain),
        None => format!("the policy of {} {}", rule.table, rule.chain),
    }
}

/// `in FORWARD by filter KUBE-FORWARD #1 (-m conntrack --ctstate INVALID)`.
pub fn dropper(by: &DroppedBy) -> String {
    let because = by.rule.because();
    let because = if because.is_empty() { because } else { format!(" ({because})") };
    format!("in {} by {}{because}", by.hook, rule_name(&by.rule))
}

/// ` ("default/noep:p80 has no endpoints")`: the comment of a rule on the predicted path.
pub fn comment_of(report: &Report, rule: &RuleRef) -> String {
    let hops = report.story.branch.iter().flat_map(|branch| &branch.hops);
    let text = hops.filter_map(|hop| match hop {
        Hop::Rule { rule: of, .. } if of == rule => Some(of.text()),
        _ => None,
    });
    let text = text.last().unwrap_or_default();
    comment(&text).map_or_else(String::new, |comment| format!(" (\"{comment}\")"))
}

/// The comment in a rule's text.
pub fn comment(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once("--comment ")?;
    match rest.strip_prefix('"') {
        // iptables-save escapes inner quotes with a backslash.
        Some(quoted) => {
            let mut escaped = false;
            let end = quoted.find(|c| {
                let ends = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                ends
            })?;
            quoted.get(..end)
        }
        None => rest.split_whitespace().next(),
    }
}

/// What a rule did, in the words of iptables.
pub fn action(action: &Action) -> String {
    match action {
        Action::Continue => "counts".to_owned(),
        Action::Jump { chain } | Action::Goto { chain } => format!("→ {}", chain.chain),
        Action::Accept => "ACCEPT".to_owned(),
        Action::Drop => "DROP".to_owned(),
        Action::Reject { with } => format!("REJECT with {with}"),
        Action::Return => "RETURN".to_owned(),
        Action::Mark { mark } => format!("MARK {mark:#x}"),
        Action::ConnMark { mark } => format!("CONNMARK {mark:#x}"),
        Action::Dnat { to } => format!("DNAT to {to}"),
        Action::Snat { to } => format!("SNAT to {to}"),
        Action::Masquerade => "MASQUERADE".to_owned(),
        Action::Redirect { to } => format!("REDIRECT to {to}"),
        Action::Netmap { to } => format!("NETMAP to {to}"),
        Action::Notrack => "NOTRACK".to_owned(),
        Action::Other { target } => target.to_string(),
    }
}

/// `SYN`, `SYN ACK`, `RST`, `datagram 12 B`, `ICMP port unreachable`.
pub fn packet(seen: &PacketSeen) -> String {
    if let Some((kind, code)) = seen.icmp {
        return format!("ICMP {}", icmp(seen.tuple.dst.is_ipv6(), kind, code));
    }
    match seen.tuple.proto {
        Proto::Tcp => tcp(seen),
        Proto::Sctp => sctp(seen.l4_flags).to_owned(),
        Proto::Udp => format!("datagram {} B", seen.payload),
        other => other.to_string(),
    }
}

fn tcp(seen: &PacketSeen) -> String {
    let names: Vec<&str> = [(SYN, "SYN"), (FIN, "FIN"), (RST, "RST"), (ACK, "ACK")]
        .into_iter()
        .filter(|(bit, _)| seen.l4_flags & bit != 0)
        .map(|(_, name)| name)
        .collect();
    // The ACK of an RST tells a reader nothing.
    let names = if names == ["RST", "ACK"] { "RST".to_owned() } else { names.join(" ") };
    if seen.payload > 0 { format!("{names} {} B", seen.payload) } else { names }
}

const fn sctp(chunk: u8) -> &'static str {
    match chunk {
        0 => "DATA",
        1 => "INIT",
        2 => "INIT ACK",
        3 => "SACK",
        6 => "ABORT",
        7 => "SHUTDOWN",
        8 => "SHUTDOWN ACK",
        10 => "COOKIE ECHO",
        11 => "COOKIE ACK",
        14 => "SHUTDOWN COMPLETE",
        _ => "chunk",
    }
}

/// The common unreachables by name (RFC 792, RFC 4443), others by number.
pub fn icmp(v6: bool, kind: u8, code: u8) -> String {
    let name = match (v6, kind, code) {
        (false, 3, 0) => "network unreachable",
        (false, 3, 1) => "host unreachable",
        (false, 3, 2) => "protocol unreachable",
        (false, 3, 3) => "port unreachable",
        (false, 3, 4) => "fragmentation needed",
        (false, 3, 9 | 10 | 13) => "administratively prohibited",
        (false, 11, _) => "time exceeded",
        (true, 1, 0) => "no route",
        (true, 1, 1) => "administratively prohibited",
        (true, 1, 3) => "address unreachable",
        (true, 1, 4) => "port unreachable",
        (true, 2, _) => "packet too big",
        (true, 3, _) => "time exceeded",
        _ => return format!("type {kind} code {code}"),
    };
    name.to_owned()
}

/// `36 µs`, `1.25 ms`, `1 s`, `2 min 5 s`.
pub fn duration(ns: u64) -> String {
    let trim = |text: String| {
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    };
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..100_000 => format!("{} µs", ns / 1_000),
        100_000..1_000_000_000 => format!("{} ms", trim(format!("{:.2}", ns as f64 / 1e6))),
        1_000_000_000..60_000_000_000 => format!("{} s", trim(format!("{:.2}", ns as f64 / 1e9))),
        _ => format!("{} min {} s", ns / 60_000_000_000, ns / 1_000_000_000 % 60),
    }
}

/// `312 B`, `4.1 KiB`, `3.2 MiB`.
pub fn bytes(count: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    for (size, unit) in units {
        if count >= size {
            return format!("{:.1} {unit}", count as f64 / size as f64);
        }
    }
    format!("{count} B")
}
