//! Why a host that was reached refuses a port.

use super::{Context, Report};
use crate::core::kube::owners::ClaimKind;
use crate::core::model::flow::Proto;
use crate::core::model::workloads::Workload;
use std::net::SocketAddr;

/// What is said of it, after the verdict: from the sockets inside the pod where they could be read, else from what Services use
/// of the same pod; with the pod's name and what its images expose, where those are known.
pub(super) fn no_listener(from: SocketAddr, report: &Report, context: &Context<'_>) -> String {
    let (proto, port) = (report.flow.original.proto, from.port());
    let workload = context.workloads.at(from.ip());
    let place = workload.map_or("there".to_owned(), |workload| format!("in pod {}", workload.pod));
    let exposes = workload.and_then(exposes).unwrap_or_default();
    if context.pods.only_on_loopback(proto, from.ip(), port) {
        let whose = workload.map_or("the pod".to_owned(), |workload| format!("pod {}", workload.pod));
        return format!(": its {proto} port {port} is bound to the loopback address of {whose} only");
    }
    match (context.pods.listens(proto, from.ip(), port), context.pods.ports(proto, from.ip())) {
        (Some(true), _) => format!(", though something listens on {proto} port {port} {place} now"),
        (Some(false), Some(ports)) if ports.is_empty() => {
            format!(": nothing listens {place} on any {proto} port{exposes}")
        }
        (Some(false), Some(ports)) => {
            let said: Vec<String> =
                ports.iter().take(4).map(|(port, process)| port_and_process(*port, *process)).collect();
            format!(": nothing listens on {proto} port {port} {place}, but on {}{exposes}", said.join(", "))
        }
        _ => {
            let hint = services(proto, from, context).unwrap_or_default();
            format!(": nothing seems to listen on {proto} port {port} {place}{hint}{exposes}")
        }
    }
}

/// What to change where no finding tells: the client asked the pod itself, or rules without comments led there.
pub(super) fn advice(from: SocketAddr, report: &Report, context: &Context<'_>) -> Option<String> {
    let asked = report.flow.original;
    let (proto, port, asked) = (asked.proto, from.port(), asked.dport);
    if context.pods.only_on_loopback(proto, from.ip(), port) {
        return Some("let the server in the pod listen on all addresses (0.0.0.0 or ::)".to_owned());
    }
    if context.pods.listens(proto, from.ip(), port) != Some(false) {
        return None;
    }
    let ports = context.pods.ports(proto, from.ip())?;
    let right = match ports.as_slice() {
        [] => return None,
        [(only, _)] => only.to_string(),
        several => format!(
            "one of {}",
            several.iter().take(6).map(|(port, _)| port.to_string()).collect::<Vec<_>>().join(", ")
        ),
    };
    let mut claims = context.owners.claims(asked).filter(|claim| claim.proto == proto);
    claims.find_map(|claim| match &claim.kind {
        ClaimKind::NodePort { service, .. } | ClaimKind::ServicePort { service, .. } => {
            Some(format!("Service {service} leads to targetPort {port}: set that targetPort to {right}"))
        }
        _ => None,
    })
}

/// What Services reach of the same pod.
fn services(proto: Proto, from: SocketAddr, context: &Context<'_>) -> Option<String> {
    let served = context.owners.served_ports(proto, from.ip());
    let others = served.iter().filter(|(other, _)| *other != from.port()).take(3);
    let said: Vec<String> = others.map(|(port, service)| format!("port {port} ({service})")).collect();
    (!said.is_empty()).then(|| format!("; Services reach that pod on {}", said.join(", ")))
}

fn exposes(workload: &Workload) -> Option<String> {
    let ports: Vec<String> = workload.exposed.as_ref()?.iter().take(4).map(ToString::to_string).collect();
    (!ports.is_empty()).then(|| format!("; the image exposes {}", ports.join(", ")))
}

fn port_and_process(port: u16, process: Option<&str>) -> String {
    match process {
        Some(process) => format!("{port} ({process})"),
        None => port.to_string(),
    }
}
