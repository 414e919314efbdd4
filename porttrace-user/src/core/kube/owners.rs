//! Who claims a port on this node, and who stands behind an address, read from the rules and sockets alone.

use super::targets::{NatTarget, nat_targets};
use super::{hash, native_owners};
use crate::core::model::flow::{Family, Proto};
use crate::core::model::name::Name;
use crate::core::model::rules::{Chain, MatchKind, NatRange, Net, PortSide, Rule, Ruleset, Table, Target};
use crate::core::model::state::NodeState;
use crate::core::model::trace::{Chains, Flavour, Place, RuleRef};
use foldhash::HashSet;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

/// One claim to a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub port: u16,
    pub proto: Proto,
    pub family: Family,
    pub kind: ClaimKind,
    /// The rule that says so; `None` for a socket.
    pub rule: Option<RuleRef>,
    /// The chain to which that rule leads connections of this claim, where it leads others elsewhere (a native look-up).
    pub leads_to: Option<Name>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimKind {
    /// portmap or CRI-O: this node's port → a pod's. `sandbox` is the pod sandbox's ID, `network` the CNI network, both only
    /// where portmap's comment tells.
    HostPort { to: SocketAddr, host_ip: Option<IpAddr>, network: Option<Name>, sandbox: Option<Name>, chain: Name },
    /// kube-proxy: NodePort of a Service.
    NodePort { service: Name, endpoints: usize },
    /// kube-proxy: a Service's own port on one of its addresses.
    ServicePort { service: Name, address: IpAddr, endpoints: usize },
    /// kube-proxy refuses it: `why` is its comment (`default/noep:p80 has no endpoints`); `address`: the Service's, `None` for the
    /// node's own.
    Refused { why: String, address: Option<IpAddr> },
    /// A process of this node listens.
    Listener { address: IpAddr, process: Option<String> },
}

/// Claims and names of a node.
#[derive(Clone, Debug, Default)]
pub struct Owners {
    of_rules: Arc<OfRules>,
    /// In the order of the sockets.
    listeners: Vec<Claim>,
}

/// What the rules say.
#[derive(Debug, Default)]
struct OfRules {
    rulesets: Vec<Arc<Ruleset>>,
    claims: Vec<Claim>,
    /// Endpoints and the Services that they serve, sorted.
    endpoints: Vec<(Proto, SocketAddr, Name)>,
}

impl Owners {
    /// Reads the claims out of a state.
    pub fn of(state: &NodeState) -> Self {
        Self { of_rules: Arc::new(OfRules::of(state.all_rules())), listeners: listeners(state) }
    }

    /// Those of another state of the same node. Where the rules are the same, they are not read again, which takes much longer than
    /// all the rest.
    pub fn renewed(&self, state: &NodeState) -> Self {
        let known = &self.of_rules.rulesets;
        let same = known.len() == state.all_rules().count()
            && known.iter().zip(state.all_rules()).all(|(one, other)| Arc::ptr_eq(one, other));
        if !same {
            return Self::of(state);
        }
        Self { of_rules: Arc::clone(&self.of_rules), listeners: listeners(state) }
    }

    /// All claims to a port, rules before sockets, in the order of the rules.
    pub fn claims(&self, port: u16) -> impl Iterator<Item = &Claim> {
        self.all().filter(move |claim| claim.port == port)
    }

    /// Where any DNAT rule may send a connection to a port, whatever its other conditions.
    pub fn may_lead(&self, port: u16) -> BTreeSet<NatTarget> {
        nat_targets(self.of_rules.rulesets.iter().map(Arc::as_ref), &[port])
    }

    /// All claims, rules before sockets, in the order of the rules.
    pub fn all(&self) -> impl Iterator<Item = &Claim> {
        self.of_rules.claims.iter().chain(&self.listeners)
    }

    /// The endpoints that the rules give a Service's port (`default/frontend:http`), as far as kube-proxy's comments tell
    /// (it leaves them out above 1,000 endpoints).
    pub fn endpoints_of(&self, proto: Proto, service: &str) -> BTreeSet<SocketAddr> {
        let of_service = self.of_rules.endpoints.iter().filter(|(of, _, by)| *of == proto && *by == service);
        of_service.map(|(_, at, _)| *at).collect()
    }

