//! Many connections at once, which are counted and not told one by one: the sum is right to the last one, and what is not like
//! the others is not counted as if it were.

use nix::sys::signal::Signal;
use porttrace_tests::lab::topology::{FRONTEND, HOST_PORT, NodeName, OUTSIDE_V4};
use porttrace_tests::lab::{Lab, LabOptions, Phase};
use porttrace_tests::load::{Batch, Mode, Pace, Servers, Until, make};
use porttrace_tests::netns::{ChildGuard, Netns};
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::porttrace;
use porttrace_user::core::model::flow::Proto;
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::ops::Range;
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(20);

struct Scene {
    servers: Servers,
    lab: Lab,
}

impl Scene {
    fn node(&self) -> &Netns {
        self.lab.node(NodeName::Worker3)
    }

    /// One connection from each of these ports of the outside, as fast as can be.
    fn burst(&self, ports: Range<u16>) -> u64 {
        self.connect(ports, Pace::AsFastAsPossible)
    }

    fn connect(&self, ports: Range<u16>, pace: Pace) -> u64 {
        self.make(Proto::Tcp, ports, pace)
    }

    /// One datagram from each of these ports, to a server that never answers.
    fn datagrams(&self, ports: Range<u16>) -> u64 {
        self.make(Proto::Udp, ports, Pace::AsFastAsPossible)
    }

    fn make(&self, proto: Proto, ports: Range<u16>, pace: Pace) -> u64 {
        let to = SocketAddrV4::new(NodeName::Worker3.v4(), HOST_PORT);
        let batch = Batch { proto, from: OUTSIDE_V4, ports, to };
        let made = make(&self.lab.outside, &[batch], Until::Rounds(1), pace, &self.servers).unwrap();
        made.connections
    }

    fn iptables(&self, words: &str) {
        self.lab.tools.iptables(self.node(), words).unwrap();
    }

    fn watch(&self, options: &[&str]) -> ChildGuard {
        let mut command = self.node().command(porttrace().unwrap());
        command.args(["watch", "9088"]).args(options).env("PATH", self.lab.tools.path()).env("COLUMNS", "400");
        let watch = ChildGuard::spawn(command).unwrap();
        let ready = watch.stdout.wait_for(WAIT, |line| line.contains("ready after").then_some(()));
        assert!(ready.is_some(), "{:?} {:?}", watch.stdout.snapshot(), watch.stderr.snapshot());
        watch
    }
}

/// Waits until a line says this.
#[track_caller]
fn is_told(watch: &ChildGuard, what: &str) {
    let told = watch.stdout.wait_for(WAIT, |line| line.contains(what).then_some(()));
    assert!(told.is_some(), "{what} {:#?}", watch.stdout.snapshot());
}

/// The verdicts of the sum at the end, each with how many connections had it.
fn verdicts(mut watch: ChildGuard) -> Vec<(String, u64)> {
    watch.signal(Signal::SIGINT).unwrap();
    assert_eq!(watch.wait(WAIT).unwrap(), Some(0), "{:?}", watch.stderr.snapshot());
    let printed = watch.stdout.snapshot();
    let at = printed.iter().rposition(|line| line.contains(" connections in ")).expect("a sum");
    let counted = |line: &String| {
        let (count, verdict) = line.split_once(" × ")?;
        Some((verdict.to_owned(), count.trim().parse().unwrap()))
    };
    let verdicts: Vec<(String, u64)> = printed[at + 1..].iter().filter_map(counted).collect();
    let whole: u64 = printed[at].split(' ').next().unwrap().parse().unwrap();
    assert_eq!(verdicts.iter().map(|(_, count)| count).sum::<u64>(), whole, "{:#?}", &printed[at..]);
    verdicts
}

/// How many connections each server answered, by the sum at the end.
fn sum(watch: ChildGuard) -> BTreeMap<SocketAddrV4, u64> {
    let mut answered = BTreeMap::new();
    for (verdict, count) in verdicts(watch) {
        let by = verdict.split_once("✓ answered by ").unwrap_or_else(|| panic!("{verdict}")).1;
        let address: SocketAddrV4 = by.split(' ').next().unwrap().parse().unwrap();
        *answered.entry(address).or_default() += count;
    }
    answered
}

