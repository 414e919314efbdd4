//! Services: endpoints that are missing, dead, elsewhere or out of date, and who may use them.

use crate::objects::{Objects, endpoint};
use crate::stage::{HERE, Stage};
use porttrace_tests::lab::proxy::Service;
use porttrace_tests::lab::topology::{NodeName, OUTSIDE_V4, service};
use porttrace_tests::lab::{LabOptions, Origin, Phase};
use porttrace_tests::peer::{Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use serde_json::json;
use std::net::{Ipv4Addr, SocketAddr};

const NOEP: u16 = service::NO_ENDPOINTS_NODE_PORT;

#[test]
fn services() {
    if !may_run("findings about Services") {
        return;
    }
    let mut stage = Stage::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() });
    healthy(&stage);
    no_listener(&mut stage);
    without_endpoints(&mut stage);
    without_ready_endpoints(&mut stage);
    selector_matches_nothing(&mut stage);
    target_port_name_not_found(&mut stage);
    rules_differ_from_endpoints(&mut stage);
    external_local(&mut stage);
    internal_local(&mut stage);
    source_ranges(&mut stage);
    nodeport_not_on_address(&mut stage);
    nodeport_and_process(&stage);
    localhost_not_served(&mut stage);
}

fn cluster_ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 96, 201, last)
}

/// Nothing is wrong with the lab as it is: whatever is found later was made.
fn healthy(stage: &Stage) {
    let objects = Objects::of(stage);
    for port in ["9088", "30080", "30053/udp"] {
        stage.explain_with(&objects, &[port]).only(&[]).predicts("works");
        stage.explain(&[port]).only(&[]);
    }
    stage.outside(30080, Outcome::Ok);
}

/// A targetPort at which nobody listens: a RST from the pod.
fn no_listener(stage: &mut Stage) {
    let service = Service::new("wrong", cluster_ip(1), 80, Some(30201));
    stage.serve(service.clone().endpoint(HERE, 9, 8081));
    stage.outside(30201, Outcome::Refused);
    let told = stage.explain_with(&Objects::of(stage), &["30201"]).only(&["no-listener"]).predicts("refused");
    let told = told.shows("no-listener", "socket", "tcp *:80 (lab-peer/");
    assert_eq!(told.change("no-listener"), "set targetPort of port http in Service default/wrong to 80");
    // Without the API the rules tell where the Service leads.
    let told = stage.explain(&["30201"]).only(&["no-listener"]).predicts("refused");
    assert_eq!(told.change("no-listener"), "set targetPort of port http in Service default/wrong to 80");
    stage.serve(service.endpoint(HERE, 9, 80));
    stage.answered(Origin::Outside, 30201, "frontend@worker3");
    stage.explain_with(&Objects::of(stage), &["30201"]).only(&[]).predicts("works");
    stage.explain(&["30201"]).only(&[]).predicts("works");
}

/// The Service `noep` gets a pod as its endpoint, so that kube-proxy refuses it no longer.
fn give_endpoint(stage: &mut Stage) {
    let mut service = stage.services.iter().find(|one| one.name == "noep").unwrap().clone();
    service = service.endpoint(HERE, 9, 80);
    stage.serve(service);
    stage.answered(Origin::Outside, NOEP, "frontend@worker3");
    stage.explain_with(&Objects::of(stage), &[&NOEP.to_string()]).only(&[]).predicts("works");
    stage.explain(&[&NOEP.to_string()]).only(&[]).predicts("works");
    // As it was.
    let mut service = stage.services.iter().find(|one| one.name == "noep").unwrap().clone();
    service.endpoints.clear();
    stage.serve(service);
    stage.outside(NOEP, Outcome::Refused);
}

fn without_endpoints(stage: &mut Stage) {
    const ID: &str = "service-without-endpoints";
    stage.outside(NOEP, Outcome::Refused);
    let told = stage.explain(&[&NOEP.to_string()]).only(&[ID]).predicts("refused");
    let told = told.says(ID, "Service default/noep:p80 has no ready endpoints, by kube-proxy's rules");
    let told = told.shows(ID, "rule", "has no endpoints");
    let asked = "`kubectl -n default get endpointslices -l kubernetes.io/service-name=noep`";
    assert!(told.change(ID).contains(asked), "{}", told.text);

    // Its pod is there and does not run.
    let mut objects = Objects::of(stage);
    objects.pods.push(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "noep-0", "namespace": "default", "labels": {"app": "noep"}},
        "spec": {"nodeName": "worker3", "containers": [{"name": "main", "image": "lab/peer:1"}]},
        "status": {"phase": "Pending"},
    }));
    let told = stage.explain_with(&objects, &[&NOEP.to_string()]).only(&[ID]).predicts("refused");
    let told = told.shows(ID, "object", "its EndpointSlice is empty").shows(ID, "rule", "REJECT");
    assert_eq!(told.change(ID), "make the pods with app=noep run");
    give_endpoint(stage);
}

