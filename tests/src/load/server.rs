//! Servers that do as little as possible: take a connection or datagram, note whom they saw, let go.

use crate::netns::Netns;
use crate::peer::{Served, Transport};
use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::net::{SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Threads that accept on one TCP port.
const ACCEPTORS: usize = 2;
/// Connections that each of them keeps before it closes the oldest: their clients reset them, and shall be the first to.
const HELD: usize = 256;
/// As many as the kernel lets wait (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;
/// Room for datagrams that are not read yet.
const RECEIVE_BYTES: usize = 64 << 20;
/// How long a server that has nothing to do looks away, at first and at most.
const NAPS: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(8)];

/// What a server does with what it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Note every client.
    Log,
    /// Only count.
    Count,
}

/// Servers that share one log; they end when this is dropped.
pub struct Servers {
    shared: Arc<Shared>,
    mode: Mode,
    threads: Vec<Server>,
}

/// One thread of a server.
pub type Server = JoinHandle<Result<()>>;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Accepted connections are read to their ends.
    reads: AtomicBool,
    connections: AtomicU64,
    datagrams: AtomicU64,
    bytes: AtomicU64,
    log: Mutex<Vec<Served>>,
}

impl Servers {
    pub fn new(mode: Mode) -> Self {
        Self { shared: Arc::default(), mode, threads: Vec::new() }
    }

    /// Accepts TCP connections at an address of this namespace.
    pub fn tcp(&mut self, netns: &Netns, at: SocketAddrV4) -> Result<()> {
        let listener = netns.run_in(|| listener(at))?.with_context(|| format!("listening on {at}"))?;
        for _ in 0..ACCEPTORS {
            let (listener, shared, mode) = (listener.try_clone()?, self.shared.clone(), self.mode);
            self.threads.push(thread::spawn(move || shared.accept(&listener, at, mode)));
        }
        Ok(())
    }

    /// Takes datagrams at an address of this namespace; answers none.
    pub fn udp(&mut self, netns: &Netns, at: SocketAddrV4) -> Result<()> {
        let socket = netns.run_in(|| receiver(at))?.with_context(|| format!("binding udp {at}"))?;
        let (shared, mode) = (self.shared.clone(), self.mode);
        self.threads.push(thread::spawn(move || shared.receive(&socket, at, mode)));
        Ok(())
    }

    /// From now on accepted connections are read to their ends, one at a time on each thread.
    pub fn read_connections(&self, yes: bool) {
        self.shared.reads.store(yes, Ordering::Release);
    }

    /// Connections taken so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Acquire)
    }

    /// Datagrams taken so far.
    pub fn datagrams(&self) -> u64 {
        self.shared.datagrams.load(Ordering::Acquire)
    }

    /// Both.
    pub fn served(&self) -> u64 {
        self.connections() + self.datagrams()
    }

    /// Bytes read from connections so far.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Acquire)
    }

    /// What was noted so far, in no order.
    pub fn log(&self) -> Vec<Served> {
        self.shared.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("a server of the load ended early: {error:#}"),
                Err(_) => eprintln!("a server of the load panicked"),
            }
        }
    }
}

impl Shared {
    fn accept(&self, listener: &TcpListener, local: SocketAddrV4, mode: Mode) -> Result<()> {
        let mut held = VecDeque::new();
        let mut nap = Nap::default();
        while !self.stop.load(Ordering::Acquire) {
            match listener.accept() {
                Ok((stream, saw)) => {
                    nap = Nap::default();
                    self.note(Transport::Tcp, saw, local, mode);
                    self.connections.fetch_add(1, Ordering::AcqRel);
                    if self.reads.load(Ordering::Acquire) {
                        self.read(stream);
                        continue;
                    }
                    held.push_back(stream);
                    if held.len() > HELD {
                        held.pop_front();
                    }
                }
                Err(error) if is_pause(&error) => nap.take(),
                // A reset that came first is the client's own way to close.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error).context("accepting"),
            }
        }
        Ok(())
    }

    /// To its end; an error ends it too.
    fn read(&self, mut stream: TcpStream) {
        let mut buffer = vec![0; 1 << 18];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return,
                Ok(read) => self.bytes.fetch_add(read as u64, Ordering::AcqRel),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
        }
    }

    fn receive(&self, socket: &UdpSocket, local: SocketAddrV4, mode: Mode) -> Result<()> {
        let mut buffer = [0; 2048];
        let mut nap = Nap::default();
        while !self.stop.load(Ordering::Acquire) {
            match socket.recv_from(&mut buffer) {
                Ok((_, saw)) => {
                    nap = Nap::default();
                    self.note(Transport::Udp, saw, local, mode);
                    self.datagrams.fetch_add(1, Ordering::AcqRel);
                }
                Err(error) if is_pause(&error) => nap.take(),
                Err(error) => return Err(error).context("receiving"),
            }
        }
        Ok(())
    }

    fn note(&self, proto: Transport, saw: std::net::SocketAddr, local: SocketAddrV4, mode: Mode) {
        if mode == Mode::Log {
            let served = Served { proto, saw, local: local.into() };
            self.log.lock().unwrap_or_else(PoisonError::into_inner).push(served);
        }
    }
}

/// How long to look away next: twice as long each time. Nobody wakes a server: what that costs the sender depends on whether it
/// just slept, so that a sender which is a little slower pays much more.
struct Nap(Duration);

impl Default for Nap {
    fn default() -> Self {
        Self(NAPS[0])
    }
}

impl Nap {
    fn take(&mut self) {
        thread::sleep(self.0);
        self.0 = NAPS[1].min(2 * self.0);
    }
}

/// Nothing is there, or a signal came.
fn is_pause(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn listener(at: SocketAddrV4) -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn receiver(at: SocketAddrV4) -> Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    socket.bind(&at.into())?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BYTES).context("enlarging the receive buffer")?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}
