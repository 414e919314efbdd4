//! Connections like one that was told: many of them come in a second, and are counted without being told again.

use super::pods::Pods;
use super::rules::Rules;
use porttrace_user::core::correlate::alike::Known;
use porttrace_user::core::correlate::flow::Flow;
use porttrace_user::core::correlate::fold::Shape;
use porttrace_user::core::correlate::judge::Outcome;
use porttrace_user::core::model::trace::Trace;
use porttrace_user::render::watch::Report;

/// Connections that went as the rules have it, and what they are counted as.
#[derive(Default)]
pub struct Alike {
    known: Known<Told>,
    /// Of rules and pods of these generations.
    of: (u64, u64),
}

/// A connection that was told.
#[derive(Clone)]
pub struct Told {
    pub shape: Shape,
    pub has_failed: bool,
}

impl Alike {
    /// One that this one is like.
    pub fn find(&mut self, flow: &Flow, rules: &Rules, pods: &Pods) -> Option<Told> {
        let now = (rules.generation, pods.generation);
        if std::mem::replace(&mut self.of, now) != now {
            self.known.clear();
        }
        self.known.get(flow).cloned()
    }

    /// Remembers a connection that was told and is counted as `shape`, if nothing about it was unusual.
    pub fn learn(&mut self, report: &Report, trace: Option<&Trace>, rules: &Rules, shape: Shape) {
        let has_failed = match report.outcome {
            Outcome::Answered { .. } if report.finding.is_none() => false,
            Outcome::Answered { .. } | Outcome::JoinedLate => return,
            _ => true,
        };
        let is_plain = trace.is_some() && !report.story.contradicts();
        if is_plain && !rules.simulator.minds_client_ports() {
            self.known.learn(&report.flow, Told { shape, has_failed });
        }
    }

    /// Names of interfaces are others now.
    pub fn forget(&mut self) {
        self.known.clear();
    }
}
