//! The outcome of a connection, from what was seen of it alone (the rules are not asked here).

use super::flow::{ACK, Flow, POSTROUTING, RST, SYN, Sighting, Way};
use crate::core::model::flow::Proto;
use crate::core::model::interfaces::Interfaces;
use porttrace_ebpf::Kind;
use std::net::SocketAddr;

/// How a connection came out. Times are nanoseconds since its first sighting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The other side answered: SYN ACK, SCTP INIT ACK, or the first datagram back.
    Answered { by: SocketAddr, after_ns: u64 },
    /// The answer was a refusal.
    Refused { by: Refuser, from: SocketAddr, how: Refusal, after_ns: u64 },
    /// An answer came in by this interface (`None`: it began on this node), but never left towards the client.
    AnswerLost { by: SocketAddr, entered: Option<u32>, after_ns: u64 },
    /// The kernel dropped the packet and nothing followed.
    Dropped { reason: u32, after_ns: u64 },
    /// Nothing came back before the deadline.
    Silent { reached: Reached, tries: usize },
    /// The connection is older than this session; only its further life was seen.
    JoinedLate,
}

/// Who refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refuser {
    /// The refusal came in by this interface: from the pod, or from another host, behind it.
    Behind { ifindex: u32 },
    /// It began on this node: a rule's REJECT, or this node's own stack without a listener.
    ThisNode,
    /// The client itself gave up with a reset before any answer.
    Client,
    /// Its way to the client was seen, but not where it began.
    Unseen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    TcpReset,
    SctpAbort,
    Icmp { v6: bool, kind: u8, code: u8 },
}

impl Refusal {
    /// RST, ABORT and "port unreachable" mean that the host was reached and the port is closed.
    pub const fn is_port_closed(self) -> bool {
        match self {
            Self::TcpReset | Self::SctpAbort => true,
            Self::Icmp { v6: false, kind, code } => kind == 3 && code == 3,
            Self::Icmp { v6: true, kind, code } => kind == 1 && code == 4,
        }
    }
}

/// The furthest point at which the request was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// It entered and went no further.
    Entered { ifindex: u32 },
    /// It was routed to this node itself.
    LocalIn,
    /// It left by this interface.
    Left { ifindex: u32 },
    /// A process of this node sent it, and it never left.
    Sent,
    /// It passed the last hook on its way out and left by no interface: it waits for its neighbour's link address
    /// (`neigh_resolve_output`, net/core/neighbour.c), or was lost there.
    PostRouting,
    /// It passed all rules, or conntrack would not have confirmed the connection (`nf_confirm`, the last hook before an
    /// interface or a socket); where it went was not seen.
    Confirmed,
}

const SCTP_INIT_ACK: u8 = 2;
const SCTP_ABORT: u8 = 6;

/// Judges a connection.
pub fn judge(flow: &Flow, interfaces: &Interfaces) -> Outcome {
    if flow.joined_late {
        return Outcome::JoinedLate;
    }
    if let Some(refused) = refusal(flow, interfaces) {
        return refused;
    }
    if let Some(answer) = flow.sightings.iter().find(|seen| is_answer(flow, seen)) {
        return answered(flow, answer, interfaces);
    }
    let dropped = || flow.sightings.iter().filter(|seen| seen.event.kind == Kind::Dropped);
    // Dropped before TC saw it.
    if let Some(answer) = dropped().find(|seen| answers(flow, seen)) {
        return Outcome::AnswerLost { by: answerer(flow, answer), entered: None, after_ns: since(flow, answer) };
    }
    let reached = reached(flow, interfaces);
    match (dropped().find(|seen| seen.way == Way::Request), reached) {
        (
            Some(drop),
            Reached::Entered { .. } | Reached::LocalIn | Reached::Sent | Reached::PostRouting | Reached::Confirmed,
        ) => Outcome::Dropped { reason: drop.event.reason, after_ns: since(flow, drop) },
        _ => Outcome::Silent { reached, tries: tries(flow) },
    }
}

fn since(flow: &Flow, seen: &Sighting) -> u64 {
    seen.event.time_ns.saturating_sub(flow.start_ns)
}

fn is_answer(flow: &Flow, seen: &Sighting) -> bool {
    seen.is_tc() && answers(flow, seen)
}

/// Whether it is about a packet that answers the request, wherever it was seen.
fn answers(flow: &Flow, seen: &Sighting) -> bool {
    seen.way == Way::Reply
        && match flow.original.proto {
            Proto::Tcp => seen.has(SYN | ACK),
            Proto::Sctp => seen.event.l4_flags == SCTP_INIT_ACK,
            _ => true,
        }
}

fn answered(flow: &Flow, answer: &Sighting, interfaces: &Interfaces) -> Outcome {
    let by = answerer(flow, answer);
    let last = flow.sightings.iter().rfind(|seen| is_answer(flow, seen) && !seen.again).unwrap_or(answer);
    let entered = answer.event.kind == Kind::TcIngress && !interfaces.is_loopback(answer.event.ifindex);
    let left = flow.seen(Way::Reply).any(|seen| seen.event.kind == Kind::TcEgress);
    if entered && !left && !flow.is_local_client() {
        let entered = Some(answer.event.ifindex);
        return Outcome::AnswerLost { by, entered, after_ns: since(flow, answer) };
    }
    Outcome::Answered { by, after_ns: since(flow, last) }
}

