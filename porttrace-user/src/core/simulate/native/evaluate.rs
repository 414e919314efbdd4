//! What an expression is, of a packet as it looks now.

use super::super::compiled::TableData;
use super::super::config::icmp_type;
use super::super::conn::CtInfo;
use super::super::matches::Answer;
use super::super::routing::{Found, Key};
use super::super::run::Run;
use super::super::walk::Walk;
use crate::core::model::flow::{Direction, Family, Proto};
use crate::core::model::name::Name;
use crate::core::model::native::{BitOp, Datum, Device, Expr, Field, Part, Source, Value};
use crate::core::model::rules::CtStates;
use crate::core::model::trace::{Hook, RouteKind};
use smallvec::{SmallVec, smallvec};
use std::net::IpAddr;

/// Several for a concatenation.
pub(super) type Values = SmallVec<[Value; 4]>;

#[derive(Debug)]
pub(super) enum Got {
    Values(Values),
    /// The packet has no such thing: the rule does not match (`NFT_BREAK`).
    Missing,
    Unknown(String),
}

impl Got {
    fn number(number: impl Into<u64>) -> Self {
        Self::Values(smallvec![Value::Number(number.into())])
    }

    fn address(address: IpAddr) -> Self {
        Self::Values(smallvec![Value::Address(address)])
    }

    fn name(name: Option<&Name>) -> Self {
        // No interface is an empty name (`nft_meta_store_ifname`).
        Self::Values(smallvec![Value::Name(name.cloned().unwrap_or_default())])
    }
}

impl<'s> Run<'s> {
    /// `number`: what `numgen` gives.
    pub(super) fn evaluate(
        &mut self,
        walk: &Walk<'s>,
        table: &'s TableData,
        expression: &'s Expr,
        number: Option<u32>,
    ) -> Got {
        match expression {
            Expr::Constant(parts) => {
                let value = |part: &Part| match part {
                    Part::One(value) => Some(value.clone()),
                    _ => None,
                };
                let values: Option<Values> = parts.iter().map(value).collect();
                values.map_or_else(|| Got::Unknown("a range is no value".to_owned()), Got::Values)
            }
            Expr::Field(field) => self.field(walk, *field),
            Expr::Concat(parts) => {
                let mut all = Values::new();
                for part in parts {
                    match self.evaluate(walk, table, part, number) {
                        Got::Values(values) => all.extend(values),
                        other => return other,
                    }
                }
                Got::Values(all)
            }
            Expr::Bits { op, left, right } => {
                let sides = (self.evaluate(walk, table, left, number), self.evaluate(walk, table, right, number));
                match sides {
                    (Got::Values(left), Got::Values(right)) => bits(*op, &left, &right),
                    (Got::Values(_), other) | (other, _) => other,
                }
            }
            Expr::Number { .. } => match number {
                Some(number) => Got::number(number),
                None => Got::Unknown("which number is drawn".to_owned()),
            },
            Expr::Map { key, map } => match self.mapped(walk, table, (key, map), number) {
                Ok(Some(parts)) => {
                    let values = parts.iter().map(one).collect::<Option<Values>>();
                    values.map_or_else(|| Got::Unknown("a range is no value".to_owned()), Got::Values)
                }
                Ok(None) => Got::Missing,
                Err(why) => Got::Unknown(why),
            },
            Expr::Unknown(what) => Got::Unknown(format!("what {what} is")),
        }
    }

