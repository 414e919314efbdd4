//! Who claims a port on this node, and who stands behind an address, read from the rules and sockets alone.

use super::hash;
use crate::core::model::flow::{Family, Proto};
use crate::core::model::rules::{Chain, MatchKind, NatRange, Net, PortSide, Rule, Ruleset, Table, Target};
use crate::core::model::state::NodeState;
use crate::core::model::trace::{ChainRef, RuleRef};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// One claim to a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub port: u16,
    pub proto: Proto,
    pub family: Family,
    pub kind: ClaimKind,
    /// The rule that says so; `None` for a socket.
    pub rule: Option<RuleRef>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimKind {
    /// portmap or CRI-O: this node's port → a pod's. `sandbox` is the pod sandbox's ID, `network` the CNI network, both only
    /// where portmap's comment tells.
    HostPort {
        to: SocketAddr,
        host_ip: Option<IpAddr>,
        network: Option<String>,
        sandbox: Option<String>,
        chain: String,
    },
    /// kube-proxy: NodePort of a Service.
    NodePort { service: String, endpoints: usize },
    /// kube-proxy: a Service's own port on one of its addresses.
    ServicePort { service: String, address: IpAddr, endpoints: usize },
    /// kube-proxy refuses it: `why` is its comment (`default/noep:p80 has no endpoints`).
    Refused { why: String },
    /// A process of this node listens.
    Listener { address: IpAddr, process: Option<String> },
}

/// Claims and names of a node.
#[derive(Clone, Debug, Default)]
pub struct Owners {
    claims: Vec<Claim>,
    /// Endpoint → the Services that it serves.
    endpoints: BTreeMap<(Proto, SocketAddr), BTreeSet<String>>,
}

impl Owners {
    /// Reads the claims out of a state.
    pub fn of(state: &NodeState) -> Self {
        let mut owners = Self::default();
        for ruleset in &state.rulesets {
            for table in &ruleset.tables {
                let reader = Reader { ruleset, table };
                match table.name.as_str() {
                    "nat" => reader.nat(&mut owners),
                    "filter" => reader.filter(&mut owners),
                    _ => {}
                }
            }
        }
        for socket in state.sockets.iter().flatten() {
            owners.claims.push(Claim {
                port: socket.port,
                proto: socket.proto,
                family: Family::of(socket.address),
                kind: ClaimKind::Listener { address: socket.address, process: socket.process.clone() },
                rule: None,
            });
        }
        owners
    }

    /// All claims to a port, rules before sockets, in the order of the rules.
    pub fn claims(&self, port: u16) -> impl Iterator<Item = &Claim> {
        self.claims.iter().filter(move |claim| claim.port == port)
    }

    /// All claims, rules before sockets, in the order of the rules.
    pub fn all(&self) -> &[Claim] {
        &self.claims
    }

    /// The endpoints that the rules give a Service's port (`default/frontend:http`), as far as kube-proxy's comments tell
    /// (it leaves them out above 1,000 endpoints).
    pub fn endpoints_of(&self, proto: Proto, service: &str) -> BTreeSet<SocketAddr> {
        let of_service = self.endpoints.iter().filter(|((of, _), services)| *of == proto && services.contains(service));
        of_service.map(|((_, at), _)| *at).collect()
    }

    /// All endpoints that the rules give to Services' ports (`default/frontend:http`), as far as kube-proxy's comments tell.
    pub fn endpoints(&self) -> impl Iterator<Item = (Proto, SocketAddr, &str)> {
        let each = self.endpoints.iter();
        each.flat_map(|((proto, at), services)| services.iter().map(|service| (*proto, *at, service.as_str())))
    }

    /// A name for an endpoint: the Service that it serves (`default/frontend:http`), the first of several.
    pub fn name_of(&self, proto: Proto, address: SocketAddr) -> Option<String> {
        let services = self.endpoints.get(&(proto, address))?;
        let first = services.first()?;
        Some(match services.len() {
            1 => first.clone(),
            more => format!("{first} and {} more", more - 1),
        })
    }

