//! Holds the simulator's branches against the kernel's path, step by step.

use super::coverage::rule;
use super::kernel::legacy::LegacyStep;
use super::kernel::path::{Path, Place, Verdict as Said, WATCH};
use super::run::Round;
use super::scenario::Probe;
use porttrace_user::core::model::flow::Tuple;
use porttrace_user::core::model::trace::{Action, Branch, Decision, DropReason, Flavour, Hop, RuleRef, Trace, Verdict};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A rule that matched, a policy that dropped, or how it ended: the common words of both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Rule {
        table: String,
        chain: String,
        number: u32,
        verdict: Said,
        /// The packet when it entered the base chain.
        tuple: Tuple,
        /// `skb->mark` after a rule that sets it; `None` elsewhere.
        mark: Option<u32>,
    },
    Policy {
        table: String,
        chain: String,
    },
}

impl Step {
    /// Whether both are of one rule, as nobody comes to twice in a row.
    fn is_same_rule(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Rule { table, chain, number, .. }, Self::Rule { table: t, chain: c, number: n, .. }) => {
                (table, chain, number) == (t, c, n)
            }
            _ => false,
        }
    }

    /// A native rule may do several things, of which the kernel tells the last verdict and the mark behind all.
    fn goes_on(&mut self, next: Self) {
        let (Self::Rule { verdict, mark, .. }, Self::Rule { verdict: later, mark: now, .. }) = (self, next) else {
            return;
        };
        *verdict = later;
        *mark = now.or(*mark);
    }
}

/// Where a packet ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Delivered(Tuple),
    /// Seen by the neighbour behind this interface.
    Sent {
        interface: String,
        tuple: Tuple,
    },
    /// By the last rule or policy of the path.
    Dropped,
    /// Handed to user space (NFQUEUE).
    Queued,
    /// Gone between two hooks, or refused to its sender.
    Gone,
}

/// One side's view of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Of iptables-nft.
    pub steps: Vec<Step>,
    /// Of iptables-legacy: the rules that matched; verdicts and marks are not known.
    pub legacy: Vec<Step>,
    /// Conntrack's name for the packet at the first hook, where known.
    pub state: Option<String>,
    pub end: End,
    /// What the router answered, where it refused (`tcp-reset`, `icmp-port-unreachable`, …).
    pub refusal: Option<String>,
}

/// How a packet's comparison came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// The only branch is what happened.
    Equal,
    /// One of several branches, which differ by random choices or assumptions, is what happened.
    Among(usize),
    /// The simulator stopped with this reason; up to there it was right.
    Unknown(String),
    /// No branch is what happened.
    Different,
}

/// What the kernel did.
pub fn kernel_view(path: &Path, names: &BTreeMap<u32, String>) -> View {
    let mut steps = Vec::new();
    for segment in path.segments.iter().filter(|segment| segment.table != WATCH) {
        for step in &segment.steps {
            let (table, chain) = (segment.table.clone(), step.chain.clone());
            match (step.place, &step.verdict) {
                (Place::Rule(number), verdict) => steps.push(Step::Rule {
                    table,
                    chain,
                    number,
                    verdict: verdict.clone(),
                    tuple: segment.tuple,
                    mark: Some(step.mark),
                }),
                (Place::Policy, Said::Drop) => steps.push(Step::Policy { table, chain }),
                _ => {}
            }
        }
    }
    let state = path
        .segments
        .iter()
        .find(|segment| segment.table == WATCH && ["prerouting-last", "output-last"].contains(&segment.chain.as_str()))
        .and_then(|segment| segment.state)
        .map(String::from);
    let legacy = path.legacy.iter().map(legacy_step).collect();
    View { steps, legacy, state, end: kernel_end(path, names), refusal: path.refusals.first().cloned() }
}

fn legacy_step(step: &LegacyStep) -> Step {
    let LegacyStep { table, chain, number, tuple, .. } = step.clone();
    Step::Rule { table, chain, number, verdict: Said::Continue, tuple, mark: None }
}

