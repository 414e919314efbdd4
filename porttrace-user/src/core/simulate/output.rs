//! The way out of what the node sends, and next hops in general (`ip_route_output_key`, net/ipv4/route.c).

use super::fib::{Entry, Way};
use super::path::{LOOPBACK, dropped};
use super::routing::{Found, Key};
use super::run::{Next, Run};
use super::walk::{Again, Walk};
use crate::core::model::flow::Family;
use crate::core::model::name::Name;
use crate::core::model::trace::{Decision, DropReason, Fraction, Hook, Hop, Route, RouteKind};

impl Run<'_> {
    /// `ip_route_me_harder`: the way out is looked up again after OUTPUT changed the packet. The hook keeps the old output.
    pub(super) fn reroute(&mut self, walk: &mut Walk) -> Next {
        self.route_output(walk, None)
    }

    /// `ip_route_output_key_hash_rcu`; `then` is the hook to enter, `None` to stay in the present one.
    pub(super) fn route_output(&mut self, walk: &mut Walk, then: Option<Hook>) -> Next {
        if !self.sim.routing.known {
            self.assume("routes are not part of the state: where packets leave is not known");
            walk.output_unknown = true;
            walk.to_self = self.sim.routing.is_local(walk.tuple.dst).unwrap_or(walk.tuple.dst.is_loopback());
            walk.output = walk.to_self.then_some(LOOPBACK);
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
                walk.output = Some(LOOPBACK);
                walk.gateway = None;
                self.choose_source(walk, entry, "lo");
                record(walk, entry, Some(&Way::to(LOOPBACK)));
                enter(walk, then)
            }
            RouteKind::Unicast | RouteKind::Broadcast | RouteKind::Multicast => {
                walk.to_self = false;
                self.take_ways(walk, entry, Some(Again::Route(then)));
                let output = walk.output.clone().unwrap_or_default();
                self.choose_source(walk, entry, &output);
                // `__mkroute_output`: a loopback source leaves only where route_localnet allows it.
                if walk.family() == Family::V4
                    && walk.tuple.src.is_loopback()
                    && *output != *"lo"
                    && !self.localnet(&output)
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
    pub(super) fn send_off(&mut self, walk: &mut Walk) {
        let wire = walk.output.as_deref().is_some_and(|output| output != "lo");
        if walk.leaves_as == RouteKind::Broadcast && walk.family() == Family::V4 && wire {
            let mut original = walk.fork();
            original.note("a broadcast: a copy of it comes back to this node");
            original.enter(Hook::Postrouting);
            walk.copied = Some(Box::new(original));
            walk.decide(Decision::Copy { text: "the kernel's copy of the broadcast, for this node itself".into() });
        }
        walk.enter(Hook::Postrouting);
    }

    /// A locally sent packet without a way out: the sender gets an error.
    fn refused(&mut self, walk: &mut Walk, kind: RouteKind) -> Next {
        walk.hop(Hop::Route { decision: nowhere(walk, kind) });
        match kind {
            RouteKind::Blackhole => dropped(DropReason::Blackhole),
            _ => dropped(DropReason::NoRoute),
        }
    }

    /// Source selection for a packet that was not bound: the route's preferred source, else `inet_select_addr`.
    fn choose_source(&mut self, walk: &mut Walk, entry: &Entry, output: &str) {
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
                walk.note(format!("source address {source} is chosen for the sender"));
            }
            None => self.assume("no source address could be chosen for the sender"),
        }
    }

    /// Takes the route's next hop. Several share the load by a hash of the addresses with a seed of the kernel's own
    /// (`fib_select_multipath`): the path forks by weight, and the other ways look this route up again.
    pub(super) fn take_ways(&mut self, walk: &mut Walk, entry: &Entry, again: Option<Again>) {
        let ways = entry.alive().count();
        if let (None, 2..) = (walk.way, ways) {
            for other in (1..ways).rev() {
                let mut fork = walk.fork();
                fork.way = Some(other);
                fork.again.clone_from(&again);
                self.later(fork);
            }
        }
        let taken = walk.way.take().unwrap_or(0);
        let Some(way) = entry.alive().nth(taken) else { return record(walk, entry, None) };
        if ways > 1 {
            let total: u64 = entry.alive().map(|way| u64::from(way.weight)).sum();
            let text = format!("next hop {} of {ways} by hash, weight {} of {total}", taken + 1, way.weight);
            walk.probability = walk.probability.times(Fraction::new(u64::from(way.weight), total));
            walk.decide(Decision::Assumed { rule: None, text, taken: true });
        }
        record(walk, entry, Some(way));
    }

    pub(super) fn localnet(&mut self, interface: &str) -> bool {
        let (all, own) = (self.sim.config.interface("all"), self.sim.config.interface(interface));
        if all.route_localnet.is_none() && own.route_localnet.is_none() {
            self.assume("route_localnet is not part of the state: taken as off");
        }
        all.route_localnet.unwrap_or(0) | own.route_localnet.unwrap_or(0) != 0
    }
}

impl Way {
    const fn to(interface: Name) -> Self {
        Self::new(Some(interface), None)
    }
}

fn enter(walk: &mut Walk, then: Option<Hook>) -> Next {
    if let Some(hook) = then {
        walk.enter(hook);
    }
    Next::Go
}

/// Writes the routing decision down and takes its way.
pub(super) fn record(walk: &mut Walk, entry: &Entry, way: Option<&Way>) {
    let interface = way.and_then(|way| way.interface.clone());
    let gateway = way.and_then(|way| way.gateway);
    walk.output = interface.clone();
    walk.gateway = gateway;
    walk.leaves_as = entry.kind;
    walk.hop(Hop::Route {
        decision: Route {
            dst: walk.tuple.dst,
            kind: entry.kind,
            interface,
            gateway,
            table: entry.table.clone(),
            route: entry.text.clone(),
        },
    });
}

pub(super) fn nowhere(walk: &Walk, kind: RouteKind) -> Route {
    Route { dst: walk.tuple.dst, kind, interface: None, gateway: None, table: Name::default(), route: Name::default() }
}
