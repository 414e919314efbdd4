//! Whether a rule matches: each match answers yes, no, or that it cannot be known.

use super::config::icmp_type;
use super::conn::CtInfo;
use super::run::Run;
use super::sender::owner;
use super::sets::Asked;
use super::walk::Walk;
use crate::core::model::flow::{Direction, Proto, Tuple};
use crate::core::model::name::Name;
use crate::core::model::rules::{CtField, IfaceLimit, Match, MatchKind, Net, PortSide, Recent, RecentOp, Rule};
use crate::core::model::trace::{Fraction, Hook, RouteKind};
use std::net::IpAddr;

/// The answer of one match, before negation.
#[derive(Debug, PartialEq)]
pub(super) enum Answer {
    Is(bool),
    /// No, whatever stands before it: the match does not apply to this kind of packet.
    Never,
    Unknown(String),
}

/// The answer of a whole rule.
#[derive(Debug)]
pub(super) enum Verdict {
    No,
    Yes,
    /// It matches, if what is open says so.
    Open(Box<Open>),
    /// It does not match, but before that was clear it may have changed a list of `recent`.
    Remembers(Box<Open>),
}

/// What a rule's answer hangs on.
#[derive(Debug)]
pub(super) struct Open {
    /// So only with this probability.
    pub(super) chance: Option<Fraction>,
    /// So only if these hold, which cannot be known.
    pub(super) unknown: Vec<String>,
    /// The unknown is whether a client was seen before (`recent`).
    pub(super) affinity: bool,
    /// How many of the walk's changes to `recent` lists happen in any case.
    pub(super) sure: usize,
}

impl Open {
    /// Nothing, so far; what changed lists until here happens in any case.
    fn begin(walk: &Walk<'_>) -> Box<Self> {
        Box::new(Self { chance: None, unknown: Vec::new(), affinity: false, sure: walk.remembered.len() })
    }
}

impl From<bool> for Answer {
    fn from(is: bool) -> Self {
        Self::Is(is)
    }
}

impl<'s> Run<'s> {
    /// A match of `recent` changes its list as soon as it is asked, whatever becomes of the rule.
    pub(super) fn matches(&mut self, walk: &mut Walk<'s>, rule: &Rule) -> Verdict {
        let mut open = None;
        let mut limited = false;
        for asked in &rule.matches {
            limited |= matches!(asked.kind, MatchKind::Limit);
            if let Some(fraction) = probability(asked) {
                let open = open.get_or_insert_with(|| Open::begin(walk));
                open.chance = Some(open.chance.map_or(fraction, |before| before.times(fraction)));
                continue;
            }
            let answer = self.answer(walk, &asked.kind);
            if let MatchKind::Recent(recent) = &asked.kind {
                remember(walk, recent, &answer);
            }
            match answer {
                Answer::Is(is) if is != asked.negated => {}
                Answer::Is(_) | Answer::Never => {
                    let changed = open.filter(|open| walk.remembered.len() > open.sure);
                    return changed.map_or(Verdict::No, Verdict::Remembers);
                }
                Answer::Unknown(why) => {
                    let open = open.get_or_insert_with(|| Open::begin(walk));
                    open.affinity |= matches!(asked.kind, MatchKind::Recent(_));
                    open.unknown.push(why);
                }
            }
        }
        if limited {
            self.assume("rate limits (-m limit) are taken as not used up: the packet finds a full bucket");
        }
        open.map_or(Verdict::Yes, Verdict::Open)
    }

