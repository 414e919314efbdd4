//! The backend that learns of NAT from conntrack's events (ctnetlink): TC programs show packets at the addresses that the rules
//! predict, and [`Hold`] finds out which of them are of watched connections.

use super::adopt::{adopt, adopt_older};
use super::config::{ConntrackBackend, ProbeConfig, ProbeError};
use super::object::Kernel;
use super::ports::Ports;
use super::tracked::Tracked;
use super::{Probe, drain_all, map_error, monotonic_ns, wire_bytes};
use crate::collect::ctnetlink::hold::{Hold, Released};
use crate::collect::ctnetlink::{CtnetlinkError, Listener, Told};
use crate::core::model::event::Event;
use crate::core::model::flow::Proto;
use aya::maps::{HashMap, MapData};
use porttrace_ebpf::{Predicted, ROLE_IGNORED};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

/// A record may be reserved (and have its time) a moment before it can be read.
pub(super) const MARGIN: Duration = Duration::from_micros(200);
/// After a loss of conntrack's events, so long nothing is taken for sure that an event would tell.
const DOUBT_NS: u64 = 2_000_000_000;
/// Long after everything: nothing is held any more.
const END_NS: u64 = 3_600_000_000_000;

/// What this backend has beyond the others.
pub struct Late {
    listener: Listener,
    hold: Hold,
    tracked: Tracked,
    ports: Ports,
    told: Vec<Told>,
    predicted: BTreeSet<(Proto, SocketAddr)>,
    /// Packets at predicted addresses that no entry claimed.
    unclaimed: u64,
    /// Conntrack's events that were lost when it was last looked, and when their number grew.
    lost: u64,
    lost_ns: Option<u64>,
}

impl Late {
    /// Takes over a socket that already listens, and lets the kernel side know what conntrack knew before.
    pub fn new(
        listener: Listener,
        kernel: &mut Kernel,
        config: &ProbeConfig,
        netns: u32,
        degradations: &mut Vec<String>,
    ) -> Result<Self, ProbeError> {
        let (tracked, ports) = (kernel.tracked()?, Ports::of(kernel)?);
        let older = adopt_older(config, &tracked, &ports, degradations);
        let hold = Hold::new(&config.ports, netns, older);
        Ok(Self {
            listener,
            hold,
            tracked,
            ports,
            told: Vec::new(),
            predicted: BTreeSet::new(),
            unclaimed: 0,
            lost: 0,
            lost_ns: None,
        })
    }

    /// Whether an entry that would claim a packet of now may be among those that were lost.
    fn may_have_lost_claims(&mut self, now_ns: u64) -> Result<bool, ProbeError> {
        let lost = self.dropped()?;
        if lost != std::mem::replace(&mut self.lost, lost) {
            self.lost_ns = Some(now_ns);
        }
        Ok(self.lost_ns.is_some_and(|at| now_ns.saturating_sub(at) < DOUBT_NS))
    }

    /// Entries that the kernel could not queue.
    pub fn dropped(&self) -> Result<u64, ProbeError> {
        Ok(self.listener.dropped()?)
    }
}

impl Probe {
    /// Whether this probe can use [`Probe::predict`].
    pub const fn wants_predictions(&self) -> bool {
        self.late.is_some()
    }

    /// Says where the rules may send the watched connections, instead of what was said before. With this the first packet
    /// of a connection is seen behind its rewrite too, although conntrack's event comes later. Without effect with backends
    /// that observe rewrites themselves.
    pub fn predict(&mut self, targets: &BTreeSet<(Proto, SocketAddr)>) -> Result<(), ProbeError> {
        let Some(late) = &mut self.late else { return Ok(()) };
        let map = self.kernel.map_mut("PREDICTED")?;
        let mut map: HashMap<&mut MapData, PredictedKey, u8> =
            HashMap::try_from(map).map_err(|error| map_error("PREDICTED", &error))?;
        for gone in late.predicted.difference(targets) {
            // It may not have fitted in when it came.
            let _ = map.remove(&key(gone));
        }
        for new in targets.difference(&late.predicted) {
            map.insert(key(new), 1, 0).map_err(|error| map_error("PREDICTED", &error))?;
        }
        late.predicted.clone_from(targets);
        targets.iter().for_each(|(_, address)| late.ports.track(address.port()));
        Ok(())
    }

