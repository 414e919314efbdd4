//! Policy rules and the tables that they lead to: `fib_lookup`, `ip6_route_lookup`, `inet_addr_type`.

use super::fib::{Asked, Entry, TOS_BITS, Table, describe};
use super::walk::Walk;
use crate::core::model::flow::{Family, Proto};
use crate::core::model::name::{Name, name};
use crate::core::model::state::{Address, NextHop, NodeState, PolicyAction, PolicyRule, RouteEntry};
use crate::core::model::steps::RouteWords;
use crate::core::model::trace::RouteKind;
use ipnet::IpNet;
use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

/// All that decides where a packet goes, ready for lookup.
#[derive(Debug, Default)]
pub(super) struct Routing {
    tables: Vec<Table>,
    /// The routes in words, by their numbers.
    words: Vec<Arc<RouteWords>>,
    /// Where the tables `local` of IPv4 and IPv6 are.
    local: [Option<usize>; 2],
    /// Policy rules with their tables, for IPv4 and IPv6.
    policy: [Vec<Policy>; 2],
    /// False where the state has no routes.
    pub(super) known: bool,
    /// IPv4 has policy rules besides the usual three, or local routes to more than addresses of the node: then every source
    /// is looked up (`fib_validate_source`).
    pub(super) custom4: bool,
    /// What was taken for granted when this was made.
    pub(super) assumptions: Vec<String>,
}

/// A policy rule and the place of its table, where that has routes.
#[derive(Debug)]
struct Policy {
    rule: PolicyRule,
    table: Option<usize>,
    /// It selects every packet.
    plain: bool,
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
    /// TOS byte or traffic class.
    pub(super) tos: u8,
    pub(super) proto: Option<Proto>,
    pub(super) ports: (u16, u16),
}

