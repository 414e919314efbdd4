//! Connections that differ in nothing but the client's port, numbers and times: what was found out of one holds for the other.

use super::flow::{Flow, Sighting, Way};
use crate::core::model::event::Conntrack;
use crate::core::model::flow::{Proto, Tuple};
use foldhash::{HashMap, HashMapExt as _};
use std::net::IpAddr;

/// Different connections remembered, in all and with the same ends: the order in which two CPUs tell may differ.
const MOST: usize = 1_000;
const MOST_BETWEEN: usize = 8;

/// Connections whose story is known, each with what is to be remembered of it.
#[derive(Debug)]
pub struct Known<T> {
    by_ends: HashMap<Ends, Vec<(Flow, T)>>,
    count: usize,
}

/// What is quickly compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ends {
    proto: Proto,
    client: IpAddr,
    to: (IpAddr, u16),
    sightings: usize,
}

impl Ends {
    const fn of(flow: &Flow) -> Self {
        let Tuple { proto, src, dst, dport, .. } = flow.original;
        Self { proto, client: src, to: (dst, dport), sightings: flow.sightings.len() }
    }
}

impl<T> Known<T> {
    /// What is remembered of a connection like this one.
    pub fn get(&self, flow: &Flow) -> Option<&T> {
        let known = self.by_ends.get(&Ends::of(flow))?;
        known.iter().find(|(known, _)| are_alike(known, flow)).map(|(_, value)| value)
    }

    /// Remembers a connection, as long as there is room.
    pub fn learn(&mut self, flow: &Flow, value: T) {
        if self.count >= MOST {
            return;
        }
        let known = self.by_ends.entry(Ends::of(flow)).or_default();
        if known.len() < MOST_BETWEEN {
            known.push((flow.clone(), value));
            self.count += 1;
        }
    }

    pub fn clear(&mut self) {
        self.by_ends.clear();
        self.count = 0;
    }
}

impl<T> Default for Known<T> {
    fn default() -> Self {
        Self { by_ends: HashMap::new(), count: 0 }
    }
}

/// Whether two connections have the same ends, but for the client's ports, and were seen at the same places, looking alike.
fn are_alike(one: &Flow, other: &Flow) -> bool {
    let (ports, others) = (Ports::of(one), Ports::of(other));
    let tuple = |way, one, other| ports.hide(way, one) == others.hide(way, other);
    let entry = |one: Conntrack, other: Conntrack| {
        tuple(Way::Request, one.original, other.original)
            && tuple(Way::Reply, one.reply, other.reply)
            && (one.status, one.mark, one.is_new, one.is_reply)
                == (other.status, other.mark, other.is_new, other.is_reply)
    };
    let sighting = |(one, other): (&Sighting, &Sighting)| {
        let (a, b) = (&one.event, &other.event);
        (one.way, one.again, a.kind, a.ifindex, a.out_ifindex, a.hook, a.mark, a.reason)
            == (other.way, other.again, b.kind, b.ifindex, b.out_ifindex, b.hook, b.mark, b.reason)
            && (a.l4_flags, a.icmp_type, a.icmp_code, a.icmp_sender, a.is_reply, a.route)
                == (b.l4_flags, b.icmp_type, b.icmp_code, b.icmp_sender, b.is_reply, b.route)
            && both(a.packet, b.packet, |a, b| tuple(one.way, a, b))
            && both(a.conntrack, b.conntrack, entry)
    };
    tuple(Way::Request, one.original, other.original)
        && both(one.reply, other.reply, |one, other| tuple(Way::Reply, one, other))
        && (one.entry_was_new, one.joined_late, one.answered, one.end.is_some(), one.more_sightings)
            == (other.entry_was_new, other.joined_late, other.answered, other.end.is_some(), other.more_sightings)
        && one.sightings.len() == other.sightings.len()
        && one.sightings.iter().zip(&other.sightings).all(sighting)
}

