//! Where DNAT may send connections to given ports: all targets of nat rules that such a connection can reach, whatever the
//! other conditions on the way.

use crate::core::model::flow::{Family, Proto};
use crate::core::model::native::{
    self, BaseKind, Datum, Expr, Field, Nat, NatKind, Op, Operand, Part, Set, Statement, Value, Verdict,
};
use crate::core::model::rules::{Chain, Match, MatchKind, Net, PortSide, Rule, Ruleset, Table, Target};
use crate::core::model::trace::{Flavour, Hook};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// One possible destination after DNAT.
pub type NatTarget = (Proto, SocketAddr);

/// Ports and addresses that one rule may stand for at most; a larger range is left out.
const MOST: u128 = 1024;

/// All destinations that the nat tables can give to a TCP, UDP or SCTP connection to one of `ports`.
pub fn nat_targets<'a>(rulesets: impl IntoIterator<Item = &'a Ruleset>, ports: &[u16]) -> BTreeSet<NatTarget> {
    let mut found = BTreeSet::new();
    for ruleset in rulesets {
        let is_native = ruleset.flavour == Flavour::Nftables;
        for table in ruleset.tables.iter().filter(|table| is_native || table.name == "nat") {
            for proto in [Proto::Tcp, Proto::Udp, Proto::Sctp] {
                for &port in ports {
                    let mut walk = Walk {
                        table,
                        family: ruleset.family,
                        proto,
                        port,
                        visited: BTreeSet::new(),
                        found: &mut found,
                    };
                    for index in 0..table.chains.len() {
                        if is_asked(&table.chains[index], is_native) {
                            walk.chain(index);
                        }
                    }
                }
            }
        }
    }
    found
}

/// All destinations that DNAT can give to a connection to `port` which is in a chain of a table.
pub fn targets_of_chain((table, chain): (&Table, u32), family: Family, proto: Proto, port: u16) -> BTreeSet<NatTarget> {
    let mut found = BTreeSet::new();
    Walk { table, family, proto, port, visited: BTreeSet::new(), found: &mut found }.chain(chain as usize);
    found
}

/// Whether it is a base chain that may send a connection elsewhere.
fn is_asked(chain: &Chain, is_native: bool) -> bool {
    match chain.base {
        Some(base) => base.kind == BaseKind::Nat && matches!(base.hook, Hook::Prerouting | Hook::Output),
        None => !is_native && matches!(chain.name(), "PREROUTING" | "OUTPUT"),
    }
}

struct Walk<'a, 't> {
    table: &'t Table,
    family: Family,
    proto: Proto,
    port: u16,
    visited: BTreeSet<usize>,
    found: &'a mut BTreeSet<NatTarget>,
}

impl Walk<'_, '_> {
    fn chain(&mut self, index: usize) {
        if !self.visited.insert(index) {
            return;
        }
        let table = self.table;
        let Some(chain) = table.chains.get(index) else { return };
        for rule in &chain.rules {
            if !self.may_match(rule) {
                continue;
            }
            match &rule.target {
                Target::Jump(to) | Target::Goto(to) => self.chain(*to as usize),
                Target::Dnat(range) => {
                    let ports = range.ports.unwrap_or((self.port, self.port));
                    self.add(range.addresses.as_ref(), ports);
                }
                Target::Native(all) => self.native(&all.0),
                Target::None
                | Target::Accept
                | Target::Drop
                | Target::Return
                | Target::Reject(_)
                | Target::Snat(_)
                | Target::Masquerade(_)
                // The node itself: TC sees the packet before, and its answer after.
                | Target::Redirect(_)
                | Target::Netmap(_)
                | Target::Mark(_)
                | Target::ConnMark(_)
                | Target::Notrack
                | Target::Ttl(_)
                | Target::Tos { .. }
                | Target::Tproxy(_)
                | Target::Stop(_)
                | Target::Other(_)
                | Target::Missing(_) => {}
            }
        }
    }

