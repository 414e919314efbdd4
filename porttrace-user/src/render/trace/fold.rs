//! Branches that are alike are shown once in full, a few more in one line each, the rest as a count.

use super::tree::{Child, End, Node, sum};
use super::words::Outcome;
use crate::core::model::trace::{Action, Decision, Fraction, Hop};

/// From this many on, branches that are alike are folded.
const FOLD: usize = 4;
/// How many of them get a line of their own.
const BRIEF: usize = 4;

/// How a child of a fork is printed.
#[derive(Debug)]
pub enum Shown<'t, 'a> {
    Whole(&'t Child<'a>),
    /// Only the steps in which it differs from an older sibling of the same shape.
    Alike {
        child: &'t Child<'a>,
        like: &'t Child<'a>,
    },
    Brief(&'t Child<'a>),
    More {
        count: usize,
        together: Fraction,
    },
}

/// Decides for each child how it is printed; nothing is left out without a count.
pub fn fold<'t, 'a>(children: &'t [Child<'a>], all: bool) -> Vec<Shown<'t, 'a>> {
    let mut kinds: Vec<(Vec<Shape<'a>>, Vec<&'t Child<'a>>)> = Vec::new();
    for child in children {
        let mut shape = shape(&child.node);
        shape.push(Shape::Chance(
            child.decisions.last().is_none_or(|last| matches!(last, Decision::Random { .. } | Decision::Drawn { .. })),
        ));
        match kinds.iter_mut().find(|(known, _)| *known == shape) {
            Some((_, alike)) => alike.push(child),
            None => kinds.push((shape, vec![child])),
        }
    }
    kinds.iter().flat_map(|(_, alike)| show(alike, all)).collect()
}

fn show<'t, 'a>(alike: &[&'t Child<'a>], all: bool) -> Vec<Shown<'t, 'a>> {
    if all {
        return alike.iter().copied().map(Shown::Whole).collect();
    }
    let first = alike[0];
    if alike.len() < FOLD {
        let leaf = matches!(first.node.end, End::Leaf(_));
        let others = alike[1..].iter().copied();
        let others = others.map(|child| if leaf { Shown::Alike { child, like: first } } else { Shown::Whole(child) });
        return std::iter::once(Shown::Whole(first)).chain(others).collect();
    }
    let mut shown = vec![Shown::Whole(first)];
    let rest = &alike[1..];
    let (brief, more) = rest.split_at(if rest.len() <= BRIEF { rest.len() } else { BRIEF - 1 });
    shown.extend(brief.iter().copied().map(Shown::Brief));
    if !more.is_empty() {
        let together = sum(more.iter().map(|child| child.probability));
        shown.push(Shown::More { count: more.len(), together });
    }
    shown
}

/// What of a hop tells branches apart in kind, not only in their endpoint.
#[derive(Debug, PartialEq, Eq)]
enum Shape<'a> {
    Rule {
        table: &'a str,
        action: std::mem::Discriminant<Action>,
    },
    Other(std::mem::Discriminant<Hop>),
    End(Outcome),
    /// Chance leads here, nothing that had to be assumed.
    Chance(bool),
    Fork(usize),
}

fn shape<'a>(node: &Node<'a>) -> Vec<Shape<'a>> {
    let mut shapes: Vec<Shape<'a>> = node
        .hops
        .iter()
        .map(|hop| match hop {
            Hop::Rule { rule, action, .. } => {
                Shape::Rule { table: &rule.table, action: std::mem::discriminant(action) }
            }
            other => Shape::Other(std::mem::discriminant(*other)),
        })
        .collect();
    match &node.end {
        End::Leaf(branch) => shapes.push(Shape::End(Outcome::of(&branch.verdict))),
        End::Fork(children) => {
            shapes.push(Shape::Fork(children.len()));
            shapes.extend(children.iter().flat_map(|child| shape(&child.node)));
        }
    }
    shapes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::flow::{Family, Proto, Tuple};
    use crate::core::model::state::NodeState;
    use crate::core::model::trace::{Flavour, Packet};
    use crate::core::parse::iptables;
    use crate::core::simulate::Simulator;
    use crate::render::trace::tree;
    use std::fmt::Write;
    use std::sync::Arc;

    #[test]
    fn a_thousand_endpoints_are_folded_with_a_count() {
        let mut rules = "*nat\n:PREROUTING ACCEPT [0:0]\n".to_owned();
        for i in 0..1000 {
            let chance = 1.0 / f64::from(1000 - i);
            let random = format!("-m statistic --mode random --probability {chance:.11} ");
            let random = if i == 999 { String::new() } else { random };
            let to = format!("10.{}.{}.1:80", i / 250, i % 250);
            writeln!(rules, "-A PREROUTING -p tcp {random}-j DNAT --to-destination {to}").unwrap();
        }
        rules.push_str("COMMIT\n");
        let (rules, _) = iptables::parse(&rules, "test", Flavour::IptablesNft, Family::V4);
        let state = NodeState { rulesets: vec![Arc::new(rules)], routes: Some(vec![]), ..NodeState::default() };
        let (src, dst) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let tuple = Tuple { proto: Proto::Tcp, src, sport: 4000, dst, dport: 80 };
        let trace = Simulator::new(&state).trace(&Packet::first_of(tuple, Some("eth0".into())));
        let root = tree::build(&trace.branches).unwrap();
        let End::Fork(children) = &root.end else { panic!("no fork") };
        assert_eq!(children.len(), 1000);
        let shown = fold(children, false);
        assert_eq!(shown.len(), 5);
        let Some(Shown::More { count: 996, together }) = shown.last() else { panic!("{:?}", shown.last()) };
        assert!((together.as_f64() - 0.996).abs() < 1e-6, "{together}");
        assert_eq!(fold(children, true).len(), 1000);
    }
}
