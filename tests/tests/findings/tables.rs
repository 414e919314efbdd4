//! Conntrack's table, and rules of two flavours.

use crate::stage::{HERE, Stage};
use porttrace_tests::lab::Origin;
use porttrace_tests::lab::conntrack::fill;
use porttrace_tests::lab::proxy::Service;
use porttrace_tests::lab::topology::{CLIENT, HOST_PORT};
use porttrace_tests::peer::{Connect, Outcome, Transport};
use std::net::{Ipv4Addr, SocketAddr};

/// So many entries take some 300 MB of the kernel's memory.
const LARGEST: u32 = 1 << 20;

/// A client that keeps its source port is sent to a pod that is gone, though the rules lead to the new one. (Entries that were
/// masqueraded on the pod's own interface go with it: nf_nat_masquerade.c, masq_device_event. A pod that asks a ClusterIP is not.)
pub fn stale_udp_entry(stage: &mut Stage) {
    const ID: &str = "stale-udp-entry";
    let address = Ipv4Addr::new(10, 96, 202, 3);
    let service = || Service { proto: "udp", ..Service::new("names", address, 53, Some(30303)) };
    let pod = |name, number| porttrace_tests::lab::pod::PodSpec {
        udp: vec![53],
        ..porttrace_tests::lab::pod::PodSpec::new(name, HERE, number)
    };
    let ask = |stage: &Stage, sport: u16, outcome: Outcome| {
        let to = SocketAddr::from((address, 53));
        let bind = Some(SocketAddr::from((HERE.pod_v4(CLIENT), sport)));
        stage.sends(Origin::Pod, Connect { bind, ..Connect::new(Transport::Udp, to) }, outcome).pod
    };
    stage.lab.start_pod(pod("old", 62)).unwrap();
    stage.serve(service().endpoint(HERE, 62, 53));
    assert_eq!(ask(stage, 40_053, Outcome::Ok).as_deref(), Some("old@worker3"));
    stage.explain(&["30303"]).only(&[]).predicts("works");
    stage.lab.take_pod("old", HERE).unwrap().stop().unwrap();
    stage.lab.start_pod(pod("new", 63)).unwrap();
    stage.serve(service().endpoint(HERE, 63, 53));
    ask(stage, 40_053, Outcome::Timeout);
    // Another source port is another entry, as the finding says.
    assert_eq!(ask(stage, 40_054, Outcome::Ok).as_deref(), Some("new@worker3"));
    let told = stage.explain(&["30303"]).only(&[ID]).says(ID, "to 10.244.1.62:53, which is no endpoint of it any more");
    let told = told.shows(ID, "entry", "10.244.1.20:40053 → 10.96.202.3:53");
    assert!(told.change(ID).ends_with("or have the client use another source port"), "{}", told.text);
    stage.follow(&told, ID);
    assert_eq!(ask(stage, 40_053, Outcome::Ok).as_deref(), Some("new@worker3"));
    stage.explain(&["30303"]).only(&[]).predicts("works");
    stage.lab.take_pod("new", HERE).unwrap().stop().unwrap();
}

/// Rules that the other flavour left behind: `iptables -S` shows nothing that would drop the packet.
pub fn legacy_and_nft_rules(stage: &Stage) {
    const ID: &str = "legacy-and-nft-rules";
    const DROP: &str = "FORWARD -p tcp -d 10.244.1.0/24 --dport 80 -j DROP";
    stage.answered(Origin::Outside, HOST_PORT, "frontend@worker3");
    stage.shell(&format!("iptables-legacy -A {DROP}"));
    stage.outside(HOST_PORT, Outcome::Timeout);
    assert!(!stage.shell("iptables -S FORWARD").contains("10.244.1.0/24"));
    let told = stage.explain(&["9088"]).only(&[ID]).predicts("silent");
    let told = told.says(ID, "iptables-legacy (1) at once").shows(ID, "rule", "iptables-legacy");
    assert!(told.change(ID).contains("flush what is left over"), "{}", told.text);
    assert!(stage.shell("iptables-legacy-save").contains("--dport 80 -j DROP"));
    stage.shell("iptables-legacy -F");
    stage.answered(Origin::Outside, HOST_PORT, "frontend@worker3");
    stage.explain(&["9088"]).only(&[]).predicts("works");
}

/// The table's size is one for the whole machine, and only its first namespace may set it (nf_conntrack_standalone.c); how many
/// entries there are is each namespace's own, so it is filled for real.
pub fn conntrack_nearly_full(stage: &Stage) {
    const ID: &str = "conntrack-nearly-full";
    let max: u32 = stage.shell("cat /proc/sys/net/netfilter/nf_conntrack_max").trim().parse().unwrap();
    if max > LARGEST {
        println!("skipped: a table of {max} entries is not filled for a test");
        return;
    }
    stage.explain(&["9088"]).only(&[]);
    let nearly = max / 100 * 95;
    fill(stage.node(), 0..nearly).unwrap();
    stage.answered(Origin::Outside, HOST_PORT, "frontend@worker3");
    let told = stage.explain(&["9088"]).only(&[ID]).predicts("works");
    let told = told.says(ID, &format!(" of {max}")).shows(ID, "setting", "net.netfilter.nf_conntrack_count");
    assert!(told.change(ID).contains("find who opens so many connections"), "{}", told.text);
    fill(stage.node(), nearly..max + 1000).unwrap();
    stage.outside(HOST_PORT, Outcome::Timeout);
    // Whoever opened so many has been found and closed them.
    stage.shell("conntrack -D -s 10.99.0.0/16 > /dev/null");
    stage.answered(Origin::Outside, HOST_PORT, "frontend@worker3");
    stage.explain(&["9088"]).only(&[]).predicts("works");
}
