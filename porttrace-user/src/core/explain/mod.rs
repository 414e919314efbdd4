//! What a port, a Service or a pod is on this node: who claims it, which number is which, where packets go, what is wrong.

mod derive;
mod hints;
mod live;
mod map;

use super::diagnose::{self, Finding, Report, Severity};
use super::kube::server::Server;
use super::model::cluster::{ObjectName, Pod, Service, ServicePort};
use super::model::flow::{Family, Proto};
use super::model::trace::Trace;
use super::ports::{self, Kind, Port, PortClaim, Wins};
use super::reach::{self, Outcome, Reach};
use super::world::World;
use serde::Serialize;
use std::collections::BTreeSet;
use std::net::IpAddr;

pub use derive::derive;
pub use map::{PortMap, Word};

/// What is asked about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum Subject {
    Port { port: u16, proto: Option<Proto> },
    Service(ObjectName),
    Pod(ObjectName),
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    pub subject: Subject,
    pub node: Option<String>,
    /// The verdict, a line for each thing that the subject is.
    pub verdict: Vec<Line>,
    /// Claims to the port, or to the NodePorts and hostPorts of the Service or pod.
    pub ports: Vec<Port>,
    pub maps: Vec<PortMap>,
    pub paths: Vec<Path>,
    /// What connections that exist and counters of rules say, a sentence each.
    pub live: Vec<String>,
    #[serde(flatten)]
    pub report: Report,
}

/// A sentence, and how things stand by it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    pub outcome: Outcome,
    pub sentence: String,
    /// What to change, from the worst finding that concerns it.
    pub change: Option<String>,
}

/// A predicted path.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Path {
    /// `from outside to 172.18.0.3:9088`.
    pub title: String,
    pub reach: Reach,
    #[serde(skip)]
    pub trace: Trace,
}

/// What a subject touches: which findings concern it.
#[derive(Clone, Debug, Default)]
struct Scope {
    ports: BTreeSet<(Proto, u16)>,
    services: BTreeSet<ObjectName>,
    pods: BTreeSet<ObjectName>,
    addresses: BTreeSet<IpAddr>,
}

/// Explains a subject.
///
/// # Errors
/// One sentence when the facts do not know the Service or the pod.
pub fn explain(world: &World<'_>, mut subject: Subject, client: Option<IpAddr>) -> Result<Explanation, String> {
    let all = ports::ports_for(world, client);
    let (scope, ports) = match &subject {
        Subject::Port { port, proto } => {
            let fits = |one: &Port| one.port == *port && proto.is_none_or(|proto| proto == one.proto);
            let ports: Vec<Port> = all.into_iter().filter(fits).collect();
            (scope_of_ports(world, &ports, *port, *proto), ports)
        }
        Subject::Service(name) => {
            let service = find_service(world, name)?;
            let scope = scope_of_service(world, service);
            let ours = |claim: &PortClaim| {
                diagnose::service_of(claim.who.split(' ').next().unwrap_or_default()).as_ref() == Some(name)
            };
            (scope, all.into_iter().filter(|one| one.claims.iter().any(ours)).collect())
        }
        Subject::Pod(name) => {
            let pod = find_pod(world, name)?;
            let ours = |claim: &PortClaim| claim.to.is_some_and(|to| pod.ips.contains(&to.ip()));
            subject = Subject::Pod(pod.name.clone());
            (scope_of_pod(world, pod), all.into_iter().filter(|one| one.claims.iter().any(ours)).collect())
        }
    };
    let report = diagnose::diagnose_for(world, client, &scope.ports);
    let mut findings: Vec<Finding> = report.findings.into_iter().filter(|finding| scope.concerns(finding)).collect();
    // What is about the port itself comes before what is about its pod's other Services.
    findings
        .sort_by_key(|finding| (finding.severity, !finding.about.ports.iter().any(|port| scope.ports.contains(port))));
    let unchecked = report.unchecked.into_iter().filter(|one| scope.asks(world, one.id)).collect();
    let report = Report { findings, unchecked };
    let maps = map::maps(world, &subject, &ports);
    Ok(Explanation {
        verdict: verdict(world, &subject, &ports, &maps, &report),
        live: live::live(world, &ports, &scope.addresses),
        paths: paths(world, &subject, &ports, client),
        node: world.facts.state.name.clone(),
        maps,
        ports,
        report,
        subject,
    })
}

