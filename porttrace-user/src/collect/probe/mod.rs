//! The eBPF probe: what the kernel really does with the packets of the watched ports, as events.
//!
//! All of aya stays in this folder. A [`Probe`] belongs to the network namespace of the thread that starts it; everything
//! that it attaches vanishes with it.

mod adopt;
mod attach;
mod btf;
mod clsact;
mod config;
mod foreign;
mod kernel_log;
mod late;
mod mapping;
mod object;
mod offsets;
mod ports;
mod rights;
mod ring;
mod sys;
mod tc;
mod tracked;
mod trials;

pub use config::{Backend, ConntrackBackend, Lost, ProbeConfig, ProbeError, ProbeInfo, Protos, TcMode};

pub use clsact::sweep as remove_leftovers;
pub use foreign::programs as foreign_programs;
pub use trials::{capabilities, trials};

use super::ctnetlink::older::Older;
use super::links::{LinkChange, LinkWatcher};
use crate::core::model::event::{DecodeError, Event};
use crate::core::model::flow::{Proto, Tuple};
use adopt::adopt_older;
use attach::{Observed, OnInterfaces, attach_interface, attach_tracepoints, observe_conntrack};
use aya::maps::{MapData, PerCpuArray};
use kernel_log::KernelLog;
use late::Late;
use nix::time::{ClockId, clock_gettime};
use object::{Kernel, chain};
use offsets::{KernelTypes, kernel_types};
use ports::Ports;
use porttrace_ebpf::{self as wire, Kind, WireTuple};
use ring::Ring;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};
use tc::Attachments;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Interval, MissedTickBehavior, interval};

/// How often the ring buffer is looked into: the kernel side wakes nobody for a single event.
const LOOK: Duration = Duration::from_millis(10);
/// Interfaces attached by one call of [`Probe::read`]: with tcx the kernel waits for two grace periods of RCU for each
/// (`tcx_entry_sync`, include/net/tcx.h), some 16 ms in all, and meanwhile nobody reads events.
const ATTACHED_AT_ONCE: usize = 2;
/// Events handed out by one call of [`Probe::read`], at most.
const BATCH: usize = 4096;

/// The running probe; dropping it detaches everything.
pub struct Probe {
    info: ProbeInfo,
    ring: AsyncFd<Ring>,
    looks: Interval,
    /// The last call of `read` left something.
    has_more: bool,
    ring_lost: PerCpuArray<MapData, u64>,
    links: LinkWatcher,
    attachments: Attachments,
    changes: Vec<LinkChange>,
    /// Interfaces that came and could not be attached, a sentence each.
    refusals: Vec<String>,
    /// Changes that are not taken care of yet.
    pending: VecDeque<LinkChange>,
    kernel: Kernel,
    log: Option<KernelLog>,
    /// With [`ConntrackBackend::Ctnetlink`].
    late: Option<Late>,
    /// With hooks at functions that run for new entries only.
    older: Older,
    clock_offset_ns: i64,
}

impl Probe {
    /// Loads and attaches everything in the network namespace of the calling thread. Needs a tokio runtime with I/O
    /// (for the readiness of its descriptors); does not spawn.
    pub fn start(config: &ProbeConfig) -> Result<Self, ProbeError> {
        let began = Instant::now();
        if config.ports.is_empty() {
            return Err(ProbeError::NoPort);
        }
        rights::check()?;
        let mut degradations = Vec::new();
        let types = kernel_types().map_err(|error| chain(&error));
        let netns = own_netns()?;
        let empty = KernelTypes::default();
        let known = types.as_ref().unwrap_or(&empty);
        let without_types = types.as_ref().err().map(String::as_str);
        let Observed { mut kernel, interfaces, backend: conntrack_backend, listener } =
            observe_conntrack(config, known, netns, without_types, &mut degradations)?;
        let OnInterfaces { links, attachments, refusals } = interfaces;
        let late = match listener {
            Some(listener) => Some(Late::new(listener, &mut kernel, config, netns, &mut degradations)?),
            None => None,
        };
        let (drops, resets) = attach_tracepoints(&mut kernel, without_types, &mut degradations);
        degradations.extend(refusals);
        let ports = Ports::of(&mut kernel)?;
        ports.watch(config);
        let older = match conntrack_backend {
            ConntrackBackend::Fentry | ConntrackBackend::Kprobe => {
                Older::new(netns, adopt_older(config, &kernel.tracked()?, &ports, &mut degradations))
            }
            _ => Older::default(),
        };
        let info = ProbeInfo {
            conntrack_backend,
            tc: attachments.mode(),
            netns,
            interfaces: attachments.count(),
            drops,
            resets,
            start_time: began.elapsed(),
            degradations,
        };
        let log = if config.kernel_log { Some(KernelLog::of(kernel.classifiers()?[0])?) } else { None };
        let mut probe = Self::assemble(kernel, info, links, attachments, log, late)?;
        probe.older = older;
        Ok(probe)
    }

