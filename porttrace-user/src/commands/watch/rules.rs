//! The node's state as the session knows it: read at the start, read again when it changes.

use super::note::Note;
use super::output::Clock;
use super::reading::{MOMENT, Reading};
use nix::sys::utsname::UtsName;
use porttrace_user::collect::changes::NetworkChanges;
use porttrace_user::collect::live::{self, Options};
use porttrace_user::collect::ruleset::Fingerprint;
use porttrace_user::collect::sysctl;
use porttrace_user::core::kube::ebpf::{self, Network};
use porttrace_user::core::kube::owners::Owners;
use porttrace_user::core::model::flow::Family;
use porttrace_user::core::model::state::NodeState;
use porttrace_user::core::model::trace::Flavour;
use porttrace_user::core::parse;
use porttrace_user::core::parse::notes::Notes;
use porttrace_user::core::parse::rulesets::unread_family;
use porttrace_user::core::quantity;
use porttrace_user::core::simulate::{Simulator, ipvs_in_use};
use porttrace_user::render::watch::words;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Rules, routes and addresses, ready to be asked.
pub struct Rules {
    pub owners: Arc<Owners>,
    pub simulator: Arc<Simulator>,
    /// What both were made of; without conntrack's entries.
    pub state: NodeState,
    /// Rises whenever it is read again.
    pub generation: u64,
    /// Families whose rules could not be read: nothing can be predicted of their packets.
    unread: BTreeSet<Family>,
    warnings: Vec<String>,
    counts: BTreeMap<Flavour, usize>,
    took: Duration,
    fingerprint: Fingerprint,
    /// Since when nothing changed that makes itself known, CLOCK_MONOTONIC.
    current_at: u64,
    changes: io::Result<NetworkChanges>,
    /// Something else than a rule changed: an interface, an address, a route.
    stale: bool,
    rules_read: Reading,
    legacy_read: Reading,
    network_read: Reading,
    sockets_read: Reading,
    settings_read: Reading,
    /// It could not be read when that was tried last.
    is_behind: bool,
}

/// The names of this node and of its kernel.
pub struct Node {
    pub name: String,
    pub kernel: String,
}

impl Node {
    /// The name as Kubernetes has it, where the DaemonSet says so, else the kernel's.
    pub fn here() -> Self {
        let uname = nix::sys::utsname::uname().ok();
        let text = |part: fn(&UtsName) -> &OsStr| {
            uname.as_ref().map_or_else(|| "?".to_owned(), |uname| part(uname).to_string_lossy().into_owned())
        };
        Self {
            name: std::env::var("NODE_NAME").unwrap_or_else(|_| text(UtsName::nodename)),
            kernel: text(UtsName::release),
        }
    }
}

/// Diagnostics that the header shows; the rest is counted.
const MOST_WARNINGS: usize = 5;

/// Whether legacy rules changed is only told by dumping them: how often that is done when nothing fails.
const LEGACY_CHECK: Duration = Duration::from_secs(5);

impl Rules {
    /// Reads the state of the calling thread's network namespace.
    pub fn read() -> Self {
        // Taken first: what changes while reading is then seen as a change.
        let begun_ns = Clock::now();
        let changes = NetworkChanges::new();
        let fingerprint = Fingerprint::take_cheap(&Fingerprint::default());
        let live::Node { mut state, legacy, timings } = live::node(Options { processes: true, ..Options::default() });
        let fingerprint = fingerprint.with_legacy(legacy);
        // A watched connection is new to conntrack; entries of older ones would only stand in the way.
        state.conntrack = Some(Vec::new());
        // They put clients into sets (session affinity), of which nobody tells.
        state.sets_move = true;
        // How long each takes by itself is not known yet.
        let reading = Reading::at(begun_ns);
        Self {
            owners: Arc::new(Owners::of(&state)),
            simulator: Arc::new(Simulator::new(&state)),
            generation: 0,
            unread: state.diagnostics.iter().filter_map(unread_family).collect(),
            warnings: warnings(&state),
            counts: state.rule_counts(),
            took: timings.total,
            state,
            fingerprint,
            current_at: begun_ns,
            changes,
            stale: false,
            rules_read: Reading::since(begun_ns),
            legacy_read: reading,
            network_read: reading,
            sockets_read: reading,
            settings_read: reading,
            is_behind: false,
        }
    }

