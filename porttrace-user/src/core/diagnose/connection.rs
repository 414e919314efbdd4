//! Which finding explains a connection that did not come about: the checks are made for it alone, with what was seen of it.

use super::samples::{From, Sample, Samples};
use super::{CHECKS, Finding, Scene};
use crate::core::correlate::judge::{Outcome, Reached, Refusal, Refuser};
use crate::core::kube::owners::{Claim, ClaimKind};
use crate::core::model::cluster::ObjectName;
use crate::core::model::flow::Tuple;
use crate::core::model::trace::{Branch, DropReason, RuleRef, Trace, Verdict};
use crate::core::ports;
use crate::core::world::World;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// A connection, as it was seen and as the rules predict it.
#[derive(Clone, Copy, Debug)]
pub struct Failed<'a> {
    /// As the client sent it.
    pub original: Tuple,
    /// The reply tuple of its conntrack entry, where that was observed.
    pub reply: Option<Tuple>,
    pub outcome: &'a Outcome,
    /// The kernel's name of the drop reason, where it dropped a packet.
    pub reason: Option<&'a str>,
    pub trace: Option<&'a Trace>,
    /// The branch of the trace that fits what was seen.
    pub branch: Option<&'a Branch>,
    /// What was seen is none of what the rules allow; of a connection that was answered, too.
    pub disagrees: bool,
}

/// The finding that explains it best, if any does; of a connection that was answered, only why that was against the rules.
///
/// The world's conntrack entries are looked at as they are: the connection's own is enough.
pub fn explaining(world: &World<'_>, failed: &Failed<'_>) -> Option<Finding> {
    let answered = matches!(failed.outcome, Outcome::Answered { .. });
    if answered && !failed.disagrees || *failed.outcome == Outcome::JoinedLate {
        return None;
    }
    let seen = Seen::new(world, failed);
    let mut scene: Option<Scene<'_, '_>> = None;
    for (id, may, fits) in EXPLAIN {
        if answered && !BEYOND_RULES.contains(&id) || !may(&seen) {
            continue;
        }
        let Some((_, check)) = CHECKS.iter().find(|(of, _)| *of == id) else { continue };
        let scene = scene.get_or_insert_with(|| seen.scene());
        let found = check(scene).unwrap_or_default();
        if let Some(finding) = found.into_iter().find(|finding| fits(&seen, finding)) {
            return Some(Finding { id, ..finding });
        }
    }
    None
}

