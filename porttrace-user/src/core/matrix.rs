//! Who can reach a workload, by which of the ways: the founding experiment, in thought.

use super::diagnose::endpoints;
use super::explain::{Subject, find_pod};
use super::model::cluster::ObjectName;
use super::model::flow::{Family, Proto};
use super::ports::{self, Kind};
use super::reach::{self, Outcome, Reach};
use super::world::World;
use serde::Serialize;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Clients in rows, ways in columns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Matrix {
    pub subject: Subject,
    pub node: Option<String>,
    pub ways: Vec<Way>,
    pub rows: Vec<Row>,
}

/// An address and port by which the workload may be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Way {
    pub kind: WayKind,
    pub proto: Proto,
    pub to: SocketAddr,
    /// `containerPort 8081`, `port of Service default/frontend`.
    pub what: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WayKind {
    Pod,
    ClusterIp,
    NodePort,
    HostPort,
    External,
    /// A process of the node.
    Process,
    Loopback,
}

impl WayKind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod IP",
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::HostPort => "hostPort",
            Self::External => "external IP",
            Self::Process => "node's process",
            Self::Loopback => "127.0.0.1",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    pub client: Client,
    /// One for each way; `None` where the way makes no sense for this client.
    pub cells: Vec<Option<Cell>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    #[serde(flatten)]
    pub reach: Reach,
    /// What became of really trying it (`--probe`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tried: Option<Tried>,
}

/// The outcome of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tried {
    pub outcome: Outcome,
    /// `connected in 0.3 ms`, `connection refused`.
    pub text: String,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientKind {
    ThisNode,
    /// This node, by a socket bound to its loopback address.
    ThisNodeLoopback,
    OtherNode,
    PodHere,
    /// The workload's own pod.
    PodItself,
    PodElsewhere,
    Outside,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Client {
    pub kind: ClientKind,
    pub address: IpAddr,
    /// Its name, where known.
    pub name: Option<String>,
}

impl ClientKind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::ThisNode => "this node",
            Self::ThisNodeLoopback => "this node, from 127.0.0.1",
            Self::OtherNode => "another node",
            Self::PodHere => "a pod here",
            Self::PodItself => "the pod itself",
            Self::PodElsewhere => "a pod elsewhere",
            Self::Outside => "outside",
        }
    }

    /// The packet starts on this node.
    pub const fn is_here(self) -> bool {
        matches!(self, Self::ThisNode | Self::ThisNodeLoopback | Self::PodHere | Self::PodItself)
    }
}

/// The matrix of a subject.
///
/// # Errors
/// One sentence when the facts do not know the subject, or no way leads to it.
pub fn matrix(world: &World<'_>, subject: Subject, outside: Option<IpAddr>) -> Result<Matrix, String> {
    let ways = ways(world, &subject)?;
    if ways.is_empty() {
        return Err(
            "no way leads there: nothing on this node claims it, and no Service or pod is known by it".to_owned()
        );
    }
    let families: BTreeSet<Family> = ways.iter().map(|way| Family::of(way.to.ip())).collect();
    let rows = families
        .into_iter()
        .flat_map(|family| clients(world, family, &ways, outside))
        .map(|client| Row { cells: ways.iter().map(|way| cell(world, &client, way)).collect(), client })
        .collect();
    Ok(Matrix { subject, node: world.facts.state.name.clone(), ways, rows })
}

/// What one client meets on one way.
pub fn cell(world: &World<'_>, client: &Client, way: &Way) -> Option<Cell> {
    let to = way.to;
    if Family::of(client.address) != Family::of(to.ip()) {
        return None;
    }
    let loopback = to.ip().is_loopback();
    if loopback && client.kind != ClientKind::ThisNode {
        return None;
    }
    // The route to 127.0.0.0/8 has 127.0.0.1 as preferred source.
    let src = match to.ip() {
        IpAddr::V4(dst) if dst.is_loopback() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(dst) if dst.is_loopback() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        _ => client.address,
    };
    let reach =
        elsewhere(world, client, way).unwrap_or_else(|| reach::reach(world, way.proto, src, to.ip(), to.port()));
    Some(Cell { reach, tried: None })
}

/// The source from which this node may really try a way: only in its own rows, and only where nothing leaves the node but for
/// a pod of its own.
pub fn probe_source(world: &World<'_>, client: &Client, way: &Way, reach: &Reach) -> Option<IpAddr> {
    let own = |address: IpAddr| world.facts.is_own(address) == Some(true) || world.behind(address).is_some();
    let stays = reach.ends.iter().all(|end| own(end.ip()));
    // Refused by a rule before it goes anywhere: the address itself must be the node's.
    // Where that is not known, it may be forwarded (IPVS, a match that nobody can decide).
    let known = !reach.ends.is_empty() || own(way.to.ip()) && reach.outcome != Outcome::Unknown;
    let ours = matches!(client.kind, ClientKind::ThisNode | ClientKind::ThisNodeLoopback);
    (ours && stays && known).then(|| if way.to.ip().is_loopback() { way.to.ip() } else { client.address })
}

