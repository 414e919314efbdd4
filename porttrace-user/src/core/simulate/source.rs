//! Is the source believable: `fib_validate_source` (net/ipv4/fib_frontend.c) and `-m rpfilter` (net/ipv4/netfilter/ipt_rpfilter.c).

use super::matches::Answer;
use super::routing::{Found, Key};
use super::run::{Next, Run};
use super::walk::Walk;
use crate::core::model::flow::Family;
use crate::core::model::rules::RpFilter;
use crate::core::model::trace::{DropReason, RouteKind, Verdict};
use std::net::{IpAddr, Ipv4Addr};

impl Run<'_> {
    /// Runs after PREROUTING, on the rewritten destination; `Some` drops the packet.
    pub(super) fn validate_source(&mut self, walk: &mut Walk, input: &str) -> Option<Next> {
        let (all, own) = (self.sim.config.interface("all"), self.sim.config.interface(input));
        if all.rp_filter.is_none() && own.rp_filter.is_none() {
            self.assume("rp_filter is not part of the state: taken as off");
        }
        let mode = all.rp_filter.unwrap_or(0).max(own.rp_filter.unwrap_or(0));
        let accept_local = all.accept_local.unwrap_or(0) | own.accept_local.unwrap_or(0) != 0;
        let src = walk.tuple.src;
        let own_source = self.sim.routing.is_local(src).unwrap_or(false);
        // Without rp_filter only addresses themselves count (`inet_lookup_ifaddr_rcu`), not all of 127.0.0.0/8.
        let exact = mode > 0 || !src.is_loopback() || src == IpAddr::V4(Ipv4Addr::LOCALHOST);
        if own_source && exact && !accept_local {
            walk.note(format!(
                "{src} is this node's own address: a packet from outside may not carry it (accept_local is off)"
            ));
            return Some(drop(DropReason::Martian));
        }
        if mode == 0 {
            return None;
        }
        let valid_mark = all.src_valid_mark.unwrap_or(0) | own.src_valid_mark.unwrap_or(0) != 0;
        let mark = if valid_mark { walk.mark } else { 0 };
        let good = match self.reverse(walk, input, mark) {
            Reverse::None => false,
            Reverse::Local => accept_local,
            Reverse::SameInterface => true,
            Reverse::OtherInterface => mode == 2,
        };
        if good {
            return None;
        }
        walk.note(format!("rp_filter={mode}: the way back to {src} does not lead through {input}"));
        Some(drop(DropReason::RpFilter))
    }

    /// Where a packet to the source would go.
    fn reverse(&mut self, walk: &Walk, input: &str, mark: u32) -> Reverse {
        let sim = self.sim;
        let key = Key {
            dst: walk.tuple.src,
            src: Some(walk.tuple.dst),
            input: "lo",
            output: None,
            mark,
            proto: Some(walk.tuple.proto),
            ports: (walk.tuple.dport, walk.tuple.sport),
        };
        match sim.routing.lookup(&key, &mut |text| self.assume(text)) {
            Found::Route(entry) if entry.kind == RouteKind::Local => Reverse::Local,
            Found::Route(entry) if entry.kind == RouteKind::Unicast => {
                if entry.alive().any(|way| way.interface.as_deref() == Some(input)) {
                    Reverse::SameInterface
                } else {
                    Reverse::OtherInterface
                }
            }
            _ => Reverse::None,
        }
    }

    /// `rpfilter_mt`: true where the reverse path is good, unless inverted.
    pub(super) fn rp_match(&mut self, walk: &Walk, asked: &RpFilter) -> Answer {
        if !self.sim.routing.known {
            return Answer::Unknown("the way back to the source".into());
        }
        let Some(input) = walk.input.as_deref() else { return true.into() };
        if input == "lo" || walk.looped {
            return (!asked.invert).into();
        }
        if walk.family() == Family::V4 && (walk.tuple.src.is_unspecified() || walk.tuple.dst.is_multicast()) {
            return (!asked.invert).into();
        }
        let mark = if asked.valid_mark { walk.mark } else { 0 };
        let good = match self.reverse(walk, input, mark) {
            Reverse::None => false,
            Reverse::Local => asked.accept_local,
            Reverse::SameInterface => true,
            Reverse::OtherInterface => asked.loose,
        };
        (good != asked.invert).into()
    }
}

enum Reverse {
    None,
    Local,
    SameInterface,
    OtherInterface,
}

const fn drop(reason: DropReason) -> Next {
    Next::End(Verdict::Dropped { reason, by: None })
}
