//! `porttrace watch` is killed at random moments, while it starts and while it runs: nothing of it stays, and nothing of others
//! is touched.

use porttrace_tests::bpf::{Held, held_by};
use porttrace_tests::netns::{ChildGuard, Netns};
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::porttrace;
use std::net::UdpSocket;
use std::time::{Duration, Instant, SystemTime};

const KILLS: u32 = 50;
/// A start of an unoptimised build takes about half of this.
const LONGEST_MS: u64 = 900;
const DEADLINE: Duration = Duration::from_secs(20);

/// What hangs on the node's interfaces.
fn attached(node: &Netns) -> String {
    let listings = ["tc qdisc show", "tc filter show dev foreign0 ingress", "bpftool net show"];
    listings.map(|listing| node.exec(listing.split(' ')).unwrap()).concat()
}

/// xorshift64: the next number.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn fifty_kills_at_random_moments_leave_nothing() {
    if !may_run("porttrace watch") {
        return;
    }
    let given = std::env::var("PORTTRACE_SEED").ok().and_then(|text| text.parse::<u64>().ok());
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = given.unwrap_or(clock) | 1;
    println!("PORTTRACE_SEED={seed}");
    let mut random = seed;
    let node = Netns::new("killed").unwrap();
    node.exec("ip link add foreign0 type veth peer name foreign1".split(' ')).unwrap();
    node.exec("ip link set foreign0 up".split(' ')).unwrap();
    node.exec("tc qdisc add dev foreign0 clsact".split(' ')).unwrap();
    let mut filter: Vec<&str> = "tc filter add dev foreign0 ingress pref 7 bpf bytecode".split(' ').collect();
    filter.extend(["1,6 0 0 4294967295,", "flowid", "1:1"]);
    node.exec(filter).unwrap();
    let before = attached(&node);
    let socket = node.run_in(|| UdpSocket::bind("127.0.0.1:0")).unwrap().unwrap();
    let mut held = Held::default();
    for _ in 0..KILLS {
        let mut command = node.command(porttrace().unwrap());
        command.args(["watch", "9088", "--json"]);
        let child = ChildGuard::spawn(command).unwrap();
        let end = Instant::now() + Duration::from_millis(next(&mut random) % LONGEST_MS);
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
    }
    assert!(!held.links.is_empty(), "at least one of {KILLS} came far enough to attach a program");
    println!("{} programs and {} links were held at the kills", held.programs.len(), held.links.len());
    let deadline = Instant::now() + DEADLINE;
    // The kernel takes them down after the process is gone.
    while held.alive() != Held::default() || attached(&node) != before {
        assert!(Instant::now() < deadline, "left: {:?}\n{}\nbefore:\n{before}", held.alive(), attached(&node));
    }
}
