//! One session: start probe and reading of rules side by side, then events in, log out, until told to stop.

use super::args::{Args, BackendChoice, ProtoChoice};
use super::diagnosis::Diagnosis;
use super::output::{Clock, Events, Printer};
use super::pods::Pods;
use super::rules::Rules;
use anyhow::Context as _;
use porttrace_ebpf::Kind;
use porttrace_user::collect::live;
use porttrace_user::collect::probe::{Backend, ConntrackBackend, Lost, Probe, ProbeConfig, ProbeInfo, Protos, TcMode};
use porttrace_user::core::correlate::flow::Flow;
use porttrace_user::core::correlate::fold::Mode;
use porttrace_user::core::correlate::judge::{Outcome, judge};
use porttrace_user::core::correlate::story::tell;
use porttrace_user::core::correlate::{Correlator, Limits, Update};
use porttrace_user::core::kube::targets::nat_targets;
use porttrace_user::core::model::event::Event;
use porttrace_user::core::model::interfaces::Interfaces;
use porttrace_user::core::model::trace::{Packet, Trace};
use porttrace_user::render::watch::header::{Header, count};
use porttrace_user::render::watch::{Context, Report};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// How often outcomes are looked for; the delay that a reader can notice.
const TICK: Duration = Duration::from_millis(20);
/// How often rules are checked for changes, lost events and bundles are printed.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// Runs a session; true when events were lost.
pub async fn run(args: &Args) -> anyhow::Result<bool> {
    let started = Instant::now();
    let clock = Clock::measure()?;
    let reading = tokio::task::spawn_blocking(Rules::read);
    let mut probe = Probe::start(&probe_config(args))?;
    let rules = reading.await.context("reading the rules was cut short")?;
    predict_targets(&mut probe, &rules, args)?;
    let mode = match (args.all, args.summary) {
        (true, _) => Mode::All,
        (_, true) => Mode::Summary,
        _ => Mode::Auto,
    };
    let printer = Printer::new(args.json, mode, args.verbose > 0, args.colour.style(), clock);
    let limits = Limits { silence_ns: nanoseconds(args.timeout), ..Limits::default() };
    let correlator = Correlator::new(args.ports.iter().copied(), limits.clone());
    let interfaces = interfaces_of(&probe);
    let pods = Pods::follow(args.sources.options(live::Options::default()));
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
        events: 0,
        lost: Lost::default(),
        evicted: 0,
    };
    // Before anybody is told that we are ready: from then on a signal ends the session with its sum.
    let mut signals = Signals::listen()?;
    session.header(started)?;
    session.watch(&mut signals).await?;
    session.end(started).await
}

/// The signals that end a session.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?,
            hangup: signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?,
        })
    }
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
    /// Events read since the start.
    events: u64,
    lost: Lost,
    evicted: u64,
}

