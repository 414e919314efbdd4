//! What watching costs: new connections per second through the lab, with nothing, with porttrace and with `conntrack -E`,
//! side by side; how long porttrace takes from its start until it is ready; how long its kernel programs run.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use porttrace_tests::bpf;
use porttrace_tests::lab::topology::{HOST_PORT, NodeName};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::netns::ChildGuard;
use porttrace_tests::oracle::conntrack::ConntrackEvents;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A port that nobody connects to.
const OTHER_PORT: u16 = 9099;
const WAIT: Duration = Duration::from_secs(20);

#[derive(Parser)]
struct Arguments {
    /// The porttrace binary
    #[arg(long, value_name = "PATH")]
    porttrace: PathBuf,
    /// How often each case is measured; the cases take turns
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Clients at once
    #[arg(long, default_value_t = 4)]
    clients: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Case {
    Nothing,
    SamePort,
    OtherPort,
    ConntrackEvents,
}

const CASES: [(Case, &str); 4] = [
    (Case::Nothing, "nothing"),
    (Case::SamePort, "porttrace watch 9088 (this port)"),
    (Case::OtherPort, "porttrace watch 9099 (another port)"),
    (Case::ConntrackEvents, "conntrack -E"),
];

/// What runs beside the load; stops when dropped.
enum Beside {
    Nothing,
    Porttrace(ChildGuard),
    Conntrack { _events: ConntrackEvents },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(nix::unistd::geteuid().is_root(), "the lab needs root (network namespaces): run it with sudo");
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, quiet: true, ..LabOptions::default() })?;
    start_to_ready(&lab, &arguments)?;
    let mut rates = CASES.map(|_| Vec::new());
    load(&lab, &arguments)?; // warm-up: neighbours, caches, conntrack's table
    for round in 0..arguments.rounds {
        // Another order each round: what grows in the meantime (conntrack's table) shall not favour one case.
        for step in 0..CASES.len() {
            let index = (step + round) % CASES.len();
            let beside = start(CASES[index].0, &lab, &arguments.porttrace)?;
            rates[index].push(load(&lab, &arguments)?);
            beside.finish(CASES[index].1)?;
        }
    }
    let base = median(&mut rates[0]);
    println!(
        "\nnew connections per second, {} clients, median of {} rounds (least to most)",
        arguments.clients, arguments.rounds
    );
    for ((_, name), rates) in CASES.iter().zip(&mut rates) {
        let middle = median(rates);
        let (least, most) = (rates[0], rates[rates.len() - 1]);
        println!("  {name:<38} {middle:>8.0}  {:>5.1} %   ({least:.0} to {most:.0})", middle / base * 100.0);
    }
    kernel_time(&lab, &arguments)
}

/// How long each kernel program runs, by the kernel's own count; counting costs time too, so this is a run of its own.
fn kernel_time(lab: &Lab, arguments: &Arguments) -> Result<()> {
    let _counting = bpf::count_time()?;
    for port in [HOST_PORT, OTHER_PORT] {
        let watch = porttrace(lab, &arguments.porttrace, port)?;
        let rate = load(lab, arguments)?;
        println!("\nkernel programs of porttrace watch {port}, {rate:.0} connections per second to {HOST_PORT}");
        for program in bpf::usage(&bpf::held_by(watch.id())?)?.iter().filter(|program| program.runs > 0) {
            println!("  {program}");
        }
    }
    Ok(())
}

/// From the start of the process until it says that it is ready; beside it tcpdump, where that is installed.
fn start_to_ready(lab: &Lab, arguments: &Arguments) -> Result<()> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..arguments.rounds.max(1) {
        let start = Instant::now();
        let watch = porttrace(lab, &arguments.porttrace, HOST_PORT)?;
        ours.push(start.elapsed().as_secs_f64() * 1e3);
        drop(watch);
        theirs.extend(tcpdump(lab)?.map(|time| time.as_secs_f64() * 1e3));
    }
    println!("start to ready in milliseconds, median of {} (least to most), taking turns", ours.len());
    for (name, times) in [("porttrace watch 9088", &mut ours), ("tcpdump -i any port 9088", &mut theirs)] {
        let middle = median(times);
        if let (Some(least), Some(most)) = (times.first(), times.last()) {
            println!("  {name:<38} {middle:>8.0}            ({least:.0} to {most:.0})");
        }
    }
    Ok(())
}

/// How long tcpdump takes until it listens; `None` when it is not there.
fn tcpdump(lab: &Lab) -> Result<Option<Duration>> {
    let start = Instant::now();
    let port = HOST_PORT.to_string();
    let Ok(dump) = lab.node(NodeName::Worker3).spawn(["tcpdump", "-n", "-i", "any", "port", &port]) else {
        return Ok(None);
    };
    let ready = dump.stderr.wait_for(WAIT, |line| line.starts_with("listening on").then(|| start.elapsed()));
    Ok(ready)
}

fn start(case: Case, lab: &Lab, binary: &Path) -> Result<Beside> {
    Ok(match case {
        Case::Nothing => Beside::Nothing,
        Case::SamePort => Beside::Porttrace(porttrace(lab, binary, HOST_PORT)?),
        Case::OtherPort => Beside::Porttrace(porttrace(lab, binary, OTHER_PORT)?),
        Case::ConntrackEvents => Beside::Conntrack { _events: ConntrackEvents::start(lab.node(NodeName::Worker3))? },
    })
}

impl Beside {
    /// Stops it; says what porttrace lost.
    fn finish(self, name: &str) -> Result<()> {
        if let Self::Porttrace(mut watch) = self {
            watch.signal(nix::sys::signal::Signal::SIGINT)?;
            watch.wait(WAIT)?;
            let sum = watch.stdout.snapshot().join("\n");
            if !sum.contains("nothing was lost") {
                println!("{name}: {}", sum.lines().rev().take(3).collect::<Vec<_>>().join(" / "));
            }
        }
        Ok(())
    }
}

fn porttrace(lab: &Lab, binary: &Path, port: u16) -> Result<ChildGuard> {
    let mut command = lab.node(NodeName::Worker3).command(binary);
    command.args(["watch", &port.to_string()]).env("PATH", lab.tools.path());
    let watch = ChildGuard::spawn(command)?;
    let ready = watch.stdout.wait_for(WAIT, |line| line.contains("ready after").then_some(()));
    ready.with_context(|| format!("porttrace does not get ready: {:?}", watch.stderr.snapshot()))?;
    Ok(watch)
}

/// Connects, asks, reads and closes for the given time; connections per second.
fn load(lab: &Lab, arguments: &Arguments) -> Result<f64> {
    let to = SocketAddr::new(Origin::Outside.target(false), HOST_PORT);
    let done = AtomicU64::new(0);
    let start = Instant::now();
    let end = start + Duration::from_secs_f64(arguments.seconds);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..arguments.clients)
            .map(|_| {
                scope.spawn(|| {
                    lab.outside.run_in(|| {
                        while Instant::now() < end {
                            one(to)?;
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok::<_, anyhow::Error>(())
                    })?
                })
            })
            .collect();
        clients
            .into_iter()
            .try_for_each(|client| client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    Ok(done.into_inner() as f64 / start.elapsed().as_secs_f64())
}

fn one(to: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(to)?;
    stream.write_all(b"GET /0 HTTP/1.1\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::with_capacity(256);
    stream.read_to_end(&mut answer)?;
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "an answer that is not the server's");
    Ok(())
}

/// Sorts, and takes the middle one (of an even number the upper).
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