    fn answer(&mut self, walk: &Walk<'s>, kind: &MatchKind) -> Answer {
        let tuple = &walk.tuple;
        match kind {
            MatchKind::Source(net) => within(net, tuple.src).into(),
            MatchKind::Destination(net) => within(net, tuple.dst).into(),
            MatchKind::Protocol(number) => (tuple.proto.number() == *number).into(),
            MatchKind::Input(pattern) => named(pattern, walk.hook_input_name()).into(),
            MatchKind::Output(_) if walk.output_unknown && after_routing(walk) => {
                Answer::Unknown("the output interface is not known without routes".into())
            }
            MatchKind::Output(pattern) => named(pattern, walk.hook_output_name()).into(),
            MatchKind::SourcePort(..) | MatchKind::Multiport(PortSide::Source | PortSide::Either, _)
                if walk.conn.sport_chosen =>
            {
                Answer::Unknown("which source port the kernel chose".into())
            }
            MatchKind::CtPort(CtField::ReplyDestination, ..) if walk.conn.sport_chosen && walk.conn.tracked() => {
                Answer::Unknown("which source port the kernel chose".into())
            }
            MatchKind::SourcePort(low, high) => port(tuple, tuple.sport, (*low, *high)),
            MatchKind::DestinationPort(low, high) => port(tuple, tuple.dport, (*low, *high)),
            MatchKind::Multiport(side, ranges) => multiport(tuple, *side, ranges),
            MatchKind::TcpFlags { .. } | MatchKind::TcpOption(_) if tuple.proto != Proto::Tcp => Answer::Never,
            MatchKind::TcpFlags { mask, set } => (walk.packet.tcp_flags & mask == *set).into(),
            MatchKind::TcpOption(number) => Answer::Unknown(format!("whether TCP option {number} is set")),
            MatchKind::IcmpType { icmp_type, code } => icmp(tuple, *icmp_type, *code),
            MatchKind::AddrType { source, types, limit } => self.address_type(walk, *source, *types, *limit),
            MatchKind::Mark { value, mask } => (walk.mark & mask == *value).into(),
            MatchKind::Recent(recent) => self.recent(walk, recent),
            MatchKind::Set(set) => self.in_set(walk, &set.name, &set.source, set.more.as_deref()),
            MatchKind::SourceRange(ends) => between(ends, tuple.src).into(),
            MatchKind::DestinationRange(ends) => between(ends, tuple.dst).into(),
            MatchKind::RpFilter(asked) => self.rp_match(walk, asked),
            MatchKind::Length(low, high) => (u32::from(*low)..=u32::from(*high)).contains(&walk.packet.length).into(),
            MatchKind::Ttl(order, value) => (walk.ttl.cmp(value) == *order).into(),
            MatchKind::Fragment => false.into(),
            MatchKind::Always | MatchKind::Limit | MatchKind::Random { .. } | MatchKind::Nth { .. } => true.into(),
            MatchKind::Unknown(text) => Answer::Unknown(text.to_string()),
            MatchKind::PktType(kind) => packet_type(walk, kind),
            MatchKind::Owner(asked) => owner(walk, asked),
            MatchKind::Mac(asked) => self.mac(walk, *asked),
            MatchKind::Socket(asked) => self.socket(walk, asked),
            MatchKind::Tos { value, mask } => (walk.tos & mask == *value).into(),
            other => conntrack(walk, other).unwrap_or_else(|| physical(walk, other)),
        }
    }

    /// `addrtype_mt_v1`.
    fn address_type(&mut self, walk: &Walk<'_>, source: bool, types: u16, limit: Option<IfaceLimit>) -> Answer {
        let address = if source { walk.tuple.src } else { walk.tuple.dst };
        let device = match limit {
            None => None,
            Some(IfaceLimit::In) => walk.hook_input_name(),
            Some(IfaceLimit::Out) => walk.hook_output_name(),
        };
        // `match_lookup_rt6`: with an interface, only an address on it counts as local.
        if let (IpAddr::V6(_), Some(device)) = (address, device) {
            let own = self.sim.config.has_address(device, address);
            let kind = if own { RouteKind::Local } else { RouteKind::Unicast };
            return type6(address, types, kind).into();
        }
        match self.sim.routing.address_type(address, device) {
            None => Answer::Unknown(format!("whether {address} is an address of this node")),
            Some(kind) if address.is_ipv4() => (types & rtn(kind) != 0).into(),
            Some(kind) => type6(address, types, kind).into(),
        }
    }

    /// `recent_mt` (net/netfilter/xt_recent.c).
    fn recent(&mut self, walk: &Walk<'_>, asked: &Recent) -> Answer {
        if asked.op == RecentOp::Set {
            return true.into();
        }
        let address = listed(walk, asked);
        let mut own = walk.remembered.iter().rev();
        if let Some((_, _, there)) = own.find(|(name, known, _)| *name == asked.name && *known == address) {
            return (*there && asked.hits.is_none_or(|hits| hits <= 1)).into();
        }
        let Some(lists) = &self.sim.recent else {
            return Answer::Unknown(format!("whether {address} is in the list {} (recent)", asked.name));
        };
        let entries = lists.get(&*asked.name).map_or(&[][..], Vec::as_slice);
        let Some(entry) = entries.iter().find(|entry| entry.address == address) else { return false.into() };
        if asked.op == RecentOp::Remove {
            return true.into();
        }
        let fresh = match (asked.seconds, entry.age) {
            (None, _) => Some(true),
            (Some(seconds), Some(age)) => Some(age <= u64::from(seconds)),
            (Some(_), None) => None,
        };
        match (fresh, asked.hits.unwrap_or(1)) {
            (Some(false), _) => false.into(),
            (_, hits) if entry.hits < hits => false.into(),
            (Some(true), hits) if hits <= 1 || asked.seconds.is_none() => true.into(),
            _ => Answer::Unknown(format!("how often {address} was seen in the list {} lately", asked.name)),
        }
    }