fn kernel_end(path: &Path, names: &BTreeMap<u32, String>) -> End {
    if let Some(arrival) = path.arrivals.first() {
        // A bridge's port is where the neighbour is; the router's output interface is the bridge.
        let last = path.segments.iter().rev().find(|segment| segment.oif != 0);
        let interface = last.and_then(|segment| names.get(&segment.oif)).unwrap_or(&arrival.link);
        return End::Sent { interface: interface.clone(), tuple: arrival.tuple };
    }
    let Some(segment) = path.segments.last() else { return End::Gone };
    if segment.table == WATCH {
        return if segment.chain == "input-last" { End::Delivered(segment.tuple) } else { End::Gone };
    }
    match segment.steps.last().map(|step| &step.verdict) {
        Some(Said::Drop) => End::Dropped,
        Some(Said::Other(code)) if code & 0xff == 3 => End::Queued,
        _ => End::Gone,
    }
}

/// What a branch says.
pub fn branch_view(branch: &Branch, probe: &Probe) -> View {
    let mut view = View { steps: Vec::new(), legacy: Vec::new(), state: None, end: End::Gone, refusal: None };
    let mut tuple = probe.packet.tuple;
    let mut chain_tuple = tuple;
    let mut base = None;
    for hop in &branch.hops {
        match hop {
            Hop::Receive { tuple: now, .. } | Hop::LocalSend { tuple: now } => tuple = *now,
            Hop::Rewrite { after, .. } => tuple = *after,
            Hop::Conntrack { state, .. } if view.state.is_none() => view.state = Some(state.to_string()),
            Hop::Rule { hook, rule, action, .. } => {
                let here = (*hook, rule.flavour, rule.table.to_string());
                // A native table may have several chains at a hook.
                if base.as_ref() != Some(&here) || rule.flavour == Flavour::Nftables && tuple != chain_tuple {
                    base = Some(here);
                    chain_tuple = tuple;
                }
                match rule_step(rule, action, chain_tuple, branch) {
                    Some(Step::Rule { table, chain, number, tuple, .. }) if rule.flavour == Flavour::IptablesLegacy => {
                        let verdict = Said::Continue;
                        view.legacy.push(Step::Rule { table, chain, number, verdict, tuple, mark: None });
                    }
                    Some(Step::Policy { .. }) if rule.flavour == Flavour::IptablesLegacy => {}
                    step => {
                        let told = view.steps.last_mut().filter(|_| rule.flavour == Flavour::Nftables);
                        match (told, step) {
                            (Some(told), Some(step)) if told.is_same_rule(&step) => told.goes_on(step),
                            (_, step) => view.steps.extend(step),
                        }
                    }
                }
            }
            _ => {}
        }
    }
    view.end = branch_end(branch);
    if let Verdict::Rejected { with, .. } = &branch.verdict {
        view.refusal = Some(with.to_string());
    }
    view
}

fn rule_step(rule: &RuleRef, action: &Action, tuple: Tuple, branch: &Branch) -> Option<Step> {
    // Native tables go by family and name, of which the kernel's traces have the name.
    let (table, chain) = (rule.table.rsplit(' ').next().unwrap_or_default().to_string(), rule.chain.to_string());
    let Some(number) = rule.number() else {
        return (*action == Action::Drop).then_some(Step::Policy { table, chain });
    };
    let no_address = matches!(&branch.verdict,
        Verdict::Dropped { reason: DropReason::NoAddress, by: Some(by) } if by == rule);
    let verdict = match action {
        Action::Drop | Action::Reject { .. } => Said::Drop,
        Action::Jump { chain } => Said::Jump(chain.chain.to_string()),
        Action::Goto { chain } => Said::Goto(chain.chain.to_string()),
        Action::Return => Said::Return,
        Action::Masquerade | Action::Redirect { .. } if no_address => Said::Drop,
        Action::Accept
        | Action::Dnat { .. }
        | Action::Snat { .. }
        | Action::Masquerade
        | Action::Redirect { .. }
        | Action::Netmap { .. } => Said::Accept,
        Action::Continue | Action::Mark { .. } | Action::ConnMark { .. } | Action::Notrack | Action::Other { .. } => {
            Said::Continue
        }
    };
    let mark = if let Action::Mark { mark } = action { Some(*mark) } else { None };
    Some(Step::Rule { table, chain, number, verdict, tuple, mark })
}

