//! What matches print, turned back into the options that `iptables-save` prints (each extension's `print` and `save`).

use super::phrase::{negate, split_word};

/// tcp, udp, sctp, icmp: their ports, flags and types.
pub(super) fn protocol(text: &str, v6: bool) -> Option<(String, &str)> {
    let (name, after) = split_word(text);
    match name {
        "tcp" | "udp" | "sctp" | "dccp" | "udplite" => ports(name, after),
        "icmptype" | "icmp" | "ipv6-icmptype" | "ipv6-icmp" => icmp(after, v6),
        _ => None,
    }
}

fn ports<'a>(name: &str, mut text: &'a str) -> Option<(String, &'a str)> {
    let mut options = format!("-m {name}");
    loop {
        let (word, after) = split_word(text);
        let Some((key, value)) = word.split_once([':', '=']) else { break };
        let (not, value) = value.strip_prefix('!').map_or(("", value), |value| (" !", value));
        let option = match key {
            "spt" | "spts" => format!("{not} --sport {}", port(value)),
            "dpt" | "dpts" => format!("{not} --dport {}", port(value)),
            "flags" if name == "tcp" => format!("{not} --tcp-flags {}", tcp_flags(value)?),
            "option" if name == "tcp" => format!("{not} --tcp-option {value}"),
            _ => break,
        };
        options.push_str(&option);
        text = after;
    }
    Some((options, text))
}

/// The names that `-L` without `-n` most often puts in place of numbers; others stay names.
fn port(text: &str) -> String {
    const NAMES: [(&str, &str); 12] = [
        ("ssh", "22"),
        ("smtp", "25"),
        ("domain", "53"),
        ("bootps", "67"),
        ("bootpc", "68"),
        ("http", "80"),
        ("kerberos", "88"),
        ("ntp", "123"),
        ("snmp", "161"),
        ("https", "443"),
        ("http-alt", "8080"),
        ("mysql", "3306"),
    ];
    let number = |part: &str| {
        NAMES.iter().find(|(name, _)| *name == part).map_or_else(|| part.to_owned(), |(_, number)| (*number).to_owned())
    };
    match text.split_once(':') {
        Some((low, high)) => format!("{}:{}", number(low), number(high)),
        None => text.split(',').map(number).collect::<Vec<_>>().join(","),
    }
}

/// `0x17/0x02` → `FIN,SYN,RST,ACK SYN`; names are printed without `-n`.
fn tcp_flags(text: &str) -> Option<String> {
    let (mask, set) = text.split_once('/')?;
    Some(format!("{} {}", flag_names(mask)?, flag_names(set)?))
}

fn flag_names(text: &str) -> Option<String> {
    let Some(hex) = text.strip_prefix("0x") else { return Some(text.to_owned()) };
    let bits = u8::from_str_radix(hex, 16).ok()?;
    let names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG"];
    let set: Vec<&str> = names.iter().enumerate().filter(|(i, _)| bits & (1 << i) != 0).map(|(_, n)| *n).collect();
    Some(if set.is_empty() { "NONE".to_owned() } else { set.join(",") })
}

/// `8`, `3 code 4`, `!echo-request`, `!type 128` (libipt_icmp, libip6t_icmp6).
fn icmp(text: &str, v6: bool) -> Option<(String, &str)> {
    let (word, mut after) = split_word(text);
    let (not, mut word) = word.strip_prefix('!').map_or(("", word), |word| ("! ", word));
    if word == "type" {
        (word, after) = split_word(after);
    }
    if word.is_empty() {
        return None;
    }
    let mut kind = word.to_owned();
    if let Some(code) = after.strip_prefix("code ") {
        let (code, rest) = split_word(code);
        kind = format!("{kind}/{code}");
        after = rest;
    }
    let kind = if kind == "255" { "any".to_owned() } else { kind };
    Some(if v6 {
        (format!("-m icmp6 {not}--icmpv6-type {kind}"), after)
    } else {
        (format!("-m icmp {not}--icmp-type {kind}"), after)
    })
}

