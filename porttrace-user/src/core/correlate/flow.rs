//! One connection as the probe saw it.

use crate::core::model::event::{Conntrack, Event};
use crate::core::model::flow::{Proto, Tuple};
use porttrace_ebpf::Kind;
use std::net::SocketAddr;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// Which way a packet of a connection travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Way {
    /// From the client that opened it.
    Request,
    /// Back to that client.
    Reply,
}

/// One event of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    pub event: Event,
    pub way: Way,
    /// This packet was seen here before (same flags and sequence numbers).
    pub again: bool,
}

impl Sighting {
    pub const fn is_tc(&self) -> bool {
        matches!(self.event.kind, Kind::TcIngress | Kind::TcEgress)
    }

    /// All of `flags` are set in the packet's TCP flags.
    pub const fn has(&self, flags: u8) -> bool {
        self.event.l4_flags & flags == flags
    }
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Still waiting for an answer or its deadline.
    Open,
    /// It was reported without an answer; should one come after all, that is reported too.
    Unanswered,
    /// The answer came after the report; its way back is waited for.
    Late,
    /// Its outcome was reported; it is kept to report its end.
    Reported,
    /// Its end was reported too.
    Ended,
}

/// A connection: its conntrack tuples and all that was seen of it.
#[derive(Clone, Debug)]
pub struct Flow {
    /// 1, 2, 3, … in order of first sight.
    pub id: u64,
    pub original: Tuple,
    /// Conntrack's reply tuple as last observed: what NAT really did. `None`: no conntrack event came.
    pub reply: Option<Tuple>,
    /// The first event of the flow that carried a conntrack entry said that the entry was made by this very packet.
    pub entry_was_new: Option<bool>,
    /// The kernel was seen to make its NAT: since then its packets are recognised at every interface, whatever their tuple.
    pub is_followed: bool,
    /// Set when the first packet that was seen is not the first of the connection.
    pub joined_late: bool,
    /// TCP sequence number of the packet that opened the flow: a SYN with another one is another connection.
    pub first_seq: u32,
    pub start_ns: u64,
    pub last_ns: u64,
    /// At most [`MAX_SIGHTINGS`]; the rest is counted in `more_sightings`.
    pub sightings: Vec<Sighting>,
    pub more_sightings: u64,
    pub stage: Stage,
    /// Something came back: a packet of the other side, or an ICMP error.
    pub answered: bool,
    /// When its outcome is to be reported, or it is to be forgotten.
    pub due_at: u64,
    pub end: Option<End>,
}

/// `NF_INET_LOCAL_OUT`: the hook that packets pass which this node sends.
const OUTPUT: u8 = 3;
/// `NF_INET_POST_ROUTING`: the last hook of packets that are to leave.
pub const POSTROUTING: u8 = 4;
/// How many events of one connection are kept.
pub const MAX_SIGHTINGS: usize = 64;

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub at_ns: u64,
    /// Reset rather than closed.
    pub reset: bool,
    /// Bytes in the original and the reply direction, where something counted them.
    pub bytes: Option<(u64, u64)>,
}

impl Flow {
    /// Where its request ends after all NAT, as conntrack says; without its word, what it asked for.
    pub fn destination(&self) -> SocketAddr {
        self.reply.map_or(self.original.destination(), |reply| reply.source())
    }

    /// The request after the destination was rewritten, `Some(None)` when it was not; `None`: conntrack was not observed.
    pub fn dnat(&self) -> Option<Option<Tuple>> {
        let reply = self.reply?;
        Some((reply.source() != self.original.destination()).then(|| self.after_dnat(reply)))
    }

    /// The request after the source was rewritten, `Some(None)` when it was not; `None`: conntrack was not observed.
    pub fn snat(&self) -> Option<Option<Tuple>> {
        let reply = self.reply?;
        Some((reply.destination() != self.original.source()).then(|| reply.inverted()))
    }

    /// The request's tuple after the destination half of NAT alone.
    fn after_dnat(&self, reply: Tuple) -> Tuple {
        Tuple { dst: reply.src, dport: reply.sport, ..self.original }
    }

