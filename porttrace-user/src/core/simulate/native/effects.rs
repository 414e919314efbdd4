//! What a statement does to a packet: one thing, or one of several.

use super::super::compiled::TableData;
use super::super::run::Run;
use super::super::walk::Walk;
use super::evaluate::Got;
use crate::core::model::flow::Family;
use crate::core::model::name::Name;
use crate::core::model::native::{
    Datum, Expr, Nat, NatKind, Op, Operand, Part, Source, Statement, Value, Verdict as Goes, addresses, ports,
};
use crate::core::model::rules::NatRange;
use crate::core::model::trace::Fraction;
use smallvec::{SmallVec, smallvec};
use std::net::IpAddr;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Effect<'s> {
    /// On with the next statement.
    Go,
    /// The rule does not match.
    Break,
    Verdict(&'s Goes),
    Mark(u32),
    CtMark(u32),
    Nat(NatKind, NatRange),
    Reject(&'s Name),
    Notrack,
    Remember {
        set: &'s Name,
        address: IpAddr,
        there: bool,
    },
    Stop(&'s Name),
    /// Nobody knows, and what follows hangs on it.
    Unknown(String),
}

/// An effect, and what decides for it.
pub(super) struct Outcome<'s> {
    pub(super) why: Why,
    pub(super) effect: Effect<'s>,
}

pub(super) enum Why {
    Sure,
    Random {
        chance: Fraction,
        taken: bool,
    },
    /// One of several, counted from 0.
    Drawn {
        chance: Fraction,
        number: u32,
    },
    /// Whether packets before this one put its address into a set.
    Affinity {
        taken: bool,
    },
    Assumed {
        text: String,
        taken: bool,
    },
}

pub(super) type Outcomes<'s> = SmallVec<[Outcome<'s>; 1]>;

/// An answer that may be open.
enum Answer {
    Is(bool),
    /// What of, and whether it is about a client that was seen before.
    Open(String, bool),
}

/// More numbers than these are not drawn one by one.
const MOST_DRAWN: u32 = 4096;

