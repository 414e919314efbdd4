//! Sets and maps of native nftables rules, and what values are in them.

use super::name::Name;
use super::native::Verdict;
use super::rules::Net;
use foldhash::HashMap;
use std::fmt;
use std::net::IpAddr;

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