    /// All endpoints that the rules give to Services' ports (`default/frontend:http`), as far as kube-proxy's comments tell.
    pub fn endpoints(&self) -> impl Iterator<Item = (Proto, SocketAddr, &str)> {
        self.of_rules.endpoints.iter().map(|(proto, at, service)| (*proto, *at, service.as_str()))
    }

    /// A name for an endpoint: the Service that it serves (`default/frontend:http`), the first of several.
    pub fn name_of(&self, proto: Proto, address: SocketAddr) -> Option<String> {
        let start = self.of_rules.endpoints.partition_point(|(of, at, _)| (*of, *at) < (proto, address));
        let behind = self.of_rules.endpoints[start..].partition_point(|(of, at, _)| (*of, *at) == (proto, address));
        let (_, _, first) = self.of_rules.endpoints[start..start + behind].first()?;
        Some(match behind {
            1 => first.to_string(),
            more => format!("{first} and {} more", more - 1),
        })
    }

    /// The ports by which Services reach an address, with one Service each: where its pod is believed to listen.
    pub fn served_ports(&self, proto: Proto, address: IpAddr) -> Vec<(u16, &str)> {
        let of_address = self.of_rules.endpoints.iter().filter(|(of, at, _)| *of == proto && at.ip() == address);
        let mut ports: Vec<_> = of_address.map(|(_, at, service)| (at.port(), service.as_str())).collect();
        ports.dedup_by_key(|(port, _)| *port);
        ports
    }
}

fn listeners(state: &NodeState) -> Vec<Claim> {
    let sockets = state.sockets.iter().flatten().map(|socket| Claim {
        port: socket.port,
        proto: socket.proto,
        family: Family::of(socket.address),
        kind: ClaimKind::Listener { address: socket.address, process: socket.process.clone() },
        rule: None,
        leads_to: None,
    });
    sockets.collect()
}

impl OfRules {
    fn of<'r>(rulesets: impl Iterator<Item = &'r Arc<Ruleset>>) -> Self {
        let mut found = Self { rulesets: rulesets.cloned().collect(), ..Self::default() };
        for ruleset in &found.rulesets.clone() {
            for (at, table) in ruleset.tables.iter().enumerate() {
                if ruleset.flavour == Flavour::Nftables {
                    let read = native_owners::read(ruleset, at);
                    found.claims.extend(read.claims);
                    found.endpoints.extend(read.endpoints);
                    continue;
                }
                let chains = Arc::new(Chains::Of(Arc::clone(ruleset), at));
                let mut reader = Reader { ruleset, table, chains, names: HashSet::default() };
                match table.name.as_str() {
                    "nat" => reader.nat(&mut found),
                    "filter" => reader.filter(&mut found),
                    _ => {}
                }
            }
        }
        found.endpoints.sort_unstable();
        found.endpoints.dedup();
        found.endpoints.shrink_to_fit();
        found.claims.shrink_to_fit();
        found
    }
}

struct Reader<'r> {
    ruleset: &'r Ruleset,
    table: &'r Table,
    chains: Arc<Chains>,
    /// Those of Services, so that each is held once.
    names: HashSet<Name>,
}

/// What a rule asks of protocol, destination and port.
#[derive(Clone, Default)]
struct Asked {
    proto: Option<Proto>,
    ports: Vec<(u16, u16)>,
    destination: Option<IpAddr>,
}

impl<'r> Reader<'r> {
    fn nat(&mut self, found: &mut OfRules) {
        self.host_ports(found);
        self.crio_host_ports(found);
        for (at, chain) in (0..).zip(&self.table.chains) {
            match chain.name() {
                "KUBE-NODEPORTS" | "KUBE-SERVICES" => self.services(at, chain, found),
                name if name.starts_with("KUBE-SEP-") => self.endpoint(chain, found),
                _ => {}
            }
        }
    }

