//! A port that nobody claims on the node: often it is a number of the right workload, of the wrong kind.

use super::Line;
use crate::core::kube::server::Server;
use crate::core::model::flow::{Family, Proto};
use crate::core::reach::{self, Outcome, Reach};
use crate::core::world::World;
use std::collections::BTreeSet;

/// What the number may be instead.
pub(super) fn unclaimed(world: &World<'_>, port: u16, proto: Option<Proto>, node: &str) -> Vec<Line> {
    let mut lines = without_rules(world, port, proto, node);
    let mut said: BTreeSet<String> = as_service_port(world, port).into_iter().chain(as_pod_port(world, port)).collect();
    said.extend(as_loopback(world, port));
    lines.extend(said.into_iter().take(6).map(|sentence| Line { outcome: Outcome::Unknown, sentence, change: None }));
    lines
}

/// No rule claims it; whether somebody else serves it is for Kubernetes, or for those that need no such rules, to say.
fn without_rules(world: &World<'_>, port: u16, proto: Option<Proto>, node: &str) -> Vec<Line> {
    let sockets = if world.facts.state.sockets.is_some() { ", and no process of the node listens on it" } else { "" };
    let server = Server::of(&world.facts.state, port);
    let outcome = if matches!(server, Server::Nobody) { Outcome::Refused } else { Outcome::Unknown };
    let line = |sentence| Line { outcome, sentence, change: server.advice().map(str::to_owned) };
    let node_ports = world.with_node_port(port, proto).map(|(service, of)| {
        let place = format!("{} {port} on {node} is NodePort of Service {}", of.proto, service.name);
        line(server.of_node_port(&place, sockets))
    });
    let mut lines: Vec<Line> = node_ports.collect();
    if lines.is_empty() {
        lines = by_other_rules(world, port, proto, node);
    }
    if lines.is_empty() {
        lines.push(line(server.of_port(port, node, sockets)));
    }
    lines
}

/// Where rules of neither kube-proxy nor portmap rewrite what comes to it from outside.
fn by_other_rules(world: &World<'_>, port: u16, proto: Option<Proto>, node: &str) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for proto in proto.map_or_else(|| vec![Proto::Tcp, Proto::Udp, Proto::Sctp], |proto| vec![proto]) {
        for family in [Family::V4, Family::V6] {
            let Some(address) = world.node_address(family) else { continue };
            let trace = world.trace(proto, World::outsider(family), address, port);
            let asked = trace.packet.tuple.destination();
            if trace.branches.iter().all(|branch| branch.final_tuple.destination() == asked) {
                continue;
            }
            let Reach { outcome, reason, .. } = reach::of_trace(world, &trace);
            let sentence =
                format!("{proto} {port} on {node} is no NodePort and no hostPort, but other rules take it: {reason}");
            if lines.iter().all(|line| line.sentence != sentence) {
                lines.push(Line { outcome, sentence, change: None });
            }
        }
    }
    lines
}

/// `8088 is the port of Service default/frontend, on its ClusterIP 10.96.48.151; on nodes it is 30080`.
fn as_service_port(world: &World<'_>, port: u16) -> Vec<String> {
    let mut said = Vec::new();
    for service in &world.facts.cluster.services {
        for one in service.ports.iter().filter(|one| one.port == port) {
            let addresses: Vec<String> = service.cluster_ips.iter().map(ToString::to_string).collect();
            let on_nodes = match one.node_port {
                Some(number) => format!("on nodes it is NodePort {number}"),
                None => "it has no NodePort".to_owned(),
            };
            said.push(format!(
                "{port} is the port of Service {}, on its ClusterIP {}; {on_nodes}",
                service.name,
                addresses.join(", ")
            ));
        }
    }
    said
}

/// `80 is what pod default/frontend-a listens on; on this node it is hostPort 9088`.
fn as_pod_port(world: &World<'_>, port: u16) -> Vec<String> {
    let here = world.facts.state.name.as_ref();
    let mut said = Vec::new();
    for pod in world.facts.cluster.pods.iter().filter(|pod| pod.node.as_ref() == here && !pod.host_network) {
        for one in pod.containers.iter().flat_map(|container| &container.ports).filter(|one| one.port == port) {
            if let Some(host) = one.host_port {
                said.push(format!("{port} is a containerPort of pod {}; on this node it is hostPort {host}", pod.name));
            }
        }
    }
    said
}

fn as_loopback(world: &World<'_>, port: u16) -> Option<String> {
    let sockets = world.facts.state.sockets.iter().flatten();
    let on = sockets.filter(|socket| socket.port == port && socket.address.is_loopback() && socket.proto == Proto::Tcp);
    on.map(|socket| {
        let who = socket.process.as_deref().unwrap_or("a process");
        format!("{who} listens on {}:{port}, for this node alone", socket.address)
    })
    .next()
}
