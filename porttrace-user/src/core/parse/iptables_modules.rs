//! What each `-m NAME` knows to ask. `None` means: not understood, the caller keeps the text.

use super::iptables_matches::protocol;
use super::iptables_options::{Opt, Options, masked, net, number, range};
use super::words::mac;
use crate::core::model::flow::Family;
use crate::core::model::rules::{CtField, CtStates, MatchKind, Owner, PortSide};
use std::cmp::Ordering;

/// What one option (or a whole block) asks: conditions, each with its negation.
#[derive(Default)]
pub(super) struct Parsed {
    pub(super) first: Option<(MatchKind, bool)>,
    pub(super) second: Option<(MatchKind, bool)>,
}

impl Parsed {
    /// An option that asks nothing of the packet.
    const NOTHING: Self = Self { first: None, second: None };

    pub(super) fn negated_if(mut self, negated: bool) -> Self {
        if let Some((_, not)) = &mut self.first {
            *not ^= negated;
        }
        self
    }

    pub(super) fn into_iter(self) -> impl Iterator<Item = (MatchKind, bool)> {
        self.first.into_iter().chain(self.second)
    }
}

pub(super) fn one(kind: MatchKind) -> Option<Parsed> {
    Some(Parsed { first: Some((kind, false)), second: None })
}

/// Modules that ask something without any option.
pub(super) fn bare_is_a_question(module: &str) -> bool {
    matches!(module, "hashlimit" | "time" | "unclean" | "osf" | "ipvs" | "eui64")
}

/// One option of a module whose options stand alone.
pub(super) fn option<'a>(
    module: &str,
    option: &mut Opt<'a>,
    options: &mut Options<'_, 'a>,
    family: Family,
) -> Option<Parsed> {
    match module {
        "comment" => {
            options.value(option);
            Some(Parsed::NOTHING)
        }
        "nfacct" => {
            options.value(option);
            one(MatchKind::Always)
        }
        "tcp" | "udp" | "udplite" | "sctp" | "dccp" => l4(option, options),
        "multiport" => multiport(option, options),
        "icmp" | "icmp6" | "icmpv6" | "ipv6-icmp" => icmp(option, options, family),
        "conntrack" | "state" => conntrack(option, options, family),
        "mark" if option.name == "--mark" => {
            let (value, mask) = masked(options.value(option))?;
            one(MatchKind::Mark { value, mask })
        }
        "connmark" if option.name == "--mark" => {
            let (value, mask) = masked(options.value(option))?;
            one(MatchKind::ConnMark { value, mask })
        }
        "iprange" => ip_range(option, options, family),
        "physdev" => physdev(option, options),
        "owner" => owner(option, options),
        "mac" if option.name == "--mac-source" => one(MatchKind::Mac(mac(options.value(option))?)),
        "length" if option.name == "--length" => {
            let (low, high) = range(options.value(option), ':')?;
            one(MatchKind::Length(low, high))
        }
        "tos" | "dscp" => tos(option, options),
        "pkttype" if option.name == "--pkt-type" => one(MatchKind::PktType(options.value(option).into())),
        "ttl" | "hl" => ttl(option, options),
        _ => None,
    }
}

fn l4<'a>(option: &mut Opt<'a>, options: &mut Options<'_, 'a>) -> Option<Parsed> {
    match option.name {
        "--dport" | "--destination-port" => {
            let (low, high) = range(options.value(option), ':')?;
            one(MatchKind::DestinationPort(low, high))
        }
        "--sport" | "--source-port" => {
            let (low, high) = range(options.value(option), ':')?;
            one(MatchKind::SourcePort(low, high))
        }
        "--syn" => one(MatchKind::TcpFlags { mask: 0x17, set: 0x02 }),
        "--tcp-flags" => {
            let mask = tcp_flags(options.value(option))?;
            let set = tcp_flags(options.value(option))?;
            one(MatchKind::TcpFlags { mask, set })
        }
        "--tcp-option" => one(MatchKind::TcpOption(options.value(option).parse().ok()?)),
        _ => None,
    }
}