    fn in_set(&mut self, walk: &Walk<'_>, name: &str, source: &[bool], more: Option<&str>) -> Answer {
        let asked = Asked {
            tuple: &walk.tuple,
            input: walk.hook_input_name(),
            output: walk.hook_output_name(),
            mark: walk.mark,
            source,
        };
        match (self.sim.sets.contains(name, &asked), more) {
            (Err(why), _) => Answer::Unknown(why),
            (Ok(true), Some(more)) => Answer::Unknown(format!("{more} of set {name}")),
            (Ok(inside), _) => inside.into(),
        }
    }
}

/// `pkttype_mt`: what the link said of the packet, which DNAT does not change.
fn packet_type(walk: &Walk<'_>, kind: &str) -> Answer {
    match kind {
        "unicast" | "host" => (walk.arrived_as == RouteKind::Unicast).into(),
        "multicast" => (walk.arrived_as == RouteKind::Multicast).into(),
        "broadcast" => (walk.arrived_as == RouteKind::Broadcast).into(),
        other => Answer::Unknown(format!("--pkt-type {other}")),
    }
}

/// The address that a `recent` match is about.
fn listed(walk: &Walk<'_>, asked: &Recent) -> IpAddr {
    mask(if asked.by_destination { walk.tuple.dst } else { walk.tuple.src }, &asked.mask)
}

/// `--set` adds the address, `--remove` takes it away, so that later rules find it so; `--update` only renews one that is there.
fn remember(walk: &mut Walk<'_>, asked: &Recent, answer: &Answer) {
    let there = match asked.op {
        RecentOp::Set => true,
        RecentOp::Remove if *answer == Answer::Is(true) => false,
        _ => return,
    };
    let address = listed(walk, asked);
    walk.remembered.push((asked.name.clone(), address, there));
}

/// The probability of `statistic`; the phase of nth is not known, so that it counts as one in `every`.
fn probability(asked: &Match) -> Option<Fraction> {
    let fraction = match asked.kind {
        MatchKind::Random { num, den } => Fraction { num: num.into(), den: den.into() },
        MatchKind::Nth { every, .. } => Fraction::new(1, u64::from(every.max(1))),
        _ => return None,
    };
    Some(if asked.negated { fraction.rest() } else { fraction })
}

fn after_routing(walk: &Walk<'_>) -> bool {
    matches!(walk.stage.hook, Hook::Forward | Hook::Output | Hook::Postrouting)
}

/// An address under a mask equals the net's; false for the other family.
pub(super) fn within(net: &Net, address: IpAddr) -> bool {
    match (net, address) {
        (Net::V4 { addr, mask }, IpAddr::V4(four)) => four.to_bits() & mask == *addr,
        (Net::V6(both), IpAddr::V6(six)) => six.to_bits() & both.1 == both.0,
        _ => false,
    }
}

pub(super) fn mask(address: IpAddr, net: &Net) -> IpAddr {
    match (net, address) {
        (Net::V4 { mask, .. }, IpAddr::V4(four)) => IpAddr::V4((four.to_bits() & mask).into()),
        (Net::V6(both), IpAddr::V6(six)) => IpAddr::V6((six.to_bits() & both.1).into()),
        _ => address,
    }
}

pub(super) fn between(ends: &(Net, Net), address: IpAddr) -> bool {
    match (&ends.0, &ends.1, address) {
        (Net::V4 { addr: low, .. }, Net::V4 { addr: high, .. }, IpAddr::V4(four)) => {
            (*low..=*high).contains(&four.to_bits())
        }
        (Net::V6(low), Net::V6(high), IpAddr::V6(six)) => (low.0..=high.0).contains(&six.to_bits()),
        _ => false,
    }
}

/// `ifname_compare`: `+` at the end stands for any continuation, no interface is an empty name.
fn named(pattern: &str, interface: Option<&str>) -> bool {
    let interface = interface.unwrap_or("");
    match pattern.strip_suffix('+') {
        Some(start) => interface.starts_with(start),
        None => interface == pattern,
    }
}

fn port(tuple: &Tuple, port: u16, (low, high): (u16, u16)) -> Answer {
    if tuple.proto.has_ports() { (low..=high).contains(&port).into() } else { Answer::Never }
}

