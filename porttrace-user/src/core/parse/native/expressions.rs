//! Expressions: what a rule looks at.

use super::constants::{self, Kind};
use super::{Kinds, insert};
use crate::core::model::flow::{Direction, Family};
use crate::core::model::name::Name;
use crate::core::model::native::{BitOp, Device, Expr, Field, Operand, Set, Source, Verdict};
use foldhash::HashMap;
use serde_json::Value;

/// What the names in a table's rules stand for.
pub(super) struct Scope {
    pub(super) family: Family,
    pub(super) chains: HashMap<Name, u32>,
    pub(super) sets: HashMap<Name, (u32, Kinds)>,
}

/// What a JSON value with one key is: `{"payload": …}`.
pub(super) fn tagged(value: &Value) -> Option<(&str, &Value)> {
    let (tag, body) = value.as_object()?.iter().next()?;
    Some((tag, body))
}

/// Its beginning, to name what is not understood.
pub(super) fn named(value: &Value) -> Name {
    let text = match tagged(value) {
        Some((tag, body)) => match body.get("key").or(body.get("name")).and_then(Value::as_str) {
            Some(key) => format!("{tag} {key}"),
            None => tag.to_owned(),
        },
        None => value.to_string(),
    };
    Name::from(text.chars().take(60).collect::<String>())
}

/// A verdict; `None` where it is something else.
pub(super) fn verdict(value: &Value, scope: &Scope) -> Option<Verdict> {
    let (tag, body) = tagged(value)?;
    let to = |make: fn(u32) -> Verdict| {
        let name = body.get("target").and_then(Value::as_str).unwrap_or_default();
        scope.chains.get(name).map_or_else(|| Verdict::Missing(Name::from(name)), |at| make(*at))
    };
    Some(match tag {
        "accept" => Verdict::Accept,
        "drop" => Verdict::Drop,
        "continue" => Verdict::Continue,
        "return" => Verdict::Return,
        "jump" => to(Verdict::Jump),
        "goto" => to(Verdict::Goto),
        _ => return None,
    })
}

/// An expression, constants in it being of these kinds, and the kinds of its own parts.
pub(super) fn read(value: &Value, scope: &Scope, constant: &[Kind]) -> (Expr, Vec<Kind>) {
    let unknown = || (Expr::Unknown(named(value)), vec![Kind::Any]);
    let constants = || match constants::parts(value, constant) {
        Some(parts) => (Expr::Constant(parts.into()), constant.to_vec()),
        None => unknown(),
    };
    let Some((tag, body)) = tagged(value) else { return constants() };
    if let Some((field, kind)) = field(tag, body) {
        return (Expr::Field(field), vec![kind]);
    }
    match tag {
        "concat" => concatenated(body, scope, constant),
        "&" | "|" | "^" | "<<" | ">>" => bits(tag, body, scope, constant).unwrap_or_else(unknown),
        "numgen" => numbers(body).map_or_else(unknown, |number| (number, vec![Kind::Number])),
        "map" => match (body.get("key"), body.get("data")) {
            (Some(key), Some(data)) => {
                let (key, kinds) = read(key, scope, &[Kind::Any]);
                let (map, data) = source(data, scope, &kinds, Some(constant));
                (Expr::Map { key: Box::new(key), map }, data)
            }
            _ => unknown(),
        },
        "prefix" | "range" => constants(),
        _ => unknown(),
    }
}

fn concatenated(body: &Value, scope: &Scope, constant: &[Kind]) -> (Expr, Vec<Kind>) {
    let (mut parts, mut kinds) = (Vec::new(), Vec::new());
    for (at, part) in body.as_array().into_iter().flatten().enumerate() {
        let (part, of) = read(part, scope, &[constant.get(at).copied().unwrap_or(Kind::Any)]);
        parts.push(part);
        kinds.extend(of);
    }
    (Expr::Concat(parts.into()), kinds)
}

/// `meta mark | 0x4000`. A constant is of the kind of the other side.
fn bits(tag: &str, body: &Value, scope: &Scope, constant: &[Kind]) -> Option<(Expr, Vec<Kind>)> {
    let op = match tag {
        "&" => BitOp::And,
        "|" => BitOp::Or,
        "^" => BitOp::Xor,
        "<<" => BitOp::Left,
        _ => BitOp::Right,
    };
    let mut sides = body.as_array()?.iter();
    let (mut left, kinds) = read(sides.next()?, scope, constant);
    // More than two are a row of the same.
    for side in sides {
        let kind = if matches!(op, BitOp::Left | BitOp::Right) { Kind::Number } else { *kinds.first()? };
        let (right, _) = read(side, scope, &[kind]);
        left = Expr::Bits { op, left: Box::new(left), right: Box::new(right) };
    }
    Some((left, kinds))
}

