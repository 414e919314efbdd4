//! Where the kernel does not allow everything, `porttrace watch` chooses what it does by itself, says in a line what that costs,
//! and tells the truth by what is left.

use nix::errno::Errno;
use porttrace_tests::lab::topology::{HOST_PORT, NodeName, service};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::netns::ChildGuard;
use porttrace_tests::oracle::conntrack::ConntrackEvents;
use porttrace_tests::peer::{Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use porttrace_tests::refuse::{self, KPROBE, NETFILTER, SCHED_CLS, TRACING};
use porttrace_tests::watch::{Connection, Watch, porttrace};
use porttrace_user::core::model::flow::{Proto, Tuple};
use serde_json::Value;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(20);
const PORTS: [&str; 3] = ["9088", "30080", "30053"];

fn lab() -> Lab {
    Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap()
}

fn command(lab: &Lab) -> Command {
    let mut command = lab.node(NodeName::Worker3).command(porttrace().unwrap());
    command.args(["watch", "--json"]).args(PORTS).env("PATH", lab.tools.path());
    command
}

/// The same command with file systems of its own, in which an empty one covers this place.
fn without(lab: &Lab, place: &str) -> Command {
    let mut command = lab.node(NodeName::Worker3).command("unshare");
    let cover = format!("mount -t tmpfs none {place} && exec \"$0\" \"$@\"");
    command.args(["--mount", "sh", "-c", &cover]).arg(porttrace().unwrap());
    command.args(["watch", "--json"]).args(PORTS).env("PATH", lab.tools.path());
    command
}

/// Where the kernel says what its structures look like.
const TYPES: &str = "/sys/kernel/btf";

fn warnings(ready: &Value) -> Vec<&str> {
    ready["warnings"].as_array().unwrap().iter().filter_map(Value::as_str).collect()
}

/// Connects by hostPort and NodePorts, over TCP and UDP, from several clients; what was told of each, with its original tuple.
fn connections(lab: &Lab, watch: &mut Watch) -> Vec<(Tuple, Connection)> {
    let targets = [
        (Transport::Tcp, HOST_PORT),
        (Transport::Udp, HOST_PORT),
        (Transport::Tcp, service::FRONTEND_NODE_PORT),
        (Transport::Udp, service::DNS_NODE_PORT),
    ];
    let mut all = Vec::new();
    for origin in [Origin::Outside, Origin::Node, Origin::Pod] {
        for (transport, port) in targets {
            let to = SocketAddr::new(origin.target(false), port);
            let answer = lab.connect(origin, &Connect { timeout: WAIT, ..Connect::new(transport, to) }).unwrap();
            assert_eq!(answer.result, Outcome::Ok, "{answer:?}");
            let proto = if transport == Transport::Tcp { Proto::Tcp } else { Proto::Udp };
            let original = Tuple::new(proto, answer.local, to);
            all.push((original, watch.connection(original, WAIT).unwrap()));
        }
    }
    all
}

/// By conntrack's events, chosen by itself, said in one line; every connection is told with conntrack's own tuples.
fn falls_back_to_conntracks_events(lab: &Lab, process: ChildGuard, because: &str) -> Value {
    let oracle = ConntrackEvents::start(lab.node(NodeName::Worker3)).unwrap();
    let (mut watch, ready) = Watch::of(process).unwrap();
    assert!(ready["probes"].as_str().unwrap().contains("conntrack by conntrack's events (ctnetlink)"), "{ready}");
    let lines = warnings(&ready);
    let said: Vec<_> = lines.iter().filter(|line| line.contains("NAT is told by")).collect();
    assert!(matches!(said[..], [line] if line.contains(because) && line.contains("late")), "{because}: {lines:#?}");
    for (original, told) in connections(lab, &mut watch) {
        let entry = oracle.new_entry(original, WAIT).unwrap_or_else(|| panic!("no entry for {original}"));
        assert_eq!(told.conntrack(), Some((entry.original, entry.reply)), "{}", told.report());
        assert_eq!(told.verdict["outcome"], "answered", "{}", told.report());
        assert_eq!(
            (&told.verdict["dnat"]["observed"], &told.verdict["agrees"]),
            (&true.into(), &true.into()),
            "{}",
            told.report()
        );
    }
    ready
}

#[test]
fn without_the_kernels_types_conntracks_events_tell_nat() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = lab();
    let ready =
        falls_back_to_conntracks_events(&lab, ChildGuard::spawn(without(&lab, TYPES)).unwrap(), "/sys/kernel/btf");
    let lines = warnings(&ready);
    for loss in ["drops are not reported with their reason", "resets of this node's TCP are seen only as packets"] {
        assert!(lines.iter().any(|line| line.contains(loss) && line.contains("/sys/kernel/btf")), "{loss}: {lines:#?}");
    }
}

#[test]
fn where_hooks_are_refused_conntracks_events_tell_nat() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = lab();
    let process = refuse::spawn(command(&lab), &[NETFILTER, KPROBE, TRACING], Errno::EPERM).unwrap();
    let ready = falls_back_to_conntracks_events(&lab, process, "not permitted");
    let lines = warnings(&ready);
    for loss in ["drops are not reported with their reason", "resets of this node's TCP are seen only as packets"] {
        assert!(lines.iter().any(|line| line.contains(loss)), "{loss}: {lines:#?}");
    }
}

