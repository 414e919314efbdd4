//! Pods on a bridge: a port without hairpin mode, and packets that bypass iptables.

use crate::stage::{HERE, Stage};
use porttrace_tests::lab::cni::Interface;
use porttrace_tests::lab::proxy::Service;
use porttrace_tests::lab::topology::HOST_PORT;
use porttrace_tests::lab::{LabOptions, Origin, Phase};
use porttrace_tests::peer::{self, Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

#[test]
fn bridges() {
    if !may_run("findings about bridges") {
        return;
    }
    let options = LabOptions { phase: Phase::Fixed, interface: Interface::Bridge, ..LabOptions::default() };
    let mut stage = Stage::up(options);
    hairpin_off(&stage);
    bridge_nf_call_off(&mut stage);
}

/// Pod `frontend` asks for itself by the node's address.
fn itself(stage: &Stage, outcome: Outcome) {
    let mut request = Connect::new(Transport::Tcp, SocketAddr::from((HERE.v4(), HOST_PORT)));
    request.timeout = Duration::from_millis(if outcome == Outcome::Ok { 5000 } else { 400 });
    let pod = &stage.lab.pod("frontend", HERE).unwrap().netns;
    let answer = pod.run_in(|| peer::connect(&request)).unwrap().unwrap();
    assert_eq!(answer.result, outcome, "{answer:?}");
}

fn hairpin_off(stage: &Stage) {
    const ID: &str = "hairpin-off";
    itself(stage, Outcome::Ok);
    stage.explain(&["9088"]).only(&[]).predicts("works");
    let port = stage.lab.pod("frontend", HERE).unwrap().host_interface.clone();
    stage.shell(&format!("bridge link set dev {port} hairpin off"));
    itself(stage, Outcome::Timeout);
    stage.answered(Origin::Outside, HOST_PORT, "frontend@worker3");
    stage.answered(Origin::Pod, HOST_PORT, "frontend@worker3");
    let told = stage.explain(&["9088"]).only(&[ID]).predicts("works");
    let told = told.says(ID, "1 of 3 ports of bridge cni0").says(ID, "as 10.244.1.9").shows(ID, "link", &port);
    stage.follow(&told, ID);
    itself(stage, Outcome::Ok);
    stage.explain(&["9088"]).only(&[]).predicts("works");
}

/// The answer of a pod on the same bridge goes straight back, from an address that the client did not ask.
fn bridge_nf_call_off(stage: &mut Stage) {
    const ID: &str = "bridge-nf-call-off";
    let address = Ipv4Addr::new(10, 96, 203, 1);
    stage.serve(Service::new("beside", address, 80, Some(30401)).endpoint(HERE, 9, 80));
    stage.meets(Origin::Pod, (address, 80), Outcome::Ok);
    stage.explain(&["30401"]).only(&[]).predicts("works");
    stage.shell("sysctl -qw net.bridge.bridge-nf-call-iptables=0");
    stage.meets(Origin::Pod, (address, 80), Outcome::Timeout);
    stage.answered(Origin::Outside, 30401, "frontend@worker3");
    let told = stage.explain(&["30401"]).only(&[ID]).predicts("works");
    let told = told
        .shows(ID, "setting", "net.bridge.bridge-nf-call-iptables 0")
        .says(ID, "answered by a pod on the same bridge");
    stage.follow(&told, ID);
    stage.meets(Origin::Pod, (address, 80), Outcome::Ok);
    stage.explain(&["30401"]).only(&[]).predicts("works");
}
