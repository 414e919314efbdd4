//! Hundreds of interfaces come and go within seconds while traffic flows: every one is attached at once, none is kept.

use anyhow::{Context, Result, ensure};
use porttrace_tests::bpf::held_by;
use porttrace_tests::lab::topology::{HOST_PORT, NodeName, OUTSIDE_V4};
use porttrace_tests::lab::{Lab, LabOptions, Phase};
use porttrace_tests::load::{Batch, Made, Mode, Pace, Servers, Until, make};
use porttrace_tests::netns::Netns;
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::Watch;
use porttrace_user::collect::links::LinkChange;
use porttrace_user::collect::probe::{Probe, ProbeConfig, TcMode};
use porttrace_user::core::model::flow::Proto;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(180);
/// New connections a second meanwhile; and where memory is looked at, which connections take too.
const RATE: f64 = 1_000.0;
const CALM: f64 = 100.0;

/// Interfaces, two a veth pair; `PORTTRACE_INTERFACES=500` makes so many, the default is small, for every run of the tests.
fn wanted() -> usize {
    std::env::var("PORTTRACE_INTERFACES").ok().and_then(|text| text.parse::<usize>().ok()).unwrap_or(40) / 2 * 2
}

fn lab() -> (Lab, Servers) {
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, bare: true, ..LabOptions::default() }).unwrap();
    let servers = Servers::in_pods(&lab, Mode::Count).unwrap();
    (lab, servers)
}

/// Connects to the hostPort until `stop`.
fn traffic(lab: &Lab, servers: &Servers, rate: f64, stop: &AtomicBool) -> Result<Made> {
    let to = SocketAddrV4::new(NodeName::Worker3.v4(), HOST_PORT);
    let batch = Batch { proto: Proto::Tcp, from: OUTSIDE_V4, ports: 10_000..60_000, to };
    make(&lab.outside, &[batch], Until::Told(stop), Pace::Rate(rate), servers)
}

/// Makes the pairs one by one; when somebody began to make each interface.
fn come(node: &Netns) -> Result<BTreeMap<String, Instant>> {
    let mut begun = BTreeMap::new();
    for number in 0..wanted() / 2 {
        let [one, other] = ["va", "vb"].map(|side| format!("{side}{number}"));
        begun.extend([&one, &other].map(|name| (name.clone(), Instant::now())));
        node.exec(["ip", "link", "add", &one, "type", "veth", "peer", "name", &other])?;
    }
    Ok(begun)
}

/// Removes the pairs all at once.
fn go(node: &Netns) -> Result<()> {
    let batch: String = (0..wanted() / 2).map(|number| format!("link del va{number}\n")).collect();
    node.exec_with(["ip", "-batch", "-"], &batch).map(drop)
}

/// What the probe did with the interfaces.
#[derive(Default)]
struct Followed {
    attached: BTreeMap<String, Instant>,
    removed: BTreeSet<String>,
}

impl Followed {
    fn take(&mut self, changes: Vec<LinkChange>) {
        for change in changes {
            match change {
                LinkChange::Added { name, .. } => drop(self.attached.insert(name, Instant::now())),
                LinkChange::Removed { name, .. } => drop(self.removed.insert(name)),
                LinkChange::Renamed { .. } => {}
            }
        }
    }
}

/// Our programs on interfaces: filters as the system's tool lists them, or links that this process holds (and, for conntrack's
/// hooks, as many more).
fn programs(node: &Netns, mode: TcMode) -> Result<usize> {
    Ok(match mode {
        TcMode::Tcx => held_by(std::process::id())?.links.len(),
        TcMode::Clsact => node.exec(["bpftool", "net", "show"])?.matches("porttrace:").count(),
    })
}

/// What the reader of the probe has to say.
enum Said {
    Ready,
    AllAttached,
}

/// Reads the probe in the node's namespace until all interfaces came and went; what it did, and what it complains of.
fn follow(node: &Netns, mode: TcMode, said: &Sender<Said>) -> Result<(Followed, Vec<String>)> {
    node.run_in(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut probe = Probe::start(&ProbeConfig { tc: Some(mode), ..ProbeConfig::new([HOST_PORT]) })?;
            said.send(Said::Ready)?;
            let wanted = wanted();
            let (mut events, deadline, mut followed) = (Vec::new(), Instant::now() + 2 * DEADLINE, Followed::default());
            while followed.removed.len() < wanted {
                let before = followed.attached.len();
                probe.read(&mut events).await?;
                events.clear();
                // Attached before it is told.
                followed.take(probe.link_changes());
                if before < wanted && followed.attached.len() == wanted {
                    said.send(Said::AllAttached)?;
                }
                ensure!(Instant::now() < deadline, "{} came, {} went", followed.attached.len(), followed.removed.len());
            }
            Ok((followed, probe.info().degradations.clone()))
        })
    })?
}

