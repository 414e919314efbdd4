//! `porttrace watch` on real traffic, held against three witnesses: conntrack's events, the kernel's own rule trace, and what
//! client and server saw.

use porttrace_tests::lab::cni::Interface;
use porttrace_tests::lab::rules::IptablesFlavour;
use porttrace_tests::lab::topology::{HOST_PORT, NodeName, service};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::oracle::conntrack::{ConntrackEvents, Entry};
use porttrace_tests::oracle::trace::{Place, RuleTrace, Step, TraceFilter};
use porttrace_tests::peer::{Answer, Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::{Connection, PredictedRule, Watch};
use porttrace_user::core::model::flow::{Proto, Tuple};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(10);
const CLIENTS: [Origin; 5] = [Origin::Node, Origin::Loopback, Origin::OtherNode, Origin::Outside, Origin::Pod];
/// What the matrix watches: hostPort, NodePorts, Service ports; `-v`: every rule, also those without effect.
const WATCHED: [&str; 7] = ["-v", "9088", "30080", "30120", "30053", "8088", "53"];

/// A lab, a watch on worker3, and the kernel's witnesses there.
struct Scene {
    lab: Lab,
    conntrack: ConntrackEvents,
    trace: RuleTrace,
    watch: Watch,
}

/// One connection, as everybody tells it.
struct Told {
    what: String,
    answer: Answer,
    /// conntrack's NEW event.
    entry: Entry,
    /// The kernel's steps, on worker3.
    steps: Vec<Step>,
    watch: Connection,
}

impl Scene {
    fn set(options: LabOptions) -> Self {
        Self::watching(Lab::up(options).unwrap(), options)
    }

    /// The same in kube-proxy's nftables mode, with portmap's nftables backend.
    fn native(phase: Phase) -> Self {
        let options = LabOptions { phase, ..LabOptions::default() };
        let lab = Lab::up(options).unwrap();
        lab.go_native(phase).unwrap();
        Self::watching(lab, options)
    }

    fn watching(lab: Lab, options: LabOptions) -> Self {
        let node = lab.node(NodeName::Worker3);
        let conntrack = ConntrackEvents::start(node).unwrap();
        let filters = [Proto::Tcp, Proto::Udp].map(|proto| TraceFilter { proto, dport: None, first_only: true });
        let trace = RuleTrace::start_many(node, &lab.tools, options.flavour, &filters).unwrap();
        let watch = Watch::start(node, &lab.tools, &WATCHED).unwrap();
        Self { lab, conntrack, trace, watch }
    }

    /// Repairs the pod's ports while everybody watches.
    fn repaired(&mut self) {
        self.lab.repair().unwrap();
        self.trace.reread_rules().unwrap();
    }

    /// Makes one connection and collects what everybody says about it.
    fn connect(&mut self, origin: Origin, transport: Transport, to: SocketAddr, timeout: Duration) -> Told {
        let request = Connect { timeout, ..Connect::new(transport, to) };
        // A client may get the port that an earlier one had for another destination.
        self.trace.clear().unwrap();
        let answer = self.lab.connect(origin, &request).unwrap();
        let what = format!("{origin:?} {transport:?} to {to}");
        let original = Tuple::new(proto_of(transport), answer.local, to);
        let entry = self.conntrack.new_entry(original, WAIT);
        let entry = entry.unwrap_or_else(|| panic!("{what}: no conntrack event for {original}"));
        let steps = self.trace.steps_from(original.proto, original.source()).unwrap();
        let watch = self.watch.connection(original, WAIT).unwrap_or_else(|error| panic!("{what}: {error:#}"));
        Told { what, answer, entry, steps, watch }
    }

    /// Makes a connection and checks everything about it; returns the endpoint that it was sent to.
    fn check(&mut self, origin: Origin, transport: Transport, to: SocketAddr) -> SocketAddr {
        let hopeless = origin == Origin::Loopback && to.is_ipv6();
        let timeout = if hopeless { Duration::from_millis(200) } else { WAIT };
        let told = self.connect(origin, transport, to, timeout);
        told.nat_is_what_conntrack_and_server_saw();
        told.rules_are_those_of_the_kernel();
        told.verdict_is_right();
        if told.answer.result == Outcome::Ok {
            let routes =
                self.lab.node(NodeName::Worker3).exec(["ip", "-j", "route", "get", &told.entry.reply.src.to_string()]);
            told.route_is_that_of_the_kernel(&serde_json::from_str::<Value>(&routes.unwrap()).unwrap()[0]);
        }
        told.entry.reply.source()
    }
}

impl Told {
    fn fail(&self, why: &str) -> ! {
        let steps: Vec<String> = self.steps.iter().map(Step::to_string).collect();
        panic!(
            "{}: {why}\nclient: {:?}\nconntrack: {:?}\nkernel's rules: {steps:#?}\nwatch: {}",
            self.what,
            self.answer,
            self.entry,
            self.watch.report()
        );
    }

    fn nat_is_what_conntrack_and_server_saw(&self) {
        let (original, reply) = (self.entry.original, self.entry.reply);
        if self.watch.conntrack() != Some((original, reply)) {
            self.fail("watch and conntrack differ on the tuples");
        }
        let rewritten = |to: SocketAddr, was: SocketAddr| json!({"observed": true, "to": (to != was).then_some(to)});
        if self.watch.verdict["dnat"] != rewritten(reply.source(), original.destination()) {
            self.fail("the DNAT is not what conntrack says");
        }
        if self.watch.verdict["snat"] != rewritten(reply.destination(), original.source()) {
            self.fail("the SNAT is not what conntrack says");
        }
        if self.answer.result == Outcome::Ok
            && (self.answer.saw != Some(reply.destination()) || self.answer.server_local != Some(reply.source()))
        {
            self.fail("conntrack and the server differ");
        }
        if self.watch.verdict["agrees"] != true {
            self.fail("what was observed is not among the predictions");
        }
    }

    /// watch names exactly the rules and policies that the packet met, says the kernel. The tables are left out in which the trace
    /// is switched on: raw for legacy iptables, else our own.
    fn rules_are_those_of_the_kernel(&self) {
        let is_told = |rule: &PredictedRule| !matches!(rule.0.as_str(), "raw" | "ptl_trace");
        // The kernel's traces name a native table without its family.
        let plain = |rule: PredictedRule| (rule.0.rsplit(' ').next().unwrap_or_default().to_owned(), rule.1, rule.2);
        let kernel: BTreeSet<PredictedRule> = self.steps.iter().filter_map(place).filter(is_told).collect();
        let predicted: BTreeSet<PredictedRule> = self.watch.rules().into_iter().map(plain).filter(is_told).collect();
        let wrong: Vec<_> = predicted.difference(&kernel).collect();
        let missing: Vec<_> = kernel.difference(&predicted).collect();
        if !wrong.is_empty() || !missing.is_empty() || kernel.is_empty() {
            self.fail(&format!("watch names {wrong:?}, which the kernel does not, and leaves out {missing:?}"));
        }
    }

    /// The route hop was seen, and is what `ip route get` says of the destination.
    fn route_is_that_of_the_kernel(&self, kernel: &Value) {
        let Some(hop) = self.watch.hops.iter().rfind(|hop| hop["kind"] == "route") else {
            self.fail("no route is told")
        };
        let taken = &hop["taken"];
        let seen = [&taken["interface"], &taken["gateway"]] == [&kernel["dev"], &kernel["gateway"]];
        if hop["certainty"] != "both" || !(seen || taken["kind"] == "local" && kernel["type"] == "local") {
            self.fail(&format!("the route is not the kernel's: {kernel}"));
        }
    }

    fn verdict_is_right(&self) {
        let verdict = &self.watch.verdict;
        let by = || verdict["by"].as_str().and_then(|text| text.parse::<SocketAddr>().ok());
        let expected = match (self.answer.result, self.answer.proto) {
            (Outcome::Ok, _) => {
                let endpoint = self.answer.server_local;
                verdict["outcome"] == "answered" && verdict["ok"] == true && by() == endpoint
            }
            (Outcome::Refused, Transport::Tcp) => {
                let endpoint = Some(self.entry.reply.source());
                verdict["outcome"] == "refused" && verdict["ok"] == false && verdict["how"] == "rst" && by() == endpoint
            }
            (Outcome::Refused, Transport::Udp) => {
                let how = verdict["how"].as_str().unwrap_or_default();
                verdict["outcome"] == "refused" && verdict["ok"] == false && how.contains("port unreachable")
            }
            (Outcome::Timeout, Transport::Tcp) => verdict["outcome"] == "silent" && verdict["ok"] == false,
            // A datagram need not be answered.
            (Outcome::Timeout, Transport::Udp) => verdict["outcome"] == "silent" && verdict["ok"].is_null(),
            (Outcome::Error, _) => false,
        };
        if !expected {
            self.fail("the verdict is not what the client met");
        }
        let finding = &verdict["finding"]["id"];
        let explained = match self.answer.result {
            Outcome::Refused => *finding == "no-listener",
            Outcome::Ok => finding.is_null(),
            Outcome::Timeout | Outcome::Error => true,
        };
        if !explained {
            self.fail("the finding is not the cause");
        }
    }
}

fn proto_of(transport: Transport) -> Proto {
    match transport {
        Transport::Tcp => Proto::Tcp,
        Transport::Udp => Proto::Udp,
    }
}

fn place(step: &Step) -> Option<PredictedRule> {
    let number = match step.place {
        Place::Rule(number) => Some(number),
        Place::Policy => None,
        Place::Return | Place::Handle(_) => return None,
    };
    Some((step.table.clone(), step.chain.clone(), number))
}

/// hostPort 9088 from every client, both transports, both families; the client's result is that of the story.
fn host_port_from_everywhere(scene: &mut Scene, phase: Phase) {
    for transport in [Transport::Tcp, Transport::Udp] {
        for v6 in [false, true] {
            for origin in CLIENTS {
                let endpoint = scene.check(origin, transport, SocketAddr::new(origin.target(v6), HOST_PORT));
                let frontend = scene.lab.pod("frontend", NodeName::Worker3).unwrap();
                assert_eq!(endpoint, SocketAddr::new(frontend.addresses()[usize::from(v6)], phase.container_port()));
            }
        }
    }
}

/// A Service's port until endpoints on this node and on another were met (P(neither in 40 tries) < 1e-6).
fn service_from(scene: &mut Scene, origin: Origin, transport: Transport, to: SocketAddr) {
    let on_this_node = |endpoint: SocketAddr| match endpoint.ip() {
        IpAddr::V4(address) => address.octets()[2] == NodeName::Worker3.subnet(),
        IpAddr::V6(address) => address.segments()[3] == u16::from(NodeName::Worker3.subnet()),
    };
    let mut met = BTreeSet::new();
    for _ in 0..40 {
        met.insert(on_this_node(scene.check(origin, transport, to)));
        if met.len() == 2 {
            return;
        }
    }
    panic!("{origin:?} {transport:?} to {to}: only endpoints on one side of {met:?} in 40 tries");
}

#[test]
fn the_broken_host_port() {
    if may_run("porttrace watch") {
        let mut scene = Scene::set(LabOptions::default());
        host_port_from_everywhere(&mut scene, Phase::Broken);
    }
}

#[test]
fn the_fixed_host_port() {
    if may_run("porttrace watch") {
        let mut scene = Scene::set(LabOptions { phase: Phase::Fixed, ..LabOptions::default() });
        host_port_from_everywhere(&mut scene, Phase::Fixed);
    }
}

#[test]
fn the_host_port_by_legacy_iptables() {
    if may_run("porttrace watch") {
        let flavour = IptablesFlavour::Legacy;
        let mut scene = Scene::set(LabOptions { flavour, ..LabOptions::default() });
        host_port_from_everywhere(&mut scene, Phase::Broken);
    }
}

#[test]
fn the_host_port_of_a_pod_on_a_bridge() {
    if may_run("porttrace watch") {
        let interface = Interface::Bridge;
        let mut scene = Scene::set(LabOptions { phase: Phase::Fixed, interface, ..LabOptions::default() });
        host_port_from_everywhere(&mut scene, Phase::Fixed);
    }
}

#[test]
fn node_ports() {
    if may_run("porttrace watch") {
        node_ports_from_everywhere(&mut Scene::set(LabOptions::default()));
    }
}

fn node_ports_from_everywhere(scene: &mut Scene) {
    for origin in CLIENTS {
        let to = |v6, port| SocketAddr::new(origin.target(v6), port);
        service_from(scene, origin, Transport::Tcp, to(false, service::FRONTEND_NODE_PORT));
        service_from(scene, origin, Transport::Udp, to(false, service::DNS_NODE_PORT));
        if origin != Origin::Loopback {
            service_from(scene, origin, Transport::Tcp, to(true, service::DUAL_NODE_PORT));
        }
    }
}

#[test]
fn the_host_port_and_services_by_native_rules() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut scene = Scene::native(Phase::Broken);
    host_port_from_everywhere(&mut scene, Phase::Broken);
    // kube-proxy's nftables mode serves no NodePort on 127.0.0.1.
    for origin in CLIENTS.into_iter().filter(|origin| *origin != Origin::Loopback) {
        let to = |v6, port| SocketAddr::new(origin.target(v6), port);
        service_from(&mut scene, origin, Transport::Tcp, to(false, service::FRONTEND_NODE_PORT));
        service_from(&mut scene, origin, Transport::Udp, to(false, service::DNS_NODE_PORT));
        service_from(&mut scene, origin, Transport::Tcp, to(true, service::DUAL_NODE_PORT));
    }
    cluster_ips_from_node_and_pod(&mut scene);
}

