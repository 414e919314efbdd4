//! One connection as a block of aligned text.

use super::words::{self, Mood};
use super::{Context, Report, predicted};
use crate::core::correlate::flow::{End, Way};
use crate::core::correlate::inside::Inside;
use crate::core::correlate::story::{Certainty, Line, PacketSeen, RulePath, What};
use crate::core::model::trace::{Manip, Route, RouteKind, RuleRef};
use crate::render::style::{Style, columns, wrap};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// The legend of the marks, for the header.
pub const LEGEND: &str = "● seen   ○ by the rules   ◉ by the rules and seen   ≠ seen against the rules";

/// Columns before the place: indentation, time, mark.
const BEFORE_PLACE: usize = 12;
/// `out ` and an interface name of at most 15 characters (`IFNAMSIZ`).
const MAX_PLACE: usize = 19;

/// The block of a connection. `time` is the wall-clock time of its first sighting; `verbose` adds the rules' text.
pub fn block(report: &Report, context: &Context<'_>, style: Style, time: &str, verbose: bool) -> String {
    let mut out = head(report, style, time);
    let lines: Vec<(&Line, Option<&Inside>, String)> =
        report.lines().into_iter().map(|(line, inside)| (line, inside, place(line, inside, context))).collect();
    let width = lines.iter().map(|(_, _, place)| columns(place)).max().unwrap_or(0).min(MAX_PLACE);
    let room = style.width.saturating_sub(BEFORE_PLACE + width + 1).max(24);
    let mut previous: Option<&RulePath> = None;
    let mut quoted = BTreeSet::new();
    let mut was_inside = None;
    for (line, inside, place) in &lines {
        if let (None, Some(inside)) = (was_inside, *inside) {
            let title = format!("inside pod {} (its own network namespace):", inside.name);
            out.push_str(&format!("{}{}\n", " ".repeat(BEFORE_PLACE), style.bold(format!("┌ {title}"))));
        }
        was_inside = *inside;
        let mut texts = text(line, *inside, context, style, room, previous);
        previous = match &line.what {
            What::Rules { path, .. } => Some(path),
            _ => None,
        };
        if verbose && let Some(path) = previous {
            texts.extend(quote(path, &mut quoted, room).iter().map(|text| style.dim(text)));
        }
        for (index, text) in texts.iter().enumerate() {
            if index == 0 {
                let time = line.offset_ns.map_or_else(String::new, |ns| format!("{:.3}", ns as f64 / 1e6));
                let place = format!("{place:<width$}");
                let place = if line.offset_ns.is_some() { style.accent(place) } else { style.dim(place) };
                out.push_str(&format!(
                    "  {} {} {place} {text}\n",
                    style.dim(format!("{time:>7}")),
                    mark(line.certainty, style)
                ));
            } else {
                let side = if inside.is_some() { "│" } else { " " };
                out.push_str(&format!("{}{side}{}{text}\n", " ".repeat(BEFORE_PLACE), " ".repeat(width)));
            }
        }
    }
    out.push_str(&verdict(report, context, style));
    out
}

fn head(report: &Report, style: Style, time: &str) -> String {
    let flow = &report.flow;
    let left = format!("#{} {} {}", flow.id, flow.original.proto, flow.original);
    let gap = style.width.saturating_sub(columns(&left) + columns(time)).max(2);
    format!("{}{}{}\n", style.bold(&left), " ".repeat(gap), style.dim(time))
}

/// The verdict line, with the connection's end when it is known already.
fn verdict(report: &Report, context: &Context<'_>, style: Style) -> String {
    let (mood, mut sentence) = words::verdict(report, context, true);
    if let (Mood::Good, Some(end)) = (mood, report.flow.end) {
        sentence = format!("{sentence}; {}", ended(&end, report.flow.start_ns));
    }
    if report.story.disagrees {
        sentence.push_str("; NAT was not what the rules say");
    }
    if report.story.is_unexplained {
        sentence.push_str("; no rule explains its way");
    }
    let mut out = String::new();
    for (index, line) in wrap(&sentence, style.width.saturating_sub(4)).iter().enumerate() {
        let mark = if index == 0 { mood.mark() } else { " " };
        out.push_str(&format!("  {}\n", paint(mood, style, &format!("{mark} {line}"))));
    }
    if let Some(advice) = words::advice(report, context) {
        for (index, line) in wrap(&advice, style.width.saturating_sub(4)).iter().enumerate() {
            out.push_str(&format!("  {} {}\n", if index == 0 { "→" } else { " " }, style.bold(line)));
        }
    }
    out
}