    /// portmap's entries: CNI-HOSTPORT-DNAT names network and sandbox, the CNI-DN- chain holds ports and destinations.
    fn host_ports(&self, found: &mut OfRules) {
        let Some(entries) = self.table.chain("CNI-HOSTPORT-DNAT") else { return };
        for entry in &entries.rules {
            let Some((at, chain)) = self.target_chain(entry) else { continue };
            let (network, sandbox) = entry.comment().map_or((None, None), |comment| portmap_comment(&comment));
            for (number, rule) in (1u32..).zip(&chain.rules) {
                let Target::Dnat(range) = &rule.target else { continue };
                let asked = asked(rule);
                let (Some(proto), Some(to)) = (asked.proto, destination(range)) else { continue };
                for &(port, _) in &asked.ports {
                    found.claims.push(Claim {
                        port,
                        proto,
                        family: self.ruleset.family,
                        kind: ClaimKind::HostPort {
                            to,
                            host_ip: asked.destination,
                            network: network.clone(),
                            sandbox: sandbox.clone(),
                            chain: chain.id.chain.clone(),
                        },
                        rule: self.reference(at, number),
                        leads_to: None,
                    });
                }
            }
        }
    }

    /// CRI-O's entries: KUBE-HOSTPORTS asks for the port, the KUBE-HP- chain for the hostIP, and holds the destination
    /// (internal/hostport/hostport_iptables.go, `Add`).
    fn crio_host_ports(&self, found: &mut OfRules) {
        let Some(entries) = self.table.chain("KUBE-HOSTPORTS") else { return };
        for entry in &entries.rules {
            let to_pod = |(_, chain): &(u32, &Chain)| chain.name().starts_with(hash::CRIO);
            let Some((at, chain)) = self.target_chain(entry).filter(to_pod) else { continue };
            let wanted = asked(entry);
            let (Some(proto), Some(&(port, _))) = (wanted.proto, wanted.ports.first()) else { continue };
            for (number, rule) in (1u32..).zip(&chain.rules) {
                let Target::Dnat(range) = &rule.target else { continue };
                let Some(to) = destination(range) else { continue };
                let host_ip = asked(rule).destination.or(wanted.destination);
                let name = chain.id.chain.clone();
                let kind = ClaimKind::HostPort { to, host_ip, network: None, sandbox: None, chain: name };
                let rule = self.reference(at, number);
                found.claims.push(Claim { port, proto, family: self.ruleset.family, kind, rule, leads_to: None });
            }
        }
    }

    /// KUBE-SERVICES and KUBE-NODEPORTS: a port (and an address) → the chain of a Service.
    fn services(&mut self, at: u32, chain: &Chain, found: &mut OfRules) {
        for (number, rule) in (1u32..).zip(&chain.rules) {
            let Some((next_at, next)) = self.target_chain(rule) else { continue };
            let asked = asked(rule);
            let (Some(proto), Some(&(port, _))) = (asked.proto, asked.ports.first()) else { continue };
            let service = self.named(&service_name(rule, proto, next));
            let endpoints = self.endpoints_of((next_at, next));
            let kind = match asked.destination {
                Some(address) => ClaimKind::ServicePort { service, address, endpoints },
                None => ClaimKind::NodePort { service, endpoints },
            };
            let rule = self.reference(at, number);
            found.claims.push(Claim { port, proto, family: self.ruleset.family, kind, rule, leads_to: None });
        }
    }

    /// How many KUBE-SEP- chains a Service's chains lead to.
    fn endpoints_of(&self, start: (u32, &Chain)) -> usize {
        let mut found = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut open = vec![start];
        while let Some((at, chain)) = open.pop() {
            if !seen.insert(at) {
                continue;
            }
            for rule in &chain.rules {
                match self.target_chain(rule) {
                    Some((at, next)) if next.name().starts_with("KUBE-SEP-") => {
                        found.insert(at);
                    }
                    Some((at, next)) if next.name().starts_with("KUBE-") => open.push((at, next)),
                    _ => {}
                }
            }
        }
        found.len()
    }

    fn endpoint(&mut self, chain: &Chain, found: &mut OfRules) {
        for rule in &chain.rules {
            let Target::Dnat(range) = &rule.target else { continue };
            let (Some(to), Some(proto)) = (destination(range), asked(rule).proto) else { continue };
            let Some(service) = rule.comment() else { continue };
            let suffix = hash::endpoint_suffix(&service, &proto.to_string(), &to.to_string());
            if chain.name().ends_with(&suffix) {
                found.endpoints.push((proto, to, self.named(&service)));
            }
        }
    }

