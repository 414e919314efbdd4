//! Policy rules and routing tables: `fib_lookup`, `ip6_route_lookup`, `inet_addr_type`.

use crate::core::model::flow::{Family, Proto, Tuple};
use crate::core::model::name::Name;
use crate::core::model::state::{Address, NextHop, NodeState, PolicyAction, PolicyRule, RouteEntry};
use crate::core::model::trace::RouteKind;
use ipnet::IpNet;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

/// All that decides where a packet goes, ready for lookup.
#[derive(Debug, Default)]
pub(super) struct Routing {
    routes: Vec<Entry>,
    /// Tables by family and name.
    tables: BTreeMap<(Family, Name), Prefixes>,
    policy: Vec<PolicyRule>,
    /// False where the state has no routes.
    pub(super) known: bool,
    /// IPv4 has policy rules besides the usual three, or local routes to more than addresses of the node: then every source
    /// is looked up (`fib_validate_source`).
    pub(super) custom4: bool,
    /// What was taken for granted when this was made.
    pub(super) assumptions: Vec<String>,
}

/// Routes of one table by prefix length, longest first; in one prefix by metric, then in the order of the dump.
#[derive(Debug, Default)]
struct Prefixes(BTreeMap<std::cmp::Reverse<u8>, HashMap<u128, Vec<u32>>>);

/// A route with its names ready to be shared.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) kind: RouteKind,
    pub(super) prefix: u8,
    pub(super) hops: Vec<Way>,
    pub(super) prefsrc: Option<IpAddr>,
    pub(super) table: Name,
    pub(super) text: Name,
    metric: u32,
}

/// One way out.
#[derive(Clone, Debug)]
pub(super) struct Way {
    pub(super) interface: Option<Name>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) weight: u32,
    dead: bool,
}

/// What a lookup asks with (`struct flowi4`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Key<'k> {
    pub(super) dst: IpAddr,
    pub(super) src: Option<IpAddr>,
    /// `lo` for packets that the node sends itself.
    pub(super) input: &'k str,
    pub(super) output: Option<&'k str>,
    pub(super) mark: u32,
    pub(super) proto: Option<Proto>,
    pub(super) ports: (u16, u16),
}

impl<'k> Key<'k> {
    pub(super) fn of(tuple: &Tuple, input: &'k str, mark: u32) -> Self {
        Self {
            dst: tuple.dst,
            src: Some(tuple.src),
            input,
            output: None,
            mark,
            proto: Some(tuple.proto),
            ports: (tuple.sport, tuple.dport),
        }
    }
}

/// What policy rules and tables answer.
#[derive(Debug)]
pub(super) enum Found<'r> {
    Route(&'r Entry),
    /// A policy rule refuses, or nothing matched (`RouteKind::None`).
    Refused(RouteKind),
}

impl Routing {
    pub(super) fn new(state: &NodeState) -> Self {
        let mut routing = Self { known: state.routes.is_some(), ..Self::default() };
        for route in state.routes.iter().flatten() {
            routing.add(route);
        }
        for family in [Family::V4, Family::V6] {
            if !routing.tables.contains_key(&(family, Name::Static("local"))) {
                routing.add_local(family, state.addresses.as_deref());
            }
        }
        routing.policy = match &state.policy {
            Some(policy) => policy.clone(),
            None => {
                routing
                    .assumptions
                    .push("policy rules are not known: the usual local, main and default are assumed".into());
                [Family::V4, Family::V6].into_iter().flat_map(PolicyRule::defaults).collect()
            }
        };
        let more_rules = routing.policy.iter().filter(|rule| rule.family == Family::V4).count() > 3;
        let is_address = |net: &IpNet| net.addr().is_loopback() || net.prefix_len() == 32;
        let more_local = state
            .routes
            .iter()
            .flatten()
            .any(|route| route.kind == RouteKind::Local && route.dst.addr().is_ipv4() && !is_address(&route.dst));
        routing.custom4 = more_rules || more_local;
        routing
    }

    /// Whether `address` is one of the node's own; `None` where neither routes nor addresses are known.
    pub(super) fn is_local(&self, address: IpAddr) -> Option<bool> {
        self.address_type(address, None).map(|kind| kind == RouteKind::Local)
    }