/// Phrases of the form `key value`.
pub(super) fn simple(text: &str) -> Option<(String, &str)> {
    const KEYS: [(&str, &str); 21] = [
        ("ctstate", "-m conntrack --ctstate"),
        ("ctproto", "-m conntrack --ctproto"),
        ("ctorigsrc", "-m conntrack --ctorigsrc"),
        ("ctorigdst", "-m conntrack --ctorigdst"),
        ("ctreplsrc", "-m conntrack --ctreplsrc"),
        ("ctrepldst", "-m conntrack --ctrepldst"),
        ("ctorigsrcport", "-m conntrack --ctorigsrcport"),
        ("ctorigdstport", "-m conntrack --ctorigdstport"),
        ("ctreplsrcport", "-m conntrack --ctreplsrcport"),
        ("ctrepldstport", "-m conntrack --ctrepldstport"),
        ("ctstatus", "-m conntrack --ctstatus"),
        ("ctexpire", "-m conntrack --ctexpire"),
        ("ctdir", "-m conntrack --ctdir"),
        ("state", "-m state --state"),
        ("length", "-m length --length"),
        ("MAC", "-m mac --mac-source"),
        ("cpu", "-m cpu --cpu"),
        ("nfacct-name", "-m nfacct --nfacct-name"),
        ("realm", "-m realm --realm"),
        ("cgroup", "-m cgroup --cgroup"),
        ("devgroup", "-m devgroup --src-group"),
    ];
    let (key, after) = split_word(text);
    let (_, option) = KEYS.iter().find(|(name, _)| *name == key)?;
    let (value, after) = split_word(after);
    if value.is_empty() {
        return None;
    }
    let value = value
        .strip_prefix('!')
        .map_or_else(|| format!("{option} {value}"), |value| negate(&format!("{option} {value}")).unwrap_or_default());
    Some((value, after))
}

/// Phrases with several words.
pub(super) fn worded(text: &str) -> Option<(String, &str)> {
    type Reader = for<'a> fn(&'a str) -> Option<(String, &'a str)>;
    const PHRASES: [(&str, Reader); 20] = [
        ("ADDRTYPE match", addrtype),
        ("mark match", |rest| value_of("-m mark --mark", rest)),
        ("connmark match", |rest| value_of("-m connmark --mark", rest)),
        ("statistic mode random", |rest| random(rest)),
        ("statistic mode nth", nth),
        ("recent:", recent),
        ("multiport dports", |rest| multiport("--dports", rest)),
        ("multiport sports", |rest| multiport("--sports", rest)),
        ("multiport ports", |rest| multiport("--ports", rest)),
        ("match-set", match_set),
        ("source IP range", |rest| value_of("-m iprange --src-range", rest)),
        ("destination IP range", |rest| value_of("-m iprange --dst-range", rest)),
        ("limit: avg", limit),
        ("PKTTYPE", |rest| compared("-m pkttype --pkt-type", rest)),
        ("TTL match TTL", |rest| hops("-m ttl --ttl", rest)),
        ("HL match HL", |rest| hops("-m hl --hl", rest)),
        ("DSCP match", |rest| value_of("-m dscp --dscp", rest)),
        ("owner UID match", |rest| value_of("-m owner --uid-owner", rest)),
        ("owner GID match", |rest| value_of("-m owner --gid-owner", rest)),
        ("PHYSDEV match", |rest| flags("physdev", rest)),
    ];
    for (start, read) in PHRASES {
        if let Some(rest) = text.strip_prefix(start).filter(|rest| rest.is_empty() || rest.starts_with(' ')) {
            return read(rest.trim_start());
        }
    }
    if let Some(rest) = text.strip_prefix("tos match") {
        return value_of("-m tos --tos", rest.trim_start());
    }
    bare(text)
}

/// `[!] value` after an option.
fn value_of<'a>(option: &str, rest: &'a str) -> Option<(String, &'a str)> {
    let (not, rest) = match rest.strip_prefix('!') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let (value, after) = split_word(rest);
    if value.is_empty() {
        return None;
    }
    let options = format!("{option} {value}");
    Some((if not { negate(&options)? } else { options }, after))
}

fn addrtype(mut rest: &str) -> Option<(String, &str)> {
    let mut options = String::from("-m addrtype");
    loop {
        let (word, after) = split_word(rest);
        match word {
            "src-type" | "dst-type" => {
                let (value, next) = split_word(after);
                let (not, value) = value.strip_prefix('!').map_or(("", value), |value| (" !", value));
                options.push_str(&format!("{not} --{word} {value}"));
                rest = next;
            }
            "limit-in" | "limit-out" => {
                options.push_str(&format!(" --limit-iface-{}", &word[6..]));
                rest = after;
            }
            _ => break,
        }
    }
    (options.len() > "-m addrtype".len()).then_some((options, rest))
}

fn random(rest: &str) -> Option<(String, &str)> {
    let (not, rest) = rest.strip_prefix("! ").map_or(("", rest), |rest| ("! ", rest));
    let (value, after) = split_word(rest.strip_prefix("probability ")?);
    Some((format!("-m statistic --mode random {not}--probability {value}"), after))
}

fn nth(rest: &str) -> Option<(String, &str)> {
    let (not, rest) = rest.strip_prefix("! ").map_or(("", rest), |rest| ("! ", rest));
    let (every, after) = split_word(rest.strip_prefix("every ")?);
    let mut options = format!("-m statistic --mode nth {not}--every {every}");
    let Some(packet) = after.strip_prefix("packet ") else { return Some((options + " --packet 0", after)) };
    let (packet, after) = split_word(packet);
    options.push_str(&format!(" --packet {packet}"));
    Some((options, after))
}