/// Ways that are decided on another machine first.
fn elsewhere(world: &World<'_>, client: &Client, way: &Way) -> Option<Reach> {
    let unknown = |reason: String| Some(Reach { outcome: Outcome::Unknown, reason, rule: None, ends: Vec::new() });
    let here = world.facts.is_own(way.to.ip()) == Some(true);
    // What a pod sends to its own address never leaves it.
    if client.address == way.to.ip() && client.kind == ClientKind::PodItself {
        let whom = reach::whom(world, client.address);
        let known = reach::listening(world, way.proto, way.to.ip(), way.to.port(), &whom);
        let (outcome, reason) =
            known.unwrap_or_else(|| (Outcome::Unknown, format!("what listens in {whom} is not known")));
        return Some(Reach { outcome, reason, rule: None, ends: vec![way.to] });
    }
    match (client.kind, way.kind) {
        (kind, WayKind::ClusterIp) if !kind.is_here() && kind != ClientKind::Outside => {
            unknown("the rules of the client's own node decide: ask there".to_owned())
        }
        (ClientKind::Outside, WayKind::ClusterIp | WayKind::Pod) => {
            let reach = reach::reach(world, way.proto, client.address, way.to.ip(), way.to.port());
            let why = "whether its packets come to this node at all is a matter of routes elsewhere";
            unknown(format!("{why}; if they do: {}", reach.reason))
        }
        (ClientKind::PodElsewhere, _) if here => masqueraded(world, client, way),
        (kind, WayKind::External) if !kind.is_here() && kind != ClientKind::Outside && !here => {
            unknown("the rules of the client's own node decide: ask there".to_owned())
        }
        _ => None,
    }
}

/// A pod elsewhere may come with its own address or, where its node masquerades, with its node's.
fn masqueraded(world: &World<'_>, client: &Client, way: &Way) -> Option<Reach> {
    let (node, _) = world.other_node(Family::of(client.address))?;
    let direct = reach::reach(world, way.proto, client.address, way.to.ip(), way.to.port());
    let behind = reach::reach(world, way.proto, node, way.to.ip(), way.to.port());
    if direct.outcome == behind.outcome {
        return Some(direct);
    }
    // Its node is taken to do what this one does with its own pods' packets to other nodes.
    let pod = world.local_pods(Family::of(client.address)).into_iter().next()?;
    let trace = world.trace(way.proto, pod.address, node, way.to.port());
    let like = if trace.branches.iter().all(|branch| branch.masquerade) { behind } else { direct };
    Some(Reach { reason: format!("{} (if its node treats its pods' packets as this one does)", like.reason), ..like })
}

/// All ways to a subject.
fn ways(world: &World<'_>, subject: &Subject) -> Result<Vec<Way>, String> {
    let mut ways = Vec::new();
    match subject {
        Subject::Port { port, proto } => of_port(world, *port, *proto, &mut ways),
        Subject::Service(name) => of_service(world, name, &mut ways)?,
        Subject::Pod(name) => {
            let pod = find_pod(world, name)?;
            for port in pod.containers.iter().flat_map(|container| &container.ports) {
                for address in pod.ips.iter().filter(|address| address.is_ipv4()) {
                    add(
                        &mut ways,
                        WayKind::Pod,
                        port.proto,
                        SocketAddr::new(*address, port.port),
                        format!("containerPort {}", port.port),
                    );
                }
                if let Some(number) = port.host_port {
                    of_port(world, number, Some(port.proto), &mut ways);
                }
            }
            for address in pod.ips.iter().filter(|address| address.is_ipv4()) {
                let sockets = world.facts.listeners.known().and_then(|all| all.sockets(*address)).unwrap_or_default();
                for socket in sockets.iter().filter(|socket| !socket.address.is_loopback()) {
                    let to = SocketAddr::new(*address, socket.port);
                    add(&mut ways, WayKind::Pod, socket.proto, to, format!("listening on {}", socket.port));
                }
            }
        }
    }
    ways.sort_by_key(|way| (way.kind, way.to.is_ipv6()));
    Ok(ways)
}

fn add(ways: &mut Vec<Way>, kind: WayKind, proto: Proto, to: SocketAddr, what: String) {
    if !ways.iter().any(|way| way.proto == proto && way.to == to) {
        ways.push(Way { kind, proto, to, what });
    }
}

