//! How `porttrace watch` starts, ends and bears bad days.

use nix::sys::signal::Signal;
use porttrace_tests::bpf::{Held, held_by};
use porttrace_tests::lab::topology::{HOST_PORT, NodeName, OUTSIDE_V4};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::lines::until;
use porttrace_tests::netns::{ChildGuard, Netns};
use porttrace_tests::peer::{Answer, Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::{Watch, porttrace};
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(10);

fn watch(lab: &Lab, arguments: &[&str]) -> Watch {
    Watch::start(lab.node(NodeName::Worker3), &lab.tools, arguments).unwrap()
}

fn tcp(lab: &Lab, origin: Origin) -> (Answer, Tuple) {
    let answer = lab.connect_to_node(origin, Transport::Tcp, false, HOST_PORT).unwrap();
    let tuple = Tuple::new(Proto::Tcp, answer.local, answer.to);
    (answer, tuple)
}

/// clsact filters on any interface of the namespace.
fn filters(netns: &Netns) -> String {
    let show = |name: &str, side| netns.exec(["tc", "filter", "show", "dev", name, side]).unwrap();
    netns.links().unwrap().iter().map(|name| show(name, "ingress") + &show(name, "egress")).collect()
}

fn nothing_is_left(held: &Held, netns: &Netns) {
    assert!(until(WAIT, || held.alive() == Held::default()), "still there: {:?}", held.alive());
    assert_eq!(filters(netns), "");
}

#[test]
fn sigkill_leaves_nothing_attached() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let mut watch = watch(&lab, &["9088"]);
    let held = held_by(watch.process.id()).unwrap();
    assert!(!held.programs.is_empty(), "{held:?}");
    assert_eq!(held.alive(), held);
    watch.process.signal(Signal::SIGKILL).unwrap();
    assert_eq!(watch.process.wait(WAIT).unwrap(), None);
    nothing_is_left(&held, lab.node(NodeName::Worker3));
}

#[test]
fn signals_end_it_with_a_sum() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut watch = watch(&lab, &["9088"]);
        let held = held_by(watch.process.id()).unwrap();
        let (_, tuple) = tcp(&lab, Origin::Outside);
        watch.connection(tuple, WAIT).unwrap();
        watch.process.signal(signal).unwrap();
        let ended = watch.status("ended", WAIT).unwrap().expect("a last line");
        assert_eq!(ended["connections"], 1, "{ended}");
        assert_eq!(ended["lost"], serde_json::json!([]), "{ended}");
        assert_eq!(watch.process.wait(WAIT).unwrap(), Some(0), "{:?}", watch.process.stderr.snapshot());
        nothing_is_left(&held, lab.node(NodeName::Worker3));
    }
}

#[test]
fn count_and_duration_end_it() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let mut counted = watch(&lab, &["9088", "--count", "2"]);
    for origin in [Origin::Outside, Origin::OtherNode] {
        let (_, tuple) = tcp(&lab, origin);
        counted.connection(tuple, WAIT).unwrap();
    }
    assert_eq!(counted.process.wait(WAIT).unwrap(), Some(0));
    let mut timed = watch(&lab, &["9088", "--duration", "200ms"]);
    assert_eq!(timed.process.wait(WAIT).unwrap(), Some(0));
    assert_eq!(timed.status("ended", WAIT).unwrap().unwrap()["connections"], 0);
}

#[test]
fn two_watches_tell_the_same() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    let mut watches = [watch(&lab, &["9088"]), watch(&lab, &["9088"])];
    let (_, tuple) = tcp(&lab, Origin::Pod);
    let told = watches.each_mut().map(|watch| watch.connection(tuple, WAIT).unwrap());
    assert_eq!(told[0].rules(), told[1].rules());
    for field in ["outcome", "dnat", "snat", "conntrack", "agrees", "predicted"] {
        assert_eq!(told[0].verdict[field], told[1].verdict[field], "{field}");
    }
    let [first, mut second] = watches;
    drop(first);
    let (_, tuple) = tcp(&lab, Origin::Pod);
    second.connection(tuple, WAIT).expect("the other one goes on");
}

#[test]
fn other_namespaces_do_not_leak_in() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let mut watch = watch(&lab, &["9088"]);
    // The same port on another node, on the segment, and from a pod of this node to another node: the last one passes here.
    let foreign = SocketAddr::new(NodeName::Worker.v4().into(), HOST_PORT);
    let passing = lab.connect(Origin::Pod, &Connect::new(Transport::Tcp, foreign)).unwrap();
    lab.connect(Origin::Outside, &Connect::new(Transport::Tcp, foreign)).unwrap();
    lab.connect(Origin::OtherNode, &Connect::new(Transport::Tcp, foreign)).unwrap();
    watch.connection(Tuple::new(Proto::Tcp, passing.local, foreign), WAIT).expect("it is forwarded by this node");
    let (_, tuple) = tcp(&lab, Origin::Outside);
    watch.connection(tuple, WAIT).unwrap();
    assert_eq!(watch.left_over(), []);
}