fn tcp_flags(text: &str) -> Option<u8> {
    text.split(',').try_fold(0, |flags, name| {
        let bit = match name {
            "FIN" => 0x01,
            "SYN" => 0x02,
            "RST" => 0x04,
            "PSH" => 0x08,
            "ACK" => 0x10,
            "URG" => 0x20,
            "ALL" => 0x3f,
            "NONE" => 0,
            other => u8::try_from(number(other)?).ok()?,
        };
        Some(flags | bit)
    })
}

fn multiport<'a>(option: &mut Opt<'a>, options: &mut Options<'_, 'a>) -> Option<Parsed> {
    let side = match option.name {
        "--sports" | "--source-ports" => PortSide::Source,
        "--dports" | "--destination-ports" => PortSide::Destination,
        "--ports" => PortSide::Either,
        _ => return None,
    };
    let ports: Option<Vec<_>> = options.value(option).split(',').map(|part| range(part, ':')).collect();
    one(MatchKind::Multiport(side, ports?.into()))
}

fn icmp<'a>(option: &mut Opt<'a>, options: &mut Options<'_, 'a>, family: Family) -> Option<Parsed> {
    if !matches!(option.name, "--icmp-type" | "--icmpv6-type") {
        return None;
    }
    let text = options.value(option);
    if text == "any" || (text == "255" && family == Family::V4) {
        return Some(Parsed::NOTHING);
    }
    let (kind, code) = text.split_once('/').map_or((text, None), |(kind, code)| (kind, Some(code)));
    let icmp_type = match (kind, family) {
        ("echo-request" | "ping", Family::V4) => 8,
        ("echo-reply" | "pong", Family::V4) => 0,
        ("destination-unreachable", Family::V4) => 3,
        ("time-exceeded" | "ttl-exceeded", Family::V4) => 11,
        ("echo-request" | "ping", Family::V6) => 128,
        ("echo-reply" | "pong", Family::V6) => 129,
        ("destination-unreachable", Family::V6) => 1,
        ("packet-too-big", Family::V6) => 2,
        ("router-solicitation", Family::V6) => 133,
        ("router-advertisement", Family::V6) => 134,
        ("neighbour-solicitation" | "neighbor-solicitation", Family::V6) => 135,
        ("neighbour-advertisement" | "neighbor-advertisement", Family::V6) => 136,
        (other, _) => other.parse().ok()?,
    };
    let code = match code {
        None => (0, u8::MAX),
        Some(code) => code.parse().ok().map(|code| (code, code))?,
    };
    one(MatchKind::IcmpType { icmp_type, code })
}

fn conntrack<'a>(option: &mut Opt<'a>, options: &mut Options<'_, 'a>, family: Family) -> Option<Parsed> {
    let name = option.name;
    let value = options.value(option);
    let field = match name {
        "--ctorigsrc" | "--ctorigsrcport" => CtField::OriginalSource,
        "--ctorigdst" | "--ctorigdstport" => CtField::OriginalDestination,
        "--ctreplsrc" | "--ctreplsrcport" => CtField::ReplySource,
        _ => CtField::ReplyDestination,
    };
    one(match name {
        "--ctstate" | "--state" => MatchKind::CtState(states(value)?),
        "--ctproto" => MatchKind::CtProto(protocol(value)?),
        "--ctorigsrc" | "--ctorigdst" | "--ctreplsrc" | "--ctrepldst" => {
            MatchKind::CtAddress(field, net(value, family)?)
        }
        "--ctorigsrcport" | "--ctorigdstport" | "--ctreplsrcport" | "--ctrepldstport" => {
            let (low, high) = range(value, ':')?;
            MatchKind::CtPort(field, low, high)
        }
        "--ctstatus" => MatchKind::CtStatus(value.split(',').try_fold(0, |bits, name| Some(bits | status(name)?))?),
        "--ctexpire" => {
            let (low, high) = value.split_once(':').unwrap_or((value, value));
            MatchKind::CtExpire(low.parse().ok()?, high.parse().ok()?)
        }
        "--ctdir" => MatchKind::CtDirection(match value {
            "ORIGINAL" => true,
            "REPLY" => false,
            _ => return None,
        }),
        _ => return None,
    })
}

