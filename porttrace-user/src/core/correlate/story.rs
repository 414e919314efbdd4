//! One connection told: what was observed, joined with what the rules predict.

use super::branch::{choose, left_open};
use super::drops::DroppedBy;
use super::flow::{Flow, Way};
use super::route::{self, Taken};
use crate::core::model::flow::Tuple;
use crate::core::model::interfaces::Interfaces;
use crate::core::model::name::Name;
use crate::core::model::trace::{
    Action, Branch, Flavour, Fraction, Hook, Hop, Manip, Place, Route, RuleRef, Trace, Verdict,
};
use porttrace_ebpf::Kind;

/// Where a line of the story comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Certainty {
    /// The probe saw it.
    Observed,
    /// The rules say so; nothing observed it.
    Predicted,
    /// The rules say so, and the probe saw that it is so.
    Both,
    /// The probe saw something that the rules do not allow.
    Differs,
}

/// One line of the story.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Nanoseconds since the first sighting; `None` for what was only predicted.
    pub offset_ns: Option<u64>,
    pub certainty: Certainty,
    pub what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A packet at an interface.
    Packet {
        ifindex: u32,
        entering: bool,
        way: Way,
        packet: PacketSeen,
        again: bool,
    },
    /// A process of this node sent the request.
    LocalSend {
        tuple: Tuple,
    },
    /// Rules on the way from a base chain to the one that acted; `rewrite` is what that did to the tuple.
    Rules {
        path: RulePath,
        rewrite: Option<(Manip, Tuple, Tuple)>,
    },
    /// A rewrite without a rule of ours to name: an older conntrack entry, or no agreement.
    Rewrite {
        manip: Manip,
        before: Tuple,
        after: Tuple,
    },
    /// The decision that the node's routes predict, and what the packet showed of it: `None` where nothing did. The two are alike
    /// where nothing was predicted.
    Route {
        route: Route,
        taken: Option<Taken>,
    },
    /// The kernel dropped the packet (`enum skb_drop_reason`), and the rule that does so by prediction.
    Drop {
        way: Way,
        reason: u32,
        by: Option<DroppedBy>,
    },
    /// The observed NAT is none of those that the rules predict.
    Disagreement {
        predicted: Vec<(Fraction, Tuple)>,
        observed: Tuple,
        entry_is_older: bool,
    },
    /// It was answered, though by the rules it ends so.
    Unexplained {
        predicted: Verdict,
    },
    Note {
        text: String,
    },
}

/// What is worth printing of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketSeen {
    pub tuple: Tuple,
    pub l4_flags: u8,
    pub payload: u32,
    pub icmp: Option<(u8, u8)>,
}

/// Rules that led from a base chain to the rule that acted, in order; the last one acted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RulePath {
    pub hook: Hook,
    pub table: Name,
    pub flavour: Flavour,
    pub steps: Vec<RuleStep>,
    pub action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleStep {
    pub rule: RuleRef,
    /// The chain that the rule jumps or goes to.
    pub leads_to: Option<Place>,
}

/// The whole story.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Story {
    pub lines: Vec<Line>,
    /// The predicted branch that fits what was observed.
    pub branch: Option<Branch>,
    /// The observation contradicts every branch.
    pub disagrees: bool,
    /// It was answered, though by the rules it cannot be.
    pub is_unexplained: bool,
    /// What was observed differs from every branch, and rules that are not followed may be why.
    pub left_open: bool,
    /// How an answer that did not get back ends by the rules, where [`Story::tell_answer`] was told.
    pub answer_end: Option<Verdict>,
    /// Tables of native nftables rules that it may have met, which are not followed.
    pub unfollowed: Vec<String>,
}

/// Tells `flow` against `trace`. `all` keeps rules without effect and every packet.
pub fn tell(flow: &Flow, trace: Option<&Trace>, interfaces: &Interfaces, all: bool) -> Story {
    let taken = Taken::of(flow, interfaces);
    let branch = trace.and_then(|trace| choose(flow, trace, taken.as_ref()));
    let differs = flow.reply.is_some() && branch.is_none() && trace.is_some_and(|trace| !trace.branches.is_empty());
    let open = trace.and_then(left_open).filter(|_| differs);
    let disagrees = differs && open.is_none();
    // Than the rules gave it: others did.
    let has_other_source =
        branch.is_some_and(|branch| flow.reply.is_some_and(|reply| reply.dst != branch.reply_tuple.dst));
    let left_open = open.is_some() || has_other_source;
    let mut lines = Vec::new();
    let mut seen = observed(flow, all).into_iter().peekable();
    match seen.next_if(|line| matches!(line.what, What::Packet { way: Way::Request, .. }) && !flow.is_local_client()) {
        Some(first) => lines.push(first),
        None if flow.is_local_client() => lines.push(Line {
            offset_ns: Some(0),
            certainty: Certainty::Observed,
            what: What::LocalSend { tuple: flow.original },
        }),
        None => {}
    }
    match (branch, trace) {
        (Some(branch), _) => {
            lines.extend(predicted(flow, branch, taken.as_ref(), interfaces, all));
            if has_other_source {
                lines.extend(rewrites(flow, Certainty::Observed).into_iter().filter(is_snat));
            }
        }
        (None, _) if let Some(open) = open => {
            lines.push(note(open));
            lines.extend(rewrites(flow, Certainty::Observed));
            lines.extend(taken.map(Taken::line));
        }
        (None, Some(trace)) if disagrees => {
            lines.extend(disagreement(flow, trace));
            lines.extend(taken.map(Taken::line));
        }
        (None, Some(trace)) if !flow.joined_late => lines.push(note(format!(
            "one of {} ways that the rules allow; which one was not observed",
            trace.branches.len()
        ))),
        _ => {
            lines.extend(rewrites(flow, Certainty::Observed));
            lines.extend(taken.map(Taken::line));
        }
    }
    lines.extend(seen);
    let unfollowed = trace.map(|trace| trace.unfollowed.tables.clone()).unwrap_or_default();
    let branch = branch.cloned();
    let story = Story { lines, branch, disagrees, is_unexplained: false, left_open, answer_end: None, unfollowed };
    story.with_dropper().with_unexplained(flow, trace, interfaces)
}

