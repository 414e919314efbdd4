//! The run as a whole: many scenarios on all processors, one report.

use super::compare::{Judgement, Step, View, agree, assumed, branch_view, compare};
use super::coverage::{Coverage, rule};
use super::run::{Outcome, Round, run};
use super::scenario::{Probe, Scenario};
use super::shrink::shrink;
use anyhow::Result;
use porttrace_user::core::model::name::Name;
use porttrace_user::core::model::trace::{Flavour, Hop, Trace};
use porttrace_user::core::simulate::Simulator;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// What came out.
#[derive(Debug, Default)]
pub struct Report {
    pub packets: usize,
    pub rulesets: usize,
    /// Exactly one branch, and it was right.
    pub equal: usize,
    /// One of several branches was right.
    pub among: usize,
    /// The model ended early, by reason.
    pub unknown: BTreeMap<String, usize>,
    /// Matches whose outcome was assumed, by name, and for how many packets.
    pub assumed: BTreeMap<String, usize>,
    pub halved: usize,
    /// Rules that iptables refused to load.
    pub refused: Vec<String>,
    /// Lines of `iptables-save` that the parser keeps as unknown, by match.
    pub unparsed: BTreeMap<String, usize>,
    pub coverage: Coverage,
    pub disagreements: Vec<Disagreement>,
    /// Scenarios that could not be run at all.
    pub broken: Vec<String>,
}

/// One packet for which no branch is what happened.
#[derive(Debug)]
pub struct Disagreement {
    pub scenario: String,
    pub probe: u16,
    pub text: String,
}

/// Runs the scenarios that `make` gives (`None` ends) on all processors.
pub fn campaign(make: impl Fn(usize) -> Option<Scenario> + Sync) -> Report {
    let next = AtomicUsize::new(0);
    let report = Mutex::new(Report::default());
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(scenario) = make(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut one = Report::default();
                    one.hold(&scenario);
                    if let Ok(mut report) = report.lock() {
                        report.merge(one);
                    }
                }
            });
        }
    });
    let mut report = report.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    report.disagreements.sort_by(|a, b| (&a.scenario, a.probe).cmp(&(&b.scenario, b.probe)));
    report
}

impl Report {
    /// Runs one scenario and holds every packet against the simulator.
    pub fn hold(&mut self, scenario: &Scenario) {
        let outcome = match run(scenario) {
            Ok(outcome) => outcome,
            Err(error) => return self.broken.push(format!("{}: {error:#}", scenario.name)),
        };
        self.halved += outcome.halved;
        for round in &outcome.rounds {
            self.round(scenario, round);
        }
    }

