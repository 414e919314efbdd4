//! Whether somebody listens where hostPorts and Services lead.

use super::{Checked, Evidence, Finding, Scene, Severity, either};
use crate::core::model::cluster::{ObjectName, Pod};
use crate::core::model::flow::Proto;
use crate::core::model::pods::PodSockets;
use crate::core::model::state::Socket;
use crate::core::model::trace::RuleRef;
use crate::core::ports::Kind;
use crate::core::world::World;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// Who sends packets to an endpoint.
enum By {
    HostPort(u16, Option<RuleRef>),
    Service { name: ObjectName, port: String, target: String },
}

type Targets = BTreeMap<(Proto, SocketAddr), Vec<By>>;

/// A hostPort or Service leads to a port where nothing listens.
pub(super) fn no_listener(scene: &Scene<'_, '_>) -> Checked {
    let sockets = scene.world.facts.listeners.get()?;
    let dead = |proto, at: SocketAddr| {
        sockets.listens(proto, at.ip(), at.port()) == Some(false)
            && !sockets.only_on_loopback(proto, at.ip(), at.port())
    };
    let targets = targets(scene);
    let found = targets.iter().filter(|((proto, at), _)| dead(*proto, *at));
    Ok(found.map(|((proto, at), by)| silent(scene.world, sockets, *proto, *at, by)).collect())
}

/// The socket is there, but bound to 127.0.0.1.
pub(super) fn loopback_only(scene: &Scene<'_, '_>) -> Checked {
    let sockets = scene.world.facts.listeners.get()?;
    let targets = targets(scene);
    let found = targets.iter().filter(|((proto, at), _)| sockets.only_on_loopback(*proto, at.ip(), at.port()));
    Ok(found
        .map(|((proto, at), by)| {
            let whom = whom(scene.world, at.ip());
            let sentence = format!(
                "{} leads to {proto} port {} of {whom}, where the process listens on 127.0.0.1 only: nobody outside the pod can reach it",
                ways(by),
                at.port()
            );
            let change = format!("make the process in {whom} listen on 0.0.0.0 (or ::) instead of 127.0.0.1");
            let evidence = evidence(scene.world, sockets, *proto, at.ip(), by);
            about(Finding::new(Severity::Error, sentence, change).with(evidence), scene.world, *proto, *at, by)
        })
        .collect())
}

/// Everything that leads to an endpoint: portmap's rules, and the Services' EndpointSlices or, without them, their rules.
fn targets(scene: &Scene<'_, '_>) -> Targets {
    let mut targets = Targets::new();
    for port in &scene.samples.ports {
        for claim in port.claims.iter().filter(|claim| claim.kind == Kind::HostPort) {
            if let Some(to) = claim.to {
                targets.entry((port.proto, to)).or_default().push(By::HostPort(port.port, claim.rule.clone()));
            }
        }
    }
    let cluster = &scene.world.facts.cluster;
    for slice in &cluster.slices {
        let Some(service) = slice.service.as_deref() else { continue };
        let name = ObjectName { namespace: slice.name.namespace.clone(), name: service.to_owned() };
        let spec = scene.world.facts.service(&name.namespace, &name.name);
        for port in &slice.ports {
            let Some(number) = port.port else { continue };
            let target = spec.and_then(|spec| spec.ports.iter().find(|one| one.name == port.name));
            let target = target.map_or_else(|| number.to_string(), |one| one.target.to_string());
            for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.ready) {
                for address in &endpoint.addresses {
                    let by = By::Service { name: name.clone(), port: port.name.clone(), target: target.clone() };
                    targets.entry((port.proto, SocketAddr::new(*address, number))).or_default().push(by);
                }
            }
        }
    }
    targets
}