#[test]
fn without_types_and_events_nat_is_predicted_and_says_so() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = lab();
    lab.node(NodeName::Worker3).exec(["sysctl", "-qw", "net.netfilter.nf_conntrack_events=0"]).unwrap();
    let (mut watch, ready) = Watch::of(ChildGuard::spawn(without(&lab, TYPES)).unwrap()).unwrap();
    assert!(ready["probes"].as_str().unwrap().contains("conntrack not observed"), "{ready}");
    let lines = warnings(&ready);
    let said = |words: &str| lines.iter().filter(|line| line.contains(words)).count();
    assert_eq!(said("NAT rewrites are predicted, not observed"), 1, "{lines:#?}");
    assert_eq!(said("nf_conntrack_events is 0"), 1, "what to change is named: {lines:#?}");
    let answer = lab.connect_to_node(Origin::Outside, Transport::Tcp, false, HOST_PORT).unwrap();
    assert_eq!(answer.result, Outcome::Ok);
    let told = watch.connection(Tuple::new(Proto::Tcp, answer.local, answer.to), WAIT).unwrap();
    assert_eq!(
        (&told.verdict["dnat"]["observed"], &told.verdict["conntrack"]),
        (&false.into(), &Value::Null),
        "{}",
        told.report()
    );
    assert!(
        told.hops
            .iter()
            .all(|hop| hop["kind"] != "rewrite" && (hop["kind"] != "rules" || hop["certainty"] == "predicted")),
        "{}",
        told.report()
    );
    let pod = lab.pod("frontend", NodeName::Worker3).unwrap();
    let stands_for = format!("answered by {} (by the rules that is {}:80", answer.to, pod.addresses()[0]);
    assert!(told.verdict["text"].as_str().unwrap().starts_with(&stands_for), "{}", told.report());
    // What left for the pod under another tuple is not called lost.
    lab.tools.iptables(&pod.netns, "-A INPUT -p tcp --dport 80 -j DROP").unwrap();
    let timeout = Duration::from_millis(200);
    let request = Connect { timeout, ..Connect::new(Transport::Tcp, answer.to) };
    let answer = lab.connect(Origin::Outside, &request).unwrap();
    assert_eq!(answer.result, Outcome::Timeout);
    let told = watch.connection(Tuple::new(Proto::Tcp, answer.local, answer.to), WAIT).unwrap();
    assert_eq!(told.verdict["outcome"], "silent", "{}", told.report());
    let text = told.verdict["text"].as_str().unwrap();
    let went_on = format!(
        "by the rules it went on to {}:80 by {}, which is not seen here",
        pod.addresses()[0],
        pod.host_interface
    );
    assert!(text.starts_with("no answer: ") && text.ends_with(&went_on), "{text}");
}

#[test]
fn without_iptables_tools_nat_is_observed_and_no_rule_is_named() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = lab();
    // The lab's own links lead there too.
    let (mut watch, ready) = Watch::of(ChildGuard::spawn(without(&lab, "/usr/sbin")).unwrap()).unwrap();
    assert!(warnings(&ready).iter().any(|line| line.contains("iptables-save")), "{ready:#}");
    let answer = lab.connect_to_node(Origin::Outside, Transport::Tcp, false, HOST_PORT).unwrap();
    let told = watch.connection(Tuple::new(Proto::Tcp, answer.local, answer.to), WAIT).unwrap();
    assert_eq!(
        (&told.verdict["outcome"], &told.verdict["agrees"]),
        (&"answered".into(), &Value::Null),
        "{}",
        told.report()
    );
    assert_eq!(told.verdict["dnat"]["observed"], true, "{}", told.report());
    assert_eq!(told.rules(), [], "{}", told.report());
}

/// Native rules that cannot be read may have done what was seen: that is no contradiction.
#[test]
fn without_nft_what_native_rules_did_is_observed_and_left_open() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = lab();
    lab.go_native(Phase::Fixed).unwrap();
    let (mut watch, ready) = Watch::of(ChildGuard::spawn(without(&lab, "/usr/sbin")).unwrap()).unwrap();
    let said = |text: &str| warnings(&ready).iter().any(|line| line.contains(text));
    assert!(said("native nftables rules say is unknown: nft is not installed"), "{ready:#}");
    let answer = lab.connect_to_node(Origin::Outside, Transport::Tcp, false, HOST_PORT).unwrap();
    let told = watch.connection(Tuple::new(Proto::Tcp, answer.local, answer.to), WAIT).unwrap();
    let verdict = &told.verdict;
    assert_eq!((&verdict["outcome"], &verdict["agrees"]), (&"answered".into(), &Value::Null), "{}", told.report());
    assert_eq!(verdict["dnat"]["observed"], true, "{}", told.report());
    assert_eq!(told.rules(), [], "{}", told.report());
    let open = "nftables table ip kube-proxy may send it elsewhere: its rules could not be read";
    assert!(told.report().contains(open) || told.report().contains("ip cni_hostport may send"), "{}", told.report());
}

#[test]
fn where_nothing_is_allowed_it_says_so_and_ends() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = lab();
    let types = &[NETFILTER, KPROBE, TRACING, SCHED_CLS];
    let mut refused = refuse::spawn(command(&lab), types, Errno::EPERM).unwrap();
    assert_eq!(refused.wait(WAIT).unwrap(), Some(1));
    let said = refused.stderr.snapshot();
    println!("{said:#?}");
    assert!(said.iter().any(|line| line.contains("not permitted")), "{said:#?}");
    assert!(!said.iter().any(|line| line.contains("panicked")), "{said:#?}");
    assert!(refused.stdout.is_empty(), "{:?}", refused.stdout.snapshot());
}