    /// Protocol and destination port allow it; other conditions are taken for met.
    fn may_match(&self, rule: &Rule) -> bool {
        rule.matches.iter().all(|Match { kind, negated, .. }| {
            let inside = |&(low, high): &(u16, u16)| (low..=high).contains(&self.port);
            let met = match kind {
                MatchKind::Protocol(number) => *number == 0 || *number == self.proto.number(),
                MatchKind::DestinationPort(low, high) => inside(&(*low, *high)),
                MatchKind::Multiport(PortSide::Destination, ranges) => ranges.iter().any(inside),
                _ => return true,
            };
            met != *negated
        })
    }

    /// A native rule: wherever its statements may lead, until one does not match.
    fn native(&mut self, all: &[Statement]) {
        let table = self.table;
        let goes = |walk: &mut Self, verdict: &Verdict| {
            if let Verdict::Jump(to) | Verdict::Goto(to) = verdict {
                walk.chain(*to as usize);
            }
        };
        for statement in all {
            match statement {
                Statement::Match { left, op: Op::Is, right } if !self.may_be(left, right) => return,
                Statement::Verdict(verdict) => goes(self, verdict),
                Statement::Vmap { key, map } => {
                    let Some(map) = table.source(map) else { continue };
                    let may_be = |key_is: &[Value]| self.is(key, key_is) != Some(false);
                    let verdicts = map.elements().filter(|(key, ..)| may_be(key)).filter_map(|(_, datum, _)| datum);
                    let verdicts: Vec<&Datum> = verdicts.chain(map.data_of_ranges()).collect();
                    for datum in verdicts {
                        if let Datum::Verdict(verdict) = datum {
                            goes(self, verdict);
                        }
                    }
                }
                Statement::Nat(nat) if nat.kind == NatKind::Dnat => self.native_dnat(nat),
                _ => {}
            }
        }
    }

    /// All that a DNAT statement may make of the destination.
    fn native_dnat(&mut self, nat: &Nat) {
        let own = (self.port, self.port);
        let fixed = match &nat.port {
            None => Some(own),
            Some(Expr::Constant(parts)) => parts.first().and_then(native::ports),
            Some(_) => None,
        };
        let table = self.table;
        let mut add = |parts: &[Part]| {
            let ports = parts.get(1).map_or(fixed, native::ports);
            let addresses = parts.first().and_then(native::addresses);
            if let (Some(addresses), Some(ports)) = (addresses, ports) {
                self.add(Some(&addresses), ports);
            }
        };
        match &nat.address {
            Some(Expr::Constant(parts)) => add(parts),
            Some(Expr::Map { map, .. }) => {
                for datum in table.source(map).into_iter().flat_map(Set::data) {
                    if let Datum::Parts(parts) = datum {
                        add(parts);
                    }
                }
            }
            _ => {}
        }
    }

    /// Whether the comparison may hold, by protocol and port.
    fn may_be(&self, left: &Expr, right: &Operand) -> bool {
        match right {
            Operand::Parts(parts) => {
                let of = |at: usize| parts.get(at);
                self.each(left).iter().enumerate().all(|(at, known)| match (known, of(at)) {
                    (Some(value), Some(part)) => part.holds(value),
                    _ => true,
                })
            }
            Operand::Set(source) => match self.table.source(source) {
                Some(set)
                    if !set.has_unknown && !set.dynamic && set.data_of_ranges().next().is_none() && set.is_exact() =>
                {
                    set.elements().any(|(key, ..)| self.is(left, key) != Some(false))
                }
                _ => true,
            },
            Operand::Expr(_) | Operand::Unknown(_) => true,
        }
    }

    /// Whether an expression is this, as far as protocol and port tell.
    fn is(&self, left: &Expr, key: &[Value]) -> Option<bool> {
        let known = self.each(left);
        let differs = known.iter().zip(key).any(|(known, value)| known.as_ref().is_some_and(|known| known != value));
        if differs { Some(false) } else { known.iter().all(Option::is_some).then_some(true) }
    }

