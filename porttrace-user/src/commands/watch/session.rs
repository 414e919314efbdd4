//! One session: start probe and reading of rules side by side, then events in, log out, until told to stop.

mod report;

use super::alike::Alike;
use super::args::Args;
use super::diagnosis::Diagnosis;
use super::inside::IntoPods;
use super::intake::{push_all, while_reading};
use super::note::Note;
use super::output::{Clock, Events, Printer};
use super::pods::Pods;
use super::probing::{Loss, losses, probe_config, probes_sentence};
use super::rules::{Node, Rules};
use super::signals::Signals;
use anyhow::Context as _;
use porttrace_user::collect::probe::{Lost, Probe};
use porttrace_user::collect::{leftovers, live};
use porttrace_user::core::correlate::fold::Mode;
use porttrace_user::core::correlate::{Correlator, Limits, Update};
use porttrace_user::core::kube::targets::{NatTarget, nat_targets};
use porttrace_user::core::model::event::Event;
use porttrace_user::core::model::interfaces::Interfaces;
use porttrace_user::render::watch::header::{Header, Opening};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// How often outcomes are looked for; the delay that a reader can notice.
const TICK: Duration = Duration::from_millis(20);
/// How often rules are checked for changes, lost events and bundles are printed.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// After how many connections told the ring buffer is read again.
const READ_EVERY: usize = 64;

/// Runs a session; true when events were lost.
pub async fn run(args: &Args) -> anyhow::Result<bool> {
    let started = Instant::now();
    let clock = Clock::measure()?;
    let reading = tokio::task::spawn_blocking(Rules::read);
    let mut probe = Probe::start(&probe_config(args))?;
    // Without hooks, what is captured depends on where the rules may lead.
    let capturing = (!probe.wants_predictions()).then(|| started.elapsed());
    let mode = match (args.all, args.summary) {
        (true, _) => Mode::All,
        (_, true) => Mode::Summary,
        _ => Mode::Auto,
    };
    let mut printer = Printer::new(args.json, mode, args.verbose > 0, args.colour.style(), clock);
    let limits = Limits { silence_ns: nanoseconds(args.timeout), ..Limits::default() };
    let mut correlator = Correlator::new(args.ports.iter().copied(), limits.clone());
    let (node, probes) = (Node::here(), probes_sentence(probe.info(), capturing));
    let opening = Opening { ports: &args.ports, node: &node.name, kernel: &node.kernel, probes: &probes };
    printer.opening(&opening, capturing.map(nanoseconds))?;
    let mut events = 0;
    let rules = while_reading(reading, &mut probe, &mut correlator, &mut events).await?;
    let rules = rules.context("reading the rules was cut short")?;
    predict_targets(&mut probe, &rules, args)?;
    let interfaces = interfaces_of(&probe);
    let options = args.sources.options(live::Options::default());
    let mut inside = args.into_pods.then(|| IntoPods::new(probe_config(args), &limits, options.clone()));
    if let Some(inside) = &mut inside {
        inside.start(targets(&rules, args)).await;
    }
    let pods = Pods::follow(options);
    let mut session = Session {
        args,
        probe,
        rules,
        printer,
        correlator,
        limits,
        interfaces,
        pods,
        diagnosis: Diagnosis::default(),
        alike: Alike::default(),
        inside,
        events,
        lost: Lost::default(),
        evicted: 0,
    };
    // Before anybody is told that we are ready: from then on a signal ends the session with its sum.
    let mut signals = Signals::listen()?;
    session.header(&opening, started)?;
    // Nobody waits for it but the end.
    let leftovers = tokio::task::spawn_blocking(leftovers::remove_from_pods);
    session.watch(&mut signals).await?;
    for text in leftovers.await.unwrap_or_default() {
        session.printer.note(&text, Clock::now(), true)?;
    }
    session.end(started).await
}

