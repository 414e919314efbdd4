//! A probe inside a pod's network namespace. It runs on a thread of its own, which enters the namespace and never leaves it, and
//! so do the threads that this one starts: no thread of the session's runtime is ever in a foreign namespace.
//!
//! What the probe attaches keeps the namespace alive. So the thread looks every second whether the namespace is still somebody's,
//! and ends with the pod.

use super::attached::Attached;
use super::links::LinkChange;
use super::live::{self, Options};
use super::netlink::{self, Network};
use super::probe::{Lost, Probe, ProbeConfig, ProbeError, ProbeInfo};
use super::ruleset::Fingerprint;
use super::sockets;
use crate::core::kube::targets::nat_targets;
use crate::core::model::event::Event;
use crate::core::model::interfaces::Interfaces;
use crate::core::model::state::{NodeState, Socket};
use nix::sched::{CloneFlags, setns};
use nix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};

/// How often it is checked whether the pod is there and its rules are the same.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// In so many rounds legacy rules are compared once: only dumping them tells whether they changed.
const LEGACY_ROUNDS: u64 = 5;

/// What a thread tells of its pod, with the inode number of the namespace.
pub type Told = (u32, News);

/// One thing that a pod's thread has to tell.
pub enum News {
    /// The probe is attached: from here on everything is seen.
    Ready(Box<ProbeInfo>),
    /// Events in the order of the ring buffer; all that happened before `until_ns` (CLOCK_MONOTONIC) is told.
    Events {
        events: Vec<Event>,
        until_ns: u64,
    },
    Interfaces(Interfaces),
    /// The pod's rules, routes, settings, sockets, as they are now.
    State(Box<NodeState>),
    /// Counts since the start, when they changed.
    Lost(Lost),
    /// What is not seen of an interface that came, a sentence.
    Unseen(String),
    /// The thread ends; nothing is attached any more. `Some`: it could not do its work, because of this.
    Gone(Option<String>),
}

enum Ask {
    /// Tell all events that there are.
    Catch(oneshot::Sender<()>),
    /// Read the state again, and answer when it is told.
    Renew(oneshot::Sender<()>),
    /// What listens now.
    Sockets(oneshot::Sender<Vec<Socket>>),
}

/// The session's end of a pod's thread; when the last one is dropped, the thread ends.
#[derive(Clone)]
pub struct Insider {
    asks: mpsc::Sender<Ask>,
}

impl Insider {
    /// Starts the thread. It tells [`News::Ready`] or [`News::Gone`] soon.
    ///
    /// # Errors
    /// The namespace cannot be opened, or no thread be started.
    pub fn start(pod: &Attached, config: ProbeConfig, told: mpsc::Sender<Told>) -> io::Result<Self> {
        let file = File::open(&pod.path)?;
        let (asks, asked) = mpsc::channel(16);
        let pod = pod.clone();
        let name = format!("pod {}", pod.netns);
        thread::Builder::new().name(name).spawn(move || {
            let failed = setns(file, CloneFlags::CLONE_NEWNET)
                .map_err(|error| format!("cannot enter its network namespace: {error}"))
                .and_then(|()| run(&pod, &config, asked, &told));
            // Nobody may be there to hear it.
            let _ = told.blocking_send((pod.netns, News::Gone(failed.err())));
        })?;
        Ok(Self { asks })
    }

    /// Waits until all events that happened until now are told; at once when the thread has ended.
    pub async fn catch_up(&self) {
        let (answer, done) = oneshot::channel();
        if self.asks.send(Ask::Catch(answer)).await.is_ok() {
            let _ = done.await;
        }
    }

    /// Waits until the pod's state is read and told anew; at once when the thread has ended.
    pub async fn renew(&self) {
        let (answer, done) = oneshot::channel();
        if self.asks.send(Ask::Renew(answer)).await.is_ok() {
            let _ = done.await;
        }
    }

    /// What listens in the pod; `None`: the thread has ended.
    pub async fn sockets(&self) -> Option<Vec<Socket>> {
        let (answer, sockets) = oneshot::channel();
        self.asks.send(Ask::Sockets(answer)).await.ok()?;
        sockets.await.ok()
    }
}

fn run(
    pod: &Attached,
    config: &ProbeConfig,
    asked: mpsc::Receiver<Ask>,
    told: &mpsc::Sender<Told>,
) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start an event loop: {error}"))?;
    runtime.block_on(async {
        let probe = Probe::start(config).map_err(|error| error.to_string())?;
        let (state, states) = mpsc::channel(1);
        let mut thread = Thread {
            pod,
            config,
            told,
            probe,
            fingerprint: Fingerprint::default(),
            network: Network::default(),
            rounds: 0,
            lost: Lost::default(),
            state,
            is_reading: false,
            is_stale: true,
            waiting: Vec::new(),
        };
        thread.read_state();
        thread.follow(asked, states).await.map_err(|error| error.to_string())
    })
}

struct Thread<'a> {
    pod: &'a Attached,
    config: &'a ProbeConfig,
    told: &'a mpsc::Sender<Told>,
    probe: Probe,
    fingerprint: Fingerprint,
    network: Network,
    rounds: u64,
    lost: Lost,
    /// Where a reading of the state ends up.
    state: mpsc::Sender<Box<NodeState>>,
    is_reading: bool,
    /// The state has to be read again.
    is_stale: bool,
    /// Who waits for the next state.
    waiting: Vec<oneshot::Sender<()>>,
}

