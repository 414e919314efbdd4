//! The live log as JSON lines; `docs/watch-json.md` is the schema.
//!
//! Many thousand lines a second may have to be written: they go straight from the values to the output, without a copy of what
//! they say in between.

mod hop;
mod verdict;

use super::{Context, Report};
use crate::core::correlate::flow::{End, Flow};
use crate::core::model::flow::Tuple;
use serde::Serialize;
use std::io::{self, Write};

/// Version of the schema; stands in every line as `v`.
pub const SCHEMA: u32 = 1;

/// Writes a line of the given type; `fields` are an object's.
///
/// # Errors
/// What the output says.
pub fn line(out: &mut impl Write, kind: &str, fields: impl Serialize) -> io::Result<()> {
    #[derive(Serialize)]
    struct Line<'a, F> {
        v: u32,
        r#type: &'a str,
        #[serde(flatten)]
        fields: F,
    }
    serde_json::to_writer(&mut *out, &Line { v: SCHEMA, r#type: kind, fields })?;
    out.write_all(b"\n")
}

/// Writes `flow-start`, the hops, `verdict`, and `flow-end` when the end is known already. `time` is RFC 3339 in UTC.
///
/// # Errors
/// What the output says.
pub fn flow(out: &mut impl Write, report: &Report, context: &Context<'_>, time: &str) -> io::Result<()> {
    let flow = &report.flow;
    line(out, "flow-start", Start::of(flow, context, time))?;
    for (hop, inside) in report.lines() {
        line(out, "hop", hop::fields(flow.id, hop, inside, &context.seen_by(inside)))?;
    }
    line(out, "verdict", verdict::fields(report, context))?;
    flow.end.as_ref().map_or(Ok(()), |end| flow_end(out, flow.id, flow.start_ns, end))
}

/// Writes a second `verdict` of a connection that was told as unanswered, and `flow-end` when the end is known already.
///
/// # Errors
/// What the output says.
pub fn amendment(out: &mut impl Write, report: &Report, context: &Context<'_>) -> io::Result<()> {
    let flow = &report.flow;
    let fields = verdict::fields(report, context);
    line(out, "verdict", fields.amending())?;
    flow.end.as_ref().map_or(Ok(()), |end| flow_end(out, flow.id, flow.start_ns, end))
}

/// Writes the end of a connection.
///
/// # Errors
/// What the output says.
pub fn flow_end(out: &mut impl Write, id: u64, start_ns: u64, end: &End) -> io::Result<()> {
    #[derive(Serialize)]
    struct Fields {
        id: u64,
        after_ns: u64,
        reset: bool,
        bytes: Option<Bytes>,
    }
    #[derive(Serialize)]
    struct Bytes {
        request: u64,
        reply: u64,
    }
    let bytes = end.bytes.map(|(request, reply)| Bytes { request, reply });
    line(out, "flow-end", Fields { id, after_ns: end.at_ns.saturating_sub(start_ns), reset: end.reset, bytes })
}

#[derive(Serialize)]
struct Start<'a> {
    id: u64,
    time: &'a str,
    #[serde(flatten)]
    tuple: Tuple,
    input: Option<String>,
    joined_late: bool,
}

impl<'a> Start<'a> {
    fn of(flow: &Flow, context: &Context<'_>, time: &'a str) -> Self {
        Self {
            id: flow.id,
            time,
            tuple: flow.original,
            input: flow.input_ifindex().map(|index| context.interfaces.name(index)),
            joined_late: flow.joined_late,
        }
    }
}