fn silent(world: &World<'_>, sockets: &PodSockets, proto: Proto, at: SocketAddr, by: &[By]) -> Finding {
    let whom = whom(world, at.ip());
    let others: Vec<u16> = sockets.ports(proto, at.ip()).unwrap_or_default().iter().map(|(port, _)| *port).collect();
    let exposed = exposed(world, at.ip(), proto);
    let image = match exposed.as_slice() {
        [] => String::new(),
        ports => format!(" (the image exposes {})", either(ports)),
    };
    let listens = match others.as_slice() {
        [] => format!("nothing listens on any {proto} port there"),
        ports => format!("it listens on {}", either(ports)),
    };
    let sentence =
        format!("{} leads to {proto} port {} of {whom}, where nothing listens; {listens}{image}", ways(by), at.port());
    let change = change(world, at, &whom, by, &best(&others, &exposed));
    let evidence = evidence(world, sockets, proto, at.ip(), by);
    about(Finding::new(Severity::Error, sentence, change).with(evidence), world, proto, at, by)
}

/// The ports that are meant, most likely: those that both listen and are exposed, where there are such.
fn best(listening: &[u16], exposed: &[u16]) -> Vec<u16> {
    let both: Vec<u16> = listening.iter().copied().filter(|port| exposed.contains(port)).collect();
    if both.is_empty() { listening.to_vec() } else { both }
}

fn change(world: &World<'_>, at: SocketAddr, whom: &str, by: &[By], ports: &[u16]) -> String {
    if ports.is_empty() {
        return format!("start the server in {whom}, or make it listen on port {}", at.port());
    }
    let to = either(ports);
    let each: Vec<String> = by
        .iter()
        .map(|by| match by {
            By::HostPort(port, _) => {
                let container =
                    container(world, at, *port).map_or_else(String::new, |name| format!(" of container {name}"));
                format!("set containerPort (beside hostPort {port}){container} in {whom} to {to}")
            }
            By::Service { name, port, .. } => {
                let port = if port.is_empty() { String::new() } else { format!(" of port {port}") };
                format!("set targetPort{port} in Service {name} to {to}")
            }
        })
        .collect();
    format!("{}; or make the process listen on {}", each.join(", and "), at.port())
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

/// `hostPort 9088`, `Service default/wrong-target (targetPort 8081)`.
fn ways(by: &[By]) -> String {
    let mut each: Vec<String> = by
        .iter()
        .map(|by| match by {
            By::HostPort(port, _) => format!("hostPort {port}"),
            By::Service { name, port, target } if port.is_empty() => format!("Service {name} (targetPort {target})"),
            By::Service { name, port, target } => format!("Service {name}:{port} (targetPort {target})"),
        })
        .collect();
    each.sort();
    each.dedup();
    each.join(" and ")
}

fn evidence(world: &World<'_>, sockets: &PodSockets, proto: Proto, address: IpAddr, by: &[By]) -> Vec<Evidence> {
    let mut evidence: Vec<Evidence> = Vec::new();
    for by in by {
        match by {
            By::HostPort(_, Some(rule)) => evidence.push(Evidence::rule(world, rule)),
            By::HostPort(..) => {}
            By::Service { name, target, .. } => {
                evidence.push(Evidence::new("object", format!("Service {name}"), format!("targetPort {target}")));
            }
        }
    }
    let whom = whom(world, address);
    let sockets = sockets.sockets(address).unwrap_or_default().iter().filter(|socket| socket.proto == proto);
    let before = evidence.len();
    evidence.extend(sockets.map(|socket| Evidence::new("socket", whom.clone(), written(socket))));
    if evidence.len() == before {
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

fn about(mut finding: Finding, world: &World<'_>, proto: Proto, at: SocketAddr, by: &[By]) -> Finding {
    for by in by {
        finding = match by {
            By::HostPort(port, _) => finding.port(proto, *port),
            By::Service { name, .. } => finding.service(name),
        };
    }
    finding.pod(world.facts.pod_at(at.ip()).map(|pod| &pod.name)).address(at.ip())
}
