//! The files of a node, as a snapshot holds them and as live collection makes them, turned into its state.

use super::notes::Notes;
use super::rulesets::FileRules;
use super::{conntrack, drops, iproute, ipset, ipvs, native, nftables, recent, rulesets, sockets, sysctl};
use crate::core::model::flow::Family;
use crate::core::model::rules::Ruleset;
use crate::core::model::state::{Diagnostic, NativeBase, NodeState, PolicyRule, RouteEntry, VirtualServer};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The format of snapshots that this porttrace writes.
pub const FORMAT: u32 = 1;

/// Base chains of native nftables rules, and those rules as `nft -j` prints them.
const NATIVE_HOOKS: &str = "nft-hooks.txt";
const NATIVE_RULES: &str = "nft-ruleset.json";

/// The source of what could not be collected at all.
const COLLECTION: &str = "collection";

/// Contents by file name: `iptables-save.txt`, `ip-route.json`, `sysctl.txt`, `xt_recent/NAME`, …
pub type Files = BTreeMap<String, Vec<u8>>;

/// `snapshot.json`: who wrote a snapshot, and of which node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metadata {
    pub format: u32,
    /// Version of the porttrace that wrote it.
    pub porttrace: String,
    pub node: Option<String>,
    /// Unix time in seconds.
    pub taken: Option<u64>,
    pub kernel: Option<String>,
    /// What could not be collected, each a sentence.
    pub missing: Vec<String>,
}

/// Turns a node's files into its state. Whatever is missing or not understood is said in the state's diagnostics; files
/// with other names are left alone.
pub fn state(files: &Files) -> NodeState {
    with_rules(files, rulesets::rulesets(files))
}

/// As [`state`], of a node whose rules were read already; those that may be among the files are left alone.
pub fn state_of(files: &Files, rules: Vec<FileRules>) -> NodeState {
    with_rules(files, rulesets::together(rules))
}

/// A node with the network of these files, and all else as it was.
pub fn with_network(former: &NodeState, files: &Files) -> NodeState {
    let mut reader = Reader { files, diagnostics: Vec::new() };
    reader.metadata();
    let mut state = NodeState { diagnostics: Vec::new(), ..former.clone() };
    reader.network(&mut state);
    let found = reader.diagnostics;
    // What was said of a file that is read anew is said again, if it is still so.
    let holds = |known: &&Diagnostic| {
        let of_file = |other: &Diagnostic| other.source == known.source && other.source != COLLECTION;
        !files.contains_key(&known.source) && !found.contains(known) && !found.iter().any(of_file)
    };
    state.diagnostics = former.diagnostics.iter().filter(holds).chain(&found).cloned().collect();
    state
}

fn with_rules(files: &Files, (rulesets, diagnostics): (Vec<Ruleset>, Vec<Diagnostic>)) -> NodeState {
    let mut reader = Reader { files, diagnostics: Vec::new() };
    let metadata = reader.metadata();
    reader.diagnostics.extend(diagnostics);
    let mut state = NodeState {
        name: reader.name(&metadata),
        rulesets: rulesets.into_iter().map(Arc::new).collect(),
        conntrack: reader.part("conntrack.txt", "connections that exist already are unknown", |text, notes| {
            Some(conntrack::entries(text, notes))
        }),
        sets: reader
            .part("ipset.txt", "rules that match a set stay undecided", |text, notes| Some(ipset::sets(text, notes))),
        recent: reader.recent(),
        sockets: reader.part("ss.txt", "which ports the node itself listens on is unknown", |text, notes| {
            Some(sockets::sockets(text, notes))
        }),
        knows_native: [NATIVE_HOOKS, NATIVE_RULES].iter().any(|name| files.contains_key(*name)),
        native: reader.native(),
        native_rules: reader.native_rules(),
        drops: drops::counts(reader.text("nf_conntrack.txt").as_deref(), reader.text("netstat.txt").as_deref()),
        ..NodeState::default()
    };
    reader.network(&mut state);
    state.diagnostics = reader.diagnostics;
    state
}

struct Reader<'a> {
    files: &'a Files,
    diagnostics: Vec<Diagnostic>,
}

