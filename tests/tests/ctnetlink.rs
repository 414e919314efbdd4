//! `porttrace watch --conntrack-backend ctnetlink`: what conntrack's events and the rules' predictions tell is held against
//! conntrack itself, the client, and a watch that sees every rewrite at the kernel's hooks.

use porttrace_tests::lab::topology::{HOST_PORT, NodeName, service};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::oracle::conntrack::ConntrackEvents;
use porttrace_tests::peer::{Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::{Connection, Watch};
use porttrace_user::core::model::flow::{Proto, Tuple};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(10);
const CLIENTS: [Origin; 5] = [Origin::Node, Origin::Loopback, Origin::OtherNode, Origin::Outside, Origin::Pod];
/// hostPort, NodePorts, Service ports; with 53 and 80 the pods' own ports are watched too.
const WATCHED: [&str; 7] = ["9088", "30080", "30120", "30053", "8088", "53", "80"];

struct Scene {
    lab: Lab,
    conntrack: ConntrackEvents,
    /// By hooks, and by conntrack's events.
    hooks: Watch,
    events: Watch,
}

impl Scene {
    fn set(phase: Phase) -> Self {
        Self::watching(Lab::up(LabOptions { phase, ..LabOptions::default() }).unwrap())
    }

    fn watching(lab: Lab) -> Self {
        let node = lab.node(NodeName::Worker3);
        let conntrack = ConntrackEvents::start(node).unwrap();
        let hooks = Watch::start(node, &lab.tools, &WATCHED).unwrap();
        let events =
            Watch::start(node, &lab.tools, &[&["--conntrack-backend", "ctnetlink"], &WATCHED[..]].concat()).unwrap();
        let ready = events.others.iter().find(|line| line["state"] == "ready").unwrap();
        assert!(ready["probes"].as_str().unwrap().contains("conntrack's events (ctnetlink)"), "{ready}");
        let costs = ready["warnings"].as_array().unwrap().iter().any(|line| line.as_str().unwrap().contains("late"));
        assert!(costs, "the header says what it costs: {ready}");
        Self { lab, conntrack, hooks, events }
    }

    fn host_port(&mut self, origin: Origin) {
        for v6 in [false, true] {
            let to = SocketAddr::new(origin.target(v6), HOST_PORT);
            self.check(origin, Transport::Tcp, to);
            self.check(origin, Transport::Udp, to);
        }
    }

    fn check(&mut self, origin: Origin, transport: Transport, to: SocketAddr) {
        let hopeless = origin == Origin::Loopback && to.is_ipv6();
        let timeout = if hopeless { Duration::from_millis(200) } else { WAIT };
        let answer = self.lab.connect(origin, &Connect { timeout, ..Connect::new(transport, to) }).unwrap();
        let proto = if transport == Transport::Tcp { Proto::Tcp } else { Proto::Udp };
        let original = Tuple::new(proto, answer.local, to);
        let what = format!("{origin:?} {transport:?} to {to}");
        let entry =
            self.conntrack.new_entry(original, WAIT).unwrap_or_else(|| panic!("{what}: no entry for {original}"));
        let told = self.events.connection(original, WAIT).unwrap_or_else(|error| panic!("{what}: {error:#}"));
        let reference = self.hooks.connection(original, WAIT).unwrap_or_else(|error| panic!("{what}: {error:#}"));
        let fail = |why: &str| -> ! {
            panic!(
                "{what}: {why}\n{answer:?}\n{entry:?}\nby events: {}\nby hooks: {}",
                told.report(),
                reference.report()
            )
        };
        if told.conntrack() != Some((entry.original, entry.reply)) {
            fail("not the tuples of conntrack");
        }
        let verdict = match answer.result {
            Outcome::Ok => "answered",
            Outcome::Refused => "refused",
            Outcome::Timeout => "silent",
            Outcome::Error => fail("the client failed"),
        };
        if told.verdict["outcome"] != verdict || told.verdict["agrees"] != true {
            fail("not what the client met, or not what the rules say");
        }
        for field in ["outcome", "by", "how", "dnat", "snat", "ok"] {
            if told.verdict[field] != reference.verdict[field] {
                fail(&format!("{field} differs"));
            }
        }
        if packets(&told) != packets(&reference) {
            fail("other packets were seen");
        }
        if told.start["input"] != reference.start["input"] || told.rules() != reference.rules() {
            fail("another beginning or other rules");
        }
    }
}

/// Every packet at every interface, in order.
fn packets(connection: &Connection) -> Vec<String> {
    let is_packet = |hop: &&Value| hop["kind"] == "packet";
    let words = |hop: &Value| {
        let mut hop = hop.clone();
        for changing in ["offset_ns", "id", "v"] {
            hop.as_object_mut().unwrap().remove(changing);
        }
        hop.to_string()
    };
    connection.hops.iter().filter(is_packet).map(words).collect()
}

#[test]
fn the_broken_host_port_from_everywhere() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut scene = Scene::set(Phase::Broken);
    for transport in [Transport::Tcp, Transport::Udp] {
        for v6 in [false, true] {
            for origin in CLIENTS {
                scene.check(origin, transport, SocketAddr::new(origin.target(v6), HOST_PORT));
            }
        }
    }
}

