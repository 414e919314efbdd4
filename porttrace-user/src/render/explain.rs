//! An explanation as text: verdict, claims, port map, path, traces of connections, findings.

use super::ports::{self, mark};
use super::style::{Style, columns, wrap};
use super::trace::words::clean;
use super::trace::{self, Context};
use crate::core::diagnose::{Finding, Report, Severity, Unchecked, place};
use crate::core::explain::{Explanation, Line, Path, PortMap, Word, wins};
use crate::core::model::trace::{Branch, Fraction, Hop, Manip, Verdict};
use crate::core::reach::Outcome;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// `porttrace explain --json`.
#[derive(Debug, Serialize)]
pub struct Answer<'a> {
    pub schema: u32,
    pub kind: &'static str,
    #[serde(flatten)]
    pub explanation: &'a Explanation,
}

/// So much evidence of a finding is printed without `-v`.
const EVIDENCE: usize = 4;

/// The whole explanation.
pub fn text(explanation: &Explanation, context: &Context<'_>) -> String {
    let style = context.style;
    let mut out = String::new();
    explanation.verdict.iter().for_each(|line| verdict(line, style, &mut out));
    claims(explanation, style, &mut out);
    explanation.maps.iter().for_each(|map| port_map(map, style, &mut out));
    paths(explanation, context, &mut out);
    if !explanation.live.is_empty() {
        heading("live evidence", style, &mut out);
        explanation.live.iter().for_each(|line| paragraph(&mut out, style, "  - ", "    ", line));
    }
    findings(&explanation.report, &explanation.verdict, context, &mut out);
    out
}

fn heading(text: &str, style: Style, out: &mut String) {
    let _ = writeln!(out, "\n{}", style.bold(clean(text)));
}

/// Wraps a text behind a lead; further lines start with the indent.
fn paragraph(out: &mut String, style: Style, lead: &str, indent: &str, text: &str) {
    for (i, line) in wrap(&clean(text), style.width.saturating_sub(columns(indent)).max(30)).iter().enumerate() {
        let _ = writeln!(out, "{}{line}", if i == 0 { lead } else { indent });
    }
}

fn verdict(line: &Line, style: Style, out: &mut String) {
    let room = style.width.saturating_sub(2);
    for (i, text) in wrap(&clean(&line.sentence), room).iter().enumerate() {
        let lead = if i == 0 { mark(style, line.outcome) } else { " ".to_owned() };
        let text = match line.outcome {
            Outcome::Works => style.good(text),
            Outcome::Refused | Outcome::Silent => style.bad(text),
            Outcome::Depends => style.warn(text),
            Outcome::Unknown => text.clone(),
        };
        let _ = writeln!(out, "{lead} {text}");
    }
    if let Some(change) = &line.change {
        for (i, text) in wrap(&clean(change), room.saturating_sub(2)).iter().enumerate() {
            let _ = writeln!(out, "  {} {}", if i == 0 { "→" } else { " " }, style.bold(text));
        }
    }
}

fn claims(explanation: &Explanation, style: Style, out: &mut String) {
    if explanation.ports.is_empty() {
        return;
    }
    heading("who claims it", style, out);
    for port in &explanation.ports {
        let at = port.address.map_or_else(String::new, |address| format!("{address}:"));
        let several = port.is_contested();
        for claim in &port.claims {
            let state = if several { format!("  {}", style.bold(wins(claim.wins))) } else { String::new() };
            let what = format!("{} {at}{}/{}", claim.kind.name(), port.port, port.proto);
            let _ = writeln!(out, "  {what:<20}  {}{state}", ports::claim(port, claim));
            if let Some(rule) = &claim.rule {
                let _ = writeln!(out, "  {:<20}  {}", "", style.dim(clean(&place(rule))));
            }
        }
    }
}

const WORD: usize = 15;
const VALUE: usize = 14;

fn port_map(map: &PortMap, style: Style, out: &mut String) {
    heading(&format!("port map of {}", map.title), style, out);
    map.words.iter().for_each(|row| word(row, style, out));
}

fn word(word: &Word, style: Style, out: &mut String) {
    let state = match word.agrees {
        Some(true) => style.good("✓"),
        Some(false) => style.bad("✗"),
        None => " ".to_owned(),
    };
    let note = match (word.agrees, word.note.as_str()) {
        (_, "") => String::new(),
        (Some(false), note) => format!("{note}; "),
        (_, note) => format!("{note}; "),
    };
    let value = clean(&word.value);
    let start = 2 + WORD + 1 + VALUE + 3;
    let lines = wrap(&clean(&format!("{note}{}", word.source)), style.width.saturating_sub(start).max(24));
    for (i, line) in lines.iter().enumerate() {
        if i > 0 {
            let _ = writeln!(out, "{}{}", " ".repeat(start), style.dim(line));
        } else if columns(&value) > VALUE {
            let _ = writeln!(
                out,
                "  {:<WORD$} {}\n{}{state} {}",
                word.word,
                style.bold(&value),
                " ".repeat(start - 2),
                style.dim(line)
            );
        } else {
            let pad = " ".repeat(VALUE - columns(&value));
            let _ = writeln!(out, "  {:<WORD$} {}{pad} {state} {}", word.word, style.bold(&value), style.dim(line));
        }
    }
}

/// The paths in a few steps each; every rule of the first, and then of all, with `-v`.
fn paths(explanation: &Explanation, context: &Context<'_>, out: &mut String) {
    let style = context.style;
    for path in &explanation.paths {
        heading(&format!("predicted path, {}", path.title), style, out);
        if context.verbose == 0 {
            steps(path, style, out);
            continue;
        }
        // The printer of `simulate`, two columns further in.
        let narrow = Context { style: Style { width: style.width.saturating_sub(2), ..style }, ..*context };
        for line in trace::text(&path.trace, &narrow).lines() {
            let _ = writeln!(out, "{}", if line.is_empty() { String::new() } else { format!("  {line}") });
        }
    }
    if context.verbose == 0 && !explanation.paths.is_empty() {
        let _ = writeln!(out, "  {}", style.dim("(-v shows every rule on the way)"));
    }
}

