//! `porttrace watch --into-pods` on real traffic: what happens in the pod's own network namespace, by its own rules.

use nix::sys::signal::Signal;
use porttrace_tests::bpf::{Held, held_by};
use porttrace_tests::lab::cni::PortMapping;
use porttrace_tests::lab::pod::PodSpec;
use porttrace_tests::lab::rules::{IptablesFlavour, Tools};
use porttrace_tests::lab::topology::{HOST_PORT, NodeName};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::lines::until;
use porttrace_tests::netns::Netns;
use porttrace_tests::peer::{Answer, Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::{Connection, Watch};
use porttrace_user::core::model::flow::{Proto, Tuple};
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tempfile::TempDir;

const WAIT: Duration = Duration::from_secs(20);
/// The hostPort of the pod that passes on, as k3s's `svclb` pods do.
const BALANCED: u16 = 9080;

fn watch(lab: &Lab, arguments: &[&str]) -> Watch {
    Watch::start(lab.node(NodeName::Worker3), &lab.tools, &[arguments, &["--into-pods"]].concat()).unwrap()
}

fn connect(lab: &Lab, watch: &mut Watch, v6: bool, port: u16) -> (Answer, Connection) {
    let request = Connect::new(Transport::Tcp, SocketAddr::new(Origin::Outside.target(v6), port));
    let answer = lab.connect(Origin::Outside, &request).unwrap();
    let told = watch.connection(Tuple::new(Proto::Tcp, answer.local, answer.to), WAIT).unwrap();
    (answer, told)
}

/// The hops inside the pod with this namespace, in order: kind, certainty, and what tells them apart.
fn hops(told: &Connection, pod: &Netns) -> Vec<[String; 3]> {
    let inside = told.hops.iter().filter(|hop| !hop["inside"].is_null());
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    inside
        .map(|hop| {
            assert_eq!(hop["inside"], json!({"name": pod.name(), "netns": pod.inode().unwrap()}), "{}", told.report());
            let what = match hop["kind"].as_str() {
                Some("packet") => {
                    format!("{} {} {}", text(&hop["label"]), text(&hop["direction"]), text(&hop["interface"]))
                }
                Some("rules") => format!("{} {}", text(&hop["action"]["do"]), text(&hop["hook"])),
                Some("drop") => text(&hop["reason"]),
                Some("route") => text(&hop["taken"]["kind"]),
                _ => text(&hop["text"]),
            };
            [text(&hop["kind"]), text(&hop["certainty"]), what]
        })
        .collect()
}

fn hop(kind: &str, certainty: &str, what: &str) -> [String; 3] {
    [kind, certainty, what].map(str::to_owned)
}

#[test]
fn the_pod_itself_refuses_because_nothing_listens() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let mut watch = watch(&lab, &["9088"]);
    let pod = &lab.pod("frontend", NodeName::Worker3).unwrap().netns;
    for v6 in [false, true] {
        let (answer, told) = connect(&lab, &mut watch, v6, HOST_PORT);
        assert_eq!(answer.result, Outcome::Refused);
        let mut seen = hops(&told, pod);
        let note = seen.pop().unwrap();
        // Its SYN is freed before the RST leaves, or after it.
        let dropped = seen.iter().position(|seen| *seen == hop("drop", "observed", "NO_SOCKET")).unwrap();
        seen.remove(dropped);
        assert_eq!(
            seen,
            [
                hop("packet", "observed", "SYN in eth0"),
                hop("route", "both", "local"),
                hop("packet", "observed", "RST out eth0")
            ],
            "{}",
            told.report()
        );
        assert!(note[2].starts_with("nothing listens on tcp port 8081 here, but on 80 (lab-peer/"), "{note:?}");
        let inside = &told.verdict["inside"];
        assert_eq!(
            (&inside["outcome"], &inside["refuser"]),
            (&json!("refused"), &json!("this-node")),
            "{}",
            told.report()
        );
        let text = told.verdict["text"].as_str().unwrap();
        assert!(text.contains("nothing listens on") && text.contains("8081"), "{text}");
        // Between the packet that left for the pod and the one that came back, in the order of time.
        let times: Vec<u64> = told
            .hops
            .iter()
            .filter(|hop| hop["kind"] == "packet")
            .filter_map(|hop| hop["offset_ns"].as_u64())
            .collect();
        assert!(times.len() == 6 && times.is_sorted(), "{}", told.report());
    }
}

