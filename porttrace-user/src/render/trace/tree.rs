//! Branches as a tree: what they share is there once.

use crate::core::model::trace::{Branch, Decision, Fraction, Hop};

/// A stretch of hops that all branches below it share.
#[derive(Debug)]
pub struct Node<'a> {
    pub hops: Vec<&'a Hop>,
    pub end: End<'a>,
}

#[derive(Debug)]
pub enum End<'a> {
    Leaf(&'a Branch),
    Fork(Vec<Child<'a>>),
}

/// One way to go on, and what sends a packet there.
#[derive(Debug)]
pub struct Child<'a> {
    pub decisions: &'a [Decision],
    /// Of all packets, not only of those that come this far.
    pub probability: Fraction,
    pub node: Node<'a>,
}

/// A branch with its hops at hand.
struct Path<'a> {
    branch: &'a Branch,
    hops: Vec<&'a Hop>,
}

/// Builds the tree; `None` when there are no branches.
pub fn build(branches: &[Branch]) -> Option<Node<'_>> {
    let paths: Vec<Path<'_>> =
        branches.iter().map(|branch| Path { branch, hops: branch.hops.iter().collect() }).collect();
    (!paths.is_empty()).then(|| node(&paths.iter().collect::<Vec<_>>(), 0, 0))
}

impl<'a> Node<'a> {
    /// The branches below, in order.
    pub fn leaves(&self) -> Vec<&'a Branch> {
        match &self.end {
            End::Leaf(branch) => vec![branch],
            End::Fork(children) => children.iter().flat_map(|child| child.node.leaves()).collect(),
        }
    }

    fn mass(&self) -> Fraction {
        match &self.end {
            End::Leaf(branch) => branch.probability,
            End::Fork(children) => {
                let chance = children.iter().all(Child::by_chance);
                let masses = children.iter().map(|child| child.probability);
                if chance { sum(masses) } else { masses.fold(Fraction::new(0, 1), larger) }
            }
        }
    }
}

impl Child<'_> {
    /// Whether chance alone leads here; otherwise the probability holds if what was assumed is so.
    pub fn by_chance(&self) -> bool {
        self.decisions.iter().all(is_chance)
    }
}

/// Whether probabilities of siblings add up; assumptions leave each sibling the full one.
const fn is_chance(decision: &Decision) -> bool {
    matches!(decision, Decision::Random { .. } | Decision::Drawn { .. })
}

fn node<'a>(paths: &[&Path<'a>], at: usize, decided: usize) -> Node<'a> {
    let first = paths[0];
    let shared = first.hops[at..]
        .iter()
        .enumerate()
        .take_while(|(i, hop)| paths[1..].iter().all(|path| path.hops.get(at + i) == Some(*hop)))
        .count();
    let hops = first.hops[at..at + shared].to_vec();
    if let [only] = paths {
        return Node { hops, end: End::Leaf(only.branch) };
    }
    let decided = decided
        + first.branch.decisions[decided.min(first.branch.decisions.len())..]
            .iter()
            .enumerate()
            .take_while(|(i, decision)| {
                paths[1..].iter().all(|path| path.branch.decisions.get(decided + i) == Some(*decision))
            })
            .count();
    let children = groups(paths, at + shared).into_iter().map(|group| child(&group, at + shared, decided)).collect();
    Node { hops, end: End::Fork(children) }
}

/// Paths by their next hop, in the order of first appearance; paths that end here stand alone.
fn groups<'p, 'a>(paths: &[&'p Path<'a>], at: usize) -> Vec<Vec<&'p Path<'a>>> {
    let mut groups: Vec<Vec<&Path<'a>>> = Vec::new();
    for path in paths {
        let next = path.hops.get(at);
        match groups.iter_mut().rev().find(|group| next.is_some() && group[0].hops.get(at) == next) {
            Some(group) => group.push(path),
            None => groups.push(vec![path]),
        }
    }
    groups
}

fn child<'a>(group: &[&Path<'a>], at: usize, decided: usize) -> Child<'a> {
    let mine = &group[0].branch.decisions;
    let common = mine
        .iter()
        .enumerate()
        .take_while(|(i, decision)| group[1..].iter().all(|path| path.branch.decisions.get(*i) == Some(*decision)))
        .count();
    let node = node(group, at, decided);
    Child { decisions: mine.get(decided..common).unwrap_or_default(), probability: node.mass(), node }
}

fn plus(a: Fraction, b: Fraction) -> Fraction {
    let mut num = u128::from(a.num) * u128::from(b.den) + u128::from(b.num) * u128::from(a.den);
    let mut den = u128::from(a.den) * u128::from(b.den);
    let common = gcd(num, den).max(1);
    (num, den) = (num / common, den / common);
    while num.max(den) > u128::from(u64::MAX) {
        (num, den) = (num >> 1, den >> 1);
    }
    Fraction::new(num as u64, den as u64)
}

fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

fn larger(a: Fraction, b: Fraction) -> Fraction {
    let less = u128::from(a.num) * u128::from(b.den) < u128::from(b.num) * u128::from(a.den);
    if less { b } else { a }
}

/// The sum of probabilities that exclude each other.
pub fn sum(probabilities: impl Iterator<Item = Fraction>) -> Fraction {
    probabilities.fold(Fraction::new(0, 1), plus)
}