/// Attaches to all of them and lets go of all of them, while connections come; how long each took, sorted.
fn storm(mode: TcMode) -> Vec<Duration> {
    let (lab, servers) = lab();
    let node = lab.node(NodeName::Worker3);
    let (stop, (said, hears)) = (AtomicBool::new(false), channel());
    let (begun, counts, (followed, degradations), made, took) = std::thread::scope(|scope| -> Result<_> {
        let prober = scope.spawn(|| follow(node, mode, &said));
        ensure!(matches!(hears.recv_timeout(DEADLINE), Ok(Said::Ready)), "the probe does not get ready");
        let load = scope.spawn(|| traffic(&lab, &servers, RATE, &stop));
        let outcome = (|| {
            let (start, first) = (Instant::now(), programs(node, mode)?);
            let begun = come(node)?;
            ensure!(matches!(hears.recv_timeout(DEADLINE), Ok(Said::AllAttached)), "not all were attached");
            let most = programs(node, mode)?;
            go(node)?;
            let followed = prober.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok((start, begun, [first, most], followed))
        })();
        stop.store(true, Ordering::Release);
        let made = load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let (start, begun, counts, followed) = outcome?;
        Ok((begun, counts, followed, made?, start.elapsed()))
    })
    .unwrap();
    let mut delays: Vec<Duration> =
        begun.iter().map(|(name, begun)| followed.attached[name].duration_since(*begun)).collect();
    delays.sort();
    let wanted = delays.len();
    println!(
        "{mode}: {wanted} interfaces came and went in {:.1} s beside {:.0} new connections a second; attached after {:?} \
         (median), {:?} (99 of 100), {:?} (longest)",
        took.as_secs_f64(),
        made.rate(),
        delays[wanted / 2],
        delays[wanted * 99 / 100],
        delays[wanted - 1]
    );
    assert_eq!(degradations, Vec::<String>::new());
    assert_eq!(counts[1], counts[0] + 2 * wanted, "both programs on every interface");
    assert_eq!(programs(node, mode).unwrap(), 0, "none is left");
    delays
}

#[test]
fn interfaces_that_come_together_are_attached_and_none_is_kept() {
    if !may_run("the probe") {
        return;
    }
    // With tcx the kernel waits for two grace periods of RCU for each: as many as come at once can only be attached one by one. With
    // clsact they are attached as they come.
    let [tcx, clsact] = [TcMode::Tcx, TcMode::Clsact].map(storm);
    let median = |delays: &[Duration]| delays[delays.len() / 2];
    assert!(median(&clsact) < median(&tcx), "{clsact:?} {tcx:?}");
}

#[test]
fn memory_and_descriptors_stay_as_they_were() {
    if !may_run("porttrace watch") {
        return;
    }
    let (lab, servers) = lab();
    let node = lab.node(NodeName::Worker3);
    let mut watch = Watch::start(node, &lab.tools, &["9088"]).unwrap();
    let pid = watch.process.id();
    let stop = AtomicBool::new(false);
    let (before, rounds) = std::thread::scope(|scope| -> Result<_> {
        let load = scope.spawn(|| traffic(&lab, &servers, CALM, &stop));
        let outcome = (|| {
            let before = state(pid)?;
            let mut rounds = Vec::new();
            for _ in 0..3 {
                come(node)?;
                // All are attached: two programs each.
                wait_for(pid, |held| held >= before.links + 2 * wanted())?;
                go(node)?;
                wait_for(pid, |held| held == before.links)?;
                rounds.push(state(pid)?);
            }
            Ok((before, rounds))
        })();
        stop.store(true, Ordering::Release);
        load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        outcome
    })
    .unwrap();
    println!("{before:?}\n{rounds:#?}");
    let [first, .., last] = &rounds[..] else { panic!("{rounds:?}") };
    assert!(last.descriptors <= before.descriptors + 2, "{before:?} {last:?}");
    assert!(last.memory_kib < first.memory_kib + 2048, "from one round to the third: {first:?} {last:?}");
    watch.process.signal(nix::sys::signal::Signal::SIGINT).unwrap();
    assert!(watch.status("ended", DEADLINE).unwrap().is_some());
}

/// What a process holds.
#[derive(Debug)]
struct State {
    links: usize,
    descriptors: usize,
    memory_kib: u64,
}

fn state(pid: u32) -> Result<State> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
    Ok(State {
        links: held_by(pid)?.links.len(),
        descriptors: std::fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        memory_kib: memory.context("no VmRSS")?,
    })
}

fn wait_for(pid: u32, enough: impl Fn(usize) -> bool) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let held = held_by(pid)?.links.len();
        if enough(held) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{held} links are held");
    }
}
