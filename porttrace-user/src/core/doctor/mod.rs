//! Whether `watch` can run on a node, how well, what each lack costs and what to do about it. Facts in, lines out.

mod cluster;
pub mod facts;
mod kernel;
mod rules;

use facts::{Facts, Trial};
use serde::Serialize;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Good,
    /// Neither good nor bad: what there is.
    Note,
    /// It is not known.
    Unknown,
    /// Something is lost, and `watch` runs.
    Warning,
    /// `watch` cannot run, or its predictions do not hold.
    Bad,
}

/// The part of the node that a check is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    Kernel,
    Probe,
    Conntrack,
    Rules,
    Cluster,
}

impl Group {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Probe => "probe",
            Self::Conntrack => "conntrack",
            Self::Rules => "rules",
            Self::Cluster => "cluster",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable within a version of the report.
    pub id: &'static str,
    pub group: Group,
    pub status: Status,
    /// What is so.
    pub text: String,
    /// What that costs who watches.
    pub costs: Option<String>,
    /// What to do about it.
    pub advice: Option<String>,
}

impl Check {
    fn new(group: Group, id: &'static str, status: Status, text: impl Into<String>) -> Self {
        Self { id, group, status, text: text.into(), costs: None, advice: None }
    }

    fn costs(mut self, text: impl Into<String>) -> Self {
        self.costs = Some(text.into());
        self
    }

    fn advice(mut self, text: impl Into<String>) -> Self {
        self.advice = Some(text.into());
        self
    }
}

/// What observes conntrack when `watch` chooses by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    Netfilter,
    Fentry,
    Kprobe,
    Ctnetlink,
    None,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// `watch` starts here, if with less.
    pub can_watch: bool,
    /// Something is lost, or what the rules predict is not all that decides.
    pub degraded: bool,
    pub backend: Backend,
    /// The answer in one sentence.
    pub summary: String,
    /// Sorted by group; within it in order of weight for a reader.
    pub checks: Vec<Check>,
}

/// Looks at the facts.
pub fn examine(facts: &Facts) -> Report {
    let backend = backend(facts);
    let mut checks = kernel::checks(facts, backend);
    checks.extend(rules::checks(facts));
    checks.extend(cluster::checks(facts));
    checks.sort_by_key(|check| check.group);
    let can_watch = can_watch(facts);
    let degraded = checks.iter().any(|check| check.status >= Status::Unknown);
    let summary = summary(facts, can_watch, degraded, backend);
    Report { can_watch, degraded, backend, summary, checks }
}

/// As the probe chooses.
fn backend(facts: &Facts) -> Backend {
    let trials = &facts.trials;
    let tried = [
        (&trials.netfilter, Backend::Netfilter),
        (&trials.fentry, Backend::Fentry),
        (&trials.kprobe, Backend::Kprobe),
        (&trials.ctnetlink, Backend::Ctnetlink),
    ];
    tried.into_iter().find(|(trial, _)| trial.works()).map_or(Backend::None, |(_, backend)| backend)
}

fn can_watch(facts: &Facts) -> bool {
    let trials = &facts.trials;
    facts.rights.missing.is_empty()
        && [&trials.maps, &trials.tc].into_iter().all(Trial::works)
        && (trials.tcx.works() || trials.clsact.works())
}

fn summary(facts: &Facts, can_watch: bool, degraded: bool, backend: Backend) -> String {
    if !facts.rights.missing.is_empty() {
        return format!("watch cannot run: this process lacks {}", facts.rights.missing.join(", "));
    }
    if !can_watch {
        return "watch cannot run on this kernel".to_owned();
    }
    let nat = match backend {
        Backend::Netfilter => "NAT is observed by NETFILTER programs",
        Backend::Fentry => "NAT is observed by fentry programs",
        Backend::Kprobe => "NAT is observed by kprobes",
        Backend::Ctnetlink => "NAT is observed by conntrack's events, a little late",
        Backend::None => "NAT is predicted from the rules, not observed",
    };
    let tail = if degraded { "; see the marks below" } else { "" };
    format!("watch can run here: {nat}{tail}")
}
