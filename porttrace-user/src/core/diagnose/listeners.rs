//! Whether somebody listens where hostPorts and Services lead.

use super::services::endpoints;
use super::{Checked, Evidence, Finding, Scene, Severity, either};
use crate::core::kube::owners::ClaimKind;
use crate::core::model::cluster::{ObjectName, Pod};
use crate::core::model::flow::Proto;
use crate::core::model::pods::PodSockets;
use crate::core::model::state::Socket;
use crate::core::model::trace::RuleRef;
use crate::core::world::World;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// Who sends packets to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum By {
    HostPort(u16),
    Service { name: ObjectName, port: String, target: String },
}

/// What leads where: the endpoints of a hostPort (one a family), or of a port of a Service.
type Targets = BTreeMap<(Proto, By), (Vec<SocketAddr>, Option<RuleRef>)>;

/// A hostPort or Service leads to a port where nothing listens.
pub(super) fn no_listener(scene: &Scene<'_, '_>) -> Checked {
    let sockets = scene.world.facts.listeners.get()?;
    let dead = |proto, at: &SocketAddr| {
        sockets.listens(proto, at.ip(), at.port()) == Some(false)
            && !sockets.only_on_loopback(proto, at.ip(), at.port())
    };
    Ok(failing(scene, dead, |proto, by, at, count| silent(scene.world, sockets, proto, by, at, count)))
}

/// The socket is there, but bound to 127.0.0.1.
pub(super) fn loopback_only(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let sockets = world.facts.listeners.get()?;
    let alone = |proto, at: &SocketAddr| sockets.only_on_loopback(proto, at.ip(), at.port());
    Ok(failing(scene, alone, |proto, by, at, _| {
        let whom = whom(world, at.ip());
        let sentence = format!(
            "{} leads to {proto} port {} of {whom}, where the process listens on 127.0.0.1 only: nobody outside the pod can reach it",
            way(by),
            at.port()
        );
        let change = format!("make the process in {whom} listen on 0.0.0.0 (or ::) instead of 127.0.0.1");
        let cause = format!("the process behind {whom} listens on 127.0.0.1:{} only", at.port());
        Finding::new(Severity::Error, sentence, change).because(cause)
    }))
}

/// Makes a finding for each hostPort or Service port of which an endpoint fails; `make` gets the first that does, and how
/// many do.
fn failing(
    scene: &Scene<'_, '_>,
    fails: impl Fn(Proto, &SocketAddr) -> bool,
    make: impl Fn(Proto, &By, SocketAddr, usize) -> Finding,
) -> Vec<Finding> {
    let world = scene.world;
    let mut found = Vec::new();
    for ((proto, by), (endpoints, rule)) in targets(scene) {
        let failing: Vec<SocketAddr> = endpoints.into_iter().filter(|at| fails(proto, at)).collect();
        // Endpoints of both families are one pod's.
        let of_one_family =
            failing.iter().filter(|at| at.is_ipv4()).count().max(failing.iter().filter(|at| at.is_ipv6()).count());
        let here = failing.iter().find(|at| world.behind(at.ip()).is_some());
        let Some(first) = here.or_else(|| failing.first()).copied() else { continue };
        let rule = rule.iter().map(|rule| Evidence::rule(world, rule));
        let finding = make(proto, &by, first, of_one_family).with(rule).with(evidence(world, proto, first.ip(), &by));
        let finding = match &by {
            By::HostPort(port) => finding.port(proto, *port),
            By::Service { name, .. } => finding.service(name),
        };
        let finding = failing.iter().fold(finding, |finding, at| {
            finding.pod(world.facts.pod_at(at.ip()).map(|pod| &pod.name)).address(at.ip()).end(*at)
        });
        found.push(finding);
    }
    found
}

/// Everything that leads to an endpoint: portmap's rules, and the Services' EndpointSlices.
fn targets(scene: &Scene<'_, '_>) -> Targets {
    let mut targets = Targets::new();
    // Claims that are told together (IPv4 and IPv6 of one pod) have an endpoint each.
    for claim in scene.world.owners.all() {
        if let ClaimKind::HostPort { to, .. } = &claim.kind {
            let entry = targets.entry((claim.proto, By::HostPort(claim.port))).or_default();
            if !entry.0.contains(to) {
                entry.0.push(*to);
            }
            entry.1 = entry.1.take().or_else(|| claim.rule.clone());
        }
    }
    if scene.world.facts.cluster.services.known().is_none() || scene.world.facts.cluster.slices.known().is_none() {
        by_rules(scene, &mut targets);
        return targets;
    }
    for service in scene.services() {
        for port in &service.ports {
            let by =
                By::Service { name: service.name.clone(), port: port.name.clone(), target: port.target.to_string() };
            let ready = endpoints(scene.world, service, port).into_iter().filter(|(_, endpoint)| endpoint.ready);
            let ready: Vec<SocketAddr> = ready.map(|(at, _)| at).collect();
            if !ready.is_empty() {
                targets.entry((port.proto, by)).or_default().0.extend(ready);
            }
        }
    }
    targets
}

/// Without the API, kube-proxy's rules tell where Services lead.
fn by_rules(scene: &Scene<'_, '_>, targets: &mut Targets) {
    for (proto, at, service) in scene.world.owners.endpoints() {
        let Some(name) = super::service_of(service) else { continue };
        if scene.only.as_ref().is_some_and(|only| !only.contains(&name)) {
            continue;
        }
        let port = service.split_once(':').map_or_else(String::new, |(_, port)| port.to_owned());
        let by = By::Service { name, port, target: at.port().to_string() };
        targets.entry((proto, by)).or_default().0.push(at);
    }
}

