//! `-j …` and `-g …`.

use super::iptables_options::{masked, net, number, range};
use super::words::{Words, unquote};
use crate::core::model::flow::Family;
use crate::core::model::name::{Name, name};
use crate::core::model::rules::{ConnMarkOp, MarkOp, NatRange, Net, Target, Tproxy, TtlOp};
use foldhash::HashMap;
use std::borrow::Cow;
use std::net::IpAddr;

/// Reads the target whose `-j` or `-g` was just taken from `words`; `line` is the whole rule. The error is a sentence.
pub(super) fn read(
    (jump, mut words): (&str, Words<'_>),
    line: &str,
    chains: &HashMap<Name, u32>,
) -> Result<Target, String> {
    let Some(name) = words.next() else { return Err(format!("{jump} without a target")) };
    if let Some(&chain) = chains.get(name) {
        return Ok(if matches!(jump, "-g" | "--goto") { Target::Goto(chain) } else { Target::Jump(chain) });
    }
    let rest = line.get(words.last.1..).unwrap_or("").trim_ascii();
    named(name, rest, &words.collect::<Vec<_>>())
}

/// Whether iptables has a target of this name. No chain can have it then (`assert_valid_chain_name` in iptables' xshared.c).
pub(super) fn is_target(name: &str) -> bool {
    !matches!(named(name, "", &[]), Ok(Target::Missing(_)))
}

/// `rest` is what follows the name, `options` its words.
fn named(name: &str, rest: &str, options: &[&str]) -> Result<Target, String> {
    let all = || if rest.is_empty() { name.into() } else { Name::from(format!("{name} {rest}")) };
    match name {
        "ACCEPT" => Ok(Target::Accept),
        "DROP" => Ok(Target::Drop),
        "RETURN" => Ok(Target::Return),
        "REJECT" => Ok(Target::Reject(reject(value(options, "--reject-with")))),
        "NOTRACK" => Ok(Target::Notrack),
        "CT" if options.contains(&"--notrack") => Ok(Target::Notrack),
        "DNAT" => nat(value(options, "--to-destination"), options).map(|range| Target::Dnat(Box::new(range))),
        "SNAT" => nat(value(options, "--to-source"), options).map(|range| Target::Snat(Box::new(range))),
        "MASQUERADE" => ports_only(options).map(|range| Target::Masquerade(Box::new(range))),
        "REDIRECT" => ports_only(options).map(|range| Target::Redirect(Box::new(range))),
        "NETMAP" => netmap(options).map(|net| Target::Netmap(Box::new(net))),
        "MARK" => mark(options).map(Target::Mark),
        "CONNMARK" => connmark(options).map(Target::ConnMark),
        "TTL" | "HL" => ttl(options).map(Target::Ttl),
        "TOS" | "DSCP" => tos(options),
        "TPROXY" => tproxy(options).map(|tproxy| Target::Tproxy(Box::new(tproxy))),
        "NFQUEUE" | "QUEUE" | "SYNPROXY" | "TARPIT" | "HMARK" | "CLUSTERIP" | "SNPT" | "DNPT" | "STEAL" | "DELUDE"
        | "CHAOS" | "ECHO" | "RAWDNAT" | "RAWSNAT" | "NFLOGD" | "IMQ" => Ok(Target::Stop(all())),
        "LOG" | "NFLOG" | "ULOG" | "TRACE" | "CT" | "TCPMSS" | "CLASSIFY" | "CHECKSUM" | "SECMARK" | "CONNSECMARK"
        | "TCPOPTSTRIP" | "SET" | "AUDIT" | "LED" | "RATEEST" | "IDLETIMER" | "ECN" | "TEE" => Ok(Target::Other(all())),
        _ => Ok(Target::Missing(name.into())),
    }
}

/// The answers that kube-proxy has sent are not counted.
fn reject(with: Option<&str>) -> Name {
    match with {
        None | Some("icmp-port-unreachable") => name!("icmp-port-unreachable"),
        Some("icmp6-port-unreachable") => name!("icmp6-port-unreachable"),
        Some(other) => other.into(),
    }
}

fn value<'a>(options: &[&'a str], name: &str) -> Option<&'a str> {
    let at = options.iter().position(|word| *word == name)?;
    options.get(at + 1).copied()
}

/// `--to-destination 10.0.0.1-10.0.0.9:80-90/80`, `[fd00::1]:80`, `:80`; `--random`, `--random-fully`, `--persistent`.
fn nat(to: Option<&str>, options: &[&str]) -> Result<NatRange, String> {
    let text = to.ok_or("NAT target without an address")?;
    let bad = || format!("{text:?} is not an address range with ports");
    let (addresses, ports) = if let Some(inner) = text.strip_prefix('[') {
        let (addresses, after) = inner.split_once(']').ok_or_else(bad)?;
        // `[fd00::1]-[fd00::9]:80` and `[fd00::1-fd00::9]:80` both occur.
        match after.strip_prefix("-[").and_then(|more| more.split_once(']')) {
            Some((last, after)) => (Cow::from(format!("{addresses}-{last}")), after.strip_prefix(':')),
            None => (Cow::from(addresses), after.strip_prefix(':')),
        }
    } else if text.bytes().filter(|byte| *byte == b':').count() > 1 {
        (Cow::from(text), None)
    } else {
        let (addresses, ports) = text.split_once(':').map_or((text, None), |(a, p)| (a, Some(p)));
        (Cow::from(addresses), ports)
    };
    let (low, high) = addresses.split_once('-').unwrap_or((&addresses, &addresses));
    let addresses = match addresses.is_empty() {
        true => None,
        false => Some((address(low).ok_or_else(bad)?, address(high).ok_or_else(bad)?)),
    };
    let (ports, base) = ports.map_or((None, None), |ports| match ports.split_once('/') {
        Some((ports, base)) => (Some(ports), Some(base)),
        None => (Some(ports), None),
    });
    let ports = ports.map(|ports| range(ports, '-').ok_or_else(bad)).transpose()?;
    let base_port = base.map(|base| base.parse().map_err(|_| bad())).transpose()?;
    Ok(NatRange { addresses, ports, base_port, ..flags(options) })
}

