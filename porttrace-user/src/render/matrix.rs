//! A matrix of clients and ways, and the reasons below it.

use super::ports::mark;
use super::style::{Style, columns, shorten, wrap};
use super::trace::words::clean;
use crate::core::diagnose::place;
use crate::core::matrix::{Cell, Matrix, Row};
use crate::core::model::flow::Family;
use crate::core::reach::Outcome;
use serde::Serialize;
use std::fmt::Write;

/// `porttrace matrix --json`.
#[derive(Debug, Serialize)]
pub struct Answer<'a> {
    pub schema: u32,
    pub kind: &'static str,
    #[serde(flatten)]
    pub matrix: &'a Matrix,
}

/// Columns that a client's name takes.
const CLIENT: usize = 27;

/// The table, its legend, and the reasons, each once.
pub fn text(matrix: &Matrix, style: Style) -> String {
    let mut out = String::new();
    let probed = matrix.rows.iter().flat_map(|row| &row.cells).flatten().any(|cell| cell.tried.is_some());
    legend(matrix, style, &mut out);
    if let Some(doubt) = &matrix.doubt {
        for (at, line) in wrap(doubt, style.width.saturating_sub(2)).iter().enumerate() {
            let _ = writeln!(out, "{} {}", if at == 0 { "!" } else { " " }, style.warn(line));
        }
    }
    let mut reasons: Vec<(String, String, Outcome)> = Vec::new();
    // A client of one family has no way to an address of the other: each has a table of its own.
    for family in [Family::V4, Family::V6] {
        table(matrix, family, style, &mut reasons, &mut out);
    }
    let _ = writeln!(out, "\n{}", style.dim("✓ works  ✗ fails  ~ works at times  ? not known  · makes no sense"));
    if probed {
        let _ = writeln!(out, "{}", style.dim("predicted/tried: what was really tried stands behind the slash"));
    }
    for (i, (place, reason, outcome)) in reasons.iter().enumerate() {
        let lead = format!("{} {:>2} ", mark(style, *outcome), i + 1);
        let lines = wrap(&clean(&format!("{reason}{place}")), style.width.saturating_sub(5).max(30));
        for (at, line) in lines.iter().enumerate() {
            let _ = writeln!(out, "{}{line}", if at == 0 { lead.as_str() } else { "     " });
        }
    }
    out
}

fn table(
    matrix: &Matrix,
    family: Family,
    style: Style,
    reasons: &mut Vec<(String, String, Outcome)>,
    out: &mut String,
) {
    let ways: Vec<usize> = (0..matrix.ways.len()).filter(|at| Family::of(matrix.ways[*at].to.ip()) == family).collect();
    let rows: Vec<&Row> = matrix.rows.iter().filter(|row| Family::of(row.client.address) == family).collect();
    if ways.is_empty() {
        return;
    }
    let cells: Vec<Vec<(String, usize)>> = rows
        .iter()
        .map(|row| {
            let shown = ways.iter().map(|at| match row.cells.get(*at) {
                Some(Some(cell)) => symbol(cell, style, reasons),
                _ => (style.dim("·"), 1),
            });
            shown.collect()
        })
        .collect();
    let width = cells.iter().flatten().map(|(_, plain)| plain + 2).max().unwrap_or(2);
    let _ = write!(out, "\n{}", " ".repeat(CLIENT));
    for at in &ways {
        let _ = write!(out, "{:<width$}", letter(*at));
    }
    out.push('\n');
    for (row, cells) in rows.into_iter().zip(cells) {
        let _ = write!(out, "{:<CLIENT$}", row.client.kind.name());
        for (shown, plain) in cells {
            let _ = write!(out, "{shown}{}", " ".repeat(width.saturating_sub(plain)));
        }
        let used = CLIENT + width * ways.len();
        let example = match row.client.name.as_deref() {
            Some(name) => format!("{} {}", row.client.address, clean(name)),
            None => row.client.address.to_string(),
        };
        let room = style.width.saturating_sub(used + 1);
        let shown = if room >= 12 { style.dim(shorten(&example, room)) } else { String::new() };
        let _ = writeln!(out, "{shown}");
    }
}

fn legend(matrix: &Matrix, style: Style, out: &mut String) {
    let node = matrix.node.as_deref().unwrap_or("this node");
    let _ = writeln!(out, "{}", style.bold(format!("who can reach it, seen from {}", clean(node))));
    for (i, way) in matrix.ways.iter().enumerate() {
        let _ = writeln!(
            out,
            "  {} {:<15} {} {}  {}",
            style.bold(letter(i)),
            way.kind.name(),
            way.proto,
            way.to,
            style.dim(clean(&way.what))
        );
    }
}

/// `A`, `B`, … and numbers beyond.
fn letter(index: usize) -> String {
    u8::try_from(index)
        .ok()
        .filter(|index| *index < 26)
        .map_or_else(|| index.to_string(), |index| char::from(b'A' + index).to_string())
}

/// `✗1`: the mark and the number of its reason; and how many columns it takes.
fn symbol(cell: &Cell, style: Style, reasons: &mut Vec<(String, String, Outcome)>) -> (String, usize) {
    let reach = &cell.reach;
    let rule = reach.rule.as_ref().map_or_else(String::new, |rule| format!(" ({})", place(rule)));
    let mut text = mark(style, reach.outcome);
    let mut width = 1;
    if let Some(tried) = &cell.tried {
        let _ = write!(text, "/{}", mark(style, tried.outcome));
        width += 2;
    }
    let tried = cell.tried.as_ref().filter(|tried| tried.outcome != reach.outcome).map(|tried| {
        match (reach.outcome, tried.outcome) {
            (Outcome::Unknown, _) | (_, Outcome::Unknown) => format!("; tried: {}", tried.text),
            _ => format!("; but tried it is otherwise: {}", tried.text),
        }
    });
    let key = (rule, format!("{}{}", reach.reason, tried.unwrap_or_default()), reach.outcome);
    let number = reasons.iter().position(|known| *known == key).unwrap_or_else(|| {
        reasons.push(key);
        reasons.len() - 1
    });
    let number = (number + 1).to_string();
    width += columns(&number);
    let _ = write!(text, "{}", style.dim(&number));
    (text, width)
}