fn silent(world: &World<'_>, sockets: &PodSockets, proto: Proto, by: &By, at: SocketAddr, count: usize) -> Finding {
    let whom = whom(world, at.ip());
    let others: Vec<u16> = sockets.ports(proto, at.ip()).unwrap_or_default().iter().map(|(port, _)| *port).collect();
    let exposed = exposed(world, at.ip(), proto);
    let image = match exposed.as_slice() {
        [] => String::new(),
        ports => format!(
            " (the image exposes {})",
            ports.iter().map(|port| format!("{port}/{proto}")).collect::<Vec<_>>().join(", ")
        ),
    };
    let listens = match others.as_slice() {
        [] => format!("no process there listens on any {proto} port{image}"),
        ports => format!("it listens on {}{image}", either(ports)),
    };
    let more = if count > 1 { format!("; {} more of its endpoints are like this", count - 1) } else { String::new() };
    let sentence =
        format!("{} leads to {proto} port {} of {whom}, where nothing listens; {listens}{more}", way(by), at.port());
    let place = if whom.starts_with("pod ") { format!("in {whom}") } else { format!("at {whom}") };
    let cause = match others.as_slice() {
        [] => format!("nothing listens on any {proto} port {place}{image}"),
        ports => {
            let image = image.trim_start_matches(" (").trim_end_matches(')');
            let image = if image.is_empty() { String::new() } else { format!("; {image}") };
            format!("nothing listens on {} {place} (it listens on {}{image})", at.port(), either(ports))
        }
    };
    Finding::new(Severity::Error, sentence, change(world, at, &whom, by, &best(&others, &exposed))).because(cause)
}

/// The ports that are meant, most likely: those that both listen and are exposed, where there are such.
fn best(listening: &[u16], exposed: &[u16]) -> Vec<u16> {
    let both: Vec<u16> = listening.iter().copied().filter(|port| exposed.contains(port)).collect();
    if both.is_empty() { listening.to_vec() } else { both }
}

fn change(world: &World<'_>, at: SocketAddr, whom: &str, by: &By, ports: &[u16]) -> String {
    if ports.is_empty() {
        return format!("start the server in {whom}, or make it listen on port {}", at.port());
    }
    let to = either(ports);
    match by {
        By::HostPort(port) => {
            let container =
                container(world, at, *port).map_or_else(String::new, |name| format!(" of container {name}"));
            format!("set containerPort {} (hostPort {port}){container} in {whom} to {to}", at.port())
        }
        By::Service { name, port, .. } => {
            let port = if port.is_empty() { String::new() } else { format!(" of port {port}") };
            format!("set targetPort{port} in Service {name} to {to}")
        }
    }
}

/// The container whose port it is.
fn container<'f>(world: &World<'f>, at: SocketAddr, host_port: u16) -> Option<&'f str> {
    let pod: &'f Pod = world.facts.pod_at(at.ip())?;
    let has = |name: &&crate::core::model::cluster::PodContainer| {
        name.ports.iter().any(|port| port.host_port == Some(host_port) && port.port == at.port())
    };
    pod.containers.iter().find(has).map(|container| container.name.as_str())
}

/// Ports that the images of the pod expose.
pub(crate) fn exposed(world: &World<'_>, address: IpAddr, proto: Proto) -> Vec<u16> {
    let Some(sandbox) = world.facts.sandbox_at(address) else { return Vec::new() };
    let all = sandbox.containers.iter().flat_map(|container| container.exposed.iter().flatten());
    let mut ports: Vec<u16> = all.filter(|exposed| exposed.proto == proto).map(|exposed| exposed.port).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn whom(world: &World<'_>, address: IpAddr) -> String {
    match world.facts.name_at(address) {
        Some(name) => format!("pod {name}"),
        None => address.to_string(),
    }
}

/// `hostPort 9088`, `Service default/wrong-target:p80 (targetPort 8081)`.
fn way(by: &By) -> String {
    match by {
        By::HostPort(port) => format!("hostPort {port}"),
        By::Service { name, port, target } if port.is_empty() => format!("Service {name} (targetPort {target})"),
        By::Service { name, port, target } => format!("Service {name}:{port} (targetPort {target})"),
    }
}

fn evidence(world: &World<'_>, proto: Proto, address: IpAddr, by: &By) -> Vec<Evidence> {
    let mut evidence: Vec<Evidence> = Vec::new();
    if let By::Service { name, target, .. } = by {
        evidence.push(Evidence::new("object", format!("Service {name}"), format!("targetPort {target}")));
    }
    let whom = whom(world, address);
    let sockets = world.facts.listeners.known().and_then(|all| all.sockets(address)).unwrap_or_default();
    let sockets: Vec<&Socket> = sockets.iter().filter(|socket| socket.proto == proto).collect();
    evidence.extend(sockets.iter().map(|socket| Evidence::new("socket", whom.clone(), written(socket))));
    if sockets.is_empty() {
        evidence.push(Evidence::new("socket", whom, format!("no {proto} socket waits there")));
    }
    evidence
}

/// `tcp *:80 (nginx/42)`.
pub(crate) fn written(socket: &Socket) -> String {
    let process = socket.process.as_deref().map_or_else(String::new, |process| format!(" ({process})"));
    let address = match socket.address {
        IpAddr::V6(any) if any.is_unspecified() && !socket.v6only => "*".to_owned(),
        IpAddr::V6(address) => format!("[{address}]"),
        IpAddr::V4(address) => address.to_string(),
    };
    format!("{} {address}:{}{process}", socket.proto, socket.port)
}
