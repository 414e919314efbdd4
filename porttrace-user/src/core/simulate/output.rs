//! The way out of what the node sends, and next hops in general (`ip_route_output_key`, net/ipv4/route.c).

use super::config::InterfaceConf;
use super::fib::Entry;
use super::path::{LOOPBACK, dropped};
use super::routing::{Found, Key};
use super::run::{Next, Run};
use super::walk::{Again, Walk};
use crate::core::model::flow::Family;
use crate::core::model::steps::{Step, Taken};
use crate::core::model::trace::{Decision, DropReason, Fraction, Hook, RouteKind};

impl<'s> Run<'s> {
    /// `ip_route_me_harder`: the way out is looked up again after OUTPUT changed the packet. The hook keeps the old output.
    pub(super) fn reroute(&mut self, walk: &mut Walk<'s>) -> Next {
        self.route_output(walk, None)
    }

    /// `ip_route_output_key_hash_rcu`; `then` is the hook to enter, `None` to stay in the present one.
    pub(super) fn route_output(&mut self, walk: &mut Walk<'s>, then: Option<Hook>) -> Next {
        if !self.sim.routing.known {
            self.assume("routes are not part of the state: where packets leave is not known");
            walk.output_unknown = true;
            walk.to_self = self.sim.routing.is_local(walk.tuple.dst).unwrap_or(walk.tuple.dst.is_loopback());
            walk.output = walk.to_self.then_some(&LOOPBACK);
            return enter(walk, then);
        }
        let sim = self.sim;
        let mut key = Key::of(walk, "lo");
        if walk.tuple.src.is_unspecified() {
            key.src = None;
        }
        let found = sim.routing.lookup(&key, &mut |text| self.assume(text));
        let entry = match found {
            Found::Route(entry) => entry,
            Found::Refused(kind) => return self.refused(walk, kind),
        };
        match entry.kind {
            // `ip6_rt_get_dev_rcu`: local and anycast routes lead through lo.
            RouteKind::Local | RouteKind::Anycast => {
                walk.to_self = true;
                walk.output = Some(&LOOPBACK);
                walk.gateway = None;
                self.choose_source(walk, entry, "lo");
                record(walk, entry, Taken::Loopback);
                enter(walk, then)
            }
            RouteKind::Unicast | RouteKind::Broadcast | RouteKind::Multicast => {
                walk.to_self = false;
                self.take_ways(walk, entry, Some(Again::Route(then)));
                let output = walk.output_name().unwrap_or_default();
                self.choose_source(walk, entry, output);
                // `__mkroute_output`: a loopback source leaves only where route_localnet allows it.
                if walk.family() == Family::V4
                    && walk.tuple.src.is_loopback()
                    && output != "lo"
                    && !self.localnet(self.sim.config.interface(output))
                {
                    walk.note(format!("127.0.0.0/8 may not leave by {output} without route_localnet (EINVAL)"));
                    return dropped(DropReason::Martian);
                }
                enter(walk, then)
            }
            kind => self.refused(walk, kind),
        }
    }

    /// OUTPUT is over. Before a broadcast leaves, a copy of it goes through POSTROUTING and back to the node (`ip_mc_output`,
    /// net/ipv4/ip_output.c).
    pub(super) fn send_off(&mut self, walk: &mut Walk<'s>) {
        let wire = walk.output_name().is_some_and(|output| output != "lo");
        if walk.leaves_as == RouteKind::Broadcast && walk.family() == Family::V4 && wire {
            let mut original = walk.fork();
            original.note("a broadcast: a copy of it comes back to this node");
            original.enter(Hook::Postrouting);
            walk.copied = Some(original);
            walk.decide(Decision::Copy { text: "the kernel's copy of the broadcast, for this node itself".into() });
        }
        walk.enter(Hook::Postrouting);
    }

    /// A locally sent packet without a way out: the sender gets an error.
    fn refused(&mut self, walk: &mut Walk<'s>, kind: RouteKind) -> Next {
        nowhere(walk, kind);
        match kind {
            RouteKind::Blackhole => dropped(DropReason::Blackhole),
            _ => dropped(DropReason::NoRoute),
        }
    }

    /// Source selection for a packet that was not bound: the route's preferred source, else `inet_select_addr`.
    fn choose_source(&mut self, walk: &mut Walk<'s>, entry: &Entry, output: &str) {
        if !walk.tuple.src.is_unspecified() {
            return;
        }
        let source = if walk.to_self {
            Some(walk.tuple.dst)
        } else {
            let towards = walk.gateway.unwrap_or(walk.tuple.dst);
            entry.prefsrc.or_else(|| self.sim.config.source_address(output, towards).flatten())
        };
        match source {
            Some(source) => {
                walk.tuple.src = source;
                walk.conn = super::conn::Conn::begins(walk.tuple);
                walk.step(Step::Source { address: source });
            }
            None => self.assume("no source address could be chosen for the sender"),
        }
    }

    /// Takes the route's next hop. Several share the load by a hash of the addresses with a seed of the kernel's own
    /// (`fib_select_multipath`): the path forks by weight, and the other ways look this route up again.
    pub(super) fn take_ways(&mut self, walk: &mut Walk<'s>, entry: &'s Entry, again: Option<Again>) {
        let ways = entry.alive().count();
        if let (None, 2..) = (walk.way, ways) {
            for other in (1..ways).rev() {
                let mut fork = walk.fork();
                fork.way = Some(other);
                fork.again = again.clone().map(Box::new);
                self.later(fork);
            }
        }
        let taken = walk.way.take().unwrap_or(0);
        let Some(way) = entry.alive().nth(taken) else { return record(walk, entry, Taken::None) };
        if ways > 1 {
            let total: u64 = entry.alive().map(|way| u64::from(way.weight)).sum();
            let text = format!("next hop {} of {ways} by hash, weight {} of {total}", taken + 1, way.weight);
            walk.by_chance(Fraction::new(u64::from(way.weight), total));
            walk.decide(Decision::Assumed { rule: None, text, taken: true });
        }
        record(walk, entry, Taken::Way(way.number));
    }

    pub(super) fn localnet(&mut self, conf: InterfaceConf) -> bool {
        conf.route_localnet.unwrap_or_else(|| {
            self.assume("route_localnet is not part of the state: taken as off");
            0
        }) != 0
    }
}

fn enter(walk: &mut Walk<'_>, then: Option<Hook>) -> Next {
    if let Some(hook) = then {
        walk.enter(hook);
    }
    Next::Go
}

/// Writes the routing decision down and takes its way.
pub(super) fn record<'s>(walk: &mut Walk<'s>, entry: &'s Entry, taken: Taken) {
    let way = match taken {
        Taken::Way(at) => entry.hops.get(usize::from(at)),
        Taken::None | Taken::Loopback => None,
    };
    walk.output = match taken {
        Taken::Loopback => Some(&LOOPBACK),
        Taken::None | Taken::Way(_) => way.and_then(|way| way.interface.as_ref()),
    };
    walk.gateway = way.and_then(|way| way.gateway);
    walk.leaves_as = entry.kind;
    walk.step(Step::Route { kind: entry.kind, route: Some(entry.number), taken });
}

/// As [`record`], by the first way that can be taken.
pub(super) fn record_first<'s>(walk: &mut Walk<'s>, entry: &'s Entry) {
    record(walk, entry, entry.alive().next().map_or(Taken::None, |way| Taken::Way(way.number)));
}

/// Writes down that no route was found.
pub(super) fn nowhere(walk: &mut Walk<'_>, kind: RouteKind) {
    walk.step(Step::Route { kind, route: None, taken: Taken::None });
}