/// Whether a finding can explain what was seen at all, asked before the check is made; and whether one that was found does.
type Explain = (&'static str, fn(&Seen<'_, '_>) -> bool, fn(&Seen<'_, '_>, &Finding) -> bool);

/// The most telling first: what ended the packet on this node, then where it went, then what else claims the port.
const EXPLAIN: [Explain; 31] = [
    ("ip-forward-off", |seen| seen.predicts(&DropReason::ForwardingDisabled), any),
    ("rp-filter-drops", |seen| seen.predicts(&DropReason::RpFilter) || seen.kernel_says("IP_RPFILTER"), any),
    ("localhost-not-served", |seen| seen.is_from_localhost(), |seen, finding| seen.is_about_port_or_node(finding)),
    ("network-policy-drops", |seen| seen.ended_by().is_some(), |seen, finding| seen.is_about_port(finding)),
    ("forward-policy-drop", |seen| seen.ended_by().is_some_and(|by| by.number().is_none()), any),
    ("source-ranges-exclude-client", |seen| seen.ended_in("KUBE-PROXY-FIREWALL"), of_the_service),
    ("external-local-without-endpoints", |seen| seen.lacks("has no local endpoints"), of_the_service),
    ("internal-local-without-endpoints", |seen| seen.lacks("has no local endpoints"), of_the_service),
    ("selector-matches-nothing", without_endpoints, of_the_service),
    ("target-port-name-not-found", without_endpoints, of_the_service),
    ("service-without-ready-endpoints", without_endpoints, of_the_service),
    ("service-without-endpoints", without_endpoints, of_the_service),
    ("stale-udp-entry", |seen| seen.failed.disagrees, |seen, finding| seen.is_about_port(finding)),
    (
        "stale-hostport",
        |seen| seen.is_rewritten(),
        |seen, finding| seen.is_about_port(finding) && seen.is_about_end(finding),
    ),
    ("no-listener", |seen| seen.is_closed(), |seen, finding| finding.about.ends.contains(&seen.end)),
    ("listens-on-loopback-only", |seen| seen.is_closed(), |seen, finding| finding.about.ends.contains(&seen.end)),
    ("rules-differ-from-endpoints", |seen| !seen.services.is_empty(), |seen, finding| seen.explains_rules(finding)),
    (
        "hostport-twice",
        |seen| seen.is_rewritten(),
        |seen, finding| seen.is_about_port(finding) && seen.is_about_end(finding),
    ),
    ("host-ip-not-here", |seen| seen.is_left_to_node(), |seen, finding| seen.is_about_port(finding)),
    (
        "nodeport-not-on-address",
        |seen| seen.is_left_to_node(),
        |seen, finding| finding.about.addresses.contains(&seen.failed.original.dst),
    ),
    ("portmap-catches-forwarded", |seen| seen.is_rewritten() && seen.is_forwarded() && seen.services.is_empty(), any),
    ("hairpin-off", |seen| seen.is_to_itself() && seen.is_unanswered(), any),
    ("bridge-nf-call-off", |seen| seen.is_within_bridge(), any),
    ("masquerade-missing", |seen| seen.is_rewritten() && seen.is_unanswered(), any),
    ("mtu-too-big", |seen| seen.is_too_big(), any),
    ("conntrack-nearly-full", |seen| seen.is_lost() && seen.ended_by().is_none(), any),
    ("hostport-and-nodeport", |seen| seen.is_to_node(), |seen, finding| seen.is_about_port(finding)),
    ("hostport-and-process", |seen| seen.is_to_node(), |seen, finding| seen.is_about_port(finding)),
    ("nodeport-and-process", |seen| seen.is_to_node(), |seen, finding| seen.is_about_port(finding)),
    ("kube-proxy-replaced", |seen| seen.is_beyond_rules() || seen.world.replaced().is_some(), any),
    ("ipvs-not-followed", |seen| seen.is_beyond_rules(), any),
];

/// Findings by which the rules do not decide.
const BEYOND_RULES: [&str; 2] = ["kube-proxy-replaced", "ipvs-not-followed"];

const fn any(_: &Seen<'_, '_>, _: &Finding) -> bool {
    true
}

fn of_the_service(seen: &Seen<'_, '_>, finding: &Finding) -> bool {
    seen.is_about_service(finding)
}

fn without_endpoints(seen: &Seen<'_, '_>) -> bool {
    seen.lacks("has no endpoints")
}

/// A connection with what its tuples mean on this node.
struct Seen<'a, 'f> {
    world: &'a World<'f>,
    failed: &'a Failed<'a>,
    /// Where its packets went in the end.
    end: SocketAddr,
    /// The Services whose port it asked for.
    services: BTreeSet<ObjectName>,
    /// What it asked for: `hostPort 9088 of default/frontend-a`.
    what: String,
    /// The comment of the rule that ends it, by the prediction.
    comment: String,
}

impl<'a, 'f> Seen<'a, 'f> {
    fn new(world: &'a World<'f>, failed: &'a Failed<'a>) -> Self {
        let asked = failed.original;
        let predicted = || failed.branch.map(|branch| branch.final_tuple.destination());
        let end = failed.reply.map(|reply| reply.source()).or_else(predicted).unwrap_or_else(|| asked.destination());
        let claims = world.owners.claims(asked.dport).filter(|claim| claim.proto == asked.proto);
        let claims: Vec<&Claim> = claims.filter(|claim| meets(world, claim, asked, failed)).collect();
        let mut services: BTreeSet<ObjectName> = claims.iter().filter_map(|claim| service(claim)).collect();
        for service in &world.facts.cluster.services {
            let addresses = || service.cluster_ips.iter().chain(&service.external_ips);
            let ingress = || service.ingress.iter().map(|ingress| ingress.ip);
            let own = service.ports.iter().any(|port| port.port == asked.dport && port.proto == asked.proto);
            if own && (addresses().any(|one| *one == asked.dst) || ingress().any(|one| one == asked.dst)) {
                services.insert(service.name.clone());
            }
        }
        let what = claims.iter().find_map(|claim| what(world, claim, end));
        let what = what.unwrap_or_else(|| asked.destination().to_string());
        let ended = failed.branch.and_then(|branch| ended_by(&branch.verdict));
        let comment = ended.and_then(|rule| world.rule(rule)?.comment()).unwrap_or_default();
        Self { world, failed, end, services, what, comment }
    }

    /// What the checks look at: its own predicted path, and the claims to its port.
    fn scene(&self) -> Scene<'a, 'f> {
        let asked = self.failed.original;
        let from = if asked.src.is_loopback() {
            From::Localhost
        } else if asked.src == self.end.ip() {
            From::Itself
        } else if self.world.behind(asked.src).is_some() || self.world.facts.is_own(asked.src) == Some(true) {
            From::Within
        } else {
            From::Outside
        };
        let sample = self.failed.trace.map(|trace| Sample {
            from,
            proto: asked.proto,
            port: asked.dport,
            what: self.what.clone(),
            trace: trace.clone(),
        });
        let samples = Samples { ports: ports::of_port(self.world, asked.dport), all: sample.into_iter().collect() };
        Scene { world: self.world, samples, client: Some(asked.src), only: Some(self.services.clone()) }
    }

    fn verdict(&self) -> Option<&Verdict> {
        self.failed.branch.map(|branch| &branch.verdict)
    }

    fn predicts(&self, why: &DropReason) -> bool {
        matches!(self.verdict(), Some(Verdict::Dropped { reason, .. }) if reason == why)
    }

    fn kernel_says(&self, name: &str) -> bool {
        self.failed.reason == Some(name)
    }

    /// The rule or policy that ends it, by the prediction.
    fn ended_by(&self) -> Option<&RuleRef> {
        ended_by(self.verdict()?)
    }

    fn ended_in(&self, chain: &str) -> bool {
        self.ended_by().is_some_and(|by| &*by.chain == chain)
    }

    /// kube-proxy's rule that ends it says that the Service lacks something.
    fn lacks(&self, what: &str) -> bool {
        self.comment.ends_with(what)
    }

    fn is_rewritten(&self) -> bool {
        self.end != self.failed.original.destination()
    }

    fn is_from_localhost(&self) -> bool {
        self.failed.original.src.is_loopback()
    }

    fn is_to_node(&self) -> bool {
        self.world.facts.is_own(self.failed.original.dst) == Some(true)
    }

    fn is_forwarded(&self) -> bool {
        self.world.facts.is_own(self.failed.original.dst) == Some(false)
    }

    fn is_to_itself(&self) -> bool {
        self.is_rewritten() && self.failed.original.src == self.end.ip()
    }

    /// The host at the end was reached and said that the port is closed.
    fn is_closed(&self) -> bool {
        match self.failed.outcome {
            Outcome::Refused { by: Refuser::Behind { .. }, how, .. } => how.is_port_closed(),
            Outcome::Refused { by: Refuser::Unseen, how, .. } => how.is_port_closed() && self.is_rewritten(),
            _ => false,
        }
    }

    /// It was for this node itself, and no rule took it: the node's own sockets were asked.
    fn is_left_to_node(&self) -> bool {
        let asked = match self.failed.outcome {
            Outcome::Refused { by: Refuser::ThisNode, .. } | Outcome::Silent { reached: Reached::LocalIn, .. } => true,
            Outcome::Refused { by: Refuser::Unseen, .. } | Outcome::Silent { reached: Reached::Confirmed, .. } => {
                self.is_to_node()
            }
            Outcome::Dropped { .. } => self.kernel_says("NO_SOCKET"),
            _ => false,
        };
        asked && !self.is_rewritten() && self.ended_by().is_none()
    }

    /// It went on, and nothing (or nothing good) came back.
    const fn is_unanswered(&self) -> bool {
        match self.failed.outcome {
            Outcome::Silent { reached: Reached::Left { .. } | Reached::Confirmed, .. }
            | Outcome::AnswerLost { entered: Some(_), .. }
            | Outcome::Refused { by: Refuser::Client, .. } => true,
            Outcome::Refused { how, .. } => !how.is_port_closed(),
            _ => false,
        }
    }

    /// It went no further than this node.
    fn is_lost(&self) -> bool {
        match self.failed.outcome {
            Outcome::Dropped { .. } => self.kernel_says("NETFILTER_DROP"),
            Outcome::Silent { reached, .. } => matches!(reached, Reached::Entered { .. } | Reached::Sent),
            _ => false,
        }
    }

    /// Client and endpoint are behind one bridge: what they say to each other directly is not translated back.
    fn is_within_bridge(&self) -> bool {
        let behind = |address: IpAddr| self.world.behind(address);
        self.is_rewritten()
            && !self.is_to_itself()
            && self.is_unanswered()
            && behind(self.failed.original.src).is_some_and(|link| behind(self.end.ip()) == Some(link))
    }

    fn is_too_big(&self) -> bool {
        let told = match self.failed.outcome {
            Outcome::Refused { how: Refusal::Icmp { v6, kind, code }, .. } => {
                if *v6 {
                    *kind == 2
                } else {
                    *kind == 3 && *code == 4
                }
            }
            _ => false,
        };
        told || self.kernel_says("PKT_TOO_BIG")
    }

    /// The rules did not decide.
    fn is_beyond_rules(&self) -> bool {
        self.failed.disagrees || matches!(self.verdict(), Some(Verdict::Unknown { .. }))
    }

    fn is_about_port(&self, finding: &Finding) -> bool {
        finding.about.ports.contains(&(self.failed.original.proto, self.failed.original.dport))
    }

    fn is_about_port_or_node(&self, finding: &Finding) -> bool {
        finding.about.node || self.is_about_port(finding)
    }

    fn is_about_end(&self, finding: &Finding) -> bool {
        finding.about.addresses.contains(&self.end.ip())
    }

    fn is_about_service(&self, finding: &Finding) -> bool {
        finding.about.services.iter().any(|service| self.services.contains(service))
    }

    /// The rules led to an endpoint that is none any more, or refuse a Service that has some.
    fn explains_rules(&self, finding: &Finding) -> bool {
        self.is_about_end(finding) || self.lacks("has no endpoints") && self.is_about_service(finding)
    }
}

fn ended_by(verdict: &Verdict) -> Option<&RuleRef> {
    match verdict {
        Verdict::Rejected { by, .. } | Verdict::Dropped { reason: DropReason::Rule, by } => by.as_ref(),
        _ => None,
    }
}

/// Whether a connection asks for what a claim claims.
fn meets(world: &World<'_>, claim: &Claim, asked: Tuple, failed: &Failed<'_>) -> bool {
    let own = || world.facts.is_own(asked.dst) == Some(true);
    match &claim.kind {
        ClaimKind::ServicePort { address, .. } => *address == asked.dst,
        ClaimKind::NodePort { .. } => own(),
        ClaimKind::HostPort { host_ip, .. } => host_ip.map_or_else(own, |host_ip| host_ip == asked.dst),
        ClaimKind::Refused { .. } => {
            let ended = failed.branch.and_then(|branch| ended_by(&branch.verdict));
            ended.is_some() && claim.rule.as_ref() == ended
        }
        ClaimKind::Listener { .. } => false,
    }
}

fn service(claim: &Claim) -> Option<ObjectName> {
    match &claim.kind {
        ClaimKind::ServicePort { service, .. } | ClaimKind::NodePort { service, .. } => super::service_of(service),
        ClaimKind::Refused { why, .. } => super::service_of(why.split(' ').next()?),
        ClaimKind::HostPort { .. } | ClaimKind::Listener { .. } => None,
    }
}

/// The claim that led to the end, in words.
fn what(world: &World<'_>, claim: &Claim, end: SocketAddr) -> Option<String> {
    match &claim.kind {
        ClaimKind::HostPort { to, .. } if *to == end => {
            let whose = world.facts.name_at(to.ip()).unwrap_or_else(|| to.ip().to_string());
            Some(format!("hostPort {} of {whose}", claim.port))
        }
        ClaimKind::NodePort { service, .. } => Some(format!("NodePort {} of {service}", claim.port)),
        ClaimKind::ServicePort { service, .. } => Some(format!("Service {service}")),
        _ => None,
    }
}
