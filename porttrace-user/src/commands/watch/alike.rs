//! Connections like one that was told: many of them come in a second, and are counted without being told again.

use super::output::{Clock, Printer};
use super::pods::Pods;
use super::rules::Rules;
use porttrace_user::core::correlate::alike::Known;
use porttrace_user::core::correlate::flow::Flow;
use porttrace_user::core::correlate::fold::Shape;
use porttrace_user::core::correlate::judge::Outcome;
use porttrace_user::core::model::trace::Trace;
use porttrace_user::render::watch::Report;

/// Answered connections that went as the rules have it, and what they are counted as.
#[derive(Default)]
pub struct Alike {
    known: Known<Shape>,
    /// Of rules and pods of these generations.
    of: (u64, u64),
}

impl Alike {
    /// Counts a connection that is like one that was told, where those are only counted; false when it is to be told.
    pub fn count(&mut self, flow: &Flow, rules: &Rules, pods: &Pods, printer: &mut Printer) -> bool {
        let now = (rules.generation, pods.generation);
        if std::mem::replace(&mut self.of, now) != now {
            self.known.clear();
        }
        self.known.get(flow).is_some_and(|shape| printer.count(shape, flow.id, Clock::now()))
    }

    /// Remembers a connection that was told and is counted as `shape`, if nothing about it was unusual.
    pub fn learn(&mut self, report: &Report, trace: Option<&Trace>, rules: &Rules, shape: Shape) {
        let is_plain = matches!(report.outcome, Outcome::Answered { .. })
            && report.finding.is_none()
            && trace.is_some()
            && !report.story.contradicts();
        if is_plain && !rules.simulator.minds_client_ports() {
            self.known.learn(&report.flow, shape);
        }
    }

    /// Names of interfaces are others now.
    pub fn forget(&mut self) {
        self.known.clear();
    }
}