    pub const fn info(&self) -> &ProbeInfo {
        &self.info
    }

    /// Waits until there may be events (or an interface came or went, which is taken care of here), appends up to some
    /// thousand to `out` and returns how many; may be 0. Safe to cancel.
    pub async fn read(&mut self, out: &mut Vec<Event>) -> Result<usize, ProbeError> {
        if self.late.is_some() {
            return self.read_late(out).await;
        }
        tokio::select! {
            biased;
            changes = self.links.changed() => self.pending.extend(changes?),
            () = std::future::ready(()), if self.has_more || !self.pending.is_empty() => {}
            guard = self.ring.readable() => {
                guard.map_err(|error| ProbeError::Io { what: "waiting for events", error })?.clear_ready();
            }
            _ = self.looks.tick() => {}
        }
        self.follow_some();
        let before = out.len();
        self.has_more = !drain(self.ring.get_mut(), &mut self.older, out)?;
        Ok(out.len() - before)
    }

    /// What there is now, without waiting. What is held back for something that might still come stays so.
    pub fn read_now(&mut self, out: &mut Vec<Event>) -> Result<usize, ProbeError> {
        if self.late.is_some() {
            return self.gather_due(out);
        }
        let before = out.len();
        while !drain(self.ring.get_mut(), &mut self.older, out)? {}
        Ok(out.len() - before)
    }

    /// How long after something happened [`Probe::read_now`] is sure to have it.
    pub const fn held_back(&self) -> Duration {
        if self.late.is_some() { late::MARGIN } else { Duration::ZERO }
    }

    /// The last look before the end: everything that there is, whatever might still belong to it.
    pub fn read_rest(&mut self, out: &mut Vec<Event>) -> Result<usize, ProbeError> {
        if self.late.is_some() { self.gather_rest(out) } else { self.read_now(out) }
    }

    /// Interfaces that came, went or changed their name since the last call.
    pub fn link_changes(&mut self) -> Vec<LinkChange> {
        std::mem::take(&mut self.changes)
    }

    /// What is not seen of interfaces that came since the last call, a sentence each.
    pub fn refusals(&mut self) -> Vec<String> {
        std::mem::take(&mut self.refusals)
    }

    /// Name of an interface that is or was there.
    pub fn interface_name(&self, index: u32) -> Option<&str> {
        self.links.names().get(&index).map(String::as_str)
    }

    /// Names by index of the interfaces that are there now.
    pub const fn present_interfaces(&self) -> &BTreeMap<u32, String> {
        self.links.present()
    }

    /// Names by index of all interfaces that are or were there.
    pub const fn interface_names(&self) -> &BTreeMap<u32, String> {
        self.links.names()
    }

    pub fn lost(&self) -> Result<Lost, ProbeError> {
        let ring_full = self.ring_lost.get(&0, 0).map_err(|error| map_error("LOST", &error))?.iter().sum();
        let left_out = self.kernel.left_out();
        let left_out = left_out.map_err(|error| ProbeError::Io { what: "asking what was left out", error })?;
        Ok(Lost { ring_full, conntrack_full: self.conntrack_dropped()?, left_out })
    }

    /// Name of the `reason` of a [`Kind::Dropped`] (`NETFILTER_DROP`, `NO_SOCKET`, …) or [`Kind::ResetSent`] event, as the
    /// running kernel calls it.
    pub fn reason_name(&self, kind: Kind, reason: u32) -> Option<&str> {
        let types = self.kernel.types();
        let names = match kind {
            Kind::Dropped => &types.drop_reasons,
            Kind::ResetSent => &types.reset_reasons,
            _ => return None,
        };
        names.get(&reason).map(String::as_str)
    }

    /// The kernel side's own log lines since the last call; none unless [`ProbeConfig::kernel_log`] is set.
    pub fn kernel_log(&mut self) -> Vec<String> {
        self.log.as_mut().map(KernelLog::take).unwrap_or_default()
    }

    /// Nanoseconds to add to an event's time (CLOCK_MONOTONIC) for the time since 1970, as of the start.
    pub const fn clock_offset_ns(&self) -> i64 {
        self.clock_offset_ns
    }