/// Conntrack knows who really answers; a sighting at the answerer's side shows it too.
fn answerer(flow: &Flow, answer: &Sighting) -> SocketAddr {
    match (flow.reply, answer.event.packet) {
        (Some(reply), _) => reply.source(),
        (None, Some(packet)) => packet.source(),
        (None, None) => flow.original.destination(),
    }
}

fn refusal(flow: &Flow, interfaces: &Interfaces) -> Option<Outcome> {
    let established = flow.sightings.iter().any(|seen| is_answer(flow, seen));
    if established {
        return None;
    }
    let is_refusal = |seen: &Sighting| match seen.event.kind {
        Kind::IcmpError => true,
        Kind::TcIngress | Kind::TcEgress if flow.is_tcp() => seen.has(RST),
        Kind::TcIngress | Kind::TcEgress if flow.original.proto == Proto::Sctp => seen.event.l4_flags == SCTP_ABORT,
        _ => false,
    };
    let seen = flow.sightings.iter().find(|seen| is_refusal(seen))?;
    let how = match (seen.event.kind, flow.original.proto) {
        (Kind::IcmpError, _) => {
            Refusal::Icmp { v6: flow.original.dst.is_ipv6(), kind: seen.event.icmp_type, code: seen.event.icmp_code }
        }
        (_, Proto::Sctp) => Refusal::SctpAbort,
        _ => Refusal::TcpReset,
    };
    let came_in = match seen.event.kind {
        Kind::IcmpError => seen.event.ifindex != 0,
        kind => kind == Kind::TcIngress,
    };
    let by = if seen.way == Way::Request && how == Refusal::TcpReset {
        Refuser::Client
    } else if came_in && !interfaces.is_loopback(seen.event.ifindex) {
        Refuser::Behind { ifindex: seen.event.ifindex }
    } else if begins_here(flow, seen, interfaces) {
        Refuser::ThisNode
    } else {
        Refuser::Unseen
    };
    let asked = flow.destination();
    let from = match (seen.event.kind, seen.event.icmp_sender) {
        // Behind NAT its sender was another.
        (Kind::IcmpError, Some(sender)) if by == Refuser::Unseen && sender == flow.original.dst => asked,
        (Kind::IcmpError, Some(sender)) => SocketAddr::new(sender, asked.port()),
        (Kind::IcmpError, None) => asked,
        _ => answerer(flow, seen),
    };
    Some(Outcome::Refused { by, from, how, after_ns: since(flow, seen) })
}

/// Whether a refusal that was seen to leave began on this node: it would have been seen to come in, or something else shows it
/// (this node dropped the request, sent a reset, handed the request to its own sockets). By ctnetlink, what comes back through an
/// interface is not seen there where the rules did not predict it.
fn begins_here(flow: &Flow, refusal: &Sighting, interfaces: &Interfaces) -> bool {
    flow.is_followed
        || interfaces.is_loopback(refusal.event.ifindex)
        || flow.sightings.iter().any(|seen| match seen.event.kind {
            Kind::ResetSent | Kind::LocalIn => true,
            Kind::Dropped => seen.way == Way::Request,
            _ => false,
        })
}

fn reached(flow: &Flow, interfaces: &Interfaces) -> Reached {
    let requests = || flow.sightings.iter().filter(|seen| seen.way == Way::Request);
    let left = requests()
        .rfind(|seen| seen.event.kind == Kind::TcEgress && !interfaces.is_loopback(seen.event.ifindex))
        .map(|seen| Reached::Left { ifindex: seen.event.ifindex });
    if let Some(left) = left {
        return left;
    }
    if requests().any(|seen| seen.event.kind == Kind::LocalIn) {
        return Reached::LocalIn;
    }
    let passed = |seen: &Sighting| seen.event.kind == Kind::AfterSnat && seen.event.hook == POSTROUTING;
    let on_loopback = || requests().any(|seen| seen.event.kind == Kind::TcEgress);
    if requests().any(passed) && !on_loopback() {
        return Reached::PostRouting;
    }
    if flow.sightings.iter().any(|seen| seen.event.kind == Kind::Confirmed) {
        return Reached::Confirmed;
    }
    match requests().find(|seen| seen.event.kind == Kind::TcIngress) {
        Some(seen) => Reached::Entered { ifindex: seen.event.ifindex },
        None => Reached::Sent,
    }
}

/// How often the request was sent: the first sighting and its retransmissions at the same place.
fn tries(flow: &Flow) -> usize {
    let Some(first) = flow.sightings.iter().find(|seen| seen.way == Way::Request && seen.event.packet.is_some()) else {
        return 0;
    };
    flow.sightings
        .iter()
        .filter(|seen| {
            seen.way == Way::Request
                && seen.event.kind == first.event.kind
                && seen.event.ifindex == first.event.ifindex
                && seen.event.hook == first.event.hook
        })
        .count()
}
