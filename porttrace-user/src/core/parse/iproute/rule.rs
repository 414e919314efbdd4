//! Policy routing rules.

use super::route::prefix;
use super::{elements, to_json};
use crate::core::model::flow::{Family, Proto};
use crate::core::model::state::{PolicyAction, PolicyRule};
use crate::core::parse::notes::Notes;
use ipnet::IpNet;
use serde_json::{Map, Value};
use std::net::IpAddr;

type Object = Map<String, Value>;

/// Keys that say nothing about what a rule matches or does.
const IRRELEVANT: [&str; 4] = ["protocol", "flags", "iif_detached", "oif_detached"];

/// Reads `ip -j rule` of one family. A selector that the model does not have ends up in [`PolicyRule::unknown`].
pub fn policy(text: &str, family: Family, notes: &mut Notes) -> Option<Vec<PolicyRule>> {
    elements(text, notes, |mut raw: Object| rule(&mut raw, family))
}

/// Writes what [`policy`] reads.
pub fn write_policy(rules: &[PolicyRule]) -> String {
    to_json(&rules.iter().map(raw_rule).collect::<Vec<_>>())
}

fn rule(raw: &mut Object, family: Family) -> Result<PolicyRule, String> {
    let src = network(raw, "src", "srclen")?;
    let dst = network(raw, "dst", "dstlen")?;
    let fwmark = number(raw, "fwmark")?;
    let mask = number(raw, "fwmask")?;
    let action = action(raw)?;
    let rule = PolicyRule {
        family,
        priority: number(raw, "priority")?.unwrap_or(0),
        not: raw.remove("not").is_some(),
        src,
        dst,
        input: string(raw, "iif"),
        output: string(raw, "oif"),
        fwmark: fwmark.map(|mark| (mark, mask.unwrap_or(u32::MAX))),
        tos: string(raw, "tos").map(|text| super::tos(&text)).transpose()?,
        proto: proto(raw)?,
        sport: ports(raw, "sport")?,
        dport: ports(raw, "dport")?,
        action,
        suppress_prefix: number(raw, "suppress_prefixlen")?
            .map(|length| u8::try_from(length).map_err(|_| format!("suppress_prefixlen {length}")))
            .transpose()?,
        unknown: Vec::new(),
    };
    let left = raw.iter().filter(|(key, _)| !IRRELEVANT.contains(&key.as_str()));
    let unknown = left.map(|(key, value)| selector(key, value)).collect::<Result<_, _>>()?;
    Ok(PolicyRule { unknown, ..rule })
}

fn action(raw: &mut Object) -> Result<PolicyAction, String> {
    let named = string(raw, "action");
    Ok(match named.as_deref() {
        Some("unreachable") => PolicyAction::Unreachable,
        Some("prohibit") => PolicyAction::Prohibit,
        Some("blackhole") => PolicyAction::Blackhole,
        Some("nop") => PolicyAction::Nop,
        Some("to_tbl") | None => {
            if let Some(target) = number(raw, "goto")? {
                PolicyAction::Goto(target)
            } else if raw.remove("nop").is_some() {
                PolicyAction::Nop
            } else {
                PolicyAction::Table(string(raw, "table").ok_or("neither table nor action")?)
            }
        }
        Some(other) => return Err(format!("unknown action {other}")),
    })
}

fn selector(key: &str, value: &Value) -> Result<String, String> {
    if key.contains(' ') {
        return Err(format!("{key:?} is not a selector"));
    }
    Ok(match value {
        Value::Null => key.to_owned(),
        Value::String(value) => format!("{key} {value}"),
        value => format!("{key} {value}"),
    })
}

fn string(raw: &mut Object, key: &str) -> Option<String> {
    match raw.remove(key)? {
        Value::String(text) => Some(text),
        Value::Null => None,
        other => Some(other.to_string()),
    }
}