#[test]
fn what_is_only_counted_is_counted_as_what_it_is() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, bare: true, ..LabOptions::default() }).unwrap();
    let mut servers = Servers::in_pods(&lab, Mode::Count).unwrap();
    let [own, other] = [80, 8080].map(|port| SocketAddrV4::new(NodeName::Worker3.pod_v4(FRONTEND), port));
    servers.tcp(&lab.pod("frontend", NodeName::Worker3).unwrap().netns, other).unwrap();
    let scene = Scene { servers, lab };
    let elsewhere = |verb, ports| {
        format!(
            "-t nat -{verb} PREROUTING -p tcp -s {OUTSIDE_V4} {ports}--dport {HOST_PORT} -j DNAT --to-destination {other}"
        )
    };
    for options in [&[][..], &["--summary"], &["--conntrack-backend", "ctnetlink"]] {
        let watch = scene.watch(options);
        let is_answered_by = |server: SocketAddrV4| is_told(&watch, &format!("answered by {server}"));
        let mut expected = scene.burst(20_000..20_400);
        is_answered_by(own);

        // Another server, by a rule that came meanwhile: not like the others, whether or not the rule is known already.
        scene.iptables(&elsewhere("I", ""));
        let moved = scene.burst(21_000..21_300);
        is_answered_by(other);
        scene.iptables(&elsewhere("D", ""));
        expected += scene.burst(22_000..22_100);

        // And by a rule for some of the client's ports.
        scene.iptables(&elsewhere("I", "--sport 23100:23149 "));
        let by_port = scene.burst(23_000..23_200);
        scene.iptables(&elsewhere("D", "--sport 23100:23149 "));
        expected += by_port - 50;
        assert_eq!(sum(watch), BTreeMap::from([(own, expected), (other, moved + 50)]), "{options:?}");
    }
}

/// Connections that fail are counted too, until something that may be the cause is another.
#[test]
fn failures_that_are_only_counted_are_counted_as_what_they_are() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, bare: true, ..LabOptions::default() }).unwrap();
    let servers = Servers::in_pods(&lab, Mode::Count).unwrap();
    let scene = Scene { servers, lab };
    let drop = |verb| format!("-{verb} FORWARD -p udp -d {} -j DROP", NodeName::Worker3.pod_v4(FRONTEND));
    for options in [&["--timeout", "200ms"][..], &["--timeout", "200ms", "--conntrack-backend", "ctnetlink"]] {
        let watch = scene.watch(options);
        let mut silent = scene.datagrams(20_000..20_400);
        is_told(&watch, " more as #");
        // Told at once, or the first ones would be said to be dropped by nothing that is known.
        scene.iptables(&drop("I"));
        let dropped = scene.datagrams(21_000..21_300);
        is_told(&watch, "dropped by ");
        scene.iptables(&drop("D"));
        silent += scene.datagrams(22_000..22_100);
        let verdicts = verdicts(watch);
        let counts: Vec<u64> = verdicts.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, [silent, dropped], "{verdicts:#?}");
        assert!(verdicts[0].0.contains("? no answer"), "{verdicts:#?}");
        assert!(verdicts[1].0.contains("✗ dropped by filter FORWARD #1"), "{verdicts:#?}");
    }
}

/// Conntrack's events and packets come by different ways: what was read of one and not yet of the other is held back, also while many
/// others are told.
#[test]
fn by_conntracks_events_each_of_many_is_told_once() {
    if !may_run("porttrace watch") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, bare: true, ..LabOptions::default() }).unwrap();
    let servers = Servers::in_pods(&lab, Mode::Count).unwrap();
    let scene = Scene { servers, lab };
    let own = SocketAddrV4::new(NodeName::Worker3.pod_v4(FRONTEND), 80);
    let watch = scene.watch(&["--conntrack-backend", "ctnetlink"]);
    let made = scene.connect(20_000..60_000, Pace::Rate(8_000.0));
    assert_eq!(sum(watch), BTreeMap::from([(own, made)]));
}

/// Whoever gets no CPU for a while knows less than what happened: verdicts wait until that is read.
#[test]
fn a_stall_is_no_reason_for_a_verdict() {
    if !may_run("porttrace watch") {
        return;
    }
    const STALL: Duration = Duration::from_millis(400);
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, bare: true, ..LabOptions::default() }).unwrap();
    let servers = Servers::in_pods(&lab, Mode::Count).unwrap();
    let scene = Scene { servers, lab };
    let own = SocketAddrV4::new(NodeName::Worker3.pod_v4(FRONTEND), 80);
    for (first, options) in [(10_000, &[][..]), (30_000, &["--conntrack-backend", "ctnetlink"])] {
        let watch = scene.watch(options);
        let made = std::thread::scope(|scope| {
            let made = scope.spawn(|| scene.connect(first..first + 16_000, Pace::Rate(8_000.0)));
            for _ in 0..2 {
                std::thread::sleep(STALL);
                watch.signal(Signal::SIGSTOP).unwrap();
                std::thread::sleep(STALL);
                watch.signal(Signal::SIGCONT).unwrap();
            }
            made.join().unwrap()
        });
        assert_eq!(sum(watch), BTreeMap::from([(own, made)]), "{options:?}");
    }
}