    /// What a map has for a key; `None`: nothing. The error says what is not known.
    pub(super) fn mapped(
        &mut self,
        walk: &Walk<'s>,
        table: &'s TableData,
        (key, map): (&'s Expr, &'s Source),
        number: Option<u32>,
    ) -> Result<Option<&'s [Part]>, String> {
        let key = match self.evaluate(walk, table, key, number) {
            Got::Values(key) => key,
            Got::Missing => return Ok(None),
            Got::Unknown(why) => return Err(why),
        };
        let map = table.source(map).ok_or("what is in a map")?;
        match map.find(&key) {
            Some(Some(Datum::Parts(parts))) => Ok(Some(parts)),
            None if !map.has_unknown && !map.dynamic => Ok(None),
            _ => Err("what a map leads to".to_owned()),
        }
    }

    fn field(&mut self, walk: &Walk<'s>, field: Field) -> Got {
        let tuple = &walk.tuple;
        let of = |family: Family, got: Got| if walk.family() == family { got } else { Got::Missing };
        let ports = |run: &mut Self, proto: Option<u8>, got: Got| match proto {
            Some(number) if number != tuple.proto.number() => Got::Missing,
            _ if tuple.proto.has_ports() => got,
            Some(_) => Got::Missing,
            // `th dport` reads what stands there, whatever it is.
            None => {
                run.assume("what stands where other protocols have ports is taken for none that rules ask for");
                Got::number(1u32 << 16)
            }
        };
        match field {
            Field::Source(family) => of(family, Got::address(tuple.src)),
            Field::Destination(family) => of(family, Got::address(tuple.dst)),
            Field::Protocol(family) => of(family, Got::number(tuple.proto.number())),
            Field::HopLimit(family) => of(family, Got::number(walk.ttl)),
            Field::Dscp(family) => of(family, Got::number(walk.tos >> 2)),
            Field::Ecn(family) => of(family, Got::number(walk.tos & 3)),
            Field::SourcePort(proto) if walk.conn.sport_chosen => {
                ports(self, proto, Got::Unknown("which source port the kernel chose".to_owned()))
            }
            Field::SourcePort(proto) => ports(self, proto, Got::number(tuple.sport)),
            Field::DestinationPort(proto) => ports(self, proto, Got::number(tuple.dport)),
            Field::TcpFlags if tuple.proto == Proto::Tcp => Got::number(walk.packet.tcp_flags),
            Field::IcmpType(family) | Field::IcmpCode(family) if is_icmp(family, tuple.proto) => {
                let (kind, code) = icmp_type(tuple);
                Got::number(if matches!(field, Field::IcmpType(_)) { kind } else { code })
            }
            Field::TcpFlags | Field::IcmpType(_) | Field::IcmpCode(_) => Got::Missing,
            Field::EtherSource => match walk.packet.sender.mac {
                // `nft_payload_eval`: no frame came.
                _ if walk.local => Got::Missing,
                Some(mac) => Got::number(mac.iter().fold(0, |all, byte| all << 8 | u64::from(*byte))),
                None => Got::Unknown("which station sent the frame".to_owned()),
            },
            Field::Mark => Got::number(walk.mark),
            Field::Input => Got::name(walk.hook_input()),
            Field::Output if walk.output_unknown && after_routing(walk) => {
                Got::Unknown("the output interface is not known without routes".to_owned())
            }
            Field::Output => Got::name(walk.hook_output),
            Field::L4Proto => Got::number(tuple.proto.number()),
            Field::NfProto => Got::number(if walk.family() == Family::V4 { 2u8 } else { 10 }),
            Field::EtherType => Got::number(if walk.family() == Family::V4 { 0x0800u16 } else { 0x86dd }),
            Field::PacketType => match walk.arrived_as {
                RouteKind::Unicast => Got::number(0u8),
                RouteKind::Broadcast => Got::number(1u8),
                RouteKind::Multicast => Got::number(2u8),
                _ => Got::Unknown("as what the frame came".to_owned()),
            },
            Field::Length => Got::number(walk.packet.length),
            Field::Uid => owner(walk, walk.packet.sender.uid),
            Field::Gid => owner(walk, walk.packet.sender.gid),
            Field::ReversePath { marked } => match self.has_way_back(walk, marked) {
                Answer::Is(there) => Got::number(u8::from(there)),
                Answer::Never => Got::Missing,
                Answer::Unknown(why) => Got::Unknown(why),
            },
            Field::FibType { source, device } => {
                let ends = if source { (tuple.src, tuple.dst) } else { (tuple.dst, tuple.src) };
                self.fib_type(walk, ends, device)
            }
            _ => conntrack(walk, field),
        }
    }

    /// `nft_fib4_eval_type`, `nft_fib6_eval_type`: the type of an address; `other`: the packet's other end.
    fn fib_type(&mut self, walk: &Walk<'s>, (address, other): (IpAddr, IpAddr), device: Option<Device>) -> Got {
        let device = match device {
            None => None,
            Some(Device::Input) => walk.hook_input_name(),
            Some(Device::Output) => walk.hook_output_name(),
        };
        let Some(kind) = self.sim.routing.address_type(address, device) else {
            return Got::Unknown(format!("whether {address} is an address of this node"));
        };
        if address.is_ipv4() || address.is_multicast() {
            return Got::number(number_of(kind));
        }
        let own = device.is_some_and(|device| self.sim.config.has_address(device, address));
        Got::number(number_of(if own { RouteKind::Local } else { self.route_type(walk, (address, other), device) }))
    }

    /// What the routes say of an IPv6 address (`__nft_fib6_eval_type`): there is no such thing as an address without a route.
    fn route_type(&mut self, walk: &Walk<'s>, (dst, src): (IpAddr, IpAddr), device: Option<&str>) -> RouteKind {
        let key = Key {
            dst,
            src: Some(src),
            input: "lo",
            output: None,
            mark: 0,
            tos: walk.tos,
            proto: Some(walk.tuple.proto),
            ports: (0, 0),
        };
        let sim = self.sim;
        match sim.routing.lookup(&key, &mut |text| self.assume(text)) {
            // With an interface, an address of another one is not local.
            Found::Route(entry) if entry.kind == RouteKind::Local && device.is_some() => RouteKind::Unicast,
            Found::Route(entry) => entry.kind,
            Found::Refused(RouteKind::None) => RouteKind::Unreachable,
            Found::Refused(kind) => kind,
        }
    }
}