/// A number, or a string that holds one (`"0x4000"`).
fn number(raw: &mut Object, key: &str) -> Result<Option<u32>, String> {
    let Some(text) = string(raw, key) else { return Ok(None) };
    let value = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    value.map(Some).map_err(|_| format!("{key} {text:?} is not a number"))
}

fn network(raw: &mut Object, key: &str, length: &str) -> Result<Option<IpNet>, String> {
    let text = string(raw, key);
    let length = number(raw, length)?;
    let Some(text) = text.filter(|text| !matches!(text.as_str(), "all" | "any" | "default")) else {
        return Ok(None);
    };
    let Some(length) = length else { return prefix(&text).map(Some) };
    let bad = || format!("{key} {text}/{length} is not a prefix");
    let address: IpAddr = text.parse().map_err(|_| bad())?;
    let length = u8::try_from(length).map_err(|_| bad())?;
    Ok(Some(IpNet::new(address, length).map_err(|_| bad())?.trunc()))
}

fn proto(raw: &mut Object) -> Result<Option<Proto>, String> {
    let Some(name) = string(raw, "ipproto") else { return Ok(None) };
    Proto::from_name(&name).map(Some).ok_or_else(|| format!("unknown protocol {name:?}"))
}

/// `sport`, or `sport_start` and `sport_end`.
fn ports(raw: &mut Object, key: &str) -> Result<Option<(u16, u16)>, String> {
    let single = number(raw, key)?;
    let start = number(raw, &format!("{key}_start"))?.or(single);
    let end = number(raw, &format!("{key}_end"))?.or(start);
    let (Some(start), Some(end)) = (start, end) else { return Ok(None) };
    let port = |port: u32| u16::try_from(port).map_err(|_| format!("{key} {port} is not a port"));
    Ok(Some((port(start)?, port(end)?)))
}