    /// filter: kube-proxy's REJECT and DROP for Services without endpoints.
    fn filter(&self, found: &mut OfRules) {
        for name in ["KUBE-EXTERNAL-SERVICES", "KUBE-SERVICES"] {
            let Some((at, chain)) = (0..).zip(&self.table.chains).find(|(_, chain)| chain.name() == name) else {
                continue;
            };
            for (number, rule) in (1u32..).zip(&chain.rules) {
                let asked = asked(rule);
                let refuses = matches!(rule.target, Target::Reject(_) | Target::Drop);
                if let (true, Some(proto), Some(&(port, _))) = (refuses, asked.proto, asked.ports.first()) {
                    found.claims.push(Claim {
                        port,
                        proto,
                        family: self.ruleset.family,
                        kind: ClaimKind::Refused {
                            why: rule.comment().unwrap_or_else(|| rule.text.read().to_string()),
                            address: asked.destination,
                        },
                        rule: self.reference(at, number),
                        leads_to: None,
                    });
                }
            }
        }
    }

    /// With its number.
    fn target_chain(&self, rule: &Rule) -> Option<(u32, &'r Chain)> {
        match rule.target {
            Target::Jump(index) | Target::Goto(index) => Some((index, self.table.chains.get(index as usize)?)),
            _ => None,
        }
    }

    fn reference(&self, chain: u32, number: u32) -> Option<RuleRef> {
        Some(RuleRef::new(Place::new(&self.chains, chain)?, Some(number)))
    }

    /// The name, shared with all who have the same.
    fn named(&mut self, name: &str) -> Name {
        if let Some(known) = self.names.get(name) {
            return known.clone();
        }
        let name = Name::from(name);
        self.names.insert(name.clone());
        name
    }
}

fn asked(rule: &Rule) -> Asked {
    let mut asked = Asked::default();
    for condition in rule.matches.iter().filter(|condition| !condition.negated) {
        match &condition.kind {
            MatchKind::Protocol(number) => asked.proto = Some(Proto::from_number(*number)),
            MatchKind::DestinationPort(from, to) => asked.ports.push((*from, *to)),
            MatchKind::Multiport(PortSide::Destination, ranges) => asked.ports.extend(ranges.iter().copied()),
            MatchKind::Destination(net) => asked.destination = host(net),
            _ => {}
        }
    }
    asked
}

/// The address of a net that is one host.
fn host(net: &Net) -> Option<IpAddr> {
    match net {
        Net::V4 { addr, mask: u32::MAX } => Some(IpAddr::V4(Ipv4Addr::from(*addr))),
        Net::V6(both) if both.1 == u128::MAX => Some(IpAddr::V6(Ipv6Addr::from(both.0))),
        _ => None,
    }
}

fn destination(range: &NatRange) -> Option<SocketAddr> {
    let (low, high) = range.addresses.as_ref()?;
    let (port, last) = range.ports?;
    (low == high && port == last && range.base_port.is_none()).then(|| SocketAddr::new(low.address(), port))
}

/// kube-proxy's comment without what it says about the kind of address, believed only when the chain's name agrees.
fn service_name(rule: &Rule, proto: Proto, chain: &Chain) -> String {
    let comment = rule.comment().unwrap_or_default();
    let name = comment.split(' ').next().unwrap_or_default();
    let suffix = hash::service_suffix(name, &proto.to_string());
    if !name.is_empty() && chain.name().ends_with(&suffix) { name.to_owned() } else { chain.name().to_string() }
}

/// `dnat name: "kindnet" id: "d5c4…"` (portmap.go, `fillDnatRules`).
fn portmap_comment(comment: &str) -> (Option<Name>, Option<Name>) {
    let quoted = |label: &str| {
        let (_, rest) = comment.split_once(label)?;
        let value = rest.trim_start().trim_start_matches(['\\', '"']);
        let end = value.find(['"', '\\']).unwrap_or(value.len());
        value.get(..end).map(Name::from)
    };
    (quoted("name:"), quoted("id:"))
}

/// The one address that a rule asks for as destination.
pub fn destination_of(rule: &Rule) -> Option<IpAddr> {
    asked(rule).destination
}

#[cfg(test)]
#[path = "owners_tests.rs"]
mod tests;
