//! What targets print at the end of a row, turned back into their options.

use super::phrase::{quote, split_word};

/// The options of `target` at the start of `text`, and what follows.
pub(super) fn options<'a>(text: &'a str, target: &str) -> Option<(String, &'a str)> {
    match target {
        "DNAT" => nat(text, "--to-destination"),
        "SNAT" => nat(text, "--to-source"),
        "NETMAP" => nat(text, "--to"),
        "REDIRECT" => ports(text, "redir ports "),
        "MASQUERADE" => ports(text, "masq ports: ").or_else(|| nat_flag(text)),
        "REJECT" => worded(text, "reject-with ", "--reject-with"),
        "MARK" => mark(text, "MARK "),
        "CONNMARK" => mark(text, "CONNMARK ").or_else(|| connmark(text)),
        "LOG" => log(text),
        "NFLOG" => nflog(text),
        "NFQUEUE" => nfqueue(text),
        "CT" | "NOTRACK" => ct(text),
        "TPROXY" => tproxy(text),
        "TTL" => hops(text, "TTL ", "ttl"),
        "HL" => hops(text, "HL ", "hl"),
        "TCPMSS" => tcpmss(text),
        "DSCP" => worded(text, "DSCP set ", "--set-dscp"),
        "TOS" => worded(text, "TOS set ", "--set-tos"),
        "CLASSIFY" => worded(text, "CLASSIFY set ", "--set-class"),
        _ => None,
    }
}

fn worded<'a>(text: &'a str, start: &str, option: &str) -> Option<(String, &'a str)> {
    let (value, after) = split_word(text.strip_prefix(start)?);
    Some((format!("{option} {value}"), after))
}

/// `to:10.244.1.9:8081 random persistent`.
fn nat<'a>(text: &'a str, option: &str) -> Option<(String, &'a str)> {
    let Some(rest) = text.strip_prefix("to:") else { return nat_flag(text) };
    let (value, after) = split_word(rest);
    Some((format!("{option} {value}"), after))
}

fn nat_flag(text: &str) -> Option<(String, &str)> {
    let (word, after) = split_word(text);
    matches!(word, "random" | "random-fully" | "persistent").then(|| (format!("--{word}"), after))
}

fn ports<'a>(text: &'a str, start: &str) -> Option<(String, &'a str)> {
    worded(text, start, "--to-ports").or_else(|| nat_flag(text))
}

/// `set`, `or`, `and`, `xor`, `xset`: as `--set-xmark value/mask` (`mark_tg_save` in libxt_MARK).
fn mark<'a>(text: &'a str, start: &str) -> Option<(String, &'a str)> {
    let (verb, rest) = split_word(text.strip_prefix(start)?);
    let (value, after) = split_word(rest);
    let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let (value, mask) = match verb {
        "set" => (number(value)?, u32::MAX),
        "or" => (number(value)?, number(value)?),
        "and" => (0, !number(value)?),
        "xor" => (number(value)?, 0),
        "xset" => value.split_once('/').and_then(|(value, mask)| Some((number(value)?, number(mask)?)))?,
        _ => return None,
    };
    Some((format!("--set-xmark 0x{value:x}/0x{mask:x}"), after))
}

/// `CONNMARK save`, `restore`, with `mask M` or `nfmask M ctmask M` in either order.
fn connmark(text: &str) -> Option<(String, &str)> {
    let (verb, mut rest) = split_word(text.strip_prefix("CONNMARK ")?);
    if !matches!(verb, "save" | "restore") {
        return None;
    }
    let (mut nf, mut ct) = ("0xffffffff", "0xffffffff");
    loop {
        let (word, after) = split_word(rest);
        let (value, next) = split_word(after);
        match word {
            "mask" => (nf, ct) = (value, value),
            "nfmask" => nf = value,
            "ctmask" => ct = value,
            _ => break,
        }
        rest = next;
    }
    Some((format!("--{verb}-mark --nfmask {nf} --ctmask {ct}"), rest))
}

/// `LOG flags 0 level 4 prefix "drop it: "`.
fn log(text: &str) -> Option<(String, &str)> {
    let mut rest = text.strip_prefix("LOG ")?;
    let mut options = String::new();
    loop {
        let (word, after) = split_word(rest);
        match word {
            "flags" => rest = split_word(after).1,
            "level" => {
                let (level, next) = split_word(after);
                if !matches!(level, "4" | "warn" | "warning") {
                    options.push_str(&format!("--log-level {level} "));
                }
                rest = next;
            }
            "prefix" => {
                let quoted = after.strip_prefix('"')?;
                let end = quoted.find('"')?;
                options = format!("--log-prefix {} {options}", quote(&quoted[..end]));
                rest = &quoted[end + 1..];
            }
            _ => break,
        }
    }
    Some((options.trim_end().to_owned(), rest))
}

fn nflog(text: &str) -> Option<(String, &str)> {
    let (word, rest) = split_word(text);
    if !matches!(word, "nflog-prefix" | "nflog-group" | "nflog-range" | "nflog-size" | "nflog-threshold") {
        return None;
    }
    let (value, after) = split_word(rest);
    Some((format!("--{word} {}", quote(value.trim_matches('"'))), after))
}

fn nfqueue(text: &str) -> Option<(String, &str)> {
    let (verb, rest) = split_word(text.strip_prefix("NFQUEUE ")?);
    let (value, mut rest) = split_word(rest);
    let mut options = match verb {
        "num" => format!("--queue-num {value}"),
        "balance" => format!("--queue-balance {value}"),
        _ => return None,
    };
    for (word, option) in [("bypass", " --queue-bypass"), ("cpu-fanout", " --queue-cpu-fanout")] {
        if let Some(after) = rest.strip_prefix(word) {
            options.push_str(option);
            rest = after.trim_start();
        }
    }
    Some((options, rest))
}

fn ct(text: &str) -> Option<(String, &str)> {
    if let Some(after) = text.strip_prefix("NOTRACK") {
        return Some(("--notrack".to_owned(), after));
    }
    let (word, rest) = split_word(text.strip_prefix("CT ")?);
    if word == "notrack" {
        return Some(("--notrack".to_owned(), rest));
    }
    let (value, after) = split_word(rest);
    matches!(word, "helper" | "zone" | "ctevents" | "expevents" | "timeout")
        .then(|| (format!("--{word} {value}"), after))
}

fn tproxy(text: &str) -> Option<(String, &str)> {
    let (to, rest) = split_word(text.strip_prefix("TPROXY redirect ")?);
    let (mark, after) = split_word(rest.strip_prefix("mark ")?);
    let (address, port) = to.rsplit_once(':')?;
    Some((format!("--on-port {port} --on-ip {address} --tproxy-mark {mark}"), after))
}

fn hops<'a>(text: &'a str, start: &str, name: &str) -> Option<(String, &'a str)> {
    let text = text.strip_prefix(start)?;
    let (verb, rest) = [("decrement by ", "dec"), ("increment by ", "inc"), ("set to ", "set")]
        .iter()
        .find_map(|(phrase, verb)| Some((verb, text.strip_prefix(phrase)?)))?;
    let (value, after) = split_word(rest);
    Some((format!("--{name}-{verb} {value}"), after))
}

fn tcpmss(text: &str) -> Option<(String, &str)> {
    let text = text.strip_prefix("TCPMSS ")?;
    match text.strip_prefix("clamp to PMTU") {
        Some(after) => Some(("--clamp-mss-to-pmtu".to_owned(), after)),
        None => worded(text, "set ", "--set-mss"),
    }
}
