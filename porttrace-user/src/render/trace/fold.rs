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
        shape.push(Shape::Chance(child.decisions.last().is_none_or(|last| matches!(last, Decision::Random { .. }))));
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
        let leaves: Vec<_> = more.iter().flat_map(|child| child.node.leaves()).collect();
        shown.push(Shown::More { count: more.len(), together: sum(&leaves) });
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
