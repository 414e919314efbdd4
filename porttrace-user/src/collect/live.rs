//! The state of the node that porttrace runs on: the calling thread's network namespace.

use super::ruleset::LegacyHash;
use super::{Timings, conntrack, netlink, nftables, ruleset, sockets, sysctl, tool};
use crate::core::model::state::{NodeState, Socket};
use crate::core::parse::rulesets::{self, FileRules};
use crate::core::parse::{self, FORMAT, Files, Metadata, iproute};
use memchr::memmem;
use nix::time::{ClockId, clock_gettime};
use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

/// What to collect beyond what every use needs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Which process holds a socket: takes a walk through all of `/proc`.
    pub processes: bool,
    /// All conntrack entries: many on a busy node.
    pub conntrack: bool,
    /// What only a bug report wants: native nftables rules as text and JSON.
    pub report: bool,
}

/// A node's files, as a snapshot holds them, and how long each part took.
#[derive(Debug)]
pub struct Collected {
    pub files: Files,
    pub timings: Timings,
}

/// A node's state, what to tell its legacy rules by, and how long each part took.
#[derive(Debug)]
pub struct Node {
    pub state: NodeState,
    pub legacy: LegacyHash,
    pub timings: Timings,
}

/// Collects everything and turns it into a state, the rules while they are printed. Never fails: what is missing is in the
/// diagnostics.
pub fn node(options: Options) -> Node {
    let (found, mut timings) = gather(options, read_rules);
    let (rules, legacy) = found.rules.map_or_else(Default::default, |rules| (rules.files, rules.legacy));
    let state = timings.measure("parse", || parse::state_of(&found.files, rules));
    Node { state, legacy, timings }
}

/// The same node with its interfaces, addresses, routes and settings read again; rules and sockets are taken over. `None`: something
/// of it cannot be read that could be before.
pub fn reread_network(former: &NodeState) -> Option<NodeState> {
    let mut found = Found::default();
    network(&mut found);
    sysctls(&mut found);
    let said = |missing: &String| former.diagnostics.iter().any(|diagnostic| diagnostic.message == *missing);
    if !found.missing.iter().all(said) {
        return None;
    }
    let metadata = metadata(std::mem::take(&mut found.missing));
    found.text("snapshot.json", metadata);
    Some(parse::with_network(former, &found.files))
}

/// The same node with what listens on it read again; `None`: the same sockets do. Whose they are takes a walk through `/proc`, and
/// is only asked where they changed.
pub fn reread_sockets(former: &NodeState) -> Option<NodeState> {
    let places = |sockets: &[Socket]| -> BTreeSet<_> {
        sockets.iter().map(|socket| (socket.proto, socket.address, socket.port, socket.v6only)).collect()
    };
    let now = places(&sockets::read(false).ok()?);
    if former.sockets.as_deref().is_some_and(|sockets| places(sockets) == now) {
        return None;
    }
    Some(NodeState { sockets: Some(sockets::read(true).ok()?), ..former.clone() })
}

/// Collects everything as files.
pub fn collect(options: Options) -> Collected {
    let (Found { files, .. }, timings) = gather(options, rule_texts);
    Collected { files, timings }
}

