//! What the kernel drops of watched connections on a real node: each a hop with its reason, and the rule where one did it.

use pnet::packet::tcp::{self, MutableTcpPacket, TcpFlags};
use porttrace_tests::lab::topology::{DNS, FRONTEND, HOST_PORT, NodeName, OUTSIDE_V4, service};
use porttrace_tests::lab::{Lab, LabOptions, Phase};
use porttrace_tests::netns::{ChildGuard, Netns};
use porttrace_tests::peer;
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::{Connection, Watch};
use porttrace_user::core::model::flow::{Proto, Tuple};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(20);
const NODE: NodeName = NodeName::Worker3;
/// A port of worker3 that leads nowhere, and one that nobody has.
const ASTRAY: u16 = 9090;
const CLOSED: u16 = 9091;

fn iptables(lab: &Lab, netns: &Netns, rule: &str) {
    lab.tools.iptables(netns, rule).unwrap();
}

fn watch(lab: &Lab) -> Watch {
    let (ports, short) = ([HOST_PORT, ASTRAY, CLOSED].map(|port| port.to_string()), ["--timeout", "400ms"]);
    let arguments: Vec<&str> = ports.iter().map(String::as_str).chain(short).collect();
    Watch::start(lab.node(NODE), &lab.tools, &arguments).unwrap()
}

/// One attempt from `source` outside, by a port of its own; how it ends for the client does not matter.
fn attempt(lab: &Lab, watch: &mut Watch, kind: Type, source: Ipv4Addr, port: u16) -> Connection {
    attempt_from(&lab.outside, watch, kind, source, SocketAddr::from((NODE.v4(), port)))
}

fn attempt_from(client: &Netns, watch: &mut Watch, kind: Type, source: Ipv4Addr, to: SocketAddr) -> Connection {
    static NEXT: AtomicU16 = AtomicU16::new(40_010);
    let from = SocketAddr::from((source, NEXT.fetch_add(1, Ordering::Relaxed)));
    client
        .run_in(|| {
            let socket = Socket::new(Domain::IPV4, kind, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
            let connected = socket.connect_timeout(&to.into(), Duration::from_millis(200));
            if kind == Type::DGRAM {
                connected?;
                socket.send(b"x")?;
            }
            Ok::<_, std::io::Error>(())
        })
        .unwrap()
        .unwrap();
    let proto = if kind == Type::STREAM { Proto::Tcp } else { Proto::Udp };
    watch.connection(Tuple::new(proto, from, to), WAIT).unwrap()
}

/// The first `drop` hop: which way the packet went, the kernel's reason, the rule.
fn drop_hop(told: &Connection) -> (Value, Value, Value) {
    let hop =
        told.hops.iter().find(|hop| hop["kind"] == "drop").unwrap_or_else(|| panic!("no drop: {}", told.report()));
    assert_eq!(hop["certainty"], "observed");
    (hop["way"].clone(), hop["reason"].clone(), hop["by"].clone())
}

fn text(told: &Connection) -> &str {
    told.verdict["text"].as_str().unwrap()
}

#[test]
fn every_drop_is_a_hop_with_its_reason() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let node = lab.node(NODE);
    iptables(
        &lab,
        node,
        &format!("-t nat -I PREROUTING -p tcp --dport {ASTRAY} -j DNAT --to-destination 198.51.100.9:80"),
    );
    node.exec(["ip", "route", "del", "default"]).unwrap();
    let mut watch = watch(&lab);

    let told = attempt(&lab, &mut watch, Type::STREAM, OUTSIDE_V4, ASTRAY);
    assert_eq!(drop_hop(&told), (json!("request"), json!("IP_INNOROUTES"), Value::Null), "{}", told.report());

    let told = attempt(&lab, &mut watch, Type::STREAM, OUTSIDE_V4, CLOSED);
    assert_eq!(drop_hop(&told), (json!("request"), json!("NO_SOCKET"), Value::Null), "{}", told.report());
    assert!(text(&told).contains(&format!("nothing listens on {}:{CLOSED}", NODE.v4())), "{}", text(&told));
    let told = attempt(&lab, &mut watch, Type::DGRAM, OUTSIDE_V4, CLOSED);
    assert_eq!(drop_hop(&told), (json!("request"), json!("NO_SOCKET"), Value::Null), "{}", told.report());

    // An address whose way back leads by another interface than the packet came.
    let pods_own = lab.pod("client", NODE).unwrap().addresses()[0];
    let IpAddr::V4(pods_own) = pods_own else { panic!("{pods_own}") };
    lab.outside.exec(["ip", "addr", "add", &format!("{pods_own}/32"), "dev", "lo"]).unwrap();
    node.exec(["sysctl", "-qw", "net.ipv4.conf.eth0.rp_filter=1"]).unwrap();
    let told = attempt(&lab, &mut watch, Type::STREAM, pods_own, HOST_PORT);
    assert_eq!(drop_hop(&told), (json!("request"), json!("IP_RPFILTER"), Value::Null), "{}", told.report());
    assert!(text(&told).contains("rp_filter"), "{}", text(&told));
}

