//! Services and pods where the Kubernetes API says nothing: as kube-proxy's rules and the container runtime know them.

use crate::core::diagnose::service_of;
use crate::core::kube::owners::{Claim, ClaimKind, Owners};
use crate::core::model::cluster::{
    ObjectName, Part, Pod, PodContainer, Sandbox, Service, ServicePort, ServiceType, TargetPort,
};
use crate::core::model::facts::Facts;
use crate::core::model::state::NodeState;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Fills in what is missing, so that Services and pods can be asked for by their names. What was known stays as it is.
pub fn derive(facts: &mut Facts) {
    if let Err(why) = facts.cluster.services.get() {
        let why = why.to_owned();
        let services = services(&facts.state);
        if !services.is_empty() {
            facts.cluster.services = Part::Known(services);
            facts.derived = Some(why);
        }
    }
    if facts.cluster.pods.known().is_none()
        && let Some(sandboxes) = facts.sandboxes.known()
    {
        let node = facts.state.name.clone();
        let own = sandboxes.iter().filter(|sandbox| sandbox.ready);
        facts.cluster.pods = Part::Known(own.map(|sandbox| pod(sandbox, node.clone())).collect());
        facts.cluster.pods_of = node;
    }
}

fn pod(sandbox: &Sandbox, node: Option<String>) -> Pod {
    let container = |one: &crate::core::model::cluster::Container| PodContainer {
        name: one.name.clone(),
        image: one.image.clone(),
        ports: Vec::new(),
    };
    Pod {
        name: sandbox.pod.clone(),
        uid: sandbox.pod_uid.clone(),
        node,
        host_network: sandbox.host_network,
        phase: "Running".to_owned(),
        ips: sandbox.ips.clone(),
        containers: sandbox.containers.iter().map(container).collect(),
        ..Pod::default()
    }
}

/// The Services that kube-proxy's comments name, believed only where the chain's name is the hash of it.
fn services(state: &NodeState) -> Vec<Service> {
    let owners = Owners::of(state);
    let mut found: BTreeMap<ObjectName, Service> = BTreeMap::new();
    for claim in owners.all() {
        let (full, address, node_port) = match &claim.kind {
            ClaimKind::ServicePort { service, address, .. } => (service.as_str(), Some(*address), None),
            ClaimKind::NodePort { service, .. } => (service.as_str(), None, Some(claim.port)),
            ClaimKind::Refused { why, address } => {
                let node_port = address.is_none().then_some(claim.port);
                (why.split(' ').next().unwrap_or_default(), *address, node_port)
            }
            ClaimKind::HostPort { .. } | ClaimKind::Listener { .. } => continue,
        };
        let Some(name) = service_of(full).filter(|_| !full.starts_with("KUBE-")) else { continue };
        let service = found.entry(name.clone()).or_insert_with(|| Service {
            name,
            kind: ServiceType::ClusterIP,
            ..Service::default()
        });
        add(service, full, claim, address, node_port, &owners);
    }
    found.into_values().collect()
}

fn add(
    service: &mut Service,
    full: &str,
    claim: &Claim,
    address: Option<IpAddr>,
    node_port: Option<u16>,
    owners: &Owners,
) {
    let name = full.split_once(':').map_or("", |(_, name)| name);
    let at = service.ports.iter().position(|port| port.name == name && port.proto == claim.proto);
    let at = at.unwrap_or_else(|| {
        let endpoints = owners.endpoints_of(claim.proto, full);
        let mut targets: Vec<u16> = endpoints.into_iter().map(|at| at.port()).collect();
        targets.dedup();
        let target = match targets.as_slice() {
            [only] => TargetPort::Number(*only),
            _ => TargetPort::Name("?".to_owned()),
        };
        service.ports.push(ServicePort { name: name.to_owned(), proto: claim.proto, port: 0, target, node_port: None });
        service.ports.len() - 1
    });
    let port = &mut service.ports[at];
    if let Some(number) = node_port {
        port.node_port = Some(number);
        service.kind = ServiceType::NodePort;
    }
    if let Some(address) = address {
        port.port = claim.port;
        if !service.cluster_ips.contains(&address) {
            service.cluster_ips.push(address);
        }
    }
}