/// Colours by mood.
pub fn paint(mood: Mood, style: Style, text: &str) -> String {
    match mood {
        Mood::Good => style.good(text),
        Mood::Bad => style.bad(text),
        Mood::Unsure => style.warn(text),
    }
}

/// `closed after 2.1 ms, 120 B sent, 310 B received`.
pub fn ended(end: &End, start_ns: u64) -> String {
    let how = if end.reset { "reset" } else { "closed" };
    let after = words::duration(end.at_ns.saturating_sub(start_ns));
    match end.bytes {
        Some((request, reply)) => {
            format!("{how} after {after}, {} sent, {} received", words::bytes(request), words::bytes(reply))
        }
        None => format!("{how} after {after}"),
    }
}

fn mark(certainty: Certainty, style: Style) -> String {
    match certainty {
        Certainty::Observed => style.bold("●"),
        Certainty::Predicted => style.dim("○"),
        Certainty::Both => style.good("◉"),
        Certainty::Differs => style.bad("≠"),
    }
}

/// Where a line was; a bar stands before what was inside a pod.
fn place(line: &Line, inside: Option<&Inside>, context: &Context<'_>) -> String {
    let bar = if inside.is_some() { "│ " } else { "" };
    format!("{bar}{}", place_name(line, &context.seen_by(inside)))
}

fn place_name(line: &Line, context: &Context<'_>) -> String {
    match &line.what {
        What::Packet { ifindex, entering, .. } => {
            format!("{} {}", if *entering { "in " } else { "out" }, context.interfaces.name(*ifindex))
        }
        What::LocalSend { .. } => "local".to_owned(),
        What::Rules { path, .. } => path.table.to_string(),
        What::Rewrite { .. } | What::Disagreement { .. } => "conntrack".to_owned(),
        What::Route { .. } => "route".to_owned(),
        What::Drop { .. } => "drop".to_owned(),
        What::Unexplained { .. } => "rules".to_owned(),
        What::Note { .. } => String::new(),
    }
}

fn text(
    line: &Line,
    inside: Option<&Inside>,
    context: &Context<'_>,
    style: Style,
    room: usize,
    previous: Option<&RulePath>,
) -> Vec<String> {
    let whose = if inside.is_some() { "pod" } else { "node" };
    match &line.what {
        What::Packet { way, packet, again, .. } => packet_text(*way, packet, *again, style, room),
        What::LocalSend { tuple } => wrap_arrow(&format!("a process of this {whose} sends {tuple}"), room),
        What::Rules { path, rewrite } => {
            let mut lines = wrap_path(path, previous, room);
            let mut act = words::action(&path.action);
            if let Some((manip, before, after)) = rewrite {
                act = rewritten(*manip, before, after);
            }
            append(&mut lines, &style.bold(&act), columns(&act), room);
            lines
        }
        What::Rewrite { manip, before, after } => vec![style.bold(rewritten(*manip, before, after))],
        What::Route { route, taken: Some(taken) } if line.certainty == Certainty::Differs => {
            let (taken, route) = (
                way_text(whose, taken.kind, taken.dst, taken.interface.as_deref(), taken.gateway),
                route_text(whose, route),
            );
            let text = format!(
                "the kernel took {taken}; its routes say {route}: they changed meanwhile, or porttrace is wrong"
            );
            wrap(&text, room).iter().map(|text| style.bad(text)).collect()
        }
        What::Route { route, .. } => wrap(&route_text(whose, route), room),
        What::Drop { reason, by, .. } => {
            let by = by.as_ref().map_or_else(String::new, |by| format!(" {}", words::dropper(by)));
            let text = format!("the kernel dropped it{by}: {}", context.drop_reason(*reason));
            wrap(&text, room).iter().map(|text| style.bad(text)).collect()
        }
        What::Disagreement { predicted, observed, entry_is_older } => {
            let mut said: Vec<String> =
                predicted.iter().take(4).map(|(share, tuple)| format!("{tuple} ({share})")).collect();
            if predicted.len() > 4 {
                said.push(format!("{} more", predicted.len() - 4));
            }
            let why = if *entry_is_older {
                "an existing conntrack entry decided, made before the rules were as they are now"
            } else {
                "the rules changed meanwhile, or porttrace is wrong"
            };
            wrap(&format!("the kernel made it {observed}; the rules say {}: {why}", said.join(", ")), room)
                .iter()
                .map(|text| style.bad(text))
                .collect()
        }
        What::Unexplained { predicted: end } => {
            let text = format!(
                "it was answered, though by the rules {}: an eBPF program of somebody else took it, the rules changed \
                 meanwhile, or porttrace is wrong",
                predicted::ends(end)
            );
            wrap(&text, room).iter().map(|text| style.bad(text)).collect()
        }
        What::Note { text } => wrap(text, room).iter().map(|text| style.dim(text)).collect(),
    }
}

