//! The sentences of a simulation: verdicts, decisions, reasons.

use super::Context;
use crate::core::model::flow::{Proto, Tuple};
use crate::core::model::trace::{
    Action, Branch, Decision, DropReason, Fraction, Hop, Manip, Route, RouteKind, RuleRef, Verdict,
};
use crate::render::watch::predicted::drop_words;
use crate::render::watch::words::{Mood, action, comment, rule_name};
use std::net::{IpAddr, SocketAddr};

/// How a branch ends, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// A socket of this node gets it (or may: whether one listens is not known).
    Delivered,
    /// It leaves by an interface.
    Forwarded,
    /// Answered with a refusal: REJECT, no route, or nothing listens on this node.
    Rejected,
    Dropped,
    Unknown,
}

impl Outcome {
    pub const fn of(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::Delivered { listening: Some(false), .. } | Verdict::Rejected { .. } => Self::Rejected,
            Verdict::Delivered { .. } => Self::Delivered,
            Verdict::Forwarded { .. } => Self::Forwarded,
            Verdict::Dropped { .. } => Self::Dropped,
            Verdict::Unknown { .. } => Self::Unknown,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Forwarded => "forwarded",
            Self::Rejected => "rejected",
            Self::Dropped => "dropped",
            Self::Unknown => "unknown",
        }
    }

    pub const fn mood(self) -> Mood {
        match self {
            Self::Delivered | Self::Forwarded => Mood::Good,
            Self::Rejected | Self::Dropped => Mood::Bad,
            Self::Unknown => Mood::Unsure,
        }
    }
}

/// The verdict of one branch, in one sentence.
pub fn verdict(branch: &Branch, context: &Context<'_>) -> (Mood, String) {
    match &branch.verdict {
        Verdict::Delivered { to, listening } => delivered(branch, to, *listening),
        Verdict::Forwarded { interface, next_hop, to } => {
            (Mood::Good, forwarded(branch, clean(interface).as_str(), *next_hop, to, context))
        }
        Verdict::Dropped { reason: DropReason::Rule, by } => {
            (Mood::Bad, format!("dropped by {}", by_rule(by.as_ref(), branch)))
        }
        Verdict::Dropped { reason, by } => {
            let by = by.as_ref().map_or_else(String::new, |rule| format!(", by {}", by_rule(Some(rule), branch)));
            (Mood::Bad, format!("dropped: {}{by}", clean(&drop_words(reason))))
        }
        Verdict::Rejected { with, by: Some(rule) } => {
            (Mood::Bad, format!("rejected with {} by {}", clean(with), by_rule(Some(rule), branch)))
        }
        Verdict::Rejected { with, by: None } => (Mood::Bad, format!("rejected by this node's kernel: {}", clean(with))),
        Verdict::Unknown { because, by } => {
            let by = by.as_ref().map_or_else(String::new, |rule| format!(" (at {})", rule_name(rule)));
            (Mood::Unsure, format!("unknown from here on: {}{}", clean(because), clean(&by)))
        }
    }
}

fn delivered(branch: &Branch, to: &Tuple, listening: Option<bool>) -> (Mood, String) {
    let target = endpoint(to);
    match listening {
        Some(true) => {
            let listener = branch.hops.iter().find_map(|hop| match hop {
                Hop::Deliver { listener, .. } => listener.as_deref(),
                _ => None,
            });
            let listener = listener.map_or_else(String::new, |name| format!(" ({})", clean(name)));
            (Mood::Good, format!("delivered to this node's own socket {target}{listener}"))
        }
        Some(false) => {
            let answer = match to.proto {
                Proto::Tcp => "the kernel answers RST",
                Proto::Udp => "the kernel answers ICMP port unreachable",
                Proto::Sctp => "the kernel answers ABORT",
                _ => "nobody takes it",
            };
            (Mood::Bad, format!("refused by this node: nothing listens on {} {target}, {answer}", to.proto))
        }
        None if to.proto.has_ports() => {
            (Mood::Unsure, format!("delivered to this node as {target}; whether anything listens there is not known"))
        }
        None => (Mood::Good, format!("delivered to this node, {target}")),
    }
}

fn forwarded(branch: &Branch, interface: &str, next_hop: IpAddr, to: &Tuple, context: &Context<'_>) -> String {
    let name = behind(branch, to, context).map_or_else(String::new, |name| format!(" ({name})"));
    let hop = if next_hop == to.dst { String::new() } else { format!(" through {next_hop}") };
    let source = match (branch.masquerade, branch.sport_chosen) {
        (true, true) => format!(", from {} with a port that the kernel chooses", to.src),
        (true, false) => format!(", from {}", to.source()),
        (false, _) => String::new(),
    };
    let dead = context
        .neighbour(interface, next_hop)
        .map_or_else(String::new, |state| format!("; but its neighbour entry is {state}"));
    let interface = if interface == "?" { "an interface that is not known" } else { interface };
    let what = format!("{}{name}", endpoint(to));
    if rewritten(branch) {
        format!("DNAT to {what}, leaves by {interface}{hop}{source}{dead}")
    } else {
        format!("leaves by {interface} for {what}{hop}{source}{dead}")
    }
}