struct Session<'a> {
    args: &'a Args,
    probe: Probe,
    rules: Rules,
    printer: Printer,
    correlator: Correlator,
    limits: Limits,
    interfaces: Interfaces,
    pods: Pods,
    diagnosis: Diagnosis,
    alike: Alike,
    /// With `--into-pods`.
    inside: Option<IntoPods>,
    /// Events read since the start.
    events: u64,
    lost: Lost,
    evicted: u64,
}

impl Session<'_> {
    fn header(&mut self, opening: &Opening<'_>, started: Instant) -> anyhow::Result<()> {
        let mut warnings = self.probe.info().degradations.clone();
        warnings.extend(self.rules.warnings());
        warnings.extend(self.inside.iter_mut().flat_map(IntoPods::notes).map(|note| note.text));
        let header = Header {
            ports: &self.args.ports,
            owners: &self.rules.owners,
            state: &self.rules.state,
            rules: self.rules.sentence(),
            inside: self.inside.as_ref().map(IntoPods::names),
            warnings: &warnings,
            ready_ns: nanoseconds(started.elapsed()),
        };
        Ok(self.printer.header(opening, &header)?)
    }

    /// Until a signal, `--duration` or `--count`.
    async fn watch(&mut self, signals: &mut Signals) -> anyhow::Result<()> {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut housekeeping = interval(HOUSEKEEPING);
        housekeeping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = tokio::time::sleep(self.args.duration.unwrap_or(Duration::from_secs(u64::from(u32::MAX))));
        tokio::pin!(end);
        let mut events: Vec<Event> = Vec::with_capacity(4096);
        loop {
            tokio::select! {
                read = self.probe.read(&mut events) => {
                    read?;
                    self.take(&mut events);
                    self.follow_links();
                }
                () = listen(&mut self.inside) => {}
                _ = ticks.tick() => {
                    if self.tell_what_is_due().await? {
                        return Ok(());
                    }
                }
                _ = housekeeping.tick() => self.keep_house().await?,
                () = &mut end => return Ok(()),
                _ = signals.interrupt.recv() => return Ok(()),
                _ = signals.terminate.recv() => return Ok(()),
                _ = signals.hangup.recv() => return Ok(()),
            }
        }
    }

    fn take(&mut self, events: &mut Vec<Event>) {
        self.events += events.len() as u64;
        push_all(&mut self.correlator, events);
    }

    /// Prints what is known by now; true when `--count` is reached.
    async fn tell_what_is_due(&mut self) -> anyhow::Result<bool> {
        // Where the CPU is not to be had, what happened long before may still wait to be read.
        let until_ns = Clock::now().saturating_sub(nanoseconds(self.probe.held_back()));
        let mut events = Vec::new();
        self.probe.read_now(&mut events)?;
        self.take(&mut events);
        let updates = self.correlator.tick(until_ns);
        let any = !updates.is_empty();
        let full = self.tell(updates).await?;
        if any {
            self.printer.flush()?;
        }
        Ok(full)
    }

    /// Reads events in between: to tell of many connections takes longer than the ring buffer may wait.
    async fn tell(&mut self, updates: Vec<Update>) -> anyhow::Result<bool> {
        let mut events = Vec::new();
        for (told, update) in updates.into_iter().enumerate() {
            if told % READ_EVERY == READ_EVERY - 1 {
                self.probe.read_now(&mut events)?;
                self.take(&mut events);
            }
            match update {
                Update::Reported(flow) => {
                    self.report(*flow, false).await?;
                    if self.args.count.is_some_and(|count| self.printer.connections >= count) {
                        return Ok(true);
                    }
                }
                Update::Amended(flow) => self.report(*flow, true).await?,
                Update::Ended { id, original, start_ns, end } => self.printer.ended(id, original, start_ns, &end)?,
            }
        }
        Ok(false)
    }

    /// Interfaces that came or went: their names, and with them routes and pods, are others now.
    fn follow_links(&mut self) {
        if !self.probe.link_changes().is_empty() {
            self.interfaces = interfaces_of(&self.probe);
            self.alike.forget();
            self.rules.expect_changes();
            self.pods.expect_changes();
            if let Some(inside) = &mut self.inside {
                inside.expect_changes(None);
            }
        }
    }

    async fn keep_house(&mut self) -> anyhow::Result<()> {
        self.tell_lost()?;
        for text in self.probe.refusals() {
            self.printer.note(&text, Clock::now(), true)?;
        }
        let evicted = self.correlator.counts().evicted;
        if evicted > self.evicted {
            let text =
                format!("{} connections judged before their time: too many are open at once", evicted - self.evicted);
            self.printer.note(&text, Clock::now(), true)?;
            self.evicted = evicted;
        }
        self.printer.bundles()?;
        self.reload_if_changed().await?;
        if let Some(inside) = &mut self.inside {
            inside.keep_house().await;
            for note in inside.notes() {
                self.printer.note(&note.text, Clock::now(), note.warns)?;
            }
        }
        Ok(())
    }

    fn tell_lost(&mut self) -> anyhow::Result<()> {
        let lost = self.lost_so_far()?;
        if lost != self.lost {
            self.printer.lost(&losses(lost), self.events, Clock::now())?;
            self.lost = lost;
        }
        Ok(())
    }

    /// On the node, and inside its pods.
    fn lost_so_far(&self) -> anyhow::Result<Lost> {
        let lost = self.probe.lost()?;
        Ok(self.inside.as_ref().map_or(lost, |inside| lost.plus(inside.lost())))
    }

    async fn reload_if_changed(&mut self) -> anyhow::Result<()> {
        let Self { rules, probe, correlator, events, .. } = self;
        let note = while_reading(rules.follow(), probe, correlator, events).await?;
        self.tell_change(note)
    }

    /// Tells a change of the rules, and whom it concerns.
    fn tell_change(&mut self, note: Option<Note>) -> anyhow::Result<()> {
        let Some(note) = note else { return Ok(()) };
        predict_targets(&mut self.probe, &self.rules, self.args)?;
        if let Some(inside) = &mut self.inside {
            inside.expect_changes(Some(targets(&self.rules, self.args)));
        }
        Ok(self.printer.note(&note.text, Clock::now(), note.warns)?)
    }

    async fn end(mut self, started: Instant) -> anyhow::Result<bool> {
        let mut events = Vec::new();
        self.probe.read_rest(&mut events)?;
        self.take(&mut events);
        let mut updates = self.correlator.tick(Clock::now());
        // Connections that still wait for an answer are told as they stand.
        if self.args.count.is_none() {
            updates.extend(self.correlator.finish());
        }
        self.tell(updates).await?;
        self.printer.bundles()?;
        self.tell_lost()?;
        if let Some(inside) = &mut self.inside {
            inside.end().await;
        }
        // What pods had to tell is theirs.
        let node = self.probe.lost()?;
        let lost: Vec<String> = losses(self.lost).iter().map(Loss::sentence).collect();
        let events = Events { received: self.events, lost: node.total(), unclaimed: self.probe.unclaimed() };
        self.printer.summary(nanoseconds(started.elapsed()), events, &lost)?;
        Ok(!lost.is_empty())
    }
}

/// Tells the probe where the rules may send the watched connections, if it has a use for that.
fn predict_targets(probe: &mut Probe, rules: &Rules, args: &Args) -> anyhow::Result<()> {
    if probe.wants_predictions() {
        probe.predict(&targets(rules, args))?;
    }
    Ok(())
}

/// Where the rules may send the watched connections.
fn targets(rules: &Rules, args: &Args) -> BTreeSet<NatTarget> {
    nat_targets(rules.state.all_rules().map(Arc::as_ref), &args.ports)
}

/// Never ends without `--into-pods`.
async fn listen(inside: &mut Option<IntoPods>) {
    match inside {
        Some(inside) => inside.listen().await,
        None => std::future::pending().await,
    }
}

fn interfaces_of(probe: &Probe) -> Interfaces {
    let mut interfaces = Interfaces::default();
    for (&index, name) in probe.interface_names() {
        interfaces.insert(index, name.clone(), name == "lo");
    }
    interfaces
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
