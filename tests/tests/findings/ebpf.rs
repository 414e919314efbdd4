//! Services without rules: eBPF programs at TC serve a NodePort, as Cilium's do, and no rule of the node leads to the pod.

use crate::objects::Objects;
use crate::stage::{HERE, Stage};
use porttrace_tests::lab::proxy::Service;
use porttrace_tests::lab::topology::FRONTEND;
use porttrace_tests::lab::{LabOptions, Origin, Phase};
use porttrace_tests::nodeport::NodePort;
use porttrace_tests::peer::{Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::{Connection, Watch};
use porttrace_user::core::model::flow::{Proto, Tuple};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

const ID: &str = "kube-proxy-replaced";
const PORT: u16 = 30302;
const WHAT: &str = "30302";
/// What watch has to tell comes within milliseconds, on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn kube_proxy_replaced() {
    if !may_run("Services without rules") {
        return;
    }
    let mut stage = Stage::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() });
    stage.serve(Service::new("near", Ipv4Addr::new(10, 96, 203, 1), 80, Some(PORT)).endpoint(HERE, FRONTEND, 80));
    served_by_rules(&stage);
    let rules = ["iptables", "ip6tables"].map(|tool| (tool, stage.shell(&format!("{tool}-save"))));
    // As Cilium's guide removes kube-proxy's.
    for (tool, _) in &rules {
        stage.shell(&format!("{tool}-save | grep -v KUBE | {tool}-restore"));
    }
    stage.outside(PORT, Outcome::Refused);
    let (links, programs) = (cilium_links(&stage), serve(&stage));
    let reached = |stage: &Stage| {
        stage.answered(Origin::Outside, PORT, "frontend@worker3");
        stage.answered(Origin::Node, PORT, "frontend@worker3");
    };
    reached(&stage);
    explain_predicts_nothing(&stage);
    matrix_tells_what_was_tried(&stage);
    watch_tells_what_was_seen(&stage);
    // Whoever watched has left the programs alone.
    reached(&stage);
    drop(programs);
    stage.outside(PORT, Outcome::Refused);
    stage.shell(&format!("ip link del {links}"));
    for (tool, saved) in &rules {
        let restore = stage.lab.tools.tool(&format!("{tool}-restore"));
        stage.node().exec_with([restore], saved).unwrap();
    }
    served_by_rules(&stage);
}

fn served_by_rules(stage: &Stage) {
    stage.answered(Origin::Outside, PORT, "frontend@worker3");
    stage.explain(&[WHAT]).only(&[]).predicts("works");
    stage.explain_with(&Objects::of(stage), &[WHAT]).only(&[]).predicts("works");
}

/// Cilium's pair of links; the name of one.
fn cilium_links(stage: &Stage) -> &'static str {
    stage.shell("ip link add cilium_host type veth peer name cilium_net");
    stage.shell("ip link set cilium_host up && ip link set cilium_net up");
    "cilium_host"
}

fn serve(stage: &Stage) -> NodePort {
    let node = SocketAddrV4::new(HERE.v4(), PORT);
    let pod = SocketAddrV4::new(HERE.pod_v4(FRONTEND), 80);
    let route: Value = serde_json::from_str(&stage.shell(&format!("ip -j route get {}", pod.ip()))).unwrap();
    let behind = route[0]["dev"].as_str().unwrap();
    stage.shell(&format!("sysctl -qw net.ipv4.conf.{behind}.accept_local=1"));
    stage.node().run_in(|| NodePort::serve(node, pod, "eth0", behind)).unwrap().unwrap()
}

/// No word of "nobody" or "refused" where clients are answered.
fn explain_predicts_nothing(stage: &Stage) {
    let told = stage.explain(&[WHAT]).only(&[ID]).predicts("unknown").shows(ID, "link", "cilium_host");
    let told = told.says(ID, "what porttrace predicts from rules does not hold on this node");
    assert!(told.change(ID).contains("cilium-dbg service list"), "{}", told.text);
    let verdict = |told: &Value| told["verdict"][0]["sentence"].as_str().unwrap().to_owned();
    assert!(
        verdict(&told.json).contains(" claims port 30302, and no process of the node listens on it; Cilium serves"),
        "{}",
        told.text
    );
    assert!(!told.text.contains('✗'), "{}", told.text);
    // Kubernetes knows what it is, and what its endpoints are.
    let told = stage.explain_with(&Objects::of(stage), &[WHAT]).only(&[ID]).predicts("unknown");
    let said = "tcp 30302 on worker3 is NodePort of Service default/near, which Cilium serves in eBPF";
    assert!(verdict(&told.json).starts_with(said), "{}", told.text);
    let words = told.json["maps"][0]["words"].as_array().unwrap();
    let agrees = |word: &str| words.iter().find(|one| one["word"] == word).unwrap()["agrees"].clone();
    assert_eq!((agrees("NodePort"), agrees("targetPort")), (Value::Null, json!(true)), "{}", told.text);
    let told = stage.explain_with(&Objects::of(stage), &["svc/near"]).only(&[ID]).predicts("unknown");
    assert!(verdict(&told.json).starts_with("Service default/near is NodePort 30302"), "{}", told.text);
}

