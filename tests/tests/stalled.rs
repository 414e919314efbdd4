//! User space stands still for two seconds while 10,000 new connections a second come: what is lost is counted, to the last event.

use nix::sys::signal::Signal;
use porttrace_tests::lab::topology::{HOST_PORT, NodeName, OUTSIDE_V4};
use porttrace_tests::lab::{Lab, LabOptions, Phase};
use porttrace_tests::load::{Batch, Mode, Pace, Servers, Until, make};
use porttrace_tests::netns::ChildGuard;
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::{BACKEND, porttrace};
use porttrace_user::core::model::flow::Proto;
use serde_json::Value;
use std::net::SocketAddrV4;
use std::path::Path;
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(20);
const FIRST_PORT: u16 = 10_000;

/// `PORTTRACE_STALLED` is the number of connections, two seconds' worth of them.
fn wanted() -> u16 {
    std::env::var("PORTTRACE_STALLED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_000)
}

/// Watches with default buffers; each datagram, from a port of its own and not answered, makes `each` events, which the buffers hold
/// all or not.
fn every_lost_event_is_counted(options: &[&str], each: u64, held: bool) {
    let count = wanted();
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, bare: true, ..LabOptions::default() }).unwrap();
    let servers = Servers::in_pods(&lab, Mode::Count).unwrap();
    let printed = tempfile::NamedTempFile::new().unwrap();
    let mut command = lab.node(NodeName::Worker3).command(porttrace().unwrap());
    command.args(["watch", "9088", "--proto", "udp", "--json", "--strict"]).args(options).env("PATH", lab.tools.path());
    if let Ok(backend) = std::env::var(BACKEND)
        && !backend.is_empty()
    {
        command.args(["--conntrack-backend", &backend]);
    }
    // To a file: a test that reads all of it meanwhile takes the processor from the one that it is about.
    let mut watch = ChildGuard::spawn_to(command, printed.reopen().unwrap()).unwrap();
    let deadline = Instant::now() + WAIT;
    while status(printed.path(), "ready").is_none() {
        assert!(Instant::now() < deadline && !watch.stderr.wait_closed(LOOK), "{:?}", watch.stderr.snapshot());
    }
    let to = SocketAddrV4::new(NodeName::Worker3.v4(), HOST_PORT);
    let batch = Batch { proto: Proto::Udp, from: OUTSIDE_V4, ports: FIRST_PORT..FIRST_PORT + count, to };

    watch.signal(Signal::SIGSTOP).unwrap();
    let pace = Pace::Rate(f64::from(count) / 2.0);
    let made = make(&lab.outside, &[batch], Until::Rounds(1), pace, &servers).unwrap();
    watch.signal(Signal::SIGCONT).unwrap();
    println!("{} datagrams while it stood still, {:.0} a second", made.connections, made.rate());

    watch.signal(Signal::SIGINT).unwrap();
    let status_wanted = if held { 0 } else { 4 };
    assert_eq!(watch.wait(WAIT).unwrap(), Some(status_wanted), "--strict: {:?}", watch.stderr.snapshot());
    let ended = status(printed.path(), "ended").expect("a last line");
    println!("{} {}", ended["events"], ended["lost"]);
    let count = |name: &str| ended["events"][name].as_u64().unwrap();
    let all = made.connections * each;
    assert_eq!(count("lost") == 0, held, "of {all} events: {ended}");
    assert_eq!(count("received") + count("unclaimed") + count("lost"), all, "{ended}");
    let told = lines(printed.path(), "lost").pop();
    assert_eq!(told.is_none(), held, "a line of its own for the loss: {told:?}");
    let by_reason = told.iter().filter_map(|line| line["total"].as_object()).flat_map(|reasons| reasons.values());
    assert_eq!(by_reason.filter_map(Value::as_u64).sum::<u64>(), count("lost"), "{told:?}");
}

/// The lines of a type.
fn lines(printed: &Path, kind: &str) -> Vec<Value> {
    let mark = format!("\"type\":\"{kind}\"");
    let text = std::fs::read_to_string(printed).unwrap();
    text.lines().filter(|line| line.contains(&mark)).filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn status(printed: &Path, state: &str) -> Option<Value> {
    lines(printed, "status").into_iter().find(|line| line["state"] == state)
}

#[test]
fn every_lost_event_is_counted_by_hooks() {
    if !may_run("porttrace watch") {
        return;
    }
    // In at eth0, out to the pod; and conntrack: three looks by NETFILTER programs, or at its functions DNAT and the entry's
    // confirmation.
    let at_functions = std::env::var(BACKEND).is_ok_and(|backend| matches!(backend.as_str(), "fentry" | "kprobe"));
    every_lost_event_is_counted(&[], if at_functions { 4 } else { 5 }, false);
}

#[test]
fn every_lost_event_is_counted_by_conntracks_events() {
    if !may_run("porttrace watch") {
        return;
    }
    if std::env::var(BACKEND).is_ok_and(|backend| !backend.is_empty()) {
        println!("skipped: {BACKEND} asks for another backend");
        return;
    }
    // In at eth0, out to the pod, and the entry.
    every_lost_event_is_counted(&["--conntrack-backend", "ctnetlink"], 3, true);
    every_lost_event_is_counted(&["--conntrack-backend", "ctnetlink", "--buffer", "2M"], 3, false);
    // The queue of conntrack's events runs over too.
    every_lost_event_is_counted(&["--conntrack-backend", "ctnetlink", "--buffer", "64K"], 3, false);
}