/// A pod whose own rules send port 80 on to `to`, and masquerade.
fn balancer(lab: &mut Lab, to: [IpAddr; 2], port: u16) {
    let mapping = PortMapping { host_port: BALANCED, container_port: 80, protocol: "tcp", host_ip: None };
    let spec = PodSpec { mappings: vec![mapping], quiet: true, ..PodSpec::new("svclb", NodeName::Worker3, 30) };
    let tools = lab.tools.clone();
    let pod = &lab.start_pod(spec).unwrap().netns;
    pod.exec(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]).unwrap();
    for (family, to) in ["iptables", "ip6tables"].into_iter().zip(to) {
        let dnat =
            format!("-A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination {}", SocketAddr::new(to, port));
        let masquerade = format!("-A POSTROUTING -d {to} -p tcp -j MASQUERADE");
        tools.restore(pod, family, &format!("*nat\n{dnat}\n{masquerade}\nCOMMIT\n")).unwrap();
    }
}

#[test]
fn a_pod_that_passes_on_is_told_with_its_own_rules() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut lab = Lab::up(LabOptions::default()).unwrap();
    let to = lab.pod("frontend", NodeName::Worker3).unwrap().addresses();
    balancer(&mut lab, to, 80);
    let mut watch = watch(&lab, &["9080"]);
    let pod = lab.pod("svclb", NodeName::Worker3).unwrap();
    for v6 in [false, true] {
        let (answer, told) = connect(&lab, &mut watch, v6, BALANCED);
        assert_eq!(answer.result, Outcome::Ok);
        // The server saw the balancer's address.
        let own = pod.addresses()[usize::from(v6)];
        assert_eq!(answer.saw.map(|saw| saw.ip()), Some(own));
        assert_eq!(
            hops(&told, &pod.netns),
            [
                hop("packet", "observed", "SYN in eth0"),
                hop("rules", "both", "dnat PREROUTING"),
                hop("route", "both", "unicast"),
                hop("rules", "both", "masquerade POSTROUTING"),
                hop("packet", "observed", "SYN out eth0"),
                hop("packet", "observed", "SYN ACK in eth0"),
                hop("packet", "observed", "SYN ACK out eth0"),
            ],
            "{}",
            told.report()
        );
        assert_eq!(told.verdict["inside"]["outcome"], "answered", "{}", told.report());
        let text = told.verdict["text"].as_str().unwrap();
        let onward = format!("passes it on to {}", SocketAddr::new(to[usize::from(v6)], 80));
        assert!(text.contains(&onward), "{text}");
    }
}

#[test]
fn a_refusal_behind_the_pod_and_a_drop_inside_it_are_told_apart() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut lab = Lab::up(LabOptions::default()).unwrap();
    let to = lab.pod("frontend", NodeName::Worker3).unwrap().addresses();
    balancer(&mut lab, to, 81);
    let mut watch = watch(&lab, &["9080", "--timeout", "500ms"]);
    let (answer, told) = connect(&lab, &mut watch, false, BALANCED);
    assert_eq!(answer.result, Outcome::Refused);
    assert_eq!(told.verdict["inside"]["refuser"], "behind", "{}", told.report());
    let text = told.verdict["text"].as_str().unwrap();
    assert!(text.contains(&format!("passes it on to {}:81, which refuses it", to[0])), "{text}");
    // The pod's rules change while it is watched.
    let pod = &lab.pod("svclb", NodeName::Worker3).unwrap().netns;
    pod.exec([lab.tools.tool("iptables").as_os_str(), "-P".as_ref(), "FORWARD".as_ref(), "DROP".as_ref()]).unwrap();
    let request = Connect {
        timeout: Duration::from_millis(300),
        ..Connect::new(Transport::Tcp, SocketAddr::new(Origin::Outside.target(false), BALANCED))
    };
    // Of the first connection after it.
    let answer = lab.connect(Origin::Outside, &request).unwrap();
    assert_eq!(answer.result, Outcome::Timeout);
    let told = watch.connection(Tuple::new(Proto::Tcp, answer.local, answer.to), WAIT).unwrap();
    assert_eq!(told.verdict["inside"]["outcome"], "dropped", "{}", told.report());
    let text = told.verdict["text"].as_str().unwrap();
    assert!(text.contains("inside pod") && text.contains("the policy of filter FORWARD"), "{text}");
}

