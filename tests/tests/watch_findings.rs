//! The finding that `watch` names for a connection that fails, on real traffic: each cause is made on a node of the lab, a
//! client meets it, and is told it.

use porttrace_tests::lab::rules::IptablesFlavour;
use porttrace_tests::lab::topology::{FRONTEND, HOST_PORT, NodeName, service};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::netns::{ChildGuard, Netns};
use porttrace_tests::peer::{self, Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::Watch;
use porttrace_user::core::model::flow::{Proto, Tuple};
use serde_json::Value;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A packet that nobody answers is waited for this long.
const SHORT: Duration = Duration::from_millis(400);
const PATIENCE: Duration = Duration::from_secs(20);

/// watch reads again what may be the cause of a failure, but not right after another one.
const BETWEEN_FAILURES: Duration = Duration::from_secs(1);

struct Scene {
    lab: Lab,
    watch: Watch,
    failed_at: Option<Instant>,
}

impl Scene {
    fn set(options: LabOptions) -> Self {
        let lab = Lab::up(options).unwrap();
        let ports = ["9088", "30104", "--timeout", "300ms"];
        let watch = Watch::start(lab.node(NodeName::Worker3), &lab.tools, &ports).unwrap();
        Self { lab, watch, failed_at: None }
    }

    fn node(&self) -> &Netns {
        self.lab.node(NodeName::Worker3)
    }

    fn iptables(&self, words: &str) {
        self.lab.tools.iptables(self.node(), words).unwrap();
    }

    fn forward(&self, value: &str) {
        self.node().run_in(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", value)).unwrap().unwrap();
    }

    fn ip(&self, words: &str) {
        let words: Vec<&str> = ["ip"].into_iter().chain(words.split(' ')).collect();
        self.node().exec(words).unwrap();
    }

    /// What a client meets, and the verdict on it.
    fn connect(&mut self, origin: Origin, port: u16) -> (Outcome, Value) {
        let to = SocketAddr::new(origin.target(false), port);
        let request = Connect { timeout: SHORT, ..Connect::new(Transport::Tcp, to) };
        let answer = self.lab.connect(origin, &request).unwrap();
        let original = Tuple::new(Proto::Tcp, answer.local, to);
        (answer.result, self.watch.connection(original, PATIENCE).unwrap().verdict)
    }

    /// The verdict on a connection that fails, the first one since whatever is its cause came.
    #[track_caller]
    fn fails(&mut self, origin: Origin, port: u16) -> Value {
        if let Some(failed_at) = self.failed_at {
            let left = BETWEEN_FAILURES.saturating_sub(failed_at.elapsed());
            assert!(!self.watch.read_until(left, |_| false).unwrap());
        }
        let (met, verdict) = self.connect(origin, port);
        self.failed_at = Some(Instant::now());
        assert_ne!(met, Outcome::Ok, "{verdict}");
        assert_eq!(verdict["ok"], false, "{verdict}");
        verdict
    }

    /// The verdict on a connection that fails for this cause.
    #[track_caller]
    fn is_told(&mut self, origin: Origin, port: u16, id: &str) -> Value {
        let verdict = self.fails(origin, port);
        assert_eq!(verdict["finding"]["id"], id, "{verdict:#}");
        assert_eq!(verdict["advice"], verdict["finding"]["change"], "{verdict:#}");
        let text = verdict["text"].as_str().unwrap();
        assert!(text.contains(&format!("; {id}: ")), "{text}");
        verdict
    }

    #[track_caller]
    fn works(&mut self, origin: Origin, port: u16) {
        let (met, verdict) = self.connect(origin, port);
        assert_eq!(met, Outcome::Ok, "{verdict}");
        assert!(verdict["finding"].is_null() && verdict["agrees"] == true, "{verdict}");
    }
}

#[test]
fn causes_in_the_rules_are_told() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut scene = Scene::set(LabOptions { phase: Phase::Fixed, ..LabOptions::default() });
    scene.works(Origin::Outside, HOST_PORT);
    let rejected = scene.is_told(Origin::Outside, service::NO_ENDPOINTS_NODE_PORT, "service-without-endpoints");
    assert_eq!(rejected["outcome"], "refused", "{rejected}");

    scene.iptables("-P FORWARD DROP");
    let dropped = scene.is_told(Origin::Outside, HOST_PORT, "forward-policy-drop");
    assert!(["dropped", "silent"].map(Value::from).contains(&dropped["outcome"]), "{dropped}");
    scene.iptables("-P FORWARD ACCEPT");

    scene.iptables("-N KUBE-NWPLCY-LAB");
    scene.iptables("-A KUBE-NWPLCY-LAB -s 172.18.0.100/32 -p tcp -m tcp --dport 80 -j DROP");
    scene.iptables("-I FORWARD -j KUBE-NWPLCY-LAB");
    let policy = scene.is_told(Origin::Outside, HOST_PORT, "network-policy-drops");
    assert!(policy["finding"]["sentence"].as_str().unwrap().contains("from 172.18.0.100 to hostPort 9088"), "{policy}");
    // Whom it lets through is told nothing.
    scene.works(Origin::OtherNode, HOST_PORT);
    scene.iptables("-D FORWARD -j KUBE-NWPLCY-LAB");
    scene.works(Origin::Outside, HOST_PORT);
}

#[test]
fn causes_in_the_settings_are_told() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut scene = Scene::set(LabOptions { phase: Phase::Fixed, ..LabOptions::default() });
    scene.works(Origin::Outside, HOST_PORT);
    scene.forward("0");
    scene.is_told(Origin::Outside, HOST_PORT, "ip-forward-off");
    scene.forward("1");
    scene.works(Origin::Outside, HOST_PORT);
}