fn numbers(body: &Value) -> Option<Expr> {
    let number = |key: &str| body.get(key).and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok());
    let counts = match body.get("mode")?.as_str()? {
        "random" => false,
        "inc" => true,
        _ => return None,
    };
    Some(Expr::Number { modulus: number("mod")?, offset: number("offset").unwrap_or(0), counts })
}

/// A set or a map, by name or as it stands there; `key`: what is looked up in it, `data`: what a map that stands there leads to.
pub(super) fn source(value: &Value, scope: &Scope, key: &[Kind], data: Option<&[Kind]>) -> (Source, Vec<Kind>) {
    if let Some(name) = value.as_str().and_then(|name| name.strip_prefix('@')) {
        return match scope.sets.get(name) {
            Some((at, kinds)) => (Source::Named(*at), kinds.data.clone().unwrap_or_default()),
            None => (Source::Missing(Name::from(name)), vec![Kind::Any]),
        };
    }
    let kinds = Kinds { key: key.to_vec(), data: data.map(<[Kind]>::to_vec) };
    let mut set = Set::default();
    let listed = value.get("set").unwrap_or(value);
    let elements = listed.as_array().map_or(std::slice::from_ref(listed), Vec::as_slice);
    for element in elements {
        set.has_unknown |= insert(&mut set, element, &kinds, scope).is_err();
    }
    (Source::Inline(Box::new(set)), kinds.data.unwrap_or_default())
}

/// What stands on the right side of a comparison with parts of these kinds.
pub(super) fn operand(value: &Value, scope: &Scope, kinds: &[Kind]) -> Operand {
    let is_set = value.get("set").is_some() || value.as_str().is_some_and(|name| name.starts_with('@'));
    if is_set {
        return Operand::Set(source(value, scope, kinds, None).0);
    }
    match read(value, scope, kinds).0 {
        Expr::Constant(parts) => Operand::Parts(parts),
        Expr::Unknown(what) => Operand::Unknown(what),
        // A concatenation of constants.
        Expr::Concat(parts) => {
            let constant = |part: &Expr| match part {
                Expr::Constant(parts) => Some(parts.to_vec()),
                _ => None,
            };
            match parts.iter().map(constant).collect::<Option<Vec<_>>>() {
                Some(parts) => Operand::Parts(parts.into_iter().flatten().collect()),
                None => Operand::Expr(Box::new(Expr::Concat(parts))),
            }
        }
        other => Operand::Expr(Box::new(other)),
    }
}

fn field(tag: &str, body: &Value) -> Option<(Field, Kind)> {
    match tag {
        "payload" if body.get("base").is_some() => raw(body),
        "payload" => payload(body.get("protocol")?.as_str()?, body.get("field")?.as_str()?),
        "meta" => meta(body.get("key")?.as_str()?),
        "ct" => conntrack(body.get("key")?.as_str()?, body.get("dir").and_then(Value::as_str)),
        "fib" => fib(body),
        _ => None,
    }
}

/// Bits by their place, as nft writes ports where it does not see of which protocol: `@th,16,16`.
fn raw(body: &Value) -> Option<(Field, Kind)> {
    let number = |key: &str| body.get(key).and_then(Value::as_u64);
    match (body.get("base")?.as_str()?, number("offset")?, number("len")?) {
        ("th", 0, 16) => Some((Field::SourcePort(None), Kind::Number)),
        ("th", 16, 16) => Some((Field::DestinationPort(None), Kind::Number)),
        _ => None,
    }
}

