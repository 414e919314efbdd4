//! Reads a router's state back from its namespace, as a snapshot of a node would hold it.

use super::path::WATCH;
use super::router::Router;
use anyhow::{Context, Result};
use porttrace_user::core::model::flow::Family;
use porttrace_user::core::model::rules::Ruleset;
use porttrace_user::core::model::state::{NodeState, RecentEntry};
use porttrace_user::core::model::trace::Flavour;
use porttrace_user::core::parse::notes::Notes;
use porttrace_user::core::parse::{Files, iptables, recent, state};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::sync::Arc;

/// Commands whose output is a file of the snapshot.
const COMMANDS: [(&str, &[&str]); 10] = [
    ("ip-addr.json", &["ip", "-j", "address"]),
    ("ip-link.json", &["ip", "-j", "-d", "link"]),
    ("bridge-link.json", &["bridge", "-j", "-d", "link"]),
    ("ip-route.json", &["ip", "-j", "-4", "route", "show", "table", "all"]),
    ("ip6-route.json", &["ip", "-j", "-6", "route", "show", "table", "all"]),
    ("ip-rule.json", &["ip", "-j", "-4", "rule"]),
    ("ip6-rule.json", &["ip", "-j", "-6", "rule"]),
    ("ip-neigh.json", &["ip", "-j", "neigh"]),
    ("ipset.txt", &["ipset", "save"]),
    ("ss.txt", &["ss", "-H", "-tuln"]),
];

/// Asking legacy iptables makes no table.
const SAVE: [(&str, Family, Flavour); 4] = [
    ("iptables-nft-save", Family::V4, Flavour::IptablesNft),
    ("ip6tables-nft-save", Family::V6, Flavour::IptablesNft),
    ("iptables-legacy-save", Family::V4, Flavour::IptablesLegacy),
    ("ip6tables-legacy-save", Family::V6, Flavour::IptablesLegacy),
];

/// The parts of `/proc/sys/net` that decide paths.
const SYSCTLS: [&str; 8] = [
    "rp_filter",
    "route_localnet",
    "forwarding",
    "accept_local",
    "src_valid_mark",
    "disable_ipv6",
    "accept_source_route",
    "ignore_routes_with_linkdown",
];

impl Router {
    /// The state as it is now, rules included (through `iptables-save -c`).
    pub fn state(&self) -> Result<NodeState> {
        let mut files = Files::new();
        for (name, argv) in COMMANDS {
            files.insert(name.into(), self.inside.exec(argv)?.into_bytes());
        }
        let conntrack =
            self.inside.exec(["conntrack", "-L"])? + &self.inside.exec(["conntrack", "-L", "-f", "ipv6"])?;
        files.insert("conntrack.txt".into(), conntrack.into_bytes());
        files.extend(self.inside.run_in(proc_files)??);
        files.insert("nft-ruleset.json".into(), self.inside.exec(["nft", "-j", "list", "ruleset"])?.into_bytes());
        let mut state = state(&files);
        forget_watch(&mut state);
        for (program, family, flavour) in SAVE {
            let text = self.inside.exec([program, "-c"])?;
            let (ruleset, diagnostics) = iptables::parse(&text, program, flavour, family);
            state.diagnostics.extend(diagnostics);
            state.rulesets.push(Arc::new(ruleset));
        }
        state.recent = Some(self.inside.run_in(recent_lists)??);
        // The packets before one may put addresses into sets.
        state.sets_move = true;
        Ok(state)
    }
}

/// Takes our own tables out.
fn forget_watch(state: &mut NodeState) {
    state.native.retain(|base| base.table != WATCH);
    let own = format!("inet {WATCH}");
    for set in &mut state.native_rules {
        let mut set_without = Ruleset::clone(set);
        set_without.tables.retain(|table| *table.name != *own);
        *set = Arc::new(set_without);
    }
    state.native_rules.retain(|set| !set.tables.is_empty());
    state.diagnostics.retain(|diagnostic| !diagnostic.message.contains(WATCH));
}

/// Lists of `-m recent` by name.
pub type Lists = BTreeMap<String, Vec<RecentEntry>>;

/// The lists of the calling thread's namespace. Everything in them was added within this run: a moment ago.
pub fn recent_lists() -> Result<Lists> {
    let mut lists = Lists::new();
    for entry in fs::read_dir("/proc/thread-self/net/xt_recent").into_iter().flatten() {
        let entry = entry?;
        let text = fs::read_to_string(entry.path()).with_context(|| format!("reading {}", entry.path().display()))?;
        let mut found = recent::entries(&text, None, &mut Notes::new("xt_recent"));
        found.iter_mut().for_each(|entry| entry.age = Some(0));
        lists.insert(entry.file_name().to_string_lossy().into_owned(), found);
    }
    Ok(lists)
}

/// Sysctls of the calling thread's namespace.
fn proc_files() -> Result<BTreeMap<String, Vec<u8>>> {
    let mut text = String::new();
    for family in ["ipv4", "ipv6"] {
        let directory = format!("/proc/sys/net/{family}/conf");
        for entry in fs::read_dir(&directory).with_context(|| format!("reading {directory}"))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            for key in SYSCTLS {
                sysctl(&mut text, &format!("{family}/conf/{name}/{key}"));
            }
        }
    }
    for key in [
        "ipv4/ip_forward",
        "bridge/bridge-nf-call-iptables",
        "bridge/bridge-nf-call-ip6tables",
        "netfilter/nf_conntrack_tcp_loose",
    ] {
        sysctl(&mut text, key);
    }
    Ok(BTreeMap::from([("sysctl.txt".to_string(), text.into_bytes())]))
}

fn sysctl(text: &mut String, key: &str) {
    if let Ok(value) = fs::read_to_string(format!("/proc/sys/net/{key}")) {
        let _ = writeln!(text, "net.{} = {}", key.replace('/', "."), value.trim());
    }
}