fn without_ready_endpoints(stage: &mut Stage) {
    const ID: &str = "service-without-ready-endpoints";
    let mut objects = Objects::of(stage);
    objects.service("noep")["spec"]["selector"] = json!({"app": "frontend"});
    let mut not_ready = endpoint(HERE.pod_v4(9), false);
    not_ready["nodeName"] = json!("worker3");
    not_ready["targetRef"] = json!({"kind": "Pod", "name": "frontend-worker3", "namespace": "default"});
    objects.slice("noep")["endpoints"] = json!([not_ready]);
    stage.outside(NOEP, Outcome::Refused);
    let told = stage.explain_with(&objects, &[&NOEP.to_string()]).only(&[ID]).predicts("refused");
    let told = told.shows(ID, "object", "10.244.1.9 ready=false").shows(ID, "rule", "REJECT");
    assert!(told.change(ID).starts_with("find out why pod default/frontend-worker3 is not ready"), "{}", told.text);
    give_endpoint(stage);
}

fn selector_matches_nothing(stage: &mut Stage) {
    const ID: &str = "selector-matches-nothing";
    let mut objects = Objects::of(stage);
    objects.service("noep")["spec"]["selector"] = json!({"app": "frontent"});
    stage.outside(NOEP, Outcome::Refused);
    let told = stage.explain_with(&objects, &[&NOEP.to_string()]).only(&[ID]).predicts("refused");
    assert!(told.change(ID).ends_with("there are pods with app=frontend"), "{}", told.text);
    give_endpoint(stage);
}

/// The pods are endpoints, but of no port (the EndpointSlice controller leaves the port out), and kube-proxy refuses.
fn target_port_name_not_found(stage: &mut Stage) {
    const ID: &str = "target-port-name-not-found";
    let mut objects = Objects::of(stage);
    objects.service("noep")["spec"]["selector"] = json!({"app": "frontend"});
    objects.service("noep")["spec"]["ports"][0]["targetPort"] = json!("web");
    objects.slice("noep")["ports"] = json!([]);
    objects.slice("noep")["endpoints"] = json!([endpoint(HERE.pod_v4(9), true)]);
    stage.outside(NOEP, Outcome::Refused);
    let told = stage.explain_with(&objects, &[&NOEP.to_string()]).only(&[ID]).predicts("refused");
    let told = told.says(ID, "targetPort \"web\" of Service default/noep:p80");
    assert_eq!(told.change(ID), "name the container's port \"web\", or give the number as targetPort");
    give_endpoint(stage);
}

/// kube-proxy does not run while a pod is replaced: its rules lead to the address that was.
fn rules_differ_from_endpoints(stage: &mut Stage) {
    const ID: &str = "rules-differ-from-endpoints";
    let service = Service::new("moved", cluster_ip(2), 80, Some(30202));
    stage.lab.start_pod(Stage::web_pod("moved", 51, None)).unwrap();
    stage.serve(service.clone().endpoint(HERE, 51, 80));
    stage.answered(Origin::Outside, 30202, "moved@worker3");
    stage.lab.redeploy("moved", HERE, |spec| spec.number = 52).unwrap();
    stage.outside(30202, Outcome::Timeout);
    stage.services.last_mut().unwrap().endpoints = service.endpoint(HERE, 52, 80).endpoints;
    let told = stage.explain_with(&Objects::of(stage), &["30202"]).only(&[ID]).predicts("silent");
    let told = told.says(ID, "the rules still lead to 10.244.1.51:80, which is no endpoint any more");
    let told = told.says(ID, "they do not lead to 10.244.1.52:80, which is ready").shows(ID, "rule", "30202");
    assert!(told.change(ID).contains("restarting it writes all rules anew"), "{}", told.text);
    stage.sync();
    stage.answered(Origin::Outside, 30202, "moved@worker3");
    stage.explain_with(&Objects::of(stage), &["30202"]).only(&[]).predicts("works");
    stage.lab.take_pod("moved", HERE).unwrap().stop().unwrap();
    stage.services.retain(|one| one.name != "moved");
    stage.sync();
}

