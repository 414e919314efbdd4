//! Constants of nftables: what stands for what in which place.

use crate::core::model::name::Name;
use crate::core::model::native::{Part, Value as Is};
use crate::core::model::rules::CtStates;
use ipnet::IpNet;
use serde_json::Value;
use std::net::IpAddr;

/// What a place holds, which decides what a word there means (`nft describe`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Address,
    /// Ports, marks, lengths: nothing but numbers.
    Number,
    Proto,
    /// An interface.
    Name,
    CtState,
    CtStatus,
    Direction,
    FibType,
    PacketType,
    NfProto,
    EtherType,
    TcpFlags,
    Icmp,
    Icmpv6,
    Mac,
    Dscp,
    /// Whatever it looks like.
    Any,
}

impl Kind {
    /// Whether it is a set of flags, of which a plain comparison asks for any (`expr_evaluate_relational` in nftables).
    pub(super) const fn is_flags(self) -> bool {
        matches!(self, Self::CtState | Self::CtStatus | Self::TcpFlags)
    }
}

/// The types of a set's elements.
pub(super) fn kinds(types: &Value) -> Vec<Kind> {
    match types {
        Value::String(one) => one.split(" . ").map(kind).collect(),
        Value::Array(all) => all.iter().map(|one| one.as_str().map_or(Kind::Any, kind)).collect(),
        _ => vec![Kind::Any],
    }
}

fn kind(name: &str) -> Kind {
    match name {
        "ipv4_addr" | "ipv6_addr" => Kind::Address,
        "inet_service" | "mark" | "integer" | "uid" | "gid" => Kind::Number,
        "inet_proto" => Kind::Proto,
        "ifname" | "iface_index" => Kind::Name,
        "ct_state" => Kind::CtState,
        "ct_status" => Kind::CtStatus,
        "ct_dir" => Kind::Direction,
        "fib_addrtype" => Kind::FibType,
        "pkt_type" => Kind::PacketType,
        "nf_proto" => Kind::NfProto,
        "ether_type" => Kind::EtherType,
        "tcp_flag" => Kind::TcpFlags,
        "icmp_type" => Kind::Icmp,
        "icmpv6_type" => Kind::Icmpv6,
        "ether_addr" => Kind::Mac,
        "dscp" => Kind::Dscp,
        _ => Kind::Any,
    }
}

/// A constant, of several parts where it is a concatenation; `None`: not understood.
pub(super) fn parts(value: &Value, kinds: &[Kind]) -> Option<Vec<Part>> {
    let kind = |at: usize| kinds.get(at).copied().unwrap_or(Kind::Any);
    match value.get("concat").and_then(Value::as_array) {
        Some(parts) => parts.iter().enumerate().map(|(at, part)| one(part, kind(at))).collect(),
        None => Some(vec![one(value, kind(0))?]),
    }
}

/// One part of it.
pub(super) fn one(value: &Value, kind: Kind) -> Option<Part> {
    if let Some(ends) = value.get("range").and_then(Value::as_array) {
        let [first, last] = ends.as_slice() else { return None };
        return Some(Part::Span(plain(first, kind)?, plain(last, kind)?));
    }
    if let Some(prefix) = value.get("prefix") {
        let address: IpAddr = prefix.get("addr")?.as_str()?.parse().ok()?;
        let net = IpNet::new(address, u8::try_from(prefix.get("len")?.as_u64()?).ok()?).ok()?;
        return Some(Part::Span(Is::Address(net.network()), Is::Address(net.broadcast())));
    }
    if let (Kind::Name, Some(start)) = (kind, value.as_str().and_then(|name| name.strip_suffix('*'))) {
        return Some(Part::Begins(Name::from(start)));
    }
    plain(value, kind).map(Part::One)
}

fn plain(value: &Value, kind: Kind) -> Option<Is> {
    match value {
        Value::Number(number) => number.as_u64().map(Is::Number),
        Value::Bool(is) => Some(Is::Number(u64::from(*is))),
        Value::String(word) => word_of(word, kind),
        // Several flags.
        Value::Array(flags) => flags_of(flags, kind),
        Value::Object(_) => flags_of(value.get("|")?.as_array()?, kind),
        Value::Null => None,
    }
}

fn flags_of(flags: &[Value], kind: Kind) -> Option<Is> {
    let mut all = 0;
    for flag in flags {
        let Is::Number(bits) = plain(flag, kind)? else { return None };
        all |= bits;
    }
    Some(Is::Number(all))
}

