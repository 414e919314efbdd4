//! The shape of the objects on the wire (core/v1, discovery/v1), as far as it is wanted.

use crate::core::model::cluster as model;
use crate::core::model::cluster::{ObjectName, ServiceType, TargetPort};
use crate::core::model::flow::{Family, Proto};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// `null` is written for "unset" by many clients.
fn lenient<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[derive(Deserialize)]
struct Object<S, T> {
    metadata: Metadata,
    #[serde(default = "none")]
    spec: Option<S>,
    #[serde(default = "none")]
    status: Option<T>,
}

const fn none<T>() -> Option<T> {
    None
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: String,
    namespace: String,
    uid: String,
    #[serde(deserialize_with = "lenient")]
    labels: BTreeMap<String, String>,
    deletion_timestamp: Option<Value>,
}

impl Metadata {
    fn object_name(&self) -> Result<ObjectName, String> {
        match (self.name.as_str(), self.namespace.as_str()) {
            ("", _) => Err("has no name".to_owned()),
            // `kubectl create --dry-run -o yaml` leaves the namespace out when it is the default one.
            (name, "") => Ok(ObjectName { namespace: "default".to_owned(), name: name.to_owned() }),
            (name, namespace) => Ok(ObjectName { namespace: namespace.to_owned(), name: name.to_owned() }),
        }
    }
}

fn read<T: for<'de> Deserialize<'de>>(value: &Value) -> Result<T, String> {
    T::deserialize(value).map_err(|error| error.to_string())
}

fn proto(name: Option<&str>) -> Result<Proto, String> {
    let name = name.unwrap_or("TCP");
    Proto::from_name(&name.to_ascii_lowercase())
        .filter(|proto| proto.has_ports())
        .ok_or_else(|| format!("protocol {name:?} is none of TCP, UDP, SCTP"))
}

fn number(port: u32) -> Result<u16, String> {
    u16::try_from(port).ok().filter(|port| *port != 0).ok_or_else(|| format!("{port} is no port"))
}

/// 0 stands for "none" in several fields.
fn optional(port: Option<u32>) -> Result<Option<u16>, String> {
    port.filter(|port| *port != 0).map(number).transpose()
}

fn address(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is no address"))
}

fn addresses(all: Vec<String>) -> Result<Vec<IpAddr>, String> {
    all.iter().map(|text| address(text)).collect()
}

