//! The way between the hooks: where a packet starts, what routing does with it, how it leaves.

use super::run::{Next, Run};
use super::walk::Walk;
use crate::core::model::flow::Family;
use crate::core::model::name::{Name, name};
use crate::core::model::steps::Step;
use crate::core::model::trace::{Decision, DropReason, Hook, RouteKind, Verdict};

pub(super) static LOOPBACK: Name = name!("lo");
/// Stands where the output interface is not known.
static UNKNOWN: Name = name!("?");

pub(super) fn dropped(reason: DropReason) -> Next {
    Next::end(Verdict::Dropped { reason, by: None })
}

pub(super) fn rejected(with: &'static str) -> Next {
    Next::end(Verdict::Rejected { with: Name::from(with), by: None })
}

/// `ip6_rcv_core`: loopback addresses never come from outside.
pub(super) fn from_loopback(walk: &Walk<'_>) -> bool {
    let loopback = walk.tuple.src.is_loopback() || walk.tuple.dst.is_loopback();
    walk.family() == Family::V6 && loopback && walk.input_name() != Some("lo")
}

impl<'s> Run<'s> {
    /// A packet from outside: the interface and, behind a bridge, its port.
    pub(super) fn receive(&mut self, walk: &mut Walk<'s>) -> Next {
        let Some(input) = walk.input else { return self.send(walk) };
        walk.step(Step::Receive { interface: input.clone() });
        walk.arrived_as = match self.sim.routing.address_type(walk.tuple.dst, None) {
            Some(kind @ (RouteKind::Broadcast | RouteKind::Multicast)) => kind,
            _ => RouteKind::Unicast,
        };
        if let Some(end) = self.enter_bridge(walk, input) {
            return end;
        }
        if walk.phys_in.is_none() && from_loopback(walk) {
            return dropped(DropReason::Martian);
        }
        walk.enter(Hook::Prerouting);
        Next::Go
    }

    /// A packet of the node's own: routed first, then OUTPUT.
    fn send(&mut self, walk: &mut Walk<'s>) -> Next {
        walk.step(Step::LocalSend);
        if self.sim.routing.is_local(walk.tuple.src) == Some(false) && !walk.tuple.src.is_unspecified() {
            self.assume(format!(
                "{} is not an address of this node, yet the node is taken as the sender",
                walk.tuple.src
            ));
        }
        self.route_output(walk, Some(Hook::Output))
    }

    /// PREROUTING is over: `ip_rcv_finish`.
    pub(super) fn after_prerouting(&mut self, walk: &mut Walk<'s>) -> Next {
        if walk.looped {
            // The packet still has the route of its way out (`skb_valid_dst`).
            walk.enter(Hook::Input);
            return Next::Go;
        }
        if let Some(next) = self.leave_bridge(walk) {
            return next;
        }
        if !self.sim.routing.known {
            return self.route_without_routes(walk);
        }
        match walk.family() {
            Family::V4 => self.route_input4(walk),
            Family::V6 => self.route_input6(walk),
        }
    }

    fn route_without_routes(&mut self, walk: &mut Walk<'s>) -> Next {
        self.assume("routes are not part of the state: where packets leave is not known");
        walk.output_unknown = true;
        let dst = walk.tuple.dst;
        match self.sim.routing.is_local(dst) {
            Some(true) => walk.enter(Hook::Input),
            Some(false) => walk.enter(Hook::Forward),
            None => {
                let text = format!("{dst} is an address of this node");
                let mut other = walk.fork();
                other.decide(Decision::Assumed { rule: None, text: text.clone(), taken: false });
                other.enter(Hook::Forward);
                // A destination that a rule has just put there is more likely a pod than the node.
                walk.decide(Decision::Assumed { rule: None, text, taken: true });
                walk.enter(Hook::Input);
                self.later(other);
            }
        }
        Next::Go
    }

    /// `ip_forward`, `ip6_forward`: the TTL is counted down before FORWARD.
    pub(super) fn forward(&mut self, walk: &mut Walk<'s>) -> Next {
        // "packet is for us" was the link's word: `skb->pkt_type != PACKET_HOST`, whatever DNAT made of the address since.
        if walk.arrived_as != RouteKind::Unicast && walk.phys_in.is_none() {
            let text = "it came as a broadcast or multicast of the link: such packets are not forwarded".to_string();
            walk.note(text.clone());
            return dropped(DropReason::Other { text });
        }
        if walk.ttl <= 1 {
            return dropped(DropReason::Ttl);
        }
        walk.ttl -= 1;
        if let Some(link) = walk.output_name().and_then(|name| self.sim.config.link(name))
            && link.mtu != 0
            && walk.packet.length > link.mtu
        {
            return dropped(DropReason::TooBig);
        }
        walk.enter(Hook::Forward);
        Next::Go
    }

    /// INPUT is over.
    pub(super) fn deliver(&mut self, walk: &mut Walk<'s>) -> Next {
        let found = self.sim.config.listener(&walk.tuple);
        if self.sim.config.listener(&walk.tuple).is_none() && walk.tuple.proto.has_ports() {
            self.assume("sockets are not part of the state: whether anything listens is not known");
        }
        let listening = found.map(|socket| socket.is_some());
        let listener = found.flatten().map(|socket| {
            let process = socket.process.as_deref().map(|process| format!(" ({process})")).unwrap_or_default();
            format!("{}:{}{process}", socket.address, socket.port).into()
        });
        walk.step(Step::Deliver { listener });
        Next::end(Verdict::Delivered { to: walk.tuple, listening })
    }

    /// The copy of a broadcast enters by the interface that the broadcast leaves by (`dev_loopback_xmit`).
    fn come_back(&mut self, walk: &mut Walk<'s>) -> Next {
        let interface = walk.output.take().unwrap_or(&UNKNOWN);
        walk.step(Step::Receive { interface: interface.clone() });
        walk.input = Some(interface);
        walk.looped = true;
        walk.arrived_as = RouteKind::Broadcast;
        walk.conn.confirm();
        walk.enter(Hook::Prerouting);
        Next::Go
    }

    /// POSTROUTING is over: the packet leaves, or comes back by lo.
    pub(super) fn transmit(&mut self, walk: &mut Walk<'s>) -> Next {
        if walk.to_self && walk.local {
            walk.step(Step::Transmit { interface: LOOPBACK.clone(), gateway: None });
            walk.step(Step::Receive { interface: LOOPBACK.clone() });
            walk.looped = true;
            walk.conn.confirm();
            walk.input = Some(&LOOPBACK);
            walk.output = None;
            walk.enter(Hook::Prerouting);
            return Next::Go;
        }
        if walk.copied.is_some() && walk.local {
            return self.come_back(walk);
        }
        let next_hop = walk.gateway.unwrap_or(walk.tuple.dst);
        let interface = match walk.output {
            Some(interface) => interface.clone(),
            None if walk.output_unknown => UNKNOWN.clone(),
            None => return dropped(DropReason::NoRoute),
        };
        walk.step(Step::Transmit { interface: interface.clone(), gateway: walk.gateway });
        Next::end(Verdict::Forwarded { interface, next_hop, to: walk.tuple })
    }
}
