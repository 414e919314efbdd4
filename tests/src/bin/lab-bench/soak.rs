//! Minutes of load while interfaces and rules change: memory stays flat, and what was received and what was lost is all that
//! was sent.

use crate::Arguments;
use crate::ready::memory;
use crate::scene::{CLIENT_PORTS, Scene, WAIT};
use crate::table::{Series, number};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use porttrace_tests::bpf::held_by;
use porttrace_tests::lab::topology::HOST_PORT;
use porttrace_tests::load::{Made, Pace, Until};
use porttrace_tests::netns::{ChildGuard, Netns};
use porttrace_user::core::model::flow::Proto;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// New connections a second, where nothing else is asked for; half of them TCP.
const RATE: f64 = 5_000.0;
/// Connections by which it is found out how many events one makes.
const CALM: u16 = 200;
/// Connections that porttrace holds at once (`Limits::max_flows`): until it has met so many, its memory must grow.
const HELD: f64 = 65_536.0;
/// Memory may grow so much between the two halves of the time after that, MiB.
const GROWTH: f64 = 4.0;
/// How often memory is read, and what else changes.
const SAMPLE: Duration = Duration::from_secs(1);
const INTERFACES: Duration = Duration::from_millis(500);
const RULES: Duration = Duration::from_secs(3);

pub fn run(scene: &Scene, arguments: &Arguments) -> Result<()> {
    let rate = arguments.rate.unwrap_or(RATE);
    let duration = Duration::from_secs_f64(arguments.minutes * 60.0);
    let each = [Proto::Tcp, Proto::Udp].map(|proto| events_of_one(scene, proto));
    let [tcp, udp] = each;
    let each = [tcp?, udp?];
    println!("\none connection makes {} events over TCP and {} over UDP", each[0], each[1]);

    let watch = Watch::start(scene)?;
    let links = held_by(watch.process.id())?.links.len();
    println!(
        "{rate:.0} new connections a second for {:.1} minutes, interfaces and rules change",
        duration.as_secs_f64() / 60.0
    );
    let stop = AtomicBool::new(false);
    let (made, samples, changes) = thread::scope(|scope| {
        let changes = scope.spawn(|| change(scene.node(), &stop));
        let samples = scope.spawn(|| sample(&watch, &stop));
        let made = load(scene, rate, duration);
        stop.store(true, Ordering::Release);
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        Ok::<_, anyhow::Error>((
            made?,
            samples.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
            join(changes)?,
        ))
    })?;
    settle(&watch)?;
    let left = held_by(watch.process.id())?.links.len();
    let ended = watch.end()?;
    println!(
        "made {} TCP and {} UDP connections, {:.0} a second",
        made[0].connections,
        made[1].connections,
        made[0].rate() + made[1].rate()
    );
    println!("{changes} interfaces came and went; programs on {links} hooks before, on {left} after");
    let sent = made[0].connections * each[0] + made[1].connections * each[1];
    let memory_is_flat = print_memory(&samples, (2.0 * HELD / rate) as usize);
    let balances = print_events(&ended, sent)?;
    ensure!(left == links, "interfaces that are gone still have programs");
    ensure!(balances, "received and lost is not what was sent");
    ensure!(memory_is_flat, "memory grew");
    Ok(())
}

/// Both protocols at once, each from ports of its own.
fn load(scene: &Scene, rate: f64, duration: Duration) -> Result<[Made; 2]> {
    let end = Instant::now() + duration;
    let middle = CLIENT_PORTS.start + (CLIENT_PORTS.end - CLIENT_PORTS.start) / 2;
    let batches = [(Proto::Tcp, CLIENT_PORTS.start..middle), (Proto::Udp, middle..CLIENT_PORTS.end)];
    thread::scope(|scope| {
        let threads = batches.map(|(proto, ports)| {
            scope.spawn(move || scene.connect_from(ports, proto, Pace::Rate(rate / 2.0), Until::Time(end)))
        });
        let [tcp, udp] = threads.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        Ok([tcp?, udp?])
    })
}

/// How many events a connection makes, found out with a few of them.
fn events_of_one(scene: &Scene, proto: Proto) -> Result<u64> {
    let watch = Watch::start(scene)?;
    let ports = CLIENT_PORTS.start..CLIENT_PORTS.start + CALM;
    scene.connect_from(ports, proto, Pace::Rate(1_000.0), Until::Rounds(1))?;
    settle(&watch)?;
    let ended = watch.end()?;
    let (received, lost) = events(&ended)?;
    ensure!(
        lost == 0 && received > 0 && received.is_multiple_of(u64::from(CALM)),
        "{CALM} connections made {received} events, {lost} were lost"
    );
    Ok(received / u64::from(CALM))
}

/// A `watch --json` whose lines are counted as they come.
struct Watch {
    process: ChildGuard,
    lines: std::sync::Arc<Lines>,
    reader: thread::JoinHandle<Result<Value>>,
}

#[derive(Default)]
struct Lines {
    verdicts: AtomicU64,
    ready: AtomicBool,
}