fn flags(options: &[&str]) -> NatRange {
    NatRange {
        random: options.iter().any(|word| matches!(*word, "--random" | "--random-fully")),
        persistent: options.contains(&"--persistent"),
        ..NatRange::default()
    }
}

fn address(text: &str) -> Option<Net> {
    let family = Family::of(text.parse::<IpAddr>().ok()?);
    net(text, family)
}

fn ports_only(options: &[&str]) -> Result<NatRange, String> {
    let text = value(options, "--to-ports").unwrap_or("");
    let ports = match text {
        "" => None,
        text => Some(range(text, '-').ok_or_else(|| format!("--to-ports {text:?} is not a range of ports"))?),
    };
    Ok(NatRange { ports, of_ports: true, ..flags(options) })
}

fn netmap(options: &[&str]) -> Result<Net, String> {
    let to = value(options, "--to").ok_or("NETMAP without --to")?;
    net(to, Family::V4).or_else(|| net(to, Family::V6)).ok_or_else(|| format!("--to {to:?} is not a network"))
}

/// All spellings as `mark = (mark & !mask) ^ value` (libxt_MARK.c, `mark_tg`).
fn mark_op(option: &str, text: &str) -> Option<MarkOp> {
    let (value, mask) = masked(text)?;
    Some(match option {
        "--set-xmark" => MarkOp { value, mask },
        "--set-mark" => MarkOp { value, mask: value | mask },
        "--or-mark" => MarkOp { value, mask: value },
        "--and-mark" => MarkOp { value: 0, mask: !value },
        "--xor-mark" => MarkOp { value, mask: 0 },
        _ => return None,
    })
}

fn mark(options: &[&str]) -> Result<MarkOp, String> {
    let (option, text) = pair(options).ok_or("MARK without a value")?;
    mark_op(option, text).ok_or_else(|| format!("MARK {option} {text:?} is not a mark"))
}

fn pair<'a>(options: &[&'a str]) -> Option<(&'a str, &'a str)> {
    Some((options.first()?, options.get(1)?))
}

fn connmark(options: &[&str]) -> Result<ConnMarkOp, String> {
    if let Some((option, text)) = pair(options)
        && let Some(op) = mark_op(option, text)
    {
        return Ok(ConnMarkOp::Set(op));
    }
    let mask = |name| value(options, name).map(|text| number(text).ok_or_else(|| format!("{name} {text:?}")));
    let both = mask("--mask").transpose()?.unwrap_or(u32::MAX);
    let nf_mask = mask("--nfmask").transpose()?.unwrap_or(both);
    let ct_mask = mask("--ctmask").transpose()?.unwrap_or(both);
    if options.contains(&"--save-mark") {
        Ok(ConnMarkOp::Save { ct_mask, nf_mask })
    } else if options.contains(&"--restore-mark") {
        Ok(ConnMarkOp::Restore { ct_mask, nf_mask })
    } else {
        Err("CONNMARK does nothing that porttrace knows".into())
    }
}

fn ttl(options: &[&str]) -> Result<TtlOp, String> {
    let (option, text) = pair(options).ok_or("TTL without a value")?;
    let value = text.parse().map_err(|_| format!("{option} {text:?} is not a number up to 255"))?;
    match option.rsplit('-').next() {
        Some("set") => Ok(TtlOp::Set(value)),
        Some("inc") => Ok(TtlOp::Add(value)),
        Some("dec") => Ok(TtlOp::Subtract(value)),
        _ => Err(format!("TTL {option:?} is not understood")),
    }
}

/// `tos_tg` and `dscp_tg` (net/netfilter/xt_DSCP.c); `iptables-save` prints every TOS operation as `--set-tos VALUE/MASK`.
fn tos(options: &[&str]) -> Result<Target, String> {
    let (option, text) = pair(options).ok_or("TOS without a value")?;
    let bad = || format!("{option} {text:?} is not understood");
    let (value, mask) = masked(text).ok_or_else(bad)?;
    let byte = |number: u32| u8::try_from(number & 0xff).unwrap_or_default();
    match option {
        "--set-tos" => Ok(Target::Tos { value: byte(value), mask: byte(mask) }),
        "--set-dscp" if value < 64 => Ok(Target::Tos { value: byte(value << 2), mask: 0xfc }),
        _ => Err(bad()),
    }
}

fn tproxy(options: &[&str]) -> Result<Tproxy, String> {
    let on_ip = match value(options, "--on-ip") {
        None | Some("0.0.0.0" | "::") => None,
        Some(text) => Some(unquote(text).parse().map_err(|_| format!("--on-ip {text:?} is not an address"))?),
    };
    let port = value(options, "--on-port").unwrap_or("0");
    let on_port = port.parse().map_err(|_| format!("--on-port {port:?} is not a port"))?;
    let text = value(options, "--tproxy-mark").unwrap_or("0/0");
    let (value, mask) = masked(text).ok_or_else(|| format!("--tproxy-mark {text:?} is not a mark"))?;
    Ok(Tproxy { on_ip, on_port, mark: MarkOp { value, mask } })
}
