//! Statements: what a rule asks and does, in a row.

use super::constants::Kind;
use super::expressions::{Scope, named, operand, read, reverse_path, source, tagged, verdict};
use crate::core::model::flow::Family;
use crate::core::model::name::Name;
use crate::core::model::native::{Expr, Nat, NatKind, Op, Source, Statement, Statements};
use serde_json::Value;

/// The statements of a rule as it is listed; those that only count or log are left out.
pub(super) fn read_rule(rule: &Value, scope: &Scope) -> Statements {
    let all = rule.get("expr").and_then(Value::as_array).into_iter().flatten();
    Statements(all.filter_map(|statement| one(statement, scope)).collect())
}

/// `None`: it has no effect on the packet's way.
fn one(value: &Value, scope: &Scope) -> Option<Statement> {
    let unknown = || Some(Statement::Unknown(named(value)));
    let Some((tag, body)) = tagged(value) else { return unknown() };
    if let Some(verdict) = verdict(value, scope) {
        return Some(Statement::Verdict(verdict));
    }
    match tag {
        "match" => comparison(body, scope).or_else(unknown),
        "vmap" => {
            let (key, kinds) = read(body.get("key")?, scope, &[Kind::Any]);
            let (map, _) = source(body.get("data")?, scope, &kinds, Some(&[Kind::Any]));
            Some(Statement::Vmap { key, map })
        }
        "mangle" => mangle(body, scope),
        "dnat" => Some(nat(NatKind::Dnat, body, scope)),
        "snat" => Some(nat(NatKind::Snat, body, scope)),
        "masquerade" => Some(nat(NatKind::Masquerade, body, scope)),
        "redirect" => Some(nat(NatKind::Redirect, body, scope)),
        "reject" => Some(Statement::Reject(answer(body, scope.family))),
        "notrack" => Some(Statement::Notrack),
        "set" => update(body, scope),
        "limit" => Some(Statement::Limit { over: body.get("inv").and_then(Value::as_bool) == Some(true) }),
        "counter" | "log" | "last" | "flow" | "dup" | "ct helper" | "ct timeout" | "ct expectation" | "secmark"
        | "map" => None,
        "queue" | "tproxy" | "synproxy" | "fwd" => Some(Statement::Stop(Name::from(tag))),
        _ => unknown(),
    }
}

fn comparison(body: &Value, scope: &Scope) -> Option<Statement> {
    let reverse_path =
        body.get("right").filter(|right| right.is_boolean()).and_then(|_| reverse_path(body.get("left")?));
    let (left, kinds) = match reverse_path {
        Some(field) => (Expr::Field(field), vec![Kind::Number]),
        None => read(body.get("left")?, scope, &[Kind::Any]),
    };
    let is_flags = kinds.first().is_some_and(|kind| kind.is_flags());
    let op = match body.get("op")?.as_str()? {
        // A set of flags of which the packet has any; of everything else it means "is".
        "in" if is_flags => Op::Any,
        "!" => Op::Nothing,
        "==" | "in" => Op::Is,
        "!=" => Op::IsNot,
        "<" => Op::Less,
        ">" => Op::Greater,
        "<=" => Op::AtMost,
        ">=" => Op::AtLeast,
        _ => return None,
    };
    Some(Statement::Match { left, op, right: operand(body.get("right")?, scope, &kinds) })
}

/// Marks decide ways; other fields that are written to either do not, or the packet is another one then.
fn mangle(body: &Value, scope: &Scope) -> Option<Statement> {
    let (key, value) = (body.get("key")?, body.get("value")?);
    let (tag, what) = tagged(key)?;
    let field = what.get("key").or(what.get("field")).and_then(Value::as_str).unwrap_or_default();
    let value = || read(value, scope, &[Kind::Number]).0;
    match (tag, field) {
        ("meta", "mark") => Some(Statement::Mark(value())),
        ("ct", "mark") => Some(Statement::CtMark(value())),
        ("meta" | "ct" | "ip option" | "tcp option", _) => None,
        ("payload", "dscp" | "ecn" | "ttl" | "hoplimit" | "flowlabel") => None,
        _ => Some(Statement::Stop(Name::from(format!("a rule that writes {}", named(key))))),
    }
}

fn nat(kind: NatKind, body: &Value, scope: &Scope) -> Statement {
    let address = body.get("addr").map(|address| read(address, scope, &[Kind::Address, Kind::Number]).0);
    let port = body.get("port").map(|port| read(port, scope, &[Kind::Number]).0);
    let flags: Vec<&str> = match body.get("flags") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    // A whole network onto another one.
    let is_netmap = body.get("type_flags").is_some_and(|flags| flags.to_string().contains("prefix"));
    if is_netmap {
        return Statement::Stop(Name::from("NAT of a prefix"));
    }
    let random = flags.iter().any(|flag| matches!(*flag, "random" | "fully-random"));
    Statement::Nat(Box::new(Nat { kind, address, port, random, persistent: flags.contains(&"persistent") }))
}

/// As iptables calls it; ICMP's port-unreachable where nothing is said.
fn answer(body: &Value, family: Family) -> Name {
    let kind = body.get("type").and_then(Value::as_str).unwrap_or_default();
    if kind == "tcp reset" {
        return Name::from("tcp-reset");
    }
    let what = body.get("expr").and_then(Value::as_str).unwrap_or("port-unreachable");
    let what = if what == "prot-unreachable" { "proto-unreachable" } else { what };
    // `icmpx` is one kind for both families; IPv4 calls one of them otherwise.
    match (family, kind, what) {
        (Family::V4, "icmpx", "no-route") => Name::from("icmp-net-unreachable"),
        (Family::V4, "icmpx", "admin-prohibited") => Name::from("icmp-admin-prohibited"),
        (Family::V4, ..) => Name::from(format!("icmp-{what}")),
        (Family::V6, "icmpx", "host-unreachable") => Name::from("icmp6-addr-unreachable"),
        (Family::V6, _, "admin-prohibited") => Name::from("icmp6-adm-prohibited"),
        (Family::V6, ..) => Name::from(format!("icmp6-{what}")),
    }
}

fn update(body: &Value, scope: &Scope) -> Option<Statement> {
    let (Source::Named(set), kinds) = source(body.get("set")?, scope, &[Kind::Any], None) else { return None };
    let element = body.get("elem")?;
    let element = element.get("elem").and_then(|elem| elem.get("val")).unwrap_or(element);
    let key: Expr = read(element, scope, &kinds).0;
    Some(Statement::Update { set, key, removes: body.get("op").and_then(Value::as_str) == Some("delete") })
}