#[test]
fn a_closed_output_ends_it_quietly() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let node = lab.node(NodeName::Worker3);
    let mut command = node.command("sh");
    command.args(["-c", "\"$0\" watch 9088 | head -n 1 >&2; echo over"]).arg(porttrace().unwrap());
    let mut pipe = ChildGuard::spawn(command).unwrap();
    assert!(pipe.stderr.wait_for(WAIT, |line| Some(line.to_owned())).is_some());
    // It notices when it has something to say.
    tcp(&lab, Origin::Outside);
    assert_eq!(pipe.wait(WAIT).unwrap(), Some(0), "{:?}", pipe.stderr.snapshot());
    assert_eq!(pipe.stdout.snapshot(), ["over"]);
    assert!(!pipe.stderr.snapshot().iter().any(|line| line.contains("panicked")), "{:?}", pipe.stderr.snapshot());
}

/// A datagram that is answered: it enters eth0, conntrack looks three times, it leaves to the pod; the answer enters and leaves.
const EVENTS_PER_DATAGRAM: u64 = 7;

#[test]
fn a_stalled_reader_counts_every_event_that_it_lost() {
    if !may_run("porttrace watch") {
        return;
    }
    const SENT: u16 = 1000;
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, quiet: true, ..LabOptions::default() }).unwrap();
    let mut watch = watch(&lab, &["9088", "--proto", "udp", "--strict", "--buffer", "64K"]);
    let mut command = lab.node(NodeName::Worker3).command(porttrace().unwrap());
    command.args(["watch", "9088", "--proto", "udp", "--strict", "--buffer", "64K"]).env("PATH", lab.tools.path());
    let mut text = ChildGuard::spawn(command).unwrap();
    assert!(text.stdout.wait_for(WAIT, |line| line.contains("ready after").then_some(())).is_some());

    let stopped = Instant::now();
    signal([&watch.process, &text], Signal::SIGSTOP);
    send_datagrams(&lab, 20_000, SENT);
    // The stall that is asked for, however fast the datagrams went.
    std::thread::sleep(Duration::from_secs(2).saturating_sub(stopped.elapsed()));
    signal([&watch.process, &text], Signal::SIGCONT);

    // Said while it runs, before anybody asks it to end, and it goes on telling.
    assert!(watch.read_until(WAIT, |watch| watch.others.iter().any(|line| line["type"] == "lost")).unwrap());
    assert!(text.stdout.wait_for(WAIT, |line| line.contains("events lost so far").then_some(())).is_some());
    let tuple = send_datagrams(&lab, 30_000, 1);
    watch.connection(tuple, WAIT).expect("what came after the stall");

    signal([&watch.process, &text], Signal::SIGINT);
    let ended = watch.status("ended", WAIT).unwrap().expect("a last line");
    let lost = watch.others.iter().rfind(|line| line["type"] == "lost").unwrap();
    let count = |value: &serde_json::Value| value.as_u64().unwrap();
    let (received, missing) = (count(&ended["events"]["received"]), count(&ended["events"]["lost"]));
    assert!(missing > 0, "64 KiB cannot hold {SENT} connections: {ended}");
    assert_eq!(count(&lost["total"]["ring buffer full"]), missing, "{lost} {ended}");
    assert_eq!(received + missing, u64::from(SENT + 1) * EVENTS_PER_DATAGRAM, "{ended}");
    assert_eq!(ended["lost"], serde_json::json!([format!("{missing} events lost: ring buffer full")]));
    assert_eq!(watch.process.wait(WAIT).unwrap(), Some(4), "--strict");

    assert_eq!(text.wait(WAIT).unwrap(), Some(4), "--strict");
    let sum = text.stdout.snapshot().pop().unwrap_or_default();
    let missing: u64 = sum.trim_start_matches("! ").split(' ').next().unwrap().parse().unwrap_or(0);
    assert!(missing > 0 && sum.ends_with("events lost: ring buffer full"), "{sum}");
}

fn signal(processes: [&ChildGuard; 2], signal: Signal) {
    processes.into_iter().for_each(|process| process.signal(signal).unwrap());
}