#[test]
fn a_rule_that_drops_is_named() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    iptables(&lab, lab.node(NODE), "-I FORWARD -p tcp -m tcp --dport 8081 -j DROP");
    let mut watch = watch(&lab);
    let told = attempt(&lab, &mut watch, Type::STREAM, OUTSIDE_V4, HOST_PORT);
    let by = json!({
        "hook": "FORWARD", "table": "filter", "chain": "FORWARD", "number": 1, "because": "-p tcp -m tcp --dport 8081",
    });
    assert_eq!(drop_hop(&told), (json!("request"), json!("NETFILTER_DROP"), by), "{}", told.report());
    assert!(text(&told).contains("dropped by filter FORWARD #1"), "{}", text(&told));
}

/// The answer of a connection that conntrack knows meets rules as what it is then: its own tuple, ESTABLISHED.
#[test]
fn a_rule_that_drops_the_answer_is_named() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    let node = lab.node(NODE);
    let mut watch = watch(&lab);
    let drop = "FORWARD -p tcp --sport 80 -m conntrack --ctstate ESTABLISHED -j DROP";
    let masquerade = "-t nat -A POSTROUTING -p tcp --dport 80 -j MASQUERADE";
    for rules in [&[][..], &[masquerade]] {
        rules.iter().for_each(|rule| iptables(&lab, node, rule));
        iptables(&lab, node, &format!("-I {drop}"));
        let told = attempt(&lab, &mut watch, Type::STREAM, OUTSIDE_V4, HOST_PORT);
        assert_eq!(told.verdict["outcome"], "answer-lost", "{}", told.report());
        let (way, reason, by) = drop_hop(&told);
        assert_eq!((way, reason), (json!("reply"), json!("NETFILTER_DROP")), "{}", told.report());
        assert_eq!((&by["hook"], &by["chain"], &by["number"]), (&json!("FORWARD"), &json!("FORWARD"), &json!(1)));
        assert!(text(&told).contains("dropped in FORWARD by filter FORWARD #1"), "{}", text(&told));
        iptables(&lab, node, &format!("-D {drop}"));
    }
    // No rule at all.
    node.exec(["ip", "route", "add", "blackhole", &format!("{OUTSIDE_V4}/32")]).unwrap();
    let told = attempt(&lab, &mut watch, Type::STREAM, OUTSIDE_V4, HOST_PORT);
    assert!(text(&told).ends_with("never left towards the client; predicted: a blackhole route"), "{}", text(&told));
}

/// A packet whose destination OUTPUT rewrote is routed anew, and dropped by netfilter where that fails: no rule does it.
#[test]
fn what_netfilter_drops_for_no_rules_sake_is_told_with_its_reason() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let node = lab.node(NODE);
    node.exec(["sh", "-c", "for file in /proc/sys/net/ipv4/conf/*/route_localnet; do echo 0 > $file; done"]).unwrap();
    let mut watch = watch(&lab);
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, HOST_PORT));
    let told = attempt_from(node, &mut watch, Type::STREAM, Ipv4Addr::LOCALHOST, to);
    assert_eq!(drop_hop(&told), (json!("request"), json!("NETFILTER_DROP"), Value::Null), "{}", told.report());
    let said = "dropped by this node: netfilter; predicted: a martian address (127/8 needs route_localnet)";
    assert!(text(&told).starts_with(said), "{}", text(&told));
}

