//! The way between the hooks: where a packet starts, what routing does with it, how it leaves.

use super::routing::{Entry, Found, Key, Way};
use super::run::{Next, Run};
use super::walk::{Again, Walk};
use crate::core::model::flow::Family;
use crate::core::model::name::Name;
use crate::core::model::trace::{Decision, DropReason, Fraction, Hook, Hop, Route, RouteKind, Verdict};
use std::net::IpAddr;

const LOOPBACK: Name = Name::Static("lo");

fn dropped(reason: DropReason) -> Next {
    Next::End(Verdict::Dropped { reason, by: None })
}

fn rejected(with: &'static str) -> Next {
    Next::End(Verdict::Rejected { with: Name::Static(with), by: None })
}

impl Run<'_> {
    /// A packet from outside: the interface and, behind a bridge, its port.
    pub(super) fn receive(&mut self, walk: &mut Walk) -> Next {
        let Some(input) = walk.input.clone() else { return self.send(walk) };
        walk.hop(Hop::Receive { interface: input.clone(), tuple: walk.tuple });
        if let Some(bridge) = self.sim.config.link(&input).and_then(|link| link.master.clone())
            && self.sim.config.link(&bridge).is_some_and(|link| link.kind == "bridge")
        {
            walk.phys_in = Some(input);
            walk.input = Some(self.sim.config.name(&bridge));
            if let Some(end) = self.bridge(walk, &bridge) {
                return end;
            }
        }
        // `ip6_rcv_core`: loopback addresses never come from outside.
        let loopback = walk.tuple.src.is_loopback() || walk.tuple.dst.is_loopback();
        if walk.family() == Family::V6 && loopback && walk.input.as_deref() != Some("lo") {
            return dropped(DropReason::Martian);
        }
        walk.enter(Hook::Prerouting);
        Next::Go
    }

    /// A packet between two ports of one bridge is not routed; it meets the IP hooks only with bridge-nf.
    fn bridge(&mut self, walk: &mut Walk, bridge: &str) -> Option<Next> {
        let own = self.sim.routing.is_local(walk.tuple.dst).unwrap_or(false);
        if own || !self.sim.config.on_link(bridge, walk.tuple.dst) {
            return None;
        }
        let setting = match walk.family() {
            Family::V4 => self.sim.config.bridge_nf4,
            Family::V6 => self.sim.config.bridge_nf6,
        };
        walk.bridged = true;
        match setting {
            Some(0) => {
                walk.note(format!("stays on bridge {bridge}: bridge-nf is off, no rule sees it"));
                let interface = self.sim.config.name(bridge);
                walk.hop(Hop::Transmit { interface: interface.clone(), gateway: None, tuple: walk.tuple });
                Some(Next::End(Verdict::Forwarded { interface, next_hop: walk.tuple.dst, to: walk.tuple }))
            }
            Some(_) => None,
            None => {
                self.assume("bridge-nf-call-iptables is not known: taken as on");
                None
            }
        }
    }

    /// A packet of the node's own: routed first, then OUTPUT.
    fn send(&mut self, walk: &mut Walk) -> Next {
        walk.hop(Hop::LocalSend { tuple: walk.tuple });
        if self.sim.routing.is_local(walk.tuple.src) == Some(false) && !walk.tuple.src.is_unspecified() {
            self.assume(format!(
                "{} is not an address of this node, yet the node is taken as the sender",
                walk.tuple.src
            ));
        }
        self.route_output(walk, Some(Hook::Output))
    }

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
        let mut key = Key::of(&walk.tuple, "lo", walk.mark);
        if walk.tuple.src.is_unspecified() {
            key.src = None;
        }
        let found = sim.routing.lookup(&key, &mut |text| self.assume(text));
        let entry = match found {
            Found::Route(entry) => entry,
            Found::Refused(kind) => return self.refused(walk, kind),
        };
        match entry.kind {
            RouteKind::Local => {
                walk.to_self = true;
                walk.output = Some(LOOPBACK);
                walk.gateway = None;
                self.choose_source(walk, entry, "lo");
                record(walk, entry, Some(&Way::to(LOOPBACK)));
                enter(walk, then)
            }
            RouteKind::Unicast | RouteKind::Broadcast | RouteKind::Multicast => {
                walk.to_self = false;
                self.take_ways(walk, entry, Some(Again(then)));
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
    fn take_ways(&mut self, walk: &mut Walk, entry: &Entry, again: Option<Again>) {
        let ways: Vec<&Way> = entry.alive().collect();
        if let (None, 2..) = (walk.way, ways.len()) {
            for other in (1..ways.len()).rev() {
                let mut fork = walk.fork();
                fork.way = Some(other);
                fork.again = again;
                self.later(fork);
            }
        }
        let taken = walk.way.take().unwrap_or(0);
        let Some(way) = ways.get(taken) else { return record(walk, entry, None) };
        if ways.len() > 1 {
            let total: u64 = ways.iter().map(|way| u64::from(way.weight)).sum();
            let text = format!("next hop {} of {} by hash, weight {} of {total}", taken + 1, ways.len(), way.weight);
            walk.probability = walk.probability.times(Fraction::new(u64::from(way.weight), total));
            walk.decide(Decision::Assumed { rule: None, text, taken: true });
        }
        record(walk, entry, Some(way));
    }

    fn localnet(&mut self, interface: &str) -> bool {
        let (all, own) = (self.sim.config.interface("all"), self.sim.config.interface(interface));
        if all.route_localnet.is_none() && own.route_localnet.is_none() {
            self.assume("route_localnet is not part of the state: taken as off");
        }
        all.route_localnet.unwrap_or(0) | own.route_localnet.unwrap_or(0) != 0
    }

    /// PREROUTING is over: `ip_rcv_finish`.
    pub(super) fn after_prerouting(&mut self, walk: &mut Walk) -> Next {
        if walk.looped {
            // The packet still has the route of its way out (`skb_valid_dst`).
            walk.enter(Hook::Input);
            return Next::Go;
        }
        if !self.sim.routing.known {
            return self.route_without_routes(walk);
        }
        match walk.family() {
            Family::V4 => self.route_input4(walk),
            Family::V6 => self.route_input6(walk),
        }
    }

    fn route_without_routes(&mut self, walk: &mut Walk) -> Next {
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

    /// `ip_route_input_slow` (net/ipv4/route.c).
    fn route_input4(&mut self, walk: &mut Walk) -> Next {
        let input = walk.input.clone().unwrap_or_default();
        let (src, dst) = (walk.tuple.src, walk.tuple.dst);
        let broadcast = |address: IpAddr| matches!(address, IpAddr::V4(four) if four.is_broadcast());
        if src.is_multicast() || broadcast(src) {
            return dropped(DropReason::Martian);
        }
        if (dst.is_loopback() || src.is_loopback()) && !self.localnet(&input) {
            walk.note(format!("127.0.0.0/8 is not routed on {input} without route_localnet"));
            return dropped(DropReason::Martian);
        }
        let sim = self.sim;
        let found = sim.routing.lookup(&Key::of(&walk.tuple, &input, walk.mark), &mut |text| self.assume(text));
        let forwards = self.forwards4(&input);
        let (entry, kind) = match found {
            Found::Route(entry) => (Some(entry), entry.kind),
            Found::Refused(kind) => (None, kind),
        };
        if let Some(entry) = entry {
            if kind == RouteKind::Unicast && forwards {
                self.take_ways(walk, entry, None);
            } else {
                record(walk, entry, entry.alive().next());
            }
        } else {
            walk.hop(Hop::Route { decision: nowhere(walk, kind) });
        }
        match kind {
            RouteKind::Local | RouteKind::Broadcast | RouteKind::Multicast | RouteKind::Anycast => {
                walk.to_self = true;
                if let Some(end) = self.validate_source(walk, &input) {
                    return end;
                }
                walk.enter(Hook::Input);
                Next::Go
            }
            _ if !forwards => dropped(DropReason::ForwardingDisabled),
            RouteKind::Unicast => {
                walk.to_self = false;
                if let Some(end) = self.validate_source(walk, &input) {
                    return end;
                }
                self.forward(walk)
            }
            RouteKind::Blackhole => dropped(DropReason::Blackhole),
            RouteKind::Prohibit => rejected("icmp-admin-prohibited"),
            RouteKind::Unreachable => rejected("icmp-host-unreachable"),
            RouteKind::Throw | RouteKind::None => rejected("icmp-net-unreachable"),
        }
    }

    fn forwards4(&mut self, input: &str) -> bool {
        let (own, all) = (self.sim.config.interface(input), self.sim.config.interface("all"));
        own.forwarding.or(all.forwarding).unwrap_or_else(|| {
            self.assume("ip_forward is not part of the state: taken as on");
            1
        }) != 0
    }

    /// `ip6_route_input` and `ip6_forward`.
    fn route_input6(&mut self, walk: &mut Walk) -> Next {
        let input = walk.input.clone().unwrap_or_default();
        let sim = self.sim;
        let found = sim.routing.lookup(&Key::of(&walk.tuple, &input, walk.mark), &mut |text| self.assume(text));
        let entry = match found {
            Found::Route(entry) => entry,
            Found::Refused(kind) => {
                walk.hop(Hop::Route { decision: nowhere(walk, kind) });
                return match kind {
                    RouteKind::Blackhole => dropped(DropReason::Blackhole),
                    RouteKind::Prohibit => rejected("icmp6-adm-prohibited"),
                    _ => rejected("icmp6-no-route"),
                };
            }
        };
        match entry.kind {
            RouteKind::Local | RouteKind::Broadcast | RouteKind::Multicast | RouteKind::Anycast => {
                record(walk, entry, entry.alive().next());
                walk.to_self = true;
                walk.enter(Hook::Input);
                Next::Go
            }
            RouteKind::Unicast => {
                self.take_ways(walk, entry, None);
                self.forward6(walk)
            }
            RouteKind::Blackhole => {
                record(walk, entry, None);
                dropped(DropReason::Blackhole)
            }
            RouteKind::Prohibit => {
                record(walk, entry, None);
                rejected("icmp6-adm-prohibited")
            }
            _ => {
                record(walk, entry, None);
                rejected("icmp6-no-route")
            }
        }
    }

    fn forward6(&mut self, walk: &mut Walk) -> Next {
        let forwards = self.sim.config.forwarding6.unwrap_or_else(|| {
            self.assume("net.ipv6.conf.all.forwarding is not part of the state: taken as on");
            1
        });
        if forwards == 0 {
            return dropped(DropReason::ForwardingDisabled);
        }
        // "This check is security critical": such sources are never forwarded.
        let link_local = matches!(walk.tuple.src, IpAddr::V6(six) if six.is_unicast_link_local());
        if walk.tuple.src.is_unspecified() || walk.tuple.src.is_multicast() || walk.tuple.src.is_loopback() {
            return dropped(DropReason::Martian);
        }
        if link_local {
            return rejected("icmp6-beyond-scope");
        }
        walk.to_self = false;
        self.forward(walk)
    }

    /// `ip_forward`, `ip6_forward`: the TTL is counted down before FORWARD.
    fn forward(&mut self, walk: &mut Walk) -> Next {
        if walk.ttl <= 1 {
            return dropped(DropReason::Ttl);
        }
        walk.ttl -= 1;
        if let Some(link) = walk.output.as_deref().and_then(|name| self.sim.config.link(name))
            && link.mtu != 0
            && walk.length > link.mtu
        {
            return dropped(DropReason::TooBig);
        }
        if let Some(end) = self.hairpin(walk) {
            return end;
        }
        walk.enter(Hook::Forward);
        Next::Go
    }

    /// DNAT back to the bridge port that the packet came from: the bridge sends it there only in hairpin mode
    /// (`br_nf_pre_routing_finish` hands it back to the bridge, `should_deliver` decides).
    fn hairpin(&mut self, walk: &mut Walk) -> Option<Next> {
        let port = walk.phys_in.clone()?;
        let itself = walk.output == walk.input && walk.conn.original.src == walk.tuple.dst;
        if !itself {
            return None;
        }
        match self.sim.config.link(&port).and_then(|link| link.hairpin) {
            Some(false) if self.sim.config.bridge_nf4 != Some(0) => {
                let text = format!(
                    "{port} is not in hairpin mode: the bridge does not send the packet back where it came from"
                );
                walk.note(text.clone());
                Some(dropped(DropReason::Other { text }))
            }
            Some(_) => None,
            None => {
                self.assume(format!("hairpin mode of bridge port {port} is not part of the state: taken as on"));
                None
            }
        }
    }

    /// INPUT is over.
    pub(super) fn deliver(&mut self, walk: &mut Walk) -> Next {
        let found = self.sim.config.listener(&walk.tuple);
        if self.sim.config.listener(&walk.tuple).is_none() && walk.tuple.proto.has_ports() {
            self.assume("sockets are not part of the state: whether anything listens is not known");
        }
        let listening = found.map(|socket| socket.is_some());
        let listener = found.flatten().map(|socket| {
            let process = socket.process.as_deref().map(|process| format!(" ({process})")).unwrap_or_default();
            format!("{}:{}{process}", socket.address, socket.port)
        });
        walk.hop(Hop::Deliver { tuple: walk.tuple, listener });
        Next::End(Verdict::Delivered { to: walk.tuple, listening })
    }

    /// POSTROUTING is over: the packet leaves, or comes back by lo.
    pub(super) fn transmit(&mut self, walk: &mut Walk) -> Next {
        if walk.to_self && walk.local {
            walk.hop(Hop::Transmit { interface: LOOPBACK, gateway: None, tuple: walk.tuple });
            walk.hop(Hop::Receive { interface: LOOPBACK, tuple: walk.tuple });
            walk.looped = true;
            walk.input = Some(LOOPBACK);
            walk.output = None;
            walk.enter(Hook::Prerouting);
            return Next::Go;
        }
        let next_hop = walk.gateway.unwrap_or(walk.tuple.dst);
        let interface = match walk.output.clone() {
            Some(interface) => interface,
            None if walk.output_unknown => Name::Static("?"),
            None => return dropped(DropReason::NoRoute),
        };
        walk.hop(Hop::Transmit { interface: interface.clone(), gateway: walk.gateway, tuple: walk.tuple });
        Next::End(Verdict::Forwarded { interface, next_hop, to: walk.tuple })
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
fn record(walk: &mut Walk, entry: &Entry, way: Option<&Way>) {
    let interface = way.and_then(|way| way.interface.clone());
    let gateway = way.and_then(|way| way.gateway);
    walk.output = interface.clone();
    walk.gateway = gateway;
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

fn nowhere(walk: &Walk, kind: RouteKind) -> Route {
    Route { dst: walk.tuple.dst, kind, interface: None, gateway: None, table: Name::default(), route: Name::default() }
}
