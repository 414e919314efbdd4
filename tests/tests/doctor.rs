//! `porttrace doctor` where it can be checked: on a node of the lab, without rights, without tools, and what it leaves behind.

use porttrace_tests::lab::topology::NodeName;
use porttrace_tests::lab::{Lab, LabOptions};
use porttrace_tests::netns::Netns;
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::{Watch, porttrace};
use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Runs `doctor --json`; exit code and report.
fn doctor(mut command: Command) -> (i32, Value) {
    let output = command.args(["doctor", "--json"]).stdin(Stdio::null()).output().unwrap();
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code().unwrap(), report)
}

/// One check of a report.
fn check<'a>(report: &'a Value, id: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["id"] == id).unwrap_or_else(|| panic!("no check {id}: {report:#}"))
}

/// What hangs on a node: queueing disciplines, TC programs, netfilter's hooks by BPF.
fn attached(node: &Netns) -> String {
    let listings = ["tc qdisc show", "bpftool net show"];
    listings.map(|listing| node.exec(listing.split(' ')).unwrap()).concat()
}

#[test]
fn a_node_of_the_lab_and_what_watch_says_of_it() {
    if !may_run("porttrace doctor") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let node = lab.node(NodeName::Worker3);
    let before = attached(node);
    let mut command = node.command(porttrace().unwrap());
    command.env("PATH", lab.tools.path());
    let (code, report) = doctor(command);
    assert_eq!(attached(node), before, "doctor leaves nothing behind");
    assert_eq!((code, &report["can_watch"], &report["v"]), (0, &Value::Bool(true), &Value::from(1)), "{report:#}");
    for id in ["capabilities", "types", "programs", "interfaces", "table", "iptables", "kube-proxy", "hostports"] {
        assert_eq!(check(&report, id)["status"], "good", "{id}: {report:#}");
    }
    assert!(check(&report, "kube-proxy")["text"].as_str().unwrap().contains("iptables mode"), "{report:#}");
    // What doctor tried is what watch does.
    let watch = Watch::start(node, &lab.tools, &["9088"]).unwrap();
    let ready = watch.others.iter().find(|line| line["state"] == "ready").unwrap();
    let name = match report["backend"].as_str().unwrap() {
        "netfilter" => "by NETFILTER programs",
        "fentry" => "by fentry programs",
        "kprobe" => "by kprobes",
        other => panic!("no backend observes NAT here: {other}"),
    };
    assert!(ready["probes"].as_str().unwrap().contains(name), "{ready}");
    let mode = if report["facts"]["trials"]["tcx"].get("works").is_some() { "tcx" } else { "clsact" };
    assert!(ready["probes"].as_str().unwrap().contains(mode), "{ready}");
}

#[test]
fn without_rights_it_says_so_and_fails() {
    if !may_run("porttrace doctor as somebody else") {
        return;
    }
    // A copy that anybody may run: the build directory need not be open to all.
    let directory = std::env::temp_dir().join(format!("ptdoctor-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let binary = directory.join("porttrace");
    // By a process of its own: a child that another test is just starting would hold a descriptor of ours to it, open for writing,
    // and what is open for writing cannot be run (ETXTBSY).
    assert!(Command::new("cp").args([&porttrace().unwrap(), &binary]).status().unwrap().success());
    let nobody = 65534;
    let mut command = Command::new(&binary);
    command.uid(nobody).gid(nobody);
    let (code, report) = doctor(command);
    std::fs::remove_dir_all(&directory).unwrap();
    assert_eq!((code, &report["can_watch"]), (1, &Value::Bool(false)), "{report:#}");
    assert_eq!(check(&report, "capabilities")["status"], "bad");
    assert!(check(&report, "capabilities")["advice"].as_str().unwrap().contains("sudo"));
    assert_eq!(check(&report, "iptables")["status"], "unknown", "hidden rules are not taken for none");
}

#[test]
fn rules_without_the_tool_to_read_them() {
    if !may_run("porttrace doctor without tools") {
        return;
    }
    let node = Netns::new("doctor").unwrap();
    for rule in ["-A INPUT -p tcp --dport 1 -j DROP", "-A INPUT -p tcp --dport 2 -j DROP"] {
        node.exec(["iptables-nft"].into_iter().chain(rule.split(' '))).unwrap();
    }
    let found = |report: &Value| check(report, "iptables")["text"].as_str().unwrap().to_owned();
    let (code, report) = doctor(node.command(porttrace().unwrap()));
    assert_eq!(code, 0);
    assert_eq!(found(&report), "iptables-nft IPv4: 2 rules");
    // Its own view of the file system, without the directories where the tools lie.
    let script = "mount -t tmpfs none /usr/sbin && PATH=/usr/bin exec \"$0\" \"$@\"";
    let mut command = node.command("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(porttrace().unwrap());
    let (code, report) = doctor(command);
    assert_eq!(code, 0, "watch runs without predictions");
    assert_eq!(check(&report, "unread")["status"], "warning", "{report:#}");
    assert!(check(&report, "unread")["advice"].as_str().unwrap().contains("install"), "{report:#}");
    assert_eq!(report["degraded"], true);
}
