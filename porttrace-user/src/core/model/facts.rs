//! All that is known of a node and its workloads: what `explain`, `ports`, `matrix` and the findings look at.

use super::cluster::{Cluster, Part, Pod, Sandbox, Service};
use super::pods::PodSockets;
use super::state::NodeState;
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// One node, its pods, and what the cluster says of them.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub state: NodeState,
    pub cluster: Cluster,
    /// The container runtime's sandboxes.
    pub sandboxes: Part<Vec<Sandbox>>,
    /// What listens inside the pods' network namespaces.
    pub listeners: Part<PodSockets>,
    /// Sandbox IDs or pod names → addresses, from the CNI's results.
    pub cni: BTreeMap<String, Vec<IpAddr>>,
    /// Network namespaces of the node by name → addresses.
    pub namespaces: BTreeMap<String, Vec<IpAddr>>,
    pub proxy: Part<ProxyConfig>,
    /// Services are those that kube-proxy's rules name, as the Kubernetes API said nothing, for this reason.
    pub derived: Option<String>,
}

/// What kube-proxy was told, as far as rules alone do not tell it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyConfig {
    /// `iptables`, `nftables`, `ipvs`; empty: its default.
    pub mode: String,
    /// `nodePortAddresses`; empty (and not primary either): all addresses of the node.
    pub node_port_addresses: Vec<IpNet>,
    /// `nodePortAddresses: [primary]`: the addresses of the Node object.
    pub node_port_primary: bool,
    pub cluster_cidrs: Vec<IpNet>,
    /// `iptables.localhostNodePorts`; `None`: the default, yes.
    pub localhost_node_ports: Option<bool>,
    /// `metricsBindAddress`; empty: its default.
    pub metrics: String,
}

impl Facts {
    /// The pod with this address (host-network pods have the node's, and are left out).
    pub fn pod_at(&self, address: IpAddr) -> Option<&Pod> {
        self.cluster.pods.iter().find(|pod| !pod.host_network && pod.ips.contains(&address))
    }

    /// Why those parts that Kubernetes and the container runtime tell are missing, each reason once.
    pub fn missing(&self) -> Vec<&str> {
        let Cluster { services, slices, pods, nodes, .. } = &self.cluster;
        let parts = [
            services.get().err(),
            slices.get().err(),
            pods.get().err(),
            nodes.get().err(),
            self.sandboxes.get().err(),
            self.listeners.get().err(),
        ];
        let mut reasons: Vec<&str> = Vec::new();
        for why in parts.into_iter().flatten() {
            if !reasons.contains(&why) {
                reasons.push(why);
            }
        }
        reasons
    }

    /// The sandbox with this address.
    pub fn sandbox_at(&self, address: IpAddr) -> Option<&Sandbox> {
        self.sandboxes.iter().find(|sandbox| sandbox.ready && sandbox.ips.contains(&address))
    }

    pub fn service(&self, namespace: &str, name: &str) -> Option<&Service> {
        self.cluster.services.iter().find(|service| service.name.namespace == namespace && service.name.name == name)
    }

    /// The name of whoever has this address, else the address by which it is called.
    pub fn called(&self, address: IpAddr) -> String {
        let first = || self.listeners.known().map_or(address, |pods| pods.first(address)).to_string();
        self.name_at(address).unwrap_or_else(first)
    }

    /// The pod of k3s's load balancer with this address: rules in its own network namespace send connections on to a Service,
    /// and nothing listens in it (klipper-lb, `entry`).
    pub fn balancer_at(&self, address: IpAddr) -> Option<String> {
        self.name_at(address).filter(|name| name.split('/').nth(1).is_some_and(|name| name.starts_with("svclb-")))
    }

    /// Takes the sockets of pods that only send on for what they are: no answer to who takes a connection.
    pub fn forget_balancers(&mut self) {
        let Some(pods) = self.listeners.known() else { return };
        let balancers: Vec<IpAddr> = pods.addresses().filter(|address| self.balancer_at(*address).is_some()).collect();
        if let Part::Known(pods) = &mut self.listeners {
            balancers.into_iter().for_each(|address| pods.forget(address));
        }
    }

    /// Gives the node its name in Kubernetes: the one that it goes by already if a Node has it, else that of the Node with
    /// this node's addresses.
    pub fn name_node(&mut self) {
        let known = |name: &str| self.cluster.nodes.iter().any(|node| node.name == name);
        if self.state.name.as_deref().is_some_and(known) {
            return;
        }
        let ours = |address: &IpAddr| self.is_own(*address) == Some(true);
        let node = self.cluster.nodes.iter().find(|node| node.addresses.iter().any(ours));
        if let Some(name) = node.map(|node| node.name.clone()) {
            self.state.name = Some(name);
        }
    }

    /// The Services as Kubernetes has them, with selectors and policies.
    ///
    /// # Errors
    /// Why they are not known.
    pub fn asked_services(&self) -> Result<&[Service], &str> {
        match &self.derived {
            Some(why) => Err(why),
            None => self.cluster.services.get().map(Vec::as_slice),
        }
    }

    /// A name for whoever has this address: `pod default/frontend-a`, else nothing.
    pub fn name_at(&self, address: IpAddr) -> Option<String> {
        let by_api = self.pod_at(address).map(|pod| pod.name.to_string());
        by_api.or_else(|| self.sandbox_at(address).map(|sandbox| sandbox.pod.to_string()))
    }

    /// Whether an address is this node's own; `None`: its addresses are not known.
    pub fn is_own(&self, address: IpAddr) -> Option<bool> {
        let own = self.state.addresses.as_ref()?;
        Some(address.is_loopback() || own.iter().any(|own| own.address == address))
    }
}