#[test]
fn host_port_node_ports_and_services_from_everywhere() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut scene = Scene::set(Phase::Fixed);
    for origin in CLIENTS {
        let to = |v6, port| SocketAddr::new(origin.target(v6), port);
        scene.host_port(origin);
        // Several tries, so that endpoints on this node and on others are met.
        for _ in 0..3 {
            scene.check(origin, Transport::Tcp, to(false, service::FRONTEND_NODE_PORT));
            scene.check(origin, Transport::Udp, to(false, service::DNS_NODE_PORT));
            if origin != Origin::Loopback {
                scene.check(origin, Transport::Tcp, to(true, service::DUAL_NODE_PORT));
            }
            if matches!(origin, Origin::Node | Origin::Pod) {
                scene.check(origin, Transport::Tcp, SocketAddr::new(service::FRONTEND_IP, service::HTTP_PORT));
                scene.check(origin, Transport::Udp, SocketAddr::new(service::DNS_IP, service::DNS_PORT));
            }
        }
    }
    // Past the rules, to a pod that they name too: seen by its own port alone.
    let pod = scene.lab.pod("frontend", NodeName::Worker3).unwrap().addresses()[0];
    scene.check(Origin::OtherNode, Transport::Tcp, SocketAddr::new(pod, 80));
}

/// Where native rules lead is predicted too.
#[test]
fn a_host_port_and_a_node_port_of_native_rules() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    lab.go_native(Phase::Fixed).unwrap();
    let mut scene = Scene::watching(lab);
    for origin in [Origin::OtherNode, Origin::Outside, Origin::Node] {
        let to = |port| SocketAddr::new(origin.target(false), port);
        scene.host_port(origin);
        for _ in 0..3 {
            scene.check(origin, Transport::Tcp, to(service::FRONTEND_NODE_PORT));
            scene.check(origin, Transport::Udp, to(service::DNS_NODE_PORT));
        }
    }
}

#[test]
fn connections_past_the_watched_port_are_not_told() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    let node = lab.node(NodeName::Worker3);
    let mut watch = Watch::start(node, &lab.tools, &["--conntrack-backend", "ctnetlink", "9088"]).unwrap();
    let pod: IpAddr = lab.pod("frontend", NodeName::Worker3).unwrap().addresses()[0];
    let ask = |to| lab.connect(Origin::OtherNode, &Connect::new(Transport::Tcp, to)).unwrap();
    // The same pod and port: once past the rules, once by them.
    let past = ask(SocketAddr::new(pod, 80));
    let answer = ask(SocketAddr::new(Origin::OtherNode.target(false), HOST_PORT));
    assert_eq!((past.result, answer.result), (Outcome::Ok, Outcome::Ok));
    let original = Tuple::new(Proto::Tcp, answer.local, SocketAddr::new(Origin::OtherNode.target(false), HOST_PORT));
    watch.connection(original, WAIT).unwrap();
    watch.process.signal(nix::sys::signal::Signal::SIGINT).unwrap();
    let ended = watch.status("ended", WAIT).unwrap().expect("an end");
    assert_eq!(watch.left_over(), [], "{ended}");
    assert_eq!((&ended["connections"], &ended["lost"]), (&Value::from(1), &Value::Array(Vec::new())), "{ended}");
}

