//! `--batch`: many packets through one state, on all cores, answers in the order of the lines.

use super::expect::Expectation;
use super::source::Loaded;
use super::{UNEXPECTED, packet};
use anyhow::Context as _;
use porttrace_user::core::model::flow::{Proto, Tuple};
use porttrace_user::core::model::trace::Packet;
use porttrace_user::core::parse::words;
use porttrace_user::core::simulate::Simulator;
use porttrace_user::render::trace::{self, Context, json};
use serde::Deserialize;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write, stdin, stdout};
use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;

/// Lines that one thread takes at a time.
const CHUNK: usize = 2048;
/// A longer line is no packet.
const LONGEST: usize = 64 << 10;

/// One line.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
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

/// What a chunk of lines came to.
#[derive(Default)]
struct Done {
    out: Vec<u8>,
    bad: u64,
    unexpected: u64,
}

struct Job<'a> {
    loaded: &'a Loaded,
    context: &'a Context<'a>,
    json: bool,
    expect: Option<Expectation>,
}

/// Answers every line of a file; a line that is no packet gets an error of its own, and exit code 1 at the end.
///
/// # Errors
/// When the file cannot be read or the output not be written.
pub fn run(
    path: &Path,
    loaded: &Loaded,
    context: &Context<'_>,
    json: bool,
    expect: Option<Expectation>,
) -> anyhow::Result<ExitCode> {
    let mut lines = Lines::open(path)?;
    let job = Job { loaded, context, json, expect };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // What traces share with their simulator is counted, so that each thread does better with one of its own.
    let simulators: Vec<Simulator> = (0..threads).map(|_| Simulator::new(&loaded.state)).collect();
    let mut out = stdout().lock();
    let mut total = Done::default();
    loop {
        let block = lines.block(threads * CHUNK).with_context(|| format!("cannot read {}", path.display()))?;
        if block.is_empty() {
            break;
        }
        for done in work(&job, &simulators, &block)? {
            out.write_all(&done.out)?;
            (total.bad, total.unexpected) = (total.bad + done.bad, total.unexpected + done.unexpected);
        }
    }
    out.flush()?;
    loaded.complain(context.verbose);
    Ok(finish(&total, expect))
}

fn finish(total: &Done, expect: Option<Expectation>) -> ExitCode {
    if total.bad > 0 {
        eprintln!("porttrace: {} lines of the batch are no packets", total.bad);
        return ExitCode::FAILURE;
    }
    if let Some(expect) = expect.filter(|_| total.unexpected > 0) {
        eprintln!("porttrace: expected {expect}, but {} packets do otherwise", total.unexpected);
        return ExitCode::from(UNEXPECTED);
    }
    ExitCode::SUCCESS
}

/// Cuts a block into one piece for each thread; the answers come back in order.
fn work(job: &Job<'_>, simulators: &[Simulator], block: &[(u64, Vec<u8>)]) -> anyhow::Result<Vec<Done>> {
    let piece = block.len().div_ceil(simulators.len()).max(1);
    std::thread::scope(|scope| {
        let pieces = block.chunks(piece).zip(simulators);
        let threads: Vec<_> =
            pieces.map(|(piece, simulator)| scope.spawn(move || answer_all(job, simulator, piece))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Done>| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread of the batch broke off"))
        };
        threads.into_iter().map(join).collect()
    })
}

fn answer_all(job: &Job<'_>, simulator: &Simulator, piece: &[(u64, Vec<u8>)]) -> Done {
    let mut done = Done::default();
    for (number, line) in piece {
        if let Err(error) = answer(job, simulator, *number, line, &mut done) {
            done.bad += 1;
            if job.json {
                let _ = serde_json::to_writer(&mut done.out, &json::BadLine::new(*number, &error));
                done.out.push(b'\n');
            } else {
                let _ = writeln!(done.out, "line {number}: {error}");
            }
        }
    }
    done
}

fn answer(job: &Job<'_>, simulator: &Simulator, number: u64, line: &[u8], done: &mut Done) -> Result<(), String> {
    let packet = parse(line, job)?;
    let mut trace = simulator.trace(&packet);
    trace.assumptions.extend(job.loaded.missing_for(packet.tuple.family()));
    done.unexpected += u64::from(job.expect.is_some_and(|expect| !expect.holds(&trace)));
    if job.json {
        serde_json::to_writer(&mut done.out, &json::Answer::new(&trace, Some(number)))
            .map_err(|error| error.to_string())?;
        done.out.push(b'\n');
    } else {
        done.out.extend_from_slice(trace::headline(&trace, job.context).as_bytes());
    }
    Ok(())
}

fn parse(line: &[u8], job: &Job<'_>) -> Result<Packet, String> {
    if line.len() > LONGEST {
        return Err(format!("longer than {} KiB: no packet", LONGEST >> 10));
    }
    let Line { src, sport, dst, dport, proto, input, mark, mac, uid, gid } =
        serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let tuple = match (proto.has_ports(), sport, dport) {
        (true, Some(sport), Some(dport)) => Tuple { proto, src, sport, dst, dport },
        (true, ..) => return Err(format!("{proto} needs sport and dport")),
        (false, None | Some(0), None | Some(0)) => Tuple { proto, src, sport: 0, dst, dport: 0 },
        (false, ..) => return Err(format!("{proto} has no ports")),
    };
    packet::check(&tuple, input.as_deref(), &job.loaded.state)?;
    let mut packet = Packet::first_of(tuple, input.map(Into::into));
    packet.mark = mark;
    let mac = mac.map(|text| words::mac(&text).ok_or_else(|| format!("{text:?} is no MAC address"))).transpose()?;
    packet.sender = packet::sender(mac, uid, gid, &packet)?;
    Ok(packet)
}

/// Numbered lines of a file or of standard input; empty ones are passed over.
struct Lines {
    input: Box<dyn BufRead>,
    number: u64,
}

impl Lines {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let input: Box<dyn BufRead> = if path == Path::new("-") {
            Box::new(stdin().lock())
        } else {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            Box::new(BufReader::with_capacity(1 << 20, file))
        };
        Ok(Self { input, number: 0 })
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