    /// As [`Probe::read`], with conntrack's events: both are looked for when it is time to look, so that neither wakes anybody.
    pub(super) async fn read_late(&mut self, out: &mut Vec<Event>) -> Result<usize, ProbeError> {
        tokio::select! {
            biased;
            changes = self.links.changed() => self.pending.extend(changes?),
            () = std::future::ready(()), if !self.pending.is_empty() => {}
            guard = self.ring.readable() => {
                guard.map_err(|error| ProbeError::Io { what: "waiting for events", error })?.clear_ready();
            }
            _ = self.looks.tick() => {}
        }
        self.follow_some();
        self.gather_due(out)
    }

    /// Hands out what happened until a moment ago.
    pub(super) fn gather_due(&mut self, out: &mut Vec<Event>) -> Result<usize, ProbeError> {
        let now = monotonic_ns()?;
        self.gather(now.saturating_sub(MARGIN.as_nanos() as u64), 0, out)
    }

    /// Reads both ways to their ends and hands out what happened until `until_ns`; `later_ns` is added to the time of now.
    fn gather(&mut self, until_ns: u64, later_ns: u64, out: &mut Vec<Event>) -> Result<usize, ProbeError> {
        let Some(late) = &mut self.late else { return Ok(0) };
        // Conntrack's way in the middle: an entry's packet was written before the entry was told, or after it.
        drain_all(self.ring.get_mut(), |event, predicted| late.hold.packet(event, predicted))?;
        late.listener.drain(&mut late.told)?;
        drain_all(self.ring.get_mut(), |event, predicted| late.hold.packet(event, predicted))?;
        let now = monotonic_ns()?;
        for told in late.told.drain(..) {
            if told.gone.is_none() {
                adopt(&late.tracked, &late.ports, &told.entry);
            }
            late.hold.entry(told, now);
        }
        let Released { events, foreign } = late.hold.release(until_ns, now.saturating_add(later_ns));
        late.unclaimed += foreign.len() as u64;
        // What lost events may have claimed is not called foreign for good.
        let sure = !late.may_have_lost_claims(now)?;
        for tuple in foreign.into_iter().filter(|_| sure) {
            late.tracked.set_role(&tuple, ROLE_IGNORED);
        }
        let count = events.len();
        out.extend(events);
        Ok(count)
    }

    /// Everything that is there, without waiting any longer for what might belong to it.
    pub(super) fn gather_rest(&mut self, out: &mut Vec<Event>) -> Result<usize, ProbeError> {
        self.gather(u64::MAX - 1, END_NS, out)
    }

    /// Packets at addresses that the rules predict which are in no event: no conntrack entry of a watched connection claimed
    /// them. They are of other connections, or of one whose entry is among [`Lost::conntrack_full`](super::Lost).
    pub fn unclaimed(&self) -> u64 {
        self.late.as_ref().map_or(0, |late| late.unclaimed)
    }

    pub(super) fn conntrack_dropped(&self) -> Result<u64, ProbeError> {
        self.late.as_ref().map_or(Ok(0), Late::dropped)
    }
}

/// One sentence: what the backend costs.
pub fn costs(reasons: Option<&str>) -> String {
    let because = reasons.map_or(String::new(), |reasons| format!(" ({reasons})"));
    format!(
        "NAT is told by {}, not by hooks{because}: some milliseconds late, and only of \
         connections that conntrack let through",
        ConntrackBackend::Ctnetlink
    )
}

fn key((proto, address): &(Proto, SocketAddr)) -> PredictedKey {
    let family = if address.is_ipv4() { 4 } else { 6 };
    PredictedKey(Predicted {
        address: wire_bytes(address.ip()),
        port: address.port().to_be_bytes(),
        proto: proto.number(),
        family,
    })
}

/// The keys of map `PREDICTED`, in the shape that aya asks for.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct PredictedKey(Predicted);
// SAFETY: `repr(C)`, plain bytes, no padding (its size is asserted in the wire crate).
unsafe impl aya::Pod for PredictedKey {}

impl From<CtnetlinkError> for ProbeError {
    fn from(error: CtnetlinkError) -> Self {
        Self::Backend { backend: "ctnetlink", why: error.to_string() }
    }
}
