//! `--into-pods`: the pods that the rules lead watched connections to, each followed in its own network namespace.

use super::note::Note;
use super::output::Clock;
use super::probing::sight;
use super::reading::{MOMENT, Reading};
use porttrace_user::collect::attached::{self, Attached};
use porttrace_user::collect::facts;
use porttrace_user::collect::inside::{Insider, News, Told};
use porttrace_user::collect::probe::{Lost, ProbeConfig};
use porttrace_user::core::correlate::drops::Answer;
use porttrace_user::core::correlate::flow::Flow;
use porttrace_user::core::correlate::inside::{Inside, note_listeners, refuses_itself, tuple_outside};
use porttrace_user::core::correlate::judge::{Outcome, judge};
use porttrace_user::core::correlate::sight::Sight;
use porttrace_user::core::correlate::story::tell;
use porttrace_user::core::correlate::{Correlator, Limits};
use porttrace_user::core::kube::targets::NatTarget;
use porttrace_user::core::model::cluster::{Part, Sandbox};
use porttrace_user::core::model::event::Event;
use porttrace_user::core::model::interfaces::Interfaces;
use porttrace_user::core::model::pods::PodSockets;
use porttrace_user::core::model::state::Socket;
use porttrace_user::core::model::trace::Packet;
use porttrace_user::core::simulate::Simulator;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout_at};

/// Pods followed at once. Each costs a thread, its own copy of the kernel programs, and the buffers below; and the whole
/// kernel's drops are looked at once more.
const MOST_PODS: usize = 16;
/// Room for some 4,600 events, and for connections, in each.
const RING_BYTES: u32 = 1 << 20;
const TRACKED: u32 = 4_096;
/// How long a session waits for its pods before it says that it is ready, and at its end.
const PATIENCE: Duration = Duration::from_secs(10);
/// A pod is looked for so long after something changed: its interface comes before its addresses.
const UNSETTLED: Duration = Duration::from_secs(3);

/// All pods that are followed.
pub struct IntoPods {
    config: ProbeConfig,
    limits: Limits,
    options: facts::Options,
    targets: BTreeSet<NatTarget>,
    pods: BTreeMap<u32, Pod>,
    told: Receiver<Told>,
    tell: Sender<Told>,
    look_until: Instant,
    /// Pods beyond [`MOST_PODS`].
    left_out: usize,
    naming: Option<JoinHandle<Part<Vec<Sandbox>>>>,
    /// What pods lost that are gone.
    lost_before: Lost,
    notes: Vec<Note>,
    /// The pods of the beginning are followed; those that come later are noted.
    has_started: bool,
}

struct Pod {
    attached: Attached,
    ports: BTreeSet<u16>,
    insider: Insider,
    correlator: Correlator,
    interfaces: Interfaces,
    simulator: Option<Simulator>,
    sight: Sight,
    /// When its state was last asked for.
    renewed: Reading,
    is_ready: bool,
    lost: Lost,
    /// All events before this (CLOCK_MONOTONIC) are in the correlator.
    until_ns: u64,
}

impl IntoPods {
    /// `config`: the node's own; ports and sizes are set for each pod.
    pub fn new(config: ProbeConfig, limits: &Limits, options: facts::Options) -> Self {
        let (tell, told) = channel(256);
        // A pod's connection is looked up when the node's is reported, so it must live a little longer.
        let limits = Limits {
            silence_ns: limits.silence_ns.saturating_add(2_000_000_000),
            grace_ns: 2_000_000_000,
            forget_ns: 10_000_000_000,
            max_open: limits.max_flows,
            ..limits.clone()
        };
        Self {
            config: ProbeConfig { ring_bytes: RING_BYTES.min(config.ring_bytes), tracked: TRACKED, ..config },
            limits,
            options,
            targets: BTreeSet::new(),
            pods: BTreeMap::new(),
            told,
            tell,
            look_until: Instant::now(),
            left_out: 0,
            naming: None,
            lost_before: Lost::default(),
            notes: Vec::new(),
            has_started: false,
        }
    }

    /// Finds the pods behind the targets, and waits until their probes are attached.
    pub async fn start(&mut self, targets: BTreeSet<NatTarget>) {
        self.targets = targets;
        self.look().await;
        let deadline = Instant::now() + PATIENCE;
        while self.pods.values().any(|pod| !pod.is_ready || pod.simulator.is_none()) {
            match timeout_at(deadline, self.told.recv()).await {
                Ok(Some(told)) => self.take(told),
                _ => break,
            }
        }
        self.has_started = true;
    }

    /// Interfaces or rules changed: pods may have come or gone. `targets`: where the rules lead now.
    pub fn expect_changes(&mut self, targets: Option<BTreeSet<NatTarget>>) {
        self.look_until = Instant::now() + UNSETTLED;
        self.targets = targets.unwrap_or_else(|| std::mem::take(&mut self.targets));
    }