fn matrix_tells_what_was_tried(stage: &Stage) {
    let cell = |matrix: &Value, client: &str| {
        let way = matrix["ways"].as_array().unwrap().iter().position(|way| way["kind"] == "node_port").unwrap();
        let rows = matrix["rows"].as_array().unwrap();
        rows.iter().find(|row| row["client"]["kind"] == client).unwrap()["cells"][way].clone()
    };
    // Whether its endpoints are here is not known: nothing is tried.
    let matrix: Value = serde_json::from_str(&stage.porttrace(&["matrix", WHAT, "--probe", "--json"])).unwrap();
    assert!(matrix["doubt"].as_str().unwrap().starts_with("Cilium serves"), "{matrix:#}");
    for client in ["this_node", "outside"] {
        let cell = cell(&matrix, client);
        assert_eq!((&cell["outcome"], &cell["tried"]), (&json!("unknown"), &Value::Null), "{matrix:#}");
    }
    let objects = stage.objects(&Objects::of(stage));
    let arguments = ["matrix", WHAT, "--probe", "--objects", &objects];
    let matrix: Value = serde_json::from_str(&stage.porttrace(&[&arguments[..], &["--json"]].concat())).unwrap();
    let here = cell(&matrix, "this_node");
    assert_eq!((&here["outcome"], &here["tried"]["outcome"]), (&json!("unknown"), &json!("works")), "{matrix:#}");
    assert_eq!(cell(&matrix, "outside")["outcome"], "unknown", "{matrix:#}");
    let text = stage.porttrace(&arguments);
    for words in ["! Cilium serves Services", "?/✓", "; tried: connected in"] {
        assert!(one_line(&text).contains(words), "{text}");
    }
    let ports = stage.porttrace(&["ports"]);
    assert!(one_line(&ports).contains("NodePorts that it serves are not listed"), "{ports}");
    let simulated = stage.porttrace(&["simulate", "172.18.0.3:30302", "--from", "172.18.0.100"]);
    assert!(one_line(&simulated).contains("- Cilium serves Services and hostPorts in eBPF here"), "{simulated}");
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn watch_tells_what_was_seen(stage: &Stage) {
    let mut watch = Watch::start(stage.node(), &stage.lab.tools, &[WHAT]).unwrap();
    let ready = watch.status("ready", PATIENCE).unwrap().unwrap();
    let warns = |text: &Value| text.as_str().unwrap().starts_with("Cilium serves Services and hostPorts in eBPF here");
    assert!(ready["warnings"].as_array().unwrap().iter().any(warns), "{ready}");
    let mut told = |origin| {
        let to = SocketAddr::from((HERE.v4(), PORT));
        let answer = stage.sends(origin, Connect::new(Transport::Tcp, to), Outcome::Ok);
        watch.connection(Tuple::new(Proto::Tcp, answer.local, to), PATIENCE).unwrap()
    };
    let outside = told(Origin::Outside);
    assert_eq!(came_out(&outside), (&json!("answered"), &json!(true), &json!(false)), "{}", outside.report());
    assert_eq!(packets(&outside), [("in", "eth0", "SYN"), ("out", "eth0", "SYN ACK")], "{}", outside.report());
    // Its answer is rewritten when it has been seen, on its way up: whether there was one is not said.
    let here = told(Origin::Node);
    assert_eq!(came_out(&here), (&json!("silent"), &Value::Null, &Value::Null), "{}", here.report());
    assert_eq!(packets(&here), [("out", "lo", "SYN")], "{}", here.report());
    let unexplained = outside.hops.iter().find(|hop| hop["kind"] == "unexplained");
    let unexplained = unexplained.unwrap_or_else(|| panic!("{}", outside.report()));
    assert_eq!(unexplained["certainty"], "differs", "{}", outside.report());
    assert_eq!(unexplained["predicted"]["listening"], false, "{}", outside.report());
    for told in [outside, here] {
        assert_eq!(told.verdict["finding"]["id"], ID, "{}", told.report());
        assert!(told.verdict["advice"].as_str().unwrap().contains("cilium-dbg"), "{}", told.report());
    }
}

/// How it came out, whether that is well, and whether the rules say so.
fn came_out(told: &Connection) -> (&Value, &Value, &Value) {
    let verdict = &told.verdict;
    (&verdict["outcome"], &verdict["ok"], &verdict["agrees"])
}

/// Where its packets were seen: direction, interface, kind.
fn packets(told: &Connection) -> Vec<(&str, &str, &str)> {
    let packets = told.hops.iter().filter(|hop| hop["kind"] == "packet" && hop["certainty"] == "observed");
    packets
        .map(|hop| {
            let part = |name: &str| hop[name].as_str().unwrap();
            (part("direction"), part("interface"), part("label"))
        })
        .collect()
}
