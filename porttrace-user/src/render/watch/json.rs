//! The live log as JSON lines; `docs/watch-json.md` is the schema.

use super::words::{self, Mood};
use super::{Context, Report};
use crate::core::correlate::flow::{End, Flow, Way};
use crate::core::correlate::inside::Inside;
use crate::core::correlate::judge::{Outcome, Reached, Refusal, Refuser};
use crate::core::correlate::story::{Certainty, Line, What};
use crate::core::model::flow::Tuple;
use serde_json::{Map, Value, json};
use std::net::SocketAddr;

/// Version of the schema; stands in every line as `v`.
pub const SCHEMA: u32 = 1;

/// A line of the given type; `fields` are an object's.
pub fn line(kind: &str, fields: Value) -> String {
    let mut object = Map::new();
    object.insert("v".to_owned(), json!(SCHEMA));
    object.insert("type".to_owned(), json!(kind));
    if let Value::Object(fields) = fields {
        object.extend(fields);
    }
    Value::Object(object).to_string()
}

/// `flow-start`, the hops, `verdict`, and `flow-end` when the end is known already. `time` is RFC 3339 in UTC.
pub fn flow(report: &Report, context: &Context<'_>, time: &str) -> Vec<String> {
    let flow = &report.flow;
    let mut lines = vec![line("flow-start", start(flow, context, time))];
    lines.extend(report.lines().into_iter().map(|(hop, inside)| {
        let mut fields = self::hop(flow.id, hop, &context.seen_by(inside));
        fields["inside"] = place(inside);
        line("hop", fields)
    }));
    lines.push(line("verdict", verdict(report, context)));
    if let Some(end) = &flow.end {
        lines.push(flow_end(flow.id, flow.start_ns, end));
    }
    lines
}

/// A second `verdict` of a connection that was told as unanswered, and `flow-end` when the end is known already.
pub fn amendment(report: &Report, context: &Context<'_>) -> Vec<String> {
    let flow = &report.flow;
    let mut fields = verdict(report, context);
    let (_, text) = words::verdict(report, context, false);
    fields["text"] = json!(words::late(&text));
    fields["amends"] = json!(true);
    let mut lines = vec![line("verdict", fields)];
    lines.extend(flow.end.as_ref().map(|end| flow_end(flow.id, flow.start_ns, end)));
    lines
}

/// The end of a connection.
pub fn flow_end(id: u64, start_ns: u64, end: &End) -> String {
    let bytes = end.bytes.map(|(request, reply)| json!({"request": request, "reply": reply}));
    let fields = json!({
        "id": id,
        "after_ns": end.at_ns.saturating_sub(start_ns),
        "reset": end.reset,
        "bytes": bytes,
    });
    line("flow-end", fields)
}

fn start(flow: &Flow, context: &Context<'_>, time: &str) -> Value {
    let mut fields = tuple(flow.original);
    fields["id"] = json!(flow.id);
    fields["time"] = json!(time);
    fields["input"] = json!(flow.input_ifindex().map(|index| context.interfaces.name(index)));
    fields["joined_late"] = json!(flow.joined_late);
    fields
}

fn verdict(report: &Report, context: &Context<'_>) -> Value {
    let (mood, text) = words::verdict(report, context, false);
    let flow = &report.flow;
    let conntrack = flow.reply.map(|reply| json!({"original": tuple(flow.original), "reply": tuple(reply)}));
    let rewrite = |half: Option<Option<Tuple>>, pick: fn(Tuple) -> SocketAddr| match half {
        Some(after) => json!({"observed": true, "to": after.map(pick)}),
        None => json!({"observed": false, "to": null}),
    };
    let branch = report.story.branch.as_ref();
    let mut fields = outcome(&report.outcome, context);
    fields["id"] = json!(flow.id);
    fields["ok"] = match mood {
        Mood::Good => json!(true),
        Mood::Bad => json!(false),
        Mood::Unsure => Value::Null,
    };
    fields["text"] = json!(text);
    fields["finding"] = json!(report.finding);
    fields["advice"] = json!(words::advice(report, context));
    fields["dnat"] = rewrite(flow.dnat(), |tuple| tuple.destination());
    fields["snat"] = rewrite(flow.snat(), |tuple| tuple.source());
    fields["conntrack"] = json!(conntrack);
    fields["agrees"] = json!(if report.story.disagrees { Some(false) } else { branch.map(|_| true) });
    fields["predicted"] = json!(branch.map(|branch| json!({
        "probability": branch.probability,
        "verdict": branch.verdict,
        "final": tuple(branch.final_tuple),
        "masquerade": branch.masquerade,
        "out": branch.out_interface,
    })));
    fields["inside"] = report.inside.as_deref().map_or(Value::Null, |inside| {
        let mut fields = outcome(&inside.outcome, &context.seen_by(Some(inside)));
        fields["name"] = json!(inside.name);
        fields["netns"] = json!(inside.netns);
        fields
    });
    fields["amends"] = json!(false);
    fields["sightings_not_kept"] = json!(flow.more_sightings);
    fields
}

