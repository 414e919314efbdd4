//! Pods by their addresses: who they are, and what their images expose.

use super::cluster::{Cluster, ExposedPort, ObjectName, Part, Sandbox};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// A pod with a network of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    pub pod: ObjectName,
    /// The ExposedPorts of its containers' images, sorted; `None` where no image's configuration is known.
    pub exposed: Option<Vec<ExposedPort>>,
}

/// The pods of this node, as the Kubernetes API and the container runtime name them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workloads {
    by_address: BTreeMap<IpAddr, Workload>,
}

impl Workloads {
    /// What the runtime says of an address is newer than what the API says.
    pub fn new(cluster: &Cluster, sandboxes: &Part<Vec<Sandbox>>) -> Self {
        let mut by_address = BTreeMap::new();
        let ended = |phase: &str| matches!(phase, "Succeeded" | "Failed");
        for pod in cluster.pods.iter().filter(|pod| !pod.host_network && !ended(&pod.phase)) {
            let workload = Workload { pod: pod.name.clone(), exposed: None };
            by_address.extend(pod.ips.iter().map(|address| (*address, workload.clone())));
        }
        for sandbox in sandboxes.iter().filter(|sandbox| sandbox.ready && !sandbox.host_network) {
            let workload = Workload { pod: sandbox.pod.clone(), exposed: exposed(sandbox) };
            by_address.extend(sandbox.ips.iter().map(|address| (*address, workload.clone())));
        }
        Self { by_address }
    }

    /// The pod with this address.
    pub fn at(&self, address: IpAddr) -> Option<&Workload> {
        self.by_address.get(&address)
    }
}

fn exposed(sandbox: &Sandbox) -> Option<Vec<ExposedPort>> {
    let known: Vec<&Vec<ExposedPort>> =
        sandbox.containers.iter().filter_map(|container| container.exposed.as_ref()).collect();
    let mut all: Vec<ExposedPort> = known.iter().flat_map(|ports| ports.iter().copied()).collect();
    all.sort_unstable();
    all.dedup();
    (!known.is_empty()).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::cluster::{Container, Pod};
    use crate::core::model::flow::Proto;

    fn name(name: &str) -> ObjectName {
        ObjectName { namespace: "default".to_owned(), name: name.to_owned() }
    }

    #[test]
    fn the_runtime_overrides_the_api_and_ended_pods_are_left_out() {
        let ips = |text: &str| vec![text.parse::<IpAddr>().expect("an address")];
        let pod = |text: &str, address: &str| Pod { name: name(text), ips: ips(address), ..Pod::default() };
        let ended = Pod { phase: "Succeeded".to_owned(), ..pod("job", "10.244.1.7") };
        let pods = Part::Known(vec![ended, pod("old", "10.244.1.9"), pod("there", "10.244.1.8")]);
        let cluster = Cluster { pods, ..Cluster::default() };
        let port = |port| ExposedPort { port, proto: Proto::Tcp };
        let container = |exposed| Container { exposed, ..Container::default() };
        let ready = Sandbox {
            pod: name("new"),
            ready: true,
            ips: ips("10.244.1.9"),
            containers: vec![
                container(Some(vec![port(443), port(80)])),
                container(None),
                container(Some(vec![port(80)])),
            ],
            ..Sandbox::default()
        };
        let gone = Sandbox { ready: false, ..ready.clone() };
        let workloads = Workloads::new(&cluster, &Part::Known(vec![ready, Sandbox { pod: name("gone"), ..gone }]));
        let at = |text: &str| workloads.at(text.parse().expect("an address")).cloned();
        assert_eq!(at("10.244.1.9"), Some(Workload { pod: name("new"), exposed: Some(vec![port(80), port(443)]) }));
        assert_eq!(at("10.244.1.8"), Some(Workload { pod: name("there"), exposed: None }));
        assert_eq!(at("10.244.1.7"), None);
    }
}