fn nets(all: Vec<String>) -> Result<Vec<IpNet>, String> {
    all.iter().map(|text| text.trim().parse().map_err(|_| format!("{text:?} is no network"))).collect()
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceSpec {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(deserialize_with = "lenient")]
    selector: BTreeMap<String, String>,
    #[serde(deserialize_with = "lenient")]
    ports: Vec<ServicePort>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs", deserialize_with = "lenient")]
    cluster_ips: Vec<String>,
    #[serde(rename = "externalIPs", deserialize_with = "lenient")]
    external_ips: Vec<String>,
    #[serde(deserialize_with = "lenient")]
    load_balancer_source_ranges: Vec<String>,
    external_traffic_policy: Option<String>,
    internal_traffic_policy: Option<String>,
    session_affinity: Option<String>,
    session_affinity_config: Option<Value>,
    health_check_node_port: Option<u32>,
    publish_not_ready_addresses: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServicePort {
    name: Option<String>,
    protocol: Option<String>,
    port: u32,
    target_port: Option<Value>,
    node_port: Option<u32>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceStatus {
    load_balancer: Option<LoadBalancer>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct LoadBalancer {
    #[serde(deserialize_with = "lenient")]
    ingress: Vec<Ingress>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ingress {
    ip: Option<String>,
    ip_mode: Option<String>,
}

/// A Service.
pub(super) fn service(value: &Value) -> Result<model::Service, String> {
    let object: Object<ServiceSpec, ServiceStatus> = read(value)?;
    let spec = object.spec.unwrap_or_default();
    // Pods of old API servers have the single form only; `None` marks a headless Service.
    let single = spec.cluster_ip.into_iter().filter(|_| spec.cluster_ips.is_empty());
    let cluster_ips: Vec<String> =
        single.chain(spec.cluster_ips.iter().cloned()).filter(|ip| !ip.is_empty() && ip != "None").collect();
    let local = |policy: Option<String>| policy.as_deref() == Some("Local");
    let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let seconds =
            spec.session_affinity_config.as_ref().and_then(|config| config.pointer("/clientIP/timeoutSeconds"));
        seconds.and_then(Value::as_u64).and_then(|seconds| u32::try_from(seconds).ok()).unwrap_or(10_800)
    });
    let ingress = object.status.and_then(|status| status.load_balancer).unwrap_or_default().ingress;
    let ingress = ingress.into_iter().filter_map(|one| {
        let proxied = one.ip_mode.as_deref() == Some("Proxy");
        one.ip.map(|ip| address(&ip).map(|ip| model::Ingress { ip, proxied }))
    });
    Ok(model::Service {
        name: object.metadata.object_name()?,
        uid: object.metadata.uid,
        kind: service_type(spec.kind.as_deref())?,
        selector: spec.selector,
        ports: spec.ports.into_iter().map(service_port).collect::<Result<_, _>>()?,
        cluster_ips: addresses(cluster_ips)?,
        external_ips: addresses(spec.external_ips)?,
        ingress: ingress.collect::<Result<_, _>>()?,
        source_ranges: nets(spec.load_balancer_source_ranges)?,
        external_local: local(spec.external_traffic_policy),
        internal_local: local(spec.internal_traffic_policy),
        affinity,
        health_check_node_port: optional(spec.health_check_node_port)?,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default(),
    })
}

fn service_type(kind: Option<&str>) -> Result<ServiceType, String> {
    match kind {
        None | Some("ClusterIP") => Ok(ServiceType::ClusterIP),
        Some("NodePort") => Ok(ServiceType::NodePort),
        Some("LoadBalancer") => Ok(ServiceType::LoadBalancer),
        Some("ExternalName") => Ok(ServiceType::ExternalName),
        Some(other) => Err(format!("type {other:?} is none that a Service has")),
    }
}

fn service_port(wire: ServicePort) -> Result<model::ServicePort, String> {
    let port = number(wire.port)?;
    let target = match wire.target_port {
        None | Some(Value::Null) => TargetPort::Number(port),
        Some(Value::String(name)) => name.parse().map_or(TargetPort::Name(name), TargetPort::Number),
        Some(Value::Number(target)) => {
            let target = target.as_u64().and_then(|target| u32::try_from(target).ok()).unwrap_or(u32::MAX);
            // 0 is "unset", as the API server's own defaulting has it.
            TargetPort::Number(optional(Some(target))?.unwrap_or(port))
        }
        Some(other) => return Err(format!("targetPort {other} is neither a number nor a name")),
    };
    Ok(model::ServicePort {
        name: wire.name.unwrap_or_default(),
        proto: proto(wire.protocol.as_deref())?,
        port,
        target,
        node_port: optional(wire.node_port)?,
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Slice {
    metadata: Metadata,
    #[serde(default)]
    address_type: String,
    #[serde(default, deserialize_with = "lenient")]
    endpoints: Vec<Endpoint>,
    #[serde(default, deserialize_with = "lenient")]
    ports: Vec<SlicePort>,
}

#[derive(Deserialize)]
struct SlicePort {
    name: Option<String>,
    protocol: Option<String>,
    port: Option<u32>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Endpoint {
    #[serde(deserialize_with = "lenient")]
    addresses: Vec<String>,
    #[serde(deserialize_with = "lenient")]
    conditions: Conditions,
    node_name: Option<String>,
    hints: Option<Value>,
    target_ref: Option<TargetRef>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct TargetRef {
    kind: String,
    name: String,
    namespace: String,
}

/// An EndpointSlice; `None` for one of names instead of addresses.
pub(super) fn slice(value: &Value) -> Result<Option<model::EndpointSlice>, String> {
    let object: Slice = read(value)?;
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        _ => return Ok(None),
    };
    let port = |port: SlicePort| {
        Ok(model::SlicePort {
            name: port.name.unwrap_or_default(),
            proto: proto(port.protocol.as_deref())?,
            port: optional(port.port)?,
        })
    };
    Ok(Some(model::EndpointSlice {
        service: object.metadata.labels.get("kubernetes.io/service-name").cloned(),
        name: object.metadata.object_name()?,
        family,
        ports: object.ports.into_iter().map(port).collect::<Result<_, String>>()?,
        endpoints: object.endpoints.into_iter().map(endpoint).collect::<Result<_, _>>()?,
    }))
}

fn endpoint(wire: Endpoint) -> Result<model::Endpoint, String> {
    let ready = wire.conditions.ready.unwrap_or(true);
    let pod = wire.target_ref.filter(|target| target.kind == "Pod");
    Ok(model::Endpoint {
        addresses: addresses(wire.addresses)?,
        ready,
        serving: wire.conditions.serving.unwrap_or(ready),
        terminating: wire.conditions.terminating.unwrap_or(false),
        hinted: wire.hints.is_some_and(|hints| !hints.is_null()),
        node: wire.node_name,
        pod: pod.map(|target| ObjectName { namespace: target.namespace, name: target.name }),
    })
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: Option<String>,
    host_network: Option<bool>,
    #[serde(deserialize_with = "lenient")]
    containers: Vec<PodContainer>,
    #[serde(deserialize_with = "lenient")]
    init_containers: Vec<PodContainer>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodContainer {
    name: String,
    image: String,
    restart_policy: Option<String>,
    #[serde(deserialize_with = "lenient")]
    ports: Vec<ContainerPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    protocol: Option<String>,
    container_port: u32,
    host_port: Option<u32>,
    #[serde(rename = "hostIP")]
    host_ip: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodStatus {
    phase: String,
    #[serde(deserialize_with = "lenient")]
    conditions: Vec<Condition>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs", deserialize_with = "lenient")]
    pod_ips: Vec<PodIp>,
}

#[derive(Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

#[derive(Deserialize)]
struct PodIp {
    ip: String,
}

/// A Pod.
pub(super) fn pod(value: &Value) -> Result<model::Pod, String> {
    let object: Object<PodSpec, PodStatus> = read(value)?;
    let (spec, status) = (object.spec.unwrap_or_default(), object.status.unwrap_or_default());
    let mut ips: Vec<String> = status.pod_ips.into_iter().map(|ip| ip.ip).collect();
    ips.extend(status.pod_ip.filter(|ip| !ip.is_empty() && !ips.contains(ip)));
    let sidecars = spec.init_containers.into_iter().filter(|one| one.restart_policy.as_deref() == Some("Always"));
    let ready = status.conditions.iter().find(|condition| condition.kind == "Ready");
    Ok(model::Pod {
        name: object.metadata.object_name()?,
        uid: object.metadata.uid,
        labels: object.metadata.labels,
        node: spec.node_name,
        host_network: spec.host_network.unwrap_or_default(),
        phase: status.phase,
        ready: ready.map(|condition| condition.status == "True"),
        terminating: object.metadata.deletion_timestamp.is_some_and(|at| !at.is_null()),
        ips: addresses(ips)?,
        containers: spec.containers.into_iter().chain(sidecars).map(container).collect::<Result<_, _>>()?,
    })
}

fn container(wire: PodContainer) -> Result<model::PodContainer, String> {
    let port = |port: ContainerPort| {
        let host_ip = port.host_ip.filter(|ip| !ip.is_empty());
        Ok(model::ContainerPort {
            name: port.name.unwrap_or_default(),
            proto: proto(port.protocol.as_deref())?,
            port: number(port.container_port)?,
            host_port: optional(port.host_port)?,
            // 0.0.0.0 and :: ask for every address, as leaving it out does.
            host_ip: host_ip.map(|ip| address(&ip)).transpose()?.filter(|ip| !ip.is_unspecified()),
        })
    };
    let ports = wire.ports.into_iter().map(port).collect::<Result<_, String>>()?;
    Ok(model::PodContainer { name: wire.name, image: wire.image, ports })
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs", deserialize_with = "lenient")]
    pod_cidrs: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NodeStatus {
    #[serde(deserialize_with = "lenient")]
    addresses: Vec<NodeAddress>,
}

#[derive(Deserialize)]
struct NodeAddress {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

/// A Node.
pub(super) fn node(value: &Value) -> Result<model::Node, String> {
    let object: Object<NodeSpec, NodeStatus> = read(value)?;
    let (spec, status) = (object.spec.unwrap_or_default(), object.status.unwrap_or_default());
    let mut cidrs = spec.pod_cidrs;
    cidrs.extend(spec.pod_cidr.filter(|cidr| !cidr.is_empty() && cidrs.is_empty()));
    let named = status.addresses.into_iter().filter(|one| matches!(one.kind.as_str(), "InternalIP" | "ExternalIP"));
    Ok(model::Node {
        name: object.metadata.object_name()?.name,
        uid: object.metadata.uid,
        addresses: addresses(named.map(|one| one.address).collect())?,
        pod_cidrs: nets(cidrs)?,
    })
}