    /// Once a second: forgets old connections, looks for pods while things change.
    pub async fn keep_house(&mut self) {
        let now = Clock::now();
        for pod in self.pods.values_mut() {
            // Their outcomes are told as part of the node's connections.
            drop(pod.correlator.tick(now));
        }
        if self.naming.as_ref().is_some_and(JoinHandle::is_finished)
            && let Some(naming) = self.naming.take()
            && let Ok(Part::Known(sandboxes)) = naming.await
        {
            self.name(&sandboxes);
        }
        if Instant::now() < self.look_until {
            self.look().await;
        }
    }

    /// Waits for what the pods have to tell, and takes it in. Safe to cancel.
    pub async fn listen(&mut self) {
        if let Some(told) = self.told.recv().await {
            self.take(told);
        }
    }

    /// The connection as the pod saw it that it was sent to; `None`: no pod that is followed saw it.
    pub async fn tell(&mut self, flow: &Flow, all: bool) -> Option<Inside> {
        let opening = tuple_outside(flow)?;
        let (&netns, pod) = self.pods.iter().find(|(_, pod)| pod.attached.addresses.contains(&opening.dst))?;
        if pod.until_ns <= flow.last_ns {
            let insider = pod.insider.clone();
            self.until(insider.catch_up()).await;
        }
        let seen =
            self.pods.get(&netns)?.correlator.opened_by(opening).filter(|seen| !seen.sightings.is_empty())?.clone();
        let mut inside = self.pods.get(&netns)?.told(seen, all);
        let has_failed = !matches!(inside.outcome, Outcome::Answered { .. } | Outcome::JoinedLate);
        // Before the pod's rules are said to be contradicted, or a failure is laid to them, they are read again.
        if inside.story.contradicts() || (has_failed && self.pods.get(&netns)?.may_be_old(flow.last_ns)) {
            let (insider, begun_ns) = (self.pods.get(&netns)?.insider.clone(), Clock::now());
            self.until(insider.renew()).await;
            let pod = self.pods.get_mut(&netns)?;
            pod.renewed = Reading::since(begun_ns);
            inside = pod.told(inside.flow, all);
        }
        Some(inside.timed_by(flow))
    }

    /// What listens in the pod of a connection that it refused itself, noted in its story; with the pod's addresses.
    pub async fn listeners(&mut self, inside: &mut Inside) -> Option<(BTreeSet<IpAddr>, Vec<Socket>)> {
        if !refuses_itself(inside) {
            return None;
        }
        let pod = self.pods.get(&inside.netns)?;
        let addresses = pod.attached.addresses.clone();
        let insider = pod.insider.clone();
        let found = self.until(insider.sockets()).await?;
        let mut sockets = PodSockets::default();
        sockets.insert(addresses.iter().copied(), &found);
        note_listeners(inside, &sockets);
        Some((addresses, found))
    }

