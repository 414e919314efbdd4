//! The founding story, live: a broken hostPort in the lab, watched by porttrace, then repaired.

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use porttrace_tests::lab::rules::IptablesFlavour;
use porttrace_tests::lab::topology::{HOST_PORT, NodeName};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::lines::Lines;
use porttrace_tests::netns::ChildGuard;
use porttrace_tests::peer::{Answer, Outcome, Transport};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Exit code after Ctrl-C, as shells have it (128 + SIGINT).
const INTERRUPTED: u8 = 130;
/// How long porttrace may take to get ready, and to tell a connection.
const PATIENCE: Duration = Duration::from_secs(15);

static STOP: AtomicBool = AtomicBool::new(false);

/// Raise a cluster of network namespaces with a broken hostPort, watch it, repair it, watch it again.
#[derive(Parser)]
struct Arguments {
    /// The porttrace binary
    #[arg(long, value_name = "PATH")]
    porttrace: PathBuf,
    /// Let kube-proxy and portmap use iptables-legacy instead of iptables-nft
    #[arg(long)]
    legacy: bool,
    /// Further arguments of `porttrace watch 9088`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    watch: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = catch_signals().and_then(|()| story(&arguments));
    match result {
        _ if STOP.load(Ordering::Relaxed) => {
            eprintln!("interrupted; the lab is removed");
            ExitCode::from(INTERRUPTED)
        }
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Everything is removed when this returns, whichever way: the guards do it.
fn story(arguments: &Arguments) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "the lab needs root (network namespaces): run it with sudo");
    let flavour = if arguments.legacy { IptablesFlavour::Legacy } else { IptablesFlavour::Nft };
    say("Raising the lab: worker3 172.18.0.3, worker2 172.18.0.4, worker 172.18.0.5, a client outside 172.18.0.100 …");
    let start = Instant::now();
    let mut lab = Lab::up(LabOptions { flavour, ..LabOptions::default() })?;
    say(&format!(
        "{} pods by real CNI plugins, kube-proxy's rules by {}: up in {:.1} s.",
        lab.pods().count(),
        flavour.binary(),
        start.elapsed().as_secs_f64()
    ));
    say("Pod frontend on worker3 says `containerPort: 8081, hostPort: 9088`; its server listens on port 80.");
    let mut watch = start_watch(&lab, arguments)?;
    connect_from_everywhere(&lab, &watch.stdout, Phase::Broken)?;
    go_on()?;
    say("The repair: containerPort 80. The pod is redeployed …");
    lab.repair()?;
    connect_from_everywhere(&lab, &watch.stdout, Phase::Fixed)?;
    go_on()?;
    say("That was it. Ending porttrace, removing the lab …");
    watch.signal(Signal::SIGINT)?;
    let code = watch.wait(PATIENCE)?;
    ensure!(code == Some(0), "porttrace ended with {code:?}: {}", watch.stderr.snapshot().join("\n"));
    Ok(())
}

/// Starts `porttrace watch 9088` in worker3's namespace, its output on our terminal, and waits until it is ready.
fn start_watch(lab: &Lab, arguments: &Arguments) -> Result<ChildGuard> {
    let node = lab.node(NodeName::Worker3);
    let shown = arguments.watch.iter().map(|word| format!(" {word}")).collect::<String>();
    say(&format!("On worker3: porttrace watch {HOST_PORT}{shown}"));
    let mut command = node.command(&arguments.porttrace);
    command.arg("watch").arg(HOST_PORT.to_string()).args(&arguments.watch).env("PATH", lab.tools.path());
    dress(&mut command);
    let watch = ChildGuard::spawn_shown(command)?;
    let ready = wait(&watch.stdout, 0, |line| line.contains("ready after") || line.contains("\"state\":\"ready\""))?;
    if ready.is_none() {
        watch.stderr.wait_closed(Duration::from_secs(1));
        bail!("porttrace does not get ready: {}", watch.stderr.snapshot().join("\n"));
    }
    Ok(watch)
}

/// porttrace writes into a pipe here: tell it what our terminal is like.
fn dress(command: &mut Command) {
    let stdout = std::io::stdout();
    if stdout.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) {
        command.args(["--color", "always"]);
    }
    if let Some((width, _)) = terminal_size::terminal_size_of(&stdout) {
        command.env("COLUMNS", width.0.to_string());
    }
}

fn connect_from_everywhere(lab: &Lab, log: &Lines, phase: Phase) -> Result<()> {
    let clients = [
        (Origin::OtherNode, "worker2"),
        (Origin::Outside, "the client outside"),
        (Origin::Node, "worker3 itself, by its address,"),
        (Origin::Loopback, "worker3 itself, by 127.0.0.1,"),
        (Origin::Pod, "pod client on worker3"),
    ];
    for (origin, name) in clients {
        go_on()?;
        let seen = log.len();
        say(&format!("{name} connects to {}:{HOST_PORT}", origin.target(false)));
        let answer = lab.connect_to_node(origin, Transport::Tcp, false, HOST_PORT)?;
        told(log, seen, &answer)?;
        say(&format!("  … and was told: {}", words(&answer)));
        let expected = if phase == Phase::Broken { Outcome::Refused } else { Outcome::Ok };
        ensure!(answer.result == expected, "{name} should have had {expected:?}, but {answer:?}");
    }
    Ok(())
}

/// Waits until porttrace has told the connection: its head line, then its verdict.
fn told(log: &Lines, seen: usize, answer: &Answer) -> Result<()> {
    let client = answer.local.to_string();
    let port = format!("\"sport\":{}", answer.local.port());
    let mut at_head = false;
    let verdict = wait(log, seen, |line| {
        at_head |= line.contains(&client) || line.contains(&port);
        at_head && (['✓', '✗', '?'].iter().any(|mark| line.contains(*mark)) || line.contains("\"verdict\""))
    })?;
    verdict.with_context(|| format!("porttrace did not tell the connection from {client} within {PATIENCE:?}"))
}

fn words(answer: &Answer) -> String {
    match (&answer.result, &answer.pod, answer.saw) {
        (Outcome::Ok, Some(pod), Some(saw)) => format!("200 OK by pod {pod}, which saw {saw} ({:.1} ms)", answer.ms),
        (Outcome::Refused, ..) => format!("connection refused ({:.1} ms)", answer.ms),
        _ => format!("{:?} after {:.0} ms {}", answer.result, answer.ms, answer.detail.as_deref().unwrap_or_default()),
    }
}

/// Waits for a line, from line `start` on, in short slices, so that Ctrl-C is heard.
fn wait(log: &Lines, start: usize, mut pick: impl FnMut(&str) -> bool) -> Result<Option<()>> {
    let deadline = Instant::now() + PATIENCE;
    let mut next = start;
    loop {
        go_on()?;
        let found = log.wait_from(next, Duration::from_millis(100), |line| {
            next += 1;
            pick(line).then_some(())
        });
        if found.is_some() || Instant::now() > deadline || log.wait_closed(Duration::ZERO) {
            return Ok(found);
        }
    }
}

fn say(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let bold = stdout.is_terminal();
    let (on, off) = if bold { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
    // A closed standard output ends the story at the next line of porttrace.
    let _ = writeln!(stdout, "{on}▶ {text}{off}").and_then(|()| stdout.flush());
}

fn go_on() -> Result<()> {
    ensure!(!STOP.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

/// SIGINT, SIGTERM and SIGHUP only set [`STOP`]; children get them as usual (`std` clears the mask for them).
fn catch_signals() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("blocking signals")?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            STOP.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
}
