//! How `porttrace watch` starts, ends and bears bad days.

use nix::sys::signal::Signal;
use porttrace_tests::bpf::{Held, held_by};
use porttrace_tests::lab::topology::{HOST_PORT, NodeName, OUTSIDE_V4};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::netns::Netns;
use porttrace_tests::peer::{Answer, Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::{Watch, porttrace};
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::net::SocketAddr;
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

/// Waits until the condition holds: the kernel frees what a dead process held a moment later, and tells nobody.
fn until(condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + WAIT;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

/// clsact filters on any interface of the namespace.
fn filters(netns: &Netns) -> String {
    let links = netns.exec(["ip", "-o", "link"]).unwrap();
    let names = links.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next());
    let show = |name, side| netns.exec(["tc", "filter", "show", "dev", name, side]).unwrap();
    names.map(|name| show(name, "ingress") + &show(name, "egress")).collect()
}

fn nothing_is_left(held: &Held, netns: &Netns) {
    assert!(until(|| held.alive() == Held::default()), "still there: {:?}", held.alive());
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
    let mut pipe = porttrace_tests::netns::ChildGuard::spawn(command).unwrap();
    assert!(pipe.stderr.wait_for(WAIT, |line| Some(line.to_owned())).is_some());
    // It notices when it has something to say.
    tcp(&lab, Origin::Outside);
    assert_eq!(pipe.wait(WAIT).unwrap(), Some(0), "{:?}", pipe.stderr.snapshot());
    assert_eq!(pipe.stdout.snapshot(), ["over"]);
    assert!(!pipe.stderr.snapshot().iter().any(|line| line.contains("panicked")), "{:?}", pipe.stderr.snapshot());
}

#[test]
fn a_stalled_reader_loses_nothing_silently() {
    if !may_run("porttrace watch") {
        return;
    }
    const SENT: u16 = 1000;
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    let mut watch = watch(&lab, &["9088"]);
    watch.process.signal(Signal::SIGSTOP).unwrap();
    let to = SocketAddr::new(NodeName::Worker3.v4().into(), HOST_PORT);
    lab.outside
        .run_in(|| {
            for number in 0..SENT {
                let bind = Some(SocketAddr::new(OUTSIDE_V4.into(), 20_000 + number));
                let request = Connect { bind, ..Connect::new(Transport::Udp, to) };
                assert_eq!(porttrace_tests::peer::connect(&request).unwrap().result, Outcome::Ok);
            }
        })
        .unwrap();
    watch.process.signal(Signal::SIGCONT).unwrap();
    watch.process.signal(Signal::SIGINT).unwrap();
    let ended = watch.status("ended", Duration::from_secs(60)).unwrap();
    let ended =
        ended.unwrap_or_else(|| panic!("no sum: {:?} {:?}", watch.process.wait(WAIT), watch.process.stderr.snapshot()));
    let told = watch.left_over().len();
    println!("{told} of {SENT} told, lost: {}", ended["lost"]);
    let lost = ended["lost"].as_array().is_some_and(|lost| !lost.is_empty());
    assert!(told == usize::from(SENT) || lost, "{told} of {SENT} were told and nothing was said to be lost: {ended}");
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
