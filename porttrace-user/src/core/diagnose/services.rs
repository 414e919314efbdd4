//! Services against their endpoints, their pods, and the rules.

use super::{Checked, Evidence, Finding, Scene, Severity};
use crate::core::kube::owners::ClaimKind;
use crate::core::model::cluster::{Endpoint, EndpointSlice, Pod, Service, ServicePort, ServiceType, TargetPort};
use crate::core::model::flow::{Family, Proto};
use crate::core::quantity;
use crate::core::world::World;
use std::collections::BTreeSet;
use std::net::SocketAddr;

/// Services that have ports of their own on a node: not headless, not ExternalName.
pub(super) fn served<'f>(scene: &Scene<'_, 'f>) -> impl Iterator<Item = &'f Service> {
    scene.services().filter(|service| service.kind != ServiceType::ExternalName && !service.cluster_ips.is_empty())
}

/// The EndpointSlices of a Service.
pub(super) fn slices<'f>(world: &World<'f>, service: &Service) -> Vec<&'f EndpointSlice> {
    let all = world.facts.cluster.slices.iter();
    all.filter(|slice| {
        slice.name.namespace == service.name.namespace && slice.service.as_ref() == Some(&service.name.name)
    })
    .collect()
}

/// Endpoints of one port of a Service, each with its address and port.
pub(crate) fn endpoints<'f>(
    world: &World<'f>,
    service: &Service,
    port: &ServicePort,
) -> Vec<(SocketAddr, &'f Endpoint)> {
    let mut found = Vec::new();
    for slice in slices(world, service) {
        let same = |one: &&crate::core::model::cluster::SlicePort| one.name == port.name && one.proto == port.proto;
        let Some(number) = slice.ports.iter().find(same).and_then(|one| one.port) else { continue };
        for endpoint in &slice.endpoints {
            found.extend(endpoint.addresses.iter().map(|address| (SocketAddr::new(*address, number), endpoint)));
        }
    }
    found
}

/// `default/frontend:http`, as kube-proxy names a Service's port.
pub(crate) fn port_name(service: &Service, port: &ServicePort) -> String {
    if port.name.is_empty() { service.name.to_string() } else { format!("{}:{}", service.name, port.name) }
}

/// Pods that a selector matches; `None`: not all pods of the cluster are known.
fn selected<'f>(world: &World<'f>, service: &Service) -> Option<Vec<&'f Pod>> {
    let cluster = &world.facts.cluster;
    if cluster.pods_of.is_some() {
        return None;
    }
    let pods = cluster.pods.known()?.iter();
    let matches = |pod: &&Pod| {
        pod.name.namespace == service.name.namespace
            && service.selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
    };
    Some(pods.filter(matches).collect())
}

fn selector_text(service: &Service) -> String {
    let words: Vec<String> = service.selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
    words.join(",")
}

/// A finding about a Service and its ports.
pub(super) fn of_service(severity: Severity, service: &Service, sentence: String, change: String) -> Finding {
    let mut finding = Finding::new(severity, sentence, change).service(&service.name);
    for port in &service.ports {
        finding.about.ports.extend(port.node_port.map(|number| (port.proto, number)));
    }
    finding
}

/// Rules by which kube-proxy refuses a Service's port for want of endpoints.
fn refusals(world: &World<'_>, service: &Service) -> Vec<Evidence> {
    let prefix = format!("{}:", service.name);
    let mut rules = world.owners.all().filter_map(|claim| match &claim.kind {
        ClaimKind::Refused { why, .. }
            if why.starts_with(&prefix) || why.starts_with(&format!("{} ", service.name)) =>
        {
            claim.rule.as_ref()
        }
        _ => None,
    });
    rules.next().map(|rule| Evidence::rule(world, rule)).into_iter().collect()
}

