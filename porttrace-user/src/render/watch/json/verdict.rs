//! How a connection came out.

use crate::core::correlate::inside::Inside;
use crate::core::correlate::judge::{self, Reached, Refusal, Refuser};
use crate::core::diagnose::Finding;
use crate::core::model::flow::Tuple;
use crate::core::model::name::Name;
use crate::core::model::trace::{Branch, Fraction, Verdict as Predicted};
use crate::render::watch::words::{self, Mood};
use crate::render::watch::{Context, Report, predicted};
use serde::Serialize;
use std::net::SocketAddr;

/// The fields of a `verdict`.
#[derive(Serialize)]
pub struct Verdict<'a> {
    id: u64,
    #[serde(flatten)]
    outcome: Outcome,
    /// `None`: it cannot be said.
    ok: Option<bool>,
    text: String,
    finding: Option<&'a Finding>,
    advice: Option<String>,
    dnat: Half,
    snat: Half,
    conntrack: Option<Entry>,
    /// `None`: nothing was predicted.
    agrees: Option<bool>,
    predicted: Option<Prediction<'a>>,
    inside: Option<Within<'a>>,
    amends: bool,
    sightings_not_kept: u64,
}

#[derive(Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
enum Outcome {
    Answered { by: SocketAddr, after_ns: u64 },
    Refused { by: SocketAddr, after_ns: u64, refuser: &'static str, interface: Option<String>, how: String },
    AnswerLost { by: SocketAddr, after_ns: u64, interface: Option<String> },
    Dropped { reason: String, after_ns: u64 },
    Silent { tries: usize, reached: &'static str, interface: Option<String> },
    JoinedLate,
}

/// One half of NAT as conntrack did it.
#[derive(Serialize)]
struct Half {
    observed: bool,
    to: Option<SocketAddr>,
}

#[derive(Serialize)]
struct Entry {
    original: Tuple,
    reply: Tuple,
}

#[derive(Serialize)]
struct Prediction<'a> {
    probability: Fraction,
    verdict: &'a Predicted,
    r#final: Tuple,
    masquerade: bool,
    out: Option<&'a Name>,
}

/// How it came out in the pod's own view.
#[derive(Serialize)]
struct Within<'a> {
    name: &'a str,
    netns: u32,
    #[serde(flatten)]
    outcome: Outcome,
}

/// What is to be said of a connection's outcome.
pub fn fields<'a>(report: &'a Report, context: &Context<'_>) -> Verdict<'a> {
    let (mood, text) = words::verdict(report, context, false);
    let flow = &report.flow;
    let branch = report.story.branch.as_ref();
    Verdict {
        id: flow.id,
        outcome: Outcome::of(&report.outcome, context),
        ok: match mood {
            Mood::Good => Some(true),
            Mood::Bad => Some(false),
            Mood::Unsure => None,
        },
        text,
        finding: report.finding.as_ref(),
        advice: words::advice(report, context),
        dnat: Half::of(flow.dnat(), Tuple::destination),
        snat: Half::of(flow.snat(), Tuple::source),
        conntrack: flow.reply.map(|reply| Entry { original: flow.original, reply }),
        agrees: match branch {
            _ if report.story.contradicts() => Some(false),
            Some(_) if !predicted::is_beyond_rules(report) && !report.story.left_open => Some(true),
            _ => None,
        },
        predicted: branch.map(Prediction::of),
        inside: report.inside.as_deref().map(|inside| Within::of(inside, context)),
        amends: false,
        sightings_not_kept: flow.more_sightings,
    }
}

impl Verdict<'_> {
    /// The same about a connection that was told as unanswered.
    pub fn amending(self) -> Self {
        Self { text: words::late(&self.text), amends: true, ..self }
    }
}

impl Outcome {
    fn of(outcome: &judge::Outcome, context: &Context<'_>) -> Self {
        let interface = |index: u32| context.interfaces.name(index);
        match *outcome {
            judge::Outcome::Answered { by, after_ns } => Self::Answered { by, after_ns },
            judge::Outcome::Refused { by, from, how, after_ns } => {
                let (refuser, interface) = match by {
                    Refuser::Behind { ifindex } => ("behind", Some(interface(ifindex))),
                    Refuser::ThisNode => ("this-node", None),
                    Refuser::Client => ("client", None),
                    Refuser::Unseen => ("unseen", None),
                };
                Self::Refused { by: from, after_ns, refuser, interface, how: how_refused(how) }
            }
            judge::Outcome::AnswerLost { by, entered, after_ns } => {
                Self::AnswerLost { by, after_ns, interface: entered.map(interface) }
            }
            judge::Outcome::Dropped { reason, after_ns } => {
                Self::Dropped { reason: context.drop_reason(reason), after_ns }
            }
            judge::Outcome::Silent { reached, tries } => {
                let (reached, interface) = match reached {
                    Reached::Entered { ifindex } => ("entered", Some(interface(ifindex))),
                    Reached::LocalIn => ("local-in", None),
                    Reached::Left { ifindex } => ("left", Some(interface(ifindex))),
                    Reached::Sent => ("sent", None),
                    Reached::Confirmed => ("confirmed", None),
                    Reached::PostRouting => ("post-routing", None),
                };
                Self::Silent { tries, reached, interface }
            }
            judge::Outcome::JoinedLate => Self::JoinedLate,
        }
    }
}

fn how_refused(how: Refusal) -> String {
    match how {
        Refusal::TcpReset => "rst".to_owned(),
        Refusal::SctpAbort => "abort".to_owned(),
        Refusal::Icmp { v6, kind, code } => format!("icmp {}", words::icmp(v6, kind, code)),
    }
}

impl Half {
    fn of(half: Option<Option<Tuple>>, pick: fn(Tuple) -> SocketAddr) -> Self {
        Self { observed: half.is_some(), to: half.flatten().map(pick) }
    }
}

impl<'a> Prediction<'a> {
    fn of(branch: &'a Branch) -> Self {
        Self {
            probability: branch.probability,
            verdict: &branch.verdict,
            r#final: branch.final_tuple,
            masquerade: branch.masquerade,
            out: branch.out_interface.as_ref(),
        }
    }
}

impl<'a> Within<'a> {
    fn of(inside: &'a Inside, context: &Context<'_>) -> Self {
        let outcome = Outcome::of(&inside.outcome, &context.seen_by(Some(inside)));
        Self { name: &inside.name, netns: inside.netns, outcome }
    }
}