impl Scope {
    /// Whether a check could say anything about the subject: what need not be checked is not missed.
    fn asks(&self, world: &World<'_>, id: &str) -> bool {
        let mut services = self.services.iter().filter_map(|name| world.facts.service(&name.namespace, &name.name));
        match id {
            "stale-udp-entry" => {
                let of_service = |service: &Service| service.ports.iter().any(|port| port.proto == Proto::Udp);
                self.ports.iter().any(|(proto, _)| *proto == Proto::Udp) || services.any(of_service)
            }
            "source-ranges-exclude-client" => services.any(|service| !service.source_ranges.is_empty()),
            _ => true,
        }
    }

    fn concerns(&self, finding: &Finding) -> bool {
        let about = &finding.about;
        let by_name = about.ports.iter().any(|port| self.ports.contains(port))
            || about.services.iter().any(|name| self.services.contains(name));
        // What is wrong with another Service of the same pod is that Service's concern.
        let of_others = !about.services.is_empty() || !about.ports.is_empty();
        let by_pod = about.pods.iter().any(|name| self.pods.contains(name))
            || about.addresses.iter().any(|address| self.addresses.contains(address));
        about.node || by_name || by_pod && !of_others
    }
}

fn scope_of_ports(world: &World<'_>, ports: &[Port], port: u16, proto: Option<Proto>) -> Scope {
    let mut scope = Scope::default();
    if ports.is_empty() {
        for (service, of) in world.with_node_port(port, proto) {
            scope.ports.insert((of.proto, port));
            scope.services.insert(service.name.clone());
            scope.addresses.extend(local_endpoints(world, service, of));
        }
    }
    for one in ports {
        scope.ports.insert((one.proto, port));
        for claim in &one.claims {
            if claim.kind != Kind::HostPort && claim.kind != Kind::Listener {
                let name = claim.who.split(' ').next().unwrap_or_default();
                scope.services.extend(diagnose::service_of(name));
            }
            if let Some(to) = claim.to {
                scope.addresses.insert(to.ip());
                scope.pods.extend(world.facts.pod_at(to.ip()).map(|pod| pod.name.clone()));
            }
        }
    }
    scope
}

fn scope_of_service(world: &World<'_>, service: &Service) -> Scope {
    let mut scope = Scope::default();
    scope.services.insert(service.name.clone());
    for port in &service.ports {
        scope.ports.extend(port.node_port.map(|number| (port.proto, number)));
        scope.addresses.extend(local_endpoints(world, service, port));
    }
    scope
}

/// Addresses of a Service port's endpoints on this node.
fn local_endpoints(world: &World<'_>, service: &Service, port: &ServicePort) -> Vec<IpAddr> {
    let endpoints = diagnose::endpoints(world, service, port).into_iter();
    endpoints.filter(|(_, endpoint)| endpoint.node == world.facts.state.name).map(|(at, _)| at.ip()).collect()
}

fn scope_of_pod(world: &World<'_>, pod: &Pod) -> Scope {
    let mut scope = Scope { addresses: pod.ips.iter().copied().collect(), ..Scope::default() };
    scope.pods.insert(pod.name.clone());
    scope.services.extend(map::services_of(world, &pod.ips).into_iter().map(|(service, _, _)| service.name.clone()));
    for port in pod.containers.iter().flat_map(|container| &container.ports) {
        scope.ports.extend(port.host_port.map(|number| (port.proto, number)));
    }
    scope
}

fn find_service<'f>(world: &World<'f>, name: &ObjectName) -> Result<&'f Service, String> {
    let services = world.facts.cluster.services.get().map_err(|why| format!("cannot explain Service {name}: {why}"))?;
    services.iter().find(|service| service.name == *name).ok_or_else(|| {
        let mut near: Vec<String> = services
            .iter()
            .filter(|service| service.name.name == name.name)
            .map(|service| service.name.to_string())
            .collect();
        near.sort();
        match near.first() {
            Some(near) => {
                format!("there is no Service {name}, but {near} (-n {})", near.split('/').next().unwrap_or_default())
            }
            None => format!("there is no Service {name} among the {} that are known", services.len()),
        }
    })
}