fn branch_end(branch: &Branch) -> End {
    match &branch.verdict {
        Verdict::Delivered { to, .. } => End::Delivered(*to),
        Verdict::Forwarded { interface, to, .. } => End::Sent { interface: interface.to_string(), tuple: *to },
        Verdict::Dropped { by: Some(_), .. } | Verdict::Rejected { by: Some(_), .. } => End::Dropped,
        Verdict::Dropped { by: None, .. } | Verdict::Rejected { by: None, .. } => End::Gone,
        Verdict::Unknown { .. } => End::Queued,
    }
}

/// Compares all branches of a trace with what happened to the packet itself, or to the kernel's copy of it.
pub fn judge(kernel: &View, trace: &Trace, probe: &Probe, copy: bool) -> Judgement {
    let own = || trace.branches.iter().filter(|branch| !is_copy(branch));
    let undecided = own().count() > 1 && own().any(|branch| branch.decisions.is_empty());
    for branch in trace.branches.iter().filter(|branch| !undecided && is_copy(branch) == copy) {
        let kernel = &without_open(kernel, branch);
        let view = branch_view(branch, probe);
        let open = matches!(branch.verdict, Verdict::Unknown { .. });
        let chosen = branch.sport_chosen;
        let legacy = copies(trace) || agree(&view.legacy, &kernel.legacy, open, chosen);
        if !agree(&view.steps, &kernel.steps, open, chosen) || !legacy {
            continue;
        }
        if view.state.is_some() && kernel.state.is_some() && view.state != kernel.state {
            continue;
        }
        if let Verdict::Unknown { because, by } = &branch.verdict {
            let queued = kernel.end == End::Queued && by.is_some();
            return if queued { among(trace) } else { Judgement::Unknown(because.clone()) };
        }
        if ends_agree(&view, kernel, branch) {
            return among(trace);
        }
    }
    Judgement::Different
}

/// The kernel makes a copy of the packet that goes this way.
fn is_copied(branch: &Branch) -> bool {
    branch.hops.iter().any(|hop| matches!(hop, Hop::Note { text } if text.starts_with("a broadcast: ")))
}

fn is_copy(branch: &Branch) -> bool {
    branch.decisions.iter().any(|decision| matches!(decision, Decision::Copy { .. }))
}

/// Rules of which a branch says that it is not known whether they match and that they have no effect: table, chain and number.
/// Another branch may know (a source port that is chosen only there).
fn left_open(branch: &Branch) -> BTreeSet<String> {
    let note = |hop: &Hop| match hop {
        Hop::Note { text } => text.split_once(": not known whether it matches").map(|(place, _)| place.to_string()),
        _ => None,
    };
    branch.hops.iter().filter_map(note).collect()
}

/// What the kernel did, without the rules that the branch leaves open.
fn without_open(kernel: &View, branch: &Branch) -> View {
    let open = left_open(branch);
    let mut kernel = kernel.clone();
    kernel.steps.retain(|step| !is_open(step, "", &open));
    kernel.legacy.retain(|step| !is_open(step, "iptables-legacy ", &open));
    kernel
}

fn is_open(step: &Step, flavour: &str, open: &BTreeSet<String>) -> bool {
    match step {
        Step::Rule { table, chain, number, verdict: Said::Continue, .. } => {
            open.contains(&format!("{flavour}{table} {chain} {number}"))
        }
        _ => false,
    }
}

fn among(trace: &Trace) -> Judgement {
    if trace.branches.len() == 1 { Judgement::Equal } else { Judgement::Among(trace.branches.len()) }
}

/// Equal step by step; `open`: what the branch has need only be the beginning.
pub fn agree(branch: &[Step], kernel: &[Step], open: bool, sport_chosen: bool) -> bool {
    let same = |(branch, kernel): (&Step, &Step)| match (branch, kernel) {
        (
            Step::Rule { table, chain, number, verdict, tuple, mark },
            Step::Rule { table: t, chain: c, number: n, verdict: v, tuple: u, mark: m },
        ) => {
            let queue = matches!(v, Said::Other(code) if code & 0xff == 3);
            (table, chain, number) == (t, c, n)
                && (verdict == v || queue && *verdict == Said::Continue)
                && same_tuple(*tuple, *u, sport_chosen)
                && (mark.is_none() || mark == m)
        }
        (one, other) => one == other,
    };
    (branch.len() == kernel.len() || open && branch.len() <= kernel.len()) && branch.iter().zip(kernel).all(same)
}

