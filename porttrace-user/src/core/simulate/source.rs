//! Is the source believable: `fib_validate_source` (net/ipv4/fib_frontend.c) and `-m rpfilter` (net/ipv4/netfilter/ipt_rpfilter.c).

use super::config::InterfaceConf;
use super::matches::Answer;
use super::routing::{Found, Key};
use super::run::{Next, Run};
use super::walk::Walk;
use crate::core::model::flow::Family;
use crate::core::model::rules::RpFilter;
use crate::core::model::trace::{DropReason, RouteKind, Verdict};
use std::net::{IpAddr, Ipv4Addr};

impl<'s> Run<'s> {
    /// Runs after PREROUTING, on the rewritten destination; `Some` drops the packet. `back`: the packet is to be forwarded by
    /// the interface it came from.
    pub(super) fn validate_source(
        &mut self,
        walk: &mut Walk<'s>,
        (input, conf): (&'s str, InterfaceConf),
        back: bool,
    ) -> Option<Next> {
        let mode = conf.rp_filter.unwrap_or_else(|| {
            self.assume("rp_filter is not part of the state: taken as off");
            0
        });
        let accept_local = conf.accept_local.unwrap_or(0) != 0;
        if mode == 0 && accept_local && !back {
            return None;
        }
        let src = walk.tuple.src;
        if mode == 0 && !back && !self.sim.routing.custom4 {
            // Only addresses themselves count here (`inet_lookup_ifaddr_rcu`), not all of 127.0.0.0/8.
            let exact = !src.is_loopback() || src == IpAddr::V4(Ipv4Addr::LOCALHOST);
            let own_source = exact && self.sim.routing.is_local(src).unwrap_or(false);
            return own_source.then(|| self.own_source(walk));
        }
        let mark = if conf.src_valid_mark.unwrap_or(0) != 0 { walk.mark } else { 0 };
        // `__fib_validate_source`: policy rules see the output interface as the input, lo for what stays here.
        let from = walk.output_name().filter(|_| !walk.to_self);
        let good = match self.reverse(walk, input, mark, from.unwrap_or("lo")) {
            Reverse::Local { .. } if !accept_local => return Some(self.own_source(walk)),
            Reverse::Special { .. } => {
                walk.note(format!("{src} is no address of a single node: it cannot be a source"));
                return Some(drop(DropReason::Martian));
            }
            Reverse::None => mode == 0,
            Reverse::SameInterface | Reverse::Local { same: true } => true,
            Reverse::Local { same: false } | Reverse::OtherInterface => mode != 1,
        };
        if good {
            return None;
        }
        walk.note(format!("rp_filter={mode}: the way back to {src} does not lead through {input}"));
        Some(drop(DropReason::RpFilter))
    }

    fn own_source(&self, walk: &mut Walk<'s>) -> Next {
        let src = walk.tuple.src;
        walk.note(format!(
            "{src} is this node's own address: a packet from outside may not carry it (accept_local is off)"
        ));
        drop(DropReason::Martian)
    }

    /// Where a packet to the source would go.
    fn reverse(&mut self, walk: &Walk<'s>, input: &'s str, mark: u32, from: &str) -> Reverse {
        let sim = self.sim;
        let family = walk.family();
        let asked = WayBack { source: walk.tuple.src, tos: walk.tos, input };
        if let Some((last, found)) = self.way_back
            && last == asked
        {
            return found;
        }
        let key = Key {
            dst: walk.tuple.src,
            src: Some(walk.tuple.dst).filter(|dst| sim.routing.address_type(*dst, None) != Some(RouteKind::Broadcast)),
            input: from,
            output: None,
            mark,
            tos: walk.tos,
            proto: Some(walk.tuple.proto),
            ports: (walk.tuple.dport, walk.tuple.sport),
        };
        let found = match sim.routing.lookup(&key, &mut |text| self.assume(text)) {
            Found::Route(entry) if matches!(entry.kind, RouteKind::Local | RouteKind::Unicast) => {
                // `fib_info_nh_uses_dev`
                let same = entry.alive().any(|way| way.interface.as_deref() == Some(input));
                match (entry.kind, same) {
                    (RouteKind::Local, same) => Reverse::Local { same },
                    (_, true) => Reverse::SameInterface,
                    (_, false) => Reverse::OtherInterface,
                }
            }
            Found::Route(entry)
                if matches!(entry.kind, RouteKind::Broadcast | RouteKind::Multicast | RouteKind::Anycast) =>
            {
                Reverse::Special { same: entry.alive().any(|way| way.interface.as_deref() == Some(input)) }
            }
            _ => Reverse::None,
        };
        if sim.routing.asks_addresses_only(family) {
            self.way_back = Some((asked, found));
        }
        found
    }

    /// `rpfilter_mt`: true where the reverse path is good, unless inverted.
    pub(super) fn rp_match(&mut self, walk: &Walk<'s>, asked: &RpFilter) -> Answer {
        if !self.sim.routing.known {
            return Answer::Unknown("the way back to the source".into());
        }
        let Some(input) = walk.input_name() else { return true.into() };
        if input == "lo" || walk.looped {
            return (!asked.invert).into();
        }
        if walk.family() == Family::V4 && (walk.tuple.src.is_unspecified() || walk.tuple.dst.is_multicast()) {
            return (!asked.invert).into();
        }
        let mark = if asked.valid_mark { walk.mark } else { 0 };
        let good = match self.reverse(walk, input, mark, "lo") {
            Reverse::None | Reverse::Special { .. } => false,
            Reverse::Local { same } => asked.accept_local && (same || asked.loose),
            Reverse::SameInterface => true,
            Reverse::OtherInterface => asked.loose,
        };
        (good != asked.invert).into()
    }

    /// `fib saddr . iif oif exists` (`nft_fib4_eval`, `nft_fib6_eval`): unlike `-m rpfilter`, IPv4's takes broadcast addresses for
    /// sources, and asks the routes for packets to multicast groups too.
    pub(super) fn has_way_back(&mut self, walk: &Walk<'s>, marked: bool) -> Answer {
        if !self.sim.routing.known {
            return Answer::Unknown("the way back to the source".into());
        }
        let Some(input) = walk.hook_input_name() else { return true.into() };
        let unasked = match (walk.tuple.src, walk.tuple.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                src.octets()[0] == 0 && (dst.is_broadcast() || dst.octets()[..3] == [224, 0, 0])
            }
            _ => false,
        };
        if input == "lo" || walk.looped || unasked {
            return true.into();
        }
        match self.reverse(walk, input, if marked { walk.mark } else { 0 }, "lo") {
            Reverse::SameInterface => true,
            Reverse::Special { same } => same && walk.family() == Family::V4,
            Reverse::None | Reverse::Local { .. } | Reverse::OtherInterface => false,
        }
        .into()
    }
}

/// Who asks for the way back, where only the address and the TOS decide it.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct WayBack<'s> {
    source: IpAddr,
    tos: u8,
    input: &'s str,
}

#[derive(Clone, Copy)]
pub(super) enum Reverse {
    None,
    /// An address of the node; `same`: of that interface.
    Local {
        same: bool,
    },
    /// A broadcast or multicast address; `same`: of that interface.
    Special {
        same: bool,
    },
    SameInterface,
    OtherInterface,
}

fn drop(reason: DropReason) -> Next {
    Next::end(Verdict::Dropped { reason, by: None })
}
