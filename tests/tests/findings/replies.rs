//! Answers that go astray, and packets that do not fit.

use crate::stage::{HERE, Stage};
use porttrace_tests::lab::Origin;
use porttrace_tests::lab::proxy::Service;
use porttrace_tests::lab::topology::{HOST_PORT, NodeName};
use porttrace_tests::peer::{Connect, Outcome, Transport};
use std::net::{Ipv4Addr, SocketAddr};

/// Without the mark or the masquerade: hairpin, an endpoint on another node, and 127.0.0.1.
pub fn masquerade_missing(stage: &mut Stage) {
    const ID: &str = "masquerade-missing";
    // kube-proxy's rule is lost (somebody flushed POSTROUTING's chain): the answers of another node's pod bypass this node.
    let far = Service::new("far", Ipv4Addr::new(10, 96, 202, 1), 80, Some(30301));
    stage.serve(far.endpoint(NodeName::Worker2, 9, 80));
    stage.answered(Origin::Outside, 30301, "frontend@worker2");
    stage.explain(&["30301"]).only(&[]);
    stage.shell("iptables -t nat -F KUBE-POSTROUTING");
    stage.outside(30301, Outcome::Timeout);
    let told = stage.explain(&["30301"]).only(&[ID]).says(ID, "the answer bypasses this node (no masquerade)");
    let told = told.shows(ID, "rule", "--to-destination 10.244.3.9:80").shows(ID, "path", "10.244.3.9:80");
    assert!(told.change(ID).starts_with("restore the masquerade rules: KUBE-MARK-MASQ and KUBE-POSTROUTING"));
    stage.sync();
    stage.answered(Origin::Outside, 30301, "frontend@worker2");
    stage.explain(&["30301"]).only(&[]);

    // Hairpin: a pod asks the Service that it is the endpoint of.
    let near = Service::new("near", Ipv4Addr::new(10, 96, 202, 2), 80, Some(30302));
    stage.serve(near.endpoint(HERE, 9, 80));
    let itself = |stage: &Stage, port: u16, outcome: Outcome| {
        let mut request = Connect::new(Transport::Tcp, SocketAddr::from((HERE.v4(), port)));
        request.timeout = std::time::Duration::from_millis(if outcome == Outcome::Ok { 5000 } else { 400 });
        let pod = &stage.lab.pod("frontend", HERE).unwrap().netns;
        let answer = pod.run_in(|| porttrace_tests::peer::connect(&request)).unwrap().unwrap();
        assert_eq!(answer.result, outcome, "{answer:?}");
    };
    itself(stage, 30302, Outcome::Ok);
    stage.explain(&["30302"]).only(&[]);
    stage.shell("iptables -t nat -F KUBE-POSTROUTING");
    itself(stage, 30302, Outcome::Timeout);
    stage.explain(&["30302"]).only(&[ID]).says(ID, "no masquerade for the hairpin").shows(ID, "rule", "10.244.1.9:80");
    stage.sync();
    itself(stage, 30302, Outcome::Ok);
    stage.explain(&["30302"]).only(&[]);

    // portmap's half: the hostPort's hairpin and 127.0.0.1.
    itself(stage, HOST_PORT, Outcome::Ok);
    stage.answered(Origin::Loopback, HOST_PORT, "frontend@worker3");
    stage.shell("iptables -t nat -F CNI-HOSTPORT-MASQ");
    itself(stage, HOST_PORT, Outcome::Timeout);
    stage.meets(Origin::Loopback, (Ipv4Addr::LOCALHOST, HOST_PORT), Outcome::Timeout);
    let told = stage.explain(&["9088"]).only(&[ID]).says(ID, "hairpin").says(ID, "from 127.0.0.1 the packet goes to");
    assert!(told.change(ID).contains("CNI-HOSTPORT-SETMARK and CNI-HOSTPORT-MASQ are portmap's"), "{}", told.text);
    // portmap writes the chain anew with the next hostPort (utils.EnsureChain in portmap.go).
    stage.lab.start_pod(Stage::web_pod("next", 61, Some(9161))).unwrap();
    itself(stage, HOST_PORT, Outcome::Ok);
    stage.answered(Origin::Loopback, HOST_PORT, "frontend@worker3");
    stage.explain(&["9088"]).only(&[]).predicts("works");
    stage.lab.take_pod("next", HERE).unwrap().stop().unwrap();
}

/// The way to other nodes takes less than pods may send. With ICMP the pod's kernel learns of it; without, large answers stall.
pub fn mtu_too_big(stage: &mut Stage) {
    const ID: &str = "mtu-too-big";
    let large = |stage: &Stage, outcome: Outcome| {
        let to = SocketAddr::from((HERE.pod_v4(9), 80));
        stage.sends(Origin::OtherPod, Connect { bytes: 100_000, ..Connect::new(Transport::Tcp, to) }, outcome);
    };
    let small = |stage: &Stage| stage.meets(Origin::OtherPod, (HERE.pod_v4(9), 80), Outcome::Ok);
    large(stage, Outcome::Ok);
    stage.explain(&["9088"]).only(&[]);
    stage.shell("ip link set eth0 mtu 1400");
    // A firewall that drops all ICMP, as the finding warns of.
    stage.shell("iptables -A OUTPUT -p icmp --icmp-type fragmentation-needed -j DROP");
    small(stage);
    large(stage, Outcome::Timeout);
    let told = stage.explain(&["9088"]).only(&[ID]).predicts("works");
    let told = told.says(ID, "allows more than the 1400 bytes that fit through eth0").shows(ID, "link", "mtu 1400");
    assert_eq!(told.change(ID), "set the CNI's MTU to 1400 or less and recreate the pods");
    for (name, node) in [("frontend", HERE), ("dns", HERE), ("client", HERE)] {
        stage.lab.redeploy(name, node, |spec| spec.mtu = 1400).unwrap();
    }
    large(stage, Outcome::Ok);
    stage.explain(&["9088"]).only(&[]).predicts("works");
    // With ICMP it works, after a packet lost, also for pods that are not made anew.
    stage.shell("iptables -D OUTPUT -p icmp --icmp-type fragmentation-needed -j DROP");
    stage.lab.redeploy("frontend", HERE, |spec| spec.mtu = 1500).unwrap();
    large(stage, Outcome::Ok);
    stage.explain(&["9088"]).only(&[ID]).says(ID, "large answers stall where ICMP does not get through");
    stage.shell("ip link set eth0 mtu 1500");
    for name in ["frontend", "dns", "client"] {
        stage.lab.redeploy(name, HERE, |spec| spec.mtu = 1500).unwrap();
    }
    stage.explain(&["9088"]).only(&[]);
}