fn note(text: String) -> Line {
    Line { offset_ns: None, certainty: Certainty::Predicted, what: What::Note { text } }
}

/// What the probe saw, as lines. Without `all`, of an established connection only the handshake.
fn observed(flow: &Flow, all: bool) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for seen in &flow.sightings {
        let event = &seen.event;
        let offset_ns = Some(event.time_ns.saturating_sub(flow.start_ns));
        let what = match event.kind {
            Kind::TcIngress | Kind::TcEgress | Kind::IcmpError => {
                let Some(tuple) = event.packet else { continue };
                let is_icmp = event.kind == Kind::IcmpError;
                if !all && !is_icmp && !is_telling(flow, seen) {
                    continue;
                }
                let entering = if is_icmp { event.ifindex != 0 } else { event.kind == Kind::TcIngress };
                What::Packet {
                    ifindex: if is_icmp && !entering { event.out_ifindex } else { event.ifindex },
                    entering,
                    way: if is_icmp { Way::Reply } else { seen.way },
                    packet: PacketSeen {
                        tuple,
                        l4_flags: event.l4_flags,
                        payload: event.payload,
                        icmp: is_icmp.then_some((event.icmp_type, event.icmp_code)),
                    },
                    again: seen.again,
                }
            }
            Kind::Dropped => What::Drop { way: seen.way, reason: event.reason, by: None },
            _ => continue,
        };
        lines.push(Line { offset_ns, certainty: Certainty::Observed, what });
    }
    lines
}

/// Packets that show the way there and back: the opening ones and their answers.
fn is_telling(flow: &Flow, seen: &super::flow::Sighting) -> bool {
    use super::flow::{RST, SYN};
    if flow.is_tcp() {
        return seen.event.l4_flags & (SYN | RST) != 0
            && (!flow.end.is_some_and(|end| end.reset) || !follows_answer(flow, seen));
    }
    // One datagram each way at each place is enough.
    let first = flow.sightings.iter().find(|other| {
        other.event.kind == seen.event.kind && other.event.ifindex == seen.event.ifindex && other.way == seen.way
    });
    first.is_some_and(|first| std::ptr::eq(first, seen))
}

/// A reset that ends an established connection is its end, not part of the way there.
fn follows_answer(flow: &Flow, seen: &super::flow::Sighting) -> bool {
    use super::flow::{ACK, RST, SYN};
    seen.has(RST)
        && flow
            .sightings
            .iter()
            .take_while(|other| !std::ptr::eq(*other, seen))
            .any(|other| other.way == Way::Reply && other.is_tc() && other.has(SYN | ACK))
}

fn disagreement(flow: &Flow, trace: &Trace) -> Vec<Line> {
    let observed = flow.reply.map_or(flow.original, Tuple::inverted);
    let mut predicted: Vec<(Fraction, Tuple)> =
        trace.branches.iter().map(|branch| (branch.probability, branch.reply_tuple.inverted())).collect();
    predicted.dedup();
    let what = What::Disagreement { predicted, observed, entry_is_older: flow.entry_was_new == Some(false) };
    let mut lines = vec![Line { offset_ns: None, certainty: Certainty::Differs, what }];
    lines.extend(rewrites(flow, Certainty::Differs));
    lines
}

/// NAT as conntrack shows it, without a rule.
fn rewrites(flow: &Flow, certainty: Certainty) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut before = flow.original;
    for (manip, after) in [(Manip::Dnat, flow.dnat().flatten()), (Manip::Snat, flow.snat().flatten())] {
        if let Some(after) = after {
            lines.push(Line {
                offset_ns: time_of(flow, manip),
                certainty,
                what: What::Rewrite { manip, before, after },
            });
            before = after;
        }
    }
    lines
}