    fn assemble(
        mut kernel: Kernel,
        info: ProbeInfo,
        links: LinkWatcher,
        attachments: Attachments,
        log: Option<KernelLog>,
        late: Option<Late>,
    ) -> Result<Self, ProbeError> {
        let ring = kernel.take_ring()?;
        // SAFETY: the map owns its descriptor, which stays the same until the ring is dropped.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }
            .map_err(|error| ProbeError::Io { what: "polling the ring buffer", error: error.into() })?;
        let ring_lost = PerCpuArray::try_from(kernel.take_map("LOST")?).map_err(|error| map_error("LOST", &error))?;
        // The first time this reads how many CPUs there are, which a node that runs out of descriptors refuses later.
        ring_lost.get(&0, 0).map_err(|error| map_error("LOST", &error))?;
        let clock_offset_ns = clock_offset()?;
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let has_more = false;
        Ok(Self {
            info,
            ring,
            looks,
            has_more,
            ring_lost,
            links,
            attachments,
            changes: Vec::new(),
            refusals: Vec::new(),
            pending: VecDeque::new(),
            kernel,
            log,
            late,
            older: Older::default(),
            clock_offset_ns,
        })
    }

    /// Takes care of the oldest changes. An interface that refuses our programs costs its sightings, not the whole watch.
    fn follow_some(&mut self) {
        let mut attached = 0;
        while attached < ATTACHED_AT_ONCE
            && let Some(change) = self.pending.pop_front()
        {
            match &change {
                LinkChange::Added { index, name } => {
                    attached += 1;
                    if let Err(error) = attach_interface(&self.kernel, &mut self.attachments, *index, name) {
                        self.refusals.push(format!("packets at {name} are not seen: {error}"));
                    }
                }
                LinkChange::Removed { index, .. } => self.attachments.detach(*index),
                LinkChange::Renamed { .. } => {}
            }
            self.changes.push(change);
        }
    }
}

/// Moves events out of the ring buffer; `true` when it is empty now.
fn drain(ring: &mut Ring, older: &mut Older, out: &mut Vec<Event>) -> Result<bool, ProbeError> {
    drain_some(ring, |event, _| {
        out.extend(older.before(&event));
        out.push(event);
    })
}

/// Moves all events out of the ring buffer; those at a predicted address are marked.
fn drain_all(ring: &mut Ring, mut take: impl FnMut(Event, bool)) -> Result<(), ProbeError> {
    while !drain_some(ring, &mut take)? {}
    Ok(())
}

fn drain_some(ring: &mut Ring, mut take: impl FnMut(Event, bool)) -> Result<bool, ProbeError> {
    ring.read(BATCH, |record| {
        let (head, whole) = wire::Event::in_record(record).ok_or(DecodeError::Size { found: record.len() })?;
        take(Event::decode(head, whole)?, head.flags & wire::PREDICTED != 0);
        Ok(())
    })
}

fn missing_map(name: &str) -> ProbeError {
    ProbeError::Load { what: format!("map {name}"), why: "it is not in the object".into() }
}

fn map_error(name: &str, error: &dyn std::error::Error) -> ProbeError {
    ProbeError::Load { what: format!("map {name}"), why: chain(error) }
}

fn own_netns() -> Result<u32, ProbeError> {
    let what = "reading /proc/thread-self/ns/net";
    let metadata = std::fs::metadata("/proc/thread-self/ns/net").map_err(|error| ProbeError::Io { what, error })?;
    u32::try_from(metadata.ino()).map_err(|error| ProbeError::Io { what, error: io::Error::other(error) })
}

fn clock_offset() -> Result<i64, ProbeError> {
    Ok(clock(ClockId::CLOCK_REALTIME)? - clock(ClockId::CLOCK_MONOTONIC)?)
}

fn monotonic_ns() -> Result<u64, ProbeError> {
    clock(ClockId::CLOCK_MONOTONIC).map(i64::unsigned_abs)
}

fn clock(clock: ClockId) -> Result<i64, ProbeError> {
    clock_gettime(clock)
        .map(|time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
        .map_err(|error| ProbeError::Io { what: "reading the clock", error: error.into() })
}

fn wire_tuple(tuple: &Tuple) -> WireTuple {
    WireTuple {
        src: wire_bytes(tuple.src),
        dst: wire_bytes(tuple.dst),
        sport: tuple.sport.to_be_bytes(),
        dport: tuple.dport.to_be_bytes(),
        proto: Proto::number(tuple.proto),
        family: if tuple.dst.is_ipv4() { 4 } else { 6 },
        pad: [0; 2],
    }
}

fn wire_bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&address.octets());
            bytes
        }
        IpAddr::V6(address) => address.octets(),
    }
}