/// A kube-proxy for worker2, which has the endpoints.
fn sync_worker2(stage: &Stage) {
    let mut proxy = porttrace_tests::lab::proxy::Proxy::new(NodeName::Worker2);
    proxy.sync(stage.lab.node(NodeName::Worker2), &stage.lab.tools, &stage.services).unwrap();
}

fn external_local(stage: &mut Stage) {
    const ID: &str = "external-local-without-endpoints";
    let service = Service { external_local: true, ..Service::new("outer", cluster_ip(3), 80, Some(30203)) };
    stage.serve(service.clone().endpoint(NodeName::Worker2, 9, 80));
    sync_worker2(stage);
    stage.outside(30203, Outcome::Timeout);
    // The node itself and its pods are served all the same.
    stage.answered(Origin::Node, 30203, "frontend@worker2");
    stage.answered(Origin::Pod, 30203, "frontend@worker2");
    let told = stage.explain_with(&Objects::of(stage), &["30203"]).only(&[ID]).predicts("silent");
    let told = told.shows(ID, "rule", "has no local endpoints").says(ID, "endpoints are on worker2");
    let change = "send clients to worker2, run a pod of it here, or set externalTrafficPolicy: Cluster";
    assert_eq!(told.change(ID), change);
    // Each of the three.
    let there = stage.meets(Origin::Outside, (NodeName::Worker2.v4(), 30203), Outcome::Ok);
    assert_eq!((there.pod.as_deref(), there.saw.unwrap().ip()), (Some("frontend@worker2"), OUTSIDE_V4.into()));
    stage.serve(service.clone().endpoint(NodeName::Worker2, 9, 80).endpoint(HERE, 9, 80));
    stage.answered(Origin::Outside, 30203, "frontend@worker3");
    stage.explain_with(&Objects::of(stage), &["30203"]).only(&[]).predicts("works");
    stage.serve(Service { external_local: false, ..service }.endpoint(NodeName::Worker2, 9, 80));
    stage.answered(Origin::Outside, 30203, "frontend@worker2");
    stage.explain_with(&Objects::of(stage), &["30203"]).only(&[]).predicts("works");
}

fn internal_local(stage: &mut Stage) {
    const ID: &str = "internal-local-without-endpoints";
    let service = Service { internal_local: true, ..Service::new("inner", cluster_ip(4), 80, None) };
    stage.serve(service.clone().endpoint(NodeName::Worker2, 9, 80));
    let asks = |stage: &Stage, outcome| {
        for origin in [Origin::Node, Origin::Pod] {
            stage.meets(origin, (cluster_ip(4), 80), outcome);
        }
    };
    asks(stage, Outcome::Timeout);
    let told = stage.explain_with(&Objects::of(stage), &["svc/inner"]).only(&[ID]).predicts("silent");
    let told = told.shows(ID, "rule", "has no local endpoints");
    assert!(told.change(ID).ends_with("run a pod of it here, or set internalTrafficPolicy: Cluster"), "{}", told.text);
    stage.serve(service.clone().endpoint(NodeName::Worker2, 9, 80).endpoint(HERE, 9, 80));
    asks(stage, Outcome::Ok);
    stage.explain_with(&Objects::of(stage), &["svc/inner"]).only(&[]).predicts("works");
    stage.serve(Service { internal_local: false, ..service }.endpoint(NodeName::Worker2, 9, 80));
    asks(stage, Outcome::Ok);
    stage.explain_with(&Objects::of(stage), &["svc/inner"]).only(&[]).predicts("works");
}