/// A request that reached the pod's sockets, and whose answer the pod itself lets go nowhere: told of the first connection after
/// each change.
#[test]
fn why_a_pod_does_not_answer_is_asked_of_its_rules_and_routes() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    let pod = &lab.pod("frontend", NodeName::Worker3).unwrap().netns;
    let mut watch = watch(&lab, &["9088", "--timeout", "500ms"]);
    let mut told = |v6, outcome: &str, words: &str| {
        let to = SocketAddr::new(Origin::Outside.target(v6), HOST_PORT);
        let request = Connect { timeout: Duration::from_millis(200), ..Connect::new(Transport::Tcp, to) };
        let answer = lab.connect(Origin::Outside, &request).unwrap();
        assert_eq!(answer.result, Outcome::Timeout);
        let told = watch.connection(Tuple::new(Proto::Tcp, answer.local, answer.to), WAIT).unwrap();
        assert_eq!(told.verdict["inside"]["outcome"], outcome, "{}", told.report());
        let text = told.verdict["text"].as_str().unwrap();
        assert!(text.contains("inside pod") && text.contains(words), "{}", told.report());
    };
    lab.tools.iptables(pod, "-A OUTPUT -p tcp --sport 80 -j DROP").unwrap();
    told(false, "answer-lost", "which dropped the answer itself: in OUTPUT by filter OUTPUT #1");
    lab.tools.iptables(pod, "-D OUTPUT -p tcp --sport 80 -j DROP").unwrap();
    for (v6, family) in [(false, "-4"), (true, "-6")] {
        pod.exec(["ip", family, "route", "del", "default"]).unwrap();
        told(v6, "silent", "own sockets, whose answer cannot leave; predicted: no route to its destination");
    }
}

#[test]
fn a_pod_that_is_made_anew_is_followed_again() {
    if !may_run("porttrace watch") {
        return;
    }
    let mut lab = Lab::up(LabOptions::default()).unwrap();
    let mut watch = watch(&lab, &["9088"]);
    let old = lab.pod("frontend", NodeName::Worker3).unwrap().netns.name().to_owned();
    let noted =
        |watch: &Watch, text: &str| watch.others.iter().any(|line| line["type"] == "note" && line["text"] == text);
    for _ in 0..2 {
        lab.repair().unwrap();
        let new = lab.pod("frontend", NodeName::Worker3).unwrap().netns.name().to_owned();
        let follows = format!("pod {new} is followed inside");
        let told = watch.read_until(WAIT, |watch| noted(watch, &follows)).unwrap();
        assert!(told, "{follows}: {:?}", watch.others);
        let (answer, told) = connect(&lab, &mut watch, false, HOST_PORT);
        assert_eq!(answer.result, Outcome::Ok);
        let pod = &lab.pod("frontend", NodeName::Worker3).unwrap().netns;
        // Old kernels call it a drop when the server's socket closes and frees what it got.
        let seen = hops(&told, pod).into_iter().filter(|[kind, ..]| kind != "drop").count();
        assert_eq!(seen, 3, "{}", told.report());
        assert_eq!(told.verdict["inside"]["outcome"], "answered", "{}", told.report());
    }
    let gone = format!("pod {old} is gone, and no longer followed inside");
    assert!(noted(&watch, &gone), "{:?}", watch.others);
}

/// A node whose rules send 9088 to a pod, by a veth pair; the pod's end is `eth0`.
struct SmallNode {
    node: Netns,
    pod: Netns,
    tools: Tools,
    _bin: TempDir,
}

