//! Policy routing rules from their netlink messages.

use super::Taken;
use super::route::table;
use crate::core::model::flow::{Family, Proto};
use crate::core::model::state::{PolicyAction, PolicyRule};
use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, Nla};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleHeader, RuleMessage, RulePortRange};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use std::net::IpAddr;

/// `FRA_SPORT_MASK` and `FRA_DPORT_MASK` (include/uapi/linux/fib_rules.h).
const PORT_MASKS: [u16; 2] = [28, 29];

pub(super) fn rule(message: RouteNetlinkMessage) -> Taken<PolicyRule> {
    let RouteNetlinkMessage::NewRule(RuleMessage { header, attributes, .. }) = message else { return Ok(None) };
    let family = match header.family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        // Multicast routing has rules of its own, in families 128 and 129.
        _ => return Ok(None),
    };
    let mut found = Found { table: u32::from(header.table), ..Found::default() };
    for attribute in attributes {
        found.take(attribute)?;
    }
    // A mask without a mark tests for mark 0 (net/core/fib_rules.c, fib_rule_match).
    let fwmark = (found.mark.is_some() || found.mask.is_some())
        .then(|| (found.mark.unwrap_or(0), found.mask.unwrap_or(u32::MAX)));
    Ok(Some(PolicyRule {
        family,
        priority: found.priority,
        not: header.flags.contains(RuleFlags::Invert),
        src: prefix(found.src, header.src_len)?,
        dst: prefix(found.dst, header.dst_len)?,
        input: found.input,
        output: found.output,
        fwmark,
        tos: (header.tos != 0).then_some(header.tos),
        proto: found.proto,
        sport: found.sport,
        dport: found.dport,
        action: action(&header, found.table, found.goto)?,
        suppress_prefix: found.suppress,
        unknown: found.unknown,
    }))
}

/// The attributes of a rule.
#[derive(Default)]
struct Found {
    priority: u32,
    table: u32,
    goto: Option<u32>,
    src: Option<IpAddr>,
    dst: Option<IpAddr>,
    input: Option<String>,
    output: Option<String>,
    mark: Option<u32>,
    mask: Option<u32>,
    proto: Option<Proto>,
    sport: Option<(u16, u16)>,
    dport: Option<(u16, u16)>,
    suppress: Option<u8>,
    unknown: Vec<String>,
}

impl Found {
    fn take(&mut self, attribute: RuleAttribute) -> Result<(), String> {
        match attribute {
            RuleAttribute::Priority(priority) => self.priority = priority,
            RuleAttribute::Table(table) => self.table = table,
            RuleAttribute::Goto(target) => self.goto = Some(target),
            RuleAttribute::Source(address) => self.src = Some(address),
            RuleAttribute::Destination(address) => self.dst = Some(address),
            RuleAttribute::Iifname(name) => self.input = Some(name),
            RuleAttribute::Oifname(name) => self.output = Some(name),
            RuleAttribute::FwMark(mark) => self.mark = Some(mark),
            RuleAttribute::FwMask(mask) => self.mask = Some(mask),
            RuleAttribute::IpProtocol(proto) => {
                let number = u8::try_from(i32::from(proto)).map_err(|_| "a protocol above 255".to_owned())?;
                self.proto = Some(Proto::from_number(number));
            }
            RuleAttribute::SourcePortRange(range) => self.sport = Some(ports(range)),
            RuleAttribute::DestinationPortRange(range) => self.dport = Some(ports(range)),
            // The kernel says -1 where nothing is suppressed.
            RuleAttribute::SuppressPrefixLen(length) => self.suppress = u8::try_from(length).ok(),
            other => self.unknown.extend(unknown(other)),
        }
        Ok(())
    }
}

/// A selector that the model does not have, in the words of `ip rule`.
fn unknown(attribute: RuleAttribute) -> Option<String> {
    match attribute {
        RuleAttribute::L3MDev(true) => Some("l3mdev".to_owned()),
        RuleAttribute::UidRange(range) => Some(format!("uidrange {}-{}", range.start, range.end)),
        RuleAttribute::TunId(id) if id != 0 => Some(format!("tun_id {id}")),
        RuleAttribute::SuppressIfGroup(group) if group != u32::MAX => Some(format!("suppress_ifgroup {group}")),
        RuleAttribute::Other(other) => other_selector(&other),
        // Protocol (who made the rule) and realm decide nothing.
        _ => None,
    }
}

fn other_selector(other: &DefaultNla) -> Option<String> {
    let mut value = vec![0; other.value_len()];
    other.emit_value(&mut value);
    let is_whole_mask = PORT_MASKS.contains(&other.kind()) && value.iter().all(|byte| *byte == 0xff);
    (!is_whole_mask).then(|| format!("attribute {} ({value:?})", other.kind()))
}

fn ports(range: RulePortRange) -> (u16, u16) {
    (range.start, range.end)
}

fn prefix(address: Option<IpAddr>, length: u8) -> Result<Option<IpNet>, String> {
    let net = |address| IpNet::new(address, length).map_err(|_| format!("{address}/{length} is not a prefix"));
    address.map(net).transpose()
}

fn action(header: &RuleHeader, number: u32, goto: Option<u32>) -> Result<PolicyAction, String> {
    Ok(match header.action {
        RuleAction::ToTable => PolicyAction::Table(table(number)),
        RuleAction::Goto => PolicyAction::Goto(goto.ok_or("goto without a target")?),
        RuleAction::Nop => PolicyAction::Nop,
        RuleAction::Blackhole => PolicyAction::Blackhole,
        RuleAction::Unreachable => PolicyAction::Unreachable,
        RuleAction::Prohibit => PolicyAction::Prohibit,
        other => return Err(format!("action {other:?}")),
    })
}
