//! Native nftables rules as values: what libnftables prints as JSON (libnftables-json(5)), as far as it decides a packet's way.

use super::flow::{Direction, Family};
use super::name::Name;
pub use super::sets::{Datum, Part, Set, Value, addresses, ports};
use super::trace::Hook;

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
    /// 1: the route back to the source leads by the interface where the packet came from (`fib saddr . iif oif exists`), as its
    /// mark has it where `marked`; 0: it does not.
    ReversePath {
        marked: bool,
    },
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