impl SmallNode {
    fn up() -> Self {
        let node = Netns::new("keeper").unwrap();
        let pod = Netns::new("kept").unwrap();
        node.exec(["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "eth0", "netns", pod.name()]).unwrap();
        for (netns, name, address) in [(&node, "veth0", "10.51.0.1/24"), (&pod, "eth0", "10.51.0.2/24")] {
            netns.exec(["ip", "addr", "add", address, "dev", name]).unwrap();
            netns.exec(["ip", "link", "set", name, "up"]).unwrap();
        }
        let rule = "iptables -t nat -A PREROUTING -p tcp --dport 9088 -j DNAT --to-destination 10.51.0.2:80";
        node.exec(rule.split(' ')).unwrap();
        let bin = tempfile::tempdir().unwrap();
        let tools = Tools::new(bin.path().to_owned(), IptablesFlavour::Nft).unwrap();
        Self { node, pod, tools, _bin: bin }
    }

    fn watch(&self, arguments: &[&str]) -> Watch {
        Watch::start(&self.node, &self.tools, arguments).unwrap()
    }
}

#[test]
fn no_namespace_is_kept_alive() {
    if !may_run("porttrace watch") {
        return;
    }
    let small = SmallNode::up();
    let mut watch = small.watch(&["9088", "--into-pods"]);
    let SmallNode { node, pod, .. } = small;
    let ready = watch.status("ready", WAIT).unwrap().unwrap();
    assert_eq!(ready["inside"], json!([pod.name()]));
    // As a runtime that relies on the kernel: the name goes, and with its last user the namespace, and its interfaces.
    drop(pod);
    assert!(until(WAIT, || !node.links().unwrap().contains(&"veth0".to_owned())), "{:?}", node.links().unwrap());
}

#[test]
fn sigkill_leaves_nothing_inside_either() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let alone = Watch::start(lab.node(NodeName::Worker3), &lab.tools, &["9088"]).unwrap();
    let without = held_by(alone.process.id()).unwrap();
    alone.process.signal(Signal::SIGKILL).unwrap();
    let mut watch = watch(&lab, &["9088"]);
    let held = held_by(watch.process.id()).unwrap();
    assert!(held.links.len() > without.links.len(), "the pod's are among them: {held:?}");
    watch.process.signal(Signal::SIGKILL).unwrap();
    assert_eq!(watch.process.wait(WAIT).unwrap(), None);
    assert!(until(WAIT, || held.alive() == Held::default()), "still there: {:?}", held.alive());
}

#[test]
fn an_interface_of_a_pod_that_cannot_be_attached_is_named() {
    if !may_run("porttrace watch") {
        return;
    }
    let small = SmallNode::up();
    let mut watch = small.watch(&["9088", "--into-pods"]);
    let SmallNode { node, pod, .. } = &small;
    // No descriptor is left for a link, or hardly one: some are only held for a moment.
    let process = watch.process.id().to_string();
    let open = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().count();
    node.exec(["prlimit", "--pid", &process, &format!("--nofile={open}:")]).unwrap();
    pod.exec(["ip", "link", "add", "late0", "type", "veth", "peer", "name", "late1"]).unwrap();
    let start = format!("inside {}: packets at late", pod.name());
    let says = |line: &Value| {
        let text = line["text"].as_str().unwrap_or_default();
        line["type"] == "note"
            && line["warning"] == true
            && text.starts_with(&start)
            && text.contains(" are not seen: ")
    };
    assert!(watch.read_until(WAIT, |watch| watch.others.iter().any(says)).unwrap(), "{:#?}", watch.others);
}

/// Filters outlive their process, in pods as on the node. The next start need neither follow pods nor use filters itself.
#[test]
fn the_next_start_removes_the_filters_that_a_killed_one_left_in_pods() {
    if !may_run("porttrace watch") {
        return;
    }
    let small = SmallNode::up();
    let pod = &small.pod;
    let foreign = "tc filter add dev lo ingress pref 7 bpf bytecode";
    pod.exec("tc qdisc add dev lo clsact".split(' ')).unwrap();
    pod.exec(foreign.split(' ').chain(["1,6 0 0 4294967295,", "flowid", "1:1"])).unwrap();
    let attached = || -> String {
        let sides = ["lo ingress", "lo egress", "eth0 ingress", "eth0 egress"];
        let listings = sides.into_iter().map(|side| format!("tc filter show dev {side}"));
        let listings = listings.chain(["tc qdisc show".to_owned()]);
        listings.map(|listing| pod.exec(listing.split(' ')).unwrap()).collect()
    };
    let before = attached();
    let arguments = ["9088", "--into-pods", "--tc", "clsact"];
    let mut killed = small.watch(&arguments);
    killed.process.signal(Signal::SIGKILL).unwrap();
    assert_eq!(killed.process.wait(WAIT).unwrap(), None);
    let left = attached();
    assert!(left.contains("porttrace:"), "{left}");

    // One that lives keeps what is its own.
    let mut living = small.watch(&arguments);
    let others = ["9088", "--duration", "1ms"];
    let mut next = small.watch(&others);
    assert_eq!(next.process.wait(WAIT).unwrap(), Some(0));
    assert!(attached().contains("porttrace:"), "{}", attached());
    living.process.signal(Signal::SIGINT).unwrap();
    assert_eq!(living.process.wait(WAIT).unwrap(), Some(0));
    assert_eq!(attached(), before);

    let mut killed = small.watch(&arguments);
    killed.process.signal(Signal::SIGKILL).unwrap();
    assert_eq!(killed.process.wait(WAIT).unwrap(), None);
    assert!(attached().contains("porttrace:"), "{}", attached());
    let mut next = small.watch(&others);
    assert_eq!(next.process.wait(WAIT).unwrap(), Some(0));
    assert_eq!(attached(), before);
}
