//! The Kubernetes objects of the lab, as `kubectl get svc,endpointslices,pods,nodes -A -o json` prints them.

use crate::stage::Stage;
use porttrace_tests::lab::pod::Pod;
use porttrace_tests::lab::proxy::Service;
use porttrace_tests::lab::topology::NodeName;
use serde_json::{Value, json};
use std::net::IpAddr;

/// Objects by kind; tests change what they want to be different.
pub struct Objects {
    pub services: Vec<Value>,
    pub slices: Vec<Value>,
    pub pods: Vec<Value>,
    nodes: Vec<Value>,
}

impl Objects {
    /// What an API server would say of a lab in which everything goes well: pods are labelled `app` with their names, and Services
    /// select those that are their endpoints.
    pub fn of(stage: &Stage) -> Self {
        let pods = || stage.lab.pods();
        Self {
            services: stage.services.iter().map(|one| service(one, &selected(stage, one))).collect(),
            slices: stage.services.iter().map(|one| slice(stage, one)).collect(),
            pods: pods().map(pod).collect(),
            nodes: NodeName::ALL.into_iter().map(node).collect(),
        }
    }

    pub fn list(&self) -> Value {
        let all = [&self.services, &self.slices, &self.pods, &self.nodes];
        json!({"kind": "List", "apiVersion": "v1", "items": all.into_iter().flatten().collect::<Vec<_>>()})
    }

    pub fn service(&mut self, name: &str) -> &mut Value {
        self.services.iter_mut().find(|one| one["metadata"]["name"] == name).unwrap()
    }

    /// The EndpointSlice of a Service.
    pub fn slice(&mut self, service: &str) -> &mut Value {
        self.slices.iter_mut().find(|one| one["metadata"]["labels"]["kubernetes.io/service-name"] == service).unwrap()
    }
}

/// The value of label `app` that a Service selects.
fn selected(stage: &Stage, service: &Service) -> String {
    let first = service.endpoints.first().map(|(at, _)| IpAddr::from(*at.ip()));
    let pod = stage.lab.pods().find(|pod| Some(pod.addresses()[0]) == first);
    pod.map_or(service.name, |pod| pod.spec.name).to_owned()
}

fn service(service: &Service, app: &str) -> Value {
    let target = service.endpoints.first().map_or(service.port, |(at, _)| at.port());
    let kind = match (service.load_balancer, service.node_port) {
        (Some(_), _) => "LoadBalancer",
        (None, Some(_)) => "NodePort",
        (None, None) => "ClusterIP",
    };
    let policy = |local| if local { "Local" } else { "Cluster" };
    let mut port = json!({
        "name": service.port_name, "protocol": service.proto.to_uppercase(), "port": service.port, "targetPort": target,
    });
    if let Some(number) = service.node_port {
        port["nodePort"] = json!(number);
    }
    let mut object = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": service.name, "namespace": "default"},
        "spec": {
            "type": kind, "clusterIP": service.cluster_ip, "clusterIPs": [service.cluster_ip], "ports": [port],
            "selector": {"app": app}, "internalTrafficPolicy": policy(service.internal_local),
        },
    });
    if kind != "ClusterIP" {
        object["spec"]["externalTrafficPolicy"] = json!(policy(service.external_local));
    }
    if service.endpoints.iter().any(|(_, on)| on.is_none()) {
        // The API server's own Service has none.
        object["spec"].as_object_mut().unwrap().remove("selector");
    }
    if !service.source_ranges.is_empty() {
        object["spec"]["loadBalancerSourceRanges"] = json!(service.source_ranges);
    }
    if let Some(address) = service.external_ip {
        object["spec"]["externalIPs"] = json!([address]);
    }
    if let Some(address) = service.load_balancer {
        object["status"] = json!({"loadBalancer": {"ingress": [{"ip": address, "ipMode": "VIP"}]}});
    }
    object
}

fn slice(stage: &Stage, service: &Service) -> Value {
    let target = service.endpoints.first().map_or(service.port, |(at, _)| at.port());
    let endpoints: Vec<Value> = service
        .endpoints
        .iter()
        .map(|(at, on)| {
            let mut endpoint = endpoint(IpAddr::from(*at.ip()), true);
            if let Some(node) = on {
                endpoint["nodeName"] = json!(node.name());
            }
            if let Some(pod) = stage.lab.pods().find(|pod| pod.addresses()[0] == *at.ip()) {
                endpoint["targetRef"] = json!({"kind": "Pod", "name": pod_name(pod), "namespace": "default"});
            }
            endpoint
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": format!("{}-slice", service.name), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service.name},
        },
        "ports": [{"name": service.port_name, "port": target, "protocol": service.proto.to_uppercase()}],
        "endpoints": endpoints,
    })
}

/// An endpoint, ready or not.
pub fn endpoint(address: impl Into<IpAddr>, ready: bool) -> Value {
    json!({
        "addresses": [address.into()], "conditions": {"ready": ready, "serving": ready, "terminating": false},
    })
}

fn pod_name(pod: &Pod) -> String {
    format!("{}-{}", pod.spec.name, pod.spec.node.name())
}

fn pod(pod: &Pod) -> Value {
    let spec = &pod.spec;
    let mut ports: Vec<Value> = spec
        .mappings
        .iter()
        .map(|mapping| {
            let mut port = json!({
                "containerPort": mapping.container_port, "hostPort": mapping.host_port,
                "protocol": mapping.protocol.to_uppercase(),
            });
            if let Some(address) = mapping.host_ip {
                port["hostIP"] = json!(address);
            }
            port
        })
        .collect();
    if ports.is_empty() {
        ports.extend(spec.tcp.iter().map(|port| json!({"containerPort": port, "protocol": "TCP"})));
        ports.extend(spec.udp.iter().map(|port| json!({"containerPort": port, "protocol": "UDP"})));
    }
    let ips: Vec<Value> = pod.addresses().iter().map(|address| json!({"ip": address})).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": pod_name(pod), "namespace": "default", "labels": {"app": spec.name}},
        "spec": {"nodeName": spec.node.name(), "containers": [{"name": "main", "image": "lab/peer:1", "ports": ports}]},
        "status": {
            "phase": "Running", "podIP": pod.addresses()[0], "podIPs": ips,
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

fn node(node: NodeName) -> Value {
    let subnet = node.subnet();
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name()},
        "spec": {"podCIDRs": [format!("10.244.{subnet}.0/24"), format!("fd00:10:244:{subnet}::/64")]},
        "status": {"addresses": [
            {"type": "InternalIP", "address": node.v4()}, {"type": "InternalIP", "address": node.v6()},
        ]},
    })
}
