//! What `porttrace doctor` looks at: this node, from the calling thread's network namespace. Changes nothing that stays.

mod cluster;

use super::ctnetlink::{Listener, RECEIVE_BYTES};
use super::{netlink, nftables, probe, ruleset, tool};
use crate::core::doctor::facts::{Conntrack, Facts, RuleSet, Rules, Trial, Trials};
use crate::core::model::flow::Family;
use crate::core::model::rules::{Ruleset, Target};
use crate::core::model::trace::Flavour;
use std::collections::BTreeMap;
use std::fs;
use std::thread;

/// The tools that reading rules may need.
const TOOLS: [&str; 8] = [
    "iptables-save",
    "ip6tables-save",
    "iptables-nft-save",
    "ip6tables-nft-save",
    "iptables-legacy-save",
    "ip6tables-legacy-save",
    "nft",
    "ipset",
];

/// Collects everything, side by side. Never fails: what could not be had is said in its place.
pub fn facts() -> Facts {
    let names = nix::sys::utsname::uname().ok();
    let name = |of: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| {
        names.as_ref().map(|names| of(names).to_string_lossy().into_owned()).unwrap_or_default()
    };
    thread::scope(|scope| {
        let rules = scope.spawn(rules);
        let trials = scope.spawn(trials);
        let network = netlink::read();
        let cluster = cluster::cluster(network.links.as_deref().unwrap_or_default());
        Facts {
            node: name(|names| names.nodename()),
            kernel: name(|names| names.release()),
            machine: name(|names| names.machine()),
            rights: probe::capabilities(),
            lockdown: lockdown(),
            trials: trials.join().unwrap_or_default(),
            conntrack: conntrack(),
            rules: rules.join().unwrap_or_default(),
            cluster,
        }
    })
}

fn trials() -> Trials {
    Trials { ctnetlink: listen(), ..probe::trials() }
}

/// Subscribes to conntrack's events for a moment, as `watch` does.
fn listen() -> Trial {
    if !probe::capabilities().missing.is_empty() {
        return Trial::Untried("without CAP_NET_ADMIN".to_owned());
    }
    match Listener::open(&[], RECEIVE_BYTES) {
        Ok(_) => Trial::Works("they can be subscribed to".to_owned()),
        Err(error) => Trial::Fails(error.to_string()),
    }
}

/// `none [integrity] confidentiality` → `integrity`.
fn lockdown() -> Option<String> {
    let text = fs::read_to_string("/sys/kernel/security/lockdown").ok()?;
    text.split_whitespace().find_map(|word| Some(word.strip_prefix('[')?.strip_suffix(']')?.to_owned()))
}

fn conntrack() -> Conntrack {
    let read = |name: &str| -> Option<u64> {
        fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}")).ok()?.trim().parse().ok()
    };
    Conntrack {
        max: read("max"),
        count: read("count"),
        buckets: read("buckets"),
        events: read("events"),
        acct: read("acct"),
    }
}

fn rules() -> Rules {
    let (sets, diagnostics) = ruleset::read_all();
    let mut sets: Vec<RuleSet> = sets.iter().map(summary).filter(|set| set.rules > 0).collect();
    sets.sort_by_key(|set| (set.family, set.flavour.clone()));
    let native = nftables::tables().unwrap_or_default();
    Rules {
        sets,
        native: native
            .iter()
            .filter(|table| !nftables::is_iptables(table))
            .map(|(family, name)| format!("{family} {name}"))
            .collect(),
        unread: diagnostics
            .into_iter()
            .filter(|diagnostic| diagnostic.source == "rules")
            .map(|diagnostic| diagnostic.message)
            .collect(),
        tools: TOOLS.into_iter().filter_map(|name| Some((name.to_owned(), version(name)?))).collect::<BTreeMap<_, _>>(),
    }
}

/// A tool's version line; the outer `None`: it is not installed.
fn version(name: &str) -> Option<Option<String>> {
    tool::find(name)?;
    let output = tool::run(name, &["--version"]).ok();
    Some(output.and_then(|bytes| {
        let text = String::from_utf8_lossy(&bytes);
        text.lines().next().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty())
    }))
}

fn summary(set: &Ruleset) -> RuleSet {
    let chains = || set.tables.iter().flat_map(|table| &table.chains);
    let nat = || set.tables.iter().filter(|table| table.name == "nat").flat_map(|table| &table.chains);
    let begins =
        |prefix: &str| nat().filter(|chain| chain.name().starts_with(prefix) && !chain.rules.is_empty()).count();
    let jumps = set.tables.iter().filter(|table| table.name == "nat").any(|table| {
        let base = table.chains.iter().filter(|chain| chain.policy.is_some());
        base.flat_map(|chain| &chain.rules).any(|rule| match rule.target {
            Target::Jump(to) | Target::Goto(to) => {
                table.chains.get(to as usize).is_some_and(|chain| chain.name() == "KUBE-SERVICES")
            }
            _ => false,
        })
    });
    RuleSet {
        flavour: if set.flavour == Flavour::IptablesLegacy { "legacy" } else { "nft" }.to_owned(),
        family: if set.family == Family::V4 { 4 } else { 6 },
        rules: chains().map(|chain| chain.rules.len()).sum(),
        services: begins("KUBE-SVC-"),
        kube_services: jumps,
        host_ports: begins("CNI-DN-") + begins("KUBE-HP-"),
    }
}