fn multiport(tuple: &Tuple, side: PortSide, ranges: &[(u16, u16)]) -> Answer {
    if !tuple.proto.has_ports() {
        return Answer::Never;
    }
    let any = |port: u16| ranges.iter().any(|(low, high)| (*low..=*high).contains(&port));
    match side {
        PortSide::Source => any(tuple.sport),
        PortSide::Destination => any(tuple.dport),
        PortSide::Either => any(tuple.sport) || any(tuple.dport),
    }
    .into()
}

fn icmp(tuple: &Tuple, kind: u8, codes: (u8, u8)) -> Answer {
    if !matches!(tuple.proto, Proto::Icmp | Proto::Icmpv6) {
        return Answer::Never;
    }
    let (is, code) = icmp_type(tuple);
    (is == kind && (codes.0..=codes.1).contains(&code)).into()
}

fn rtn(kind: RouteKind) -> u16 {
    match kind {
        RouteKind::None => 1,
        RouteKind::Unicast => 1 << 1,
        RouteKind::Local => 1 << 2,
        RouteKind::Broadcast => 1 << 3,
        RouteKind::Anycast => 1 << 4,
        RouteKind::Multicast => 1 << 5,
        RouteKind::Blackhole => 1 << 6,
        RouteKind::Unreachable => 1 << 7,
        RouteKind::Prohibit => 1 << 8,
        RouteKind::Throw => 1 << 9,
    }
}

/// `match_type6` (net/netfilter/xt_addrtype.c).
fn type6(address: IpAddr, types: u16, kind: RouteKind) -> bool {
    let asks = |bit: u16| types & (1 << bit) != 0;
    if asks(5) && !address.is_multicast() || asks(1) && address.is_multicast() || asks(0) && !address.is_unspecified() {
        return false;
    }
    let looked_up = 1 << 2 | 1 << 4 | 1 << 7 | 1 << 8;
    types & looked_up == 0 || types & looked_up & rtn(kind) != 0
}

/// `conntrack_mt` (net/netfilter/xt_conntrack.c) and connmark. Everything but the state needs an entry.
fn conntrack(walk: &Walk<'_>, kind: &MatchKind) -> Option<Answer> {
    let conn = &walk.conn;
    if let MatchKind::CtState(states) = kind {
        return Some((states.0 & conn.state_bits() != 0).into());
    }
    let side = |field: CtField| match field {
        CtField::OriginalSource => conn.original.source(),
        CtField::OriginalDestination => conn.original.destination(),
        CtField::ReplySource => conn.reply.source(),
        CtField::ReplyDestination => conn.reply.destination(),
    };
    let answer = match kind {
        MatchKind::CtProto(number) => (conn.original.proto.number() == *number).into(),
        MatchKind::CtAddress(field, net) => within(net, side(*field).ip()).into(),
        MatchKind::CtPort(field, low, high) => (*low..=*high).contains(&side(*field).port()).into(),
        MatchKind::CtStatus(bits) => (bits & conn.status != 0).into(),
        MatchKind::CtDirection(original) => (*original == (conn.direction == Direction::Original)).into(),
        MatchKind::ConnMark { value, mask } => (conn.mark & mask == *value).into(),
        MatchKind::CtExpire(low, high) => match conn.timeout {
            Some(left) => (u64::from(*low)..=u64::from(*high)).contains(&left).into(),
            None if conn.state == CtInfo::New => (*low == 0).into(),
            None => Answer::Unknown("when the conntrack entry expires".into()),
        },
        _ => return None,
    };
    Some(if conn.tracked() { answer } else { Answer::Never })
}

/// `physdev_mt`: only a packet that came by a bridge port has physical devices.
fn physical(walk: &Walk<'_>, kind: &MatchKind) -> Answer {
    let Some(phys_in) = walk.phys_in.map(Name::as_str) else {
        return match kind {
            MatchKind::PhysIsBridged | MatchKind::PhysIsIn | MatchKind::PhysIsOut => false.into(),
            MatchKind::PhysIn(pattern) | MatchKind::PhysOut(pattern) => named(pattern, None).into(),
            _ => Answer::Unknown("a match that the model does not know".into()),
        };
    };
    match kind {
        MatchKind::PhysIsIn => true.into(),
        MatchKind::PhysIn(pattern) => named(pattern, Some(phys_in)).into(),
        // `physdev_mt` asks for the output port, which is not known before FORWARD.
        MatchKind::PhysIsBridged => {
            (walk.bridged && matches!(walk.stage.hook, Hook::Forward | Hook::Postrouting)).into()
        }
        MatchKind::PhysIsOut if !walk.bridged => false.into(),
        _ => Answer::Unknown("the bridge port by which the packet leaves".into()),
    }
}
