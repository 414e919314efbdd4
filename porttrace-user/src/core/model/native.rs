//! Native nftables rules as values: what libnftables prints as JSON (libnftables-json(5)), as far as it decides a packet's way.

use super::flow::{Direction, Family};
use super::name::Name;
use super::rules::Net;
use super::trace::Hook;
use foldhash::HashMap;
use std::fmt;
use std::net::IpAddr;

/// Where a base chain stands on the hook timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    pub kind: BaseKind,
    pub hook: Hook,
    pub priority: i32,
}

/// A base chain's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseKind {
    Filter,
    Nat,
    /// In OUTPUT: the way out is looked up again where it changed the packet (`nf_route_table_hook4`).
    Route,
}

/// A rule. One pointer long, to keep rules small.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statements(pub Box<[Statement]>);

/// One part of a rule. They are evaluated in a row; one that does not match ends the rule.
#[derive(Clone, Debug, PartialEq)]
pub enum Statement {
    Match {
        left: Expr,
        op: Op,
        right: Operand,
    },
    Verdict(Verdict),
    /// A verdict by a look-up; where there is none, the rule does not match.
    Vmap {
        key: Expr,
        map: Source,
    },
    Mark(Expr),
    CtMark(Expr),
    Nat(Box<Nat>),
    /// The kind of answer, as iptables writes it.
    Reject(Name),
    Notrack,
    /// Puts a client into a set, or takes it out: session affinity.
    Update {
        set: u32,
        key: Expr,
        removes: bool,
    },
    /// A rate limit; `over`: matches what is beyond it.
    Limit {
        over: bool,
    },
    /// Leaves the model: queue, synproxy, tproxy, …
    Stop(Name),
    /// Nothing is known of it but its name: it may match or not.
    Unknown(Name),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Nat {
    pub kind: NatKind,
    /// `None`: unchanged, or what masquerade and redirect choose.
    pub address: Option<Expr>,
    pub port: Option<Expr>,
    pub random: bool,
    pub persistent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NatKind {
    Dnat,
    Snat,
    Masquerade,
    Redirect,
}

/// Chains are indices into the table's chains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    Drop,
    Continue,
    Return,
    Jump(u32),
    Goto(u32),
    /// To a chain that the table does not have.
    Missing(Name),
}

/// How the two sides of a match are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Is,
    IsNot,
    /// Of flags: any of these.
    Any,
    /// Of flags: none of these.
    Nothing,
    Less,
    Greater,
    AtMost,
    AtLeast,
}

/// What a field is compared with.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    Parts(Box<[Part]>),
    Set(Source),
    /// Of the packet too.
    Expr(Box<Expr>),
    /// Not understood: the answer is open.
    Unknown(Name),
}

/// A set or map.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Of the table's.
    Named(u32),
    Inline(Box<Set>),
    /// One that the table does not have.
    Missing(Name),
}

/// Something that a packet has, or what is made of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    Constant(Box<[Part]>),
    Field(Field),
    Concat(Box<[Self]>),
    Bits {
        op: BitOp,
        left: Box<Self>,
        right: Box<Self>,
    },
    /// `numgen`: a number below `modulus`, plus `offset`. `counts`: one after the other, beginning nobody knows where.
    Number {
        modulus: u32,
        offset: u32,
        counts: bool,
    },
    Map {
        key: Box<Self>,
        map: Source,
    },
    Unknown(Name),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitOp {
    And,
    Or,
    Xor,
    Left,
    Right,
}

/// A field of the packet, of its connection, or of the place where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Addresses of a packet of this family; other packets do not match.
    Source(Family),
    Destination(Family),
    /// Protocol of the IP header.
    Protocol(Family),
    HopLimit(Family),
    /// Six bits of the TOS byte, or the other two.
    Dscp(Family),
    Ecn(Family),
    /// Ports of this protocol's packets; `None`: of any that has ports.
    SourcePort(Option<u8>),
    DestinationPort(Option<u8>),
    TcpFlags,
    /// Of ICMP in this family.
    IcmpType(Family),
    IcmpCode(Family),
    EtherSource,
    Mark,
    Input,
    Output,
    L4Proto,
    NfProto,
    EtherType,
    PacketType,
    Length,
    Uid,
    Gid,
    CtState,
    CtStatus,
    CtMark,
    CtDirection,
    CtProto,
    CtSource(Direction),
    CtDestination(Direction),
    CtSourcePort(Direction),
    CtDestinationPort(Direction),
    /// Type of an address (`RTN_*`): of the source, or of the destination; on an interface only.
    FibType {
        source: bool,
        device: Option<Device>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Input,
    Output,
}