/// The pod with this name; where there is none, the only one whose name goes on after it (`frontend` for
/// `frontend-5b79c8694b-6hjrc`).
pub(crate) fn find_pod<'f>(world: &World<'f>, name: &ObjectName) -> Result<&'f Pod, String> {
    let pods = world.facts.cluster.pods.get().map_err(|why| format!("cannot explain pod {name}: {why}"))?;
    if let Some(pod) = pods.iter().find(|pod| pod.name == *name) {
        return Ok(pod);
    }
    let begins = format!("{}-", name.name);
    let longer: Vec<&Pod> =
        pods.iter().filter(|pod| pod.name.namespace == name.namespace && pod.name.name.starts_with(&begins)).collect();
    // One that runs here is meant before those of other nodes.
    let here: Vec<&Pod> = longer.iter().copied().filter(|pod| pod.node == world.facts.state.name).collect();
    if let [only] = here.as_slice() {
        return Ok(only);
    }
    if let ([], [only]) = (here.as_slice(), longer.as_slice()) {
        return Ok(only);
    }
    let near = pods.iter().filter(|pod| pod.name.name == name.name).map(|pod| &pod.name);
    let of_node = world.facts.cluster.pods_of.as_deref().map_or_else(String::new, |node| format!(" of node {node}"));
    let none = format!("there is no pod {name} among the {}{of_node} that are known", pods.len());
    let mut others: Vec<String> = longer.iter().map(|pod| pod.name.name.clone()).collect();
    others.sort();
    Err(match (others.as_slice(), near.min()) {
        ([], None) => none,
        ([], Some(near)) => format!("there is no pod {name}, but {near} (-n {})", near.namespace),
        (several, _) => format!("there is no pod {name}; say one of {}", first(several)),
    })
}

/// `a, b and 3 more`.
fn first(names: &[String]) -> String {
    const MOST: usize = 6;
    let shown = names.iter().take(MOST).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > MOST { format!("{shown} and {} more", names.len() - MOST) } else { shown }
}

fn verdict(world: &World<'_>, subject: &Subject, ports: &[Port], maps: &[PortMap], report: &Report) -> Vec<Line> {
    let node = world.facts.state.name.as_deref().unwrap_or("this node");
    let mut lines: Vec<Line> = ports.iter().map(|port| line(port, node, report)).collect();
    match subject {
        // On an address of its own it is somebody's; on the node it is nobody's.
        Subject::Port { port, proto } if ports.iter().all(|one| one.address.is_some()) => {
            lines.extend(hints::unclaimed(world, *port, *proto, node));
        }
        Subject::Service(name) if lines.is_empty() => lines.extend(cluster_only(world, name, report)),
        Subject::Pod(name) if lines.is_empty() => {
            let count = maps.first().map_or(0, |map| map.words.len());
            let sentence = format!("pod {name} has no port on {node} itself; {count} facts of its ports are below");
            lines.push(plain(report, Outcome::Unknown, sentence));
        }
        _ => {}
    }
    lines
}

/// A Service without ports on the node: what a client on this node meets at its ClusterIP.
fn cluster_only(world: &World<'_>, name: &ObjectName, report: &Report) -> Option<Line> {
    let service = find_service(world, name).ok()?;
    let (Some(address), Some(port)) = (service.cluster_ips.first(), service.ports.first()) else {
        let sentence = format!("Service {name} is headless: it has no address, clients get those of its pods from DNS");
        return Some(plain(report, Outcome::Unknown, sentence));
    };
    let client = world.node_address(Family::of(*address))?;
    let reach = reach::reach(world, port.proto, client, *address, port.port);
    let at = std::net::SocketAddr::new(*address, port.port);
    let node_port = service.ports.iter().find_map(|port| port.node_port);
    let on_nodes = match node_port {
        None => "has no port on nodes".to_owned(),
        Some(number) => Server::of(&world.facts.state, number).of_node_port(&format!("is NodePort {number}"), ""),
    };
    let sentence = format!("Service {name} {on_nodes}; from this node to {at}: {}", reach.reason);
    Some(plain(report, reach.outcome, sentence))
}

fn plain(report: &Report, outcome: Outcome, sentence: String) -> Line {
    let worst = report.findings.iter().find(|finding| finding.severity == Severity::Error && !finding.about.node);
    let failing = worst.filter(|_| outcome != Outcome::Works);
    let sentence = failing.map_or_else(|| sentence.clone(), |finding| format!("{sentence}; {}", finding.sentence));
    Line { outcome, sentence, change: failing.map(|finding| finding.change.clone()) }
}

