//! What Kubernetes and the container runtime say, as far as it decides where a packet goes. Secrets, environment and
//! annotations never get here: there is no field for them.

use super::flow::{Family, Proto};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

/// A part of the facts, or in one sentence why it is not there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part<T> {
    Known(T),
    Missing(String),
}

impl<T> Part<T> {
    /// The value.
    ///
    /// # Errors
    /// Why it is not there.
    pub fn get(&self) -> Result<&T, &str> {
        match self {
            Self::Known(value) => Ok(value),
            Self::Missing(why) => Err(why),
        }
    }

    pub const fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Missing(_) => None,
        }
    }
}

impl<T> Part<Vec<T>> {
    /// All items; none when the part is missing.
    pub fn iter(&self) -> std::slice::Iter<'_, T> {
        self.known().map_or(&[][..], Vec::as_slice).iter()
    }

    /// Adds items; what was missing is known then.
    pub fn extend(&mut self, items: impl IntoIterator<Item = T>) {
        match self {
            Self::Known(known) => known.extend(items),
            Self::Missing(_) => *self = Self::Known(items.into_iter().collect()),
        }
    }
}

impl<'a, T> IntoIterator for &'a Part<Vec<T>> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Nobody was asked.
impl<T> Default for Part<T> {
    fn default() -> Self {
        Self::Missing("nobody was asked for it".to_owned())
    }
}

/// The Kubernetes API's objects. Pods may be those of one node only; Services and EndpointSlices are those of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cluster {
    pub services: Part<Vec<Service>>,
    pub slices: Part<Vec<EndpointSlice>>,
    pub pods: Part<Vec<Pod>>,
    pub nodes: Part<Vec<Node>>,
    /// The pods are those of this node alone; `None`: all pods of the cluster.
    pub pods_of: Option<String>,
}

impl Cluster {
    /// Nothing is known, for this reason.
    pub fn missing(why: &str) -> Self {
        let why = || why.to_owned();
        Self {
            services: Part::Missing(why()),
            slices: Part::Missing(why()),
            pods: Part::Missing(why()),
            nodes: Part::Missing(why()),
            pods_of: None,
        }
    }
}

/// `namespace/name`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectName {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceType {
    #[default]
    ClusterIP,
    NodePort,
    LoadBalancer,
    ExternalName,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Service {
    pub name: ObjectName,
    pub uid: String,
    pub kind: ServiceType,
    /// Empty: somebody else writes its EndpointSlices.
    pub selector: BTreeMap<String, String>,
    pub ports: Vec<ServicePort>,
    /// Empty for a headless Service.
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    pub ingress: Vec<Ingress>,
    /// `loadBalancerSourceRanges`.
    pub source_ranges: Vec<IpNet>,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// Seconds of `sessionAffinity: ClientIP`.
    pub affinity: Option<u32>,
    pub health_check_node_port: Option<u16>,
    /// `publishNotReadyAddresses`.
    pub publish_not_ready: bool,
}

impl Service {
    /// Clients from outside are meant to reach it.
    pub fn is_external(&self) -> bool {
        !self.node_ports_none() || !self.external_ips.is_empty() || !self.ingress.is_empty()
    }

    /// None of its ports has a NodePort.
    pub fn node_ports_none(&self) -> bool {
        self.ports.iter().all(|port| port.node_port.is_none())
    }
}

/// An address of `status.loadBalancer.ingress`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ingress {
    pub ip: IpAddr,
    /// `ipMode: Proxy`: kube-proxy leaves it to the balancer.
    pub proxied: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Empty when the Service has one port without a name.
    pub name: String,
    pub proto: Proto,
    pub port: u16,
    pub target: TargetPort,
    pub node_port: Option<u16>,
}

/// `targetPort`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TargetPort {
    Number(u16),
    Name(String),
}

impl fmt::Display for TargetPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(port) => port.fmt(f),
            Self::Name(name) => f.pad(name),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSlice {
    pub name: ObjectName,
    /// The Service that it belongs to (label `kubernetes.io/service-name`), in the same namespace.
    pub service: Option<String>,
    pub family: Family,
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlicePort {
    pub name: String,
    pub proto: Proto,
    /// `None`: all ports.
    pub port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub addresses: Vec<IpAddr>,
    /// Unset counts as true (discovery/v1, EndpointConditions).
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// It carries topology hints: kube-proxy may leave it out on this node.
    #[serde(default)]
    pub hinted: bool,
    pub node: Option<String>,
    pub pod: Option<ObjectName>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pod {
    pub name: ObjectName,
    pub uid: String,
    pub labels: BTreeMap<String, String>,
    /// Where it is scheduled.
    pub node: Option<String>,
    pub host_network: bool,
    /// `Running`, `Pending`, `Succeeded`, `Failed`, `Unknown`.
    pub phase: String,
    /// The condition Ready.
    pub ready: Option<bool>,
    /// It is being deleted.
    pub terminating: bool,
    pub ips: Vec<IpAddr>,
    /// Init containers that keep running (sidecars) count as containers.
    pub containers: Vec<PodContainer>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodContainer {
    pub name: String,
    pub image: String,
    pub ports: Vec<ContainerPort>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerPort {
    pub name: String,
    pub proto: Proto,
    pub port: u16,
    pub host_port: Option<u16>,
    pub host_ip: Option<IpAddr>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Node {
    pub name: String,
    pub uid: String,
    /// InternalIP and ExternalIP.
    pub addresses: Vec<IpAddr>,
    pub pod_cidrs: Vec<IpNet>,
}

/// A pod's sandbox, as the container runtime (CRI) knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sandbox {
    pub id: String,
    pub pod: ObjectName,
    pub pod_uid: String,
    /// `SANDBOX_READY`; a sandbox that is not ready has no network any more.
    pub ready: bool,
    /// It shares the node's network namespace.
    pub host_network: bool,
    /// Path of its own network namespace, where the runtime tells it.
    pub netns: Option<String>,
    pub ips: Vec<IpAddr>,
    pub containers: Vec<Container>,
}

/// A container in a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Container {
    pub id: String,
    pub name: String,
    pub image: String,
    pub running: bool,
    /// The image's ExposedPorts; `None` where its configuration could not be read.
    pub exposed: Option<Vec<ExposedPort>>,
}

/// `80/tcp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExposedPort {
    pub port: u16,
    pub proto: Proto,
}

impl fmt::Display for ExposedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.port, self.proto)
    }
}
