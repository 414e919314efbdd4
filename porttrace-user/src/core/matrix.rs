//! Who can reach a workload, by which of the ways: the founding experiment, in thought.

mod ways;

use super::diagnose::endpoints;
use super::explain::Subject;
use super::kube::ebpf::Network;
use super::model::flow::{Family, Proto};
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
    /// Why predictions need not hold on this node, a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doubt: Option<String>,
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
    let ways = ways::ways(world, &subject)?;
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
    let doubt = world.replaced().map(Network::sentence).or_else(|| world.native_sentence());
    Ok(Matrix { subject, node: world.facts.state.name.clone(), doubt, ways, rows })
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
    let ends_here = if !world.rules_decide() && way.kind != WayKind::Pod {
        is_served_here(world, way)
    } else {
        let stays = reach.ends.iter().all(|end| own(end.ip()));
        // Refused by a rule before it goes anywhere: the address itself must be the node's.
        // Where that is not known, it may be forwarded (IPVS, a match that nobody can decide).
        let known = !reach.ends.is_empty() || own(way.to.ip()) && reach.outcome != Outcome::Unknown;
        stays && known
    };
    let ours = matches!(client.kind, ClientKind::ThisNode | ClientKind::ThisNodeLoopback);
    (ours && ends_here).then(|| if way.to.ip().is_loopback() { way.to.ip() } else { client.address })
}

/// Whether a way asks for a NodePort on this node of which all endpoints are known, and pods of this node: where rules do not tell
/// where its packets go, that does. (A ClusterIP that nobody translates leaves the node.)
fn is_served_here(world: &World<'_>, way: &Way) -> bool {
    let own = world.facts.is_own(way.to.ip()) == Some(true);
    let ends = world.with_node_port(way.to.port(), Some(way.proto)).flat_map(|(of, port)| endpoints(world, of, port));
    let mut ends = ends.filter(|(_, endpoint)| endpoint.ready).map(|(at, _)| at.ip()).peekable();
    own && ends.peek().is_some() && ends.all(|end| world.behind(end).is_some())
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
