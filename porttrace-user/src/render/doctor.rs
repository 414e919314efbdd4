//! The doctor's report: for people, and as JSON (`docs/doctor-json.md`).

use crate::core::doctor::facts::Facts;
use crate::core::doctor::{Check, Report, Status};
use crate::render::style::{Style, columns, wrap};
use serde_json::{Value, json};

/// Version of the JSON report; stands in it as `v`.
pub const SCHEMA: u32 = 1;

/// Width of the names of checks.
const LABEL: usize = 12;

/// The report as text, at most `style.width` columns wide where words allow.
pub fn text(facts: &Facts, report: &Report, style: Style) -> String {
    let title = "porttrace doctor";
    let place = format!("{} · kernel {}", facts.node, facts.kernel);
    let gap = style.width.saturating_sub(columns(title) + columns(&place)).max(2);
    let mut out = format!("{}{}{}\n", style.bold(title), " ".repeat(gap), style.dim(place));
    let mut last = None;
    for check in &report.checks {
        if last != Some(check.group) {
            out.push_str(&format!("\n{}\n", style.bold(check.group.name())));
            last = Some(check.group);
        }
        one(&mut out, check, style);
    }
    out.push('\n');
    let (mark, paint): (_, fn(Style, &str) -> String) = match (report.can_watch, report.degraded) {
        (true, false) => ("✓", |style, text| style.good(text)),
        (true, true) => ("✓", |style, text| style.warn(text)),
        (false, _) => ("✗", |style, text| style.bad(text)),
    };
    for line in wrap(&format!("{mark} {}", report.summary), style.width) {
        out.push_str(&format!("{}\n", paint(style, &line)));
    }
    out
}

fn one(out: &mut String, check: &Check, style: Style) {
    let indent = " ".repeat(LABEL + 5);
    let room = style.width.saturating_sub(LABEL + 5);
    for (index, line) in wrap(&check.text, room).into_iter().enumerate() {
        if index == 0 {
            let label = style.accent(format!("{:<LABEL$}", check.id));
            out.push_str(&format!("  {} {label} {line}\n", mark(check.status, style)));
        } else {
            out.push_str(&format!("{indent}{line}\n"));
        }
    }
    for (lead, text) in [("costs: ", &check.costs), ("→ ", &check.advice)] {
        let Some(text) = text else { continue };
        for line in wrap(&format!("{lead}{text}"), room) {
            out.push_str(&format!("{indent}{}\n", style.dim(line)));
        }
    }
}

fn mark(status: Status, style: Style) -> String {
    match status {
        Status::Good => style.good("✓"),
        Status::Note => style.dim("·"),
        Status::Unknown => style.warn("?"),
        Status::Warning => style.warn("!"),
        Status::Bad => style.bad("✗"),
    }
}

/// The report as one JSON object.
pub fn json(facts: &Facts, report: &Report) -> Value {
    json!({
        "v": SCHEMA,
        "type": "doctor",
        "node": facts.node,
        "kernel": facts.kernel,
        "can_watch": report.can_watch,
        "degraded": report.degraded,
        "backend": report.backend,
        "summary": report.summary,
        "checks": report.checks,
        "facts": facts,
    })
}