fn of_port(world: &World<'_>, port: u16, proto: Option<Proto>, ways: &mut Vec<Way>) {
    for one in ports::of_port(world, port).iter().filter(|one| proto.is_none_or(|proto| proto == one.proto)) {
        for claim in &one.claims {
            for family in claim.families.iter().take(1) {
                let kind = match claim.kind {
                    Kind::HostPort => WayKind::HostPort,
                    Kind::NodePort | Kind::Refused => WayKind::NodePort,
                    Kind::ExternalIp | Kind::LoadBalancer => WayKind::External,
                    Kind::Listener => WayKind::Process,
                };
                let what = format!("{} {port} of {}", claim.kind.name(), claim.who);
                if let Some(to) = claim.to {
                    add(ways, WayKind::Pod, one.proto, to, format!("containerPort {}", to.port()));
                }
                let node = one.address.or(claim.only).or_else(|| world.node_address(*family));
                if let Some(address) = node {
                    add(ways, kind, one.proto, SocketAddr::new(address, port), what.clone());
                }
                if one.address.is_none() {
                    let loopback = match family {
                        Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
                        Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
                    };
                    add(ways, WayKind::Loopback, one.proto, SocketAddr::new(loopback, port), what);
                }
                if let Some(name) = super::diagnose::service_of(claim.who.split(' ').next().unwrap_or_default())
                    .filter(|_| claim.kind != Kind::HostPort)
                {
                    let _ = of_service_ports(world, &name, ways, Some(port));
                }
            }
        }
    }
}

fn of_service(world: &World<'_>, name: &ObjectName, ways: &mut Vec<Way>) -> Result<(), String> {
    of_service_ports(world, name, ways, None)
}

/// ClusterIP, NodePort, external addresses and the pods' own ports of a Service; of the port with this NodePort only.
fn of_service_ports(
    world: &World<'_>,
    name: &ObjectName,
    ways: &mut Vec<Way>,
    only: Option<u16>,
) -> Result<(), String> {
    let services = world.facts.cluster.services.get()?;
    let service = services
        .iter()
        .find(|service| service.name == *name)
        .ok_or_else(|| format!("there is no Service {name} among the {} that are known", services.len()))?;
    for port in service.ports.iter().filter(|port| only.is_none_or(|only| port.node_port == Some(only))) {
        let what = format!("port {} of Service {name}", port.port);
        let first = service.cluster_ips.first().map(|address| Family::of(*address));
        for address in service.cluster_ips.iter().take(1) {
            add(ways, WayKind::ClusterIp, port.proto, SocketAddr::new(*address, port.port), what.clone());
        }
        let external = service.external_ips.iter().copied().chain(service.ingress.iter().map(|ingress| ingress.ip));
        for address in external.filter(|address| Some(Family::of(*address)) == first) {
            add(ways, WayKind::External, port.proto, SocketAddr::new(address, port.port), what.clone());
        }
        if let (None, Some(number)) = (only, port.node_port) {
            let family = first.unwrap_or(Family::V4);
            if let Some(address) = world.node_address(family) {
                add(
                    ways,
                    WayKind::NodePort,
                    port.proto,
                    SocketAddr::new(address, number),
                    format!("NodePort {number} of Service {name}"),
                );
            }
            if family == Family::V4 {
                let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), number);
                add(ways, WayKind::Loopback, port.proto, loopback, format!("NodePort {number} of Service {name}"));
            }
        }
        let endpoints = endpoints(world, service, port);
        let mut of_family = endpoints.iter().filter(|(at, one)| Some(Family::of(at.ip())) == first && one.ready);
        let local = of_family.clone().find(|(at, _)| world.behind(at.ip()).is_some());
        if let Some((at, _)) = local.or_else(|| of_family.next()) {
            add(ways, WayKind::Pod, port.proto, *at, format!("targetPort {}", port.target));
        }
    }
    Ok(())
}

/// A client of each kind that the facts can name.
fn clients(world: &World<'_>, family: Family, ways: &[Way], outside: Option<IpAddr>) -> Vec<Client> {
    let mut clients = Vec::new();
    let mut add = |kind, address: Option<IpAddr>, name: Option<String>| {
        clients.extend(address.map(|address| Client { kind, address, name }));
    };
    add(ClientKind::ThisNode, world.node_address(family), world.facts.state.name.clone());
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    add(ClientKind::ThisNodeLoopback, Some(loopback).filter(|_| family == Family::V4), None);
    let other = world.other_node(family);
    add(ClientKind::OtherNode, other.as_ref().map(|(address, _)| *address), other.and_then(|(_, name)| name));
    let is_target = |way: &&Way| way.kind == WayKind::Pod && Family::of(way.to.ip()) == family;
    let target = ways.iter().find(is_target).map(|way| way.to.ip());
    let pods = world.local_pods(family);
    let neighbour = pods.iter().find(|pod| Some(pod.address) != target);
    add(ClientKind::PodHere, neighbour.map(|pod| pod.address), neighbour.and_then(|pod| pod.name.clone()));
    let itself = pods.iter().find(|pod| Some(pod.address) == target);
    add(ClientKind::PodItself, itself.map(|pod| pod.address), itself.and_then(|pod| pod.name.clone()));
    let remote = world.remote_pod(family);
    add(ClientKind::PodElsewhere, remote.as_ref().map(|(address, _)| *address), remote.and_then(|(_, name)| name));
    let outside = outside.filter(|address| Family::of(*address) == family).unwrap_or_else(|| World::outsider(family));
    add(ClientKind::Outside, Some(outside), None);
    clients
}