fn recent(rest: &str) -> Option<(String, &str)> {
    let (word, mut rest) = split_word(rest);
    let action = match word {
        "CHECK" => "--rcheck",
        "UPDATE" => "--update",
        "SET" => "--set",
        "REMOVE" => "--remove",
        _ => return None,
    };
    let mut options = format!("-m recent {action}");
    loop {
        let (word, after) = split_word(rest);
        let (value, next) = split_word(after);
        let option = match word {
            "seconds:" => format!(" --seconds {value}"),
            "hit_count:" => format!(" --hitcount {value}"),
            "name:" => format!(" --name {value}"),
            "mask:" => format!(" --mask {value}"),
            "side:" if value == "source" => " --rsource".to_owned(),
            "side:" if value == "dest" => " --rdest".to_owned(),
            "reap" | "TTL-Match" => {
                options.push_str(if word == "reap" { " --reap" } else { " --rttl" });
                rest = after;
                continue;
            }
            _ => break,
        };
        options.push_str(&option);
        rest = next;
    }
    Some((recent_order(&options), rest))
}

/// `iptables-save` prints the mask before the side.
fn recent_order(options: &str) -> String {
    for side in [" --rsource", " --rdest"] {
        if options.contains(side) && options.contains(" --mask") {
            return format!("{}{side}", options.replace(side, ""));
        }
    }
    options.to_owned()
}

fn multiport<'a>(option: &str, rest: &'a str) -> Option<(String, &'a str)> {
    let (value, after) = split_word(rest);
    let (not, value) = value.strip_prefix('!').map_or(("", value), |value| ("! ", value));
    let value = value.split(',').map(port).collect::<Vec<_>>().join(",");
    (!value.is_empty()).then(|| (format!("-m multiport {not}{option} {value}"), after))
}

fn match_set(rest: &str) -> Option<(String, &str)> {
    let (name, rest) = split_word(rest);
    let (dimensions, after) = split_word(rest);
    (!dimensions.is_empty()).then(|| (format!("-m set --match-set {name} {dimensions}"), after))
}

fn limit(rest: &str) -> Option<(String, &str)> {
    let (rate, rest) = split_word(rest);
    let (burst, after) = split_word(rest.strip_prefix("burst ")?);
    let burst = if burst == "5" { String::new() } else { format!(" --limit-burst {burst}") };
    Some((format!("-m limit --limit {rate}{burst}"), after))
}

/// `= broadcast`, `!= broadcast`.
fn compared<'a>(option: &str, rest: &'a str) -> Option<(String, &'a str)> {
    let (operator, rest) = split_word(rest);
    let (value, after) = split_word(rest);
    let options = format!("{option} {value}");
    match operator {
        "=" => Some((options, after)),
        "!=" => Some((negate(&options)?, after)),
        _ => None,
    }
}

/// `< 5`, `== 255` (libipt_ttl, libip6t_hl).
fn hops<'a>(option: &str, rest: &'a str) -> Option<(String, &'a str)> {
    let (operator, rest) = split_word(rest);
    let (value, after) = split_word(rest);
    let options = match operator {
        "==" => format!("{option}-eq {value}"),
        "!=" => negate(&format!("{option}-eq {value}"))?,
        "<" => format!("{option}-lt {value}"),
        ">" => format!("{option}-gt {value}"),
        _ => return None,
    };
    Some((options, after))
}

/// physdev and socket print their own options.
fn flags<'a>(module: &str, mut rest: &'a str) -> Option<(String, &'a str)> {
    let mut options = format!("-m {module}");
    loop {
        let (word, after) = split_word(rest);
        let (not, word, after) = if word == "!" {
            let (word, after) = split_word(after);
            ("! ", word, after)
        } else {
            ("", word, after)
        };
        if !word.starts_with("--") {
            break;
        }
        options.push_str(&format!(" {not}{word}"));
        rest = after;
        if matches!(word, "--physdev-in" | "--physdev-out") {
            let (value, after) = split_word(after);
            options.push_str(&format!(" {value}"));
            rest = after;
        }
    }
    Some((options, rest))
}

/// Extensions that print words of their own: socket, rpfilter.
fn bare(text: &str) -> Option<(String, &str)> {
    let (word, mut after) = split_word(text);
    match word {
        "socket" => flags("socket", after),
        "rpfilter" => {
            let mut options = String::from("-m rpfilter");
            for name in ["loose", "validmark", "accept-local", "invert"] {
                let (word, rest) = split_word(after);
                if word == name {
                    options.push_str(&format!(" --{name}"));
                    after = rest;
                }
            }
            Some((options, after))
        }
        _ => None,
    }
}
