//! Rules that a packet passed although they nearly matched: all but one of the conditions that can be decided from the packet
//! held, the port (or, without one, the address) among them.

use super::model::flow::Tuple;
use super::model::rules::{Match, MatchKind, Net, PortSide, Rule};
use super::model::trace::{Action, Branch, Hook, Hop, RuleRef};
use std::net::IpAddr;

/// A rule that was passed, and the one condition that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NearMiss {
    pub hook: Hook,
    pub rule: RuleRef,
    /// The rule, as iptables-save writes it.
    pub text: String,
    /// The condition that did not hold, as the rule has it.
    pub failed: String,
}

/// The near misses of one branch, in the order in which the packet passed them.
pub fn near_misses(branch: &Branch) -> Vec<NearMiss> {
    let mut walk = Walk { found: Vec::new(), stack: Vec::new(), seen: None };
    for hop in &branch.hops {
        walk.hop(hop);
    }
    walk.leave(None);
    walk.found
}

/// What is known of the packet at a hop.
#[derive(Clone, Debug)]
struct Seen {
    tuple: Tuple,
    input: Option<String>,
    output: Option<String>,
    mark: u32,
}

/// A chain that is being walked: how many of its rules were passed.
struct Open {
    hook: Hook,
    place: RuleRef,
    passed: u32,
}

struct Walk {
    found: Vec<NearMiss>,
    stack: Vec<Open>,
    seen: Option<Seen>,
}

impl Walk {
    fn hop(&mut self, hop: &Hop) {
        match hop {
            Hop::Receive { interface, tuple } => {
                self.seen = Some(Seen { tuple: *tuple, input: Some(interface.to_string()), output: None, mark: 0 });
            }
            Hop::LocalSend { tuple } => {
                self.seen = Some(Seen { tuple: *tuple, input: None, output: None, mark: 0 });
            }
            Hop::Rule { hook, rule, action, .. } => self.rule(*hook, rule, action),
            Hop::Rewrite { after, .. } => {
                if let Some(seen) = &mut self.seen {
                    seen.tuple = *after;
                }
            }
            Hop::Route { decision } => {
                self.leave(None);
                if let Some(seen) = &mut self.seen {
                    seen.output = decision.interface.as_ref().map(ToString::to_string);
                }
            }
            Hop::Transmit { .. } | Hop::Deliver { .. } => self.leave(None),
            Hop::Conntrack { .. } | Hop::ReplyRewrite { .. } | Hop::Note { .. } => {}
        }
    }

    fn rule(&mut self, hook: Hook, rule: &RuleRef, action: &Action) {
        self.leave(Some((hook, rule)));
        let top = self.stack.iter().rposition(|open| open.hook == hook && open.place.same_chain(rule));
        let index = top.unwrap_or_else(|| {
            self.stack.push(Open { hook, place: rule.clone(), passed: 0 });
            self.stack.len() - 1
        });
        let until = rule.number().unwrap_or(u32::MAX);
        self.pass(index, until.saturating_sub(1));
        self.stack[index].passed = until;
        match (action, &mut self.seen) {
            (Action::Mark { mark }, Some(seen)) => seen.mark = *mark,
            (Action::Jump { chain } | Action::Goto { chain }, _) => {
                self.stack.push(Open { hook, place: RuleRef::new(chain.clone(), None), passed: 0 });
            }
            _ => {}
        }
    }

    /// Closes the chains above the one that `next` is in; a chain that ran out was passed as a whole.
    fn leave(&mut self, next: Option<(Hook, &RuleRef)>) {
        let keep = next.and_then(|(hook, rule)| {
            self.stack.iter().rposition(|open| open.hook == hook && open.place.same_chain(rule))
        });
        let floor = keep.map_or(0, |index| index + 1);
        for index in (floor..self.stack.len()).rev() {
            // A verdict inside (ACCEPT, DNAT) ends the chains around it without passing their rules.
            if index + 1 == self.stack.len() && self.stack[index].passed == 0 {
                self.pass(index, u32::MAX);
            }
            self.stack.truncate(index);
        }
    }

    /// Looks at the rules of an open chain up to and including number `until`.
    fn pass(&mut self, index: usize, until: u32) {
        let (Some(seen), Some(open)) = (self.seen.clone(), self.stack.get(index)) else { return };
        let Some(chain) = open.place.chain() else { return };
        let passed = (1u32..).zip(&chain.rules).skip(open.passed as usize).take_while(|(number, _)| *number <= until);
        let misses = passed.filter_map(|(number, rule)| {
            let failed = near(rule, &seen)?;
            let place = RuleRef::new(open.place.place(), Some(number));
            Some(NearMiss { hook: open.hook, rule: place, text: rule.text.to_string(), failed })
        });
        let misses: Vec<NearMiss> = misses.collect();
        self.found.extend(misses);
    }
}

