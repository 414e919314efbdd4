//! Whether a client's port can make a difference to the path that is predicted.

use crate::core::model::flow::Direction;
use crate::core::model::native::{Expr, Field, Part, Statement};
use crate::core::model::rules::{CtField, MatchKind, NatRange, PortSide, Rule, Target};
use crate::core::model::state::NodeState;

/// Whether anything in this state decides by the port that a connection comes from. What the model leaves open (`hashlimit` by
/// port, a port that NAT draws) is open for every port alike.
pub fn matters(state: &NodeState) -> bool {
    let chains = state.all_rules().flat_map(|ruleset| &ruleset.tables).flat_map(|table| &table.chains);
    // The source of a packet is looked up with the ports the other way round.
    let routed = || state.policy.iter().flatten().any(|rule| rule.sport.is_some() || rule.dport.is_some());
    chains.flat_map(|chain| &chain.rules).any(of_rule) || routed()
}

fn of_rule(rule: &Rule) -> bool {
    rule.matches.iter().any(|found| of_match(&found.kind)) || of_target(&rule.target)
}

fn of_match(kind: &MatchKind) -> bool {
    match kind {
        MatchKind::SourcePort(..) | MatchKind::Socket(_) => true,
        MatchKind::Multiport(side, _) => *side != PortSide::Destination,
        MatchKind::CtPort(field, ..) => !matches!(field, CtField::OriginalDestination | CtField::ReplySource),
        MatchKind::Set(set) => set.source.contains(&true),
        _ => false,
    }
}

/// NAT chooses among addresses by a hash of the source with its port (`find_best_ips_proto`, net/netfilter/nf_nat_core.c), and
/// keeps a port that is in its range.
fn of_target(target: &Target) -> bool {
    let chooses = |range: &NatRange| {
        range.addresses.as_ref().is_some_and(|(first, last)| first != last)
            || range.ports.is_some_and(|(low, high)| low != high)
    };
    match target {
        Target::Dnat(range) | Target::Snat(range) | Target::Masquerade(range) | Target::Redirect(range) => {
            chooses(range)
        }
        Target::Native(all) => all.0.iter().any(of_statement),
        // Asks for established sockets first.
        Target::Tproxy(_) => true,
        _ => false,
    }
}

fn of_statement(statement: &Statement) -> bool {
    let mut found = false;
    statement.walk(&mut |part| {
        found |= match part {
            Expr::Field(Field::SourcePort(_) | Field::CtSourcePort(Direction::Original)) => true,
            Expr::Field(Field::CtDestinationPort(Direction::Reply)) => true,
            // NAT chooses among them, as above.
            Expr::Constant(parts) => parts.iter().any(|part| matches!(part, Part::Span(..))),
            _ => false,
        };
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::flow::Family;
    use crate::core::model::trace::Flavour;
    use crate::core::parse::iptables;
    use std::sync::Arc;

    fn with(rule: &str) -> NodeState {
        let text = format!("*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING {rule}\nCOMMIT\n");
        let (ruleset, notes) = iptables::parse(&text, "test", Flavour::IptablesNft, Family::V4);
        assert!(notes.is_empty(), "{notes:?}");
        NodeState { rulesets: vec![Arc::new(ruleset)], ..NodeState::default() }
    }

    #[test]
    fn only_what_looks_at_the_clients_port_matters() {
        for (rule, expected) in [
            ("-p tcp -m tcp --dport 9088 -j DNAT --to-destination 10.244.1.8:8081", false),
            ("-p tcp -m multiport --dports 9088,9089 -j MARK --set-xmark 0x2000/0x2000", false),
            ("-p tcp -m tcp --sport 1024:65535 -j RETURN", true),
            ("-p tcp -m multiport --ports 53 -j RETURN", true),
            ("-m set --match-set clients src,dst -j RETURN", true),
            ("-m set --match-set services dst,dst -j RETURN", false),
            ("-m conntrack --ctorigsrcport 53 -j RETURN", true),
            ("-p tcp -j DNAT --to-destination 10.0.0.1-10.0.0.9", true),
            ("-m statistic --mode random --probability 0.5 -j RETURN", false),
        ] {
            assert_eq!(matters(&with(rule)), expected, "{rule}");
        }
    }
}
