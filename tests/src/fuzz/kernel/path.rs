//! Trace messages of many packets, sorted into one path a packet.

use super::legacy::LegacyStep;
use super::trace::{Kind, Numbers, Report};
use super::wire::{Headers, headers};
use porttrace_user::core::model::flow::{Family, Tuple};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The table whose chains stand first and last at every hook, so that every packet is seen there.
pub const WATCH: &str = "porttrace-watch";

/// What the kernel did with one probe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path {
    pub segments: Vec<Segment>,
    /// Rules of iptables-legacy that matched, and ends of its chains.
    pub legacy: Vec<LegacyStep>,
    /// Refusals that the router made for it (`tcp-reset`, `icmp-port-unreachable`, …), in order.
    pub refusals: Vec<String>,
    /// Where it was seen outside the router.
    pub arrivals: Vec<Arrival>,
    /// The sending call's own failure, for locally sent packets (`ENETUNREACH`, …).
    pub refused_send: Option<String>,
}

/// A probe seen by a neighbour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The router's interface that the neighbour is behind.
    pub link: String,
    pub tuple: Tuple,
}

/// One base chain's evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Tells the packet from the kernel's copies of it, and one way through the hooks from the next.
    pub trace: u32,
    pub table: String,
    /// The base chain.
    pub chain: String,
    /// The packet when it entered.
    pub tuple: Tuple,
    pub iif: u32,
    pub oif: u32,
    /// Conntrack's name for the packet's state, where the kernel tells it.
    pub state: Option<&'static str>,
    pub steps: Vec<Step>,
}

/// A rule that matched, or an end of a chain that was reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub chain: String,
    pub place: Place,
    pub verdict: Verdict,
    /// `skb->mark` afterwards.
    pub mark: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Position in the chain, from 1.
    Rule(u32),
    Policy,
    /// End of a user chain.
    End,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Drop,
    Accept,
    Continue,
    Jump(String),
    Goto(String),
    Return,
    Other(i32),
}

impl Path {
    /// The packet's own path, and that of the copy which the kernel sends back to the node where it is a broadcast: the copy
    /// begins in POSTROUTING and has another trace ID there.
    pub fn split(self) -> (Self, Option<Self>) {
        let own = self.segments.first().map_or(0, |segment| segment.trace);
        let leaves = |segment: &Segment| segment.chain.to_lowercase().starts_with("postrouting");
        let local = self.segments.first().is_some_and(|segment| segment.chain.to_lowercase().starts_with("output"));
        if let Some(split) = self.flooded() {
            return split;
        }
        if !local || !self.segments.iter().any(|segment| leaves(segment) && segment.trace != own) {
            return (self, None);
        }
        let copy = self.segments.iter().filter(|segment| segment.trace != own || !leaves(segment)).cloned().collect();
        let segments = self.segments.into_iter().filter(|segment| segment.trace == own).collect();
        let copy = Self { segments: copy, refusals: self.refusals, ..Self::default() };
        (Self { segments, refusals: Vec::new(), legacy: Vec::new(), ..self }, Some(copy))
    }
}

impl Path {
    /// A broadcast by a bridge port goes up to the node, and a copy of it to the other ports.
    fn flooded(&self) -> Option<(Self, Option<Self>)> {
        let hook = |segment: &Segment| segment.chain.to_lowercase();
        let at = |name: &str| self.segments.iter().any(|segment| hook(segment).starts_with(name));
        // The node may drop its own before INPUT.
        let broadcast =
            |segment: &Segment| matches!(segment.tuple.dst, IpAddr::V4(dst) if dst.octets()[2..] == [255, 255]);
        let goes_on = self.segments.iter().any(|segment| hook(segment).starts_with("forward") && broadcast(segment));
        if !at("prerouting") || !goes_on {
            return None;
        }
        let without = |names: [&str; 2]| {
            let kept = |segment: &&Segment| names.iter().all(|name| !hook(segment).starts_with(name));
            self.segments.iter().filter(kept).cloned().collect()
        };
        let own = Self { segments: without(["forward", "postrouting"]), ..Self::default() };
        let copy = Self { segments: without(["input", "input"]), arrivals: self.arrivals.clone(), ..Self::default() };
        Some((own, Some(copy)))
    }
}

/// The paths of all probes, by id. Messages about other packets (the kernel's refusals) are attached to the probe they answer.
pub fn paths(reports: &[Report], numbers: &Numbers) -> BTreeMap<u16, Path> {
    let mut paths = BTreeMap::<u16, Path>::new();
    let mut current = BTreeMap::<u32, Option<u16>>::new();
    for report in reports {
        if !report.network.is_empty() {
            let headers = headers(&report.network, &report.transport);
            current.insert(report.id, headers.and_then(|headers| begin(&mut paths, report, headers)));
        }
        if let Some(segment) = current
            .get(&report.id)
            .copied()
            .flatten()
            .and_then(|id| paths.get_mut(&id))
            .and_then(|path| path.segments.last_mut())
        {
            segment.steps.extend(step(report, numbers).filter(|_| report.table != WATCH));
        }
    }
    paths
}

/// Starts a segment, or notes a refusal. Returns the id whose path goes on.
fn begin(paths: &mut BTreeMap<u16, Path>, report: &Report, headers: Headers) -> Option<u16> {
    if let Some((how, id)) = headers.refuses {
        if report.table == WATCH {
            paths.entry(id).or_default().refusals.push(how);
        }
        return None;
    }
    let segment = Segment {
        trace: report.id,
        table: report.table.clone(),
        chain: report.chain.clone(),
        tuple: headers.tuple,
        iif: report.iif,
        oif: report.oif,
        state: report.ct_state.and_then(state),
        steps: Vec::new(),
    };
    paths.entry(headers.id).or_default().segments.push(segment);
    Some(headers.id)
}

fn step(report: &Report, numbers: &Numbers) -> Option<Step> {
    let family = if report.family == 10 { Family::V6 } else { Family::V4 };
    let place = match report.kind {
        Kind::Policy => Place::Policy,
        Kind::Unknown => return None,
        // The end of a chain has no rule to name; an explicit RETURN has.
        Kind::Return | Kind::Rule if report.handle == 0 => Place::End,
        Kind::Return | Kind::Rule => {
            let key = (family, report.table.clone(), report.chain.clone(), report.handle);
            Place::Rule(numbers.get(&key).copied().unwrap_or(0))
        }
    };
    let verdict = match report.verdict.or(report.policy.map(u32::cast_signed)) {
        Some(code) if code >= 0 && code & 0xff == 0 => Verdict::Drop,
        Some(1) => Verdict::Accept,
        Some(-1) | None => Verdict::Continue,
        Some(-3) => Verdict::Jump(report.to.clone()),
        Some(-4) => Verdict::Goto(report.to.clone()),
        Some(-5) => Verdict::Return,
        Some(code) => Verdict::Other(code),
    };
    Some(Step { chain: report.chain.clone(), place, verdict, mark: report.mark })
}

/// `NF_CT_STATE_BIT(ctinfo)`: ESTABLISHED and RELATED twice (original, reply), NEW, and what the core adds.
fn state(bit: u32) -> Option<&'static str> {
    Some(match bit {
        1 => "INVALID",
        2 | 16 => "ESTABLISHED",
        4 | 32 => "RELATED",
        8 => "NEW",
        64 => "UNTRACKED",
        _ => return None,
    })
}