    /// Names of the pods that are followed, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.pods.values().map(|pod| pod.attached.name.clone()).collect();
        names.sort();
        names
    }

    /// What happened since the last call, a sentence each.
    pub fn notes(&mut self) -> Vec<Note> {
        std::mem::take(&mut self.notes)
    }

    /// Events that pods lost since the start.
    pub fn lost(&self) -> Lost {
        self.pods.values().fold(self.lost_before, |sum, pod| sum.plus(pod.lost))
    }

    /// Lets all threads end, and waits until they have: what they attached goes with them.
    pub async fn end(&mut self) {
        self.targets.clear();
        let mut left: BTreeSet<u32> = std::mem::take(&mut self.pods).into_keys().collect();
        let deadline = Instant::now() + PATIENCE;
        while !left.is_empty() {
            match timeout_at(deadline, self.told.recv()).await {
                Ok(Some((netns, News::Gone(_)))) => drop(left.remove(&netns)),
                Ok(Some(_)) => {}
                _ => return,
            }
        }
    }

    /// Takes in what pods tell until `done`: their threads wait for that.
    async fn until<T>(&mut self, done: impl Future<Output = T>) -> T {
        tokio::pin!(done);
        loop {
            tokio::select! {
                told = self.told.recv() => {
                    if let Some(told) = told {
                        self.take(told);
                    }
                }
                answer = &mut done => {
                    // What was told before the answer is taken in before it.
                    while let Ok(told) = self.told.try_recv() {
                        self.take(told);
                    }
                    return answer;
                }
            }
        }
    }

    fn take(&mut self, (netns, news): Told) {
        let Some(pod) = self.pods.get_mut(&netns) else { return };
        match news {
            News::Ready(info) => {
                pod.is_ready = true;
                pod.sight = sight(info.conntrack_backend);
                let name = &pod.attached.name;
                if self.has_started {
                    self.notes.push(Note::of(format!("pod {name} is followed inside")));
                }
                let costs = |what: &String| Note::warning(format!("inside {name}: {what}"));
                self.notes.extend(info.degradations.iter().map(costs));
            }
            News::Events { events, until_ns } => pod.push(events, until_ns),
            News::Interfaces(interfaces) => pod.interfaces = interfaces,
            News::State(state) => pod.simulator = Some(Simulator::new(&state)),
            News::Lost(lost) => pod.lost = lost,
            News::Unseen(what) => {
                self.notes.push(Note::warning(format!("inside {}: {what}", pod.attached.name)));
            }
            News::Gone(why) => {
                let name = pod.attached.name.clone();
                self.lost_before = self.lost_before.plus(pod.lost);
                self.pods.remove(&netns);
                self.notes.push(match why {
                    None => Note::of(format!("pod {name} is gone, and no longer followed inside")),
                    Some(why) => Note::warning(format!("pod {name} is not followed inside: {why}")),
                });
                // A namespace may have lost one of several names.
                self.look_until = Instant::now() + UNSETTLED;
            }
        }
    }

    /// Finds the pods behind the targets; starts with those that are new, leaves those that are no longer meant.
    async fn look(&mut self) {
        let wanted: BTreeSet<IpAddr> = self.targets.iter().map(|(_, to)| to.ip()).collect();
        let found = match spawn_blocking(move || attached::behind(&wanted, &[])).await {
            Ok(Ok(found)) => found,
            Ok(Err(why)) => return self.notes.push(Note::warning(why)),
            Err(_) => return,
        };
        let meant: BTreeMap<u32, BTreeSet<u16>> = found.iter().map(|pod| (pod.netns, self.ports_of(pod))).collect();
        self.pods.retain(|netns, pod| meant.get(netns) == Some(&pod.ports));
        let new: Vec<Attached> = found.into_iter().filter(|pod| !self.pods.contains_key(&pod.netns)).collect();
        let room = MOST_PODS.saturating_sub(self.pods.len());
        let left_out = new.len().saturating_sub(room);
        if left_out != self.left_out && left_out > 0 {
            self.notes
                .push(Note::warning(format!("{left_out} more pods are not followed inside: {MOST_PODS} at once are")));
        }
        self.left_out = left_out;
        for attached in new.into_iter().take(room) {
            self.enter(attached);
        }
    }

    fn ports_of(&self, pod: &Attached) -> BTreeSet<u16> {
        let mine = self.targets.iter().filter(|(_, to)| pod.addresses.contains(&to.ip()));
        mine.map(|(_, to)| to.port()).collect()
    }

    fn enter(&mut self, attached: Attached) {
        let ports = self.ports_of(&attached);
        let config = ProbeConfig { ports: ports.iter().copied().collect(), ..self.config.clone() };
        match Insider::start(&attached, config, self.tell.clone()) {
            Ok(insider) => {
                let correlator = Correlator::new(ports.iter().copied(), self.limits.clone());
                let pod = Pod {
                    ports,
                    insider,
                    correlator,
                    interfaces: Interfaces::default(),
                    simulator: None,
                    sight: Sight::WHOLE,
                    renewed: Reading::at(0),
                    is_ready: false,
                    lost: Lost::default(),
                    until_ns: 0,
                    attached,
                };
                self.pods.insert(pod.attached.netns, pod);
                let options = self.options.clone();
                // The container runtime may take its time, and nobody waits for it.
                self.naming.get_or_insert_with(|| spawn_blocking(move || facts::sandboxes(&options)));
            }
            Err(error) => {
                let text = format!("pod {} is not followed inside: {error}", attached.name);
                self.notes.push(Note::warning(text));
            }
        }
    }

    /// Pods by the names that Kubernetes gave them.
    fn name(&mut self, sandboxes: &[Sandbox]) {
        for pod in self.pods.values_mut() {
            let is_it = |sandbox: &&Sandbox| {
                sandbox.ready && sandbox.ips.iter().any(|address| pod.attached.addresses.contains(address))
            };
            if let Some(sandbox) = sandboxes.iter().find(is_it) {
                pod.attached.name = sandbox.pod.to_string();
            }
        }
    }
}

impl Pod {
    fn push(&mut self, mut events: Vec<Event>, until_ns: u64) {
        events.sort_by_key(|event| event.time_ns);
        for event in events {
            self.correlator.push(event);
        }
        self.until_ns = self.until_ns.max(until_ns);
    }

    /// Whether its state may have changed before that time, and may be read again.
    fn may_be_old(&self, since: u64) -> bool {
        self.renewed.begun_ns <= since && self.renewed.is_due(MOMENT)
    }

    fn told(&self, flow: Flow, all: bool) -> Inside {
        let input = flow.input_ifindex().map(|index| self.interfaces.name(index).into());
        let packet = Packet::first_of(flow.original, input);
        let trace = self.simulator.as_ref().filter(|_| !flow.joined_late).map(|simulator| simulator.trace(&packet));
        let mut story = tell(&flow, trace.as_ref(), &self.interfaces, all);
        let outcome = judge(&flow, &self.interfaces);
        let answer = Answer::missed(&flow, &outcome, story.branch.as_ref(), self.sight, &self.interfaces);
        if let Some((answer, simulator)) = answer.zip(self.simulator.as_ref()) {
            story.tell_answer(&answer.trace(simulator));
        }
        Inside {
            name: self.attached.name.clone(),
            netns: self.attached.netns,
            interfaces: self.interfaces.clone(),
            sight: self.sight,
            flow,
            story,
            outcome,
        }
    }
}