fn source_ranges(stage: &mut Stage) {
    const ID: &str = "source-ranges-exclude-client";
    let address = Ipv4Addr::new(203, 0, 113, 5);
    stage.lab.outside.exec(["ip", "route", "add", "203.0.113.0/24", "via", "172.18.0.3"]).unwrap();
    let service = |ranges: &[&'static str]| Service {
        load_balancer: Some(address),
        source_ranges: ranges.to_vec(),
        ..Service::new("guarded", cluster_ip(5), 80, Some(30205)).endpoint(HERE, 9, 80)
    };
    stage.serve(service(&["10.9.0.0/16"]));
    stage.meets(Origin::Outside, (address, 80), Outcome::Timeout);
    let client = OUTSIDE_V4.to_string();
    let asked = ["svc/guarded", "--from", &client];
    let told = stage.explain_with(&Objects::of(stage), &asked).only(&[ID]);
    let told = told.shows(ID, "rule", "traffic not accepted by KUBE-FW-").shows(ID, "object", "10.9.0.0/16");
    let change = "add 172.18.0.100 to loadBalancerSourceRanges, or use the NodePort, which they do not guard";
    assert_eq!(told.change(ID), change);
    // Both of it.
    stage.answered(Origin::Outside, 30205, "frontend@worker3");
    stage.serve(service(&["10.9.0.0/16", "172.18.0.100/32"]));
    stage.meets(Origin::Outside, (address, 80), Outcome::Ok);
    stage.explain_with(&Objects::of(stage), &asked).only(&[]).predicts("works");
}

fn nodeport_not_on_address(stage: &mut Stage) {
    const ID: &str = "nodeport-not-on-address";
    let other = Ipv4Addr::new(172, 18, 0, 34);
    stage.shell("ip addr add 172.18.0.34/16 dev eth0");
    stage.proxy.node_port_addresses = vec![other];
    stage.sync();
    stage.outside(30205, Outcome::Refused);
    stage.meets(Origin::Outside, (other, 30205), Outcome::Ok);
    let told = stage.explain(&["30205"]).only(&[ID]).predicts("refused");
    let told = told.shows(ID, "rule", "-d 172.18.0.34/32");
    let change = "add 172.18.0.3 to kube-proxy's nodePortAddresses, or leave it empty for all addresses";
    assert_eq!(told.change(ID), change);
    for addresses in [vec![other, HERE.v4()], Vec::new()] {
        stage.proxy.node_port_addresses = addresses;
        stage.sync();
        stage.answered(Origin::Outside, 30205, "frontend@worker3");
        stage.explain(&["30205"]).only(&[]).predicts("works");
    }
    stage.shell("ip addr del 172.18.0.34/16 dev eth0");
}

fn nodeport_and_process(stage: &Stage) {
    const ID: &str = "nodeport-and-process";
    let process = stage.process(30205);
    for origin in [Origin::Outside, Origin::Node] {
        stage.answered(origin, 30205, "frontend@worker3");
    }
    let told = stage.explain(&["30205"]).only(&[ID]).predicts("works");
    let told = told.says(ID, "the NodePort wins now").shows(ID, "socket", "lab-peer/").shows(ID, "rule", "KUBE-EXT-");
    let change = "move the process out of the range of NodePorts, or give the Service another nodePort than 30205";
    assert_eq!(told.change(ID), change);
    drop(process);
    let _moved = stage.process(9205);
    stage.answered(Origin::Outside, 9205, "process@worker3");
    stage.explain(&["30205"]).only(&[]).predicts("works");
    stage.explain(&["9205"]).only(&[]).predicts("works");
}

/// A NodePort by 127.0.0.1 whose endpoint is behind an interface without route_localnet.
fn localhost_not_served(stage: &mut Stage) {
    const ID: &str = "localhost-not-served";
    let service = Service::new("far", cluster_ip(6), 80, Some(30206));
    stage.serve(service.endpoint(NodeName::Worker2, 9, 80));
    stage.shell("sysctl -qw net.ipv4.conf.all.route_localnet=0");
    let request = Connect::new(Transport::Tcp, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 30206));
    stage.sends(Origin::Loopback, request, Outcome::Timeout);
    let told = stage.explain(&["30206"]).only(&[ID]);
    let told = told.says(ID, "route_localnet is 0").shows(ID, "setting", "net.ipv4.conf.all.route_localnet");
    assert!(told.change(ID).starts_with("use the node's address instead of 127.0.0.1"), "{}", told.text);
    stage.answered(Origin::Node, 30206, "frontend@worker2");
    stage.shell("sysctl -qw net.ipv4.conf.all.route_localnet=1");
    stage.answered(Origin::Loopback, 30206, "frontend@worker2");
    stage.explain(&["30206"]).only(&[]);
}