impl<'k> Key<'k> {
    /// Of the packet as it looks now.
    pub(super) fn of(walk: &Walk<'_>, input: &'k str) -> Self {
        let tuple = &walk.tuple;
        Self {
            dst: tuple.dst,
            src: Some(tuple.src),
            input,
            output: None,
            mark: walk.mark,
            tos: walk.tos,
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
        let given = state.routes.as_deref().unwrap_or_default();
        let mut routes: Vec<Cow<'_, RouteEntry>> = given.iter().map(Cow::Borrowed).collect();
        for family in [Family::V4, Family::V6] {
            let is_local = |route: &RouteEntry| table_of(route) == (family, name!("local"));
            if !given.iter().any(is_local) {
                routes.extend(routing.local_routes(family, state.addresses.as_deref()).into_iter().map(Cow::Owned));
            }
        }
        let mut tables: Vec<(_, Vec<(u32, &RouteEntry)>)> = Vec::new();
        for (number, route) in (0..).zip(&routes) {
            let of = table_of(route);
            match tables.iter_mut().find(|(known, _)| *known == of) {
                Some((_, routes)) => routes.push((number, route)),
                None => tables.push((of, vec![(number, route)])),
            }
        }
        routing.words = routes.iter().map(|route| words(route)).collect();
        routing.tables = tables.into_iter().map(|((family, name), routes)| Table::new(family, name, routes)).collect();
        routing.local = [Family::V4, Family::V6].map(|family| routing.table(family, &name!("local")));
        let policy = match &state.policy {
            Some(policy) => policy.clone(),
            None => {
                routing
                    .assumptions
                    .push("policy rules are not known: the usual local, main and default are assumed".into());
                [Family::V4, Family::V6].into_iter().flat_map(PolicyRule::defaults).collect()
            }
        };
        for rule in policy {
            let table = match &rule.action {
                PolicyAction::Table(name) => routing.table(rule.family, &table_name(name)),
                _ => None,
            };
            let plain = PolicyRule {
                suppress_prefix: rule.suppress_prefix,
                ..PolicyRule::for_all(rule.family, rule.priority, rule.action.clone())
            } == rule;
            routing.policy[place(rule.family)].push(Policy { rule, table, plain });
        }
        let more_rules = routing.policy[0].len() > 3;
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
        let table = self.tables.get(self.local[place(family)]?)?;
        // `__inet_dev_addr_type` looks at the first route that matches, and there at the first next hop.
        let hit = table.find(&Asked { dst: address, src: None, tos: 0 }, |_| true);
        let on_device = |entry: &&Entry| {
            device.is_none_or(|device| entry.hops.first().is_some_and(|way| way.interface.as_deref() == Some(device)))
        };
        Some(hit.filter(on_device).map_or(RouteKind::Unicast, |entry| entry.kind))
    }

    /// `fib_rules_lookup` and `fib_table_lookup`. Selectors that are not known count as not matching and are said.
    pub(super) fn lookup(&self, key: &Key<'_>, say: &mut dyn FnMut(String)) -> Found<'_> {
        let mut skip_to = 0;
        for Policy { rule, table, plain } in &self.policy[place(Family::of(key.dst))] {
            if rule.priority < skip_to || !plain && !selects(rule, key, say) {
                continue;
            }
            match &rule.action {
                PolicyAction::Nop => {}
                PolicyAction::Goto(priority) => skip_to = *priority,
                PolicyAction::Unreachable => return Found::Refused(RouteKind::Unreachable),
                PolicyAction::Prohibit => return Found::Refused(RouteKind::Prohibit),
                PolicyAction::Blackhole => return Found::Refused(RouteKind::Blackhole),
                PolicyAction::Table(_) => {
                    let found = table.and_then(|at| in_table(self.tables.get(at)?, key));
                    if let Some(entry) = found
                        && entry.kind != RouteKind::Throw
                        && rule.suppress_prefix.is_none_or(|longest| entry.prefix > longest)
                    {
                        if entry.is_default_for_tos() {
                            say(format!(
                                "{} is taken; among several default routes the kernel leaves out one whose gateway does not answer",
                                self.text(entry)
                            ));
                        }
                        return Found::Route(entry);
                    }
                }
            }
        }
        Found::Refused(RouteKind::None)
    }

    /// Destination and TOS alone decide a lookup: no policy rule selects, and no route is for some sources only.
    pub(super) fn asks_addresses_only(&self, family: Family) -> bool {
        family == Family::V4 && self.policy[place(family)].iter().all(|policy| policy.plain)
    }

    /// What the numbers of routes stand for.
    pub(super) fn words(&self) -> Vec<Arc<RouteWords>> {
        self.words.clone()
    }

    fn text(&self, entry: &Entry) -> &str {
        self.words.get(entry.number as usize).map_or("", |words| &words.text)
    }

    fn table(&self, family: Family, name: &Name) -> Option<usize> {
        self.tables.iter().position(|table| table.family == family && table.name == *name)
    }

    /// The local table made from the addresses, as the kernel does when an address is added.
    fn local_routes(&mut self, family: Family, addresses: Option<&[Address]>) -> Vec<RouteEntry> {
        let addresses = addresses.unwrap_or_default();
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
        let route = |(dst, interface): (IpNet, &str)| RouteEntry {
            kind: RouteKind::Local,
            dst,
            table: "local".into(),
            nexthops: vec![NextHop { interface: Some(interface.into()), gateway: None, weight: 1, dead: false }],
            prefsrc: None,
            metric: 0,
            tos: 0,
            src: None,
            scope: "host".into(),
            mtu: None,
        };
        own.into_iter().map(route).collect()
    }
}

/// Where the family's policy rules are kept.
const fn place(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

fn in_table<'t>(table: &'t Table, key: &Key<'_>) -> Option<&'t Entry> {
    let right = |entry: &Entry| {
        let hop = |output| entry.hops.iter().any(|way| way.interface.as_deref() == Some(output));
        key.output.is_none_or(|output| entry.hops.is_empty() || hop(output))
    };
    table.find(&Asked { dst: key.dst, src: key.src, tos: key.tos }, right)
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
        && rule.tos.is_none_or(|tos| tos == key.tos & tos_bits(rule.family))
        && rule.proto.is_none_or(|proto| Some(proto) == key.proto)
        && within(rule.sport, key.ports.0)
        && within(rule.dport, key.ports.1);
    holds != rule.not
}

/// IPv4 rules ask for three bits of the TOS byte (`fib4_rule_match`), IPv6 rules for all six of the DSCP (`fib6_rule_match`).
const fn tos_bits(family: Family) -> u8 {
    match family {
        Family::V4 => TOS_BITS,
        Family::V6 => 0xfc,
    }
}

fn words(route: &RouteEntry) -> Arc<RouteWords> {
    let ways = route.nexthops.iter().map(|hop| (hop.interface.as_deref().map(Name::from), hop.gateway));
    Arc::new(RouteWords { table: table_name(&route.table), text: Name::from(describe(route)), ways: ways.collect() })
}

fn table_of(route: &RouteEntry) -> (Family, Name) {
    (Family::of(route.dst.addr()), table_name(&route.table))
}

fn table_name(name: &str) -> Name {
    match name {
        "local" | "255" => name!("local"),
        "main" | "254" | "" => name!("main"),
        "default" | "253" => name!("default"),
        other => Name::from(other),
    }
}