/// What a field holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Value {
    Number(u64),
    Address(IpAddr),
    /// An interface.
    Name(Name),
}

/// What one value may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    One(Value),
    /// From the first to the last.
    Span(Value, Value),
    /// Interfaces whose names begin so.
    Begins(Name),
}

impl Part {
    pub fn holds(&self, value: &Value) -> bool {
        match (self, value) {
            (Self::One(one), value) => one == value,
            (Self::Span(first, last), value) => {
                std::mem::discriminant(first) == std::mem::discriminant(value) && (first..=last).contains(&value)
            }
            (Self::Begins(start), Value::Name(name)) => name.starts_with(&**start),
            (Self::Begins(_), _) => false,
        }
    }
}

/// A set; a map where it has data.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Set {
    /// Empty of one that stands in a rule.
    pub name: Name,
    exact: HashMap<Box<[Value]>, u32>,
    /// Elements with ranges, in the order in which they are listed.
    spans: Vec<(Box<[Part]>, u32)>,
    /// The element for all that have none.
    catch_all: Option<u32>,
    /// Of a map, by element.
    data: Vec<Datum>,
    /// Of a map's elements, where they have any.
    comments: HashMap<u32, Name>,
    /// Packets put elements into it: what is in it does not hold for long.
    pub dynamic: bool,
    /// Has elements that were not understood.
    pub has_unknown: bool,
}

/// What a map leads to.
#[derive(Clone, Debug, PartialEq)]
pub enum Datum {
    Verdict(Verdict),
    Parts(Box<[Part]>),
}

impl Set {
    /// An empty one.
    pub fn new(name: Name, dynamic: bool) -> Self {
        Self { name, dynamic, ..Self::default() }
    }

    /// An element; `None` as its key is the one for all that have none.
    pub fn insert(&mut self, key: Option<Vec<Part>>, datum: Option<Datum>, comment: Option<Name>) {
        let place = self.data.len() as u32;
        if let (Some(comment), Some(_)) = (comment, &datum) {
            self.comments.insert(place, comment);
        }
        match key {
            None => self.catch_all = Some(place),
            Some(parts) => {
                let value = |part: &Part| match part {
                    Part::One(value) => Some(value.clone()),
                    _ => None,
                };
                match parts.iter().map(value).collect::<Option<Vec<_>>>() {
                    Some(values) => drop(self.exact.insert(values.into_boxed_slice(), place)),
                    None => self.spans.push((parts.into_boxed_slice(), place)),
                }
            }
        }
        self.data.extend(datum);
    }

    /// The element of this key, with what a map has for it.
    pub fn find(&self, key: &[Value]) -> Option<Option<&Datum>> {
        let holds =
            |parts: &[Part]| parts.len() == key.len() && parts.iter().zip(key).all(|(part, one)| part.holds(one));
        let exact = self.exact.get(key).copied();
        let place = exact.or_else(|| self.spans.iter().find(|(parts, _)| holds(parts)).map(|(_, place)| *place));
        place.or(self.catch_all).map(|place| self.data.get(place as usize))
    }

    /// Keys without ranges, with what a map has for each, and its comment; in no order.
    pub fn elements(&self) -> impl Iterator<Item = (&[Value], Option<&Datum>, Option<&Name>)> {
        let all = self.exact.iter();
        all.map(|(key, place)| (&**key, self.data.get(*place as usize), self.comments.get(place)))
    }

    /// Whether no element has a range, and none is for all others.
    pub fn is_exact(&self) -> bool {
        self.spans.is_empty() && self.catch_all.is_none()
    }

    /// What a map has for ranges, and for all that have no element.
    pub fn data_of_ranges(&self) -> impl Iterator<Item = &Datum> {
        let places = self.spans.iter().map(|(_, place)| *place).chain(self.catch_all);
        places.filter_map(|place| self.data.get(place as usize))
    }

    /// All that a map leads to.
    pub fn data(&self) -> impl Iterator<Item = &Datum> {
        self.data.iter()
    }

