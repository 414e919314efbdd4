//! The port map: each of Kubernetes' words for a port, its number here, where that comes from, and whether it agrees.

use super::Subject;
use crate::core::diagnose::{endpoints, place, port_name, written};
use crate::core::model::cluster::{ObjectName, Service, ServicePort};
use crate::core::model::flow::Proto;
use crate::core::ports::{Kind, Port};
use crate::core::world::World;
use serde::Serialize;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// The numbers of one workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortMap {
    /// `pod default/frontend-a (10.244.1.9)`.
    pub title: String,
    pub words: Vec<Word>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Word {
    /// `containerPort`, `hostPort`, `Service port`, `targetPort`, `NodePort`, `ExposedPorts`, `listening`, …
    pub word: &'static str,
    pub value: String,
    /// Where the value comes from.
    pub source: String,
    /// Whether it agrees with what listens; `None` where nothing tells, or nothing has to agree.
    pub agrees: Option<bool>,
    /// What disagrees.
    pub note: String,
}

impl Word {
    fn new(word: &'static str, value: impl Into<String>, source: impl Into<String>) -> Self {
        Self { word, value: value.into(), source: source.into(), agrees: None, note: String::new() }
    }

    fn judged(mut self, listens: Option<bool>) -> Self {
        self.agrees = listens;
        self.note = match listens {
            Some(true) => "listens".to_owned(),
            Some(false) => "nothing listens there".to_owned(),
            None => String::new(),
        };
        self
    }
}

/// So many pods of a Service get a map of their own.
const PODS: usize = 3;

/// Which of the Services that lead to a pod its map tells of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Among {
    Each,
    /// One for each port that they lead to.
    Alike,
    /// None: a Service was asked for, and has a map of its own.
    None,
}

/// The maps of a subject.
pub(super) fn maps(world: &World<'_>, subject: &Subject, ports: &[Port]) -> Vec<PortMap> {
    let mut services: BTreeSet<ObjectName> = BTreeSet::new();
    let mut pods: Vec<Vec<IpAddr>> = Vec::new();
    let mut add_pod = |address: IpAddr| {
        // Of an address that nothing is known of, a map would tell nothing.
        let seen = world.facts.listeners.known().is_some_and(|all| all.sockets(address).is_some());
        if world.facts.name_at(address).is_none() && !seen && world.behind(address).is_none() {
            return;
        }
        let first = world.facts.listeners.known().map_or(address, |pods| pods.first(address));
        let ips = world.facts.pod_at(address).map_or_else(|| vec![first], |pod| pod.ips.clone());
        if !pods.contains(&ips) {
            pods.push(ips);
        }
    };
    if let Subject::Pod(name) = subject
        && let Some(pod) = world.facts.cluster.pods.iter().find(|pod| pod.name == *name)
    {
        pods.push(pod.ips.clone());
    } else {
        match subject {
            Subject::Service(name) => services.extend([name.clone()]),
            Subject::Port { port, proto } if ports.is_empty() => {
                services.extend(world.with_node_port(*port, *proto).map(|(service, _)| service.name.clone()));
            }
            _ => {}
        }
        for claim in ports.iter().flat_map(|port| &port.claims) {
            match claim.to {
                Some(to) => add_pod(to.ip()),
                None if claim.kind != Kind::Listener => {
                    services.extend(super::diagnose::service_of(claim.who.split(' ').next().unwrap_or_default()))
                }
                None => {}
            }
        }
        for service in services.iter().filter_map(|name| world.facts.service(&name.namespace, &name.name)) {
            let local = service.ports.iter().flat_map(|port| endpoints(world, service, port));
            let local: Vec<IpAddr> =
                local.filter(|(at, _)| world.behind(at.ip()).is_some()).map(|(at, _)| at.ip()).collect();
            local.into_iter().take(PODS).for_each(&mut add_pod);
        }
    }
    let among = match subject {
        Subject::Pod(_) => Among::Each,
        _ if services.is_empty() => Among::Alike,
        _ => Among::None,
    };
    let services = services.iter().filter_map(|name| world.facts.service(&name.namespace, &name.name));
    let services = services.map(|service| service_map(world, service));
    services.chain(pods.iter().take(PODS + 1).map(|ips| pod_map(world, ips, among))).collect()
}