fn raw_rule(rule: &PolicyRule) -> Object {
    let mut raw = Object::new();
    let mut put = |key: &str, value: Value| raw.insert(key.to_owned(), value);
    put("priority", rule.priority.into());
    if rule.not {
        put("not", Value::Null);
    }
    put("src", rule.src.map_or_else(|| "all".to_owned(), |net| net.to_string()).into());
    if let Some(dst) = rule.dst {
        put("dst", dst.to_string().into());
    }
    for (key, value) in [("iif", &rule.input), ("oif", &rule.output)] {
        if let Some(name) = value {
            put(key, name.as_str().into());
        }
    }
    if let Some((mark, mask)) = rule.fwmark {
        put("fwmark", format!("{mark:#x}").into());
        put("fwmask", format!("{mask:#x}").into());
    }
    if let Some(tos) = rule.tos {
        put("tos", format!("{tos:#04x}").into());
    }
    if let Some(proto) = rule.proto {
        put("ipproto", if let Proto::Other(number) = proto { number.to_string() } else { proto.to_string() }.into());
    }
    for (key, value) in [("sport", rule.sport), ("dport", rule.dport)] {
        if let Some((start, end)) = value {
            put(&format!("{key}_start"), start.into());
            put(&format!("{key}_end"), end.into());
        }
    }
    match &rule.action {
        PolicyAction::Table(table) => put("table", table.as_str().into()),
        PolicyAction::Goto(target) => put("goto", (*target).into()),
        PolicyAction::Unreachable => put("action", "unreachable".into()),
        PolicyAction::Prohibit => put("action", "prohibit".into()),
        PolicyAction::Blackhole => put("action", "blackhole".into()),
        PolicyAction::Nop => put("action", "nop".into()),
    };
    if let Some(length) = rule.suppress_prefix {
        put("suppress_prefixlen", length.into());
    }
    for selector in &rule.unknown {
        let (key, value) =
            selector.split_once(' ').map_or((selector.as_str(), None), |(key, value)| (key, Some(value)));
        put(key, value.into());
    }
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = r#"[{"priority":0,"src":"all","table":"local"},{"priority":10,"src":"all","fwmark":"0x1","fwmask":"0xff","table":"100"},
{"priority":11,"not":null,"src":"10.1.0.0","srclen":16,"dst":"10.2.0.0","dstlen":16,"iif":"v0","oif":"d0","oif_detached":null,"ipproto":"tcp","sport_start":1,"sport_end":5,"dport":80,"table":"100"},
{"priority":12,"src":"10.3.0.3","action":"prohibit"},{"priority":13,"src":"all","dst":"10.4.0.0","dstlen":16,"action":"blackhole"},
{"priority":14,"src":"all","dst":"10.4.1.0","dstlen":16,"action":"unreachable"},{"priority":15,"src":"all","tos":"0x10","goto":32766},
{"priority":16,"src":"all","uid_start":5,"uid_end":6,"table":"main","suppress_prefixlen":0},{"priority":17,"src":"all","nop":null},
{"priority":18,"src":"all","fwmark":"0x7","table":"local"},{"priority":19,"src":"all","table":"main","suppress_ifgroup":"3"},
{"priority":20,"src":"all","l3mdev":null,"table":"main"},{"priority":21,"src":"10.0.0.0","srclen":64,"table":"main"},
{"priority":32767,"src":"all","table":"default"}]"#;

    /// What is written says no more and no less, whatever else the rule has.
    #[test]
    fn odd_rules_are_written_as_they_were_read() {
        let mut notes = Notes::new("ip-rule.json");
        let text =
            r#"[{"priority -- ":1,"table":"main"},{"action":"nop","goto":5},{"goto":5,"nop":null,"table":"main"}]"#;
        let found = policy(text, Family::V4, &mut notes).unwrap();
        assert_eq!(
            notes.finish()[0].message.split(':').next(),
            Some("element 1 left out (\"priority -- \" is not a selector)")
        );
        let actions: Vec<_> = found.iter().map(|rule| (&rule.action, rule.unknown.len())).collect();
        assert_eq!(actions, [(&PolicyAction::Nop, 1), (&PolicyAction::Goto(5), 2)]);
        let again = policy(&write_policy(&found), Family::V4, &mut Notes::new("again")).unwrap();
        assert_eq!(again.iter().map(|rule| (&rule.action, rule.unknown.len())).collect::<Vec<_>>(), actions);
    }

    #[test]
    fn reads_every_selector() {
        let mut notes = Notes::new("ip-rule.json");
        let found = policy(RULES, Family::V4, &mut notes).unwrap();
        assert_eq!(notes.finish().len(), 1, "a /64 of IPv4");
        assert_eq!(found.len(), 13);
        assert_eq!(found[1].fwmark, Some((1, 0xff)));
        let whole = &found[2];
        assert!(whole.not && whole.unknown.is_empty());
        assert_eq!(whole.src.unwrap().to_string(), "10.1.0.0/16");
        assert_eq!((whole.sport, whole.dport, whole.proto), (Some((1, 5)), Some((80, 80)), Some(Proto::Tcp)));
        assert_eq!(found[3].src.unwrap().to_string(), "10.3.0.3/32");
        assert_eq!(found[3].action, PolicyAction::Prohibit);
        assert_eq!(found[5].dst.unwrap().to_string(), "10.4.0.0/16");
        assert_eq!((&found[6].action, found[6].tos), (&PolicyAction::Goto(32766), Some(0x10)));
        assert_eq!((found[7].suppress_prefix, found[7].unknown.len()), (Some(0), 2));
        assert_eq!(found[8].action, PolicyAction::Nop);
        assert_eq!(found[9].fwmark, Some((7, u32::MAX)));
        assert_eq!((found[10].unknown[0].as_str(), found[11].unknown[0].as_str()), ("suppress_ifgroup 3", "l3mdev"));
        let mut again = Notes::new("again");
        assert_eq!(policy(&write_policy(&found), Family::V4, &mut again), Some(found));
        assert_eq!(again.finish(), []);
    }
}