/// So many branches are told.
const BRANCHES: usize = 4;

/// What decided in each branch: the rules that rewrote, and the end.
fn steps(path: &Path, style: Style, out: &mut String) {
    let branches = &path.trace.branches;
    for branch in branches.iter().take(BRANCHES) {
        // What is assumed is no chance: each of its branches has the full one.
        let chance = match branches.len() {
            1 => String::new(),
            _ if branch.probability == Fraction::ONE => "maybe: ".to_owned(),
            _ => format!("{}: ", trace::words::fraction(branch.probability)),
        };
        let mut steps: Vec<String> = Vec::new();
        for hop in &branch.hops {
            match hop {
                Hop::Rewrite { what: Manip::Dnat, after, by, .. } => {
                    let by = by.as_ref().map_or_else(|| "conntrack".to_owned(), place);
                    steps.push(format!("DNAT to {} by {by}", after.destination()));
                }
                Hop::Rewrite { what: Manip::Snat, after, by, .. } => {
                    let by = by.as_ref().map_or_else(|| "conntrack".to_owned(), place);
                    steps.push(format!("source becomes {} by {by}", after.src));
                }
                _ => {}
            }
        }
        steps.push(end(branch));
        paragraph(out, style, "  - ", "    ", &format!("{chance}{}", steps.join(", ")));
    }
    if branches.len() > BRANCHES {
        let _ = writeln!(out, "  - and {} more ways like these", branches.len() - BRANCHES);
    }
    let lead = format!("  {} ", mark(style, path.reach.outcome));
    paragraph(out, style, &lead, "    ", &path.reach.reason);
}

fn end(branch: &Branch) -> String {
    match &branch.verdict {
        Verdict::Delivered { to, .. } => format!("delivered to this node's {}", to.destination()),
        Verdict::Forwarded { interface, next_hop, to } if *next_hop == to.dst => format!("leaves by {interface}"),
        Verdict::Forwarded { interface, next_hop, .. } => format!("leaves by {interface} through {next_hop}"),
        Verdict::Dropped { by: Some(by), .. } => format!("dropped by {}", place(by)),
        Verdict::Dropped { .. } => "dropped".to_owned(),
        Verdict::Rejected { by: Some(by), .. } => format!("rejected by {}", place(by)),
        Verdict::Rejected { .. } => "rejected by this node's kernel".to_owned(),
        Verdict::Unknown { .. } => "unknown from here on".to_owned(),
    }
}

/// Findings with their evidence, then what could not be checked.
pub fn findings(report: &Report, verdict: &[Line], context: &Context<'_>, out: &mut String) {
    let style = context.style;
    let title = match report.findings.len() {
        0 => "findings: none that concerns it".to_owned(),
        1 => "1 finding".to_owned(),
        count => format!("{count} findings"),
    };
    heading(&title, style, out);
    report.findings.iter().for_each(|one| finding(one, verdict, context, out));
    unchecked(&report.unchecked, context, out);
}

/// What the verdict said already is not said again.
fn finding(finding: &Finding, verdict: &[Line], context: &Context<'_>, out: &mut String) {
    let style = context.style;
    let (lead, id) = match finding.severity {
        Severity::Error => (style.bad("✗"), style.bad(finding.id)),
        Severity::Warning => (style.warn("!"), style.warn(finding.id)),
        Severity::Note => ("i".to_owned(), finding.id.to_owned()),
    };
    let tail = finding.sentence.split_once(" leads to ").map_or(finding.sentence.as_str(), |(_, tail)| tail);
    let is_told = verdict.iter().any(|line| line.sentence.ends_with(tail));
    let change_is_told = verdict.iter().any(|line| line.change.as_ref() == Some(&finding.change));
    let _ = writeln!(out, "  {lead} {id}{}", if is_told { style.dim(", as said above, by") } else { String::new() });
    if !is_told {
        paragraph(out, style, "    ", "    ", &finding.sentence);
    }
    let most = if context.verbose > 0 { usize::MAX } else { EVIDENCE };
    for evidence in finding.evidence.iter().take(most) {
        let text = format!("{} {}: {}", evidence.kind, evidence.place, evidence.text);
        for (i, line) in wrap(&clean(&text), style.width.saturating_sub(8)).iter().enumerate() {
            let _ = writeln!(out, "{}{}", if i == 0 { "      " } else { "        " }, style.dim(line));
        }
    }
    if finding.evidence.len() > most {
        let _ =
            writeln!(out, "      {}", style.dim(format!("and {} more (-v shows all)", finding.evidence.len() - most)));
    }
    if change_is_told {
        return;
    }
    for (i, line) in wrap(&clean(&finding.change), style.width.saturating_sub(6)).iter().enumerate() {
        let _ = writeln!(out, "    {} {line}", if i == 0 { "→" } else { " " });
    }
}

fn unchecked(unchecked: &[Unchecked], context: &Context<'_>, out: &mut String) {
    if unchecked.is_empty() {
        return;
    }
    let style = context.style;
    let mut by_reason: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for one in unchecked {
        by_reason.entry(&one.why).or_default().push(one.id);
    }
    heading("not checked", style, out);
    for (why, ids) in by_reason {
        paragraph(out, style, "  - ", "    ", &format!("{why}: {}", ids.join(", ")));
    }
}