fn one(part: &Part) -> Option<Value> {
    match part {
        Part::One(value) => Some(value.clone()),
        _ => None,
    }
}

fn bits(op: BitOp, left: &[Value], right: &[Value]) -> Got {
    let ([Value::Number(left)], [Value::Number(right)]) = (left, right) else {
        return match (op, left, right) {
            // An address under a mask.
            (BitOp::And, [Value::Address(address)], [Value::Address(mask)]) => masked(*address, *mask),
            _ => Got::Unknown("what two things give together".to_owned()),
        };
    };
    let by = u32::try_from(*right).unwrap_or(u32::MAX);
    Got::number(match op {
        BitOp::And => left & right,
        BitOp::Or => left | right,
        BitOp::Xor => left ^ right,
        // Registers have 32 bits here (nft_bitwise.c).
        BitOp::Left => left.checked_shl(by).unwrap_or(0) & u64::from(u32::MAX),
        BitOp::Right => left.checked_shr(by).unwrap_or(0),
    })
}

fn masked(address: IpAddr, mask: IpAddr) -> Got {
    match (address, mask) {
        (IpAddr::V4(address), IpAddr::V4(mask)) => {
            Got::address(IpAddr::V4((address.to_bits() & mask.to_bits()).into()))
        }
        (IpAddr::V6(address), IpAddr::V6(mask)) => {
            Got::address(IpAddr::V6((address.to_bits() & mask.to_bits()).into()))
        }
        _ => Got::Missing,
    }
}

/// `RTN_*`.
const fn number_of(kind: RouteKind) -> u8 {
    match kind {
        RouteKind::None => 0,
        RouteKind::Unicast => 1,
        RouteKind::Local => 2,
        RouteKind::Broadcast => 3,
        RouteKind::Anycast => 4,
        RouteKind::Multicast => 5,
        RouteKind::Blackhole => 6,
        RouteKind::Unreachable => 7,
        RouteKind::Prohibit => 8,
        RouteKind::Throw => 9,
    }
}

fn is_icmp(family: Family, proto: Proto) -> bool {
    matches!((family, proto), (Family::V4, Proto::Icmp) | (Family::V6, Proto::Icmpv6))
}

fn after_routing(walk: &Walk<'_>) -> bool {
    matches!(walk.stage.hook, Hook::Forward | Hook::Output | Hook::Postrouting)
}

/// `nft_meta_get_eval_skugid`: only a packet with a socket has an owner.
fn owner(walk: &Walk<'_>, id: Option<u32>) -> Got {
    match id {
        _ if !walk.local => Got::Missing,
        Some(id) => Got::number(id),
        None => Got::Unknown("who sends the packet".to_owned()),
    }
}

/// `nft_ct_get_eval`. Everything but the state needs an entry.
fn conntrack(walk: &Walk<'_>, field: Field) -> Got {
    let conn = &walk.conn;
    if field == Field::CtState {
        let state = match conn.state {
            CtInfo::New => CtStates::NEW,
            CtInfo::Established => CtStates::ESTABLISHED,
            CtInfo::Untracked => CtStates::UNTRACKED,
            CtInfo::Invalid | CtInfo::Unseen => CtStates::INVALID,
        };
        return Got::number(state);
    }
    if !conn.tracked() {
        return Got::Missing;
    }
    let of = |way: Direction| if way == Direction::Original { &conn.original } else { &conn.reply };
    match field {
        Field::CtStatus => {
            let nat = |set: bool, bit: u32| if set { bit } else { 0 };
            // `IPS_SRC_NAT`, `IPS_DST_NAT`.
            Got::number(conn.status | nat(conn.src_nat(), 1 << 4) | nat(conn.dst_nat(), 1 << 5))
        }
        Field::CtMark => Got::number(conn.mark),
        Field::CtDirection => Got::number(u8::from(conn.direction == Direction::Reply)),
        Field::CtProto => Got::number(conn.original.proto.number()),
        Field::CtSource(way) => Got::address(of(way).src),
        Field::CtDestination(way) => Got::address(of(way).dst),
        Field::CtSourcePort(way) => Got::number(of(way).sport),
        Field::CtDestinationPort(Direction::Reply) if conn.sport_chosen => {
            Got::Unknown("which source port the kernel chose".to_owned())
        }
        Field::CtDestinationPort(way) => Got::number(of(way).dport),
        _ => Got::Missing,
    }
}
