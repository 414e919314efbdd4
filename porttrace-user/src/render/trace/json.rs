//! A simulation as data. The schema is written down in `docs/simulate-json.md`.

use super::words::Outcome;
use crate::core::model::flow::{Proto, Tuple};
use crate::core::model::name::Text;
use crate::core::model::trace::{
    Action, Branch, Decision, DropReason, Fraction, Hook, Hop, Packet, RuleRef, TRACE_SCHEMA, Trace, Verdict,
};
use serde::Serialize;
use std::collections::HashMap;
use std::net::IpAddr;

/// Writes answers, one after the other, each a line. A rule that many packets meet is put into words only once.
#[derive(Debug)]
pub struct Printer {
    /// Rule hops by the place of their text: hook, action, and the hop as it is written.
    rules: HashMap<Place, Vec<Known>>,
    known: usize,
    brief: bool,
}

/// Address of the whole dump and where in it the rule begins.
type Place = (usize, u32);

#[derive(Debug)]
struct Known {
    hook: Hook,
    action: Action,
    written: Box<[u8]>,
    /// Keeps the dump alive, so that no other one takes its address.
    _text: Text,
}

/// So many rule hops are kept, some 20 MB of them.
const KNOWN: usize = 40_000;

impl Printer {
    /// `brief`: leave the hops out.
    pub fn new(brief: bool) -> Self {
        Self { rules: HashMap::new(), known: 0, brief }
    }

    /// Appends the answer to one packet; `line` is the 1-based line of a batch.
    ///
    /// # Errors
    /// Never in practice: `out` takes all, and every member can be written.
    pub fn answer(&mut self, trace: &Trace, line: Option<u64>, out: &mut Vec<u8>) -> serde_json::Result<()> {
        let head = Head {
            schema: TRACE_SCHEMA,
            kind: "trace",
            line,
            packet: Sent::new(&trace.packet),
            outcome: overall(&trace.branches),
        };
        serde_json::to_writer(&mut *out, &head)?;
        reopen(out, b",\"branches\":[");
        for (at, branch) in trace.branches.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            serde_json::to_writer(&mut *out, &Way::new(branch))?;
            if !self.brief {
                self.hops(branch, out)?;
            }
        }
        out.extend_from_slice(b"],\"assumptions\":");
        serde_json::to_writer(&mut *out, &trace.assumptions)?;
        out.extend_from_slice(b"}\n");
        Ok(())
    }

    fn hops(&mut self, branch: &Branch, out: &mut Vec<u8>) -> serde_json::Result<()> {
        reopen(out, b",\"hops\":[");
        for (at, hop) in branch.hops.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            match hop {
                Hop::Rule { hook, action, text, .. } if !text.is_empty() => {
                    self.rule(hop, (*hook, action, text), out)?
                }
                _ => serde_json::to_writer(&mut *out, hop)?,
            }
        }
        out.extend_from_slice(b"]}");
        Ok(())
    }

    fn rule(
        &mut self,
        hop: &Hop,
        (hook, action, text): (Hook, &Action, &Text),
        out: &mut Vec<u8>,
    ) -> serde_json::Result<()> {
        let place = text.place();
        let mut known = self.rules.get(&place).into_iter().flatten();
        if let Some(known) = known.find(|known| known.hook == hook && known.action == *action) {
            out.extend_from_slice(&known.written);
            return Ok(());
        }
        let start = out.len();
        serde_json::to_writer(&mut *out, hop)?;
        if self.known < KNOWN {
            self.known += 1;
            let written = out[start..].into();
            let known = Known { hook, action: action.clone(), written, _text: text.clone() };
            self.rules.entry(place).or_default().push(known);
        }
        Ok(())
    }
}

/// Takes the closing brace of an object back and goes on inside.
fn reopen(out: &mut Vec<u8>, more: &[u8]) {
    out.pop();
    out.extend_from_slice(more);
}

/// What stands before the branches.
#[derive(Debug, Serialize)]
struct Head<'a> {
    schema: u32,
    kind: &'static str,
    /// The line of a batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u64>,
    packet: Sent<'a>,
    /// The outcome that all branches share, or `mixed`.
    outcome: &'static str,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::flow::Family;
    use crate::core::model::name::Name;
    use crate::core::model::trace::{ChainRef, Flavour};

    fn jump(dump: &Name, start: usize, hook: Hook, chain: &str) -> Hop {
        let text = Text::of(dump, start, 8);
        let place =
            ChainRef { flavour: Flavour::IptablesNft, family: Family::V4, table: "nat".into(), chain: "A".into() };
        Hop::Rule { hook, rule: RuleRef::new(place, Some(1)), action: Action::Jump { chain: chain.into() }, text }
    }

    #[test]
    fn a_hop_written_again_is_the_same_and_no_other_one() {
        let (one, two) = (Name::from("-A A -j B\n-A A -j C"), Name::from("-A D -j E\n"));
        let hops = [
            jump(&one, 0, Hook::Prerouting, "B"),
            jump(&one, 0, Hook::Output, "B"),
            jump(&one, 10, Hook::Prerouting, "C"),
            jump(&two, 0, Hook::Prerouting, "E"),
            jump(&one, 0, Hook::Prerouting, "other"),
            Hop::Note { text: "\"".into() },
        ];
        let mut printer = Printer::new(false);
        for hop in hops.iter().chain(&hops) {
            let mut out = Vec::new();
            match hop {
                Hop::Rule { hook, action, text, .. } => printer.rule(hop, (*hook, action, text), &mut out).unwrap(),
                _ => serde_json::to_writer(&mut out, hop).unwrap(),
            }
            assert_eq!(out, serde_json::to_vec(hop).unwrap());
        }
        assert_eq!(printer.known, 5);
    }
}