fn rewritten(branch: &Branch) -> bool {
    branch.hops.iter().any(|hop| matches!(hop, Hop::Rewrite { what: Manip::Dnat, .. }))
}

/// Whose address the destination is: by the rules on this way (kube-proxy's and portmap's comments), else by all rules.
fn behind(branch: &Branch, to: &Tuple, context: &Context<'_>) -> Option<String> {
    let mut rules = branch.hops.iter().rev().filter_map(|hop| match hop {
        Hop::Rule { rule, action, .. } if rule.in_table("nat") => Some((rule, action)),
        _ => None,
    });
    let (rule, _) = rules.by_ref().find(|(_, action)| matches!(action, Action::Dnat { .. }))?;
    let entry = rules.next();
    match (comment(&rule.text()), entry) {
        (Some(service), _) => Some(clean(service)),
        (None, Some((entry, _))) => comment(&entry.text()).map(|comment| said(&clean(comment))),
        (None, None) => None,
    }
    .or_else(|| context.name_of(to.proto, to.destination()).map(|name| clean(&name)))
}

/// A comment as people read it: portmap's names the pod's sandbox.
pub fn said(comment: &str) -> String {
    let plain = comment.replace("\\\"", "\"");
    let quoted = |label: &str| plain.split_once(label)?.1.split('"').nth(1);
    match (plain.starts_with("dnat name:"), quoted("name:"), quoted("id:")) {
        (true, Some(network), Some(id)) => {
            format!("pod sandbox {}, network {network}", id.chars().take(12).collect::<String>())
        }
        _ => plain,
    }
}

/// Destination with port where there is one.
pub fn endpoint(tuple: &Tuple) -> String {
    if tuple.proto.has_ports() { tuple.destination().to_string() } else { tuple.dst.to_string() }
}

/// `filter KUBE-SERVICES #3 ("default/noep:p80 has no endpoints")`.
fn by_rule(rule: Option<&RuleRef>, branch: &Branch) -> String {
    let Some(rule) = rule else { return "a rule".to_owned() };
    let mut text = branch.hops.iter().filter_map(|hop| match hop {
        Hop::Rule { rule: of, .. } if of == rule => Some(of.text()),
        _ => None,
    });
    let text = text.next_back().unwrap_or_default();
    let comment = comment(&text).map_or_else(String::new, |comment| format!(" (\"{}\")", clean(comment)));
    format!("{}{comment}", clean(&place(rule)))
}

/// `filter KUBE-FORWARD #1`; rules of a paste without their chain have no number.
pub fn place(rule: &RuleRef) -> String {
    match rule.chain.strip_prefix('?') {
        Some(_) => format!("pasted {} rule {}", rule.table, rule.number().unwrap_or(0)),
        None => rule_name(rule),
    }
}

/// The way to rules that were pasted without their chains.
pub const PASTED: &str = "→ the pasted rules";

/// What a rule did.
pub fn done(done: &Action) -> String {
    match done {
        Action::Jump { chain } | Action::Goto { chain } if chain.chain.starts_with('?') => PASTED.to_owned(),
        other => clean(&action(other)),
    }
}

/// All that decided for a branch; of affinity that is not there, one word is enough, and none where another is.
pub fn decisions(all: &[Decision]) -> String {
    let absent = |decision: &Decision| matches!(decision, Decision::Affinity { taken: false, .. });
    let present = |decision: &Decision| matches!(decision, Decision::Affinity { taken: true, .. });
    let mut words: Vec<String> = all.iter().filter(|one| !absent(one)).map(decision).collect();
    if all.iter().any(absent) && !all.iter().any(present) {
        words.insert(0, "no session affinity".to_owned());
    }
    words.join("; ")
}

/// `1/3`; a fraction that nobody can read is rounded.
pub fn fraction(fraction: Fraction) -> String {
    if fraction.den <= 100_000 { fraction.to_string() } else { format!("about {:.4}", fraction.as_f64()) }
}

/// What decided for a branch.
pub fn decision(decision: &Decision) -> String {
    let no = |taken: &bool| if *taken { "" } else { "not " };
    clean(&match decision {
        Decision::Random { rule, taken: true } | Decision::Drawn { rule, .. } => format!("random, by {}", place(rule)),
        Decision::Random { rule, taken: false } => format!("random, what {} leaves", place(rule)),
        Decision::Affinity { rule, taken: true } => format!("session affinity remembers the client at {}", place(rule)),
        Decision::Affinity { rule, taken: false } => format!("no session affinity at {}", place(rule)),
        Decision::Assumed { rule: Some(rule), text, taken } => {
            format!("assuming that {} does {}match: {text}", place(rule), no(taken))
        }
        Decision::Assumed { rule: None, text, taken: true } => format!("assuming: {text}"),
        Decision::Assumed { rule: None, text, taken: false } => format!("assuming the contrary of: {text}"),
        Decision::Order { text } => format!("order not known: {text}"),
        Decision::Copy { text } => format!("also: {text}"),
    })
}

