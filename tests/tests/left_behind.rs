//! `porttrace watch` is killed at random moments, while it starts and while it runs: nothing of it stays, or the next start
//! removes it; and nothing of others is touched.

use nix::sys::signal::Signal;
use porttrace_tests::bpf::{Held, held_by};
use porttrace_tests::netns::{ChildGuard, Netns};
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::porttrace;
use porttrace_user::collect::probe::remove_leftovers;
use std::io;
use std::net::UdpSocket;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

const KILLS: u32 = 50;
const DEADLINE: Duration = Duration::from_secs(20);

/// A node with interfaces that are somebody else's: `foreign0` has a clsact with a filter in it, `foreign1` one without,
/// `foreign2` another queueing discipline, `bare0` none.
fn node() -> Netns {
    let node = Netns::new("killed").unwrap();
    let batch = "ip link add foreign0 type veth peer name foreign1\nip link add foreign2 type veth peer name bare0\n\
                 ip link set foreign0 up\ntc qdisc add dev foreign0 clsact\ntc qdisc add dev foreign1 clsact\n\
                 tc qdisc add dev foreign2 root pfifo";
    for command in batch.lines() {
        node.exec(command.split(' ')).unwrap();
    }
    let mut filter: Vec<&str> = "tc filter add dev foreign0 ingress pref 7 bpf bytecode".split(' ').collect();
    filter.extend(["1,6 0 0 4294967295,", "flowid", "1:1"]);
    node.exec(filter).unwrap();
    node
}

/// What hangs on the node's interfaces.
fn attached(node: &Netns) -> String {
    let mut listings = vec!["tc qdisc show".to_owned(), "bpftool net show".to_owned()];
    for interface in ["lo", "foreign0", "foreign1", "foreign2", "bare0"] {
        listings.extend(["ingress", "egress"].map(|side| format!("tc filter show dev {interface} {side}")));
    }
    listings.iter().map(|listing| node.exec(listing.split(' ')).unwrap()).collect()
}

/// xorshift64: the next number.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn seed() -> u64 {
    let given = std::env::var("PORTTRACE_SEED").ok().and_then(|text| text.parse::<u64>().ok());
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = given.unwrap_or(clock) | 1;
    println!("PORTTRACE_SEED={seed}");
    seed
}

/// A `watch` that has attached everything.
fn ready(node: &Netns, options: &[&str]) -> ChildGuard {
    let mut command = node.command(porttrace().unwrap());
    command.args(["watch", "9088", "--json"]).args(options);
    let watch = ChildGuard::spawn(command).unwrap();
    let ready = watch.stdout.wait_for(DEADLINE, |line| line.contains("\"state\":\"ready\"").then_some(()));
    assert!(ready.is_some(), "{:?}", watch.stderr.snapshot());
    watch
}

/// How long `watch` takes to get ready here.
fn start_time(node: &Netns, options: &[&str]) -> Duration {
    let start = Instant::now();
    let mut watch = ready(node, options);
    let took = start.elapsed();
    watch.signal(Signal::SIGINT).unwrap();
    assert_eq!(watch.wait(DEADLINE).unwrap(), Some(0));
    took
}

/// Starts `watch` and kills it, again and again; what it held at the kills, and after how many of them something still hung on
/// the interfaces.
fn kill_often(node: &Netns, options: &[&str], before: &str) -> (Held, u32) {
    let mut random = seed();
    // Half of the kills meet it while it starts.
    let longest = 2 * start_time(node, options).as_millis() as u64;
    let socket = node.run_in(|| UdpSocket::bind("127.0.0.1:0")).unwrap().unwrap();
    let (mut held, mut left) = (Held::default(), 0);
    for _ in 0..KILLS {
        let mut command = node.command(porttrace().unwrap());
        command.args(["watch", "9088", "--json"]).args(options);
        let child = ChildGuard::spawn(command).unwrap();
        let end = Instant::now() + Duration::from_millis(next(&mut random) % longest);
        while Instant::now() < end {
            // Traffic of the watched port; nobody need answer.
            let _ = socket.send_to(b"x", "127.0.0.1:9088");
            child.stdout.wait_closed(Duration::from_millis(2));
        }
        let now = held_by(child.id()).unwrap_or_default();
        held.links.extend(now.links);
        held.programs.extend(now.programs);
        // A kill, not an end: no destructor of the child runs.
        drop(child);
        left += u32::from(attached(node) != before);
    }
    println!("{} programs and {} links were held at the kills", held.programs.len(), held.links.len());
    println!("after {left} of {KILLS} kills something still hung on the interfaces");
    (held, left)
}