impl Watch {
    fn start(scene: &Scene) -> Result<Self> {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let mut command = scene.node().command(&scene.porttrace);
        command.args(["watch", &HOST_PORT.to_string(), "--json"]).env("PATH", scene.lab.tools.path());
        let process = ChildGuard::spawn_to(command, File::from(write))?;
        let lines = std::sync::Arc::<Lines>::default();
        let shared = lines.clone();
        let reader = thread::spawn(move || shared.read(read));
        let watch = Self { process, lines, reader };
        let deadline = Instant::now() + WAIT;
        while !watch.lines.ready.load(Ordering::Acquire) {
            if Instant::now() > deadline || watch.process.stderr.wait_closed(Duration::from_millis(10)) {
                bail!("porttrace does not get ready: {:?}", watch.process.stderr.snapshot());
            }
        }
        Ok(watch)
    }

    /// Its last line.
    fn end(mut self) -> Result<Value> {
        self.process.signal(Signal::SIGINT)?;
        self.process.wait(WAIT)?;
        self.reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Lines {
    fn read(&self, from: OwnedFd) -> Result<Value> {
        let mut reader = BufReader::with_capacity(1 << 20, File::from(from));
        let (mut line, mut last) = (String::new(), String::new());
        while reader.read_line(&mut line)? > 0 {
            if line.contains("\"type\":\"verdict\"") {
                self.verdicts.fetch_add(1, Ordering::Relaxed);
            } else if line.contains("\"type\":\"status\"") {
                self.ready.store(true, Ordering::Release);
                last.clone_from(&line);
            }
            line.clear();
        }
        serde_json::from_str(&last).context("porttrace's last line")
    }
}

/// Until it has told what there was: it calls a connection unanswered after a second.
fn settle(watch: &Watch) -> Result<()> {
    let deadline = Instant::now() + WAIT;
    let mut before = u64::MAX;
    loop {
        thread::sleep(Duration::from_millis(1_500));
        let now = watch.lines.verdicts.load(Ordering::Relaxed);
        if now == before {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "porttrace does not come to an end with what it has to tell");
        before = now;
    }
}

/// Resident memory in MiB, each second.
fn sample(watch: &Watch, stop: &AtomicBool) -> Result<Vec<f64>> {
    let mut samples = Vec::new();
    while !stop.load(Ordering::Acquire) {
        thread::sleep(SAMPLE);
        samples.push(memory(watch.process.id(), "VmRSS:")? / 1024.0);
    }
    Ok(samples)
}

/// Lets interfaces come and go, and adds and removes a rule that decides nothing; how many interfaces.
fn change(node: &Netns, stop: &AtomicBool) -> Result<u64> {
    let rule =
        |verb| format!("iptables -w 5 -t filter -{verb} FORWARD -s 192.0.2.1 -m comment --comment soak -j ACCEPT");
    let (mut interfaces, mut rules_changed, mut there) = (0, Instant::now(), false);
    while !stop.load(Ordering::Acquire) {
        node.exec("ip link add soak0 type veth peer name soak1".split(' '))?;
        node.exec("ip link set soak0 up".split(' '))?;
        thread::sleep(INTERFACES);
        node.exec("ip link del soak0".split(' '))?;
        interfaces += 2;
        if rules_changed.elapsed() > RULES {
            node.exec(rule(if there { "D" } else { "I" }).split(' '))?;
            (rules_changed, there) = (Instant::now(), !there);
        }
    }
    if there {
        node.exec(rule("D").split(' '))?;
    }
    Ok(interfaces)
}

/// Whether the second half needs no more than the first, the warm-up of some seconds aside.
fn print_memory(samples: &[f64], warm_up: usize) -> bool {
    let warm_up = warm_up.max(samples.len() / 10).min(samples.len());
    let (cold, warm) = samples.split_at(warm_up);
    let (first, second) = warm.split_at(warm.len() / 2);
    let series = |part: &[f64]| {
        let mut series = Series::default();
        part.iter().for_each(|value| series.push(*value));
        series
    };
    println!("resident memory in MiB, median (least to most)");
    for (name, part) in [("warm-up", cold), ("first half", first), ("second half", second)] {
        let part = series(part);
        println!("  {name:<12} {:>8} ({} to {})", number(part.median()), number(part.least()), number(part.most()));
    }
    if first.is_empty() {
        println!("  too short to say whether it stays so: it grows until {HELD} connections are held");
        return true;
    }
    let grown = series(second).median() - series(first).median();
    println!("  grown by {} MiB from one half to the other", number(grown));
    grown <= GROWTH
}

fn events(ended: &Value) -> Result<(u64, u64)> {
    let count = |name: &str| ended["events"][name].as_u64().with_context(|| format!("no count of events in {ended}"));
    Ok((count("received")?, count("lost")?))
}

/// Whether everything that was sent was received or counted as lost.
fn print_events(ended: &Value, sent: u64) -> Result<bool> {
    let (received, lost) = events(ended)?;
    println!("events: {sent} by what was sent; {received} received, {lost} lost, together {}", received + lost);
    println!("porttrace told {} connections; lost: {}", ended["connections"], ended["lost"]);
    Ok(received + lost == sent)
}