/// Where the rules lead since a moment ago is not watched yet: what happens there is not taken for this node's own doing.
#[test]
fn what_could_not_be_seen_yet_is_not_said_of_this_node() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    let node = lab.node(NodeName::Worker3);
    let pod = lab.pod("frontend", NodeName::Worker3).unwrap();
    let pod_v4 = pod.addresses()[0];
    // Nobody answers on one port, and nothing listens on the other.
    lab.tools.iptables(&pod.netns, "-A INPUT -p tcp --dport 82 -j DROP").unwrap();
    let options = ["--conntrack-backend", "ctnetlink", "--timeout", "400ms", "9088"];
    let mut watch = Watch::start(node, &lab.tools, &options).unwrap();
    for (port, outcome, means) in [(81, "refused", Outcome::Refused), (82, "silent", Outcome::Timeout)] {
        let to = SocketAddr::new(pod_v4, port);
        let rule = format!("PREROUTING -p tcp --dport {HOST_PORT} -j DNAT --to-destination {to}");
        lab.tools.iptables(node, &format!("-t nat -I {rule}")).unwrap();
        let asked = SocketAddr::new(Origin::Outside.target(false), HOST_PORT);
        let timeout = Duration::from_millis(600);
        let answer = lab.connect(Origin::Outside, &Connect { timeout, ..Connect::new(Transport::Tcp, asked) }).unwrap();
        assert_eq!(answer.result, means);
        let told = watch.connection(Tuple::new(Proto::Tcp, answer.local, asked), WAIT).unwrap();
        assert_eq!(told.verdict["outcome"], outcome, "{}", told.report());
        let place = told.verdict["refuser"].as_str().or(told.verdict["reached"].as_str()).unwrap();
        assert!(matches!(place, "unseen" | "behind" | "confirmed" | "left"), "{}", told.report());
        let text = told.verdict["text"].as_str().unwrap();
        assert!(text.contains(&to.to_string()) && !text.contains("by this node"), "{}", told.report());
        lab.tools.iptables(node, &format!("-t nat -D {rule}")).unwrap();
    }
}

#[test]
fn a_connection_that_is_older_than_the_watch_is_joined() {
    joins_older_ones(&["--conntrack-backend", "ctnetlink", "9088"]);
}

#[test]
fn a_connection_that_is_older_than_the_watch_is_joined_by_hooks_too() {
    joins_older_ones(&["9088"]);
}

fn joins_older_ones(arguments: &[&str]) {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    let node = lab.node(NodeName::Worker3);
    let to = SocketAddr::new(Origin::OtherNode.target(false), HOST_PORT);
    let netns = lab.netns(Origin::OtherNode).unwrap();
    let stream = netns.run_in(|| std::net::TcpStream::connect_timeout(&to, WAIT)).unwrap().unwrap();
    let original = Tuple::new(Proto::Tcp, stream.local_addr().unwrap(), to);
    let mut watch = Watch::start(node, &lab.tools, arguments).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let told = watch.connection(original, WAIT).unwrap();
    assert_eq!(told.verdict["outcome"], "joined-late", "{}", told.report());
    let (seen, reply) = told.conntrack().expect("conntrack's tuples");
    assert_eq!(seen, original);
    let pod: IpAddr = lab.pod("frontend", NodeName::Worker3).unwrap().addresses()[0];
    assert_eq!(reply.source(), SocketAddr::new(pod, 80), "{}", told.report());
    let others: BTreeSet<Tuple> = watch.left_over().into_iter().collect();
    assert!(others.is_empty(), "one connection, one story: {others:?}");
}
