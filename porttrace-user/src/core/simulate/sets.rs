//! ipsets: whether a packet is in one (net/netfilter/ipset/).

use super::config::icmp_type;
use crate::core::model::flow::{Family, Proto, Tuple};
use crate::core::model::state::IpSet;
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// All sets of a state with their members read.
#[derive(Debug)]
pub(super) struct Sets(Option<BTreeMap<String, Set>>);

#[derive(Debug)]
struct Set {
    kinds: Vec<Part>,
    members: Vec<Member>,
    /// Only so many bits of addresses count (`netmask`).
    netmask: Option<u8>,
    /// An option that changes what its members mean, and that the model does not know.
    odd: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Address,
    Port,
    Interface,
    Mark,
    /// `list:set`
    Name,
    /// MAC addresses: no packet of the model has one.
    Unknown,
}

#[derive(Debug)]
struct Member {
    parts: Vec<Value>,
    excluded: bool,
}

#[derive(Debug)]
enum Value {
    Net(IpNet),
    Range(IpAddr, IpAddr),
    /// `None`: TCP and UDP (bitmap:port).
    Port(Option<Proto>, u16, u16),
    /// `wildcard`: every interface whose name begins so.
    Interface {
        name: String,
        wildcard: bool,
    },
    Mark(u32),
    Name(String),
}

/// What a set asks about.
pub(super) struct Asked<'a> {
    pub(super) tuple: &'a Tuple,
    pub(super) input: Option<&'a str>,
    pub(super) output: Option<&'a str>,
    pub(super) mark: u32,
    /// For each dimension whether the packet's source side counts.
    pub(super) source: &'a [bool],
}

/// Sets may hold sets to this depth.
const DEPTH: u8 = 8;

impl Sets {
    pub(super) fn new(sets: Option<&BTreeMap<String, IpSet>>) -> Self {
        Self(sets.map(|sets| sets.iter().map(|(name, set)| (name.clone(), Set::new(set))).collect()))
    }

    /// Whether the packet is in the set; the error says why that cannot be known.
    pub(super) fn contains(&self, name: &str, asked: &Asked<'_>) -> Result<bool, String> {
        self.test(name, asked, DEPTH)
    }

    fn test(&self, name: &str, asked: &Asked<'_>, depth: u8) -> Result<bool, String> {
        let Some(sets) = &self.0 else { return Err(format!("set {name} is not part of the state")) };
        let Some(set) = sets.get(name) else { return Err(format!("set {name} is not in the state")) };
        if set.kinds.contains(&Part::Unknown) {
            return Err(format!("set {name} is of a type that the model does not know"));
        }
        if let Some(option) = set.odd {
            return Err(format!("set {name} has the option {option}, which the model does not know"));
        }
        if depth == 0 {
            return Err(format!("set {name} holds itself"));
        }
        // Of all members that contain the packet the most specific decides (hash:net with nomatch).
        let mut best = (0, false, false);
        for member in &set.members {
            if let Some((width, met)) = self.width(set, member, asked, depth)?
                && (width, met) > (best.0, best.1)
            {
                best = (width, met, met && !member.excluded);
            }
        }
        Ok(best.2)
    }

    /// How specific a member is that ends the search of the kernel, and whether the packet is in it: members with the packet's
    /// network end it also where they name another interface (`multi` of `mtype_test_cidrs`,
    /// net/netfilter/ipset/ip_set_hash_gen.h).
    fn width(&self, set: &Set, member: &Member, asked: &Asked<'_>, depth: u8) -> Result<Option<(u32, bool)>, String> {
        if member.parts.len() != set.kinds.len() {
            return Ok(None);
        }
        let (mut width, mut met) = (1, true);
        for (at, value) in member.parts.iter().enumerate() {
            let source = asked.source.get(at).copied().unwrap_or(true);
            let inside = match value {
                Value::Name(name) => self.test(name, asked, depth - 1)?,
                plain => plain.holds(asked, source, set.netmask),
            };
            match value {
                Value::Interface { .. } => met &= inside,
                _ if !inside => return Ok(None),
                // The kernel goes through the lengths of the first network, and for each through those of the second.
                Value::Net(net) => width = width * 256 + u32::from(net.prefix_len()),
                _ => {}
            }
        }
        Ok(Some((width, met)))
    }
}

