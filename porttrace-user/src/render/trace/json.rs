//! A simulation as data. The schema is written down in `docs/simulate-json.md`.

use super::words::Outcome;
use crate::core::model::flow::{Proto, Tuple};
use crate::core::model::hops::Hops;
use crate::core::model::trace::{
    Branch, Decision, DropReason, Fraction, Packet, RuleRef, TRACE_SCHEMA, Trace, Verdict,
};
use serde::Serialize;
use std::net::IpAddr;

/// One packet's answer.
#[derive(Debug, Serialize)]
pub struct Answer<'a> {
    schema: u32,
    kind: &'static str,
    /// The line of a batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u64>,
    packet: Sent<'a>,
    /// The outcome that all branches share, or `mixed`.
    outcome: &'static str,
    branches: Vec<Way<'a>>,
    assumptions: &'a [String],
}

impl<'a> Answer<'a> {
    /// `line` is the 1-based line of a batch.
    pub fn new(trace: &'a Trace, line: Option<u64>) -> Self {
        Self {
            schema: TRACE_SCHEMA,
            kind: "trace",
            line,
            packet: Sent::new(&trace.packet),
            outcome: overall(&trace.branches),
            branches: trace.branches.iter().map(Way::new).collect(),
            assumptions: &trace.assumptions,
        }
    }
}

/// The outcome that all branches share, or `mixed`.
pub fn overall(branches: &[Branch]) -> &'static str {
    let mut outcomes = branches.iter().map(|branch| Outcome::of(&branch.verdict));
    match outcomes.next() {
        None => Outcome::Unknown.name(),
        Some(first) if outcomes.all(|outcome| outcome == first) => first.name(),
        Some(_) => "mixed",
    }
}

/// A batch line that is no packet.
#[derive(Debug, Serialize)]
pub struct BadLine<'a> {
    pub schema: u32,
    pub kind: &'static str,
    pub line: u64,
    pub error: &'a str,
}

impl<'a> BadLine<'a> {
    pub const fn new(line: u64, error: &'a str) -> Self {
        Self { schema: TRACE_SCHEMA, kind: "error", line, error }
    }
}

#[derive(Debug, Serialize)]
struct Sent<'a> {
    #[serde(flatten)]
    tuple: Flat,
    #[serde(rename = "in")]
    input: Option<&'a str>,
    mark: u32,
}

impl<'a> Sent<'a> {
    fn new(packet: &'a Packet) -> Self {
        Self { tuple: Flat::from(packet.tuple), input: packet.input.as_deref(), mark: packet.mark }
    }
}

/// A tuple in the order in which people read it.
#[derive(Debug, Serialize)]
struct Flat {
    proto: Proto,
    src: IpAddr,
    sport: u16,
    dst: IpAddr,
    dport: u16,
}

impl From<Tuple> for Flat {
    fn from(tuple: Tuple) -> Self {
        Self { proto: tuple.proto, src: tuple.src, sport: tuple.sport, dst: tuple.dst, dport: tuple.dport }
    }
}

#[derive(Debug, Serialize)]
struct Way<'a> {
    probability: Fraction,
    outcome: &'static str,
    verdict: &'static str,
    #[serde(flatten)]
    end: EndOf<'a>,
    #[serde(rename = "final")]
    last: Flat,
    out: Option<&'a str>,
    reply: Flat,
    masquerade: bool,
    sport_chosen: bool,
    decisions: &'a [Decision],
    hops: &'a Hops,
}

/// What a verdict says beyond its name; absent where it does not apply.
#[derive(Debug, Default, Serialize)]
struct EndOf<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    listening: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_hop: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    with: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    because: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<&'a RuleRef>,
}

impl<'a> Way<'a> {
    fn new(branch: &'a Branch) -> Self {
        let (verdict, end) = match &branch.verdict {
            Verdict::Delivered { listening, .. } => ("delivered", EndOf { listening: *listening, ..EndOf::default() }),
            Verdict::Forwarded { next_hop, .. } => {
                ("forwarded", EndOf { next_hop: Some(*next_hop), ..EndOf::default() })
            }
            Verdict::Dropped { reason, by } => {
                ("dropped", EndOf { reason: Some(drop_reason(reason)), by: by.as_ref(), ..EndOf::default() })
            }
            Verdict::Rejected { with, by } => {
                ("rejected", EndOf { with: Some(with), by: by.as_ref(), ..EndOf::default() })
            }
            Verdict::Unknown { because, by } => {
                ("unknown", EndOf { because: Some(because), by: by.as_ref(), ..EndOf::default() })
            }
        };
        Self {
            probability: branch.probability,
            outcome: Outcome::of(&branch.verdict).name(),
            verdict,
            end,
            last: branch.final_tuple.into(),
            out: branch.out_interface.as_deref(),
            reply: branch.reply_tuple.into(),
            masquerade: branch.masquerade,
            sport_chosen: branch.sport_chosen,
            decisions: &branch.decisions,
            hops: &branch.hops,
        }
    }
}

fn drop_reason(reason: &DropReason) -> &str {
    match reason {
        DropReason::Rule => "rule",
        DropReason::NoRoute => "no_route",
        DropReason::Blackhole => "blackhole",
        DropReason::RpFilter => "rp_filter",
        DropReason::Martian => "martian",
        DropReason::ForwardingDisabled => "forwarding_disabled",
        DropReason::NoAddress => "no_address",
        DropReason::Ttl => "ttl",
        DropReason::TooBig => "too_big",
        DropReason::Other { text } => text,
    }
}
