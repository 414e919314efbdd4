//! One step of a connection.

use crate::core::correlate::drops::DroppedBy;
use crate::core::correlate::flow::Way;
use crate::core::correlate::inside::Inside;
use crate::core::correlate::route::Taken;
use crate::core::correlate::story::{Certainty, Line, PacketSeen, RulePath, RuleStep, What};
use crate::core::model::flow::Tuple;
use crate::core::model::name::Name;
use crate::core::model::trace::{Action, Flavour, Fraction, Hook, Manip, Route, RouteKind, Verdict};
use crate::render::watch::{Context, words};
use serde::Serialize;
use std::net::IpAddr;

/// The fields of a `hop`.
#[derive(Serialize)]
pub struct Fields<'a> {
    id: u64,
    offset_ns: Option<u64>,
    certainty: &'static str,
    /// `None` on the node itself.
    inside: Option<Place<'a>>,
    #[serde(flatten)]
    what: Kind<'a>,
}

#[derive(Serialize)]
struct Place<'a> {
    name: &'a str,
    netns: u32,
}

#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Kind<'a> {
    Packet {
        #[serde(flatten)]
        tuple: Tuple,
        interface: String,
        direction: &'static str,
        way: &'static str,
        label: String,
        payload: u32,
        again: bool,
    },
    LocalSend {
        #[serde(flatten)]
        tuple: Tuple,
    },
    Rules {
        hook: Hook,
        table: &'a Name,
        flavour: Flavour,
        action: &'a Action,
        rules: Vec<Step<'a>>,
        rewrite: Option<Rewrite>,
    },
    Rewrite(Rewrite),
    Route {
        route: &'a Route,
        taken: Option<Decision<'a>>,
    },
    Drop {
        way: &'static str,
        reason: String,
        by: Option<By<'a>>,
    },
    Disagreement {
        observed: Tuple,
        entry_is_older: bool,
        predicted: Vec<Possible>,
    },
    Unexplained {
        predicted: &'a Verdict,
    },
    Note {
        text: &'a str,
    },
}

#[derive(Serialize)]
struct Step<'a> {
    chain: &'a str,
    number: Option<u32>,
    because: String,
    text: Name,
}

#[derive(Serialize)]
struct Rewrite {
    what: Manip,
    before: Tuple,
    after: Tuple,
}

/// A routing decision as a packet carried it.
#[derive(Serialize)]
struct Decision<'a> {
    dst: IpAddr,
    kind: RouteKind,
    interface: Option<&'a Name>,
    gateway: Option<IpAddr>,
}

#[derive(Serialize)]
struct By<'a> {
    hook: Hook,
    table: &'a str,
    chain: &'a str,
    number: Option<u32>,
    because: String,
}

#[derive(Serialize)]
struct Possible {
    probability: Fraction,
    tuple: Tuple,
}

/// What is to be said of a step; `context` is that of the place where it was.
pub fn fields<'a>(id: u64, line: &'a Line, inside: Option<&'a Inside>, context: &Context<'_>) -> Fields<'a> {
    Fields {
        id,
        offset_ns: line.offset_ns,
        certainty: match line.certainty {
            Certainty::Observed => "observed",
            Certainty::Predicted => "predicted",
            Certainty::Both => "both",
            Certainty::Differs => "differs",
        },
        inside: inside.map(|inside| Place { name: &inside.name, netns: inside.netns }),
        what: kind(&line.what, context),
    }
}

fn kind<'a>(what: &'a What, context: &Context<'_>) -> Kind<'a> {
    match what {
        What::Packet { ifindex, entering, way, packet, again } => {
            self::packet(context.interfaces.name(*ifindex), *entering, *way, packet, *again)
        }
        What::LocalSend { tuple } => Kind::LocalSend { tuple: *tuple },
        What::Rules { path, rewrite } => rules(path, *rewrite),
        What::Rewrite { manip, before, after } => {
            Kind::Rewrite(Rewrite { what: *manip, before: *before, after: *after })
        }
        What::Route { route, taken } => Kind::Route { route, taken: taken.as_ref().map(Decision::of) },
        What::Drop { way, reason, by } => {
            Kind::Drop { way: way_name(*way), reason: context.drop_reason(*reason), by: by.as_ref().map(By::of) }
        }
        What::Disagreement { predicted, observed, entry_is_older } => Kind::Disagreement {
            observed: *observed,
            entry_is_older: *entry_is_older,
            predicted: predicted.iter().map(|&(probability, tuple)| Possible { probability, tuple }).collect(),
        },
        What::Unexplained { predicted } => Kind::Unexplained { predicted },
        What::Note { text } => Kind::Note { text },
    }
}

fn packet(interface: String, entering: bool, way: Way, packet: &PacketSeen, again: bool) -> Kind<'static> {
    Kind::Packet {
        tuple: packet.tuple,
        interface,
        direction: if entering { "in" } else { "out" },
        way: way_name(way),
        label: words::packet(packet),
        payload: packet.payload,
        again,
    }
}

fn rules(path: &RulePath, rewrite: Option<(Manip, Tuple, Tuple)>) -> Kind<'_> {
    Kind::Rules {
        hook: path.hook,
        table: &path.table,
        flavour: path.flavour,
        action: &path.action,
        rules: path.steps.iter().map(Step::of).collect(),
        rewrite: rewrite.map(|(what, before, after)| Rewrite { what, before, after }),
    }
}

impl<'a> Step<'a> {
    fn of(step: &'a RuleStep) -> Self {
        let text = step.rule.text();
        Self { chain: &step.rule.chain, number: step.rule.number(), because: step.rule.because(), text }
    }
}

impl<'a> Decision<'a> {
    fn of(taken: &'a Taken) -> Self {
        Self { dst: taken.dst, kind: taken.kind, interface: taken.interface.as_ref(), gateway: taken.gateway }
    }
}

impl<'a> By<'a> {
    fn of(by: &'a DroppedBy) -> Self {
        Self {
            hook: by.hook,
            table: &by.rule.table,
            chain: &by.rule.chain,
            number: by.rule.number(),
            because: by.rule.because(),
        }
    }
}

const fn way_name(way: Way) -> &'static str {
    match way {
        Way::Request => "request",
        Way::Reply => "reply",
    }
}
