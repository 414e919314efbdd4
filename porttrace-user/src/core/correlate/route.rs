//! The routing decision that the kernel took, held against the one that routes and policy rules predict.

use super::flow::{Flow, Way};
use super::story::{Certainty, Line, What};
use crate::core::model::event::Event;
use crate::core::model::interfaces::Interfaces;
use crate::core::model::name::{Name, name};
use crate::core::model::trace::{Branch, Hop, Route, RouteKind};
use porttrace_ebpf::Kind;
use std::net::IpAddr;

/// The route that the request's packet carried when it left netfilter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Nanoseconds since the first sighting.
    pub offset_ns: u64,
    pub dst: IpAddr,
    pub kind: RouteKind,
    /// Where it leads out; `None` for a packet that stays.
    pub interface: Option<Name>,
    /// `None`: the destination itself is the next hop.
    pub gateway: Option<IpAddr>,
}

impl Taken {
    /// As the first request packet that tells its route had it; `None`: nothing observed it.
    pub fn of(flow: &Flow, interfaces: &Interfaces) -> Option<Self> {
        let mut requests = flow.sightings.iter().filter(|seen| seen.way == Way::Request);
        requests.find_map(|seen| Self::in_event(&seen.event, flow.start_ns, interfaces))
    }

    fn in_event(event: &Event, start_ns: u64, interfaces: &Interfaces) -> Option<Self> {
        let route = event.route?;
        let leaves = event.out_ifindex != 0 && route.kind != RouteKind::Local;
        Some(Self {
            offset_ns: event.time_ns.saturating_sub(start_ns),
            dst: event.packet?.dst,
            kind: route.kind,
            interface: leaves.then(|| interfaces.name(event.out_ifindex).into()),
            gateway: route.gateway,
        })
    }

    /// Whether this is the predicted decision. Only a unicast route says where a packet goes from here.
    pub fn is(&self, predicted: &Route) -> bool {
        let way = (&self.interface, self.gateway) == (&predicted.interface, predicted.gateway);
        self.dst == predicted.dst && self.kind == predicted.kind && (self.kind != RouteKind::Unicast || way)
    }

    /// Whether the last decision of the branch is this one.
    pub fn ends(&self, branch: &Branch) -> bool {
        let last = branch.hops.iter().rev().find_map(|hop| match hop {
            Hop::Route { decision } => Some(decision),
            _ => None,
        });
        last.is_some_and(|decision| self.is(decision))
    }

    /// A line that nothing predicted.
    pub fn line(self) -> Line {
        let route = Route {
            dst: self.dst,
            kind: self.kind,
            interface: self.interface.clone(),
            gateway: self.gateway,
            table: name!(""),
            route: name!(""),
        };
        Line {
            offset_ns: Some(self.offset_ns),
            certainty: Certainty::Observed,
            what: What::Route { route, taken: Some(self) },
        }
    }
}

/// A predicted decision as a line, with what was observed of it.
pub(super) fn line(flow: &Flow, route: &Route, taken: Option<&Taken>, interfaces: &Interfaces) -> Line {
    // What is decided before DNAT changes the destination is decided again; only the last decision stands in a packet.
    let Some(taken) = taken.filter(|taken| taken.dst == route.dst) else {
        let certainty = by_interface(flow, route, interfaces);
        return Line { offset_ns: None, certainty, what: What::Route { route: route.clone(), taken: None } };
    };
    Line {
        offset_ns: Some(taken.offset_ns),
        certainty: if taken.is(route) { Certainty::Both } else { Certainty::Differs },
        what: What::Route { route: route.clone(), taken: Some(taken.clone()) },
    }
}

/// Where no packet told its route: the request really left by the interface, or really was handed to this node.
fn by_interface(flow: &Flow, route: &Route, interfaces: &Interfaces) -> Certainty {
    let confirmed = flow.sightings.iter().any(|seen| match (route.kind, seen.event.kind) {
        (RouteKind::Local, Kind::LocalIn) => true,
        (RouteKind::Unicast, Kind::TcEgress) => {
            seen.way == Way::Request && route.interface.as_deref() == Some(&*interfaces.name(seen.event.ifindex))
        }
        _ => false,
    });
    if confirmed { Certainty::Both } else { Certainty::Predicted }
}