const fn is_snat(line: &Line) -> bool {
    matches!(line.what, What::Rewrite { manip: Manip::Snat, .. })
}

/// When a half of NAT was first seen done.
fn time_of(flow: &Flow, manip: Manip) -> Option<u64> {
    let kinds: &[Kind] = match manip {
        Manip::Dnat => &[Kind::AfterDnat, Kind::NatSetup],
        Manip::Snat => &[Kind::AfterSnat, Kind::NatSetup, Kind::Confirmed],
    };
    flow.sightings
        .iter()
        .find(|seen| {
            kinds.contains(&seen.event.kind)
                && seen.event.conntrack.is_some_and(|entry| match manip {
                    Manip::Dnat => entry.reply.source() != entry.original.destination(),
                    Manip::Snat => entry.reply.destination() != entry.original.source(),
                })
        })
        .map(|seen| seen.event.time_ns.saturating_sub(flow.start_ns))
}

/// The hops of a branch as lines: rule paths folded to what acted, rewrites held against conntrack.
fn predicted(flow: &Flow, branch: &Branch, taken: Option<&Taken>, interfaces: &Interfaces, all: bool) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    let mut stack: Vec<RuleStep> = Vec::new();
    let mut at: Option<(Hook, Name)> = None;
    for hop in &branch.hops {
        match hop {
            Hop::Rule { hook, rule, action } => {
                let place = (*hook, rule.table.clone());
                if at.as_ref() != Some(&place) {
                    stack.clear();
                    at = Some(place);
                }
                unwind(&mut stack, &rule.chain);
                let leads_to = match action {
                    Action::Jump { chain } | Action::Goto { chain } => Some(chain.clone()),
                    _ => None,
                };
                stack.push(RuleStep { rule: rule.clone(), leads_to });
                if acts(action, rule) || all {
                    let path = RulePath {
                        hook: *hook,
                        table: rule.table.clone(),
                        flavour: rule.flavour,
                        steps: stack.clone(),
                        action: action.clone(),
                    };
                    let what = What::Rules { path, rewrite: None };
                    lines.push(Line { offset_ns: None, certainty: Certainty::Predicted, what });
                }
                if !matches!(action, Action::Jump { .. } | Action::Goto { .. }) {
                    stack.pop();
                }
            }
            Hop::Rewrite { what, before, after, .. } => attach_rewrite(flow, &mut lines, (*what, *before, *after)),
            Hop::Route { decision } => {
                // What was routed before DNAT in OUTPUT is routed again after it; the last decision counts.
                if !all {
                    lines.retain(|line| !matches!(line.what, What::Route { .. }));
                }
                lines.push(route::line(flow, decision, taken, interfaces));
            }
            Hop::Note { text } => lines.push(note(text.to_string())),
            Hop::Receive { .. }
            | Hop::LocalSend { .. }
            | Hop::Conntrack { .. }
            | Hop::Transmit { .. }
            | Hop::Deliver { .. }
            | Hop::ReplyRewrite { .. } => {}
        }
    }
    lines
}

/// Drops the steps of chains that returned without leading to `chain`.
fn unwind(stack: &mut Vec<RuleStep>, chain: &str) {
    while let Some(last) = stack.last() {
        if last.leads_to.as_ref().is_some_and(|place| place.chain == *chain) {
            return;
        }
        stack.pop();
    }
}

/// Rules that are worth a line: those that change the packet or decide about it.
fn acts(action: &Action, rule: &RuleRef) -> bool {
    match action {
        Action::Accept => rule.number().is_some() && rule.table != "nat",
        Action::Continue | Action::Jump { .. } | Action::Goto { .. } | Action::Return | Action::Other { .. } => false,
        _ => true,
    }
}

/// Puts a rewrite onto the rule that made it, with what conntrack says of it.
fn attach_rewrite(flow: &Flow, lines: &mut Vec<Line>, predicted: (Manip, Tuple, Tuple)) {
    let (manip, before, after) = predicted;
    let observed = match manip {
        Manip::Dnat => flow.dnat(),
        Manip::Snat => flow.snat(),
    };
    let (certainty, after) = match observed {
        // The predicted half holds when it rewrote to the same place; the real port of a masquerade is the observed one.
        Some(Some(real)) => (Certainty::Both, if manip == Manip::Snat { real } else { after }),
        Some(None) if before == after => (Certainty::Both, after),
        Some(None) => (Certainty::Differs, after),
        None => (Certainty::Predicted, after),
    };
    let offset_ns = time_of(flow, manip);
    if let Some(Line { what: What::Rules { path, rewrite }, certainty: of_line, offset_ns: at, .. }) = lines.last_mut()
        && matches!(
            path.action,
            Action::Dnat { .. }
                | Action::Snat { .. }
                | Action::Masquerade
                | Action::Redirect { .. }
                | Action::Netmap { .. }
        )
    {
        *rewrite = Some((manip, before, after));
        *of_line = certainty;
        *at = offset_ns;
    } else {
        lines.push(Line { offset_ns, certainty, what: What::Rewrite { manip, before, after } });
    }
}