/// `tcp 9088 on worker3 is hostPort of pod default/frontend-a, and …`.
fn line(port: &Port, node: &str, report: &Report) -> Line {
    let place = match port.address {
        Some(address) => format!("{address}:{}/{}", port.port, port.proto),
        None => format!("{} {} on {node}", port.proto, port.port),
    };
    let mut owners: Vec<String> = Vec::new();
    for owner in port.claims.iter().map(claim) {
        if !owners.contains(&owner) {
            owners.push(owner);
        }
    }
    let owners = owners.join(", and ");
    let concerns = |finding: &&Finding| {
        finding.severity != Severity::Note && finding.about.ports.contains(&(port.proto, port.port))
    };
    let worst = report.findings.iter().find(concerns);
    let broken = worst.filter(|finding| {
        matches!(finding.id, "no-listener" | "listens-on-loopback-only") && port.outside.outcome == Outcome::Refused
    });
    let sentence = match broken {
        // The finding says it all: who leads where, and what listens instead.
        Some(finding) => {
            let rest = finding.sentence.split_once(" leads to ").map_or(finding.sentence.as_str(), |(_, rest)| rest);
            format!("{place} is {owners}, and leads to {rest}")
        }
        None => format!("{place} is {owners}: {}", port.outside.reason),
    };
    let change = worst
        .filter(|_| port.outside.outcome != Outcome::Works || port.claims.len() > 1)
        .map(|finding| finding.change.clone());
    Line { outcome: port.outside.outcome, sentence, change }
}

fn claim(claim: &PortClaim) -> String {
    let only = claim.only.map_or_else(String::new, |only| format!(" (on {only} only)"));
    match claim.kind {
        Kind::HostPort => format!("hostPort of pod {}{only}", claim.who),
        Kind::NodePort => format!("NodePort of Service {}", claim.who),
        Kind::ExternalIp => format!("externalIP of Service {}", claim.who),
        Kind::LoadBalancer => format!("load balancer's address of Service {}", claim.who),
        Kind::External => format!("external address of Service {}", claim.who),
        Kind::Refused => format!("refused by kube-proxy ({})", claim.who),
        Kind::Listener => format!("listened on by {}{only}", claim.who),
    }
}

/// Predicted paths: from outside to each port; for a Service without one, from this node to its ClusterIP.
fn paths(world: &World<'_>, subject: &Subject, ports: &[Port], client: Option<IpAddr>) -> Vec<Path> {
    let mut paths = Vec::new();
    let mut add = |title: String, proto, src, dst, port| {
        let trace = world.trace(proto, src, dst, port);
        paths.push(Path { title, reach: reach::of_trace(world, &trace), trace });
    };
    for port in ports.iter().take(4) {
        let family = port.claims.iter().flat_map(|claim| claim.families.first()).min().copied().unwrap_or(Family::V4);
        let only = port.claims.first().and_then(|claim| claim.only).filter(|_| port.claims.len() == 1);
        let Some(dst) = port.address.or(only).or_else(|| world.node_address(family)) else { continue };
        if dst.is_loopback() {
            add(
                format!("from this node to {}", std::net::SocketAddr::new(dst, port.port)),
                port.proto,
                dst,
                dst,
                port.port,
            );
            continue;
        }
        let src = client
            .filter(|client| Family::of(*client) == Family::of(dst))
            .unwrap_or_else(|| World::outsider(Family::of(dst)));
        let who = if client == Some(src) { src.to_string() } else { "outside".to_owned() };
        add(format!("from {who} to {}", std::net::SocketAddr::new(dst, port.port)), port.proto, src, dst, port.port);
    }
    if let (Subject::Service(name), true) = (subject, ports.is_empty())
        && let Ok(service) = find_service(world, name)
    {
        for (address, port) in service.cluster_ips.iter().zip(service.ports.iter().cycle()).take(2) {
            let Some(src) = world.node_address(Family::of(*address)) else { continue };
            add(
                format!("from this node to {}", std::net::SocketAddr::new(*address, port.port)),
                port.proto,
                src,
                *address,
                port.port,
            );
        }
    }
    paths
}

/// Whether a claim gets the connections, in a word.
pub const fn wins(wins: Wins) -> &'static str {
    match wins {
        Wins::Yes => "wins",
        Wins::No => "loses",
        Wins::Partly => "wins in part",
        Wins::Unasked => "",
    }
}