/// Collects everything, its parts side by side.
fn gather(options: Options, rules: fn(&mut Found)) -> (Found, Timings) {
    let parts: [(&'static str, Part); 7] = [
        ("rules", Box::new(rules)),
        ("netlink", Box::new(network)),
        ("sysctls", Box::new(sysctls)),
        ("drops", Box::new(drops)),
        ("sockets", Box::new(move |found| socket_list(found, options.processes))),
        (
            "conntrack",
            Box::new(move |found| {
                if options.conntrack {
                    entries(found)
                }
            }),
        ),
        (
            "report",
            Box::new(move |found| {
                if options.report {
                    report(found)
                }
            }),
        ),
    ];
    let mut timings = Timings::default();
    let mut all = Found::default();
    timings.measure_into(|timings| {
        thread::scope(|scope| {
            let threads: Vec<_> = parts.into_iter().map(|(name, part)| scope.spawn(move || run(name, part))).collect();
            for thread in threads {
                match thread.join() {
                    Ok((name, found, took)) => {
                        all.files.extend(found.files);
                        all.missing.extend(found.missing);
                        all.rules = all.rules.take().or(found.rules);
                        timings.add(name, took);
                    }
                    Err(_) => all.missing.push("one part of the collection broke off".to_owned()),
                }
            }
        });
    });
    let metadata = metadata(std::mem::take(&mut all.missing));
    all.text("snapshot.json", metadata);
    (all, timings)
}

type Part = Box<dyn FnOnce(&mut Found) + Send>;

/// What a part brought.
#[derive(Default)]
struct Found {
    files: Files,
    /// Where they are wanted as values.
    rules: Option<ruleset::Rules>,
    missing: Vec<String>,
}

impl Found {
    fn text(&mut self, name: &str, text: String) {
        self.files.insert(name.to_owned(), text.into_bytes());
    }
}

/// Lowers the priority of the calling thread, of those that it starts and of the tools that it runs: what starts to capture packets
/// beside it, and whatever else this node does, goes first.
fn stand_back() {
    const NICE: i32 = 5;
    // SAFETY: numbers only; 0 is the calling thread (setpriority(2), "C library/kernel differences"). Where it is refused, all stays
    // as it was.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

/// One part, on a thread of its own.
fn run(name: &'static str, part: Part) -> (&'static str, Found, std::time::Duration) {
    stand_back();
    let start = std::time::Instant::now();
    let mut found = Found::default();
    part(&mut found);
    (name, found, start.elapsed())
}

/// Rules as text, and what they refer to.
fn rule_texts(found: &mut Found) {
    let ruleset::Texts { files, missing } = ruleset::texts();
    let mentions = |word: &str| files.values().any(|text| memmem::find(text, word.as_bytes()).is_some());
    referred(found, mentions(rulesets::OF_SETS), mentions(rulesets::OF_RECENT));
    found.files.extend(files);
    found.missing.extend(missing);
    native(found);
}

/// Rules as values, and what they refer to.
fn read_rules(found: &mut Found) {
    let mut rules = ruleset::read();
    let any = |asks: fn(&FileRules) -> bool| rules.files.iter().any(asks);
    referred(found, any(|rules| rules.wants_sets), any(|rules| rules.wants_recent));
    found.missing.append(&mut rules.missing);
    found.rules = Some(rules);
    native(found);
}

/// Where native nftables rules have a say, and what they say.
fn native(found: &mut Found) {
    match nftables::bases() {
        Ok(bases) => {
            found.text("nft-hooks.txt", parse::nftables::write(&bases));
            match nftables::rules() {
                Ok(rules) => rules.into_iter().for_each(|rules| found.text("nft-ruleset.json", rules)),
                Err(error) => {
                    found.missing.push(format!("what native nftables rules say is unknown: {error}"));
                }
            }
        }
        Err(error) if has_native_tables() => {
            found.missing.push(format!("where native nftables rules have a say is unknown: {error}"));
        }
        // That there are none, or that they cannot be listed either, is said where their tables are asked for.
        Err(_) => {}
    }
}

/// What rules refer to: ipsets and recent lists.
fn referred(found: &mut Found, wants_sets: bool, wants_recent: bool) {
    // Asking would load the kernel's ipset where nothing uses it.
    if wants_sets {
        match tool::run("ipset", &["save"]) {
            Ok(text) => drop(found.files.insert("ipset.txt".to_owned(), text)),
            Err(error) => found.missing.push(format!("rules that match a set stay undecided: {error}")),
        }
    } else {
        found.text("ipset.txt", String::new());
    }
    if wants_recent {
        recent(found);
    }
}

fn recent(found: &mut Found) {
    for list in fs::read_dir("/proc/thread-self/net/xt_recent").into_iter().flatten().flatten() {
        let (Ok(name), Ok(bytes)) = (list.file_name().into_string(), fs::read(list.path())) else { continue };
        found.files.insert(format!("xt_recent/{name}"), bytes);
    }
    match clock() {
        Some((jiffies, hz)) => found.text("clock.txt", format!("jiffies={jiffies}\nhz={hz}\n")),
        None => found.missing.push("how long ago clients were seen is unknown: no /proc/timer_list".to_owned()),
    }
}

/// The kernel's jiffies, and how many make a second.
///
/// HZ is not told anywhere, but jiffies begin 300 seconds before they overflow 32 bits (include/linux/jiffies.h,
/// INITIAL_JIFFIES) and count since boot: of the rates that Linux can be built with, only one fits.
fn clock() -> Option<(u64, u64)> {
    let timers = fs::read_to_string("/proc/timer_list").ok()?;
    let jiffies: u64 = timers.lines().find_map(|line| line.trim().strip_prefix("jiffies: ")?.trim().parse().ok())?;
    let uptime = u64::try_from(clock_gettime(ClockId::CLOCK_MONOTONIC).ok()?.tv_sec()).ok()?;
    let expected = |hz: u64| (1 << 32) - 300 * hz + uptime * hz;
    let hz = [100, 250, 300, 1000].into_iter().min_by_key(|hz| expected(*hz).abs_diff(jiffies))?;
    (expected(hz).abs_diff(jiffies) < 10 * hz).then_some((jiffies, hz))
}

fn network(found: &mut Found) {
    let network = netlink::read();
    found.missing.extend(network.diagnostics.into_iter().map(|diagnostic| diagnostic.message));
    if let Some(links) = &network.links {
        found.text("ip-link.json", iproute::write_links(links));
    }
    if let Some(addresses) = &network.addresses {
        found.text("ip-addr.json", iproute::write_addresses(addresses));
    }
    if let Some(neighbours) = &network.neighbours {
        found.text("ip-neigh.json", iproute::write_neighbours(neighbours));
    }
    if let Some(routes) = network.routes {
        let (four, six): (Vec<_>, Vec<_>) = routes.into_iter().partition(|route| route.dst.addr().is_ipv4());
        found.text("ip-route.json", iproute::write_routes(&four));
        found.text("ip6-route.json", iproute::write_routes(&six));
    }
    if let Some(rules) = network.policy {
        let is_four =
            |rule: &crate::core::model::state::PolicyRule| rule.family == crate::core::model::flow::Family::V4;
        let (four, six): (Vec<_>, Vec<_>) = rules.into_iter().partition(is_four);
        found.text("ip-rule.json", iproute::write_policy(&four));
        found.text("ip6-rule.json", iproute::write_policy(&six));
    }
    ipvs(found);
}

fn sysctls(found: &mut Found) {
    found.text("sysctl.txt", parse::sysctl::write(&sysctl::read()));
}

/// What the kernel counts as dropped: a remark, which nobody misses where it is not told.
fn drops(found: &mut Found) {
    for (name, place) in [("nf_conntrack.txt", "stat/nf_conntrack"), ("netstat.txt", "netstat")] {
        if let Ok(text) = fs::read_to_string(format!("/proc/thread-self/net/{place}")) {
            found.text(name, text);
        }
    }
}

/// The virtual servers of this network namespace; none where the kernel has no IPVS.
fn ipvs(found: &mut Found) {
    match fs::read_to_string("/proc/thread-self/net/ip_vs") {
        Ok(text) => found.text("ip_vs.txt", text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => found.text("ip_vs.txt", String::new()),
        Err(error) => found.missing.push(format!("virtual servers of IPVS are unknown: {error}")),
    }
}

fn socket_list(found: &mut Found, processes: bool) {
    match sockets::read(processes) {
        Ok(sockets) => found.text("ss.txt", parse::sockets::write(&sockets)),
        Err(error) => found.missing.push(format!("listening sockets are unknown: {error}")),
    }
}

fn entries(found: &mut Found) {
    match conntrack::dump(|_| true) {
        Ok(entries) => found.text("conntrack.txt", parse::conntrack::write(&entries)),
        Err(error) => found.missing.push(error.to_string()),
    }
}

fn has_native_tables() -> bool {
    nftables::tables().is_ok_and(|tables| tables.iter().any(|table| !nftables::is_iptables(table)))
}

/// Native nftables rules as the tool prints them for people: a person who helps reads them.
fn report(found: &mut Found) {
    if !has_native_tables() {
        return;
    }
    match tool::run("nft", &["list", "ruleset"]) {
        Ok(text) => drop(found.files.insert("nft-ruleset.txt".to_owned(), text)),
        Err(error) => {
            found.missing.push(format!("native nftables rules are not in the snapshot as text: {error}"));
        }
    }
}

fn metadata(missing: Vec<String>) -> String {
    let taken = SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs());
    let kernel = nix::sys::utsname::uname().ok();
    let metadata = Metadata {
        format: FORMAT,
        porttrace: env!("CARGO_PKG_VERSION").to_owned(),
        node: kernel.as_ref().and_then(|names| names.nodename().to_str().map(str::to_owned)),
        taken,
        kernel: kernel.as_ref().and_then(|names| names.release().to_str().map(str::to_owned)),
        missing,
    };
    // A plain struct with string keys always serialises.
    serde_json::to_string_pretty(&metadata).unwrap_or_default() + "\n"
}