/// Where the kernel chooses the source port, any will do.
fn same_tuple(branch: Tuple, kernel: Tuple, sport_chosen: bool) -> bool {
    branch == kernel || sport_chosen && Tuple { sport: kernel.sport, ..branch } == kernel
}

fn ends_agree(view: &View, kernel: &View, branch: &Branch) -> bool {
    let ends = match (&view.end, &kernel.end) {
        (End::Sent { interface, tuple }, End::Sent { interface: i, tuple: t }) => {
            interface == i && same_tuple(*tuple, *t, branch.sport_chosen)
        }
        (End::Delivered(tuple), End::Delivered(t)) => same_tuple(*tuple, *t, branch.sport_chosen),
        // The last rule of iptables-legacy, which tells no verdict.
        (End::Dropped, End::Gone) => stopped_by(branch) == Some(Flavour::IptablesLegacy),
        (one, other) => one == other,
    };
    // Not every refusal is really sent (none is for a source that must not get one), but a sent one must be the right one.
    let refusals = kernel.refusal.is_none() || view.end != End::Dropped || view.refusal == kernel.refusal;
    let refused = ["icmp-port-unreachable", "icmp6-port-unreachable", "tcp-reset"];
    let answered = kernel.refusal.as_deref().is_some_and(|refusal| refused.contains(&refusal));
    let listening = !(answered && matches!(branch.verdict, Verdict::Delivered { listening: Some(true), .. }));
    ends && refusals && listening
}

fn stopped_by(branch: &Branch) -> Option<Flavour> {
    match &branch.verdict {
        Verdict::Dropped { by: Some(rule), .. } | Verdict::Rejected { by: Some(rule), .. } => Some(rule.flavour),
        _ => None,
    }
}

/// The kernel's copy and the packet are one in the log of iptables-legacy.
fn copies(trace: &Trace) -> bool {
    trace.branches.iter().any(is_copy)
}

/// The packet's comparison, from the round's own data.
pub fn compare(round: &Round, probe: &Probe, trace: &Trace) -> (View, Judgement) {
    let mut path = round.paths.get(&probe.id).cloned().unwrap_or_default();
    let flavour = (probe.packet.tuple.family(), Flavour::IptablesLegacy);
    // The end of a chain is no rule.
    path.legacy.retain(|step| rule(round, flavour, &step.table, &step.chain, step.number).is_some());
    let (path, copy) = path.split();
    let view = kernel_view(&path, &round.names);
    let judgement = judge(&view, trace, probe, false);
    match copy.map(|copy| kernel_view(&copy, &round.names)) {
        // Where only some branches make a copy, its absence must be one of the others.
        None if copies(trace) && trace.branches.iter().all(|branch| is_copy(branch) || is_copied(branch)) => {
            (view, Judgement::Different)
        }
        None => (view, judgement),
        Some(copy) => match judge(&copy, trace, probe, true) {
            Judgement::Different => (copy, Judgement::Different),
            _ => (view, judgement),
        },
    }
}

/// Texts of the matches that the simulator had to assume.
pub fn assumed(trace: &Trace) -> impl Iterator<Item = &str> {
    trace.branches.iter().flat_map(|branch| &branch.decisions).filter_map(|decision| match decision {
        Decision::Assumed { text, .. } => Some(text.as_str()),
        _ => None,
    })
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule { table, chain, number, verdict, tuple, mark } => {
                write!(f, "{table} {chain} #{number} {verdict:?}  [{tuple}]")?;
                mark.filter(|mark| *mark != 0).map_or(Ok(()), |mark| write!(f, " mark {mark:#x}"))
            }
            Self::Policy { table, chain } => write!(f, "{table} {chain} policy DROP"),
        }
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(state) = &self.state {
            writeln!(f, "    conntrack {state}")?;
        }
        for step in &self.steps {
            writeln!(f, "    {step}")?;
        }
        match &self.end {
            End::Delivered(tuple) => write!(f, "    delivered [{tuple}]")?,
            End::Sent { interface, tuple } => write!(f, "    sent by {interface} [{tuple}]")?,
            other => write!(f, "    {other:?}")?,
        }
        self.refusal.as_ref().map_or(Ok(()), |refusal| write!(f, ", answered {refusal}"))
    }
}