impl Session<'_> {
    fn header(&mut self, started: Instant) -> anyhow::Result<()> {
        let info = self.probe.info();
        let mut warnings = info.degradations.clone();
        warnings.extend(self.rules.warnings());
        let header = Header {
            ports: &self.args.ports,
            node: &self.rules.node,
            kernel: &self.rules.kernel,
            owners: &self.rules.owners,
            probes: probes_sentence(info),
            rules: self.rules.sentence(),
            warnings: &warnings,
            ready_ns: nanoseconds(started.elapsed()),
        };
        Ok(self.printer.header(&header)?)
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

    /// Events of one CPU come in order, those of several interleaved: a batch is sorted by time first.
    fn take(&mut self, events: &mut Vec<Event>) {
        self.events += events.len() as u64;
        events.sort_by_key(|event| event.time_ns);
        for event in events.drain(..) {
            self.correlator.push(event);
        }
    }

    /// Prints what is known by now; true when `--count` is reached.
    async fn tell_what_is_due(&mut self) -> anyhow::Result<bool> {
        let updates = self.correlator.tick(Clock::now());
        let any = !updates.is_empty();
        let full = self.tell(updates).await?;
        if any {
            self.printer.flush()?;
        }
        Ok(full)
    }

    async fn tell(&mut self, updates: Vec<Update>) -> anyhow::Result<bool> {
        for update in updates {
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

    /// Tells a connection, or (`amends`) what became of one that was told as unanswered.
    async fn report(&mut self, flow: Flow, amends: bool) -> anyhow::Result<()> {
        let all = self.args.verbose > 0;
        let mut trace = self.predict(&flow);
        let mut story = tell(&flow, trace.as_ref(), &self.interfaces, all);
        // Before the rules are said to be contradicted, they are read again: they may have changed a moment ago.
        if story.disagrees && self.reload_if_changed().await? {
            trace = self.predict(&flow);
            story = tell(&flow, trace.as_ref(), &self.interfaces, all);
        }
        let outcome = judge(&flow, &self.interfaces);
        let drop_reasons = self.drop_reasons(&flow);
        let finding = match outcome {
            Outcome::Answered { .. } | Outcome::JoinedLate => None,
            _ => {
                let end = flow.reply.map_or(flow.original.destination(), |reply| reply.source());
                self.pods.refresh(end.ip()).await;
                let reason = match &outcome {
                    Outcome::Dropped { reason, .. } => drop_reasons.get(reason).map(String::as_str),
                    _ => None,
                };
                self.diagnosis.of((&flow, &outcome, &story, trace.as_ref()), reason, &self.rules, &self.pods)
            }
        };
        let context = Context {
            interfaces: &self.interfaces,
            owners: &self.rules.owners,
            pods: self.pods.sockets(),
            workloads: &self.pods.workloads,
            drop_reasons: &drop_reasons,
            silence_ns: self.limits.silence_ns,
        };
        let report = Report { flow, story, outcome, finding };
        if amends {
            return Ok(self.printer.amend(&report, &context)?);
        }
        Ok(self.printer.report(&report, &context, Clock::now())?)
    }

    /// The kernel's names of the drop reasons that occur in a connection.
    fn drop_reasons(&self, flow: &Flow) -> BTreeMap<u32, String> {
        flow.sightings
            .iter()
            .filter(|seen| seen.event.kind == Kind::Dropped)
            .filter_map(|seen| {
                let name = self.probe.reason_name(Kind::Dropped, seen.event.reason)?;
                Some((seen.event.reason, name.to_owned()))
            })
            .collect()
    }

    /// Interfaces that came or went: their names, and with them routes and pods, are others now.
    fn follow_links(&mut self) {
        if !self.probe.link_changes().is_empty() {
            self.interfaces = interfaces_of(&self.probe);
            self.rules.expect_changes();
            self.pods.expect_changes();
        }
    }

    /// What the rules say about the connection's first packet; nothing for a connection that is older than the session.
    fn predict(&self, flow: &Flow) -> Option<Trace> {
        if flow.joined_late {
            return None;
        }
        let input = flow.input_ifindex().map(|index| self.interfaces.name(index).into());
        let packet = Packet::first_of(flow.original, input);
        Some(self.rules.simulator.trace(&packet))
    }

    async fn keep_house(&mut self) -> anyhow::Result<()> {
        self.tell_lost()?;
        let evicted = self.correlator.counts().evicted;
        if evicted > self.evicted {
            let text =
                format!("{} connections judged before their time: too many are open at once", evicted - self.evicted);
            self.printer.note(&text, Clock::now(), true)?;
            self.evicted = evicted;
        }
        self.printer.bundles()?;
        self.reload_if_changed().await?;
        Ok(())
    }

    fn tell_lost(&mut self) -> anyhow::Result<()> {
        let lost = self.probe.lost()?;
        if lost != self.lost {
            self.printer.lost(&reasons(lost), self.events, Clock::now())?;
            self.lost = lost;
        }
        Ok(())
    }

    /// Reads rules, routes and addresses again when they changed; true when they did.
    async fn reload_if_changed(&mut self) -> anyhow::Result<bool> {
        let Some(text) = self.rules.follow().await else { return Ok(false) };
        predict_targets(&mut self.probe, &self.rules, self.args)?;
        self.printer.note(&text, Clock::now(), false)?;
        Ok(true)
    }

    async fn end(mut self, started: Instant) -> anyhow::Result<bool> {
        let mut events = Vec::new();
        self.probe.read_now(&mut events)?;
        self.take(&mut events);
        let mut updates = self.correlator.tick(Clock::now());
        // Connections that still wait for an answer are told as they stand.
        if self.args.count.is_none() {
            updates.extend(self.correlator.finish());
        }
        self.tell(updates).await?;
        self.printer.bundles()?;
        self.tell_lost()?;
        let lost: Vec<String> =
            reasons(self.lost).iter().map(|(reason, count)| format!("{count} events lost: {reason}")).collect();
        let events = Events { received: self.events, lost: self.lost.ring_full + self.lost.conntrack_full };
        self.printer.summary(nanoseconds(started.elapsed()), events, &lost)?;
        Ok(!lost.is_empty())
    }
}

/// Tells the probe where the rules may send the watched connections, if it has a use for that.
fn predict_targets(probe: &mut Probe, rules: &Rules, args: &Args) -> anyhow::Result<()> {
    if probe.wants_predictions() {
        probe.predict(&nat_targets(rules.state.rulesets.iter().map(Arc::as_ref), &args.ports))?;
    }
    Ok(())
}

fn interfaces_of(probe: &Probe) -> Interfaces {
    let mut interfaces = Interfaces::default();
    for (&index, name) in probe.interface_names() {
        interfaces.insert(index, name.clone(), name == "lo");
    }
    interfaces
}

fn probes_sentence(info: &ProbeInfo) -> String {
    let conntrack = match info.conntrack_backend {
        ConntrackBackend::None => "not observed".to_owned(),
        backend => format!("by {backend}"),
    };
    format!(
        "TC ({}) on {}; conntrack {conntrack}; ready in {} ms, of which attaching {} ms",
        tc_name(info.tc),
        count(info.interfaces, "interface"),
        info.start_time.as_millis(),
        info.attach_time.as_millis(),
    )
}

/// Lost events by reason, only those that occurred.
fn reasons(lost: Lost) -> Vec<(String, u64)> {
    [
        ("ring buffer full", lost.ring_full),
        ("table of connections full", lost.track_full),
        ("conntrack's queue full", lost.conntrack_full),
    ]
    .into_iter()
    .filter(|(_, count)| *count > 0)
    .map(|(reason, count)| (reason.to_owned(), count))
    .collect()
}

fn probe_config(args: &Args) -> ProbeConfig {
    let protos = match args.proto {
        ProtoChoice::All => Protos::ALL,
        one => Protos { tcp: one == ProtoChoice::Tcp, udp: one == ProtoChoice::Udp, sctp: one == ProtoChoice::Sctp },
    };
    let backend = match args.conntrack_backend {
        BackendChoice::Auto => Backend::Auto,
        BackendChoice::Netfilter => Backend::Netfilter,
        BackendChoice::Kprobe => Backend::Kprobe,
        BackendChoice::Ctnetlink => Backend::Ctnetlink,
        BackendChoice::None => Backend::TcOnly,
    };
    ProbeConfig {
        protos,
        backend,
        ring_bytes: args.buffer,
        // Only the whole story shows them.
        data: args.verbose > 0,
        kernel_log: args.verbose > 1,
        ..ProbeConfig::new(args.ports.iter().copied())
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

const fn tc_name(mode: TcMode) -> &'static str {
    match mode {
        TcMode::Tcx => "tcx",
        TcMode::Clsact => "clsact",
    }
}