/// Services that lead to one of these addresses, with the port and the endpoint.
pub(super) fn services_of<'f>(world: &World<'f>, ips: &[IpAddr]) -> Vec<(&'f Service, &'f ServicePort, SocketAddr)> {
    let mut found = Vec::new();
    for service in &world.facts.cluster.services {
        for port in &service.ports {
            let at = endpoints(world, service, port).into_iter().find(|(at, _)| ips.contains(&at.ip()));
            found.extend(at.map(|(at, _)| (service, port, at)));
        }
    }
    found
}

fn listens(world: &World<'_>, proto: Proto, address: IpAddr, port: u16) -> Option<bool> {
    world.facts.listeners.known()?.listens(proto, address, port)
}

fn service_map(world: &World<'_>, service: &Service) -> PortMap {
    let mut words = Vec::new();
    let spec = if world.facts.derived.is_some() { "kube-proxy's rules" } else { "Service" };
    for port in &service.ports {
        let name = if port.name.is_empty() { String::new() } else { format!(" ({})", port.name) };
        if let Some(number) = port.node_port {
            words.push(Word::new("NodePort", format!("{number}/{}", port.proto), format!("{spec}: on every node")));
        }
        let at: Vec<String> = service.cluster_ips.iter().map(ToString::to_string).collect();
        let on = if at.is_empty() {
            "headless, on its pods' own addresses".to_owned()
        } else {
            format!("on {}", at.join(", "))
        };
        words.push(Word::new("Service port", format!("{}/{}{name}", port.port, port.proto), format!("{spec}: {on}")));
        words.push(target(world, service, port));
    }
    for address in &service.external_ips {
        words.push(Word::new("externalIP", address.to_string(), spec));
    }
    for ingress in &service.ingress {
        let source = if ingress.proxied {
            "Service status (ipMode Proxy: kube-proxy leaves it alone)"
        } else {
            "Service status"
        };
        words.push(Word::new("LoadBalancer", ingress.ip.to_string(), source));
    }
    for (set, name) in
        [(service.external_local, "externalTrafficPolicy"), (service.internal_local, "internalTrafficPolicy")]
    {
        if set {
            words.push(Word::new(name, "Local", "Service: endpoints of this node only"));
        }
    }
    if let Some(seconds) = service.affinity {
        words.push(Word::new("sessionAffinity", format!("{seconds} s"), "Service: a client stays with its endpoint"));
    }
    PortMap { title: format!("Service {}", service.name), words }
}

fn target(world: &World<'_>, service: &Service, port: &ServicePort) -> Word {
    let endpoints = endpoints(world, service, port);
    let ready = endpoints.iter().filter(|(_, endpoint)| endpoint.ready).count();
    let here = endpoints
        .iter()
        .filter(|(_, endpoint)| endpoint.node.is_some() && endpoint.node == world.facts.state.name)
        .count();
    let known = world.facts.cluster.slices.known().is_some();
    let rules = world.owners.endpoints_of(port.proto, &port_name(service, port)).len();
    let source = if known {
        format!("{ready} of {} endpoints ready, {here} on this node", endpoints.len())
    } else {
        format!("the rules lead to {rules} endpoints")
    };
    let each: Vec<Option<bool>> =
        endpoints.iter().map(|(at, _)| listens(world, port.proto, at.ip(), at.port())).collect();
    let mut word = Word::new("targetPort", port.target.to_string(), source);
    if each.contains(&Some(false)) {
        word = word.judged(Some(false));
    } else if !each.is_empty() && each.iter().all(|one| *one == Some(true)) {
        word = word.judged(Some(true));
    } else if known && ready == 0 {
        word.agrees = Some(false);
        word.note = "no ready endpoint".to_owned();
    }
    word
}