    /// Whether the rules for packets of a family could be read.
    pub fn knows(&self, family: Family) -> bool {
        !self.unread.contains(&family)
    }

    /// How many rules were read, and how fast.
    pub fn sentence(&self) -> String {
        let took = u64::try_from(self.took.as_nanos()).unwrap_or(u64::MAX);
        format!("{}; the node's state was read in {}", self.rule_counts(), words::duration(took))
    }

    /// What is not known of this node, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let deaf = self.changes.as_ref().err();
        let deaf = deaf.map(|error| format!("that addresses or routes change will not be noticed: {error}"));
        self.warnings.iter().cloned().chain(deaf).collect()
    }

    /// Interfaces changed: routes and addresses are others now.
    pub fn expect_changes(&mut self) {
        self.stale = true;
    }

    /// Reads the settings (sysctl) again, which change without a word, unless they were read since `since` (CLOCK_MONOTONIC) or not
    /// `every` so long ago. True when one changed.
    pub async fn follow_settings(&mut self, since: u64, every: Duration) -> bool {
        if self.settings_read.begun_ns > since || !self.settings_read.is_due(every) {
            return false;
        }
        let begun_ns = Clock::now();
        let mut state = self.state.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let text = parse::sysctl::write(&sysctl::read());
            // What cannot be read now is as it was.
            let mut now = state.sysctls.clone().unwrap_or_default();
            now.extend(parse::sysctl::sysctls(&text, &mut Notes::new("sysctl.txt")));
            if settings(Some(&now)).eq(settings(state.sysctls.as_ref())) {
                return None;
            }
            state.sysctls = Some(now);
            Some((Arc::new(Simulator::new(&state)), state))
        });
        let changed = reading.await.ok().flatten();
        self.settings_read = Reading::since(begun_ns);
        let Some((simulator, state)) = changed else { return false };
        (self.simulator, self.state) = (simulator, state);
        self.generation += 1;
        true
    }

    /// Reads again what listens on this node, which changes without a word, unless that was read since `since` (CLOCK_MONOTONIC) or
    /// a moment ago. True when it changed.
    pub async fn follow_sockets(&mut self, since: u64) -> bool {
        if self.sockets_read.begun_ns > since || !self.sockets_read.is_due(MOMENT) {
            return false;
        }
        let begun_ns = Clock::now();
        let (former, owners) = (self.state.clone(), Arc::clone(&self.owners));
        let reading = tokio::task::spawn_blocking(move || {
            let state = live::reread_sockets(&former)?;
            Some((Arc::new(owners.renewed(&state)), Arc::new(Simulator::new(&state)), state))
        });
        let read = reading.await.ok().flatten();
        self.sockets_read = Reading::since(begun_ns);
        let Some((owners, simulator, state)) = read else { return false };
        (self.owners, self.simulator, self.state) = (owners, simulator, state);
        self.generation += 1;
        true
    }

    /// Reads again if something changed that makes itself known, or (now and then) if legacy rules did. What it was, when it is worth
    /// a line. Rules that change all the time are read for at most a fifth of it.
    pub async fn follow(&mut self) -> Option<Note> {
        let legacy = self.fingerprint.has_legacy() && self.legacy_read.is_due(LEGACY_CHECK);
        let may_read = self.rules_read.is_due(MOMENT);
        self.compare(legacy, may_read).await
    }

    /// The same at once, unless nothing changed since `since` (CLOCK_MONOTONIC) as far as is known already.
    pub async fn follow_until(&mut self, since: u64) -> Option<Note> {
        let legacy =
            self.fingerprint.has_legacy() && self.legacy_read.begun_ns <= since && self.legacy_read.is_due(MOMENT);
        if self.current_at > since && !legacy { None } else { self.compare(legacy, true).await }
    }

    /// `legacy`: dumps legacy rules, for nothing else tells whether they changed. `may_read`: rules that changed are read at once, or
    /// another time.
    async fn compare(&mut self, legacy: bool, may_read: bool) -> Option<Note> {
        let begun_ns = Clock::now();
        self.stale |= self.changes.as_ref().is_ok_and(NetworkChanges::any);
        let earlier = self.fingerprint.clone();
        let take = move || if legacy { Fingerprint::take() } else { Fingerprint::take_cheap(&earlier) };
        let now = tokio::task::spawn_blocking(take).await.ok()?;
        if legacy {
            self.legacy_read = Reading::since(begun_ns);
        }
        let rules_changed = now != self.fingerprint && (now.is_known() || !self.fingerprint.is_known());
        if !rules_changed || !may_read {
            if self.stale && !self.network_read.is_due(MOMENT) {
                return None;
            }
            if !rules_changed {
                self.current_at = begun_ns;
            }
            return if std::mem::take(&mut self.stale) { self.follow_network().await } else { None };
        }
        let before = self.rule_counts();
        let read = tokio::task::spawn_blocking(Self::read).await.ok()?;
        *self = Self { generation: self.generation + 1, ..read };
        let after = self.rule_counts();
        Some(if !self.unread.is_empty() {
            let why = self.warnings.join("; ");
            Note::warning(format!("the rules changed ({before} before), and not all can be read: {why}"))
        } else if before == after {
            Note::of(format!("the rules changed ({after})"))
        } else {
            Note::of(format!("the rules changed: {before} before, {after} now"))
        })
    }

    /// Reads the network again; the rules, which can be many, are as they were. Where it cannot be read, it is tried again; that is
    /// said once.
    async fn follow_network(&mut self) -> Option<Note> {
        let begun_ns = Clock::now();
        let (former, owners) = (self.state.clone(), Arc::clone(&self.owners));
        let reading = tokio::task::spawn_blocking(move || {
            let state = live::reread_network(&former)?;
            Some((Arc::new(owners.renewed(&state)), Arc::new(Simulator::new(&state)), state))
        });
        let read = reading.await.ok().flatten();
        self.network_read = Reading::since(begun_ns);
        let Some((owners, simulator, state)) = read else {
            self.stale = true;
            let is_new = !std::mem::replace(&mut self.is_behind, true);
            let text =
                "interfaces changed, and addresses and routes cannot be read: what is predicted is by those of before";
            return is_new.then(|| Note::warning(text.to_owned()));
        };
        self.is_behind = false;
        // They were read with it.
        self.settings_read = self.network_read;
        self.warnings = warnings(&state);
        (self.owners, self.simulator, self.state) = (owners, simulator, state);
        self.generation += 1;
        None
    }

    fn rule_counts(&self) -> String {
        let said: Vec<String> = self
            .counts
            .iter()
            .map(|(flavour, count)| {
                let flavour = match flavour {
                    Flavour::IptablesNft => "iptables-nft",
                    Flavour::IptablesLegacy => "iptables-legacy",
                    Flavour::Nftables => "nftables",
                };
                quantity::count(*count, &format!("{flavour} rule"))
            })
            .collect();
        if said.is_empty() { "no rules".to_owned() } else { said.join(" and ") }
    }
}