/// No endpoint at all.
pub(super) fn without_endpoints(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    let cluster = &world.facts.cluster;
    if cluster.services.known().is_none() || cluster.slices.known().is_none() {
        return by_rules(world);
    }
    let mut found = Vec::new();
    for service in served(scene) {
        let slices = slices(world, service);
        if slices.iter().any(|slice| !slice.endpoints.is_empty()) {
            continue;
        }
        // A selector that matches no pod is a finding of its own.
        if !service.selector.is_empty() && selected(world, service).is_some_and(|pods| pods.is_empty()) {
            continue;
        }
        let (why, change) = if service.selector.is_empty() {
            (
                "it has no selector, so that Kubernetes looks for none",
                format!("give Service {} a selector, or write an EndpointSlice for it", service.name),
            )
        } else {
            (
                "see whether the pods that its selector matches run",
                format!("make the pods with {} run", selector_text(service)),
            )
        };
        let what = match slices.len() {
            0 => "no EndpointSlice is labelled with its name".to_owned(),
            1 => "its EndpointSlice is empty".to_owned(),
            count => format!("{count} EndpointSlices, all empty"),
        };
        let sentence = format!("Service {} has no endpoints: every connection to it is refused ({why})", service.name);
        let evidence = Evidence::new("object", format!("Service {}", service.name), what);
        found.push(
            of_service(Severity::Error, service, sentence, change)
                .because(format!("Service {} has no endpoints ({why})", service.name))
                .with([evidence])
                .with(refusals(world, service)),
        );
    }
    Ok(found)
}

/// Without the API, kube-proxy's own REJECT rules tell.
fn by_rules(world: &World<'_>) -> Checked {
    let mut names = BTreeSet::new();
    let mut found = Vec::new();
    for claim in world.owners.all() {
        let ClaimKind::Refused { why, .. } = &claim.kind else { continue };
        let Some(name) = why.strip_suffix(" has no endpoints") else { continue };
        let (Some(service), Some(rule)) = (super::service_of(name), &claim.rule) else { continue };
        if !names.insert(name.to_owned()) {
            continue;
        }
        let sentence =
            format!("Service {name} has no ready endpoints, by kube-proxy's rules: every connection to it is refused");
        let change = format!(
            "see `kubectl -n {} get endpointslices -l kubernetes.io/service-name={}`",
            service.namespace, service.name
        );
        found.push(
            Finding::new(Severity::Error, sentence, change)
                .because(format!("Service {name} has no ready endpoints"))
                .with([Evidence::rule(world, rule)])
                .service(&service)
                .port(claim.proto, claim.port),
        );
    }
    Ok(found)
}

/// Endpoints, but none that is ready.
pub(super) fn without_ready(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    world.facts.asked_services()?;
    world.facts.cluster.slices.get()?;
    let mut found = Vec::new();
    for service in served(scene) {
        let endpoints: Vec<&Endpoint> = slices(world, service).into_iter().flat_map(|slice| &slice.endpoints).collect();
        // kube-proxy falls back to endpoints that are terminating but still serve (proxy/topology.go).
        let used = |endpoint: &&Endpoint| endpoint.ready || endpoint.serving && endpoint.terminating;
        if endpoints.is_empty() || endpoints.iter().any(used) {
            continue;
        }
        let pods: Vec<String> =
            endpoints.iter().filter_map(|endpoint| endpoint.pod.as_ref()).map(ToString::to_string).take(3).collect();
        let sentence = format!(
            "Service {} has {}, none of which is ready: every connection to it is refused",
            service.name,
            quantity::count(endpoints.len(), "endpoint")
        );
        let which = if pods.is_empty() { "its endpoints".to_owned() } else { format!("pod {}", pods.join(", ")) };
        let change = format!("find out why {which} is not ready (`kubectl describe pod`: readiness probe, crashes)");
        let evidence = endpoints.iter().take(3).map(|endpoint| {
            let addresses: Vec<String> = endpoint.addresses.iter().map(ToString::to_string).collect();
            Evidence::new(
                "object",
                format!("EndpointSlice of {}", service.name),
                format!("{} ready=false", addresses.join(", ")),
            )
        });
        let count = quantity::count(endpoints.len(), "endpoint");
        found.push(
            of_service(Severity::Error, service, sentence, change)
                .because(format!("Service {} has {count}, none of which is ready", service.name))
                .with(evidence)
                .with(refusals(world, service)),
        );
    }
    Ok(found)
}