impl<'a> Reader<'a> {
    fn text(&self, name: &str) -> Option<Cow<'a, str>> {
        self.files.get(name).map(|bytes| String::from_utf8_lossy(bytes))
    }

    /// Reads one file; `cost` says what its absence means.
    fn part<T>(&mut self, name: &str, cost: &str, parse: impl FnOnce(&str, &mut Notes) -> Option<T>) -> Option<T> {
        let mut notes = Notes::new(name);
        let value = match self.text(name) {
            Some(text) => parse(&text, &mut notes),
            None => {
                notes.add(0, format!("not there: {cost}"));
                None
            }
        };
        self.diagnostics.extend(notes.finish());
        value
    }

    fn metadata(&mut self) -> Metadata {
        let mut notes = Notes::new("snapshot.json");
        let metadata = match self.text("snapshot.json").map(|text| serde_json::from_str::<Metadata>(&text)) {
            None => Metadata { format: FORMAT, ..Metadata::default() },
            Some(Ok(metadata)) => metadata,
            Some(Err(error)) => {
                notes.add(error.line(), format!("not understood ({error}); read as format {FORMAT}"));
                Metadata { format: FORMAT, ..Metadata::default() }
            }
        };
        if metadata.format != FORMAT {
            notes.add(
                0,
                format!(
                    "written in format {} by porttrace {}; this porttrace knows format {FORMAT}, so parts may be missed",
                    metadata.format, metadata.porttrace
                ),
            );
        }
        let mut collection = Notes::new(COLLECTION);
        for missing in &metadata.missing {
            collection.add(0, missing.as_str());
        }
        self.diagnostics.extend(notes.finish().into_iter().chain(collection.finish()));
        metadata
    }

    fn name(&self, metadata: &Metadata) -> Option<String> {
        let configured = || {
            let text = self.text("kube-proxy-config.json")?;
            let config: serde_json::Value = serde_json::from_str(&text).ok()?;
            Some(config.get("hostnameOverride")?.as_str()?.to_owned()).filter(|name| !name.is_empty())
        };
        metadata.node.clone().or_else(configured)
    }

    /// Interfaces, addresses, routes and settings, which change without a rule.
    fn network(&mut self, state: &mut NodeState) {
        state.addresses =
            self.part("ip-addr.json", "which addresses are the node's own is unknown", iproute::addresses);
        state.links = self.links();
        state.routes = self.routes();
        state.policy = self.policy();
        state.sysctls =
            self.part("sysctl.txt", "forwarding, rp_filter and route_localnet are unknown", |text, notes| {
                Some(sysctl::sysctls(text, notes))
            });
        state.ipvs = self.ipvs();
        state.neighbours = self.part("ip-neigh.json", "neighbours are unknown", iproute::neighbours);
    }

    fn links(&mut self) -> Option<Vec<crate::core::model::state::Link>> {
        let mut links = self.part("ip-link.json", "bridges, veth pairs and link states are unknown", iproute::links)?;
        if let Some(text) = self.text("bridge-link.json") {
            let mut notes = Notes::new("bridge-link.json");
            iproute::apply_bridge_links(&mut links, &text, &mut notes);
            self.diagnostics.extend(notes.finish());
        }
        Some(links)
    }

    /// `ip route show table all` without `-4` lists IPv6 too; those are taken from the IPv6 file where there is one.
    fn routes(&mut self) -> Option<Vec<RouteEntry>> {
        let four = self
            .part("ip-route.json", "IPv4 routes are unknown", |text, notes| iproute::routes(text, Family::V4, notes));
        let six = self
            .part("ip6-route.json", "IPv6 routes are unknown", |text, notes| iproute::routes(text, Family::V6, notes));
        let is_six = |route: &RouteEntry| route.dst.addr().is_ipv6();
        match (four, six) {
            (None, None) => None,
            (Some(four), None) => Some(four),
            (four, Some(six)) => {
                let four = four.unwrap_or_default().into_iter().filter(|route| !is_six(route));
                Some(four.chain(six.into_iter().filter(is_six)).collect())
            }
        }
    }

    fn policy(&mut self) -> Option<Vec<PolicyRule>> {
        let cost = "the usual three tables (local, main, default) are assumed";
        let four = self.part("ip-rule.json", cost, |text, notes| iproute::policy(text, Family::V4, notes));
        let six = self.part("ip6-rule.json", cost, |text, notes| iproute::policy(text, Family::V6, notes));
        if four.is_none() && six.is_none() {
            return None;
        }
        let mut rules: Vec<PolicyRule> = [
            four.unwrap_or_else(|| PolicyRule::defaults(Family::V4)),
            six.unwrap_or_else(|| PolicyRule::defaults(Family::V6)),
        ]
        .concat();
        // Stable: the kernel walks rules of equal priority in the order of its list.
        rules.sort_by_key(|rule| (rule.family, rule.priority));
        Some(rules)
    }

    /// The kernel's list, or what ipvsadm printed. Most nodes have none: nothing is said where there is neither.
    fn ipvs(&mut self) -> Option<Vec<VirtualServer>> {
        let name = ["ip_vs.txt", "ipvsadm.txt"].into_iter().find(|name| self.files.contains_key(*name))?;
        let mut notes = Notes::new(name);
        let found = ipvs::servers(&self.text(name)?, &mut notes);
        self.diagnostics.extend(notes.finish());
        found
    }

    /// What native rules say, where nft printed it. Nothing is said where it did not: most nodes have none.
    fn native_rules(&mut self) -> Vec<Arc<Ruleset>> {
        let mut notes = Notes::new(NATIVE_RULES);
        // That it is no JSON is said already.
        let read = self.text(NATIVE_RULES).and_then(|text| native::rulesets(&text, &mut notes).ok());
        self.diagnostics.extend(notes.finish());
        read.unwrap_or_default().into_iter().map(Arc::new).collect()
    }

    /// The kernel's base chains, or those of what nft printed. Nothing is said where there is neither: most nodes have none.
    fn native(&mut self) -> Vec<NativeBase> {
        let (mut hooks, mut ruleset) = (Notes::new(NATIVE_HOOKS), Notes::new(NATIVE_RULES));
        let found = match (self.text(NATIVE_HOOKS), self.text(NATIVE_RULES)) {
            (Some(text), _) => nftables::bases(&text, &mut hooks),
            (None, Some(text)) => nftables::bases_of_ruleset(&text).unwrap_or_else(|error| {
                ruleset.add(error.line(), format!("not understood: {error}"));
                Vec::new()
            }),
            (None, None) => Vec::new(),
        };
        self.diagnostics.extend(hooks.finish().into_iter().chain(ruleset.finish()));
        found
    }

    /// Lists exist only where a rule has made them, so that there is nothing to say when there is none.
    fn recent(&mut self) -> Option<BTreeMap<String, Vec<crate::core::model::state::RecentEntry>>> {
        let clock = self.text("clock.txt").and_then(|text| recent::Clock::parse(&text));
        let mut lists = BTreeMap::new();
        for file in self.files.keys() {
            let Some(name) = file.strip_prefix("xt_recent/") else { continue };
            let mut notes = Notes::new(file);
            let text = self.text(file).unwrap_or_default();
            lists.insert(name.to_owned(), recent::entries(&text, clock, &mut notes));
            self.diagnostics.extend(notes.finish());
        }
        (!lists.is_empty()).then_some(lists)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(parts: &[(&str, &str)]) -> Files {
        parts.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect()
    }

    #[test]
    fn another_network_leaves_the_rest_as_it_was() {
        let former = state(&files(&[
            ("iptables-save.txt", "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j NO-SUCH-TARGET\nCOMMIT\n"),
            ("ip-route.json", r#"[{"dst":"10.0.0.0/8","dev":"old0"}]"#),
            ("ip-addr.json", "this is no JSON"),
            ("ss.txt", "tcp LISTEN 0 128 0.0.0.0:22 0.0.0.0:*\n"),
        ]));
        let now = with_network(
            &former,
            &files(&[
                ("ip-route.json", r#"[{"dst":"10.0.0.0/8","dev":"new0"}]"#),
                ("ip-addr.json", "[]"),
                ("snapshot.json", r#"{"format":1,"missing":["neighbours: the kernel refuses"]}"#),
            ]),
        );
        assert!(Arc::ptr_eq(&former.rulesets[0], &now.rulesets[0]), "rules are not copied");
        assert_eq!(now.sockets, former.sockets);
        assert_eq!(now.routes.as_ref().map(|routes| format!("{:?}", routes[0].nexthops).contains("new0")), Some(true));
        let about = |state: &NodeState, source: &str| state.diagnostics.iter().filter(|d| d.source == source).count();
        assert_eq!((about(&former, "ip-addr.json"), about(&now, "ip-addr.json")), (1, 0), "it can be read now");
        assert_eq!(about(&now, "iptables-save.txt"), about(&former, "iptables-save.txt"));
        assert_eq!((about(&former, COLLECTION), about(&now, COLLECTION)), (0, 1), "{:?}", now.diagnostics);
    }
}