/// Settings; how many entries conntrack has is none.
fn settings(all: Option<&BTreeMap<String, String>>) -> impl Iterator<Item = (&String, &String)> {
    all.into_iter().flatten().filter(|(key, _)| *key != "net.netfilter.nf_conntrack_count")
}

fn warnings(state: &NodeState) -> Vec<String> {
    // Conntrack was not asked for.
    let told = || state.diagnostics.iter().filter(|diagnostic| diagnostic.source != "conntrack.txt");
    let mut warnings: Vec<String> = told()
        .take(MOST_WARNINGS)
        .map(|diagnostic| match diagnostic.line {
            _ if unread_family(diagnostic) == Some(Family::V4) => "nothing is predicted for IPv4 packets".to_owned(),
            _ if unread_family(diagnostic) == Some(Family::V6) => "nothing is predicted for IPv6 packets".to_owned(),
            0 => format!("{}: {}", diagnostic.source, diagnostic.message),
            line => format!("{} line {line}: {}", diagnostic.source, diagnostic.message),
        })
        .collect();
    if state.diagnostics.len() > MOST_WARNINGS {
        warnings
            .push(format!("{} more things about this node could not be read", state.diagnostics.len() - MOST_WARNINGS));
    }
    warnings.extend(ipvs_in_use(state));
    warnings.extend(ebpf::serving(state).map(Network::sentence));
    warnings
}