fn payload(protocol: &str, field: &str) -> Option<(Field, Kind)> {
    let number = |number: u8| Some(number);
    let ports = |of: Option<u8>| match field {
        "sport" => Some((Field::SourcePort(of), Kind::Number)),
        "dport" => Some((Field::DestinationPort(of), Kind::Number)),
        _ => None,
    };
    let network = |family: Family| {
        Some(match field {
            "saddr" => (Field::Source(family), Kind::Address),
            "daddr" => (Field::Destination(family), Kind::Address),
            "protocol" | "nexthdr" => (Field::Protocol(family), Kind::Proto),
            "ttl" | "hoplimit" => (Field::HopLimit(family), Kind::Number),
            "dscp" => (Field::Dscp(family), Kind::Dscp),
            "ecn" => (Field::Ecn(family), Kind::Number),
            _ => return None,
        })
    };
    let control = |family: Family, kind: Kind| match field {
        "type" => Some((Field::IcmpType(family), kind)),
        "code" => Some((Field::IcmpCode(family), Kind::Number)),
        _ => None,
    };
    match protocol {
        "ip" => network(Family::V4),
        "ip6" => network(Family::V6),
        "tcp" if field == "flags" => Some((Field::TcpFlags, Kind::TcpFlags)),
        "tcp" => ports(number(6)),
        "udp" => ports(number(17)),
        "sctp" => ports(number(132)),
        "th" => ports(None),
        "icmp" => control(Family::V4, Kind::Icmp),
        "icmpv6" => control(Family::V6, Kind::Icmpv6),
        "ether" if field == "saddr" => Some((Field::EtherSource, Kind::Mac)),
        _ => None,
    }
}

fn meta(key: &str) -> Option<(Field, Kind)> {
    Some(match key {
        "mark" => (Field::Mark, Kind::Number),
        "iifname" | "iif" => (Field::Input, Kind::Name),
        "oifname" | "oif" => (Field::Output, Kind::Name),
        "l4proto" => (Field::L4Proto, Kind::Proto),
        "nfproto" => (Field::NfProto, Kind::NfProto),
        "protocol" => (Field::EtherType, Kind::EtherType),
        "pkttype" => (Field::PacketType, Kind::PacketType),
        "length" => (Field::Length, Kind::Number),
        "skuid" => (Field::Uid, Kind::Number),
        "skgid" => (Field::Gid, Kind::Number),
        _ => return None,
    })
}

fn conntrack(key: &str, direction: Option<&str>) -> Option<(Field, Kind)> {
    let way = match direction {
        Some("original") => Some(Direction::Original),
        Some("reply") => Some(Direction::Reply),
        _ => None,
    };
    Some(match (key, way) {
        ("state", _) => (Field::CtState, Kind::CtState),
        ("status", _) => (Field::CtStatus, Kind::CtStatus),
        ("mark", _) => (Field::CtMark, Kind::Number),
        ("direction", _) => (Field::CtDirection, Kind::Direction),
        ("protocol", _) => (Field::CtProto, Kind::Proto),
        ("saddr" | "ip saddr" | "ip6 saddr", Some(way)) => (Field::CtSource(way), Kind::Address),
        ("daddr" | "ip daddr" | "ip6 daddr", Some(way)) => (Field::CtDestination(way), Kind::Address),
        ("proto-src", Some(way)) => (Field::CtSourcePort(way), Kind::Number),
        ("proto-dst", Some(way)) => (Field::CtDestinationPort(way), Kind::Number),
        _ => return None,
    })
}

/// What of a packet the FIB is asked by.
fn fib_flags(body: &Value) -> Option<Vec<&str>> {
    Some(match body.get("flags")? {
        Value::String(one) => vec![one],
        Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
        _ => return None,
    })
}

/// `fib saddr . iif oif`, of which only is asked whether there is any.
pub(super) fn reverse_path(value: &Value) -> Option<Field> {
    let body = value.get("fib")?;
    let mut flags = fib_flags(body)?;
    flags.sort_unstable();
    let marked = match flags.as_slice() {
        ["iif", "saddr"] => false,
        ["iif", "mark", "saddr"] => true,
        _ => return None,
    };
    matches!(body.get("result")?.as_str()?, "oif" | "oifname").then_some(Field::ReversePath { marked })
}

fn fib(body: &Value) -> Option<(Field, Kind)> {
    let flags = fib_flags(body)?;
    if body.get("result")?.as_str()? != "type" || flags.contains(&"mark") {
        return None;
    }
    let device = match (flags.contains(&"iif"), flags.contains(&"oif")) {
        (true, _) => Some(Device::Input),
        (_, true) => Some(Device::Output),
        _ => None,
    };
    let source = flags.contains(&"saddr");
    (source != flags.contains(&"daddr")).then_some((Field::FibType { source, device }, Kind::FibType))
}