    pub fn len(&self) -> usize {
        self.exact.len() + self.spans.len() + usize::from(self.catch_all.is_some())
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The addresses that a part stands for, as NAT of iptables would be told them.
pub fn addresses(part: &Part) -> Option<(Net, Net)> {
    let net = |value: &Value| match value {
        Value::Address(IpAddr::V4(four)) => Some(Net::V4 { addr: four.to_bits(), mask: u32::MAX }),
        Value::Address(IpAddr::V6(six)) => Some(Net::V6(Box::new((six.to_bits(), u128::MAX)))),
        _ => None,
    };
    match part {
        Part::One(one) => Some((net(one)?, net(one)?)),
        Part::Span(first, last) => Some((net(first)?, net(last)?)),
        Part::Begins(_) => None,
    }
}

/// The ports that a part stands for.
pub fn ports(part: &Part) -> Option<(u16, u16)> {
    let port = |value: &Value| match value {
        Value::Number(number) => u16::try_from(*number).ok(),
        _ => None,
    };
    match part {
        Part::One(one) => Some((port(one)?, port(one)?)),
        Part::Span(first, last) => Some((port(first)?, port(last)?)),
        Part::Begins(_) => None,
    }
}

impl Expr {
    /// Itself and all that it is made of, maps' keys included.
    pub fn walk(&self, look: &mut dyn FnMut(&Self)) {
        look(self);
        match self {
            Self::Concat(parts) => parts.iter().for_each(|part| part.walk(look)),
            Self::Bits { left, right, .. } => {
                left.walk(look);
                right.walk(look);
            }
            Self::Map { key, .. } => key.walk(look),
            Self::Constant(_) | Self::Field(_) | Self::Number { .. } | Self::Unknown(_) => {}
        }
    }
}

impl Statement {
    /// All expressions of it.
    pub fn walk(&self, look: &mut dyn FnMut(&Expr)) {
        match self {
            Self::Match { left, right, .. } => {
                left.walk(look);
                if let Operand::Expr(right) = right {
                    right.walk(look);
                }
            }
            Self::Vmap { key, .. } | Self::Update { key, .. } => key.walk(look),
            Self::Mark(value) | Self::CtMark(value) => value.walk(look),
            Self::Nat(nat) => nat.address.iter().chain(&nat.port).for_each(|part| part.walk(look)),
            Self::Verdict(_)
            | Self::Reject(_)
            | Self::Notrack
            | Self::Limit { .. }
            | Self::Stop(_)
            | Self::Unknown(_) => {}
        }
    }

    /// The number that it draws, if it does: how many there are, the first, and whether they come in turn.
    pub fn draws(&self) -> Option<(u32, u32, bool)> {
        let mut found = None;
        self.walk(&mut |part| {
            if let Expr::Number { modulus, offset, counts } = part {
                found = Some((*modulus, *offset, *counts));
            }
        });
        found
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Address(address) => write!(f, "{address}"),
            Self::Name(name) => write!(f, "{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Value {
        Value::Address(text.parse().expect("an address"))
    }

    #[test]
    fn an_element_is_found_by_its_value_by_its_range_or_by_the_one_for_all_others() {
        let mut set = Set::default();
        let datum = |number| Some(Datum::Parts([Part::One(Value::Number(number))].into()));
        set.insert(Some(vec![Part::One(address("10.0.0.1")), Part::One(Value::Number(80))]), datum(1), None);
        let span = Part::Span(address("10.0.0.0"), address("10.0.0.255"));
        set.insert(Some(vec![span, Part::One(Value::Number(80))]), datum(2), None);
        let at = |set: &Set, text: &str, port| {
            let found = set.find(&[address(text), Value::Number(port)])?;
            match found {
                Some(Datum::Parts(parts)) => match &parts[0] {
                    Part::One(Value::Number(number)) => Some(*number),
                    _ => None,
                },
                _ => None,
            }
        };
        assert_eq!((at(&set, "10.0.0.1", 80), at(&set, "10.0.0.2", 80)), (Some(1), Some(2)));
        assert_eq!((at(&set, "10.0.1.2", 80), at(&set, "10.0.0.1", 81), at(&set, "::a00:1", 80)), (None, None, None));
        set.insert(None, datum(3), None);
        assert_eq!((at(&set, "10.0.1.2", 80), set.len()), (Some(3), 3));
    }

    #[test]
    fn a_span_holds_values_of_its_own_kind_only() {
        let ports = Part::Span(Value::Number(80), Value::Number(90));
        assert!(ports.holds(&Value::Number(80)) && ports.holds(&Value::Number(90)) && !ports.holds(&Value::Number(91)));
        assert!(!ports.holds(&address("0.0.0.85")));
        assert!(Part::Begins("veth".into()).holds(&Value::Name("veth1".into())));
    }
}
