//! `--batch`: many packets through one state, on all cores, answers in the order of the lines.

use super::expect::Expectation;
use super::source::Loaded;
use super::{UNEXPECTED, packet};
use anyhow::{Context as _, anyhow};
use porttrace_user::core::model::flow::{Proto, Tuple};
use porttrace_user::core::model::trace::Packet;
use porttrace_user::core::parse::words;
use porttrace_user::core::simulate::Simulator;
use porttrace_user::render::trace::json::Printer;
use porttrace_user::render::trace::{self, Context, json};
use serde::Deserialize;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write, stdin, stdout};
use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SendError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};

/// Lines that one thread takes at a time.
const CHUNK: usize = 128;
/// Bytes of output that are handed on together.
const PIECE: usize = 256 << 10;
/// Pieces that wait to be written, for each chunk of lines.
const PIECES: usize = 4;
/// A longer line is no packet.
const LONGEST: usize = 64 << 10;

/// One line.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with src, sport, dst, dport, proto and in")]
struct Line {
    src: IpAddr,
    #[serde(default)]
    sport: Option<u16>,
    dst: IpAddr,
    #[serde(default)]
    dport: Option<u16>,
    #[serde(default = "tcp")]
    proto: Proto,
    #[serde(default, rename = "in")]
    input: Option<String>,
    #[serde(default)]
    mark: u32,
    #[serde(default)]
    mac: Option<String>,
    #[serde(default)]
    uid: Option<u32>,
    #[serde(default)]
    gid: Option<u32>,
}

const fn tcp() -> Proto {
    Proto::Tcp
}

/// What to do with each line.
#[derive(Clone, Copy)]
struct Task<'a> {
    loaded: &'a Loaded,
    context: &'a Context<'a>,
    json: bool,
    expect: Option<Expectation>,
}

/// How lines are to be answered.
#[derive(Clone, Copy)]
pub struct Options {
    pub json: bool,
    /// Answers as data without the hops.
    pub brief: bool,
    pub expect: Option<Expectation>,
}

/// Answers every line of a file; a line that is no packet gets an error of its own, and exit code 1 at the end.
///
/// Each core takes chunks of lines; the answers are written in the order of the lines while the next ones are being made. What
/// is held in memory is bounded: a thread waits when it is [`PIECES`] pieces of output ahead.
///
/// # Errors
/// When the file cannot be read or the output not be written.
pub fn run(path: &Path, loaded: &Loaded, context: &Context<'_>, options: Options) -> anyhow::Result<ExitCode> {
    let mut lines = Lines::open(path)?;
    let Options { json, brief, expect } = options;
    let task = Task { loaded, context, json, expect };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (bad, unexpected) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..threads {
            let mut worker = Worker { task, bad: &bad, unexpected: &unexpected, printer: Printer::new(brief) };
            let queue = Arc::clone(&queue);
            scope.spawn(move || worker.work(&queue));
        }
        drop(queue);
        lines.feed(jobs, 2 * threads, &mut stdout().lock())
    })?;
    loaded.complain(context.verbose);
    Ok(finish(bad.into_inner(), unexpected.into_inner(), expect))
}

fn finish(bad: u64, unexpected: u64, expect: Option<Expectation>) -> ExitCode {
    if bad > 0 {
        let are = if bad == 1 { "line of the batch is no packet" } else { "lines of the batch are no packets" };
        eprintln!("porttrace: {bad} {are}");
        return ExitCode::FAILURE;
    }
    if let Some(expect) = expect.filter(|_| unexpected > 0) {
        let others = if unexpected == 1 { "packet does" } else { "packets do" };
        eprintln!("porttrace: expected {expect}, but {unexpected} {others} otherwise");
        return ExitCode::from(UNEXPECTED);
    }
    ExitCode::SUCCESS
}

/// Numbered lines, and where their answers go piece by piece.
struct Job {
    lines: Vec<(u64, Vec<u8>)>,
    answers: SyncSender<Vec<u8>>,
}

/// One thread. What traces share with their simulator is counted, so that each does better with one of its own.
struct Worker<'a> {
    task: Task<'a>,
    bad: &'a AtomicU64,
    unexpected: &'a AtomicU64,
    printer: Printer,
}