impl Value {
    fn holds(&self, asked: &Asked<'_>, source: bool, netmask: Option<u8>) -> bool {
        let tuple = asked.tuple;
        let address = if source { tuple.src } else { tuple.dst };
        let masked = netmask.and_then(|length| IpNet::new(address, length).ok());
        let address = masked.map_or(address, |net| net.network());
        match self {
            Self::Net(net) => net.contains(&address),
            Self::Range(low, high) => Family::of(*low) == Family::of(address) && (*low..=*high).contains(&address),
            Self::Port(proto, low, high) => {
                let port = match tuple.proto {
                    Proto::Icmp | Proto::Icmpv6 => {
                        let (kind, code) = icmp_type(tuple);
                        u16::from_be_bytes([kind, code])
                    }
                    _ if source => tuple.sport,
                    _ => tuple.dport,
                };
                // `ip_set_get_ip_port`, for sets without a protocol: SCTP has no port there.
                let ours = proto.map_or(matches!(tuple.proto, Proto::Tcp | Proto::Udp), |proto| proto == tuple.proto);
                ours && (*low..=*high).contains(&port)
            }
            Self::Interface { name, wildcard } => {
                let interface = if source { asked.input } else { asked.output }.unwrap_or_default();
                if *wildcard { interface.starts_with(name) } else { interface == name }
            }
            Self::Mark(mark) => asked.mark == *mark,
            Self::Name(_) => false,
        }
    }
}

impl Set {
    fn new(set: &IpSet) -> Self {
        let kinds: Vec<Part> = match set.kind.split_once(':') {
            Some((_, parts)) => parts.split(',').map(part).collect(),
            None => vec![Part::Unknown],
        };
        let members = set.members.iter().filter_map(|text| member(text, &kinds)).collect();
        let mut options = set.options.split_ascii_whitespace().skip_while(|word| *word != "netmask").skip(1);
        let netmask = options.next().and_then(|length| length.parse().ok());
        let odd =
            ["bitmask", "markmask"].into_iter().find(|odd| set.options.split_ascii_whitespace().any(|w| w == *odd));
        Self { kinds, members, netmask, odd }
    }
}

fn part(name: &str) -> Part {
    match name {
        "ip" | "net" => Part::Address,
        "port" => Part::Port,
        "iface" => Part::Interface,
        "mark" => Part::Mark,
        "set" => Part::Name,
        _ => Part::Unknown,
    }
}

/// `None`: no member that a packet can meet. Rules never ask for a bridge port (xt_set sets no `IPSET_FLAG_PHYSDEV`).
fn member(text: &str, kinds: &[Part]) -> Option<Member> {
    let mut words = text.split_ascii_whitespace();
    let element = words.next()?.split(',').zip(kinds);
    let options: Vec<&str> = words.collect();
    let wildcard = options.contains(&"wildcard");
    let parts = element.map(|(text, kind)| match kind {
        Part::Interface if text.starts_with("physdev:") => None,
        Part::Interface => Some(Value::Interface { name: text.into(), wildcard }),
        kind => value(text, *kind),
    });
    Some(Member { parts: parts.collect::<Option<_>>()?, excluded: options.contains(&"nomatch") })
}

fn value(text: &str, kind: Part) -> Option<Value> {
    Some(match kind {
        Part::Address => match text.split_once('-') {
            Some((low, high)) => Value::Range(low.parse().ok()?, high.parse().ok()?),
            None => Value::Net(text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok()?),
        },
        Part::Port => {
            let (proto, ports) = match text.split_once(':') {
                Some((proto, ports)) => (Some(Proto::from_name(proto)?), ports),
                None => (None, text),
            };
            if let (Some(Proto::Icmp | Proto::Icmpv6), Some((kind, code))) = (proto, ports.split_once('/')) {
                let port = u16::from_be_bytes([kind.parse().ok()?, code.parse().ok()?]);
                return Some(Value::Port(proto, port, port));
            }
            let (low, high) = ports.split_once('-').unwrap_or((ports, ports));
            // A port without a protocol is TCP in a hash, anything in a bitmap; `ipset save` always names it in a hash.
            Value::Port(proto, low.parse().ok()?, high.parse().ok()?)
        }
        Part::Mark => Value::Mark(u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()?),
        Part::Name => Value::Name(text.into()),
        Part::Interface | Part::Unknown => return None,
    })
}