#[test]
fn a_repair_of_native_rules_while_watching_is_noticed() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut scene = Scene::native(Phase::Broken);
    let to = SocketAddr::new(Origin::OtherNode.target(false), HOST_PORT);
    let before = scene.connect(Origin::OtherNode, Transport::Tcp, to, WAIT);
    assert_eq!(before.watch.verdict["outcome"], "refused", "{}", before.watch.report());
    let node = scene.lab.node(NodeName::Worker3);
    for family in ["ip", "ip6"] {
        node.exec(["nft", "delete", "table", family, "cni_hostport"]).unwrap();
    }
    node.exec_with(["nft", "-f", "-"], &porttrace_tests::lab::native::portmap(Phase::Fixed)).unwrap();
    scene.trace.reread_rules().unwrap();
    let endpoint = scene.check(Origin::OtherNode, Transport::Tcp, to);
    assert_eq!(endpoint.port(), Phase::Fixed.container_port());
}

#[test]
fn cluster_ips() {
    if may_run("porttrace watch") {
        cluster_ips_from_node_and_pod(&mut Scene::set(LabOptions::default()));
    }
}

fn cluster_ips_from_node_and_pod(scene: &mut Scene) {
    for origin in [Origin::Node, Origin::Pod] {
        for (transport, ip, port) in [
            (Transport::Tcp, service::FRONTEND_IP, service::HTTP_PORT),
            (Transport::Tcp, service::DUAL_V6, service::HTTP_PORT),
            (Transport::Udp, service::DNS_IP, service::DNS_PORT),
        ] {
            service_from(scene, origin, transport, SocketAddr::new(ip, port));
        }
    }
}