fn pod_map(world: &World<'_>, ips: &[IpAddr], among: Among) -> PortMap {
    let address = ips.iter().copied().find(IpAddr::is_ipv4).or_else(|| ips.first().copied());
    let Some(address) = address else {
        return PortMap { title: "pod without an address".to_owned(), words: Vec::new() };
    };
    let pod = world.facts.pod_at(address);
    let name = world.facts.name_at(address);
    let title = name.map_or_else(|| format!("whoever has {address}"), |name| format!("pod {name} ({address})"));
    let mut words = host_ports(world, address);
    for container in pod.into_iter().flat_map(|pod| &pod.containers) {
        for port in container.ports.iter().filter(|port| port.host_port.is_none()) {
            let name = if port.name.is_empty() { String::new() } else { format!(" ({})", port.name) };
            let word = Word::new(
                "containerPort",
                format!("{}/{}{name}", port.port, port.proto),
                format!("pod spec, container {}", container.name),
            );
            words.push(word.judged(listens(world, port.proto, address, port.port)));
        }
    }
    words.extend(targets(world, ips, pod.map_or("", |pod| &pod.name.name), among));
    words.push(exposed(world, address));
    words.extend(listening(world, address));
    PortMap { title, words }
}

/// A port of a Service.
type ServedBy<'f> = (&'f Service, &'f ServicePort);

/// The targetPorts of Services that lead to a pod, those that fail first. Services that lead to the same port share a line, and
/// the one whose name is most like the pod's stands for them; the others are a matter of their own.
fn targets(world: &World<'_>, ips: &[IpAddr], pod: &str, among: Among) -> Vec<Word> {
    if among == Among::None {
        return Vec::new();
    }
    let mut lines: BTreeMap<(Option<bool>, String), Vec<ServedBy<'_>>> = BTreeMap::new();
    for (service, port, at) in services_of(world, ips) {
        let value = if port.target.to_string() == at.port().to_string() {
            format!("{}/{}", at.port(), port.proto)
        } else {
            format!("{} = {}/{}", port.target, at.port(), port.proto)
        };
        lines.entry((listens(world, port.proto, at.ip(), at.port()), value)).or_default().push((service, port));
    }
    let alike = |service: &Service| service.name.name.chars().zip(pod.chars()).take_while(|(a, b)| a == b).count();
    let mut words = Vec::new();
    for ((listens, value), mut services) in lines {
        services.sort_by_key(|(service, port)| (Reverse(alike(service)), &service.name, port.port));
        let shown = if among == Among::Each { services.len() } else { 1 };
        for (service, port) in services.iter().take(shown) {
            let on_nodes = port.node_port.map_or_else(String::new, |number| format!(", NodePort {number}"));
            let more = match services.len() - shown {
                0 => String::new(),
                1 => "; 1 more Service leads there".to_owned(),
                more => format!("; {more} more Services lead there"),
            };
            let source = format!("Service {}: port {}{on_nodes}{more}", service.name, port.port);
            words.push(Word::new("targetPort", value.clone(), source).judged(listens));
        }
    }
    words
}