fn states(text: &str) -> Option<CtStates> {
    let bits = text.split(',').try_fold(0, |bits, name| {
        Some(
            bits | match name {
                "INVALID" => CtStates::INVALID,
                "ESTABLISHED" => CtStates::ESTABLISHED,
                "RELATED" => CtStates::RELATED,
                "NEW" => CtStates::NEW,
                "UNTRACKED" => CtStates::UNTRACKED,
                "SNAT" => CtStates::SNAT,
                "DNAT" => CtStates::DNAT,
                _ => return None,
            },
        )
    })?;
    Some(CtStates(bits))
}

/// `enum ip_conntrack_status`.
fn status(name: &str) -> Option<u32> {
    Some(match name {
        "NONE" => 0,
        "EXPECTED" => 1,
        "SEEN_REPLY" => 2,
        "ASSURED" => 4,
        "CONFIRMED" => 8,
        _ => return None,
    })
}

fn ip_range<'a>(option: &mut Opt<'a>, options: &mut Options<'_, 'a>, family: Family) -> Option<Parsed> {
    let name = option.name;
    let value = options.value(option);
    let (low, high) = value.split_once('-').unwrap_or((value, value));
    let ends = Box::new((net(low, family)?, net(high, family)?));
    one(match name {
        "--src-range" => MatchKind::SourceRange(ends),
        "--dst-range" => MatchKind::DestinationRange(ends),
        _ => return None,
    })
}

fn physdev<'a>(option: &mut Opt<'a>, options: &mut Options<'_, 'a>) -> Option<Parsed> {
    one(match option.name {
        "--physdev-in" => MatchKind::PhysIn(options.value(option).into()),
        "--physdev-out" => MatchKind::PhysOut(options.value(option).into()),
        "--physdev-is-in" => MatchKind::PhysIsIn,
        "--physdev-is-out" => MatchKind::PhysIsOut,
        "--physdev-is-bridged" => MatchKind::PhysIsBridged,
        _ => return None,
    })
}

fn owner<'a>(option: &mut Opt<'a>, options: &mut Options<'_, 'a>) -> Option<Parsed> {
    one(match option.name {
        "--uid-owner" => {
            let (low, high) = ids(options.value(option))?;
            MatchKind::Owner(Owner::Uid(low, high))
        }
        "--gid-owner" => {
            let (low, high) = ids(options.value(option))?;
            MatchKind::Owner(Owner::Gid(low, high))
        }
        "--socket-exists" => MatchKind::Owner(Owner::Exists),
        // Makes `--gid-owner` look at more groups than the packet's sender is known to have.
        "--suppl-groups" => MatchKind::Unknown(option.name.into()),
        _ => return None,
    })
}

/// `1000`, `1000-2000`; iptables itself has turned names into numbers.
fn ids(text: &str) -> Option<(u32, u32)> {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    low.parse().ok().zip(high.parse().ok())
}

fn tos<'a>(option: &mut Opt<'a>, options: &mut Options<'_, 'a>) -> Option<Parsed> {
    let byte = |value: u32| u8::try_from(value).ok();
    match option.name {
        "--tos" => {
            let (value, mask) = masked(options.value(option))?;
            one(MatchKind::Tos { value: byte(value)?, mask: mask as u8 })
        }
        "--dscp" => {
            let value = byte(number(options.value(option))?)?;
            one(MatchKind::Tos { value: value.checked_shl(2)?, mask: 0xfc })
        }
        _ => None,
    }
}

fn ttl<'a>(option: &mut Opt<'a>, options: &mut Options<'_, 'a>) -> Option<Parsed> {
    let order = match option.name {
        "--ttl-eq" | "--ttl" | "--hl-eq" => Ordering::Equal,
        "--ttl-lt" | "--hl-lt" => Ordering::Less,
        "--ttl-gt" | "--hl-gt" => Ordering::Greater,
        _ => return None,
    };
    one(MatchKind::Ttl(order, options.value(option).parse().ok()?))
}