/// Rules as kube-proxy has them in nftables mode, for two ports that no iptables rule claims.
const NATIVE: &str = "table ip kube-proxy {
    map service-nodeports {
        type inet_proto . inet_service : verdict
        elements = { tcp . ASTRAY : goto endpoint, tcp . CLOSED : drop }
    }
    chain nat-prerouting {
        type nat hook prerouting priority -100; policy accept;
        fib daddr type local meta l4proto . th dport vmap @service-nodeports
    }
    chain endpoint {
        meta mark set 0x4000
        meta l4proto tcp dnat to POD
    }
    chain nat-postrouting {
        type nat hook postrouting priority 100; policy accept;
        meta mark 0x4000 masquerade fully-random
    }
}";

#[test]
fn what_native_nftables_rules_do_is_told_with_them() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    let pod = SocketAddr::from((NODE.pod_v4(FRONTEND), 80));
    let ports = [("ASTRAY", ASTRAY.to_string()), ("CLOSED", CLOSED.to_string()), ("POD", pod.to_string())];
    let rules = ports.iter().fold(NATIVE.to_owned(), |rules, (name, value)| rules.replace(name, value));
    lab.node(NODE).exec_with(["nft", "-f", "-"], &rules).unwrap();
    let mut watch = watch(&lab);

    let answered = attempt(&lab, &mut watch, Type::STREAM, OUTSIDE_V4, ASTRAY);
    assert_eq!((&answered.verdict["outcome"], &answered.verdict["agrees"]), (&json!("answered"), &json!(true)));
    let made =
        |hop: &&Value| hop["table"] == "ip kube-proxy" && hop["certainty"] == "both" && !hop["rewrite"].is_null();
    assert_eq!(answered.hops.iter().filter(made).count(), 2, "{}", answered.report());

    let dropped = attempt(&lab, &mut watch, Type::STREAM, OUTSIDE_V4, CLOSED);
    assert!(text(&dropped).contains("ip kube-proxy "), "{}", dropped.report());

    // And what iptables rules do beside them is still told with them.
    let plain = attempt(&lab, &mut watch, Type::STREAM, OUTSIDE_V4, HOST_PORT);
    assert_eq!(plain.verdict["agrees"], true, "{}", plain.report());
    // A rule of a moment ago is read before others are said to have done what it did.
    let dns = SocketAddr::from((NODE.pod_v4(DNS), service::DNS_PORT));
    iptables(&lab, lab.node(NODE), &format!("-t nat -I PREROUTING -p udp --dport {HOST_PORT} -j DNAT --to {dns}"));
    let changed = attempt(&lab, &mut watch, Type::DGRAM, OUTSIDE_V4, HOST_PORT);
    assert_eq!(changed.verdict["by"], json!(dns.to_string()), "{}", changed.report());
    assert_eq!(changed.verdict["agrees"], true, "{}", changed.report());
}

/// A packet whose neighbour does not answer waits behind the last hook; the kernel gives up after some seconds.
#[test]
fn what_waits_for_its_neighbour_is_told_so() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    // On the link that leads to the outside; nobody has it.
    let [a, b, c, _] = OUTSIDE_V4.octets();
    let nobody = Ipv4Addr::new(a, b, c, 250);
    let rule = format!("-t nat -I PREROUTING -p tcp --dport {ASTRAY} -j DNAT --to-destination {nobody}:80");
    iptables(&lab, lab.node(NODE), &rule);
    let mut watch = watch(&lab);
    let told = attempt(&lab, &mut watch, Type::STREAM, OUTSIDE_V4, ASTRAY);
    assert_eq!((&told.verdict["outcome"], &told.verdict["reached"]), (&json!("silent"), &json!("post-routing")));
    let waits = format!("passed all rules towards {nobody}:80, but left by no interface");
    assert!(text(&told).contains(&waits), "{}", told.report());
    // The client's own neighbour entry is asked for anew: the error leaves after the drop.
    lab.node(NODE).exec(["ip", "neigh", "flush", "to", &OUTSIDE_V4.to_string()]).unwrap();
    let is_amendment = |line: &&Value| line["type"] == "verdict";
    assert!(watch.read_until(WAIT, |watch| watch.others.iter().any(|line| is_amendment(&line))).unwrap());
    let amended = watch.others.iter().find(is_amendment).unwrap();
    assert_eq!((&amended["id"], &amended["refuser"]), (&told.verdict["id"], &json!("this-node")), "{amended}");
    let ends = format!(": {nobody} does not answer on its link");
    assert!(amended["text"].as_str().unwrap().ends_with(&ends), "{amended}");
}

