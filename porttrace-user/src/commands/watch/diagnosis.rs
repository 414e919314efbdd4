//! Why connections fail: the findings of `explain`, asked for each kind of failing connection once.

use super::pods::Pods;
use super::rules::{Node, Rules};
use porttrace_user::collect::sysctl;
use porttrace_user::core::correlate::flow::Flow;
use porttrace_user::core::correlate::judge::{Outcome, Reached, Refusal, Refuser};
use porttrace_user::core::correlate::story::Story;
use porttrace_user::core::diagnose::{Failed, Finding, explaining};
use porttrace_user::core::model::facts::Facts;
use porttrace_user::core::model::flow::Tuple;
use porttrace_user::core::model::state::ConntrackEntry;
use porttrace_user::core::model::trace::Trace;
use porttrace_user::core::world::World;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

/// Kinds of connections remembered; beyond that, what is known is forgotten and asked again.
const MOST: usize = 1_000;

/// What was found for each kind of connection, as long as rules and pods are the same.
#[derive(Default)]
pub struct Diagnosis {
    /// Made of the rules and pods of these generations.
    facts: Option<(u64, u64, Facts)>,
    known: BTreeMap<Kind, Option<Finding>>,
}

/// Connections that have the same cause: tuples without the client's port, where they ended up, and how they came out.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    asked: Tuple,
    end: Option<SocketAddr>,
    outcome: (u8, u32),
    disagrees: bool,
}

impl Diagnosis {
    /// The finding that explains a connection; `reason` is the kernel's name of its drop reason.
    pub fn of(
        &mut self,
        seen: (&Flow, &Outcome, &Story, Option<&Trace>),
        reason: Option<&str>,
        rules: &Rules,
        pods: &Pods,
    ) -> Option<Finding> {
        let (flow, outcome, story, trace) = seen;
        let kind = Kind {
            asked: Tuple { sport: 0, ..flow.original },
            end: flow.reply.map(Tuple::source),
            outcome: class(outcome, story)?,
            disagrees: story.contradicts(),
        };
        let now = (rules.generation, pods.generation);
        if self.facts.as_ref().is_none_or(|(rules, pods, _)| (*rules, *pods) != now) || self.known.len() >= MOST {
            self.facts = Some((now.0, now.1, facts(rules, pods)));
            self.known.clear();
        }
        if let Some(finding) = self.known.get(&kind) {
            return finding.clone();
        }
        let (_, _, facts) = self.facts.as_mut()?;
        // Of conntrack's entries only its own matters here; how full the table is changes by the moment.
        facts.state.conntrack = Some(entry(flow).into_iter().collect());
        facts.state.sysctls.get_or_insert_default().extend(sysctl::conntrack_counts());
        let world = World::of(facts, Arc::clone(&rules.owners), Arc::clone(&rules.simulator));
        let failed = Failed {
            original: flow.original,
            reply: flow.reply,
            outcome,
            reason,
            trace,
            branch: story.branch.as_ref(),
            disagrees: story.contradicts(),
        };
        let finding = explaining(&world, &failed);
        self.known.insert(kind, finding.clone());
        finding
    }
}

/// How it came out, as far as it matters for the cause; nothing for what came out as the rules say.
const fn class(outcome: &Outcome, story: &Story) -> Option<(u8, u32)> {
    Some(match outcome {
        Outcome::Answered { .. } if story.contradicts() => (6, 0),
        Outcome::Answered { .. } | Outcome::JoinedLate => return None,
        Outcome::Refused { by, how, .. } => {
            let by = match by {
                Refuser::Behind { .. } => 0,
                Refuser::ThisNode => 1,
                Refuser::Client => 2,
                Refuser::Unseen => 7,
            };
            match how {
                Refusal::TcpReset => (by, 0),
                Refusal::SctpAbort => (by, 1),
                Refusal::Icmp { kind, code, .. } => (by, (*kind as u32) << 8 | (*code as u32) | 1 << 16),
            }
        }
        Outcome::AnswerLost { entered, .. } => (3, entered.is_none() as u32),
        Outcome::Dropped { reason, .. } => (4, *reason),
        Outcome::Silent { reached, .. } => match reached {
            Reached::Entered { .. } => (5, 0),
            Reached::LocalIn => (5, 1),
            Reached::Left { .. } => (5, 2),
            Reached::Sent => (5, 3),
            Reached::Confirmed => (5, 4),
            Reached::PostRouting => (5, 5),
        },
    })
}

fn facts(rules: &Rules, pods: &Pods) -> Facts {
    let mut facts = Facts {
        state: rules.state.clone(),
        cluster: pods.cluster.clone(),
        sandboxes: pods.sandboxes.clone(),
        listeners: pods.listeners.clone(),
        proxy: pods.makers.proxy.clone(),
        ..Facts::default()
    };
    facts.state.name = facts.cluster.pods_of.clone().or_else(|| Some(Node::here().name));
    facts.name_node();
    facts.forget_balancers();
    facts
}

/// The connection's own entry, as far as it was observed.
fn entry(flow: &Flow) -> Option<ConntrackEntry> {
    Some(ConntrackEntry { unreplied: !flow.answered, ..ConntrackEntry::of(flow.original, flow.reply?) })
}
