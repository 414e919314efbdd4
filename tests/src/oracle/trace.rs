//! The kernel's own rule trace: for each packet, which rules of which chains it matched, in order.
//!
//! iptables-nft (and native nftables): the trace messages of nf_tables (`net/netfilter/nf_tables_trace.c`), switched on by a
//! table of our own that only sets the trace bit. iptables-legacy: `-j TRACE` rules in the raw table, whose log lines
//! (`net/ipv4/netfilter/ip_tables.c`, `trace_packet`) are read through nfnetlink_log. Both reach the reader's socket while
//! the packet is being handled: when a client has its answer, the steps of its packets are there.

use super::{nflog::NflogTrace, nftrace::NftTrace};
use crate::lab::rules::{IptablesFlavour, Tools};
use crate::netns::Netns;
use anyhow::Result;
use porttrace_user::core::model::flow::{Family, Proto, Tuple};

/// Which packets to trace: those of both families that enter the namespace or are sent by it, and fit.
#[derive(Clone, Copy, Debug)]
pub struct TraceFilter {
    pub proto: Proto,
    /// Destination port before any rewrite.
    pub dport: Option<u16>,
    /// TCP: SYNs only, so that a connection is traced once.
    pub first_only: bool,
}

impl TraceFilter {
    /// First packets to one port.
    pub const fn first_to(proto: Proto, dport: u16) -> Self {
        Self { proto, dport: Some(dport), first_only: true }
    }
}

/// Where in a chain a step was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// A rule that matched; 1-based, as `iptables -L --line-numbers` counts.
    Rule(u32),
    /// The policy of a base chain.
    Policy,
    /// The end of a user chain. Legacy iptables reports an explicit `-j RETURN` without any match so too.
    Return,
    /// A rule that is no longer there, or not yet known: its nf_tables handle ([`RuleTrace::reread_rules`]).
    Handle(u64),
}

/// What a matched rule or a policy decided; legacy iptables does not tell.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Decided {
    Accept,
    Drop,
    Continue,
    Jump(String),
    Goto(String),
    Return,
    /// Queued, stolen, …, by number.
    Other(i32),
}

/// One step of one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub family: Family,
    pub table: String,
    pub chain: String,
    pub place: Place,
    /// The packet as it was when it entered the base chain.
    pub tuple: Tuple,
    /// Interface indices at the hook; `None` where there is none.
    pub input: Option<u32>,
    pub output: Option<u32>,
    /// `skb->mark` after the step.
    pub mark: u32,
    pub decided: Option<Decided>,
}

/// `nat:KUBE-SERVICES:rule:4`, as the kernel's log writes it.
impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:", self.table, self.chain)?;
        match self.place {
            Place::Rule(number) => write!(f, "rule:{number}"),
            Place::Policy => write!(f, "policy"),
            Place::Return => write!(f, "return"),
            Place::Handle(handle) => write!(f, "handle:{handle}"),
        }
    }
}

/// A running trace. Dropping it stops the reading; its rules go with the namespace.
pub struct RuleTrace {
    reader: Reader,
    steps: Vec<Step>,
}

enum Reader {
    Nft(NftTrace),
    Legacy(NflogTrace),
}

impl RuleTrace {
    /// Starts to trace in a namespace of the lab. Changes its rules: a table `inet ptl_trace`, or `-j TRACE` in legacy raw tables.
    pub fn start(netns: &Netns, tools: &Tools, flavour: IptablesFlavour, filter: TraceFilter) -> Result<Self> {
        Self::start_many(netns, tools, flavour, &[filter])
    }

    /// As [`RuleTrace::start`], for packets that fit any of several filters.
    pub fn start_many(netns: &Netns, tools: &Tools, flavour: IptablesFlavour, filters: &[TraceFilter]) -> Result<Self> {
        let reader = match flavour {
            IptablesFlavour::Nft => Reader::Nft(NftTrace::start(netns, filters)?),
            IptablesFlavour::Legacy => Reader::Legacy(NflogTrace::start(netns, tools, filters)?),
        };
        Ok(Self { reader, steps: Vec::new() })
    }

    /// All steps since the start.
    ///
    /// # Errors
    /// When the kernel had to throw messages away: what is there is then not the whole truth.
    pub fn steps(&mut self) -> Result<&[Step]> {
        let new = match &mut self.reader {
            Reader::Nft(reader) => reader.drain()?,
            Reader::Legacy(reader) => reader.drain()?,
        };
        self.steps.extend(new);
        Ok(&self.steps)
    }

    /// The steps of packets from this client socket (protocol, source address, source port), in order.
    pub fn steps_from(&mut self, proto: Proto, source: std::net::SocketAddr) -> Result<Vec<Step>> {
        let fits = |step: &&Step| step.tuple.proto == proto && step.tuple.source() == source;
        Ok(self.steps()?.iter().filter(fits).cloned().collect())
    }

    /// Forgets the steps so far.
    pub fn clear(&mut self) -> Result<()> {
        self.steps()?;
        self.steps.clear();
        Ok(())
    }

    /// Reads the rules' numbers again, after a change of the rules. Steps that were drained keep the numbers of their time.
    pub fn reread_rules(&mut self) -> Result<()> {
        self.steps()?;
        match &mut self.reader {
            Reader::Nft(reader) => reader.reread_rules(),
            Reader::Legacy(_) => Ok(()),
        }
    }
}
