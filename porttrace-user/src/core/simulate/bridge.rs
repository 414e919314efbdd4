//! Packets that come by a port of a bridge: some never leave it, and netfilter sees them nevertheless
//! (net/bridge/br_input.c, net/bridge/br_netfilter_hooks.c).

use super::path::{dropped, from_loopback};
use super::run::{Next, Run};
use super::walk::Walk;
use crate::core::model::flow::Family;
use crate::core::model::name::Name;
use crate::core::model::steps::Step;
use crate::core::model::trace::{Decision, DropReason, Hook, RouteKind, Verdict};

impl<'s> Run<'s> {
    /// The interface of a port's packet is the bridge. With bridge-nf the IP hooks see what stays on the bridge too; without,
    /// they see only what goes up to the node, and nothing is known of the port.
    pub(super) fn enter_bridge(&mut self, walk: &mut Walk<'s>, port: &'s Name) -> Option<Next> {
        let config = &self.sim.config;
        let bridge = config.link(port).and_then(|link| link.master.as_deref())?;
        config.link(bridge).filter(|link| link.kind == "bridge")?;
        let bridge = config.name(bridge)?;
        walk.input = Some(bridge);
        // A host on the bridge sends to another one directly, and everything else to the node.
        let dst = walk.tuple.dst;
        let own = self.sim.routing.is_local(dst).unwrap_or(false);
        walk.bridged = !own && walk.arrived_as == RouteKind::Unicast && self.sim.config.on_link(bridge, dst);
        let setting = match walk.family() {
            Family::V4 => self.sim.config.bridge_nf4,
            Family::V6 => self.sim.config.bridge_nf6,
        };
        if setting != Some(0) {
            if setting.is_none() {
                self.assume("bridge-nf-call-iptables is not known: taken as on");
            }
            walk.phys_in = Some(port);
            return None;
        }
        if !walk.bridged {
            return None;
        }
        walk.note(format!("stays on bridge {bridge}: bridge-nf is off, no rule sees it"));
        walk.step(Step::Transmit { interface: bridge.clone(), gateway: None });
        Some(Next::end(Verdict::Forwarded { interface: bridge.clone(), next_hop: dst, to: walk.tuple }))
    }

    /// PREROUTING is over for a packet of a bridge port (`br_nf_pre_routing_finish`): with a new destination the routes decide,
    /// otherwise the frame's address does. `None`: it goes up to the node.
    pub(super) fn leave_bridge(&mut self, walk: &mut Walk<'s>) -> Option<Next> {
        walk.phys_in?;
        let moved = walk.moved();
        if walk.bridged && !moved {
            return Some(self.bridge_forward(walk));
        }
        walk.bridged = false;
        if moved {
            // "skb->pkt_type = PACKET_HOST"
            walk.arrived_as = RouteKind::Unicast;
        } else if from_loopback(walk) {
            return Some(dropped(DropReason::Martian));
        } else if walk.arrived_as == RouteKind::Broadcast && self.other_ports(walk) {
            let mut original = walk.fork();
            original.note("a broadcast: the bridge also sends a copy of it to its other ports");
            original.flooded = true;
            walk.copied = Some(original);
            walk.decide(Decision::Copy { text: "the bridge's copy of the broadcast, for its other ports".into() });
            return Some(self.bridge_forward(walk));
        } else if walk.arrived_as == RouteKind::Broadcast {
            // `br_nf_local_in`: what was cloned is confirmed before the node's INPUT, whose NAT is then without effect.
            walk.conn.confirm();
        }
        None
    }

    fn other_ports(&self, walk: &Walk<'_>) -> bool {
        let bridge = walk.input_name().unwrap_or_default();
        !walk.flooded && self.sim.config.ports(bridge) > 1
    }

    /// From port to port, past routing and TTL. Back to where it came from only in hairpin mode (`should_deliver`).
    pub(super) fn bridge_forward(&mut self, walk: &mut Walk<'s>) -> Next {
        walk.bridged = true;
        walk.to_self = false;
        walk.output = walk.input;
        let port = walk.phys_in.map(Name::as_str).unwrap_or_default();
        if walk.copied.is_none() && self.returns(walk) {
            match self.sim.config.link(port).and_then(|link| link.hairpin) {
                Some(true) => {}
                Some(false) => {
                    let text = format!(
                        "{port} is not in hairpin mode: the bridge does not send the packet back where it came from"
                    );
                    walk.note(text.clone());
                    return dropped(DropReason::Other { text });
                }
                None => {
                    self.assume(format!("hairpin mode of bridge port {port} is not part of the state: taken as on"))
                }
            }
        }
        walk.enter(Hook::Forward);
        Next::Go
    }

    /// The destination is who sent the packet: by its Ethernet address where that is known.
    fn returns(&self, walk: &Walk<'_>) -> bool {
        let bridge = walk.input_name().unwrap_or_default();
        let next = walk.gateway.unwrap_or(walk.tuple.dst);
        match (walk.packet.sender.mac, self.sim.config.neighbour(bridge, next)) {
            (Some(mine), Some(theirs)) => mine == theirs,
            _ => walk.packet.tuple.src == walk.tuple.dst,
        }
    }
}

impl<'s> Walk<'s> {
    /// The destination is another than the one that the packet came with.
    pub(super) fn moved(&self) -> bool {
        self.packet.tuple.dst != self.tuple.dst
    }

    /// It was given a new destination behind the bridge that it came by: the bridge forwards it (`bridged_dnat`).
    pub(super) fn stays_on_bridge(&self) -> bool {
        self.phys_in.is_some() && self.moved() && self.output == self.input
    }
}
