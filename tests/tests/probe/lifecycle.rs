//! Interfaces that come later, and what stays behind.

use crate::world::{DEADLINE, PORT, World, config, read_until, request, summary, v4};
use porttrace_ebpf::Kind;
use porttrace_tests::netns::{ChildGuard, Netns};
use porttrace_tests::privilege;
use porttrace_user::collect::links::LinkChange;
use porttrace_user::collect::probe::{Probe, TcMode};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Names the way of attaching to the child process.
const MODE: &str = "PORTTRACE_TEST_TC";

#[test]
fn interfaces_that_come_later_are_attached_within_100_ms() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("late").unwrap();
    world.serve().unwrap();
    let late = Netns::new("late-comer").unwrap();
    world
        .with_probe(&config(), async |probe| {
            let mut fastest = Duration::MAX;
            for round in 0..5 {
                let name = format!("late{round}");
                let peer = late.name().to_owned();
                world.node.exec(["ip", "link", "add", &name, "type", "veth", "peer", "name", &name, "netns", &peer])?;
                let added = Instant::now();
                wait_for_link(probe, &name).await?;
                fastest = fastest.min(added.elapsed());
            }
            assert!(fastest < Duration::from_millis(100), "{fastest:?}");
            for (netns, host) in [(&world.node, 1), (&late, 2)] {
                netns.exec(["ip", "addr", "add", &format!("10.50.9.{host}/24"), "dev", "late4"])?;
                netns.exec(["ip", "link", "set", "late4", "up"])?;
            }
            late.exec("ip route add default via 10.50.9.1".split(' '))?;
            request(&late, (v4().node, PORT).into())?;
            let index = interface(probe, "late4");
            let mut events = Vec::new();
            let seen = |kind| {
                move |event: &&porttrace_user::core::model::event::Event| {
                    event.kind == kind && event.ifindex == index && event.l4_flags & 2 != 0
                }
            };
            read_until(probe, &mut events, |events| events.iter().any(|event| seen(Kind::TcEgress)(&event))).await?;
            assert_eq!(events.iter().filter(seen(Kind::TcIngress)).count(), 1, "{:#?}", summary(&events));

            world.node.exec(["ip", "link", "del", "late4"])?;
            let deadline = Instant::now() + DEADLINE;
            while !probe.link_changes().iter().any(|change| matches!(change, LinkChange::Removed { .. })) {
                assert!(Instant::now() < deadline, "nobody told of the removal");
                tokio::time::timeout(DEADLINE, probe.read(&mut events)).await??;
            }
            assert_eq!(probe.interface_name(index), Some("late4"), "the name outlives the interface");
            Ok(())
        })
        .unwrap();
}

fn interface(probe: &Probe, name: &str) -> u32 {
    probe.interface_names().iter().find(|(_, found)| *found == name).map(|(index, _)| *index).unwrap()
}

async fn wait_for_link(probe: &mut Probe, name: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        tokio::time::timeout(left, probe.read(&mut Vec::new())).await??;
        let is_it = |change: &LinkChange| matches!(change, LinkChange::Added { name: found, .. } if found == name);
        if probe.link_changes().iter().any(is_it) {
            return Ok(());
        }
    }
}

/// What a tool lists. Of a link that another test is just making it has the number, and cannot open it yet (EAGAIN from
/// `bpf_link_by_id`, kernel/bpf/syscall.c): it then looks again.
fn listed(node: &Netns, listing: &str) -> String {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match node.exec(listing.split(' ')) {
            Err(error) if format!("{error:#}").contains("temporarily unavailable") && Instant::now() < deadline => {
                std::thread::yield_now();
            }
            outcome => return outcome.unwrap(),
        }
    }
}

/// Everything that hangs on the node's interfaces and hooks.
fn attached(node: &Netns) -> Vec<String> {
    let mut all = Vec::new();
    for (listing, mark) in [
        ("tc qdisc show", "clsact"),
        ("tc filter show dev eth0 ingress", "bpf"),
        ("tc filter show dev eth0 egress", "bpf"),
        ("tc filter show dev pod0 ingress", "bpf"),
        ("bpftool net show", "tc_"),
        ("bpftool link show", "nf_"),
        ("bpftool prog show", "tp_"),
    ] {
        let text = listed(node, listing);
        all.extend(text.lines().filter(|line| line.contains(mark)).map(|line| format!("{listing}: {line}")));
    }
    all
}