impl<'s> Run<'s> {
    /// What the statement may do to the packet; more than one thing where that is drawn or not known.
    pub(super) fn outcomes(&mut self, walk: &Walk<'s>, table: &'s TableData, statement: &'s Statement) -> Outcomes<'s> {
        let Some((modulus, offset, counts)) = statement.draws() else {
            return self.drawn(walk, table, statement, None);
        };
        if modulus > MOST_DRAWN {
            let because = format!("a number below {modulus} is drawn: too many to follow");
            return sure(Effect::Unknown(because));
        }
        if counts {
            self.assume("numbers that come in turn (numgen inc) are taken as drawn: where they stand is not known");
        }
        // How many of the numbers lead to each.
        let mut found: Vec<(Effect<'s>, u64)> = Vec::new();
        for number in 0..modulus.max(1) {
            let mut outcomes = self.drawn(walk, table, statement, Some(offset.wrapping_add(number)));
            if outcomes.len() != 1 {
                return outcomes;
            }
            let Some(Outcome { effect, .. }) = outcomes.pop() else { continue };
            match found.iter_mut().find(|(known, _)| *known == effect) {
                Some((_, count)) => *count += 1,
                None => found.push((effect, 1)),
            }
        }
        if let [(_, _)] = found.as_slice() {
            return found.into_iter().flat_map(|(effect, _)| sure(effect)).collect();
        }
        let is_match = matches!(statement, Statement::Match { .. });
        let outcome = |(number, (effect, count)): (u32, (Effect<'s>, u64))| {
            let chance = Fraction::new(count, u64::from(modulus));
            let why = match is_match {
                true => Why::Random { chance, taken: effect != Effect::Break },
                false => Why::Drawn { chance, number },
            };
            Outcome { why, effect }
        };
        (0..).zip(found).map(outcome).collect()
    }

    /// The same with the number that is drawn.
    fn drawn(
        &mut self,
        walk: &Walk<'s>,
        table: &'s TableData,
        statement: &'s Statement,
        number: Option<u32>,
    ) -> Outcomes<'s> {
        match statement {
            Statement::Match { left, op, right } => match self.compare(walk, table, (left, *op, right), number) {
                Answer::Is(true) => sure(Effect::Go),
                Answer::Is(false) => sure(Effect::Break),
                Answer::Open(text, affinity) => either(&text, affinity),
            },
            Statement::Verdict(verdict) => sure(Effect::Verdict(verdict)),
            Statement::Vmap { key, map } => self.vmap(walk, table, (key, map), number),
            Statement::Mark(value) => self.marked(walk, table, value, Effect::Mark),
            Statement::CtMark(value) => self.marked(walk, table, value, Effect::CtMark),
            Statement::Nat(nat) => sure(self.nat_range(walk, table, nat, number)),
            Statement::Reject(with) => sure(Effect::Reject(with)),
            Statement::Notrack => sure(Effect::Notrack),
            Statement::Update { set, key, removes } => {
                let set = table.set(*set).map(|set| &set.name);
                sure(match (set, self.evaluate(walk, table, key, None)) {
                    (Some(set), Got::Values(key)) => match key.as_slice() {
                        [Value::Address(address)] => Effect::Remember { set, address: *address, there: !removes },
                        _ => Effect::Go,
                    },
                    (_, Got::Missing) => Effect::Break,
                    _ => Effect::Go,
                })
            }
            Statement::Limit { over } => {
                self.assume("rate limits (limit rate) are taken as not used up: the packet finds a full bucket");
                sure(if *over { Effect::Break } else { Effect::Go })
            }
            Statement::Stop(what) => sure(Effect::Stop(what)),
            Statement::Unknown(what) => either(&format!("whether {what} matches"), false),
        }
    }

    fn marked(
        &mut self,
        walk: &Walk<'s>,
        table: &'s TableData,
        value: &'s Expr,
        effect: fn(u32) -> Effect<'s>,
    ) -> Outcomes<'s> {
        sure(match self.evaluate(walk, table, value, None) {
            Got::Values(values) => match values.as_slice() {
                // `skb->mark` has 32 bits.
                [Value::Number(mark)] => effect(*mark as u32),
                _ => Effect::Unknown("which mark a rule sets is not known".to_owned()),
            },
            Got::Missing => Effect::Break,
            Got::Unknown(why) => Effect::Unknown(format!("which mark a rule sets is not known: {why}")),
        })
    }

    fn vmap(
        &mut self,
        walk: &Walk<'s>,
        table: &'s TableData,
        (key, map): (&'s Expr, &'s Source),
        number: Option<u32>,
    ) -> Outcomes<'s> {
        let key = match self.evaluate(walk, table, key, number) {
            Got::Values(key) => key,
            Got::Missing => return sure(Effect::Break),
            Got::Unknown(why) => return lookup_open(&why),
        };
        let Some(map) = table.source(map) else { return lookup_open("the map is not known") };
        match map.find(&key) {
            Some(Some(Datum::Verdict(verdict))) => sure(Effect::Verdict(verdict)),
            Some(_) => lookup_open("what the map leads to is not understood"),
            None if map.has_unknown => lookup_open("the map has elements that are not understood"),
            None if map.dynamic => lookup_open("packets put elements into the map"),
            None => sure(Effect::Break),
        }
    }

