//! Which finding `watch` names for a connection that failed: in each case of tests/cases/findings the one that is the cause,
//! and on the healthy node none.

use porttrace_user::collect::snapshot;
use porttrace_user::core::correlate::judge::{Outcome, Reached, Refusal, Refuser};
use porttrace_user::core::diagnose::{Failed, Finding, explaining};
use porttrace_user::core::model::facts::Facts;
use porttrace_user::core::model::flow::{Proto, Tuple};
use porttrace_user::core::model::state::ConntrackEntry;
use porttrace_user::core::model::trace::{Branch, Trace};
use porttrace_user::core::parse;
use porttrace_user::core::world::World;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

const NODE: &str = "10.0.0.1";
const OUTSIDE: &str = "192.0.2.1";
const PORT_UNREACHABLE: Refusal = Refusal::Icmp { v6: false, kind: 3, code: 3 };
const ENTERED: Outcome = Outcome::Silent { reached: Reached::Entered { ifindex: 2 }, tries: 3 };
const SENT: Outcome = Outcome::Silent { reached: Reached::Sent, tries: 3 };
const LEFT: Outcome = Outcome::Silent { reached: Reached::Left { ifindex: 3 }, tries: 3 };
const DROPPED: Outcome = Outcome::Dropped { reason: 77, after_ns: 1000 };