/// For the virtual machine, where raising a lab takes longest of all.
#[test]
#[ignore = "the tests above in one lab"]
fn one_lab_for_all() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut scene = Scene::set(LabOptions::default());
    host_port_from_everywhere(&mut scene, Phase::Broken);
    node_ports_from_everywhere(&mut scene);
    cluster_ips_from_node_and_pod(&mut scene);
    scene.repaired();
    host_port_from_everywhere(&mut scene, Phase::Fixed);
}

#[test]
fn a_repair_while_watching_is_noticed() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut scene = Scene::set(LabOptions::default());
    let to = SocketAddr::new(Origin::OtherNode.target(false), HOST_PORT);
    let before = scene.connect(Origin::OtherNode, Transport::Tcp, to, WAIT);
    assert_eq!(before.watch.verdict["outcome"], "refused", "{}", before.watch.report());
    scene.repaired();
    let endpoint = scene.check(Origin::OtherNode, Transport::Tcp, to);
    assert_eq!(endpoint.port(), Phase::Fixed.container_port());
    let noted =
        |line: &Value| line["type"] == "note" && line["text"].as_str().is_some_and(|text| text.contains("rules"));
    assert!(scene.watch.others.iter().any(noted), "the change of the rules is noted: {:?}", scene.watch.others);
}