/// Sends datagrams to the hostPort from outside, each from a port of its own and each answered; the last one's tuple.
fn send_datagrams(lab: &Lab, first_port: u16, count: u16) -> Tuple {
    let to = SocketAddr::new(NodeName::Worker3.v4().into(), HOST_PORT);
    let own = |number| SocketAddr::new(OUTSIDE_V4.into(), first_port + number);
    lab.outside
        .run_in(|| {
            for number in 0..count {
                let request = Connect { bind: Some(own(number)), ..Connect::new(Transport::Udp, to) };
                assert_eq!(porttrace_tests::peer::connect(&request).unwrap().result, Outcome::Ok);
            }
        })
        .unwrap();
    Tuple::new(Proto::Udp, own(count - 1), to)
}

#[test]
fn a_late_answer_amends_the_verdict() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    let arguments = ["watch", "9088", "--timeout", "200ms"];
    let mut watch = watch(&lab, &arguments[1..]);
    let mut command = lab.node(NodeName::Worker3).command(porttrace().unwrap());
    command.args(arguments).env("PATH", lab.tools.path());
    let mut text = ChildGuard::spawn(command).unwrap();
    assert!(text.stdout.wait_for(WAIT, |line| line.contains("ready after").then_some(())).is_some());

    let pod = &lab.pod("frontend", NodeName::Worker3).unwrap().netns;
    let deaf = |verb: &str| {
        pod.exec(["iptables", verb, "INPUT", "-p", "tcp", "--syn", "--dport", "80", "-j", "DROP"]).unwrap();
    };
    deaf("-I");
    let own = SocketAddr::new(OUTSIDE_V4.into(), 20_001);
    let to = SocketAddr::new(NodeName::Worker3.v4().into(), HOST_PORT);
    let request = Connect { bind: Some(own), timeout: WAIT, ..Connect::new(Transport::Tcp, to) };
    let told = std::thread::scope(|scope| {
        let client = scope.spawn(|| lab.connect(Origin::Outside, &request).unwrap());
        let told = watch.connection(Tuple::new(Proto::Tcp, own, to), WAIT).unwrap();
        // The client sends its SYN again, a second after the first.
        deaf("-D");
        assert_eq!(client.join().unwrap().result, Outcome::Ok);
        told
    });
    assert_eq!((&told.verdict["outcome"], &told.verdict["amends"]), (&"silent".into(), &false.into()));
    let is_amendment = |line: &&serde_json::Value| line["type"] == "verdict";
    assert!(watch.read_until(WAIT, |watch| watch.others.iter().any(|line| is_amendment(&line))).unwrap());
    let amended = watch.others.iter().find(is_amendment).cloned().unwrap();
    assert_eq!(amended["id"], told.verdict["id"], "{amended}");
    assert_eq!((&amended["outcome"], &amended["ok"]), (&"answered".into(), &true.into()), "{amended}");
    assert_eq!((&amended["agrees"], &amended["dnat"]), (&true.into(), &told.verdict["dnat"]), "{amended}");
    assert!(amended["after_ns"].as_u64().is_some_and(|after| after > 900_000_000), "{amended}");
    assert!(watch.read_until(WAIT, |watch| watch.others.iter().any(|line| line["type"] == "flow-end")).unwrap());

    let lines = text.stdout.wait_for(WAIT, |line| line.contains("late, after it was called unanswered").then_some(()));
    assert!(lines.is_some(), "{:#?}", text.stdout.snapshot());
    signal([&watch.process, &text], Signal::SIGINT);
    let ended = watch.status("ended", WAIT).unwrap().unwrap();
    let verdicts = ended["verdicts"].as_array().unwrap();
    assert_eq!(verdicts.len(), 1, "it is counted as what it became: {ended}");
    assert_eq!((&verdicts[0]["text"], &verdicts[0]["connections"]), (&amended["text"], &1.into()));
    assert_eq!(text.wait(WAIT).unwrap(), Some(0));
}

#[test]
fn bad_ports_are_refused_in_a_sentence() {
    for port in ["0", "65536", "http", "-1", ""] {
        let output =
            Command::new(porttrace().unwrap()).args(["watch", "--", port]).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{port:?}: {said}");
        assert!(said.contains("1 to 65535"), "{port:?}: {said}");
        assert!(output.stdout.is_empty());
    }
}