    /// Which way a packet with this tuple travels in this flow; `None`: it is not of this flow.
    pub fn way_of(&self, packet: Tuple) -> Option<Way> {
        if packet == self.original {
            return Some(Way::Request);
        }
        if packet == self.original.inverted() {
            return Some(Way::Reply);
        }
        let reply = self.reply?;
        if packet == reply {
            Some(Way::Reply)
        } else if packet == reply.inverted() || packet == self.after_dnat(reply) {
            Some(Way::Request)
        } else {
            (packet == self.after_dnat(reply).inverted()).then_some(Way::Reply)
        }
    }

    /// The tuples that packets of this flow can carry, each in one direction.
    pub fn tuples(&self) -> impl Iterator<Item = Tuple> {
        std::iter::once(self.original).chain(self.rewritten().into_iter().flatten())
    }

    /// What NAT makes of the request, as far as conntrack was observed: with another destination, with another source.
    pub fn rewritten(&self) -> [Option<Tuple>; 2] {
        [self.dnat().flatten(), self.snat().flatten()]
    }

    /// The flow with all that was seen of it; what stays has only the tuples, which are needed to see its end.
    pub fn take_story(&mut self) -> Self {
        let sightings = std::mem::take(&mut self.sightings);
        Self { sightings, ..self.clone() }
    }

    /// Takes over what a conntrack entry says; true when the reply tuple changed.
    pub fn learn(&mut self, entry: &Conntrack) -> bool {
        self.entry_was_new.get_or_insert(entry.is_new);
        let changed = self.reply != Some(entry.reply);
        self.reply = Some(entry.reply);
        changed
    }

    /// Of a flow that was told as unanswered, only the newest drop is kept: it may say why an error comes late.
    pub fn keep_drop(&mut self, event: Event, way: Way) {
        // The first sighting says where the request came from.
        let mut is_first = true;
        self.sightings.retain(|seen| std::mem::take(&mut is_first) || seen.event.kind != Kind::Dropped);
        self.add(event, way);
    }

    /// Adds an event. Retransmissions are marked; what exceeds [`MAX_SIGHTINGS`] is counted.
    pub fn add(&mut self, event: Event, way: Way) {
        self.last_ns = self.last_ns.max(event.time_ns);
        if self.sightings.len() >= MAX_SIGHTINGS {
            self.more_sightings += 1;
            return;
        }
        let again = event.packet.is_some() && self.sightings.iter().any(|seen| is_same_packet(&seen.event, &event));
        self.sightings.push(Sighting { event, way, again });
    }

    /// Sightings by TC only, in order.
    pub fn seen(&self, way: Way) -> impl Iterator<Item = &Sighting> {
        self.sightings.iter().filter(move |sighting| sighting.is_tc() && sighting.way == way)
    }

    /// The client is a process of this node: its request left before it entered anywhere.
    pub fn is_local_client(&self) -> bool {
        // What kprobes and conntrack tell of an entry has no place.
        let has_place =
            |sighting: &&Sighting| !matches!(sighting.event.kind, Kind::NatSetup | Kind::Confirmed | Kind::Destroyed);
        let mut requests = self.sightings.iter().filter(|sighting| sighting.way == Way::Request);
        requests.find(has_place).is_some_and(|first| {
            match first.event.kind {
                Kind::TcEgress => true,
                // Before its route is taken, a packet of this node has no device.
                Kind::Dropped => first.event.ifindex == 0,
                Kind::AfterConntrack | Kind::AfterDnat => first.event.hook == OUTPUT,
                _ => false,
            }
        })
    }

    /// Input interface of the first request packet; `None` for a local client.
    pub fn input_ifindex(&self) -> Option<u32> {
        if self.is_local_client() {
            return None;
        }
        self.sightings
            .iter()
            .find(|sighting| sighting.way == Way::Request && sighting.event.ifindex != 0)
            .map(|sighting| sighting.event.ifindex)
    }

    pub fn is_tcp(&self) -> bool {
        self.original.proto == Proto::Tcp
    }
}

fn is_same_packet(seen: &Event, event: &Event) -> bool {
    seen.kind == event.kind
        && seen.ifindex == event.ifindex
        && seen.hook == event.hook
        && seen.packet == event.packet
        && seen.l4_flags == event.l4_flags
        && seen.tcp_seq == event.tcp_seq
        && seen.payload == event.payload
}
