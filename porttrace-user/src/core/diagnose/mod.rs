//! Findings: what is wrong with the ports of a node, the evidence, and what to change.
//!
//! Each check looks at facts alone and never guesses: one whose facts are missing says so. The list is in docs/findings.md.

mod connection;
mod hostports;
mod listeners;
mod local;
mod network;
mod node;
mod samples;
mod services;
mod stale;
mod tables;

pub use connection::{Failed, explaining};
pub(crate) use listeners::written;
pub(crate) use services::{endpoints, port_name};

use super::model::cluster::{ObjectName, Service};
use super::model::flow::Proto;
use super::model::trace::RuleRef;
use super::quantity::count;
use super::world::World;
use samples::Samples;
use serde::Serialize;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Connections fail.
    Error,
    /// Connections fail for some clients, or may fail later.
    Warning,
    /// Worth knowing; often meant to be so.
    Note,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub id: &'static str,
    pub severity: Severity,
    pub sentence: String,
    /// The cause alone, for a line that already says what happened; `None`: the sentence is short enough.
    #[serde(skip)]
    pub cause: Option<String>,
    pub evidence: Vec<Evidence>,
    /// What to do about it, an imperative.
    pub change: String,
    #[serde(skip)]
    pub about: About,
}

/// Where a finding comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Evidence {
    /// `rule`, `socket`, `object`, `setting`, `entry`, `route`, `link`, `path`.
    pub kind: &'static str,
    /// `nat CNI-DN-5219cd06badb5524e0a26 #3`, `pod default/frontend-a`, `net.ipv4.ip_forward`.
    pub place: String,
    pub text: String,
}

/// What a finding concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    pub ports: Vec<(Proto, u16)>,
    pub services: Vec<ObjectName>,
    pub pods: Vec<ObjectName>,
    pub addresses: Vec<IpAddr>,
    /// Endpoints of which it says why they do not answer.
    pub ends: Vec<SocketAddr>,
    /// The whole node: it concerns everything.
    pub node: bool,
}

/// A check that could not be made, or not for all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unchecked {
    pub id: &'static str,
    pub why: String,
}

/// What all checks said, by severity, then in the order of the checks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub findings: Vec<Finding>,
    pub unchecked: Vec<Unchecked>,
}

/// What one check says: its findings, or why it cannot be made.
pub(crate) type Checked = Result<Vec<Finding>, String>;

/// What checks look at beside the world.
pub(crate) struct Scene<'w, 'f> {
    pub(crate) world: &'w World<'f>,
    pub(crate) samples: Samples,
    /// The client that the question is about.
    pub(crate) client: Option<IpAddr>,
    /// The question is about one connection that was seen: the samples are that one, and only these Services matter.
    pub(crate) only: Option<BTreeSet<ObjectName>>,
}

impl<'f> Scene<'_, 'f> {
    /// The Services that the question is about.
    pub(crate) fn services(&self) -> impl Iterator<Item = &'f Service> {
        let wanted = |service: &&Service| self.only.as_ref().is_none_or(|only| only.contains(&service.name));
        self.world.facts.cluster.services.iter().filter(wanted)
    }
}

type Check = (&'static str, fn(&Scene<'_, '_>) -> Checked);

/// All checks.
const CHECKS: [Check; 33] = [
    ("no-listener", listeners::no_listener),
    ("listens-on-loopback-only", listeners::loopback_only),
    ("stale-hostport", stale::stale),
    ("hostport-and-nodeport", hostports::and_node_port),
    ("hostport-and-process", hostports::and_process),
    ("nodeport-and-process", hostports::node_port_and_process),
    ("hostport-twice", hostports::twice),
    ("host-ip-not-here", hostports::host_ip),
    ("portmap-catches-forwarded", hostports::catches_forwarded),
    ("service-without-endpoints", services::without_endpoints),
    ("service-without-ready-endpoints", services::without_ready),
    ("selector-matches-nothing", services::selector),
    ("target-port-name-not-found", services::target_name),
    ("rules-differ-from-endpoints", services::rules_differ),
    ("external-local-without-endpoints", local::external),
    ("internal-local-without-endpoints", local::internal),
    ("source-ranges-exclude-client", local::source_ranges),
    ("nodeport-not-on-address", local::node_port_addresses),
    ("localhost-not-served", local::localhost),
    ("ip-forward-off", node::ip_forward),
    ("rp-filter-drops", node::rp_filter),
    ("forward-policy-drop", node::forward_policy),
    ("network-policy-drops", node::network_policy),
    ("masquerade-missing", network::masquerade),
    ("hairpin-off", network::hairpin),
    ("bridge-nf-call-off", network::bridge_nf),
    ("mtu-too-big", network::mtu),
    ("conntrack-nearly-full", tables::conntrack_full),
    ("stale-udp-entry", tables::stale_udp),
    ("legacy-and-nft-rules", tables::both_flavours),
    ("kube-proxy-replaced", tables::replaced),
    ("ipvs-not-followed", tables::ipvs),
    ("nftables-not-followed", tables::native),
];

/// The ids of all checks, in the order of docs/findings.md.
pub fn ids() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|(id, _)| *id)
}