/// The one condition that failed, if the rule was nearly matched.
fn near(rule: &Rule, seen: &Seen) -> Option<String> {
    let mut failed: Option<&Match> = None;
    let (mut port, mut address) = (None, None);
    for part in &rule.matches {
        let Some(plain) = holds(&part.kind, seen) else { continue };
        let holds = plain != part.negated;
        match &part.kind {
            MatchKind::DestinationPort(..) | MatchKind::Multiport(PortSide::Destination | PortSide::Either, _) => {
                port = Some(holds);
            }
            MatchKind::Destination(_) if !part.negated => address = Some(holds),
            _ => {}
        }
        if !holds && failed.replace(part).is_some() {
            return None;
        }
    }
    let aimed = port.or(address) == Some(true);
    failed.filter(|_| aimed).map(|part| option(rule, part))
}

/// Whether a condition holds without its `!`; `None` where the packet alone does not tell.
fn holds(kind: &MatchKind, seen: &Seen) -> Option<bool> {
    let Tuple { proto, src, sport, dst, dport } = seen.tuple;
    let among = |ranges: &[(u16, u16)], port: u16| ranges.iter().any(|(low, high)| (*low..=*high).contains(&port));
    Some(match kind {
        MatchKind::Source(net) => within(net, src),
        MatchKind::Destination(net) => within(net, dst),
        MatchKind::Protocol(number) => *number == proto.number(),
        MatchKind::SourcePort(low, high) => (*low..=*high).contains(&sport),
        MatchKind::DestinationPort(low, high) => (*low..=*high).contains(&dport),
        MatchKind::Multiport(PortSide::Source, ranges) => among(ranges, sport),
        MatchKind::Multiport(PortSide::Destination, ranges) => among(ranges, dport),
        MatchKind::Multiport(PortSide::Either, ranges) => among(ranges, sport) || among(ranges, dport),
        MatchKind::Input(name) => is_interface(name, seen.input.as_deref()?),
        MatchKind::Output(name) => is_interface(name, seen.output.as_deref()?),
        MatchKind::Mark { value, mask } => seen.mark & mask == *value,
        _ => return None,
    })
}

fn within(net: &Net, address: IpAddr) -> bool {
    match (net, address) {
        (Net::V4 { addr, mask }, IpAddr::V4(four)) => u32::from(four) & mask == addr & mask,
        (Net::V6(net), IpAddr::V6(six)) => u128::from(six) & net.1 == net.0 & net.1,
        _ => false,
    }
}

fn is_interface(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('+') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    }
}

/// The condition's own words in the rule's text.
fn option(rule: &Rule, part: &Match) -> String {
    let (start, len) = (usize::from(part.at.0), usize::from(part.at.1));
    let text = rule.text.read();
    let text = text.get(start..start + len).filter(|text| !text.is_empty()).unwrap_or("a condition");
    if part.negated && !text.starts_with('!') { format!("! {text}") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::flow::{Family, Proto};
    use crate::core::model::state::NodeState;
    use crate::core::model::trace::{Flavour, Packet};
    use crate::core::parse::iptables;
    use crate::core::simulate::Simulator;
    use std::sync::Arc;

    const RULES: &str = "*nat\n:PREROUTING ACCEPT [0:0]\n:X - [0:0]\n:Y - [0:0]\n\
        -A PREROUTING -p tcp -j X\n\
        -A PREROUTING -d 10.0.0.9/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.5\n\
        -A X -p udp -m udp --dport 80 -j Y\n\
        -A X -s 10.9.0.0/16 -p tcp -m tcp --dport 80 -j Y\n\
        -A X -s 10.9.0.0/16 -p tcp -m tcp --dport 81 -j Y\n\
        -A X -d 10.0.0.8/32 -p tcp -m tcp --dport 80 -j Y\n\
        COMMIT\n";

    #[test]
    fn rules_that_fail_by_one_condition_are_told() {
        let (rules, problems) = iptables::parse(RULES, "test", Flavour::IptablesNft, Family::V4);
        assert_eq!(problems, []);
        let state = NodeState { rulesets: vec![Arc::new(rules)], ..NodeState::default() };
        let tuple = Tuple {
            proto: Proto::Tcp,
            src: "10.0.0.1".parse().unwrap(),
            sport: 40_000,
            dst: "10.0.0.9".parse().unwrap(),
            dport: 80,
        };
        let trace = Simulator::new(&state).trace(&Packet::first_of(tuple, Some("eth0".into())));
        let misses = near_misses(&trace.branches[0]);
        let told: Vec<(u32, &str)> = misses.iter().map(|miss| (miss.rule.number().unwrap(), &*miss.failed)).collect();
        assert_eq!(told, [(1, "-p udp"), (2, "-s 10.9.0.0/16"), (4, "-d 10.0.0.8/32")]);
    }
}