impl Worker<'_> {
    fn work(&mut self, queue: &Mutex<Receiver<Job>>) {
        let simulator = Simulator::new(&self.task.loaded.state);
        loop {
            let next = queue.lock().map_or(None, |queue| queue.recv().ok());
            let Some(job) = next else { return };
            // An error means that nobody reads any more: the writer has said why.
            if self.answer_all(&simulator, &job).is_err() {
                return;
            }
        }
    }

    fn answer_all(&mut self, simulator: &Simulator, job: &Job) -> Result<(), SendError<Vec<u8>>> {
        let mut out = Vec::with_capacity(PIECE);
        for (number, line) in &job.lines {
            if let Err(error) = self.answer(simulator, *number, line, &mut out) {
                self.bad.fetch_add(1, Ordering::Relaxed);
                if self.task.json {
                    let _ = serde_json::to_writer(&mut out, &json::BadLine::new(*number, &error));
                    out.push(b'\n');
                } else {
                    let _ = writeln!(out, "line {number}: {error}");
                }
            }
            if out.len() >= PIECE {
                job.answers.send(std::mem::replace(&mut out, Vec::with_capacity(PIECE)))?;
            }
        }
        job.answers.send(out)
    }

    fn answer(&mut self, simulator: &Simulator, number: u64, line: &[u8], out: &mut Vec<u8>) -> Result<(), String> {
        let Task { loaded, context, json, expect, .. } = self.task;
        let packet = parse(line, loaded)?;
        let mut trace = simulator.trace(&packet);
        trace.assumptions.extend(loaded.missing_for(packet.tuple.family()));
        if expect.is_some_and(|expect| !expect.holds(&trace)) {
            self.unexpected.fetch_add(1, Ordering::Relaxed);
        }
        if json {
            return self.printer.answer(&trace, Some(number), out).map_err(|error| error.to_string());
        }
        out.extend_from_slice(trace::headline(&trace, context).as_bytes());
        Ok(())
    }
}

fn parse(line: &[u8], loaded: &Loaded) -> Result<Packet, String> {
    if line.len() > LONGEST {
        return Err(format!("longer than {} KiB: no packet", LONGEST >> 10));
    }
    let Line { src, sport, dst, dport, proto, input, mark, mac, uid, gid } =
        serde_json::from_slice(line).map_err(|error| error.to_string().replace(" at line 1 column ", " at column "))?;
    let tuple = match (proto.has_ports(), sport, dport) {
        (true, Some(sport), Some(dport)) => Tuple { proto, src, sport, dst, dport },
        (true, ..) => return Err(format!("{proto} needs sport and dport")),
        (false, None | Some(0), None | Some(0)) => Tuple { proto, src, sport: 0, dst, dport: 0 },
        (false, ..) => return Err(format!("{proto} has no ports")),
    };
    packet::check(&tuple, input.as_deref(), &loaded.state)?;
    let mut packet = Packet::first_of(tuple, input.map(Into::into));
    packet.mark = mark;
    let mac = mac.map(|text| words::mac(&text).ok_or_else(|| format!("{text:?} is no MAC address"))).transpose()?;
    packet.sender = packet::sender(mac, uid, gid, &packet)?;
    Ok(packet)
}

/// Numbered lines of a file or of standard input; empty ones are passed over.
struct Lines {
    name: String,
    input: Box<dyn BufRead>,
    number: u64,
}

impl Lines {
    /// Hands out all lines, `ahead` chunks at a time, and writes the answers in their order.
    fn feed(&mut self, jobs: Sender<Job>, ahead: usize, out: &mut impl Write) -> anyhow::Result<()> {
        let mut waiting: VecDeque<Receiver<Vec<u8>>> = VecDeque::new();
        let mut jobs = Some(jobs);
        loop {
            while let (Some(queue), true) = (&jobs, waiting.len() < ahead) {
                let lines = self.block(CHUNK).with_context(|| format!("cannot read {}", self.name))?;
                if lines.is_empty() {
                    jobs = None;
                    break;
                }
                let (answers, receiver) = sync_channel(PIECES);
                queue.send(Job { lines, answers }).map_err(|_| anyhow!("the threads of the batch broke off"))?;
                waiting.push_back(receiver);
            }
            let Some(first) = waiting.pop_front() else { break };
            // Ends when the thread that has this chunk is done with it.
            for piece in first {
                out.write_all(&piece)?;
            }
        }
        Ok(out.flush()?)
    }

    fn open(path: &Path) -> anyhow::Result<Self> {
        let input: Box<dyn BufRead> = if path == Path::new("-") {
            Box::new(stdin().lock())
        } else {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            Box::new(BufReader::with_capacity(1 << 20, file))
        };
        Ok(Self { name: path.display().to_string(), input, number: 0 })
    }

    /// Up to `count` lines; none at the end.
    fn block(&mut self, count: usize) -> std::io::Result<Vec<(u64, Vec<u8>)>> {
        let mut block = Vec::new();
        while block.len() < count {
            let mut line = Vec::new();
            if self.one(&mut line)? == 0 {
                break;
            }
            self.number += 1;
            let content = line.trim_ascii();
            if !content.is_empty() {
                block.push((self.number, content.to_vec()));
            }
        }
        Ok(block)
    }

    /// One line; of one that is too long only as much as shows that it is.
    fn one(&mut self, line: &mut Vec<u8>) -> std::io::Result<usize> {
        let read = self.input.by_ref().take(LONGEST as u64 + 2).read_until(b'\n', line)?;
        if line.len() > LONGEST && !line.ends_with(b"\n") {
            self.input.skip_until(b'\n')?;
        }
        Ok(read)
    }
}