/// Neither a verdict nor a contradiction is by what was true before the last change, of whatever kind.
#[test]
fn what_changed_a_moment_ago_is_what_is_told() {
    if !may_run("porttrace watch") {
        return;
    }
    for flavour in [IptablesFlavour::Nft, IptablesFlavour::Legacy] {
        let mut scene = Scene::set(LabOptions { phase: Phase::Fixed, flavour, ..LabOptions::default() });
        let pod = NodeName::Worker3.pod_v4(FRONTEND);
        let told = |verdict: &Value, words: &str| {
            assert!(verdict["text"].as_str().unwrap().contains(words), "{flavour:?} {words}: {verdict:#}");
        };
        scene.works(Origin::Outside, HOST_PORT);

        scene.iptables("-I FORWARD -p tcp --dport 80 -j REJECT");
        told(&scene.fails(Origin::Outside, HOST_PORT), "rejected by filter FORWARD #1 with icmp-port-unreachable");
        scene.iptables("-D FORWARD -p tcp --dport 80 -j REJECT");
        // Another cause right after it, which must not be taken for the rule that is gone.
        scene.ip(&format!("route prepend blackhole {pod}/32"));
        told(&scene.fails(Origin::Outside, HOST_PORT), "predicted: a blackhole route");
        scene.ip(&format!("route del blackhole {pod}/32"));
        scene.works(Origin::Outside, HOST_PORT);

        scene.forward("0");
        scene.is_told(Origin::Outside, HOST_PORT, "ip-forward-off");
        scene.forward("1");
        scene.works(Origin::Outside, HOST_PORT);

        scene.ip(&format!("rule add pref 10 to {pod} prohibit"));
        told(&scene.fails(Origin::Outside, HOST_PORT), "predicted: a prohibit route");
        scene.ip("rule del pref 10");
        scene.works(Origin::Outside, HOST_PORT);
    }
}

/// A pod that went without CNI DEL leaves its chain behind.
#[test]
fn a_stale_host_port_is_told() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut scene = Scene::set(LabOptions { phase: Phase::Fixed, ..LabOptions::default() });
    scene.works(Origin::Outside, HOST_PORT);
    let chain = "-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment lab -m multiport --dports 30104 -j CNI-DN-lab";
    scene.iptables("-t nat -N CNI-DN-lab");
    scene.iptables("-t nat -A CNI-DN-lab -p tcp -m tcp --dport 30104 -j DNAT --to-destination 10.244.1.77:80");
    scene.iptables(&format!("-t nat {chain}"));
    let told = scene.is_told(Origin::Outside, service::NO_ENDPOINTS_NODE_PORT, "stale-hostport");
    assert!(told["text"].as_str().unwrap().ends_with("stale-hostport: no pod has 10.244.1.77 any more"), "{told}");
}

/// What listens is read again before an answer is said to be against the rules: here no hook tells that the node's sockets got it.
#[test]
fn a_process_that_listens_later_is_no_contradiction() {
    if !may_run("porttrace watch") {
        return;
    }
    const PORT: u16 = 7777;
    let lab = Lab::up(LabOptions { bare: true, ..LabOptions::default() }).unwrap();
    let node = lab.node(NodeName::Worker3);
    let mut watch = Watch::start(node, &lab.tools, &["7777", "--conntrack-backend", "none"]).unwrap();
    let mut command = node.command(peer::binary().unwrap());
    command.args(["serve", "--name", "late", "--tcp", &PORT.to_string()]);
    let process = ChildGuard::spawn(command).unwrap();
    process.stdout.wait_for(PATIENCE, |line| (line == "ready").then_some(())).unwrap();
    let to = SocketAddr::new(Origin::Outside.target(false), PORT);
    let answer = lab.connect(Origin::Outside, &Connect::new(Transport::Tcp, to)).unwrap();
    let told = watch.connection(Tuple::new(Proto::Tcp, answer.local, to), PATIENCE).unwrap();
    let verdict = &told.verdict;
    assert_eq!((&verdict["outcome"], &verdict["agrees"]), (&"answered".into(), &true.into()), "{}", told.report());
    assert_eq!(verdict["predicted"]["verdict"]["listening"], true, "{}", told.report());
}