/// A selector that matches no pod.
pub(super) fn selector(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    world.facts.asked_services()?;
    world.facts.cluster.pods.get()?;
    if let Some(node) = &world.facts.cluster.pods_of {
        return Err(format!("only the pods of {node} are known"));
    }
    let mut found = Vec::new();
    for service in scene.services().filter(|service| !service.selector.is_empty()) {
        if selected(world, service).is_none_or(|pods| !pods.is_empty()) {
            continue;
        }
        let wanted = selector_text(service);
        let sentence = format!(
            "the selector of Service {} ({wanted}) matches no pod in namespace {}",
            service.name, service.name.namespace
        );
        let near: Vec<String> = nearly(world, service);
        let change = match near.first() {
            Some(label) => format!("make the selector and the pods' labels agree: there are pods with {label}"),
            None => format!("label the pods {wanted}, or change the selector"),
        };
        let evidence = near
            .into_iter()
            .take(3)
            .map(|label| Evidence::new("object", format!("pods in {}", service.name.namespace), label));
        found.push(of_service(Severity::Error, service, sentence, change).with(evidence));
    }
    Ok(found)
}

/// Labels of the namespace's pods under the selector's keys, the most similar to what it asks for first.
fn nearly(world: &World<'_>, service: &Service) -> Vec<String> {
    let pods = world.facts.cluster.pods.iter().filter(|pod| pod.name.namespace == service.name.namespace);
    let mut labels: BTreeSet<(std::cmp::Reverse<usize>, String)> = BTreeSet::new();
    for pod in pods {
        for (key, wanted) in &service.selector {
            if let Some(value) = pod.labels.get(key) {
                let alike = wanted.chars().zip(value.chars()).take_while(|(one, other)| one == other).count();
                labels.insert((std::cmp::Reverse(alike), format!("{key}={value}")));
            }
        }
    }
    labels.into_iter().map(|(_, label)| label).collect()
}

/// A targetPort by a name that no container has.
pub(super) fn target_name(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    world.facts.asked_services()?;
    world.facts.cluster.pods.get()?;
    let mut found = Vec::new();
    for service in scene.services().filter(|service| !service.selector.is_empty()) {
        // Of pods elsewhere that are not known nothing can be said; those that are known decide for themselves.
        let matches = |pod: &&Pod| {
            pod.name.namespace == service.name.namespace
                && service.selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
        };
        let pods: Vec<&Pod> = world.facts.cluster.pods.iter().filter(matches).collect();
        for port in &service.ports {
            let TargetPort::Name(name) = &port.target else { continue };
            let ports = |pod: &&Pod| {
                pod.containers.iter().flat_map(|one| &one.ports).any(|one| one.name == *name && one.proto == port.proto)
            };
            let Some(lacks) = pods.iter().find(|pod| !ports(pod)) else { continue };
            let named = lacks.containers.iter().flat_map(|one| &one.ports).map(|one| {
                let shown = if one.name.is_empty() { "without a name" } else { &one.name };
                format!("{} ({shown})", one.port)
            });
            let named: Vec<String> = named.collect();
            let has = if named.is_empty() { "names no port".to_owned() } else { format!("has {}", named.join(", ")) };
            let sentence = format!(
                "targetPort {name:?} of Service {} is no {} port's name in pod {}: it is no endpoint of that port",
                port_name(service, port),
                port.proto,
                lacks.name
            );
            let change = format!("name the container's port {name:?}, or give the number as targetPort");
            let evidence = Evidence::new("object", format!("pod {}", lacks.name), has);
            found.push(of_service(Severity::Error, service, sentence, change).with([evidence]).pod(Some(&lacks.name)));
        }
    }
    Ok(found)
}