/// hostPorts by the rules, beside what the pod's specification says.
fn host_ports(world: &World<'_>, address: IpAddr) -> Vec<Word> {
    let ports = crate::core::ports::ports(world);
    let mut words = Vec::new();
    let spec = world.facts.pod_at(address);
    let asked = |proto, number| {
        let containers = spec.into_iter().flat_map(|pod| &pod.containers);
        let mut ports = containers.flat_map(|container| container.ports.iter().map(move |port| (container, port)));
        ports.find(|(_, port)| port.proto == proto && port.host_port == Some(number))
    };
    for port in &ports {
        for claim in port.claims.iter().filter(|claim| claim.kind == Kind::HostPort) {
            let Some(to) = claim.to.filter(|to| to.ip() == address) else { continue };
            let rule = claim.rule.as_ref().map_or_else(String::new, |rule| format!("rule {}", place(rule)));
            let in_spec = asked(port.proto, port.port);
            let source = in_spec.map_or_else(
                || rule.clone(),
                |(container, _)| format!("pod spec, container {}; {rule}", container.name),
            );
            let only = claim.only.map_or_else(String::new, |only| format!(" on {only}"));
            words.push(Word::new("hostPort", format!("{}/{}{only}", port.port, port.proto), source));
            let source = match in_spec {
                Some((_, wanted)) if wanted.port == to.port() => format!("pod spec; the rule leads to {to}"),
                Some((_, wanted)) => format!("the rule leads to {to}, but the pod spec says {}", wanted.port),
                None => format!("the rule leads to {to}"),
            };
            let word = Word::new("containerPort", format!("{}/{}", to.port(), port.proto), source);
            words.push(word.judged(listens(world, port.proto, address, to.port())));
        }
    }
    for container in spec.into_iter().flat_map(|pod| &pod.containers) {
        for port in &container.ports {
            let Some(number) = port.host_port else { continue };
            let has_rule = ports.iter().any(|one| {
                one.port == number
                    && one.proto == port.proto
                    && one.claims.iter().any(|claim| claim.to.is_some_and(|to| to.ip() == address))
            });
            let here = spec.is_some_and(|pod| pod.node == world.facts.state.name && !pod.host_network);
            if !has_rule && here {
                let mut word = Word::new(
                    "hostPort",
                    format!("{number}/{}", port.proto),
                    format!("pod spec, container {}", container.name),
                );
                word.agrees = world.rules_decide().then_some(false);
                word.note = format!("{} implements it", world.no_rule());
                words.push(word);
            }
        }
    }
    words
}

fn exposed(world: &World<'_>, address: IpAddr) -> Word {
    let sandbox = match world.facts.sandboxes.get() {
        Ok(_) => world.facts.sandbox_at(address),
        Err(why) => return Word::new("ExposedPorts", "?", format!("not known: {why}")),
    };
    let Some(sandbox) = sandbox else {
        return Word::new("ExposedPorts", "?", "not known: no sandbox of the runtime has this address");
    };
    let mut all = BTreeSet::new();
    let mut images = BTreeSet::new();
    let mut known = false;
    for container in &sandbox.containers {
        if let Some(exposed) = &container.exposed {
            known = true;
            all.extend(exposed.iter().copied());
            images.insert(container.image.as_str());
        }
    }
    let shown: Vec<String> = all.iter().map(ToString::to_string).collect();
    let images: Vec<&str> = images.into_iter().collect();
    match (known, shown.is_empty()) {
        (false, _) => Word::new("ExposedPorts", "?", "not known: the image's configuration could not be read"),
        (true, true) => Word::new("ExposedPorts", "none", format!("image {}", images.join(", "))),
        (true, false) => Word::new("ExposedPorts", shown.join(", "), format!("image {}", images.join(", "))),
    }
}

fn listening(world: &World<'_>, address: IpAddr) -> Vec<Word> {
    let pods = match world.facts.listeners.get() {
        Ok(pods) => pods,
        Err(why) => return vec![Word::new("listening", "?", format!("not known: {why}"))],
    };
    match pods.sockets(address) {
        None => vec![Word::new("listening", "?", "not known: no network namespace with this address was found")],
        Some([]) => vec![Word::new("listening", "nothing", "no socket in the pod waits for connections")],
        Some(sockets) => sockets
            .iter()
            .map(|socket| {
                Word::new(
                    "listening",
                    format!("{}/{}", socket.port, socket.proto),
                    format!("socket {} in the pod", written(socket)),
                )
            })
            .collect(),
    }
}