    /// `inet_dev_addr_type`: the type that the local table gives, unicast when it is silent (net/ipv4/fib_frontend.c).
    pub(super) fn address_type(&self, address: IpAddr, device: Option<&str>) -> Option<RouteKind> {
        match address {
            IpAddr::V4(four) if four.is_broadcast() || four.octets()[0] == 0 => return Some(RouteKind::Broadcast),
            address if address.is_multicast() => return Some(RouteKind::Multicast),
            _ => {}
        }
        let family = Family::of(address);
        let table = self.tables.get(&(family, Name::Static("local")))?;
        // `__inet_dev_addr_type` looks at the first route that matches, and there at the first next hop.
        let hit = table.candidates(address).map(|at| &self.routes[at as usize]).find(|entry| entry.usable());
        let on_device = |entry: &&Entry| {
            device.is_none_or(|device| entry.hops.first().is_some_and(|way| way.interface.as_deref() == Some(device)))
        };
        Some(hit.filter(on_device).map_or(RouteKind::Unicast, |entry| entry.kind))
    }

    /// `fib_rules_lookup` and `fib_table_lookup`. Selectors that are not known count as not matching and are said.
    pub(super) fn lookup(&self, key: &Key<'_>, say: &mut dyn FnMut(String)) -> Found<'_> {
        let family = Family::of(key.dst);
        let mut skip_to = 0;
        for rule in self.policy.iter().filter(|rule| rule.family == family) {
            if rule.priority < skip_to || !selects(rule, key, say) {
                continue;
            }
            match &rule.action {
                PolicyAction::Nop => {}
                PolicyAction::Goto(priority) => skip_to = *priority,
                PolicyAction::Unreachable => return Found::Refused(RouteKind::Unreachable),
                PolicyAction::Prohibit => return Found::Refused(RouteKind::Prohibit),
                PolicyAction::Blackhole => return Found::Refused(RouteKind::Blackhole),
                PolicyAction::Table(table) => {
                    let found = self.in_table(family, table, key);
                    if let Some(entry) = found
                        && entry.kind != RouteKind::Throw
                        && rule.suppress_prefix.is_none_or(|longest| entry.prefix > longest)
                    {
                        return Found::Route(entry);
                    }
                }
            }
        }
        Found::Refused(RouteKind::None)
    }

    fn in_table(&self, family: Family, table: &str, key: &Key<'_>) -> Option<&Entry> {
        let prefixes = self.tables.get(&(family, table_name(table)))?;
        let usable = |entry: &&Entry| {
            let right = |way: &Way| key.output.is_none_or(|output| way.interface.as_deref() == Some(output));
            entry.usable() && (entry.hops.is_empty() || entry.hops.iter().any(right))
        };
        prefixes.candidates(key.dst).map(|at| &self.routes[at as usize]).find(usable)
    }

    fn add(&mut self, route: &RouteEntry) {
        let family = Family::of(route.dst.addr());
        let table = table_name(&route.table);
        let hops = route
            .nexthops
            .iter()
            .map(|hop| Way {
                interface: hop.interface.as_deref().map(Name::from),
                gateway: hop.gateway,
                weight: hop.weight.max(1),
                dead: hop.dead,
            })
            .collect();
        let entry = Entry {
            kind: route.kind,
            prefix: route.dst.prefix_len(),
            hops,
            prefsrc: route.prefsrc,
            table: table.clone(),
            text: Name::from(describe(route)),
            metric: route.metric,
        };
        let at = self.routes.len() as u32;
        let (metric, routes) = (entry.metric, &self.routes);
        let prefixes = self.tables.entry((family, table)).or_default();
        let list = prefixes
            .0
            .entry(std::cmp::Reverse(entry.prefix))
            .or_default()
            .entry(masked(route.dst.addr(), entry.prefix))
            .or_default();
        let place = list.partition_point(|&other| routes[other as usize].metric <= metric);
        list.insert(place, at);
        self.routes.push(entry);
    }

    /// Makes the local table from the addresses, as the kernel does when an address is added.
    fn add_local(&mut self, family: Family, addresses: Option<&[Address]>) {
        let Some(addresses) = addresses else { return };
        let mut own: Vec<(IpNet, &str)> = Vec::new();
        for address in addresses.iter().filter(|address| Family::of(address.address) == family) {
            own.push((IpNet::from(address.address), &address.interface));
            if address.address.is_loopback() {
                own.extend(
                    IpNet::new(address.address, address.prefix).map(|net| (net.trunc(), address.interface.as_str())),
                );
            }
        }
        let name = if family == Family::V4 { "IPv4" } else { "IPv6" };
        if self.known && !own.is_empty() {
            self.assumptions.push(format!("the {name} table local is not among the routes: made from the addresses"));
        }
        for (dst, interface) in own {
            let hop = NextHop { interface: Some(interface.into()), gateway: None, weight: 1, dead: false };
            self.add(&RouteEntry {
                kind: RouteKind::Local,
                dst,
                table: "local".into(),
                nexthops: vec![hop],
                prefsrc: None,
                metric: 0,
                scope: "host".into(),
                mtu: None,
            });
        }
    }
}

impl Prefixes {
    fn candidates(&self, address: IpAddr) -> impl Iterator<Item = u32> {
        self.0.iter().filter_map(move |(length, nets)| nets.get(&masked(address, length.0))).flatten().copied()
    }
}

impl Way {
    pub(super) const fn new(interface: Option<Name>, gateway: Option<IpAddr>) -> Self {
        Self { interface, gateway, weight: 1, dead: false }
    }
}

impl Entry {
    /// It has a way that can be taken, or needs none.
    fn usable(&self) -> bool {
        self.hops.is_empty() || self.hops.iter().any(|way| !way.dead)
    }

