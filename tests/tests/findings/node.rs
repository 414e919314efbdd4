//! The node's own settings and policies, who masquerades and what fits, and its tables: everything on one lab.

use crate::stage::{HERE, Stage};
use crate::{replies, tables};
use porttrace_tests::lab::topology::{HOST_PORT, OUTSIDE_V4};
use porttrace_tests::lab::{LabOptions, Origin, Phase};
use porttrace_tests::peer::{Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use std::net::{Ipv4Addr, SocketAddr};

#[test]
fn node() {
    if !may_run("findings about a node") {
        return;
    }
    let mut stage = Stage::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() });
    ip_forward_off(&stage);
    forward_policy_drop(&stage);
    network_policy_drops(&stage);
    rp_filter_drops(&stage);
    replies::masquerade_missing(&mut stage);
    replies::mtu_too_big(&mut stage);
    tables::stale_udp_entry(&mut stage);
    tables::legacy_and_nft_rules(&stage);
    tables::conntrack_nearly_full(&stage);
}

/// The hostPort works from outside, and nothing is wrong with it.
fn healthy(stage: &Stage) {
    stage.answered(Origin::Outside, HOST_PORT, "frontend@worker3");
    stage.explain(&["9088"]).only(&[]).predicts("works");
}

fn ip_forward_off(stage: &Stage) {
    const ID: &str = "ip-forward-off";
    healthy(stage);
    stage.shell("sysctl -qw net.ipv4.ip_forward=0");
    stage.outside(HOST_PORT, Outcome::Timeout);
    let told = stage.explain(&["9088"]).only(&[ID]).predicts("silent").shows(ID, "setting", "net.ipv4.ip_forward");
    stage.follow(&told, ID);
    healthy(stage);
}

/// The policy takes what goes to a hostPort's pod; what kube-proxy marked is let through.
fn forward_policy_drop(stage: &Stage) {
    const ID: &str = "forward-policy-drop";
    stage.shell("iptables -P FORWARD DROP");
    stage.outside(HOST_PORT, Outcome::Timeout);
    stage.outside(30080, Outcome::Ok);
    let told = stage.explain(&["9088"]).only(&[ID]).predicts("silent").shows(ID, "rule", "filter FORWARD policy");
    let change = told.change(ID);
    assert!(change.contains("accept traffic to and from the pods' network in FORWARD"), "{change}");
    // What Docker's policy and a CNI that knows of it come to.
    stage.shell("iptables -A FORWARD -d 10.244.0.0/16 -j ACCEPT && iptables -A FORWARD -s 10.244.0.0/16 -j ACCEPT");
    healthy(stage);
    stage.shell("iptables -D FORWARD -d 10.244.0.0/16 -j ACCEPT && iptables -D FORWARD -s 10.244.0.0/16 -j ACCEPT");
    stage.outside(HOST_PORT, Outcome::Timeout);
    stage.follow(&told, ID);
    healthy(stage);
}

/// Rules in the shapes of Calico's (a workload's chain of a policy, dropping at its end) and kube-router's (rejecting).
fn network_policy_drops(stage: &Stage) {
    const ID: &str = "network-policy-drops";
    let veth = stage.lab.pod("frontend", HERE).unwrap().host_interface.clone();
    let calico = format!(
        "*filter\n:cali-FORWARD - [0:0]\n:cali-to-wl-dispatch - [0:0]\n:cali-tw-{veth} - [0:0]\n:cali-pi-web - [0:0]\n\
         -I FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-FORWARD\n\
         -A cali-FORWARD -o veth+ -m comment --comment \"cali:8ZoYfO5HKXWbB3pk\" -j cali-to-wl-dispatch\n\
         -A cali-to-wl-dispatch -o {veth} -m comment --comment \"cali:0123456789abcdef\" -g cali-tw-{veth}\n\
         -A cali-tw-{veth} -m comment --comment \"cali:1123456789abcdef\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         -A cali-tw-{veth} -m comment --comment \"cali:2123456789abcdef\" -j MARK --set-xmark 0x0/0x10000\n\
         -A cali-tw-{veth} -m comment --comment \"cali:3123456789abcdef\" -j cali-pi-web\n\
         -A cali-tw-{veth} -m comment --comment \"cali:4123456789abcdef\" -m mark --mark 0x10000/0x10000 -j RETURN\n\
         -A cali-tw-{veth} -m comment --comment \"cali:5123456789abcdef\" -j DROP\n\
         -A cali-pi-web -s 10.244.0.0/16 -p tcp -m tcp --dport 80 -j MARK --set-xmark 0x10000/0x10000\nCOMMIT\n"
    );
    let load = |rules: &str| {
        let restore = stage.lab.tools.tool("iptables-restore");
        stage.node().exec_with([restore.as_os_str(), "--noflush".as_ref()], rules).unwrap();
    };
    load(&calico);
    stage.outside(HOST_PORT, Outcome::Timeout);
    stage.answered(Origin::Pod, HOST_PORT, "frontend@worker3");
    let told = stage.explain(&["9088"]).only(&[ID]).predicts("silent");
    let told = told.says(ID, &format!("Calico's chain cali-tw-{veth}")).shows(ID, "rule", "-j DROP");
    assert!(told.change(ID).starts_with("allow these clients in a NetworkPolicy"), "{}", told.text);
    // The policy's chain, as Felix writes it once the policy allows everybody.
    load("*filter\n:cali-pi-web - [0:0]\n-A cali-pi-web -j MARK --set-xmark 0x10000/0x10000\nCOMMIT\n");
    healthy(stage);
    stage.shell("iptables -D FORWARD 1");

    load(
        "*filter\n:KUBE-ROUTER-FORWARD - [0:0]\n:KUBE-POD-FW-ABCDEFGHIJKLMNOP - [0:0]\n\
          -I FORWARD -m comment --comment \"kube-router netpol - 4IA2OSFRMVNDXBVV\" -j KUBE-ROUTER-FORWARD\n\
          -A KUBE-ROUTER-FORWARD -d 10.244.1.9/32 -m comment --comment \"rule to jump traffic destined to POD name:frontend namespace: default to chain KUBE-POD-FW-ABCDEFGHIJKLMNOP\" -j KUBE-POD-FW-ABCDEFGHIJKLMNOP\n\
          -A KUBE-POD-FW-ABCDEFGHIJKLMNOP -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
          -A KUBE-POD-FW-ABCDEFGHIJKLMNOP -j REJECT --reject-with icmp-port-unreachable\nCOMMIT\n",
    );
    stage.outside(HOST_PORT, Outcome::Refused);
    let told = stage.explain(&["9088"]).only(&[ID]).predicts("refused");
    told.says(ID, "kube-router's chain KUBE-POD-FW-ABCDEFGHIJKLMNOP").shows(ID, "rule", "-j REJECT");
    stage.shell("iptables -D FORWARD 1");
    healthy(stage);
}