fn outcome(outcome: &Outcome, context: &Context<'_>) -> Value {
    match outcome {
        Outcome::Answered { by, after_ns } => json!({"outcome": "answered", "by": by, "after_ns": after_ns}),
        Outcome::Refused { by, from, how, after_ns } => json!({
            "outcome": "refused",
            "by": from,
            "after_ns": after_ns,
            "refuser": match by {
                Refuser::Behind { .. } => "behind",
                Refuser::ThisNode => "this-node",
                Refuser::Client => "client",
            },
            "interface": match by {
                Refuser::Behind { ifindex } => Some(context.interfaces.name(*ifindex)),
                Refuser::ThisNode | Refuser::Client => None,
            },
            "how": match how {
                Refusal::TcpReset => "rst".to_owned(),
                Refusal::SctpAbort => "abort".to_owned(),
                Refusal::Icmp { v6, kind, code } => format!("icmp {}", words::icmp(*v6, *kind, *code)),
            },
        }),
        Outcome::AnswerLost { by, entered, after_ns } => json!({
            "outcome": "answer-lost", "by": by, "after_ns": after_ns, "interface": context.interfaces.name(*entered),
        }),
        Outcome::Dropped { reason, after_ns } => {
            json!({"outcome": "dropped", "reason": context.drop_reason(*reason), "after_ns": after_ns})
        }
        Outcome::Silent { reached, tries } => json!({
            "outcome": "silent",
            "tries": tries,
            "reached": match reached {
                Reached::Entered { .. } => "entered",
                Reached::LocalIn => "local-in",
                Reached::Left { .. } => "left",
                Reached::Sent => "sent",
            },
            "interface": match reached {
                Reached::Entered { ifindex } | Reached::Left { ifindex } => Some(context.interfaces.name(*ifindex)),
                Reached::LocalIn | Reached::Sent => None,
            },
        }),
        Outcome::JoinedLate => json!({"outcome": "joined-late"}),
    }
}

fn hop(id: u64, hop: &Line, context: &Context<'_>) -> Value {
    let mut fields = match &hop.what {
        What::Packet { ifindex, entering, way, packet, again } => {
            let mut fields = tuple(packet.tuple);
            fields["kind"] = json!("packet");
            fields["interface"] = json!(context.interfaces.name(*ifindex));
            fields["direction"] = json!(if *entering { "in" } else { "out" });
            fields["way"] = json!(way_name(*way));
            fields["label"] = json!(words::packet(packet));
            fields["payload"] = json!(packet.payload);
            fields["again"] = json!(again);
            fields
        }
        What::LocalSend { tuple: sent } => {
            let mut fields = tuple(*sent);
            fields["kind"] = json!("local-send");
            fields
        }
        What::Rules { path, rewrite } => json!({
            "kind": "rules",
            "hook": path.hook,
            "table": path.table,
            "flavour": path.flavour,
            "action": path.action,
            "rules": path.steps.iter().map(|step| json!({
                "chain": step.rule.chain, "number": step.rule.number, "because": step.because, "text": step.text,
            })).collect::<Vec<_>>(),
            "rewrite": rewrite.map(|(manip, before, after)| json!({
                "what": manip, "before": tuple(before), "after": tuple(after),
            })),
        }),
        What::Rewrite { manip, before, after } => {
            json!({"kind": "rewrite", "what": manip, "before": tuple(*before), "after": tuple(*after)})
        }
        What::Route { route, taken } => json!({
            "kind": "route",
            "route": route,
            "taken": taken.as_ref().map(|taken| json!({
                "dst": taken.dst, "kind": taken.kind, "interface": taken.interface, "gateway": taken.gateway,
            })),
        }),
        What::Drop { way, reason, by } => json!({
            "kind": "drop",
            "way": way_name(*way),
            "reason": context.drop_reason(*reason),
            "by": by.as_ref().map(|by| json!({
                "hook": by.hook, "table": by.rule.table, "chain": by.rule.chain, "number": by.rule.number,
                "because": by.because,
            })),
        }),
        What::Disagreement { predicted, observed, entry_is_older } => json!({
            "kind": "disagreement",
            "observed": tuple(*observed),
            "entry_is_older": entry_is_older,
            "predicted": predicted.iter().map(|(probability, after)| json!({
                "probability": probability, "tuple": tuple(*after),
            })).collect::<Vec<_>>(),
        }),
        What::Note { text } => json!({"kind": "note", "text": text}),
    };
    fields["id"] = json!(id);
    fields["offset_ns"] = json!(hop.offset_ns);
    fields["certainty"] = json!(match hop.certainty {
        Certainty::Observed => "observed",
        Certainty::Predicted => "predicted",
        Certainty::Both => "both",
        Certainty::Differs => "differs",
    });
    fields
}

/// Where a hop was: `null` on the node itself.
fn place(inside: Option<&Inside>) -> Value {
    inside.map_or(Value::Null, |inside| json!({"name": inside.name, "netns": inside.netns}))
}

const fn way_name(way: Way) -> &'static str {
    match way {
        Way::Request => "request",
        Way::Reply => "reply",
    }
}

/// `{"proto","src","sport","dst","dport"}`.
fn tuple(tuple: Tuple) -> Value {
    json!({
        "proto": tuple.proto, "src": tuple.src, "sport": tuple.sport, "dst": tuple.dst, "dport": tuple.dport,
    })
}
