//! Packets that a node ought to serve, tried in thought once: several checks look at what becomes of them.

use crate::core::model::flow::{Family, Proto};
use crate::core::model::trace::Trace;
use crate::core::ports::{self, Port};
use crate::core::world::World;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// So many ports of a kind are tried: what is wrong with a node shows at few, and a node can have thousands.
const MOST: usize = 400;

/// Who sends a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Outside,
    /// The node itself, to 127.0.0.1.
    Localhost,
    /// This node, or a pod of it other than that at the end.
    Within,
    /// The pod that a hostPort or NodePort leads to, to the node's address.
    Itself,
}

#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) from: From,
    pub(crate) proto: Proto,
    pub(crate) port: u16,
    /// What the port is: `hostPort 9088 of default/frontend-a`.
    pub(crate) what: String,
    pub(crate) trace: Trace,
}

#[derive(Debug)]
pub(crate) struct Samples {
    pub(crate) ports: Vec<Port>,
    pub(crate) all: Vec<Sample>,
}

impl Samples {
    /// Those of the ports that the question is about come first, so that they are what a finding about several names.
    pub(crate) fn new(world: &World<'_>, asked: &BTreeSet<(Proto, u16)>) -> Self {
        let ports = ports::ports(world);
        let mut all = Vec::new();
        let claimed = |port: &&Port| {
            let wanted = |kind| matches!(kind, ports::Kind::NodePort | ports::Kind::HostPort);
            port.address.is_none()
                && port.claims.iter().any(|claim| wanted(claim.kind) && claim.families.contains(&Family::V4))
        };
        let node = world.node_address(Family::V4);
        let is_asked = |port: &&Port| asked.contains(&(port.proto, port.port));
        let (first, rest): (Vec<&Port>, Vec<&Port>) = ports.iter().filter(claimed).partition(is_asked);
        for port in first.into_iter().chain(rest).take(MOST) {
            let Some(claim) =
                port.claims.iter().find(|claim| matches!(claim.kind, ports::Kind::NodePort | ports::Kind::HostPort))
            else {
                continue;
            };
            let proto = if port.proto == Proto::Tcp { String::new() } else { format!("/{}", port.proto) };
            let what = format!("{} {}{proto} of {}", claim.kind.name(), port.port, claim.who);
            let mut add = |from, src: IpAddr, dst: IpAddr| {
                let trace = world.trace(port.proto, src, dst, port.port);
                all.push(Sample { from, proto: port.proto, port: port.port, what: what.clone(), trace });
            };
            let pinned = claim.only.filter(|_| port.claims.len() == 1);
            let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
            if pinned.is_none_or(|only| only.is_loopback()) {
                add(From::Localhost, localhost, localhost);
            }
            let Some(dst) = pinned
                .filter(|only| !only.is_loopback())
                .or(node)
                .filter(|_| pinned.is_none_or(|only| !only.is_loopback()))
            else {
                continue;
            };
            add(From::Outside, World::outsider(Family::V4), dst);
            let endpoints = world.owners.endpoints_of(port.proto, &claim.who);
            let here = |to: &SocketAddr| to.is_ipv4() && world.behind(to.ip()).is_some();
            if let Some(to) = claim.to.into_iter().chain(endpoints).find(here) {
                add(From::Itself, to.ip(), dst);
            }
        }
        Self { ports, all }
    }
}
