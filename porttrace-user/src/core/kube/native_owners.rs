//! Who claims a port by native nftables rules: kube-proxy's maps (pkg/proxy/nftables/proxier.go) and portmap's chains
//! (plugins/meta/portmap/portmap_nftables.go).

use super::hash;
use super::owners::{Claim, ClaimKind};
use super::targets::targets_of_chain;
use crate::core::model::flow::{Family, Proto};
use crate::core::model::name::Name;
use crate::core::model::native::{
    Datum, Expr, Field, NatKind, Op, Operand, Part, Set, Source, Statement, Value, Verdict, addresses, ports,
};
use crate::core::model::rules::{Rule, Ruleset, Table, Target};
use crate::core::model::trace::{Chains, Place, RuleRef};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What a table says.
#[derive(Debug, Default)]
pub(super) struct Read {
    pub(super) claims: Vec<Claim>,
    /// Endpoints and the Services that they serve.
    pub(super) endpoints: Vec<(Proto, SocketAddr, Name)>,
}

/// Reads table number `at`, if it is kube-proxy's or portmap's.
pub(super) fn read(ruleset: &Arc<Ruleset>, at: usize) -> Read {
    let table = &ruleset.tables[at];
    let chains = Arc::new(Chains::Of(Arc::clone(ruleset), at));
    let reader = Reader { family: ruleset.family, table, chains };
    let mut found = Read::default();
    match table.name.rsplit(' ').next() {
        Some("kube-proxy") => {
            reader.services(&mut found);
            reader.endpoints(&mut found);
        }
        Some("cni_hostport") => reader.host_ports(&mut found),
        _ => {}
    }
    found
}

struct Reader<'r> {
    family: Family,
    table: &'r Table,
    chains: Arc<Chains>,
}

/// An element of one of kube-proxy's maps.
struct Element<'r> {
    address: Option<IpAddr>,
    proto: Proto,
    port: u16,
    verdict: &'r Verdict,
    comment: Option<&'r Name>,
}

impl<'r> Reader<'r> {
    fn services(&self, found: &mut Read) {
        for name in ["service-ips", "service-nodeports", "no-endpoint-services", "no-endpoint-nodeports"] {
            let Some((number, map)) = (0u32..).zip(&self.table.sets).find(|(_, set)| *set.name == *name) else {
                continue;
            };
            let rule = self.looking_up(number);
            let mut elements: Vec<Element<'_>> = elements(map).collect();
            elements.sort_by_key(|one| (one.address, one.port, one.proto));
            for element in elements {
                let kind = match name {
                    "no-endpoint-services" | "no-endpoint-nodeports" => refused(&element),
                    _ => self.served(&element),
                };
                let leads_to = self.chain_of(element.verdict).map(|(_, name)| name.clone());
                found.claims.extend(kind.map(|kind| Claim {
                    port: element.port,
                    proto: element.proto,
                    family: self.family,
                    kind,
                    rule: rule.clone(),
                    leads_to,
                }));
            }
        }
    }

    /// A port of a Service, on an address or on the node's own.
    fn served(&self, element: &Element<'_>) -> Option<ClaimKind> {
        let (at, name) = self.chain_of(element.verdict)?;
        let service = service_of(name).map_or_else(|| name.clone(), |(service, _)| service);
        let targets = targets_of_chain((self.table, at), self.family, element.proto, element.port);
        let endpoints = targets.len();
        Some(match element.address {
            Some(address) => ClaimKind::ServicePort { service, address, endpoints },
            None => ClaimKind::NodePort { service, endpoints },
        })
    }

    /// What the chains of Services lead to.
    fn endpoints(&self, found: &mut Read) {
        for (at, chain) in (0u32..).zip(&self.table.chains) {
            let named = chain.name().strip_prefix("service-").or_else(|| chain.name().strip_prefix("local-"));
            let Some((service, proto)) = named.and_then(|_| service_of(&chain.id.chain)) else { continue };
            // They ask for no port: the map that led to them did.
            let targets = targets_of_chain((self.table, at), self.family, proto, 0);
            found.endpoints.extend(targets.into_iter().map(|(proto, to)| (proto, to, service.clone())));
        }
    }

    /// Each rule one hostPort, with the sandbox's ID as its comment.
    fn host_ports(&self, found: &mut Read) {
        for (at, chain) in (0u32..).zip(&self.table.chains) {
            if !matches!(chain.name(), "hostports" | "hostip_hostports") {
                continue;
            }
            for (number, rule) in (1u32..).zip(&chain.rules) {
                let Some(entry) = host_port(rule) else { continue };
                let kind = ClaimKind::HostPort {
                    to: entry.to,
                    host_ip: entry.host_ip,
                    network: None,
                    sandbox: rule.comment().map(Name::from),
                    chain: chain.id.chain.clone(),
                };
                let rule = self.reference(at, number);
                found.claims.push(Claim {
                    port: entry.port,
                    proto: entry.proto,
                    family: self.family,
                    kind,
                    rule,
                    leads_to: None,
                });
            }
        }
    }

