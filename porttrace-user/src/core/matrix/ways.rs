//! By which addresses and ports a port, a Service or a pod may be reached.

use super::{Way, WayKind};
use crate::core::diagnose::endpoints;
use crate::core::explain::{Subject, find_pod};
use crate::core::model::cluster::ObjectName;
use crate::core::model::flow::{Family, Proto};
use crate::core::ports::{self, Kind};
use crate::core::world::World;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// All ways to a subject.
pub(super) fn ways(world: &World<'_>, subject: &Subject) -> Result<Vec<Way>, String> {
    let mut ways = Vec::new();
    match subject {
        Subject::Port { port, proto } => {
            of_port(world, *port, *proto, &mut ways);
            if ways.is_empty() {
                without_rules(world, *port, *proto, &mut ways);
            }
        }
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
                    Kind::ExternalIp | Kind::LoadBalancer | Kind::External => WayKind::External,
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
                if let Some(name) = crate::core::diagnose::service_of(claim.who.split(' ').next().unwrap_or_default())
                    .filter(|_| claim.kind != Kind::HostPort)
                {
                    let _ = of_service_ports(world, &name, ways, Some(port));
                }
            }
        }
    }
}

/// A NodePort that no rule serves: known from Kubernetes, or asked for where a network needs no rules for it.
fn without_rules(world: &World<'_>, port: u16, proto: Option<Proto>, ways: &mut Vec<Way>) {
    let mut on_node = |proto, what: String| {
        let Some(address) = world.node_address(Family::V4).or_else(|| world.node_address(Family::V6)) else { return };
        add(ways, WayKind::NodePort, proto, SocketAddr::new(address, port), what.clone());
        let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        add(ways, WayKind::Loopback, proto, loopback, what);
    };
    let known: Vec<_> = world.with_node_port(port, proto).collect();
    for (service, of) in &known {
        on_node(of.proto, format!("NodePort {port} of Service {}, by {}", service.name, world.no_rule()));
    }
    if known.is_empty() && !world.rules_decide() {
        on_node(proto.unwrap_or(Proto::Tcp), format!("claimed by {}", world.no_rule()));
    }
    for (service, _) in known {
        let _ = of_service_ports(world, &service.name, ways, Some(port));
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