    /// The parts of an expression, those known that are the protocol or the port.
    fn each(&self, left: &Expr) -> Vec<Option<Value>> {
        let proto = self.proto.number();
        match left {
            Expr::Concat(parts) => parts.iter().flat_map(|part| self.each(part)).collect(),
            Expr::Field(Field::L4Proto | Field::Protocol(_)) => vec![Some(Value::Number(proto.into()))],
            Expr::Field(Field::DestinationPort(of)) => {
                // A port of another protocol is never this one's.
                let is_ours = of.is_none_or(|of| of == proto);
                vec![Some(Value::Number(if is_ours { self.port.into() } else { u64::MAX }))]
            }
            _ => vec![None],
        }
    }

    fn add(&mut self, addresses: Option<&(Net, Net)>, (low, high): (u16, u16)) {
        let Some(addresses) = addresses.and_then(range) else { return };
        let (first, last) = addresses;
        let size =
            (last.saturating_sub(first).saturating_add(1)).saturating_mul(u128::from(high.saturating_sub(low)) + 1);
        if first > last || size > MOST {
            return;
        }
        for address in first..=last {
            let address = match self.family {
                Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(u32::try_from(address).unwrap_or_default())),
                Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(address)),
            };
            self.found.extend((low..=high).map(|port| (self.proto, SocketAddr::new(address, port))));
        }
    }
}

fn range((first, last): &(Net, Net)) -> Option<(u128, u128)> {
    match (first, last) {
        (Net::V4 { addr: first, .. }, Net::V4 { addr: last, .. }) => Some((u128::from(*first), u128::from(*last))),
        (Net::V6(first), Net::V6(last)) => Some((first.0, last.0)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::trace::Flavour;
    use crate::core::parse::iptables::parse;

    fn targets(rules: &str, ports: &[u16]) -> Vec<String> {
        let (ruleset, problems) = parse(rules, "rules", Flavour::IptablesNft, Family::V4);
        assert_eq!(problems, []);
        nat_targets([&ruleset], ports).into_iter().map(|(proto, to)| format!("{proto} {to}")).collect()
    }

    #[test]
    fn a_host_port_leads_to_its_pod_and_nothing_else() {
        let rules = "*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-DN-1 - [0:0]
:CNI-DN-2 - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 9088,9089 -j CNI-DN-1
-A CNI-HOSTPORT-DNAT -p udp -m multiport --dports 9090 -j CNI-DN-2
-A CNI-DN-1 -p tcp -m tcp --dport 9088 -j DNAT --to-destination 10.244.1.9:8081
-A CNI-DN-1 -p tcp -m tcp --dport 9089 -j DNAT --to-destination 10.244.1.9:8082
-A CNI-DN-2 -p udp -m udp --dport 9090 -j DNAT --to-destination 10.244.1.11:53
COMMIT
";
        assert_eq!(targets(rules, &[9088]), ["tcp 10.244.1.9:8081"]);
        assert_eq!(targets(rules, &[9090, 9089]), ["tcp 10.244.1.9:8082", "udp 10.244.1.11:53"]);
        assert_eq!(targets(rules, &[80]), [""; 0]);
    }

    #[test]
    fn all_endpoints_of_a_service_ranges_and_kept_ports() {
        let rules = "*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SVC-1 - [0:0]
:KUBE-SEP-1 - [0:0]
:KUBE-SEP-2 - [0:0]
-A PREROUTING -p tcp -m tcp --dport 30080 -j KUBE-SVC-1
-A PREROUTING -p tcp ! --dport 30081 -d 10.9.9.9/32 -j DNAT --to-destination 10.0.0.1-10.0.0.2
-A KUBE-SVC-1 -m statistic --mode random --probability 0.5 -j KUBE-SEP-1
-A KUBE-SVC-1 -j KUBE-SEP-2
-A KUBE-SEP-1 -p tcp -m tcp -j DNAT --to-destination 10.244.1.9:80
-A KUBE-SEP-2 -p tcp -m tcp -j DNAT --to-destination 10.244.2.9:80
COMMIT
";
        let found = targets(rules, &[30080]);
        assert_eq!(found, ["tcp 10.0.0.1:30080", "tcp 10.0.0.2:30080", "tcp 10.244.1.9:80", "tcp 10.244.2.9:80"]);
        assert_eq!(targets(rules, &[30081]), [""; 0]);
    }
}