/// A second card, and clients beyond the gateway of the first: strict rp_filter drops what they send to its address.
fn rp_filter_drops(stage: &Stage) {
    const ID: &str = "rp-filter-drops";
    stage.shell(
        "ip link add eth1 link eth0 type macvlan mode bridge && ip link set eth1 up && \
         ip addr add 172.19.0.3/24 dev eth1 && sysctl -qw net.ipv4.conf.eth1.rp_filter=1 net.ipv4.conf.all.arp_ignore=1",
    );
    // (arp_ignore: on this one segment eth0 would answer for eth1's address.) The client has an address beyond the gateway; the answers find it again by the node's default route.
    stage.lab.outside.exec(["ip", "addr", "add", "192.0.2.77/32", "dev", "lo"]).unwrap();
    stage.lab.outside.exec(["ip", "route", "add", "172.19.0.0/24", "dev", "eth0"]).unwrap();
    // Asked for its hardware address from there, the node would stay silent by the same rule; a gateway would ask with its own.
    let link: serde_json::Value =
        serde_json::from_str(&stage.lab.node(HERE).exec(["ip", "-j", "link", "show", "eth1"]).unwrap()).unwrap();
    let hardware = link[0]["address"].as_str().unwrap();
    stage.lab.outside.exec(["ip", "neigh", "add", "172.19.0.3", "lladdr", hardware, "dev", "eth0"]).unwrap();
    stage.lab.switch.exec(["ip", "route", "add", "192.0.2.77/32", "via", &OUTSIDE_V4.to_string()]).unwrap();
    stage.lab.switch.exec(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0"]).unwrap();
    let to = |address: Ipv4Addr| Connect {
        bind: Some(SocketAddr::from((Ipv4Addr::new(192, 0, 2, 77), 0))),
        ..Connect::new(Transport::Tcp, SocketAddr::from((address, 30080)))
    };
    let second = Ipv4Addr::new(172, 19, 0, 3);
    stage.sends(Origin::Outside, to(HERE.v4()), Outcome::Ok);
    stage.sends(Origin::Outside, to(second), Outcome::Timeout);
    let told = stage.explain(&["30080"]).only(&[ID]).predicts("works");
    let told = told.says(ID, "arrive by eth1 (to 172.19.0.3)").shows(ID, "setting", "net.ipv4.conf.eth1.rp_filter");
    let told = told.has_drops("by rp_filter");
    stage.follow(&told, ID);
    stage.sends(Origin::Outside, to(second), Outcome::Ok);
    stage.explain(&["30080"]).only(&[]).predicts("works");
    // The larger of the two settings counts, and 2 is larger than 1.
    stage.shell("sysctl -qw net.ipv4.conf.all.rp_filter=1");
    stage.sends(Origin::Outside, to(second), Outcome::Ok);
    stage.explain(&["30080"]).only(&[]).predicts("works");
    stage.shell("sysctl -qw net.ipv4.conf.all.rp_filter=0");
    // Routing answers of that address by its card helps the node's own processes, but no NodePort: the filter asks after the
    // rewrite, for the way back from the pod's address (net/ipv4/fib_frontend.c, __fib_validate_source).
    stage.shell("sysctl -qw net.ipv4.conf.eth1.rp_filter=1");
    stage.shell(
        "ip rule add from 172.19.0.3 lookup 100 && ip route add default via 172.18.0.1 dev eth1 onlink table 100",
    );
    let _process = stage.process(9301);
    let own = Connect { to: SocketAddr::from((second, 9301)), ..to(second) };
    stage.sends(Origin::Outside, own.clone(), Outcome::Ok);
    stage.sends(Origin::Outside, to(second), Outcome::Timeout);
    stage.explain(&["30080"]).only(&[ID]);
    stage.shell("ip rule del from 172.19.0.3 lookup 100");
    stage.sends(Origin::Outside, own, Outcome::Timeout);
    stage.shell("ip link del eth1 && sysctl -qw net.ipv4.conf.all.arp_ignore=0");
}