/// Of `recent`: the whole address counts, as always.
const FULL_MASKS: [&str; 2] = ["255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"];

/// `10.244.1.9 dev veth12`, and the route that says so.
pub fn route(decision: &Route) -> (String, String) {
    let kind = match decision.kind {
        RouteKind::Unicast => None,
        RouteKind::Local => Some("this node"),
        RouteKind::None => Some("no route"),
        RouteKind::Broadcast => Some("broadcast"),
        RouteKind::Multicast => Some("multicast"),
        RouteKind::Anycast => Some("anycast"),
        RouteKind::Unreachable => Some("unreachable"),
        RouteKind::Prohibit => Some("prohibited"),
        RouteKind::Blackhole => Some("black hole"),
        RouteKind::Throw => Some("throw"),
    };
    let out = decision.interface.as_ref().map(|interface| format!("dev {}", clean(interface)));
    let via = decision.gateway.map(|gateway| format!("via {gateway}"));
    let way: Vec<String> = [kind.map(str::to_owned), via, out].into_iter().flatten().collect();
    let table = if matches!(&*decision.table, "main" | "local" | "") {
        String::new()
    } else {
        format!("table {}  ", decision.table)
    };
    let by = if decision.route.is_empty() { String::new() } else { format!("{table}{}", clean(&decision.route)) };
    (format!("{} {}", decision.dst, way.join(" ")), by)
}

/// A rule's matches as one reads them: without the `-m NAME` that iptables-save puts before each.
pub fn conditions(because: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut words = because.split(' ');
    while let Some(word) = words.next() {
        match word {
            "-m" => drop(words.next()),
            "--mode" | "--rsource" | "--reap" => {}
            "--mask" if words.clone().next().is_some_and(|mask| FULL_MASKS.contains(&mask)) => drop(words.next()),
            // Of a probability nobody reads eleven digits.
            "--probability" => kept.extend(words.next().map(|p| p.get(..6).unwrap_or(p))),
            word => kept.push(word),
        }
    }
    clean(&kept.join(" "))
}

/// Text from rules goes to a terminal: no control characters.
pub fn clean(text: &str) -> String {
    if text.chars().any(char::is_control) {
        text.chars().map(|c| if c.is_control() { '�' } else { c }).collect()
    } else {
        text.to_owned()
    }
}

/// The summary of all branches.
pub fn summary(branches: &[&Branch], context: &Context<'_>) -> (Mood, String) {
    if let [only] = branches {
        return verdict(only, context);
    }
    let outcomes: Vec<Outcome> = branches.iter().map(|branch| Outcome::of(&branch.verdict)).collect();
    let Some(first) = outcomes.first() else { return (Mood::Unsure, "no branch at all".to_owned()) };
    if outcomes.iter().all(|outcome| outcome == first) {
        let sentences: Vec<String> = branches.iter().map(|branch| verdict(branch, context).1).collect();
        if sentences.windows(2).all(|pair| pair[0] == pair[1]) {
            return verdict(branches[0], context);
        }
        let sentence = format!("{} in all {} branches{}", first.name(), branches.len(), targets(branches));
        return (first.mood(), sentence);
    }
    let mut counts: Vec<(Outcome, usize)> = Vec::new();
    for outcome in &outcomes {
        match counts.iter_mut().find(|(known, _)| known == outcome) {
            Some((_, count)) => *count += 1,
            None => counts.push((*outcome, 1)),
        }
    }
    let parts: Vec<String> = counts.iter().map(|(outcome, count)| format!("{} in {count}", outcome.name())).collect();
    (Mood::Unsure, format!("it depends: {} of {} branches", parts.join(", "), branches.len()))
}

/// `, to 10.244.1.9:80, 10.244.2.9:80 and 3 more`.
fn targets(branches: &[&Branch]) -> String {
    let mut targets: Vec<SocketAddr> = Vec::new();
    for branch in branches {
        let target = branch.final_tuple.destination();
        if !targets.contains(&target) {
            targets.push(target);
        }
        if targets.len() > 1000 {
            break;
        }
    }
    let shown: Vec<String> = targets.iter().take(3).map(ToString::to_string).collect();
    let even = branches.windows(2).all(|pair| pair[0].probability == pair[1].probability);
    let by_chance = |branch: &&Branch| branch.probability != Fraction::ONE;
    let each = branches.first().filter(|_| even && targets.len() == branches.len()).filter(|one| by_chance(one));
    let each = each.map_or_else(String::new, |branch| format!(", {} each", fraction(branch.probability)));
    match targets.len() {
        0 => String::new(),
        1..=3 => format!(": to {}{each}", shown.join(", ")),
        more => format!(": to {} and {} more{each}", shown.join(", "), more - 3),
    }
}