/// kube-proxy's rules are not those of the EndpointSlices.
pub(super) fn rules_differ(scene: &Scene<'_, '_>) -> Checked {
    let world = scene.world;
    world.facts.asked_services()?;
    world.facts.cluster.slices.get()?;
    if !world.has_proxy_rules() {
        return Err("there are no rules of kube-proxy here that porttrace follows".to_owned());
    }
    let mut found = Vec::new();
    for service in served(scene) {
        for port in &service.ports {
            for family in [Family::V4, Family::V6] {
                found.extend(differs(world, service, port, family));
            }
        }
    }
    Ok(found)
}

fn differs(world: &World<'_>, service: &Service, port: &ServicePort, family: Family) -> Option<Finding> {
    let of_family = |at: &SocketAddr| Family::of(at.ip()) == family;
    if service.cluster_ips.iter().all(|address| Family::of(*address) != family) {
        return None;
    }
    let name = port_name(service, port);
    let endpoints: Vec<_> = endpoints(world, service, port).into_iter().filter(|(at, _)| of_family(at)).collect();
    let known: BTreeSet<SocketAddr> = endpoints.iter().map(|(at, _)| *at).collect();
    let ready: BTreeSet<SocketAddr> =
        endpoints.iter().filter(|(_, one)| one.ready && !one.hinted).map(|(at, _)| *at).collect();
    let rules: BTreeSet<SocketAddr> =
        world.owners.endpoints_of(port.proto, &name).into_iter().filter(of_family).collect();
    // Above 1,000 endpoints kube-proxy leaves its comments out, and with them the names.
    if rules.is_empty() && chains(world, port.proto, &name, family) > 0 {
        return None;
    }
    let gone: Vec<&SocketAddr> = rules.difference(&known).collect();
    let here = world.facts.state.name.as_deref();
    let only_local = service.internal_local && service.node_ports_none();
    let wanted = |at: &&SocketAddr| {
        let local = endpoints.iter().any(|(one, endpoint)| one == *at && endpoint.node.as_deref() == here);
        !only_local || local
    };
    let missing: Vec<&SocketAddr> = ready.difference(&rules).filter(wanted).collect();
    if gone.is_empty() && missing.is_empty() {
        return None;
    }
    let mut parts = Vec::new();
    if !gone.is_empty() {
        parts.push(format!("the rules still lead to {}, which is no endpoint any more", list(&gone)));
    }
    if !missing.is_empty() {
        parts.push(format!("they do not lead to {}, which is ready", list(&missing)));
    }
    let sentence =
        format!("kube-proxy's rules for Service {name} are not those of its EndpointSlices: {}", parts.join(", and "));
    let change = "see whether kube-proxy runs on this node and reaches the API (`kubectl -n kube-system logs` of its pod); restarting it writes all rules anew";
    let rule = world.owners.all().find_map(|claim| match &claim.kind {
        ClaimKind::ServicePort { service: of, .. } | ClaimKind::NodePort { service: of, .. } if **of == *name => {
            claim.rule.as_ref()
        }
        _ => None,
    });
    let evidence = rule.map(|rule| Evidence::rule(world, rule));
    let slices = Evidence::new("object", format!("EndpointSlices of {name}"), quantity::count(known.len(), "endpoint"));
    let finding = of_service(Severity::Error, service, sentence, change.to_owned()).with(evidence).with([slices]);
    Some(gone.iter().fold(finding, |finding, at| finding.address(at.ip())))
}

fn list(all: &[&SocketAddr]) -> String {
    let shown: Vec<String> = all.iter().take(3).map(ToString::to_string).collect();
    let more = if all.len() > 3 { format!(" and {} more", all.len() - 3) } else { String::new() };
    shown.join(", ") + &more
}

/// How many endpoints the rules of a Service's port have.
fn chains(world: &World<'_>, proto: Proto, name: &str, family: Family) -> usize {
    let claims = world.owners.all().filter(|claim| claim.family == family && claim.proto == proto);
    let counts = claims.filter_map(|claim| match &claim.kind {
        ClaimKind::ServicePort { service, endpoints, .. } | ClaimKind::NodePort { service, endpoints }
            if service == name =>
        {
            Some(*endpoints)
        }
        _ => None,
    });
    counts.max().unwrap_or(0)
}