    /// The ways that can be taken.
    pub(super) fn alive(&self) -> impl Iterator<Item = &Way> {
        self.hops.iter().filter(|way| !way.dead)
    }
}

fn selects(rule: &PolicyRule, key: &Key<'_>, say: &mut dyn FnMut(String)) -> bool {
    if !rule.unknown.is_empty() {
        let what = rule.unknown.join(" ");
        say(format!(
            "policy rule {} asks for {what}, which the model does not know: taken as not matching",
            rule.priority
        ));
        return false;
    }
    let within = |range: Option<(u16, u16)>, port: u16| range.is_none_or(|(low, high)| (low..=high).contains(&port));
    let holds = rule.src.is_none_or(|net| net.prefix_len() == 0 || key.src.is_some_and(|src| net.contains(&src)))
        && rule.dst.is_none_or(|net| net.contains(&key.dst))
        && rule.input.as_deref().is_none_or(|input| input == key.input)
        && rule.output.as_deref().is_none_or(|output| Some(output) == key.output)
        && rule.fwmark.is_none_or(|(value, mask)| key.mark & mask == value & mask)
        && rule.proto.is_none_or(|proto| Some(proto) == key.proto)
        && within(rule.sport, key.ports.0)
        && within(rule.dport, key.ports.1);
    holds != rule.not
}

fn table_name(name: &str) -> Name {
    match name {
        "local" | "255" => Name::Static("local"),
        "main" | "254" | "" => Name::Static("main"),
        "default" | "253" => Name::Static("default"),
        other => Name::from(other),
    }
}

/// The first `prefix` bits of an address.
fn masked(address: IpAddr, prefix: u8) -> u128 {
    match address {
        IpAddr::V4(four) => {
            u128::from(four.to_bits() & u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0))
        }
        IpAddr::V6(six) => six.to_bits() & u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0),
    }
}

/// As `ip route` prints it.
fn describe(route: &RouteEntry) -> String {
    let kind = match route.kind {
        RouteKind::Unicast | RouteKind::None => "",
        RouteKind::Local => "local ",
        RouteKind::Broadcast => "broadcast ",
        RouteKind::Anycast => "anycast ",
        RouteKind::Multicast => "multicast ",
        RouteKind::Unreachable => "unreachable ",
        RouteKind::Prohibit => "prohibit ",
        RouteKind::Blackhole => "blackhole ",
        RouteKind::Throw => "throw ",
    };
    let dst = if route.dst.prefix_len() == 0 {
        "default".to_owned()
    } else if route.dst.prefix_len() == route.dst.max_prefix_len() {
        route.dst.addr().to_string()
    } else {
        route.dst.to_string()
    };
    let mut text = format!("{kind}{dst}");
    for hop in &route.nexthops {
        let many = if route.nexthops.len() > 1 { " nexthop" } else { "" };
        let via = hop.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        let dev = hop.interface.as_deref().map(|name| format!(" dev {name}")).unwrap_or_default();
        text.push_str(&format!("{many}{via}{dev}"));
    }
    if route.metric != 0 {
        text.push_str(&format!(" metric {}", route.metric));
    }
    text
}
