//! An index over long chains: which rules can match a packet with this destination, port and source.
//!
//! A rule stands in exactly one list: under its exact destination address, else its exact destination ports, else its exact
//! source address, else with the rules that have to be looked at every time. The lists keep the order of the chain, so that
//! walking their union visits the same candidates as walking the chain. `trace_linear` does without; a property test holds
//! the two together.

use crate::core::model::flow::Tuple;
use crate::core::model::rules::{Match, MatchKind, Net, PortSide, Rule};
use foldhash::HashMap;
use std::net::IpAddr;

/// Chains from this length on get an index.
pub(super) const LONG: usize = 12;

#[derive(Debug, Default)]
pub(super) struct Index {
    by_destination: HashMap<u128, Vec<u32>>,
    by_port: HashMap<u16, Vec<u32>>,
    by_source: HashMap<u128, Vec<u32>>,
    always: Vec<u32>,
}

enum Keys {
    Destination(u128),
    Ports(Vec<u16>),
    Source(u128),
    None,
}

impl Index {
    /// `None` where it would not save half of the way: most rules have to be looked at every time.
    pub(super) fn new(rules: &[Rule]) -> Option<Self> {
        let mut index = Self::default();
        for (at, rule) in rules.iter().enumerate() {
            let at = at as u32;
            match keys(rule) {
                Keys::Destination(address) => index.by_destination.entry(address).or_default().push(at),
                Keys::Source(address) => index.by_source.entry(address).or_default().push(at),
                Keys::Ports(mut ports) => {
                    ports.sort_unstable();
                    ports.dedup();
                    ports.into_iter().for_each(|port| index.by_port.entry(port).or_default().push(at));
                }
                Keys::None => index.always.push(at),
            }
        }
        (index.always.len() * 2 <= rules.len()).then_some(index)
    }

    /// The first rule at or after `from` that can match.
    pub(super) fn next(&self, tuple: &Tuple, from: u32) -> Option<u32> {
        let first = |list: &[u32]| list.get(list.partition_point(|&at| at < from)).copied();
        let list = |found: Option<&Vec<u32>>| found.and_then(|list| first(list));
        [
            list(self.by_destination.get(&bits(tuple.dst))),
            list(self.by_port.get(&tuple.dport)),
            list(self.by_source.get(&bits(tuple.src))),
            first(&self.always),
        ]
        .into_iter()
        .flatten()
        .min()
    }
}

fn keys(rule: &Rule) -> Keys {
    let plain = || rule.matches.iter().filter(|asked| !asked.negated).map(|Match { kind, .. }| kind);
    let host = |kind: &MatchKind, source: bool| match (kind, source) {
        (MatchKind::Destination(net), false) | (MatchKind::Source(net), true) => exact(net),
        _ => None,
    };
    if let Some(address) = plain().find_map(|kind| host(kind, false)) {
        return Keys::Destination(address);
    }
    let ports = plain().find_map(|kind| match kind {
        MatchKind::DestinationPort(low, high) if low == high => Some(vec![*low]),
        MatchKind::Multiport(PortSide::Destination, ranges) if ranges.iter().all(|(low, high)| low == high) => {
            Some(ranges.iter().map(|(port, _)| *port).collect())
        }
        _ => None,
    });
    if let Some(ports) = ports {
        return Keys::Ports(ports);
    }
    plain().find_map(|kind| host(kind, true)).map_or(Keys::None, Keys::Source)
}

fn exact(net: &Net) -> Option<u128> {
    match net {
        Net::V4 { addr, mask: u32::MAX } => Some(u128::from(*addr)),
        Net::V6(both) if both.1 == u128::MAX => Some(both.0),
        _ => None,
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(four) => u128::from(four.to_bits()),
        IpAddr::V6(six) => six.to_bits(),
    }
}