fn packet_text(way: Way, packet: &PacketSeen, again: bool, style: Style, room: usize) -> Vec<String> {
    let mut label = words::packet(packet);
    if packet.icmp.is_some() {
        label.push_str(" about");
    }
    let again = if again { " again" } else { "" };
    let text = format!("{label}{again} {}", packet.tuple);
    let lines = wrap_arrow(&text, room);
    match way {
        Way::Request => lines,
        Way::Reply => {
            lines.into_iter().map(|line| if packet.icmp.is_some() { style.warn(line) } else { line }).collect()
        }
    }
}

/// Breaks a tuple at its arrow when it does not fit (IPv6).
fn wrap_arrow(text: &str, room: usize) -> Vec<String> {
    if columns(text) <= room {
        return vec![text.to_owned()];
    }
    match text.split_once(" → ") {
        Some((left, right)) => vec![left.to_owned(), format!("  → {right}")],
        None => vec![text.to_owned()],
    }
}

/// `PREROUTING #2 → CNI-HOSTPORT-DNAT #1 → …`, broken at arrows; what the line above shared is an ellipsis.
fn wrap_path(path: &RulePath, previous: Option<&RulePath>, room: usize) -> Vec<String> {
    let step_text = |index: usize| {
        path.steps.get(index).map_or_else(String::new, |step| match step.rule.number() {
            Some(number) => format!("{} #{number}", step.rule.chain),
            None => format!("{} policy", step.rule.chain),
        })
    };
    let shared = previous.map_or(0, |previous| {
        let same = previous.hook == path.hook && previous.table == path.table;
        let both = previous.steps.iter().zip(&path.steps);
        if same { both.take_while(|(a, b)| a.rule == b.rule).count() } else { 0 }
    });
    let mut lines = vec![if shared > 0 { "…".to_owned() } else { step_text(0) }];
    for index in shared.max(1)..path.steps.len() {
        append(&mut lines, &format!("→ {}", step_text(index)), columns(&step_text(index)) + 2, room);
    }
    if shared > 0 && path.steps.len() == shared {
        append(&mut lines, &step_text(shared - 1), columns(&step_text(shared - 1)), room);
    }
    lines
}

/// The text of each rule on the path, once a block: what the lines above quoted is left out. A policy has no text.
fn quote<'p>(path: &'p RulePath, quoted: &mut BTreeSet<&'p RuleRef>, room: usize) -> Vec<String> {
    let texts = path.steps.iter().map(|step| (step.rule.text(), &step.rule));
    let fresh = texts.filter(|(text, rule)| !text.is_empty() && quoted.insert(rule));
    fresh.flat_map(|(text, _)| wrap(&text, room.saturating_sub(4))).map(|line| format!("    {line}")).collect()
}

/// Adds a piece to the last line, or to a new one when it does not fit.
fn append(lines: &mut Vec<String>, piece: &str, piece_columns: usize, room: usize) {
    match lines.last_mut() {
        Some(last) if columns(last) + 1 + piece_columns <= room => {
            last.push(' ');
            last.push_str(piece);
        }
        _ => lines.push(format!("  {piece}")),
    }
}

fn rewritten(
    manip: Manip,
    before: &crate::core::model::flow::Tuple,
    after: &crate::core::model::flow::Tuple,
) -> String {
    match manip {
        Manip::Dnat => format!("DNAT {} → {}", before.destination(), after.destination()),
        Manip::Snat => format!("SNAT {} → {}", before.source(), after.source()),
    }
}

fn route_text(whose: &str, route: &Route) -> String {
    way_text(whose, route.kind, route.dst, route.interface.as_deref(), route.gateway)
}

fn way_text(whose: &str, kind: RouteKind, dst: IpAddr, interface: Option<&str>, gateway: Option<IpAddr>) -> String {
    let via = gateway.map_or_else(String::new, |gateway| format!(" via {gateway}"));
    match (kind, interface) {
        (RouteKind::Local, _) => format!("{dst} is this {whose} itself"),
        (RouteKind::Unicast, Some(interface)) => format!("{dst}{via} dev {interface}"),
        (RouteKind::None, _) => format!("no route to {dst}"),
        (kind, _) => format!("{dst} is {kind:?}").to_lowercase(),
    }
}