/// A process that holds a probe in the node's namespace until it is killed.
fn holder(node: &Netns, mode: &str) -> ChildGuard {
    let own = std::env::current_exe().unwrap();
    let mut command = node.command(own);
    command.args(["--ignored", "--exact", "lifecycle::holds_a_probe", "--nocapture"]).env(MODE, mode);
    let child = ChildGuard::spawn(command).unwrap();
    // An emulated machine takes its time to start a process and load the programs.
    let ready = child.stdout.wait_for(6 * DEADLINE, |line| line.contains("holding").then_some(()));
    assert!(ready.is_some(), "{:?} {:?}", child.stdout.snapshot(), child.stderr.snapshot());
    child
}

#[test]
#[ignore = "the child process of other tests"]
fn holds_a_probe() {
    let mut config = config();
    config.tc = match std::env::var(MODE).as_deref() {
        Ok("tcx") => Some(TcMode::Tcx),
        Ok("clsact") => Some(TcMode::Clsact),
        _ => return,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut probe = Probe::start(&config).unwrap();
        println!("holding {}", probe.info().interfaces);
        let mut events = Vec::new();
        loop {
            probe.read(&mut events).await.unwrap();
            events.clear();
        }
    });
}

#[test]
fn after_sigkill_nothing_stays_or_the_next_start_removes_it() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("kill").unwrap();
    for mode in ["tcx", "clsact"] {
        if mode == "tcx" && !has_tcx(&world) {
            println!("skipped tcx: this kernel has none");
            continue;
        }
        let child = holder(&world.node, mode);
        assert!(!attached(&world.node).is_empty());
        // A kill, not an end: no destructor of the child runs.
        drop(child);
        if mode == "clsact" {
            assert!(!attached(&world.node).is_empty(), "filters outlive their process");
            world.with_probe(&config(), async |_| Ok(())).unwrap();
        }
        let deadline = Instant::now() + DEADLINE;
        // The kernel takes links down after the process is gone.
        while !own(&world.node).is_empty() {
            assert!(Instant::now() < deadline, "{:#?}", own(&world.node));
        }
    }
}

/// What is attached to this node; programs of other tests that run beside belong to other nodes.
fn own(node: &Netns) -> Vec<String> {
    attached(node)
        .into_iter()
        .filter(|line| !line.starts_with("bpftool link") && !line.starts_with("bpftool prog"))
        .collect()
}

fn has_tcx(world: &World) -> bool {
    world.with_probe(&config(), async |probe| Ok(probe.info().tc == TcMode::Tcx)).unwrap()
}

#[test]
fn with_clsact_two_probes_and_foreign_filters_do_not_disturb_each_other() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("clsact").unwrap();
    world.serve().unwrap();
    world.node.exec("tc qdisc add dev pod0 clsact".split(' ')).unwrap();
    // Classic BPF that matches every packet and so ends the list of filters.
    let mut foreign: Vec<&str> = "tc filter add dev pod0 ingress pref 7 bpf bytecode".split(' ').collect();
    foreign.extend(["1,6 0 0 4294967295,", "flowid", "1:1"]);
    world.node.exec(foreign).unwrap();
    let foreign = world.node.exec("tc filter show dev pod0 ingress".split(' ')).unwrap();
    let first = holder(&world.node, "clsact");
    let mut config = config();
    config.tc = Some(TcMode::Clsact);
    let send = || request(&world.client, SocketAddr::from((v4().node, PORT)));
    let fins = |events: &[porttrace_user::core::model::event::Event]| {
        events.iter().filter(|event| event.l4_flags & 1 != 0).count() >= 4
    };
    // Ours come first, so the foreign filter that ends the list does not blind the probe.
    let (_, events) = world.watch(&config, send, fins).unwrap();
    let index = events.iter().find(|event| event.kind == Kind::TcIngress && event.is_reply).unwrap().ifindex;
    assert_ne!(index, 0);
    let left = world.node.exec("tc filter show dev eth0 ingress".split(' ')).unwrap();
    assert_eq!(left.matches("porttrace:").count(), 1, "the other probe's filter stays: {left}");
    drop(first);
    world.with_probe(&config, async |_| Ok(())).unwrap();
    assert_eq!(world.node.exec("tc filter show dev pod0 ingress".split(' ')).unwrap(), foreign);
    let qdiscs = world.node.exec("tc qdisc show".split(' ')).unwrap();
    assert_eq!(qdiscs.matches("clsact").count(), 1, "only the foreign one on pod0 stays: {qdiscs}");
}
