//! The lab's servers and clients: real sockets that report whom they saw.

mod client;
mod server;

pub use client::{Connect, connect};
pub use server::{Serve, serve};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Transport protocol of a server or client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    Tcp,
    Udp,
}

/// How a connection attempt ended, as the client's socket told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The server answered.
    Ok,
    /// ECONNREFUSED: a RST, or an ICMP port unreachable.
    Refused,
    /// Nothing came within the time.
    Timeout,
    /// Something else; `detail` has it.
    Error,
}

/// What a client learned from one connection (TCP) or one datagram (UDP).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub proto: Transport,
    pub to: SocketAddr,
    pub result: Outcome,
    /// The error in words, where `result` is `error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The client's own address and port.
    pub local: SocketAddr,
    /// The client's address as the server saw it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saw: Option<SocketAddr>,
    /// The address at which the server got it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_local: Option<SocketAddr>,
    /// Who answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Bytes of the answer.
    pub bytes: u64,
    /// From the first packet to the end, milliseconds.
    pub ms: f64,
}

/// One request, as a server logs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    pub proto: Transport,
    pub saw: SocketAddr,
    pub local: SocketAddr,
}

/// The binary `lab-peer`: beside the running executable, or one directory up (test executables live in `deps/`).
pub fn binary() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    for directory in exe.ancestors().skip(1).take(2) {
        let candidate = directory.join("lab-peer");
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!("lab-peer is not beside {}: build it with `cargo build -p porttrace-tests --bins`", exe.display())
}

/// `pod=NAME saw=IP:PORT local=IP:PORT`, the first line of every answer.
fn greeting(pod: &str, saw: SocketAddr, local: SocketAddr) -> String {
    format!("pod={pod} saw={saw} local={local}\n")
}

/// Takes a [`greeting`] apart.
fn parse_greeting(text: &str) -> Option<(String, SocketAddr, SocketAddr)> {
    let line = text.lines().find(|line| line.starts_with("pod="))?;
    let mut fields = line.split(' ').map(|field| field.split_once('=').map(|(_, value)| value));
    Some((fields.next()??.to_owned(), fields.next()??.parse().ok()?, fields.next()??.parse().ok()?))
}

/// An IPv4-mapped address as IPv4.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