/// Makes every check.
pub fn diagnose(world: &World<'_>, client: Option<IpAddr>) -> Report {
    diagnose_for(world, client, &BTreeSet::new())
}

/// Makes every check; findings about several ports name one of the asked ones, where it is among them.
pub fn diagnose_for(world: &World<'_>, client: Option<IpAddr>, asked: &BTreeSet<(Proto, u16)>) -> Report {
    let scene = Scene { world, samples: Samples::new(world, asked), client, only: None };
    let mut report = Report::default();
    for (id, check) in CHECKS {
        match check(&scene) {
            Ok(findings) => report.findings.extend(findings.into_iter().map(|finding| Finding { id, ..finding })),
            Err(why) => report.unchecked.push(Unchecked { id, why }),
        }
    }
    // Stable: within a severity the checks' own order, the causes before what follows from them.
    report.findings.sort_by_key(|finding| finding.severity);
    report.findings.dedup();
    report
}

impl Finding {
    /// A finding whose id is that of the check that makes it.
    pub(crate) fn new(severity: Severity, sentence: String, change: String) -> Self {
        Self { id: "", severity, sentence, cause: None, evidence: Vec::new(), change, about: About::default() }
    }

    pub(crate) fn with(mut self, evidence: impl IntoIterator<Item = Evidence>) -> Self {
        self.evidence.extend(evidence);
        self
    }

    pub(crate) fn because(mut self, cause: String) -> Self {
        self.cause = Some(cause);
        self
    }

    /// The cause in the fewest words.
    pub fn brief(&self) -> &str {
        self.cause.as_deref().unwrap_or(&self.sentence)
    }

    pub(crate) fn port(mut self, proto: Proto, port: u16) -> Self {
        self.about.ports.push((proto, port));
        self
    }

    pub(crate) fn service(mut self, name: &ObjectName) -> Self {
        self.about.services.push(name.clone());
        self
    }

    pub(crate) fn pod(mut self, name: Option<&ObjectName>) -> Self {
        self.about.pods.extend(name.cloned());
        self
    }

    pub(crate) fn address(mut self, address: IpAddr) -> Self {
        self.about.addresses.push(address);
        self
    }

    pub(crate) fn end(mut self, end: SocketAddr) -> Self {
        self.about.ends.push(end);
        self
    }

    pub(crate) const fn of_node(mut self) -> Self {
        self.about.node = true;
        self
    }
}

impl Evidence {
    pub(crate) fn new(kind: &'static str, place: impl Into<String>, text: impl Into<String>) -> Self {
        Self { kind, place: place.into(), text: text.into() }
    }

    /// A rule's line, with its counter where the dump has one.
    pub(crate) fn rule(world: &World<'_>, at: &RuleRef) -> Self {
        let text = match world.rule(at) {
            Some(rule) => match rule.counters() {
                Some((packets, _)) => format!("{} ({})", rule.text, count(packets, "packet")),
                None => rule.text.to_string(),
            },
            None if at.number().is_none() => "the chain's policy".to_owned(),
            None => String::new(),
        };
        Self::new("rule", place(at), text)
    }

    pub(crate) fn setting(world: &World<'_>, key: &str) -> Self {
        let value = world.facts.state.sysctls.as_ref().and_then(|all| all.get(key));
        Self::new("setting", key, value.map_or_else(|| "?".to_owned(), |value| value.trim().to_owned()))
    }
}

/// `nat CNI-DN-5219cd06badb5524e0a26 #3`.
pub fn place(at: &RuleRef) -> String {
    match at.number() {
        Some(number) => format!("{} {} #{number}", at.table, at.chain),
        None => format!("{} {} policy", at.table, at.chain),
    }
}

/// `80`, `80 or 8080`.
pub(crate) fn either(ports: &[u16]) -> String {
    let words: Vec<String> = ports.iter().map(ToString::to_string).collect();
    words.join(" or ")
}

/// `default/frontend:http` → the Service's name.
pub(crate) fn service_of(service_port: &str) -> Option<ObjectName> {
    let (namespace, rest) = service_port.split_once('/')?;
    let name = rest.split(':').next().unwrap_or(rest);
    Some(ObjectName { namespace: namespace.to_owned(), name: name.to_owned() })
}