    /// The ports by which Services reach an address, with one Service each: where its pod is believed to listen.
    pub fn served_ports(&self, proto: Proto, address: IpAddr) -> Vec<(u16, &str)> {
        self.endpoints
            .iter()
            .filter(|((of, at), _)| *of == proto && at.ip() == address)
            .filter_map(|((_, at), services)| Some((at.port(), services.first()?.as_str())))
            .collect()
    }
}

struct Reader<'r> {
    ruleset: &'r Ruleset,
    table: &'r Table,
}

/// What a rule asks of protocol, destination and port.
#[derive(Clone, Default)]
struct Asked {
    proto: Option<Proto>,
    ports: Vec<(u16, u16)>,
    destination: Option<IpAddr>,
}

impl Reader<'_> {
    fn nat(&self, owners: &mut Owners) {
        self.host_ports(owners);
        self.crio_host_ports(owners);
        for chain in &self.table.chains {
            match chain.name.as_ref() {
                "KUBE-NODEPORTS" => self.services(chain, owners),
                "KUBE-SERVICES" => self.services(chain, owners),
                name if name.starts_with("KUBE-SEP-") => self.endpoint(chain, owners),
                _ => {}
            }
        }
    }

    /// portmap's entries: CNI-HOSTPORT-DNAT names network and sandbox, the CNI-DN- chain holds ports and destinations.
    fn host_ports(&self, owners: &mut Owners) {
        let Some(entries) = self.table.chain("CNI-HOSTPORT-DNAT") else { return };
        for entry in &entries.rules {
            let Some(chain) = self.target_chain(entry) else { continue };
            let (network, sandbox) = entry.comment().map_or((None, None), |comment| portmap_comment(&comment));
            for (number, rule) in (1u32..).zip(&chain.rules) {
                let Target::Dnat(range) = &rule.target else { continue };
                let asked = asked(rule);
                let (Some(proto), Some(to)) = (asked.proto, destination(range)) else { continue };
                for &(port, _) in &asked.ports {
                    owners.claims.push(Claim {
                        port,
                        proto,
                        family: self.ruleset.family,
                        kind: ClaimKind::HostPort {
                            to,
                            host_ip: asked.destination,
                            network: network.clone(),
                            sandbox: sandbox.clone(),
                            chain: chain.name.to_string(),
                        },
                        rule: Some(self.reference(chain, number)),
                    });
                }
            }
        }
    }

    /// CRI-O's entries: KUBE-HOSTPORTS asks for the port, the KUBE-HP- chain for the hostIP, and holds the destination
    /// (internal/hostport/hostport_iptables.go, `Add`).
    fn crio_host_ports(&self, owners: &mut Owners) {
        let Some(entries) = self.table.chain("KUBE-HOSTPORTS") else { return };
        for entry in &entries.rules {
            let Some(chain) = self.target_chain(entry).filter(|chain| chain.name.starts_with(hash::CRIO)) else {
                continue;
            };
            let wanted = asked(entry);
            let (Some(proto), Some(&(port, _))) = (wanted.proto, wanted.ports.first()) else { continue };
            for (number, rule) in (1u32..).zip(&chain.rules) {
                let Target::Dnat(range) = &rule.target else { continue };
                let Some(to) = destination(range) else { continue };
                let host_ip = asked(rule).destination.or(wanted.destination);
                let chain_name = chain.name.to_string();
                let kind = ClaimKind::HostPort { to, host_ip, network: None, sandbox: None, chain: chain_name };
                let rule = Some(self.reference(chain, number));
                owners.claims.push(Claim { port, proto, family: self.ruleset.family, kind, rule });
            }
        }
    }

    /// KUBE-SERVICES and KUBE-NODEPORTS: a port (and an address) → the chain of a Service.
    fn services(&self, chain: &Chain, owners: &mut Owners) {
        for (number, rule) in (1u32..).zip(&chain.rules) {
            let Some(next) = self.target_chain(rule) else { continue };
            let asked = asked(rule);
            let (Some(proto), Some(&(port, _))) = (asked.proto, asked.ports.first()) else { continue };
            let service = service_name(rule, proto, next);
            let endpoints = self.endpoints_of(next);
            let kind = match asked.destination {
                Some(address) => ClaimKind::ServicePort { service, address, endpoints },
                None => ClaimKind::NodePort { service, endpoints },
            };
            let rule = Some(self.reference(chain, number));
            owners.claims.push(Claim { port, proto, family: self.ruleset.family, kind, rule });
        }
    }

    /// How many KUBE-SEP- chains a Service's chains lead to.
    fn endpoints_of(&self, start: &Chain) -> usize {
        let mut found = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut open = vec![start];
        while let Some(chain) = open.pop() {
            if !seen.insert(&chain.name) {
                continue;
            }
            for rule in &chain.rules {
                match self.target_chain(rule) {
                    Some(next) if next.name.starts_with("KUBE-SEP-") => {
                        found.insert(&next.name);
                    }
                    Some(next) if next.name.starts_with("KUBE-") => open.push(next),
                    _ => {}
                }
            }
        }
        found.len()
    }

    fn endpoint(&self, chain: &Chain, owners: &mut Owners) {
        for rule in &chain.rules {
            let Target::Dnat(range) = &rule.target else { continue };
            let (Some(to), Some(proto)) = (destination(range), asked(rule).proto) else { continue };
            let Some(service) = rule.comment() else { continue };
            let suffix = hash::endpoint_suffix(&service, &proto.to_string(), &to.to_string());
            if chain.name.ends_with(&suffix) {
                owners.endpoints.entry((proto, to)).or_default().insert(service);
            }
        }
    }

    /// filter: kube-proxy's REJECT and DROP for Services without endpoints.
    fn filter(&self, owners: &mut Owners) {
        for name in ["KUBE-EXTERNAL-SERVICES", "KUBE-SERVICES"] {
            let Some(chain) = self.table.chain(name) else { continue };
            for (number, rule) in (1u32..).zip(&chain.rules) {
                let asked = asked(rule);
                let refuses = matches!(rule.target, Target::Reject(_) | Target::Drop);
                if let (true, Some(proto), Some(&(port, _))) = (refuses, asked.proto, asked.ports.first()) {
                    owners.claims.push(Claim {
                        port,
                        proto,
                        family: self.ruleset.family,
                        kind: ClaimKind::Refused { why: rule.comment().unwrap_or_else(|| rule.text.to_string()) },
                        rule: Some(self.reference(chain, number)),
                    });
                }
            }
        }
    }

    fn target_chain(&self, rule: &Rule) -> Option<&Chain> {
        match rule.target {
            Target::Jump(index) | Target::Goto(index) => self.table.chains.get(index as usize),
            _ => None,
        }
    }

    fn reference(&self, chain: &Chain, number: u32) -> RuleRef {
        let place = ChainRef {
            flavour: self.ruleset.flavour,
            family: self.ruleset.family,
            table: self.table.name.as_str().into(),
            chain: (*chain.name).into(),
        };
        RuleRef::new(place, Some(number))
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
    range.text.parse().ok()
}

/// kube-proxy's comment without what it says about the kind of address, believed only when the chain's name agrees.
fn service_name(rule: &Rule, proto: Proto, chain: &Chain) -> String {
    let comment = rule.comment().unwrap_or_default();
    let name = comment.split(' ').next().unwrap_or_default();
    let suffix = hash::service_suffix(name, &proto.to_string());
    if !name.is_empty() && chain.name.ends_with(&suffix) { name.to_owned() } else { chain.name.to_string() }
}

/// `dnat name: "kindnet" id: "d5c4…"` (portmap.go, `fillDnatRules`).
fn portmap_comment(comment: &str) -> (Option<String>, Option<String>) {
    let quoted = |label: &str| {
        let (_, rest) = comment.split_once(label)?;
        let value = rest.trim_start().trim_start_matches(['\\', '"']);
        let end = value.find(['"', '\\']).unwrap_or(value.len());
        value.get(..end).map(str::to_owned)
    };
    (quoted("name:"), quoted("id:"))
}

/// The one address that a rule asks for as destination.
pub fn destination_of(rule: &Rule) -> Option<IpAddr> {
    asked(rule).destination
}