fn word_of(word: &str, kind: Kind) -> Option<Is> {
    // nft writes so what it does not know the type of.
    let plain = word.strip_suffix(" [invalid type]").unwrap_or(word);
    let number =
        || plain.strip_prefix("0x").map_or_else(|| plain.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok());
    let known = match kind {
        Kind::Address => return word.parse().ok().map(Is::Address),
        Kind::Name => return Some(Is::Name(Name::from(word))),
        Kind::Any => return Some(any(word)),
        Kind::Mac => mac(word),
        Kind::Number => None,
        Kind::Proto => protocol(word),
        Kind::CtState => ct_state(word),
        Kind::CtStatus => ct_status(word),
        Kind::Direction => position(word, &["original", "reply"]),
        Kind::FibType => position(word, &FIB_TYPES),
        Kind::PacketType => match word {
            "unicast" => Some(0),
            word => position(word, &["host", "broadcast", "multicast", "other"]),
        },
        Kind::NfProto => [("ipv4", 2), ("ipv6", 10)].iter().find(|(name, _)| *name == word).map(|(_, is)| *is),
        Kind::EtherType => [("ip", 0x0800), ("arp", 0x0806), ("vlan", 0x8100), ("ip6", 0x86dd)]
            .iter()
            .find(|(name, _)| *name == word)
            .map(|(_, is)| *is),
        Kind::TcpFlags => position(word, &["fin", "syn", "rst", "psh", "ack", "urg", "ecn", "cwr"]).map(|bit| 1 << bit),
        Kind::Dscp => dscp(word),
        Kind::Icmp => named(word, &ICMP),
        Kind::Icmpv6 => named(word, &ICMPV6),
    };
    known.or_else(number).map(Is::Number)
}

/// What a word is by its looks.
fn any(word: &str) -> Is {
    match (word.parse(), word.parse()) {
        (Ok(address), _) => Is::Address(address),
        (_, Ok(number)) => Is::Number(number),
        _ => protocol(word).map_or_else(|| Is::Name(Name::from(word)), Is::Number),
    }
}

fn position(word: &str, names: &[&str]) -> Option<u64> {
    (0..).zip(names).find(|(_, name)| **name == word).map(|(at, _)| at)
}

fn named(word: &str, names: &[(&str, u64)]) -> Option<u64> {
    names.iter().find(|(name, _)| *name == word).map(|(_, number)| *number)
}

/// `RTN_*` by number.
pub(super) const FIB_TYPES: [&str; 10] = [
    "unspec",
    "unicast",
    "local",
    "broadcast",
    "anycast",
    "multicast",
    "blackhole",
    "unreachable",
    "prohibit",
    "throw",
];

const ICMP: [(&str, u64); 13] = [
    ("echo-reply", 0),
    ("destination-unreachable", 3),
    ("source-quench", 4),
    ("redirect", 5),
    ("echo-request", 8),
    ("router-advertisement", 9),
    ("router-solicitation", 10),
    ("time-exceeded", 11),
    ("parameter-problem", 12),
    ("timestamp-request", 13),
    ("timestamp-reply", 14),
    ("address-mask-request", 17),
    ("address-mask-reply", 18),
];

const ICMPV6: [(&str, u64); 14] = [
    ("destination-unreachable", 1),
    ("packet-too-big", 2),
    ("time-exceeded", 3),
    ("parameter-problem", 4),
    ("echo-request", 128),
    ("echo-reply", 129),
    ("mld-listener-query", 130),
    ("mld-listener-report", 131),
    ("mld-listener-done", 132),
    ("nd-router-solicit", 133),
    ("nd-router-advert", 134),
    ("nd-neighbor-solicit", 135),
    ("nd-neighbor-advert", 136),
    ("nd-redirect", 137),
];

fn protocol(word: &str) -> Option<u64> {
    const PROTOCOLS: [(&str, u64); 13] = [
        ("tcp", 6),
        ("udp", 17),
        ("sctp", 132),
        ("icmp", 1),
        ("icmpv6", 58),
        ("ipv6-icmp", 58),
        ("igmp", 2),
        ("dccp", 33),
        ("gre", 47),
        ("esp", 50),
        ("ah", 51),
        ("comp", 108),
        ("udplite", 136),
    ];
    named(word, &PROTOCOLS)
}

/// Class selectors (RFC 2474), assured forwarding (RFC 2597), and the others that nft names.
fn dscp(word: &str) -> Option<u64> {
    let digit = |at: usize| word.get(at..=at)?.parse::<u64>().ok();
    match word {
        "ef" => Some(46),
        "va" => Some(44),
        "le" | "lephb" => Some(1),
        "df" | "be" => Some(0),
        _ if word.starts_with("cs") && word.len() == 3 => Some(digit(2)? * 8),
        _ if word.starts_with("af") && word.len() == 4 => Some(digit(2)? * 8 + digit(3)? * 2),
        _ => None,
    }
}

/// The bits of [`CtStates`].
fn ct_state(word: &str) -> Option<u64> {
    Some(u64::from(match word {
        "invalid" => CtStates::INVALID,
        "established" => CtStates::ESTABLISHED,
        "related" => CtStates::RELATED,
        "new" => CtStates::NEW,
        "untracked" => CtStates::UNTRACKED,
        _ => return None,
    }))
}

/// `enum ip_conntrack_status`.
fn ct_status(word: &str) -> Option<u64> {
    let bit = match word {
        "expected" => 0,
        "seen-reply" => 1,
        "assured" => 2,
        "confirmed" => 3,
        "snat" => 4,
        "dnat" => 5,
        "dying" => 9,
        _ => return None,
    };
    Some(1 << bit)
}

fn mac(word: &str) -> Option<u64> {
    let mut bytes = word.split(':');
    let mut all = 0;
    for _ in 0..6 {
        all = all << 8 | u64::from(u8::from_str_radix(bytes.next()?, 16).ok()?);
    }
    bytes.next().is_none().then_some(all)
}