/// What a process of the node answers is seen by no interface when rules of the way out drop it.
#[test]
fn an_answer_of_the_node_itself_that_a_rule_drops_is_told() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let node = lab.node(NODE);
    let mut command = node.command(peer::binary().unwrap());
    command.args(["serve", "--name", "own", "--tcp", &CLOSED.to_string()]);
    let process = ChildGuard::spawn(command).unwrap();
    process.stdout.wait_for(WAIT, |line| (line == "ready").then_some(())).unwrap();
    let mut watch = watch(&lab);
    for (table, chain) in [("filter", "OUTPUT"), ("mangle", "POSTROUTING")] {
        let drop = format!("{chain} -p tcp --sport {CLOSED} -j DROP");
        iptables(&lab, node, &format!("-t {table} -I {drop}"));
        let told = attempt(&lab, &mut watch, Type::STREAM, OUTSIDE_V4, CLOSED);
        let verdict = &told.verdict;
        assert_eq!((&verdict["outcome"], &verdict["interface"]), (&json!("answer-lost"), &Value::Null));
        let words = format!("answered, but this node dropped the answer: dropped in {chain} by {table} {chain} #1");
        assert!(text(&told).contains(&words), "{}", told.report());
        iptables(&lab, node, &format!("-t {table} -D {drop}"));
    }
    // Without a way back none is made.
    node.exec(["ip", "route", "add", "blackhole", &format!("{OUTSIDE_V4}/32")]).unwrap();
    let told = attempt(&lab, &mut watch, Type::STREAM, OUTSIDE_V4, CLOSED);
    assert_eq!((&told.verdict["outcome"], &told.verdict["reached"]), (&json!("silent"), &json!("local-in")));
    assert!(text(&told).ends_with(": their answer cannot leave; predicted: a blackhole route"), "{}", told.report());
}

/// A SYN ACK with a wrong checksum: conntrack calls it INVALID.
fn wrong_answer(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (from.ip(), to.ip()) else { panic!("{from} {to}") };
    let mut bytes = vec![0; 20];
    let mut packet = MutableTcpPacket::new(&mut bytes).unwrap();
    packet.set_source(from.port());
    packet.set_destination(to.port());
    packet.set_sequence(1);
    packet.set_acknowledgement(1);
    packet.set_data_offset(5);
    packet.set_flags(TcpFlags::SYN | TcpFlags::ACK);
    packet.set_window(1000);
    let checksum = tcp::ipv4_checksum(&packet.to_immutable(), &source, &destination);
    packet.set_checksum(!checksum);
    bytes
}

#[test]
fn an_answer_that_conntrack_calls_invalid_is_dropped_by_kube_forward() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let pod = &lab.pod("frontend", NODE).unwrap().netns;
    // The pod's own TCP keeps quiet.
    iptables(&lab, pod, "-A INPUT -p tcp -m tcp --dport 8081 -j DROP");
    let mut watch = watch(&lab);
    let (client, to) = (SocketAddr::from((OUTSIDE_V4, 40_011)), SocketAddr::from((NODE.v4(), HOST_PORT)));
    let server = SocketAddr::from((NODE.pod_v4(FRONTEND), 8081));
    let syn = lab.outside.run_in(|| Socket::new(Domain::IPV4, Type::STREAM, None)).unwrap().unwrap();
    syn.bind(&client.into()).unwrap();
    syn.set_nonblocking(true).unwrap();
    // In progress.
    assert!(syn.connect(&to.into()).is_err());
    let raw = pod.run_in(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP))).unwrap().unwrap();
    raw.send_to(&wrong_answer(server, client), &SocketAddr::new(client.ip(), 0).into()).unwrap();
    let told = watch.connection(Tuple::new(Proto::Tcp, client, to), WAIT).unwrap();
    let (way, reason, by) = drop_hop(&told);
    assert_eq!((way, reason), (json!("reply"), json!("NETFILTER_DROP")), "{}", told.report());
    assert_eq!(
        [&by["hook"], &by["table"], &by["chain"], &by["number"]],
        [&json!("FORWARD"), &json!("filter"), &json!("KUBE-FORWARD"), &json!(1)],
        "{}",
        told.report()
    );
    assert_eq!(told.verdict["outcome"], "answer-lost", "{}", told.report());
    let said =
        "never left towards the client: dropped in FORWARD by filter KUBE-FORWARD #1 (-m conntrack --ctstate INVALID";
    assert!(text(&told).contains(said), "{}", text(&told));
}
