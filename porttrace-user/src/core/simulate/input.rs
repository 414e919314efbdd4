//! Routing of what arrives (`ip_route_input_slow`, `ip6_route_input`), and what may not pass.

use super::config::InterfaceConf;
use super::output::{nowhere, record, record_first};
use super::path::{dropped, from_loopback, rejected};
use super::routing::{Found, Key};
use super::run::{Next, Run};
use super::walk::Walk;
use crate::core::model::steps::Taken;
use crate::core::model::trace::{DropReason, Hook, RouteKind};
use std::net::IpAddr;

impl<'s> Run<'s> {
    /// `ip_route_input_slow` (net/ipv4/route.c).
    pub(super) fn route_input4(&mut self, walk: &mut Walk<'s>) -> Next {
        let input = walk.input_name().unwrap_or_default();
        let (src, dst) = (walk.tuple.src, walk.tuple.dst);
        let broadcast = |address: IpAddr| matches!(address, IpAddr::V4(four) if four.is_broadcast());
        if src.is_multicast() || broadcast(src) {
            return dropped(DropReason::Martian);
        }
        let conf = self.sim.config.interface(input);
        if (dst.is_loopback() || src.is_loopback()) && !self.localnet(conf) {
            walk.note(format!("127.0.0.0/8 is not routed on {input} without route_localnet"));
            return dropped(DropReason::Martian);
        }
        let sim = self.sim;
        let found = sim.routing.lookup(&Key::of(walk, input), &mut |text| self.assume(text));
        let forwards = self.forwards4(conf);
        let (entry, kind) = match found {
            Found::Route(entry) => (Some(entry), entry.kind),
            Found::Refused(kind) => (None, kind),
        };
        if let Some(entry) = entry {
            if kind == RouteKind::Unicast && forwards {
                self.take_ways(walk, entry, None);
            } else {
                record_first(walk, entry);
            }
        } else {
            nowhere(walk, kind);
        }
        match kind {
            RouteKind::Local | RouteKind::Broadcast | RouteKind::Multicast | RouteKind::Anycast => {
                walk.to_self = true;
                if let Some(end) = self.validate_source(walk, (input, conf), false) {
                    return end;
                }
                walk.enter(Hook::Input);
                Next::Go
            }
            _ if !forwards => dropped(DropReason::ForwardingDisabled),
            RouteKind::Unicast => {
                walk.to_self = false;
                // `fib_validate_source` looks closer where it might send a redirect.
                let back = walk.output_name() == Some(input);
                if let Some(end) = self.validate_source(walk, (input, conf), back) {
                    return end;
                }
                if walk.stays_on_bridge() {
                    return self.bridge_forward(walk);
                }
                self.forward(walk)
            }
            RouteKind::Blackhole => dropped(DropReason::Blackhole),
            RouteKind::Prohibit => rejected("icmp-admin-prohibited"),
            RouteKind::Unreachable => rejected("icmp-host-unreachable"),
            RouteKind::Throw | RouteKind::None => rejected("icmp-net-unreachable"),
        }
    }

    fn forwards4(&mut self, conf: InterfaceConf) -> bool {
        conf.forwarding.unwrap_or_else(|| {
            self.assume("ip_forward is not part of the state: taken as on");
            1
        }) != 0
    }

    /// `ip6_route_input` and `ip6_forward`.
    pub(super) fn route_input6(&mut self, walk: &mut Walk<'s>) -> Next {
        let input = walk.input_name().unwrap_or_default();
        let sim = self.sim;
        let mut key = Key::of(walk, input);
        // `rt6_need_strict`: such a destination must be on the input interface, so that nothing from outside reaches ::1.
        let strict = matches!(walk.tuple.dst, IpAddr::V6(six)
            if six.is_multicast() || six.is_unicast_link_local() || six.is_loopback());
        key.output = strict.then_some(input);
        let found = sim.routing.lookup(&key, &mut |text| self.assume(text));
        // `br_nf_pre_routing_finish_ipv6` drops what has no route, without a word to its sender.
        let silent = walk.phys_in.is_some() && walk.moved();
        let entry = match found {
            Found::Route(entry) => entry,
            Found::Refused(kind) if silent => {
                nowhere(walk, kind);
                return dropped(DropReason::NoRoute);
            }
            Found::Refused(kind) => {
                nowhere(walk, kind);
                return match kind {
                    RouteKind::Blackhole => dropped(DropReason::Blackhole),
                    RouteKind::Prohibit => rejected("icmp6-adm-prohibited"),
                    _ => rejected("icmp6-no-route"),
                };
            }
        };
        match entry.kind {
            RouteKind::Local | RouteKind::Broadcast | RouteKind::Multicast | RouteKind::Anycast => {
                if silent && from_loopback(walk) {
                    return dropped(DropReason::Martian);
                }
                record_first(walk, entry);
                walk.to_self = true;
                walk.enter(Hook::Input);
                Next::Go
            }
            RouteKind::Unicast => {
                self.take_ways(walk, entry, None);
                if walk.stays_on_bridge() {
                    return self.bridge_forward(walk);
                }
                if silent && from_loopback(walk) {
                    return dropped(DropReason::Martian);
                }
                self.forward6(walk)
            }
            RouteKind::Blackhole => {
                record(walk, entry, Taken::None);
                dropped(DropReason::Blackhole)
            }
            RouteKind::Prohibit => {
                record(walk, entry, Taken::None);
                rejected("icmp6-adm-prohibited")
            }
            _ => {
                record(walk, entry, Taken::None);
                rejected("icmp6-no-route")
            }
        }
    }

    fn forward6(&mut self, walk: &mut Walk<'s>) -> Next {
        let forwards = self.sim.config.forwarding6.unwrap_or_else(|| {
            self.assume("net.ipv6.conf.all.forwarding is not part of the state: taken as on");
            1
        });
        if forwards == 0 {
            return dropped(DropReason::ForwardingDisabled);
        }
        // "This check is security critical", yet it is made only where no redirect is sent: towards another interface.
        let other = walk.output != walk.input;
        let link_local = matches!(walk.tuple.src, IpAddr::V6(six) if six.is_unicast_link_local());
        let no_source =
            walk.tuple.src.is_unspecified() || walk.tuple.src.is_multicast() || walk.tuple.src.is_loopback();
        if other && no_source {
            return dropped(DropReason::Martian);
        }
        if other && link_local {
            return rejected("icmp6-beyond-scope");
        }
        walk.to_self = false;
        self.forward(walk)
    }
}
