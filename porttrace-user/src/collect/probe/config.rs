//! What to watch, what runs, what went wrong, what was lost.

use crate::collect::links::LinkError;
use crate::core::model::event::DecodeError;
use porttrace_ebpf as wire;
use std::time::Duration;
use std::{fmt, io};
use thiserror::Error;

/// Default size of the ring buffer: 36,000 to 61,000 events.
pub const RING_BYTES: u32 = 8 << 20;
/// Default number of tuples that the kernel side remembers, each with its inverse.
const TRACKED: u32 = 32_768;

/// Which conntrack hooks to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// NETFILTER programs where they load, else fentry programs, else kprobes, else conntrack's events, else none.
    #[default]
    Auto,
    Netfilter,
    /// Programs that the kernel calls where conntrack's functions begin.
    Fentry,
    Kprobe,
    /// Conntrack's own events, and packets at addresses that the rules predict.
    Ctnetlink,
    /// TC alone: rewrites are not observed.
    TcOnly,
}

/// The conntrack hooks that run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConntrackBackend {
    Netfilter,
    Fentry,
    Kprobe,
    Ctnetlink,
    None,
}

impl fmt::Display for ConntrackBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Netfilter => "NETFILTER programs",
            Self::Fentry => "fentry programs",
            Self::Kprobe => "kprobes",
            Self::Ctnetlink => "conntrack's events (ctnetlink)",
            Self::None => "none",
        })
    }
}

/// How the TC programs hang on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcMode {
    /// BPF links (Linux 6.6 and later).
    Tcx,
    /// Filters of a clsact queueing discipline.
    Clsact,
}

impl fmt::Display for TcMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        })
    }
}

/// The protocols whose ports are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protos {
    pub tcp: bool,
    pub udp: bool,
    pub sctp: bool,
}

impl Protos {
    pub const ALL: Self = Self { tcp: true, udp: true, sctp: true };

    pub(super) const fn bits(self) -> u8 {
        let mut bits = 0;
        if self.tcp {
            bits |= wire::PORT_TCP;
        }
        if self.udp {
            bits |= wire::PORT_UDP;
        }
        if self.sctp {
            bits |= wire::PORT_SCTP;
        }
        bits
    }
}

/// What to watch, and how.
#[derive(Clone, Debug)]
pub struct ProbeConfig {
    /// Destination ports of the connections to watch, as the opener addresses them.
    pub ports: Vec<u16>,
    pub protos: Protos,
    pub backend: Backend,
    /// How to attach to interfaces; `None`: tcx where the kernel has it, clsact otherwise.
    pub tc: Option<TcMode>,
    /// Size of the ring buffer; raised to a power of two of pages.
    pub ring_bytes: u32,
    /// Tuples that the kernel side remembers at once (one or two a connection; about the least recently seen goes first).
    pub tracked: u32,
    /// Show packets with payload of open TCP connections too, the first few of each; otherwise they are only counted.
    pub data: bool,
    /// The kernel side's own log lines, for debugging; see [`Probe::kernel_log`].
    pub kernel_log: bool,
}

impl ProbeConfig {
    pub fn new(ports: impl IntoIterator<Item = u16>) -> Self {
        Self {
            ports: ports.into_iter().collect(),
            protos: Protos::ALL,
            backend: Backend::Auto,
            tc: None,
            ring_bytes: RING_BYTES,
            tracked: TRACKED,
            data: true,
            kernel_log: false,
        }
    }
}

/// What runs, and what is missing.
#[derive(Clone, Debug)]
pub struct ProbeInfo {
    pub conntrack_backend: ConntrackBackend,
    pub tc: TcMode,
    /// Network namespace inode number.
    pub netns: u32,
    /// Interfaces with TC programs at start.
    pub interfaces: usize,
    /// `tp_btf/kfree_skb` runs: drops are seen.
    pub drops: bool,
    /// `tp_btf/tcp_send_reset` runs.
    pub resets: bool,
    /// From the call of [`Probe::start`] until it was ready.
    pub start_time: Duration,
    /// Each a sentence: what is lost, and why. Grows when an interface that comes later refuses the TC programs.
    pub degradations: Vec<String>,
}

#[derive(Debug, Error)]
pub enum ProbeError {
    #[error("the probe needs {missing}, which this process does not have: run porttrace with sudo")]
    Rights { missing: String },
    #[error("no port to watch")]
    NoPort,
    #[error("cannot load {what}: {why}")]
    Load { what: String, why: String },
    #[error("--conntrack-backend {backend} cannot run here: {why}")]
    Backend { backend: &'static str, why: String },
    #[error("cannot attach to interface {name}: {error}")]
    Attach { name: String, error: io::Error },
    #[error("the TC programs run on no interface: {why}")]
    NoInterface { why: String },
    #[error(transparent)]
    Links(#[from] LinkError),
    #[error("an event from the kernel: {0}")]
    Decode(#[from] DecodeError),
    #[error("{what}: {error}")]
    Io { what: &'static str, error: io::Error },
}

/// Counts of what did not reach user space, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Events for which the ring buffer had no room.
    pub ring_full: u64,
    /// Conntrack's events that the kernel could not queue.
    pub conntrack_full: u64,
    /// Runs of programs at kernel functions and tracepoints that the kernel left out because the program was already running on
    /// that CPU (`recursion_misses`). Which packet each was for is not known: it need not be one that is watched.
    pub left_out: u64,
}

impl Lost {
    /// Events that are known to be lost.
    pub const fn total(self) -> u64 {
        self.ring_full + self.conntrack_full
    }

    /// The sums of both.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            ring_full: self.ring_full + other.ring_full,
            conntrack_full: self.conntrack_full + other.conntrack_full,
            left_out: self.left_out + other.left_out,
        }
    }
}