/// `porttrace watch` with a save tool of its own for IPv4's rules: a shell script, in which `save` is the real one.
fn watch_with_save_tool(lab: &Lab, own: &Path, script: &str) -> Command {
    let tool = own.join("iptables-nft-save");
    let real = lab.tools.tool("iptables-save");
    std::fs::write(&tool, format!("#!/bin/sh\nsave() {{ {} \"$@\"; }}\n{script}", real.display())).unwrap();
    std::fs::set_permissions(&tool, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = lab.node(NodeName::Worker3).command(porttrace().unwrap());
    let path = format!("{}:{}", own.display(), lab.tools.path());
    command.args(["watch", "9088", "--json"]).env("PATH", path);
    command
}

/// Where the rules take long to be read, connections until then are captured and told, with all that was seen and predicted.
#[test]
fn a_connection_while_the_rules_are_read_is_told_as_any_other() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    // It waits for a word before it reads the rules.
    let own = tempfile::tempdir().unwrap();
    let gate = own.path().join("gate");
    assert!(Command::new("mkfifo").arg(&gate).status().unwrap().success());
    let command = watch_with_save_tool(&lab, own.path(), &format!("read word < {}\nsave \"$@\"\n", gate.display()));
    let process = ChildGuard::spawn(command).unwrap();
    let is_state =
        |state: &'static str| move |line: &str| line.contains(&format!("\"state\":\"{state}\"")).then_some(());
    assert!(process.stdout.wait_for(WAIT, is_state("capturing")).is_some(), "{:?}", process.stderr.snapshot());
    let (_, original) = tcp(&lab, Origin::Outside);
    assert_eq!(process.stdout.snapshot().len(), 1, "it is not ready before it knows the rules");
    std::fs::write(&gate, "go\n").unwrap();
    let (mut watch, ready) = Watch::of(process).unwrap();
    assert!(ready["rules"].as_str().unwrap().contains("iptables-nft rules"), "{ready}");
    let told = watch.connection(original, WAIT).unwrap();
    assert_eq!(told.start["joined_late"], false);
    assert_eq!(
        (&told.verdict["outcome"], &told.verdict["agrees"]),
        (&"answered".into(), &true.into()),
        "{}",
        told.report()
    );
    assert!(told.hops.iter().any(|hop| hop["kind"] == "rules" && hop["certainty"] == "both"), "{}", told.report());
}

/// However long that takes: a node whose rules change all the time has better things to do.
#[test]
fn rules_that_change_all_the_time_are_read_for_a_fifth_of_it() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let own = tempfile::tempdir().unwrap();
    let log = own.path().join("log");
    let now = "$(date +%s%N)";
    let script = format!("from={now}\nsave \"$@\"\nsleep 0.3\necho $from {now} >> {}\n", log.display());
    let (watch, _) = Watch::of(ChildGuard::spawn(watch_with_save_tool(&lab, own.path(), &script)).unwrap()).unwrap();

    let iptables = lab.tools.tool("iptables").display().to_string();
    let change = |verb| {
        let rule = [&iptables, "-w", verb, "FORWARD", "-d", "192.0.2.1", "-j", "ACCEPT"];
        lab.node(NodeName::Worker3).exec(rule).unwrap();
    };
    let mut readings = Vec::new();
    let often_enough = until(3 * WAIT, || {
        change("-I");
        change("-D");
        let number = |word: &str| word.parse::<u64>().unwrap();
        let text = std::fs::read_to_string(&log).unwrap();
        readings = text.lines().map(|line| line.split_once(' ').map(|(from, to)| (number(from), number(to)))).collect();
        readings.len() >= 4
    });
    assert!(often_enough, "{readings:?}");
    for pair in readings.windows(2) {
        let [Some((from, to)), Some((next, _))] = pair else { panic!("{readings:?}") };
        assert!(next - to >= 4 * (to - from), "{readings:?}");
    }
    drop(watch);
}

#[test]
fn an_interface_that_cannot_be_attached_is_named() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let node = lab.node(NodeName::Worker3);
    let mut watch = watch(&lab, &["9088"]);
    // No descriptor is left for a link, whichever of those it holds now it gives back.
    let process = watch.process.id().to_string();
    node.exec(["prlimit", "--pid", &process, "--nofile=3:"]).unwrap();
    node.exec(["ip", "link", "add", "late0", "type", "veth", "peer", "name", "late1"]).unwrap();
    let says = |line: &serde_json::Value| {
        let text = line["text"].as_str().unwrap_or_default();
        line["type"] == "note"
            && line["warning"] == true
            && text.starts_with("packets at late")
            && text.contains(" are not seen: ")
    };
    assert!(watch.read_until(WAIT, |watch| watch.others.iter().any(says)).unwrap(), "{:#?}", watch.others);
    // Nor is one left to ask whether the rules changed, which is no reason to forget them.
    let (_, tuple) = tcp(&lab, Origin::Outside);
    let told = watch.connection(tuple, WAIT).unwrap();
    assert!(told.hops.iter().any(|hop| hop["kind"] == "rules"), "{}\n{:#?}", told.report(), watch.others);
    let changed = |line: &serde_json::Value| line["text"].as_str().is_some_and(|text| text.contains("rules changed"));
    assert!(!watch.others.iter().any(changed), "{:#?}", watch.others);
}
