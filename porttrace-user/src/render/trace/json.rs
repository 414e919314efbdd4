//! A simulation as data. The schema is written down in `docs/simulate-json.md`.

use super::words::Outcome;
use crate::core::model::flow::{Proto, Tuple};
use crate::core::model::trace::{
    Action, Branch, Decision, DropReason, Fraction, Hook, Hop, Packet, RuleRef, TRACE_SCHEMA, Trace, Verdict,
};
use serde::Serialize;
use std::collections::HashMap;
use std::net::IpAddr;

/// Writes answers, one after the other, each a line. A rule that many packets meet is put into words only once.
#[derive(Debug)]
pub struct Printer {
    /// Rule hops by their rule: hook, action, and the hop as it is written.
    rules: HashMap<Identity, Vec<Known>>,
    known: usize,
    brief: bool,
}

/// Of a rule ([`RuleRef::identity`]).
type Identity = (usize, u32, Option<u32>);

#[derive(Debug)]
struct Known {
    hook: Hook,
    action: Action,
    written: Box<[u8]>,
    /// Keeps the ruleset alive, so that no other one takes its identity.
    _rule: RuleRef,
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
                Hop::Rule { hook, action, rule } => self.rule(hop, (*hook, action, rule), out)?,
                _ => serde_json::to_writer(&mut *out, hop)?,
            }
        }
        out.extend_from_slice(b"]}");
        Ok(())
    }

    fn rule(
        &mut self,
        hop: &Hop,
        (hook, action, rule): (Hook, &Action, &RuleRef),
        out: &mut Vec<u8>,
    ) -> serde_json::Result<()> {
        let identity = rule.identity();
        let mut known = self.rules.get(&identity).into_iter().flatten();
        if let Some(known) = known.find(|known| known.hook == hook && known.action == *action) {
            out.extend_from_slice(&known.written);
            return Ok(());
        }
        let start = out.len();
        serde_json::to_writer(&mut *out, hop)?;
        if self.known < KNOWN {
            self.known += 1;
            let written = out[start..].into();
            let known = Known { hook, action: action.clone(), written, _rule: rule.clone() };
            self.rules.entry(identity).or_default().push(known);
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
    use crate::core::model::trace::{Chains, Flavour, Place};
    use crate::core::parse::iptables;
    use std::sync::Arc;

    fn chains() -> Arc<Chains> {
        let dump = "*nat\n:A - [0:0]\n:B - [0:0]\n:C - [0:0]\n-A A -j B\n-A A -j C\nCOMMIT\n";
        let (ruleset, problems) = iptables::parse(dump, "a test", Flavour::IptablesNft, Family::V4);
        assert_eq!(problems, []);
        Arc::new(Chains::Of(Arc::new(ruleset), 0))
    }

    /// Rule `number` of chain A, jumping to the chain at `to`.
    fn jump(chains: &Arc<Chains>, number: u32, hook: Hook, to: u32) -> Hop {
        let place = |at| Place::new(chains, at).expect("a chain");
        Hop::Rule { hook, rule: RuleRef::new(place(0), Some(number)), action: Action::Jump { chain: place(to) } }
    }

    #[test]
    fn a_hop_written_again_is_the_same_and_no_other_one() {
        let (one, two) = (chains(), chains());
        let hops = [
            jump(&one, 1, Hook::Prerouting, 1),
            jump(&one, 1, Hook::Output, 1),
            jump(&one, 2, Hook::Prerouting, 2),
            jump(&two, 1, Hook::Prerouting, 1),
            jump(&one, 1, Hook::Prerouting, 2),
            Hop::Note { text: "\"".into() },
        ];
        let mut printer = Printer::new(false);
        for hop in hops.iter().chain(&hops) {
            let mut out = Vec::new();
            match hop {
                Hop::Rule { hook, action, rule } => printer.rule(hop, (*hook, action, rule), &mut out).unwrap(),
                _ => serde_json::to_writer(&mut out, hop).unwrap(),
            }
            assert_eq!(out, serde_json::to_vec(hop).unwrap());
        }
        assert_eq!(printer.known, 5);
    }
}
