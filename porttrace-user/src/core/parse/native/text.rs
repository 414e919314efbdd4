//! A rule in nft's own language, made from its JSON: `nft -j` gives no text, and a second listing might be of other rules.

use serde_json::Value;

/// The rule as `nft list ruleset` writes it, but for counters.
pub(super) fn rule(rule: &Value) -> String {
    let all = rule.get("expr").and_then(Value::as_array).into_iter().flatten();
    let mut words: Vec<String> = all.filter(|one| one.get("counter").is_none()).map(statement).collect();
    if let Some(comment) = rule.get("comment").and_then(Value::as_str) {
        words.push(format!("comment \"{comment}\""));
    }
    words.retain(|word| !word.is_empty());
    words.join(" ").replace(['\n', '\r'], " ")
}

fn tagged(value: &Value) -> Option<(&str, &Value)> {
    let (tag, body) = value.as_object()?.iter().next()?;
    Some((tag, body))
}

fn part<'v>(body: &'v Value, key: &str) -> &'v Value {
    body.get(key).unwrap_or(&Value::Null)
}

fn text<'v>(body: &'v Value, key: &str) -> &'v str {
    part(body, key).as_str().unwrap_or_default()
}

fn statement(value: &Value) -> String {
    let Some((tag, body)) = tagged(value) else { return value.to_string() };
    match tag {
        "match" => {
            let write = if is_mark(part(body, "left")) { mark } else { expression };
            let (left, right) = (write(part(body, "left")), write(part(body, "right")));
            let right = match (part(body, "left").get("fib"), part(body, "right").as_bool()) {
                (Some(_), Some(true)) => "exists".to_owned(),
                (Some(_), Some(false)) => "missing".to_owned(),
                _ => right,
            };
            match text(body, "op") {
                "==" | "in" if implies(part(body, "left")) => format!("{left} {right}"),
                "in" => format!("{left} {right}"),
                op => format!("{left} {op} {right}"),
            }
        }
        "accept" | "drop" | "continue" | "return" | "notrack" => tag.to_owned(),
        "jump" | "goto" => format!("{tag} {}", text(body, "target")),
        "vmap" => format!("{} vmap {}", expression(part(body, "key")), expression(part(body, "data"))),
        "mangle" => {
            let write = if is_mark(part(body, "key")) { mark } else { expression };
            format!("{} set {}", expression(part(body, "key")), write(part(body, "value")))
        }
        "dnat" | "snat" | "masquerade" | "redirect" => translation(tag, body),
        "reject" => match (text(body, "type"), text(body, "expr")) {
            ("", _) | ("icmp" | "icmpv6" | "icmpx", "port-unreachable") => "reject".to_owned(),
            ("tcp reset", _) => "reject with tcp reset".to_owned(),
            (kind, what) => format!("reject with {kind} {what}"),
        },
        "set" => {
            let (op, set) = (text(body, "op"), text(body, "set"));
            format!("{op} {set} {{ {} }}", expression(part(body, "elem")))
        }
        "limit" => limit(body),
        "log" => match text(body, "prefix") {
            "" => "log".to_owned(),
            prefix => format!("log prefix \"{prefix}\""),
        },
        "xt" => format!("xt {} \"{}\"", text(body, "type"), text(body, "name")),
        "queue" => format!("queue to {}", expression(part(body, "num"))),
        other if body.is_null() => other.to_owned(),
        other => format!("{other} {body}"),
    }
}

/// Whether it is a mark, or made of one.
fn is_mark(value: &Value) -> bool {
    match tagged(value) {
        Some(("meta" | "ct", body)) => text(body, "key") == "mark",
        Some(("&" | "|" | "^" | "<<" | ">>", sides)) => sides.get(0).is_some_and(is_mark),
        _ => false,
    }
}

/// Numbers as nft writes marks.
fn mark(value: &Value) -> String {
    match (value.as_u64(), tagged(value)) {
        (Some(number), _) => format!("{number:#010x}"),
        (_, Some((tag @ ("&" | "|" | "^"), sides))) => {
            let sides: Vec<String> = sides.as_array().into_iter().flatten().map(mark).collect();
            sides.join(&format!(" {tag} "))
        }
        _ => expression(value),
    }
}

