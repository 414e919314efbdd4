//! Where DNAT may send connections to given ports: all targets of nat rules that such a connection can reach, whatever the
//! other conditions on the way.

use crate::core::model::flow::{Family, Proto};
use crate::core::model::rules::{Match, MatchKind, Net, PortSide, Rule, Ruleset, Table, Target};
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
        for table in ruleset.tables.iter().filter(|table| table.name == "nat") {
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
                        if matches!(table.chains[index].name(), "PREROUTING" | "OUTPUT") {
                            walk.chain(index);
                        }
                    }
                }
            }
        }
    }
    found
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