fn both<T>(one: Option<T>, other: Option<T>, are_alike: impl FnOnce(T, T) -> bool) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => are_alike(one, other),
        (None, None) => true,
        _ => false,
    }
}

/// The client's port, and the one that NAT gave it instead.
struct Ports {
    own: u16,
    given: Option<u16>,
}

impl Ports {
    fn of(flow: &Flow) -> Self {
        let own = flow.original.sport;
        Self { own, given: flow.reply.map(|reply| reply.dport).filter(|port| *port != own) }
    }

    /// A tuple of the connection without the client's ports.
    fn hide(&self, way: Way, mut tuple: Tuple) -> Tuple {
        const OWN: u16 = 0;
        const GIVEN: u16 = 1;
        let port = match way {
            Way::Request => &mut tuple.sport,
            Way::Reply => &mut tuple.dport,
        };
        if *port == self.own {
            *port = OWN;
        } else if Some(*port) == self.given {
            *port = GIVEN;
        }
        tuple
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ETH0, event, tuple, with_conntrack};
    use super::super::{Correlator, Limits, Update};
    use super::*;
    use crate::core::model::event::Event;
    use porttrace_ebpf::Kind;

    const POD: &str = "10.244.1.9:80";
    const NODE: &str = "172.18.0.3";

    /// A connection from this port whose source becomes the node with another one, answered.
    fn flow(port: u16, given: u16, change: impl Fn(&mut Vec<Event>)) -> Flow {
        let (client, asked) = (format!("172.18.0.9:{port}"), format!("{NODE}:9088"));
        let (original, reply) = (format!("{client} → {asked}"), format!("{POD} → {NODE}:{given}"));
        let mut events = vec![
            event(1, Kind::TcIngress, ETH0, &original, 2),
            with_conntrack(event(2, Kind::AfterSnat, ETH0, &format!("{NODE}:{given} → {POD}"), 2), &original, &reply),
            event(3, Kind::TcEgress, 7, &format!("{NODE}:{given} → {POD}"), 2),
            event(4, Kind::TcIngress, 7, &reply, 18),
            event(5, Kind::TcEgress, ETH0, &format!("{asked} → {client}"), 18),
        ];
        change(&mut events);
        let mut correlator = Correlator::new([9088], Limits::default());
        events.into_iter().for_each(|event| correlator.push(event));
        match correlator.tick(u64::MAX / 2).into_iter().next() {
            Some(Update::Reported(flow)) => *flow,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_clients_ports_and_times_make_no_difference() {
        let mut known = Known::default();
        known.learn(&flow(40_000, 40_000, |_| {}), "kept");
        known.learn(&flow(40_000, 1_024, |_| {}), "changed");
        assert_eq!(known.get(&flow(50_000, 50_000, |events| events[3].time_ns = 90)), Some(&"kept"));
        assert_eq!(known.get(&flow(50_000, 7_777, |events| events[0].tcp_seq = 9)), Some(&"changed"));
    }

    #[test]
    fn everything_else_does() {
        let mut known = Known::default();
        known.learn(&flow(40_000, 40_000, |_| {}), ());
        let other = |change: fn(&mut Vec<Event>)| known.get(&flow(50_000, 50_000, change));
        assert_eq!(other(|_| {}), Some(&()));
        assert_eq!(other(|events| events[1].mark = 0x4000), None, "mark");
        assert_eq!(other(|events| events[2].ifindex = 8), None, "interface");
        assert_eq!(other(|events| events.retain(|event| event.time_ns != 3)), None, "a hop that was not seen");
        assert_eq!(other(|events| events.push(events[4].clone())), None, "once more");
        assert_eq!(other(|events| events[3].l4_flags = 20), None, "RST instead of SYN ACK");
        assert_eq!(
            other(|events| {
                let entry = events[1].conntrack.as_mut().expect("an entry");
                entry.reply = tuple("10.244.1.8:80 → 172.18.0.3:50000");
            }),
            None,
            "another pod"
        );
        known.clear();
        assert_eq!(known.get(&flow(40_000, 40_000, |_| {})), None);
    }
}