fn facts(case: &str) -> Facts {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/findings");
    let mut files = snapshot::read_files(&cases.join("base")).expect("the base node");
    if case != "base" {
        files.extend(snapshot::read_files(&cases.join(case)).expect("a case"));
    }
    parse::facts(&files)
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// The host at the end sent RST.
fn reset(from: &str) -> Outcome {
    let from: SocketAddr = from.parse().expect("an endpoint");
    Outcome::Refused { by: Refuser::Behind { ifindex: 3 }, from, how: Refusal::TcpReset, after_ns: 1000 }
}

/// This node itself refused.
fn refused(how: Refusal) -> Outcome {
    let from: SocketAddr = "10.0.0.1:1".parse().expect("an endpoint");
    Outcome::Refused { by: Refuser::ThisNode, from, how, after_ns: 1000 }
}

/// A connection of this case, and what was seen of it.
struct Seen {
    facts: Facts,
    original: Tuple,
    outcome: Outcome,
    reason: Option<&'static str>,
    /// Where conntrack sent it, if not where the rules say.
    end: Option<SocketAddr>,
    interface: Option<&'static str>,
}

fn seen(case: &str, src: &str, dst: &str, outcome: Outcome) -> Seen {
    let to: SocketAddr = dst.parse().expect("an endpoint");
    let original = Tuple { proto: Proto::Tcp, src: address(src), sport: 40_000, dst: to.ip(), dport: to.port() };
    Seen { facts: facts(case), original, outcome, reason: None, end: None, interface: None }
}

impl Seen {
    fn udp(mut self) -> Self {
        self.original.proto = Proto::Udp;
        self
    }

    fn by(self, interface: &'static str) -> Self {
        Self { interface: Some(interface), ..self }
    }

    fn reason(self, name: &'static str) -> Self {
        Self { reason: Some(name), ..self }
    }

    fn to(self, end: &str) -> Self {
        Self { end: Some(end.parse().expect("an endpoint")), ..self }
    }

    fn finding(mut self) -> Option<Finding> {
        let reply = self.end.map(|end| Tuple { src: end.ip(), sport: end.port(), ..self.original.inverted() });
        self.facts.state.conntrack = Some(reply.into_iter().map(|reply| entry(self.original, reply)).collect());
        let world = World::new(&self.facts);
        let Tuple { proto, src, dst, dport, .. } = self.original;
        let trace: Trace = match self.interface {
            Some(interface) => world.arriving(self.original, interface),
            None => world.trace(proto, src, dst, dport),
        };
        let leads = |branch: &&Branch| self.end.is_none_or(|end| branch.final_tuple.destination() == end);
        let branch = trace.branches.iter().find(leads);
        let translated = branch.map(|branch| branch.reply_tuple);
        let failed = Failed {
            original: self.original,
            reply: reply.map(|reply| translated.unwrap_or(reply)),
            outcome: &self.outcome,
            reason: self.reason,
            trace: Some(&trace),
            branch,
            disagrees: branch.is_none(),
        };
        explaining(&world, &failed)
    }

    #[track_caller]
    fn gives(self, id: &str) {
        let finding = self.finding();
        assert_eq!(finding.as_ref().map(|finding| finding.id), Some(id), "{finding:?}");
        let finding = finding.expect("a finding");
        assert!(
            !finding.brief().is_empty() && !finding.change.is_empty() && !finding.evidence.is_empty(),
            "{finding:?}"
        );
    }

    #[track_caller]
    fn stays_unexplained(self) {
        let finding = self.finding();
        assert!(finding.is_none(), "{finding:?}");
    }
}

fn entry(original: Tuple, reply: Tuple) -> ConntrackEntry {
    let state = String::new();
    ConntrackEntry { original, reply, state, assured: false, unreplied: true, mark: 0, timeout: None, zone: 0 }
}

fn node(port: u16) -> String {
    format!("{NODE}:{port}")
}

#[test]
fn a_refusal_of_the_pod_is_a_missing_listener() {
    let seen_at = |case| seen(case, OUTSIDE, &node(9088), reset("10.244.1.2:8081"));
    let finding = seen_at("no-listener").finding().expect("a finding");
    assert_eq!(finding.id, "no-listener");
    assert_eq!(
        finding.brief(),
        "nothing listens on 8081 in pod default/web-1 (it listens on 8080; the image exposes 8080/tcp)"
    );
    assert_eq!(finding.change, "set containerPort 8081 (hostPort 9088) of container web in pod default/web-1 to 8080");
    seen("listens-on-loopback-only", OUTSIDE, &node(9088), reset("10.244.1.2:8080")).gives("listens-on-loopback-only");
    // Without the API, kube-proxy's comments tell which Service it is.
    let mut by_service = seen("listens-on-loopback-only", OUTSIDE, "10.96.0.80:80", reset("10.244.1.2:8080"));
    by_service.facts.cluster = Default::default();
    by_service.to("10.244.1.2:8080").gives("listens-on-loopback-only");
    // Where the healthy pod refuses, no fact says why.
    seen_at("base").stays_unexplained();
}

#[test]
fn silence_of_a_host_port_is_a_stale_chain_or_another_owner() {
    let finding = seen("stale-hostport", OUTSIDE, &node(9093), LEFT).finding().expect("a finding");
    assert_eq!((finding.id, finding.brief()), ("stale-hostport", "no pod has 10.244.1.9 any more"));
    seen("stale-hostport-crio", OUTSIDE, &node(9093), LEFT).gives("stale-hostport");
    // The healthy hostPort beside it has nothing to do with that.
    seen("stale-hostport", OUTSIDE, &node(9088), LEFT).stays_unexplained();
    seen("hostport-twice", OUTSIDE, &node(9088), LEFT).gives("hostport-twice");
    seen("hostport-and-nodeport", OUTSIDE, &node(30080), LEFT).to("10.244.1.2:8080").gives("hostport-and-nodeport");
    seen("hostport-and-process", OUTSIDE, &node(9088), LEFT).gives("hostport-and-process");
    seen("nodeport-and-process", OUTSIDE, &node(30080), LEFT).gives("nodeport-and-process");
    seen("base", OUTSIDE, &node(9088), LEFT).stays_unexplained();
}

#[test]
fn a_rejection_is_a_service_without_endpoints() {
    for id in ["service-without-endpoints", "service-without-ready-endpoints", "selector-matches-nothing"] {
        seen(id, NODE, "10.96.0.90:80", refused(PORT_UNREACHABLE)).gives(id);
        // REJECT does not always answer.
        seen(id, NODE, "10.96.0.90:80", DROPPED).gives(id);
        // Another Service of the same node is not concerned.
        seen(id, OUTSIDE, &node(30080), LEFT).to("10.244.1.2:8080").stays_unexplained();
    }
    let mut bare = seen("service-without-endpoints", NODE, "10.96.0.90:80", refused(PORT_UNREACHABLE));
    bare.facts.cluster = Default::default();
    bare.gives("service-without-endpoints");
}

#[test]
fn a_drop_is_a_traffic_policy_or_a_range() {
    seen("external-local-without-endpoints", OUTSIDE, &node(30091), ENTERED).gives("external-local-without-endpoints");
    seen("internal-local-without-endpoints", NODE, "10.96.0.91:80", SENT).gives("internal-local-without-endpoints");
    seen("source-ranges-exclude-client", "10.9.9.9", "203.0.113.5:80", DROPPED).gives("source-ranges-exclude-client");
    // A client within the range has another reason.
    seen("source-ranges-exclude-client", "10.1.9.9", "203.0.113.5:80", LEFT).stays_unexplained();
}

#[test]
fn rules_that_are_behind_and_entries_that_are_older() {
    seen("rules-differ-from-endpoints", OUTSIDE, &node(30080), LEFT)
        .to("10.244.2.2:8080")
        .gives("rules-differ-from-endpoints");
    seen("stale-udp-entry", "10.244.1.2", "10.96.0.53:53", LEFT).udp().to("10.244.1.99:53").gives("stale-udp-entry");
    seen("stale-udp-entry", "10.244.1.2", "10.96.0.53:53", LEFT).udp().to("10.244.1.3:53").stays_unexplained();
}

#[test]
fn what_nobody_took_is_bound_to_another_address() {
    seen("host-ip-not-here", OUTSIDE, &node(9088), refused(Refusal::TcpReset)).gives("host-ip-not-here");
    seen("nodeport-not-on-address", OUTSIDE, &node(30080), refused(Refusal::TcpReset))
        .to(&node(30080))
        .gives("nodeport-not-on-address");
    seen("base", OUTSIDE, &node(9099), refused(Refusal::TcpReset)).stays_unexplained();
    // Native rules of portmap are not followed: conntrack shows what they did.
    seen("portmap-catches-forwarded", OUTSIDE, "203.0.113.9:9088", LEFT)
        .to("10.244.1.2:8080")
        .gives("portmap-catches-forwarded");
}

#[test]
fn what_this_node_stops() {
    seen("localhost-not-served", "127.0.0.1", "127.0.0.1:9088", DROPPED).gives("localhost-not-served");
    seen("ip-forward-off", OUTSIDE, &node(9088), ENTERED).gives("ip-forward-off");
    seen("rp-filter-drops", OUTSIDE, "192.168.7.1:9088", ENTERED).by("eth1").gives("rp-filter-drops");
    seen("rp-filter-drops", OUTSIDE, "192.168.7.1:9088", DROPPED)
        .reason("IP_RPFILTER")
        .by("eth1")
        .gives("rp-filter-drops");
    seen("forward-policy-drop", OUTSIDE, &node(9088), DROPPED).gives("forward-policy-drop");
    // Also for who asks the pod itself.
    seen("forward-policy-drop", OUTSIDE, "10.244.1.2:8080", ENTERED).gives("forward-policy-drop");
    let finding = seen("network-policy-drops", OUTSIDE, &node(9088), DROPPED).finding().expect("a finding");
    assert_eq!(finding.id, "network-policy-drops");
    assert!(finding.sentence.contains("drops connections from 192.0.2.1 to hostPort 9088"), "{}", finding.sentence);
    seen("conntrack-nearly-full", OUTSIDE, &node(9088), ENTERED).gives("conntrack-nearly-full");
    seen("conntrack-nearly-full", NODE, "10.96.0.80:80", SENT).gives("conntrack-nearly-full");
    seen("mtu-too-big", OUTSIDE, &node(9088), DROPPED).reason("PKT_TOO_BIG").gives("mtu-too-big");
}

#[test]
fn answers_that_go_astray() {
    seen("masquerade-missing", OUTSIDE, &node(30080), LEFT).to("10.244.2.2:8080").gives("masquerade-missing");
    seen("hairpin-off", "10.244.1.2", "10.96.0.80:80", LEFT).to("10.244.1.2:8080").gives("hairpin-off");
    seen("bridge-nf-call-off", "10.244.1.3", "10.96.0.80:80", LEFT).to("10.244.1.2:8080").gives("bridge-nf-call-off");
    // A pod of this node that asks a pod of another is answered as it is.
    seen("masquerade-missing", "10.244.1.3", "10.96.0.80:80", LEFT).to("10.244.2.2:8080").stays_unexplained();
}

#[test]
fn where_rules_do_not_decide() {
    let elsewhere = |case| seen(case, OUTSIDE, &node(30080), LEFT).to("10.244.9.9:1");
    elsewhere("kube-proxy-replaced").gives("kube-proxy-replaced");
    elsewhere("ipvs-not-followed").gives("ipvs-not-followed");
    // Nor do they tell of what is rewritten before netfilter sees it, and is not seen again.
    for outcome in [ENTERED, SENT] {
        seen("kube-proxy-replaced", OUTSIDE, &node(30080), outcome).gives("kube-proxy-replaced");
    }
    // An answer against the rules.
    let by = "10.0.0.1:30080".parse().expect("an endpoint");
    let answered = || Outcome::Answered { by, after_ns: 1 };
    seen("kube-proxy-replaced", OUTSIDE, &node(30080), answered()).to("10.244.9.9:1").gives("kube-proxy-replaced");
    seen("kube-proxy-replaced", OUTSIDE, &node(30080), answered()).stays_unexplained();
    seen("base", OUTSIDE, &node(30080), answered()).to("10.244.9.9:1").stays_unexplained();
}

#[test]
fn what_was_answered_needs_no_finding() {
    let by = "10.244.1.2:8080".parse().expect("an endpoint");
    seen("hostport-and-process", OUTSIDE, &node(9088), Outcome::Answered { by, after_ns: 1 }).stays_unexplained();
    seen("hostport-and-process", OUTSIDE, &node(9088), Outcome::JoinedLate).stays_unexplained();
}