/// Whether nft leaves "==" out behind it: it writes the sign where the left side is reckoned with.
fn implies(left: &Value) -> bool {
    !matches!(tagged(left), Some(("&" | "|" | "^" | "<<" | ">>", _)))
}

fn translation(tag: &str, body: &Value) -> String {
    let mut text_of = tag.to_owned();
    let (address, port) = (body.get("addr"), body.get("port"));
    match text(body, "family") {
        "" => {}
        family if address.is_some() => text_of.push_str(&format!(" {family}")),
        _ => {}
    }
    let port = port.map(expression);
    match (address.map(expression), port) {
        (Some(address), Some(port)) if address.contains(':') && !address.contains(' ') => {
            text_of.push_str(&format!(" to [{address}]:{port}"));
        }
        (Some(address), Some(port)) => text_of.push_str(&format!(" to {address}:{port}")),
        (Some(address), None) => text_of.push_str(&format!(" to {address}")),
        (None, Some(port)) => text_of.push_str(&format!(" to :{port}")),
        (None, None) => {}
    }
    let flags: Vec<&str> = match body.get("flags") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    if !flags.is_empty() {
        text_of.push_str(&format!(" {}", flags.join(",")));
    }
    text_of
}

fn limit(body: &Value) -> String {
    let over = if part(body, "inv").as_bool() == Some(true) { "over " } else { "" };
    format!("limit rate {over}{}/{}", part(body, "rate"), text(body, "per"))
}

fn expression(value: &Value) -> String {
    match value {
        Value::String(word) => word.clone(),
        Value::Array(all) => list(all, ","),
        Value::Object(_) => object(value),
        other => other.to_string(),
    }
}

fn list(all: &[Value], between: &str) -> String {
    all.iter().map(expression).collect::<Vec<_>>().join(between)
}

fn object(value: &Value) -> String {
    let Some((tag, body)) = tagged(value) else { return value.to_string() };
    let items = || body.as_array().map(Vec::as_slice).unwrap_or_default();
    match tag {
        "payload" => match text(body, "protocol") {
            "" => format!("@{},{},{}", text(body, "base"), part(body, "offset"), part(body, "len")),
            protocol => format!("{protocol} {}", text(body, "field")),
        },
        // Those that nft writes without the word.
        "meta" => match text(body, "key") {
            key @ ("iif" | "oif" | "iifname" | "oifname" | "skuid" | "skgid") => key.to_owned(),
            key => format!("meta {key}"),
        },
        "ct" => match text(body, "dir") {
            "" => format!("ct {}", text(body, "key")),
            direction => format!("ct {direction} {}", text(body, "key")),
        },
        "fib" => {
            let flags = match part(body, "flags") {
                Value::Array(all) => list(all, " . "),
                one => expression(one),
            };
            format!("fib {flags} {}", text(body, "result"))
        }
        "numgen" => match part(body, "offset").as_u64() {
            None | Some(0) => format!("numgen {} mod {}", text(body, "mode"), part(body, "mod")),
            Some(offset) => format!("numgen {} mod {} offset {offset}", text(body, "mode"), part(body, "mod")),
        },
        "concat" => list(items(), " . "),
        "set" => match body {
            Value::Array(all) => format!("{{ {} }}", all.iter().map(element).collect::<Vec<_>>().join(", ")),
            one => format!("{{ {} }}", element(one)),
        },
        "map" => format!("{} map {}", expression(part(body, "key")), expression(part(body, "data"))),
        "prefix" => format!("{}/{}", text(body, "addr"), part(body, "len")),
        "range" => list(items(), "-"),
        "elem" => expression(part(body, "val")),
        "&" | "|" | "^" | "<<" | ">>" => list(items(), &format!(" {tag} ")),
        "accept" | "drop" | "continue" | "return" => tag.to_owned(),
        "jump" | "goto" => format!("{tag} {}", text(body, "target")),
        _ => value.to_string(),
    }
}

/// Of a set, or `key : value` of a map.
fn element(value: &Value) -> String {
    match value.as_array().map(Vec::as_slice) {
        Some([key, data]) => format!("{} : {}", expression(key), expression(data)),
        _ => expression(value),
    }
}