    fn nat_range(&mut self, walk: &Walk<'s>, table: &'s TableData, nat: &'s Nat, number: Option<u32>) -> Effect<'s> {
        let mut range =
            NatRange { random: nat.random, persistent: nat.persistent, of_ports: false, ..NatRange::default() };
        for (part, is_port) in [(&nat.address, false), (&nat.port, true)] {
            let Some(part) = part else { continue };
            let parts = match self.parts(walk, table, part, number) {
                Ok(Some(parts)) => parts,
                Ok(None) => return Effect::Break,
                Err(why) => return Effect::Unknown(format!("where a rule sends the packet is not known: {why}")),
            };
            // A map may have a port beside the address.
            let understood = match parts.as_slice() {
                [port] if is_port => ports(port).map(|ports| range.ports = Some(ports)),
                [address] => addresses(address).map(|addresses| range.addresses = Some(addresses)),
                [address, port] => addresses(address).zip(ports(port)).map(|(addresses, ports)| {
                    (range.addresses, range.ports) = (Some(addresses), Some(ports));
                }),
                _ => None,
            };
            if understood.is_none() {
                return Effect::Unknown("where a rule sends the packet is not understood".to_owned());
            }
        }
        // `nft_nat_inet_eval`: a rule of family inet does nothing to the other family's packets, and matches.
        let other = range.addresses.as_ref().is_some_and(|(first, _)| Family::of(first.address()) != walk.family());
        if other { Effect::Go } else { Effect::Nat(nat.kind, range) }
    }

    /// An expression that may be a range. `None`: the rule does not match.
    fn parts(
        &mut self,
        walk: &Walk<'s>,
        table: &'s TableData,
        part: &'s Expr,
        number: Option<u32>,
    ) -> Result<Option<Vec<Part>>, String> {
        match part {
            Expr::Constant(parts) => Ok(Some(parts.to_vec())),
            Expr::Map { key, map } => Ok(self.mapped(walk, table, (key, map), number)?.map(<[Part]>::to_vec)),
            other => match self.evaluate(walk, table, other, number) {
                Got::Values(values) => Ok(Some(values.into_iter().map(Part::One).collect())),
                Got::Missing => Ok(None),
                Got::Unknown(why) => Err(why),
            },
        }
    }

    fn compare(
        &mut self,
        walk: &Walk<'s>,
        table: &'s TableData,
        (left, op, right): (&'s Expr, Op, &'s Operand),
        number: Option<u32>,
    ) -> Answer {
        let left = match self.evaluate(walk, table, left, number) {
            Got::Values(left) => left,
            Got::Missing => return Answer::Is(false),
            Got::Unknown(why) => return Answer::Open(why, false),
        };
        let evaluated;
        let parts = match right {
            Operand::Parts(parts) => &**parts,
            Operand::Set(source) => return self.member(walk, table, &left, op == Op::IsNot, source),
            Operand::Unknown(what) => return Answer::Open(format!("what {what} is"), false),
            Operand::Expr(right) => match self.parts(walk, table, right, number) {
                Ok(Some(parts)) => {
                    evaluated = parts;
                    &evaluated
                }
                Ok(None) => return Answer::Is(false),
                Err(why) => return Answer::Open(why, false),
            },
        };
        let is = || left.len() == parts.len() && parts.iter().zip(&left).all(|(part, value)| part.holds(value));
        let ordered = || match (left.as_slice(), parts) {
            ([left], [Part::One(right)]) => Some(left.cmp(right)),
            _ => None,
        };
        let bits = || match (left.as_slice(), parts) {
            ([Value::Number(left)], [Part::One(Value::Number(right))]) => Some(left & right),
            _ => None,
        };
        let answer = match op {
            Op::Is => Some(is()),
            Op::IsNot => Some(!is()),
            Op::Any => bits().map(|common| common != 0),
            Op::Nothing => bits().map(|common| common == 0),
            Op::Less => ordered().map(std::cmp::Ordering::is_lt),
            Op::Greater => ordered().map(std::cmp::Ordering::is_gt),
            Op::AtMost => ordered().map(std::cmp::Ordering::is_le),
            Op::AtLeast => ordered().map(std::cmp::Ordering::is_ge),
        };
        answer.map_or_else(|| Answer::Open("how two things compare".to_owned(), false), Answer::Is)
    }

    /// Whether a set holds the key (`nft_lookup_eval`).
    fn member(
        &self,
        walk: &Walk<'s>,
        table: &'s TableData,
        key: &[Value],
        negated: bool,
        source: &'s Source,
    ) -> Answer {
        let Some(set) = table.source(source) else { return Answer::Open("what is in the set".to_owned(), false) };
        if let [Value::Address(address)] = key {
            let mut own = walk.remembered.iter().rev();
            if let Some((.., there)) = own.find(|(name, known, _)| **name == *set.name && known == address) {
                return Answer::Is(*there != negated);
            }
        }
        if set.dynamic && self.sim.sets_move {
            return Answer::Open(format!("whether {} is in set {}", shown(key), set.name), !negated);
        }
        match set.find(key).is_some() {
            false if set.has_unknown => Answer::Open(format!("whether {} is in set {}", shown(key), set.name), false),
            is => Answer::Is(is != negated),
        }
    }
}

fn shown(key: &[Value]) -> String {
    key.iter().map(ToString::to_string).collect::<Vec<_>>().join(" . ")
}

fn sure(effect: Effect<'_>) -> Outcomes<'_> {
    smallvec![Outcome { why: Why::Sure, effect }]
}

/// It matches, or it does not.
fn either<'s>(text: &str, affinity: bool) -> Outcomes<'s> {
    let why = |taken| match affinity {
        true => Why::Affinity { taken },
        false => Why::Assumed { text: text.to_owned(), taken },
    };
    [(true, Effect::Go), (false, Effect::Break)]
        .into_iter()
        .map(|(taken, effect)| Outcome { why: why(taken), effect })
        .collect()
}

/// A look-up that may lead anywhere, or nowhere.
fn lookup_open<'s>(why: &str) -> Outcomes<'s> {
    let text = format!("the look-up finds something: {why}");
    let because = format!("where a look-up leads is not known: {why}");
    [(true, Effect::Unknown(because)), (false, Effect::Break)]
        .into_iter()
        .map(|(taken, effect)| Outcome { why: Why::Assumed { text: text.clone(), taken }, effect })
        .collect()
}
