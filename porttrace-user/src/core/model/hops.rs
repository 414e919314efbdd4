//! The steps of a path. Branches of one trace share the steps that they have in common, so that a thousand endpoints do not
//! cost a thousand copies of the way to them.

use super::flow::Tuple;
use super::steps::{Lists, Step};
use super::trace::Hop;
use serde::{Serialize, Serializer};
use std::fmt;
use std::sync::{Arc, OnceLock};

/// A path under way: a list of steps that is cheap to copy once it is shared.
#[derive(Clone, Debug, Default)]
pub struct Path {
    before: Past,
    /// Of a path that has no segments before it.
    origin: Option<Arc<Origin>>,
    steps: Vec<Step>,
}

impl Path {
    /// An empty path of a packet that begins as `tuple`; `lists` is what the numbers in its steps stand for.
    pub fn begin(lists: Arc<Lists>, tuple: Tuple) -> Self {
        Self { origin: Some(Arc::new(Origin { lists, tuple })), ..Self::default() }
    }

    pub fn push(&mut self, step: Step) {
        self.steps.push(step);
    }

    /// Makes all steps so far common to this path and its copies to come.
    pub fn share(&mut self) {
        if !self.steps.is_empty() || self.origin.is_some() {
            let past = Segment::from(std::mem::take(self));
            self.before = Past(Some(Arc::new(past)));
        }
        self.steps.reserve(16);
    }
}

/// The steps of a finished path, told as hops when somebody first asks for them.
#[derive(Clone, Default)]
pub struct Hops(Segment);

#[derive(Clone, Default)]
struct Segment {
    before: Past,
    origin: Option<Arc<Origin>>,
    steps: Vec<Step>,
    told: OnceLock<Box<Told>>,
}

impl From<Path> for Segment {
    fn from(Path { before, origin, steps }: Path) -> Self {
        Self { before, origin, steps, told: OnceLock::new() }
    }
}

impl From<Path> for Hops {
    fn from(path: Path) -> Self {
        Self(path.into())
    }
}

/// The segments before one.
#[derive(Clone, Default)]
struct Past(Option<Arc<Segment>>);

#[derive(Debug)]
struct Origin {
    lists: Arc<Lists>,
    tuple: Tuple,
}

/// A segment in words, and what the packet looks like behind it.
#[derive(Clone)]
struct Told {
    hops: Vec<Hop>,
    tuple: Option<Tuple>,
}

impl Hops {
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Hop> {
        let mut segments = vec![&self.0];
        while let Some(before) = segments.last().and_then(|segment| segment.before.0.as_deref()) {
            segments.push(before);
        }
        segments.reverse();
        let origin = segments.first().and_then(|first| first.origin.as_deref());
        let mut tuple = origin.map(|origin| origin.tuple);
        let told = segments.into_iter().map(move |segment| {
            let told = segment.told.get_or_init(|| Box::new(segment.tell(origin, tuple)));
            tuple = told.tuple;
            &told.hops
        });
        told.collect::<Vec<_>>().into_iter().flatten()
    }

    pub fn len(&self) -> usize {
        self.iter().count()
    }

    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }
}

impl Segment {
    fn tell(&self, origin: Option<&Origin>, tuple: Option<Tuple>) -> Told {
        let (Some(origin), Some(mut tuple)) = (origin, tuple) else { return Told { hops: Vec::new(), tuple } };
        let hops = origin.lists.tell(&self.steps, &mut tuple);
        Told { hops, tuple: Some(tuple) }
    }
}

/// A long chain of segments is taken apart in a loop, not by recursion.
impl Drop for Past {
    fn drop(&mut self) {
        let mut next = self.0.take();
        while let Some(mut segment) = next.and_then(Arc::into_inner) {
            next = segment.before.0.take();
        }
    }
}

/// A path that nobody walked, for tests.
impl From<Vec<Hop>> for Hops {
    fn from(hops: Vec<Hop>) -> Self {
        let told = Box::new(Told { hops, tuple: None });
        Self(Segment { told: OnceLock::from(told), ..Segment::default() })
    }
}

impl<'a> IntoIterator for &'a Hops {
    type Item = &'a Hop;
    type IntoIter = Box<dyn DoubleEndedIterator<Item = &'a Hop> + 'a>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.iter())
    }
}

impl PartialEq for Hops {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Hops {}

impl fmt::Debug for Past {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "…" } else { "" })
    }
}

impl fmt::Debug for Hops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Serialize for Hops {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::flow::{Proto, Tuple};

    fn begin() -> Path {
        let address = |text: &str| text.parse().expect("an address");
        Path::begin(Arc::default(), Tuple::new(Proto::Tcp, address("10.0.0.1:1"), address("10.0.0.2:2")))
    }

    fn note(text: &'static str) -> Hop {
        Hop::Note { text: text.into() }
    }

    #[test]
    fn forks_share_the_past_and_part_ways() {
        let mut one = begin();
        one.push(Step::Note("a".into()));
        one.share();
        let mut two = one.clone();
        one.push(Step::Note("b".into()));
        two.push(Step::Note("c".into()));
        let (one, two) = (Hops::from(one), Hops::from(two));
        assert_eq!(one, Hops::from(vec![note("a"), note("b")]));
        assert_eq!(two, Hops::from(vec![note("a"), note("c")]));
        assert_eq!(one.iter().next_back(), Some(&note("b")));
        assert_eq!(two.len(), 2);
    }

    #[test]
    fn a_fork_before_the_first_step_knows_where_it_began() {
        let mut one = begin();
        one.share();
        let mut two = one.clone();
        two.push(Step::LocalSend);
        let (one, two) = (Hops::from(one), Hops::from(two));
        assert!(one.is_empty());
        let hops: Vec<&Hop> = two.iter().collect();
        assert!(matches!(hops[..], [Hop::LocalSend { tuple }] if tuple.dport == 2), "{hops:?}");
    }

    #[test]
    fn a_very_long_list_is_dropped_without_recursion() {
        let mut path = begin();
        for _ in 0..50_000 {
            path.push(Step::Note("".into()));
            path.share();
        }
        drop(path);
    }
}
