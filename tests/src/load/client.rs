//! Clients that open connections as fast as they can, or at a given rate.

use super::Servers;
use super::datagram::RawSender;
use crate::netns::Netns;
use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use porttrace_user::core::model::flow::{Proto, Tuple};
use socket2::{Domain, Socket, Type};
use std::io::{self, ErrorKind, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Connections that the servers have not taken yet, at most: beyond it their queues would run over.
const WINDOW: u64 = 1024;
/// How long the servers may take to come back below it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Connections from each of these ports in turn, again and again: TCP is opened and reset, UDP is one datagram without an answer.
#[derive(Clone, Debug)]
pub struct Batch {
    pub proto: Proto,
    pub from: Ipv4Addr,
    pub ports: Range<u16>,
    pub to: SocketAddrV4,
}

/// When it is enough.
#[derive(Clone, Copy, Debug)]
pub enum Until<'a> {
    /// Every port of the batch was used so often.
    Rounds(u32),
    /// This moment has come.
    Time(Instant),
    /// Somebody says so.
    Told(&'a AtomicBool),
}

/// How fast.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    AsFastAsPossible,
    /// Connections per second, all clients together.
    Rate(f64),
}

/// What was made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Made {
    pub connections: u64,
    pub took: Duration,
}

impl Made {
    /// Connections per second.
    pub fn rate(&self) -> f64 {
        self.connections as f64 / self.took.as_secs_f64().max(1e-9)
    }
}

impl Batch {
    /// The original tuple of the connection from `port`.
    pub fn tuple(&self, port: u16) -> Tuple {
        Tuple::new(self.proto, (self.from, port).into(), self.to.into())
    }

    /// Cuts the ports in `count` parts, one a client.
    pub fn split(&self, count: u16) -> Vec<Self> {
        let length = self.ports.end - self.ports.start;
        let edge = |part: u16| self.ports.start + (u32::from(length) * u32::from(part) / u32::from(count)) as u16;
        (0..count).map(|part| Self { ports: edge(part)..edge(part + 1), ..self.clone() }).collect()
    }
}

/// Runs one client for each batch, all at once, in a namespace.
///
/// # Errors
/// A connection was refused or not answered, or the servers do not keep up: what was made is then not known.
pub fn make(netns: &Netns, batches: &[Batch], until: Until<'_>, pace: Pace, servers: &Servers) -> Result<Made> {
    let (before, made) = (servers.served(), AtomicU64::new(0));
    let start = Instant::now();
    let clients = batches.len() as u32;
    thread::scope(|scope| {
        let threads: Vec<_> = batches
            .iter()
            .enumerate()
            .map(|(number, batch)| {
                let turn = Turn { start, clients, pace, until, done: 0 };
                let (made, behind) = (&made, || made.load(Ordering::Acquire).saturating_sub(servers.served() - before));
                scope.spawn(move || {
                    // Where each connection counts, its reset must not overtake the handshake's last ACK, which waits on another CPU:
                    // the server then never has the connection, and conntrack, which saw an ACK last, takes the next one from
                    // this port for the same (`nf_conntrack_tcp_packet` in net/netfilter/nf_conntrack_proto_tcp.c).
                    if matches!(until, Until::Rounds(_)) {
                        stay_on_one_cpu(number)?;
                    }
                    netns.run_in(|| client(batch, turn, made, &behind))?
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    Ok(Made { connections: made.into_inner(), took: start.elapsed() })
}

/// Sends bytes over one connection for the given time; the bytes that the servers read, per second. They must read.
pub fn stream(netns: &Netns, to: SocketAddr, duration: Duration, servers: &Servers) -> Result<f64> {
    netns.run_in(|| {
        let mut stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
        let (before, start) = (servers.bytes(), Instant::now());
        let block = vec![0x55; 1 << 17];
        while start.elapsed() < duration {
            stream.write_all(&block)?;
        }
        Ok((servers.bytes() - before) as f64 / start.elapsed().as_secs_f64())
    })?
}

/// A client's place among the others in time.
struct Turn<'a> {
    start: Instant,
    clients: u32,
    pace: Pace,
    until: Until<'a>,
    done: u64,
}

impl Turn<'_> {
    /// Waits for the next connection's time; `false` when it is enough.
    fn next(&mut self, ports: usize) -> bool {
        let over = match self.until {
            Until::Rounds(rounds) => self.done >= u64::from(rounds) * ports as u64,
            Until::Time(end) => Instant::now() >= end,
            Until::Told(stop) => stop.load(Ordering::Acquire),
        };
        if over {
            return false;
        }
        if let Pace::Rate(rate) = self.pace {
            let due = self.start + Duration::from_secs_f64(self.done as f64 * f64::from(self.clients) / rate);
            let left = due.saturating_duration_since(Instant::now());
            // A pause for every connection would be longer than asked for: those of a millisecond go together.
            if left > Duration::from_millis(1) {
                thread::sleep(left);
            }
        }
        self.done += 1;
        true
    }
}

fn client(batch: &Batch, mut turn: Turn<'_>, made: &AtomicU64, behind: &dyn Fn() -> u64) -> Result<()> {
    ensure!(!batch.ports.is_empty(), "a client without ports");
    let mut datagrams = (batch.proto == Proto::Udp).then(|| RawSender::new(batch.from, batch.to)).transpose()?;
    for port in batch.ports.clone().cycle() {
        if !turn.next(batch.ports.len()) {
            break;
        }
        match &mut datagrams {
            Some(sender) => sender.send(port)?,
            None => match connect(SocketAddrV4::new(batch.from, port), batch.to) {
                // A process that is being started beside us may still hold a copy of the port's last socket.
                Err(error) if is_in_use(&error) && !matches!(turn.until, Until::Rounds(_)) => continue,
                outcome => outcome.with_context(|| format!("connection {} from {port} to {}", turn.done, batch.to))?,
            },
        }
        made.fetch_add(1, Ordering::AcqRel);
        wait_for_servers(behind)?;
    }
    Ok(())
}

/// Keeps the calling thread on one of the CPUs that it may use; the number says on which.
pub fn stay_on_one_cpu(number: usize) -> Result<()> {
    let this_thread = Pid::from_raw(0);
    let allowed = sched_getaffinity(this_thread)?;
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect();
    let mut one = CpuSet::new();
    one.set(cpus[number % cpus.len()])?;
    sched_setaffinity(this_thread, &one).context("keeping a thread on one CPU")
}

/// Opens a connection and resets it, so that the port can be used again at once.
fn connect(from: SocketAddrV4, to: SocketAddrV4) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_linger(Some(Duration::ZERO))?;
    socket.bind(&from.into())?;
    socket.connect(&to.into())?;
    Ok(())
}

fn is_in_use(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable)
}

fn wait_for_servers(behind: &dyn Fn() -> u64) -> Result<()> {
    if behind() <= WINDOW {
        return Ok(());
    }
    let deadline = Instant::now() + PATIENCE;
    while behind() > WINDOW {
        if Instant::now() > deadline {
            bail!("the servers do not keep up: {} connections are not taken", behind());
        }
        thread::yield_now();
    }
    Ok(())
}
