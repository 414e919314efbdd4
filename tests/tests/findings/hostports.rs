//! hostPorts: nobody listens, stale chains, several owners of one port, the wrong address.

use crate::stage::{HERE, Stage, mapping};
use porttrace_tests::lab::proxy::Service;
use porttrace_tests::lab::topology::{HOST_PORT, NodeName, OUTSIDE_V4};
use porttrace_tests::lab::{LabOptions, Origin};
use porttrace_tests::peer::{Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use std::net::{Ipv4Addr, SocketAddr};

#[test]
fn host_ports() {
    if !may_run("findings about hostPorts") {
        return;
    }
    let mut stage = Stage::up(LabOptions::default());
    no_listener(&mut stage);
    listens_on_loopback_only(&mut stage);
    hostport_and_process(&stage);
    hostport_twice(&mut stage);
    host_ip_not_here(&mut stage);
    stale_hostport(&mut stage);
    hostport_and_nodeport(&mut stage);
    localhost_not_served(&stage);
    portmap_catches_forwarded(&mut stage);
}

/// The founding story: a RST from the pod for TCP, an ICMP error from its kernel for UDP.
fn no_listener(stage: &mut Stage) {
    stage.outside(HOST_PORT, Outcome::Refused);
    let datagram = Connect::new(Transport::Udp, SocketAddr::new(HERE.v4().into(), HOST_PORT));
    stage.sends(Origin::Outside, datagram.clone(), Outcome::Refused);
    let told = stage.explain(&["9088"]).only(&["no-listener"]).predicts("refused");
    let told = told.says("no-listener", "where nothing listens; it listens on 80");
    let told = told.shows("no-listener", "rule", "--to-destination 10.244.1.9:8081");
    let told = told.shows("no-listener", "socket", "tcp *:80 (lab-peer/");
    assert_eq!(told.change("no-listener"), "set containerPort 8081 (hostPort 9088) in 10.244.1.9 to 80");
    stage.lab.repair().unwrap();
    stage.answered(Origin::Outside, HOST_PORT, "frontend@worker3");
    stage.sends(Origin::Outside, datagram, Outcome::Ok);
    stage.explain(&["9088"]).only(&[]).predicts("works");
}

fn listens_on_loopback_only(stage: &mut Stage) {
    let server = |stage: &mut Stage, address: Option<Ipv4Addr>| {
        let pod = stage.lab.pod_mut("frontend", HERE).unwrap();
        pod.serve(&[80], &[80], address.map(Into::into)).unwrap();
    };
    server(stage, Some(Ipv4Addr::LOCALHOST));
    stage.outside(HOST_PORT, Outcome::Refused);
    let told = stage.explain(&["9088"]).only(&["listens-on-loopback-only"]).predicts("refused");
    let told = told.shows("listens-on-loopback-only", "socket", "tcp 127.0.0.1:80 (lab-peer/");
    assert!(told.change("listens-on-loopback-only").contains("listen on 0.0.0.0 (or ::)"), "{}", told.text);
    server(stage, Some(Ipv4Addr::UNSPECIFIED));
    stage.answered(Origin::Outside, HOST_PORT, "frontend@worker3");
    // IPv6 is still refused; the sockets of before take both families again.
    server(stage, None);
    stage.explain(&["9088"]).only(&[]).predicts("works");
}

/// portmap's rules come before the socket, also for the node itself.
fn hostport_and_process(stage: &Stage) {
    let process = stage.process(HOST_PORT);
    for origin in [Origin::Outside, Origin::Node, Origin::Loopback] {
        stage.answered(origin, HOST_PORT, "frontend@worker3");
    }
    let told = stage.explain(&["9088"]).only(&["hostport-and-process"]).predicts("works");
    let told = told.says("hostport-and-process", "the hostPort wins now, and the process is never asked");
    let told =
        told.shows("hostport-and-process", "socket", "lab-peer/").shows("hostport-and-process", "rule", "CNI-DN-");
    assert_eq!(told.change("hostport-and-process"), "move the process or the hostPort to another port than 9088");
    drop(process);
    let _moved = stage.process(9089);
    stage.answered(Origin::Outside, 9089, "process@worker3");
    stage.answered(Origin::Outside, HOST_PORT, "frontend@worker3");
    stage.explain(&["9088"]).only(&[]).predicts("works");
    stage.explain(&["9089"]).only(&[]).predicts("works");
}

fn hostport_twice(stage: &mut Stage) {
    stage.lab.start_pod(Stage::web_pod("twin", 31, Some(HOST_PORT))).unwrap();
    stage.answered(Origin::Outside, HOST_PORT, "frontend@worker3");
    let told = stage.explain(&["9088"]).only(&["hostport-twice"]).predicts("works");
    let told = told.says("hostport-twice", "10.244.1.9 wins now").shows("hostport-twice", "rule", "10.244.1.31:80");
    assert!(told.change("hostport-twice").contains("another hostPort"), "{}", told.text);
    stage.lab.redeploy("twin", HERE, |spec| spec.mappings = vec![mapping(9188, None)]).unwrap();
    stage.answered(Origin::Outside, HOST_PORT, "frontend@worker3");
    stage.answered(Origin::Outside, 9188, "twin@worker3");
    stage.explain(&["9088"]).only(&[]).predicts("works");
    stage.explain(&["9188"]).only(&[]).predicts("works");
    // One number on two addresses of the node is no quarrel.
    stage.shell("ip addr add 172.18.0.33/16 dev eth0");
    let on = |address| vec![mapping(9189, Some(address))];
    stage.lab.redeploy("twin", HERE, |spec| spec.mappings = on(HERE.v4())).unwrap();
    let second = Ipv4Addr::new(172, 18, 0, 33);
    stage.lab.start_pod(Stage::web_pod("other", 32, None)).unwrap();
    stage.lab.redeploy("other", HERE, |spec| spec.mappings = on(second)).unwrap();
    stage.answered(Origin::Outside, 9189, "twin@worker3");
    let answer = stage.meets(Origin::Outside, (second, 9189), Outcome::Ok);
    assert_eq!(answer.pod.as_deref(), Some("other@worker3"));
    stage.explain(&["9189"]).only(&[]).predicts("works");
    for name in ["twin", "other"] {
        stage.lab.take_pod(name, HERE).unwrap().stop().unwrap();
    }
    stage.shell("ip addr del 172.18.0.33/16 dev eth0");
}

fn host_ip_not_here(stage: &mut Stage) {
    let mut spec = Stage::web_pod("pinned", 33, None);
    spec.mappings = vec![mapping(9091, Some(Ipv4Addr::new(172, 18, 0, 77)))];
    stage.lab.start_pod(spec).unwrap();
    stage.outside(9091, Outcome::Refused);
    let told = stage.explain(&["9091"]).only(&["host-ip-not-here"]);
    let told = told.shows("host-ip-not-here", "rule", "-d 172.18.0.77/32");
    let change = told.change("host-ip-not-here");
    assert!(change.starts_with("leave hostIP out, or set it to an address of this node (172.18.0.3,"), "{change}");
    stage.lab.redeploy("pinned", HERE, |spec| spec.mappings = vec![mapping(9091, Some(HERE.v4()))]).unwrap();
    stage.answered(Origin::Outside, 9091, "pinned@worker3");
    stage.explain(&["9091"]).only(&[]).predicts("works");
    stage.lab.redeploy("pinned", HERE, |spec| spec.mappings = vec![mapping(9091, None)]).unwrap();
    stage.answered(Origin::Outside, 9091, "pinned@worker3");
    stage.explain(&["9091"]).only(&[]).predicts("works");
    stage.lab.take_pod("pinned", HERE).unwrap().stop().unwrap();
}

/// A pod that went without CNI DEL: its chain swallows the port, also that of a new pod, until it is removed.
fn stale_hostport(stage: &mut Stage) {
    stage.lab.start_pod(Stage::web_pod("gone", 41, Some(9093))).unwrap();
    stage.answered(Origin::Outside, 9093, "gone@worker3");
    stage.lab.take_pod("gone", HERE).unwrap().abandon().unwrap();
    stage.outside(9093, Outcome::Timeout);
    let told = stage.explain(&["9093"]).only(&["stale-hostport"]).predicts("silent");
    let told = told.shows("stale-hostport", "rule", "--to-destination 10.244.1.41:80");
    told.shows("stale-hostport", "route", "leads out by eth0").says("stale-hostport", "no pod's any more");

    stage.lab.start_pod(Stage::web_pod("heir", 42, Some(9093))).unwrap();
    stage.outside(9093, Outcome::Timeout);
    let told = stage.explain(&["9093"]).only(&["stale-hostport"]).predicts("silent");
    let told = told.says("stale-hostport", "and hides that of 10.244.1.42");
    stage.follow(&told, "stale-hostport");
    stage.answered(Origin::Outside, 9093, "heir@worker3");
    stage.explain(&["9093"]).only(&[]).predicts("works");
    let rules = stage.lab.tools.save(stage.node(), "iptables").unwrap();
    assert!(!rules.contains("10.244.1.41"), "{rules}");
    stage.lab.take_pod("heir", HERE).unwrap().stop().unwrap();
}

/// Who wins is decided by the order of the jumps: kube-proxy puts its own first, but leaves one that is there in its place.
fn hostport_and_nodeport(stage: &mut Stage) {
    const PORT: u16 = 30081;
    let service = Service::new("collide", Ipv4Addr::new(10, 96, 200, 81), 80, Some(PORT));
    stage.serve(service.endpoint(NodeName::Worker2, 9, 80));
    stage.lab.start_pod(Stage::web_pod("collide", 43, Some(PORT))).unwrap();
    stage.answered(Origin::Outside, PORT, "frontend@worker2");
    let told = stage.explain(&["30081"]).only(&["hostport-and-nodeport"]);
    let told =
        told.says("hostport-and-nodeport", "the NodePort wins now; a restart of kube-proxy does not change that");
    told.shows("hostport-and-nodeport", "rule", "10.244.1.43:80").shows("hostport-and-nodeport", "rule", "KUBE-EXT-");

    // portmap was first, and kube-proxy's jump is behind it.
    for chain in ["PREROUTING", "OUTPUT"] {
        stage.shell(&format!(
            "iptables -t nat -D {chain} -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT && \
             iptables -t nat -I {chain} 1 -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT"
        ));
    }
    stage.answered(Origin::Outside, PORT, "collide@worker3");
    let told = stage.explain(&["30081"]).only(&["hostport-and-nodeport"]);
    told.says("hostport-and-nodeport", "the hostPort wins now; once kube-proxy has to write its jump anew");

    // It does: somebody flushed its jump, and kube-proxy restores it as the first rule (`iptables -I`).
    for chain in ["PREROUTING", "OUTPUT"] {
        let jump = "-m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES";
        stage.shell(&format!("iptables -t nat -D {chain} {jump} && iptables -t nat -I {chain} {jump}"));
    }
    stage.answered(Origin::Outside, PORT, "frontend@worker2");
    let told = stage.explain(&["30081"]).only(&["hostport-and-nodeport"]);
    let told = told.says("hostport-and-nodeport", "the NodePort wins now");
    assert!(told.change("hostport-and-nodeport").contains("keep hostPort 30081 out of it"), "{}", told.text);

    stage.lab.redeploy("collide", HERE, |spec| spec.mappings = vec![mapping(9181, None)]).unwrap();
    stage.answered(Origin::Outside, PORT, "frontend@worker2");
    stage.answered(Origin::Outside, 9181, "collide@worker3");
    stage.explain(&["30081"]).only(&[]).predicts("works");
    stage.explain(&["9181"]).only(&[]).predicts("works");
    stage.lab.take_pod("collide", HERE).unwrap().stop().unwrap();
}

/// Without route_localnet nothing leaves the node with source 127.0.0.1; the node's own address works all the same.
fn localhost_not_served(stage: &Stage) {
    let veth = &stage.lab.pod("frontend", HERE).unwrap().host_interface;
    let set = |value: u8| {
        for interface in ["all", veth] {
            stage.shell(&format!("sysctl -qw net.ipv4.conf.{interface}.route_localnet={value}"));
        }
    };
    set(0);
    stage.meets(Origin::Loopback, (Ipv4Addr::LOCALHOST, HOST_PORT), Outcome::Timeout);
    let told = stage.explain(&["9088"]).only(&["localhost-not-served"]);
    let told = told.shows("localhost-not-served", "setting", "net.ipv4.conf.all.route_localnet").predicts("works");
    let change = told.change("localhost-not-served");
    assert!(change.starts_with("use the node's address instead of 127.0.0.1"), "{change}");
    stage.answered(Origin::Node, HOST_PORT, "frontend@worker3");
    assert!(change.contains("net.ipv4.conf.all.route_localnet=1"), "{change}");
    stage.shell("sysctl -qw net.ipv4.conf.all.route_localnet=1");
    stage.answered(Origin::Loopback, HOST_PORT, "frontend@worker3");
    stage.explain(&["9088"]).only(&[]).predicts("works");
}

/// What portmap's nftables backend writes: `check` is what CNI plugins 1.9 added.
fn native(check: &str) -> String {
    let rules = "tcp dport 9099 dnat to 10.244.1.9:80 comment \"6ec1fd7af5720dcde8e7fa83397b409c22d648023196d9246219e95772b14afd\"";
    format!(
        "table ip cni_hostport {{\n\
         comment \"CNI portmap plugin\"\n\
         chain hostports {{ {rules}; }}\n\
         chain hostip_hostports {{ }}\n\
         chain prerouting {{ type nat hook prerouting priority dstnat; policy accept; {check} jump hostip_hostports; {check} jump hostports; }}\n\
         chain output {{ type nat hook output priority -100; policy accept; fib daddr type local jump hostip_hostports; fib daddr type local jump hostports; }}\n\
         chain masquerading {{ type nat hook postrouting priority srcnat; policy accept;\n\
         ip saddr 10.244.1.9 ip daddr 10.244.1.9 masquerade\n\
         ip saddr 127.0.0.1 ip daddr 10.244.1.9 masquerade\n}}\n\
         }}\n"
    )
}

/// A pod that listens on a number that is somebody's hostPort is never reached through this node.
fn portmap_catches_forwarded(stage: &mut Stage) {
    let spec = porttrace_tests::lab::pod::PodSpec { tcp: vec![9099], ..Stage::web_pod("own", 44, None) };
    stage.lab.start_pod(spec).unwrap();
    let own = HERE.pod_v4(44);
    let answers = |stage: &Stage, pod: &str| {
        let answer = stage.meets(Origin::OtherPod, (own, 9099), Outcome::Ok);
        assert_eq!(answer.pod.as_deref(), Some(pod), "{answer:?}");
    };
    answers(stage, "own@worker3");
    stage.node().exec_with(["nft", "-f", "-"], &native("")).unwrap();
    answers(stage, "frontend@worker3");
    let told = stage.explain(&["9099"]).only(&["portmap-catches-forwarded"]).predicts("works");
    let told = told.shows("portmap-catches-forwarded", "rule", "cni_hostport prerouting");
    assert!(told.change("portmap-catches-forwarded").starts_with("update the CNI plugins to 1.9"), "{}", told.text);
    stage.shell("nft delete table ip cni_hostport");
    stage.node().exec_with(["nft", "-f", "-"], &native("fib daddr type local")).unwrap();
    answers(stage, "own@worker3");
    // What the table is for works now as before.
    let answer = stage.outside(9099, Outcome::Ok);
    assert_eq!(answer.saw.unwrap().ip(), OUTSIDE_V4);
    stage.explain(&["9099"]).only(&[]).predicts("works");
    stage.shell("nft delete table ip cni_hostport");
}