/// The kernel takes things down after the process is gone.
fn nothing_is_left(node: &Netns, held: &Held, before: &str) {
    let deadline = Instant::now() + DEADLINE;
    while held.alive() != Held::default() || attached(node) != before {
        assert!(Instant::now() < deadline, "left: {:?}\n{}\nbefore:\n{before}", held.alive(), attached(node));
    }
}

#[test]
fn fifty_kills_at_random_moments_leave_nothing() {
    if !may_run("porttrace watch") {
        return;
    }
    let node = node();
    let before = attached(&node);
    let (held, _) = kill_often(&node, &[], &before);
    assert!(!held.links.is_empty(), "at least one of {KILLS} came far enough to attach a program");
    nothing_is_left(&node, &held, &before);
}

#[test]
fn after_fifty_kills_with_clsact_the_next_start_removes_everything() {
    if !may_run("porttrace watch") {
        return;
    }
    let node = node();
    let before = attached(&node);
    let (held, left) = kill_often(&node, &["--tc", "clsact"], &before);
    assert!(left > 0, "filters outlive their process: at least one of {KILLS} came far enough to attach one");
    // The next start attaches in the way of this kernel, and need not be asked to clean up.
    let mut command = node.command(porttrace().unwrap());
    command.args(["watch", "9088", "--json", "--duration", "1ms"]);
    let mut last = ChildGuard::spawn(command).unwrap();
    assert_eq!(last.wait(DEADLINE).unwrap(), Some(0), "{:?}", last.stderr.snapshot());
    nothing_is_left(&node, &held, &before);
}

/// A child between fork and exec has copies of all descriptors, also of those by which a dead porttrace is told from a living
/// one.
#[test]
fn what_was_left_is_removed_also_while_processes_are_started() {
    if !may_run("porttrace watch") {
        return;
    }
    let node = node();
    for index in 0..10 {
        node.exec(["ip", "link", "add", &format!("more{index}"), "type", "veth"]).unwrap();
    }
    let before = attached(&node);
    let over = AtomicBool::new(false);
    let forks = || {
        while !over.load(Ordering::Relaxed) {
            let linger = || {
                thread::sleep(Duration::from_millis(2));
                Err(io::ErrorKind::Interrupted.into())
            };
            let mut child = Command::new("nothing-is-executed");
            // SAFETY: between fork and exec only `nanosleep` is called, which is async-signal-safe.
            unsafe { child.pre_exec(linger) };
            assert!(child.spawn().is_err());
        }
    };
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(forks);
        }
        let rounds = std::panic::catch_unwind(|| {
            for round in 0..5 {
                drop(ready(&node, &["--tc", "clsact"]));
                assert_ne!(attached(&node), before, "filters outlive their process");
                let swept = node.run_in(remove_leftovers).unwrap().unwrap();
                assert_eq!((swept, attached(&node)), (25, before.clone()), "round {round}");
            }
        });
        over.store(true, Ordering::Relaxed);
        rounds.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// A kill between two steps would otherwise have the next start take a foreign queueing discipline away.
#[test]
fn the_clsact_of_others_is_at_no_moment_taken_for_porttraces() {
    if !may_run("porttrace watch") {
        return;
    }
    let node = node();
    let mut monitor = node.command("tc");
    monitor.arg("monitor");
    let monitor = ChildGuard::spawn(monitor).unwrap();
    // It listens once it tells of a change.
    let listens = Instant::now() + DEADLINE;
    while monitor.stdout.snapshot().is_empty() {
        assert!(Instant::now() < listens, "{:?}", monitor.stderr.snapshot());
        node.exec(["tc", "qdisc", "replace", "dev", "bare0", "root", "pfifo"]).unwrap();
    }
    start_time(&node, &["--tc", "clsact"]);
    // The last change is told of after all that went before.
    node.exec("tc qdisc replace dev bare0 root pfifo limit 77".split(' ')).unwrap();
    let end = monitor.stdout.wait_for(DEADLINE, |line| line.contains("limit 77p").then_some(()));
    let told = monitor.stdout.snapshot();
    assert!(end.is_some(), "{told:#?}");
    // `lo` had none, so its marks show that marks are told of.
    assert!(told.iter().any(|line| line.contains("dev lo ") && line.contains(":q")), "{told:#?}");
    assert!(told.iter().any(|line| line.contains("dev foreign1 ") && line.contains("porttrace:")), "{told:#?}");
    assert!(
        !told
            .iter()
            .any(|line| [0, 1].iter().any(|n| line.contains(&format!("dev foreign{n} "))) && line.contains(":q")),
        "{told:#?}"
    );
}