    /// The first rule that looks a verdict up in this map.
    fn looking_up(&self, map: u32) -> Option<RuleRef> {
        let looks = |rule: &Rule| match &rule.target {
            Target::Native(all) => {
                all.0.iter().any(|one| matches!(one, Statement::Vmap { map: Source::Named(at), .. } if *at == map))
            }
            _ => false,
        };
        let mut chains = (0u32..).zip(&self.table.chains);
        chains.find_map(|(at, chain)| {
            let number = chain.rules.iter().position(looks)?;
            self.reference(at, number as u32 + 1)
        })
    }

    /// The chain that a verdict leads to.
    fn chain_of(&self, verdict: &Verdict) -> Option<(u32, &'r Name)> {
        match verdict {
            Verdict::Jump(at) | Verdict::Goto(at) => Some((*at, &self.table.chains.get(*at as usize)?.id.chain)),
            _ => None,
        }
    }

    fn reference(&self, chain: u32, number: u32) -> Option<RuleRef> {
        Some(RuleRef::new(Place::new(&self.chains, chain)?, Some(number)))
    }
}

fn elements(map: &Set) -> impl Iterator<Item = Element<'_>> {
    map.elements().filter_map(|(key, datum, comment)| {
        let Some(Datum::Verdict(verdict)) = datum else { return None };
        let (address, proto, port) = match key {
            [Value::Address(address), Value::Number(proto), Value::Number(port)] => (Some(*address), proto, port),
            [Value::Number(proto), Value::Number(port)] => (None, proto, port),
            _ => return None,
        };
        let proto = Proto::from_number(u8::try_from(*proto).ok()?);
        Some(Element { address, proto, port: u16::try_from(*port).ok()?, verdict, comment })
    })
}

/// kube-proxy refuses where there are no endpoints, and drops where there are none on this node.
fn refused(element: &Element<'_>) -> Option<ClaimKind> {
    let whose = element.comment.map_or("a Service", Name::as_str);
    let what = if *element.verdict == Verdict::Drop { "has no local endpoints" } else { "has no endpoints" };
    Some(ClaimKind::Refused { why: format!("{whose} {what}"), address: element.address })
}

/// The Service of a chain, `default/frontend:http` for `external-3NEXC4QR-default/frontend/tcp/http`; believed only when the hash
/// agrees.
fn service_of(chain: &str) -> Option<(Name, Proto)> {
    let (_, base) = chain.split_once('-')?;
    let (hash, rest) = base.split_once('-')?;
    if hash::native_suffix(rest) != hash {
        return None;
    }
    let mut parts = rest.split('/');
    let (namespace, name, proto, port) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let proto = Proto::from_name(proto)?;
    let port = if port.is_empty() { String::new() } else { format!(":{port}") };
    Some((Name::from(format!("{namespace}/{name}{port}")), proto))
}

struct HostPort {
    proto: Proto,
    port: u16,
    host_ip: Option<IpAddr>,
    to: SocketAddr,
}

fn host_port(rule: &Rule) -> Option<HostPort> {
    let Target::Native(all) = &rule.target else { return None };
    let (mut asked, mut host_ip, mut to) = (None, None, None);
    for statement in &all.0 {
        match statement {
            Statement::Match { left: Expr::Field(field), op: Op::Is, right: Operand::Parts(parts) } => {
                match (field, &parts[..]) {
                    (Field::DestinationPort(Some(proto)), [Part::One(Value::Number(port))]) => {
                        asked = Some((Proto::from_number(*proto), u16::try_from(*port).ok()?));
                    }
                    (Field::Destination(_), [Part::One(Value::Address(address))]) => host_ip = Some(*address),
                    _ => {}
                }
            }
            Statement::Nat(nat) if nat.kind == NatKind::Dnat => {
                let constant = |part: &Option<Expr>| match part {
                    Some(Expr::Constant(parts)) => parts.first().cloned(),
                    _ => None,
                };
                let (address, _) = addresses(&constant(&nat.address)?)?;
                let (port, _) = ports(&constant(&nat.port)?)?;
                to = Some(SocketAddr::new(address.address(), port));
            }
            _ => {}
        }
    }
    let (proto, port) = asked?;
    Some(HostPort { proto, port, host_ip, to: to? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chains_service_is_believed_when_its_hash_agrees() {
        let of = |chain: &str| service_of(chain).map(|(service, proto)| format!("{service} {proto}"));
        assert_eq!(of("external-3NEXC4QR-default/frontend/tcp/http").as_deref(), Some("default/frontend:http tcp"));
        assert_eq!(of("service-XIPTGNLG-default/udp-np/udp/dns").as_deref(), Some("default/udp-np:dns udp"));
        assert_eq!(of("external-3NEXC4QR-default/other/tcp/http"), None);
        assert_eq!(of("services"), None);
    }
}