    fn round(&mut self, scenario: &Scenario, round: &Round) {
        self.rulesets += 1;
        self.refused.extend(round.refused.iter().cloned());
        self.coverage.add(round);
        for diagnostic in &round.state.diagnostics {
            *self.unparsed.entry(diagnostic.message.clone()).or_default() += 1;
        }
        let mut state = round.state.clone();
        let mut simulator = Simulator::new(&state);
        for probe in &round.probes {
            if let Some(lists) = round.recent.get(&probe.id) {
                state.recent = Some(lists.clone());
                simulator = Simulator::new(&state);
            }
            let trace = simulator.trace_every_order(&probe.packet);
            let (view, judgement) = compare(round, probe, &trace);
            self.packets += 1;
            let mut names: Vec<&str> = assumed(&trace).collect();
            names.sort_unstable();
            names.dedup();
            for name in names {
                *self.assumed.entry(name.to_string()).or_default() += 1;
            }
            match judgement {
                Judgement::Equal => self.equal += 1,
                Judgement::Among(_) => self.among += 1,
                Judgement::Unknown(because) => *self.unknown.entry(because).or_default() += 1,
                Judgement::Different => self.disagreements.push(Disagreement {
                    scenario: scenario.name.clone(),
                    probe: probe.id,
                    text: describe(round, probe, &view, &trace),
                }),
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.packets += other.packets;
        self.rulesets += other.rulesets;
        self.equal += other.equal;
        self.among += other.among;
        self.halved += other.halved;
        self.refused.extend(other.refused);
        self.coverage.merge(&other.coverage);
        self.disagreements.extend(other.disagreements);
        self.broken.extend(other.broken);
        for (into, from) in [
            (&mut self.unknown, other.unknown),
            (&mut self.assumed, other.assumed),
            (&mut self.unparsed, other.unparsed),
        ] {
            for (name, count) in from {
                *into.entry(name).or_default() += count;
            }
        }
    }
}

/// The smallest scenario that still disagrees, and its disagreement as text.
pub fn minimal(scenario: &Scenario, probe: u16) -> Option<(Scenario, String)> {
    // Second-round ids are the first round's plus 5000.
    let small = shrink(scenario, probe % 5000, |scenario| first_difference(scenario).is_some());
    let text = first_difference(&small)?;
    Some((small, text))
}

fn first_difference(scenario: &Scenario) -> Option<String> {
    let mut report = Report::default();
    report.hold(scenario);
    report.disagreements.into_iter().next().map(|one| one.text)
}

/// Packet, what the kernel did, and the branch that comes closest, up to where they part.
fn describe(round: &Round, probe: &Probe, kernel: &View, trace: &Trace) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "  packet {:?} uid {}", probe.packet, probe.uid);
    let views: Vec<View> = trace.branches.iter().map(|branch| branch_view(branch, probe)).collect();
    let common = |view: &View| same_beginning(view, kernel);
    let closest = (0..views.len()).max_by_key(|index| (common(&views[*index]), views.len() - index));
    let Some((branch, view)) = closest.and_then(|index| Some((trace.branches.get(index)?, views.get(index)?))) else {
        return text + "  the simulator has no branch at all";
    };
    let shared = common(view);
    let _ = writeln!(text, "  conntrack: kernel {:?}, simulator {:?}", kernel.state, view.state);
    for step in &kernel.steps[..shared] {
        let _ = writeln!(text, "    {step}   {}", text_of(round, probe, step, Flavour::IptablesNft));
    }
    for (who, view) in [("kernel", kernel), ("simulator", view)] {
        for step in &view.legacy {
            let _ = writeln!(
                text,
                "  {who}, iptables-legacy: {step}   {}",
                text_of(round, probe, step, Flavour::IptablesLegacy)
            );
        }
        let _ = writeln!(text, "  {who} goes on:");
        for step in view.steps.iter().skip(shared) {
            let _ = writeln!(text, "    {step}   {}", text_of(round, probe, step, Flavour::IptablesNft));
        }
        let _ = writeln!(text, "    {:?}, answered {:?}", view.end, view.refusal);
    }
    let _ = writeln!(text, "  {:?} (the closest of {} branches: {:?})", branch.verdict, views.len(), branch.decisions);
    for hop in &branch.hops {
        if let Hop::Route { .. } | Hop::Note { .. } | Hop::Conntrack { .. } | Hop::Rewrite { .. } = hop {
            let _ = writeln!(text, "    {hop:?}");
        }
    }
    text
}

fn same_beginning(view: &View, kernel: &View) -> usize {
    (0..=view.steps.len().min(kernel.steps.len()))
        .rev()
        .find(|length| agree(&view.steps[..*length], &kernel.steps[..*length], false, true))
        .unwrap_or_default()
}

fn text_of(round: &Round, probe: &Probe, step: &Step, flavour: Flavour) -> Name {
    let Step::Rule { table, chain, number, .. } = step else { return Name::default() };
    let family = probe.packet.tuple.family();
    rule(round, (family, flavour), table, chain, *number)
        .or_else(|| rule(round, (family, Flavour::Nftables), table, chain, *number))
        .map(|rule| rule.text.read())
        .unwrap_or_default()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} packets through {} rulesets: {} equal, {} among several branches, {} where the model ends early, {} different",
            self.packets,
            self.rulesets,
            self.equal,
            self.among,
            self.unknown.values().sum::<usize>(),
            self.disagreements.len()
        )?;
        writeln!(f, "batches sent again in halves: {}; scenarios not run: {}", self.halved, self.broken.len())?;
        list(f, "rules hit, by match", &self.coverage.matches)?;
        list(f, "rules hit, by target", &self.coverage.targets)?;
        list(f, "native rules hit, by part", &self.coverage.native)?;
        list(f, "packets, by base chain", &self.coverage.chains)?;
        list(f, "packets with an assumed match", &self.assumed)?;
        list(f, "packets where the model ends", &self.unknown)?;
        list(f, "kept as unknown by the parser", &self.unparsed)
    }
}

fn list(f: &mut fmt::Formatter<'_>, title: &str, counts: &BTreeMap<String, usize>) -> fmt::Result {
    let items: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
    writeln!(f, "{title}: {}", items.join(", "))
}

/// Runs a scenario for its outcome alone.
pub fn outcome(scenario: &Scenario) -> Result<Outcome> {
    run(scenario)
}
