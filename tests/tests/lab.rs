//! The lab itself: it comes up, behaves as the recorded cluster did, and leaves nothing behind.

use porttrace_tests::lab::cni::Interface;
use porttrace_tests::lab::rules::IptablesFlavour;
use porttrace_tests::lab::topology::{GATEWAY_V4, HOST_PORT, NodeName, OUTSIDE_V4, OUTSIDE_V6, service};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::netns::namespaces_of;
use porttrace_tests::peer::{Answer, Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

/// The source address that the server sees, when hostPort 9088 works: portmap's `CNI-HOSTPORT-SETMARK` masquerades pods of
/// the node's own subnet and 127.0.0.1, kindnet masquerades worker2's pod on worker2, and everybody else is seen as he is.
fn seen_source(origin: Origin, v6: bool) -> IpAddr {
    let pick = |v4: IpAddr, other: IpAddr| if v6 { other } else { v4 };
    let (worker3, worker2) = (NodeName::Worker3, NodeName::Worker2);
    match origin {
        Origin::Node => pick(worker3.v4().into(), worker3.v6().into()),
        Origin::OtherNode | Origin::OtherPod => pick(worker2.v4().into(), worker2.v6().into()),
        Origin::Outside => pick(OUTSIDE_V4.into(), OUTSIDE_V6.into()),
        Origin::Loopback | Origin::Pod => pick(worker3.pod_v4(1).into(), worker3.pod_v6(1).into()),
    }
}

/// The hostPort from everywhere, as the recorded cluster answered. On ::1 the rewritten packet keeps the source ::1 and is
/// dropped on its way out (there is no route_localnet for IPv6): the client waits in vain.
fn check_host_port(lab: &Lab, phase: Phase) {
    for proto in [Transport::Tcp, Transport::Udp] {
        for v6 in [false, true] {
            for origin in Origin::ALL {
                let mut request = Connect::new(proto, SocketAddr::new(origin.target(v6), HOST_PORT));
                let hopeless = origin == Origin::Loopback && v6;
                if hopeless {
                    request.timeout = Duration::from_millis(200);
                }
                let answer = lab.connect(origin, &request).unwrap();
                match (hopeless, phase) {
                    (true, _) => assert_eq!(answer.result, Outcome::Timeout, "{phase:?} {origin:?} {answer:?}"),
                    (_, Phase::Broken) => assert_eq!(answer.result, Outcome::Refused, "{origin:?} {answer:?}"),
                    (_, Phase::Fixed) => check_answered(lab, origin, v6, &answer),
                }
            }
        }
    }
}

fn check_answered(lab: &Lab, origin: Origin, v6: bool, answer: &Answer) {
    let frontend = lab.pod("frontend", NodeName::Worker3).unwrap();
    assert_eq!(answer.result, Outcome::Ok, "{origin:?} {answer:?}");
    assert_eq!(answer.pod.as_deref(), Some("frontend@worker3"));
    assert_eq!(answer.saw.unwrap().ip(), seen_source(origin, v6), "{origin:?} {answer:?}");
    assert_eq!(answer.server_local, Some(SocketAddr::new(frontend.addresses()[usize::from(v6)], 80)));
    let logged = frontend.served(Duration::from_secs(2), |served| Some(served.saw) == answer.saw).unwrap();
    assert_eq!((logged.proto, Some(logged.local)), (answer.proto, answer.server_local));
}

/// Everything that a Service's port answers to `tries` connections; fails when a connection fails.
fn endpoints(lab: &Lab, origin: Origin, proto: Transport, to: SocketAddr) -> BTreeSet<String> {
    let mut pods = BTreeSet::new();
    // Each of three endpoints has 1/3: 60 tries miss one with probability 3·(2/3)^60 < 1e-10.
    for _ in 0..60 {
        let answer = lab.connect(origin, &Connect::new(proto, to)).unwrap();
        assert_eq!(answer.result, Outcome::Ok, "{origin:?} {answer:?}");
        pods.extend(answer.pod);
        if pods.len() == 3 {
            break;
        }
    }
    pods
}

fn on_every_node(pod: &str) -> BTreeSet<String> {
    NodeName::ALL.iter().map(|node| format!("{pod}@{}", node.name())).collect()
}

#[test]
fn the_host_port_is_refused_until_the_pod_is_repaired() {
    if !may_run("the lab") {
        return;
    }
    let mut lab = Lab::up(LabOptions::default()).unwrap();
    check_host_port(&lab, Phase::Broken);
    let before = lab.pod("frontend", NodeName::Worker3).unwrap().container_id.clone();
    lab.repair().unwrap();
    assert_ne!(lab.pod("frontend", NodeName::Worker3).unwrap().container_id, before, "a new sandbox");
    check_host_port(&lab, Phase::Fixed);
    let rules = lab.tools.save(lab.node(NodeName::Worker3), "iptables").unwrap();
    assert!(!rules.contains(&before), "CNI DEL removed the old sandbox's rules:\n{rules}");
}

#[test]
fn legacy_iptables_and_a_bridge_behave_the_same() {
    if !may_run("the lab") {
        return;
    }
    let flavour = IptablesFlavour::Legacy;
    let lab =
        Lab::up(LabOptions { phase: Phase::Fixed, flavour, interface: Interface::Bridge, ..LabOptions::default() })
            .unwrap();
    check_host_port(&lab, Phase::Fixed);
    let node = lab.node(NodeName::Worker3);
    assert!(lab.tools.save(node, "iptables").unwrap().contains("CNI-HOSTPORT-DNAT"));
    let nft = node.exec(["xtables-nft-multi", "iptables-save"]).unwrap();
    assert!(!nft.contains("KUBE-"), "nothing went into the other flavour:\n{nft}");
}

#[test]
fn pods_have_their_addresses_and_portmap_its_rules() {
    if !may_run("the lab") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    for pod in lab.pods() {
        let inside = pod.netns.exec(["ip", "-o", "addr", "show", "dev", "eth0", "scope", "global"]).unwrap();
        for address in pod.addresses() {
            assert!(inside.contains(&format!(" {address}/")), "{} has {inside}", pod.spec.name);
        }
        let route = lab.node(pod.spec.node).exec(["ip", "route", "get", &pod.addresses()[0].to_string()]).unwrap();
        assert!(route.contains(&format!("dev {} ", pod.host_interface)), "{route}");
    }
    let id = &lab.pod("frontend", NodeName::Worker3).unwrap().container_id;
    for (tool, pod) in [("iptables", "10.244.1.9"), ("ip6tables", "[fd00:10:244:1::9]")] {
        let rules = lab.tools.save(lab.node(NodeName::Worker3), tool).unwrap();
        for proto in ["tcp", "udp"] {
            let entry = format!(
                "-A CNI-HOSTPORT-DNAT -p {proto} -m comment --comment \"dnat name: \\\"kindnet\\\" id: \\\"{id}\\\"\" -m multiport --dports 9088 -j CNI-DN-"
            );
            assert!(rules.contains(&entry), "{rules}");
            let dnat = format!(" -p {proto} -m {proto} --dport 9088 -j DNAT --to-destination {pod}:8081");
            assert!(rules.contains(&dnat), "{rules}");
        }
        let jump =
            |chain: &str| rules.lines().position(|line| line.starts_with("-A PREROUTING") && line.ends_with(chain));
        assert!(jump("-j KUBE-SERVICES").unwrap() < jump("-j CNI-HOSTPORT-DNAT").unwrap(), "portmap appends");
    }
}

#[test]
fn services_reach_every_endpoint() {
    if !may_run("the lab") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let (frontends, resolvers) = (on_every_node("frontend"), on_every_node("dns"));
    for origin in [Origin::Node, Origin::Pod] {
        let cluster_ip = |ip, port| SocketAddr::new(ip, port);
        let http = service::HTTP_PORT;
        assert_eq!(endpoints(&lab, origin, Transport::Tcp, cluster_ip(service::FRONTEND_IP, http)), frontends);
        assert_eq!(endpoints(&lab, origin, Transport::Tcp, cluster_ip(service::DUAL_V4, http)), frontends);
        assert_eq!(endpoints(&lab, origin, Transport::Tcp, cluster_ip(service::DUAL_V6, http)), frontends);
        let dns = cluster_ip(service::DNS_IP, service::DNS_PORT);
        assert_eq!(endpoints(&lab, origin, Transport::Udp, dns), resolvers);
    }
    for origin in Origin::ALL {
        let port = |v6, port| SocketAddr::new(origin.target(v6), port);
        let (tcp, udp) = (Transport::Tcp, Transport::Udp);
        assert_eq!(endpoints(&lab, origin, tcp, port(false, service::FRONTEND_NODE_PORT)), frontends);
        assert_eq!(endpoints(&lab, origin, udp, port(false, service::DNS_NODE_PORT)), resolvers);
        if origin == Origin::Loopback {
            // kube-proxy serves no NodePort on ::1.
            let answer = lab.connect(origin, &Connect::new(tcp, port(true, service::DUAL_NODE_PORT))).unwrap();
            assert_eq!(answer.result, Outcome::Refused);
        } else {
            assert_eq!(endpoints(&lab, origin, tcp, port(true, service::DUAL_NODE_PORT)), frontends);
        }
        let closed = lab.connect(origin, &Connect::new(tcp, port(false, service::NO_ENDPOINTS_NODE_PORT))).unwrap();
        assert_eq!(closed.result, Outcome::Refused, "rejected for want of endpoints: {origin:?}");
    }
}

#[test]
fn clients_get_what_they_ask_for() {
    if !may_run("the lab") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    let to = SocketAddr::new(NodeName::Worker3.v4().into(), HOST_PORT);
    let bind = SocketAddr::new(OUTSIDE_V4.into(), 40_404);
    let request = Connect { bind: Some(bind), bytes: 300_000, ..Connect::new(Transport::Tcp, to) };
    let answer = lab.connect(Origin::Outside, &request).unwrap();
    assert_eq!((answer.result, answer.local, answer.saw), (Outcome::Ok, bind, Some(bind)));
    assert!(answer.bytes > 300_000, "{answer:?}");
    let nobody = SocketAddr::new(GATEWAY_V4.into(), 9);
    assert_eq!(lab.connect(Origin::Outside, &Connect::new(Transport::Tcp, nobody)).unwrap().result, Outcome::Refused);
}

#[test]
fn nothing_stays_behind() {
    if !may_run("the lab") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let inside = |lab: &Lab| {
        let mut all: Vec<(String, BTreeSet<i32>)> = vec![
            (lab.switch.name().to_owned(), lab.switch.processes()),
            (lab.outside.name().to_owned(), lab.outside.processes()),
        ];
        all.extend(NodeName::ALL.map(|node| (lab.node(node).name().to_owned(), lab.node(node).processes())));
        all.extend(lab.pods().map(|pod| (pod.netns.name().to_owned(), pod.netns.processes())));
        all
    };
    let before = inside(&lab);
    let servers: BTreeSet<i32> = before.iter().flat_map(|(_, processes)| processes.clone()).collect();
    assert_eq!(servers.len(), 6, "a server in each frontend and dns pod: {before:?}");
    drop(lab);
    let left = namespaces_of(std::process::id());
    for (name, _) in &before {
        assert!(!left.contains(name), "{name} is still there");
    }
    for pid in servers {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} still runs");
    }
}