impl Thread<'_> {
    /// Until the session lets go, or the pod is gone.
    async fn follow(
        &mut self,
        mut asked: mpsc::Receiver<Ask>,
        mut states: mpsc::Receiver<Box<NodeState>>,
    ) -> Result<(), ProbeError> {
        self.tell(News::Ready(Box::new(self.probe.info().clone()))).await;
        self.tell(News::Interfaces(self.interfaces())).await;
        let mut housekeeping = interval(HOUSEKEEPING);
        housekeeping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut events = Vec::new();
        loop {
            let now = now_ns();
            tokio::select! {
                read = self.probe.read(&mut events) => {
                    read?;
                    self.tell_events(&mut events, now).await;
                    if !self.follow_links().await {
                        return Ok(());
                    }
                }
                ask = asked.recv() => match ask {
                    None => return Ok(()),
                    Some(ask) => self.answer(ask, &mut events).await?,
                },
                Some(state) = states.recv() => self.take_state(state).await?,
                _ = housekeeping.tick() => {
                    if !self.pod.is_there() {
                        return Ok(());
                    }
                    self.keep_house().await?;
                }
            }
        }
    }

    async fn answer(&mut self, ask: Ask, events: &mut Vec<Event>) -> Result<(), ProbeError> {
        match ask {
            Ask::Catch(done) => {
                let now = now_ns();
                tokio::time::sleep(self.probe.held_back()).await;
                self.probe.read_now(events)?;
                self.tell_events(events, now).await;
                // Who asked may have given up.
                let _ = done.send(());
            }
            Ask::Renew(done) => {
                self.waiting.push(done);
                self.is_stale = true;
                self.read_state();
            }
            Ask::Sockets(answer) => {
                // It walks through all of /proc: meanwhile events are read on.
                thread::spawn(move || answer.send(sockets::read(true).unwrap_or_default()));
            }
        }
        Ok(())
    }

    async fn keep_house(&mut self) -> Result<(), ProbeError> {
        let lost = self.probe.lost()?;
        if lost != self.lost {
            self.lost = lost;
            self.tell(News::Lost(lost)).await;
        }
        for text in self.probe.refusals() {
            self.tell(News::Unseen(text)).await;
        }
        self.is_stale |= self.has_changed();
        self.read_state();
        Ok(())
    }

    /// A pod is small: all but its neighbours is compared.
    fn has_changed(&mut self) -> bool {
        self.rounds += 1;
        let whole = self.fingerprint.has_legacy() && self.rounds.is_multiple_of(LEGACY_ROUNDS);
        let now = if whole { Fingerprint::take() } else { Fingerprint::take_cheap(&self.fingerprint) };
        let network = Network { neighbours: None, diagnostics: Vec::new(), ..netlink::read() };
        now != self.fingerprint || network != self.network
    }

    /// Reads the state again on a thread of its own, when it is old and nobody reads it.
    fn read_state(&mut self) {
        if !self.is_stale || self.is_reading {
            return;
        }
        // Taken first: what changes while reading is then seen as a change.
        self.fingerprint = Fingerprint::take();
        self.network = Network { neighbours: None, diagnostics: Vec::new(), ..netlink::read() };
        let state = self.state.clone();
        (self.is_reading, self.is_stale) = (true, false);
        thread::spawn(move || {
            let live::Node { state: mut read, .. } = live::node(Options { processes: true, ..Options::default() });
            // A watched connection is new to conntrack; entries of older ones would only stand in the way.
            read.conntrack = Some(Vec::new());
            // The receiver is gone when the pod is.
            let _ = state.blocking_send(Box::new(read));
        });
    }

    async fn take_state(&mut self, state: Box<NodeState>) -> Result<(), ProbeError> {
        self.is_reading = false;
        if self.probe.wants_predictions() {
            self.probe.predict(&nat_targets(state.all_rules().map(Arc::as_ref), &self.config.ports))?;
        }
        self.tell(News::State(state)).await;
        if self.is_stale {
            // It changed meanwhile, or somebody asked: the next reading tells.
            self.read_state();
            return Ok(());
        }
        for done in self.waiting.drain(..) {
            // Who asked may have given up.
            let _ = done.send(());
        }
        Ok(())
    }

    /// Takes in that interfaces came or went; `false` when no way leads out of the pod any more: it is being removed.
    async fn follow_links(&mut self) -> bool {
        let changes = self.probe.link_changes();
        if changes.is_empty() {
            return true;
        }
        self.is_stale = true;
        self.tell(News::Interfaces(self.interfaces())).await;
        let gone = changes.iter().any(|change| matches!(change, LinkChange::Removed { .. }));
        !gone || self.probe.present_interfaces().values().any(|name| name != "lo")
    }

    fn interfaces(&self) -> Interfaces {
        let mut interfaces = Interfaces::default();
        for (&index, name) in self.probe.interface_names() {
            interfaces.insert(index, name.clone(), name == "lo");
        }
        interfaces
    }

    async fn tell_events(&self, events: &mut Vec<Event>, until_ns: u64) {
        if !events.is_empty() {
            self.tell(News::Events { events: std::mem::take(events), until_ns }).await;
        }
    }

    /// When the session has no time, this waits, and the ring buffer counts what it cannot hold.
    async fn tell(&self, news: News) {
        // The session may have ended; the next ask tells so.
        let _ = self.told.send((self.pod.netns, news)).await;
    }
}

fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
    })
}
