//! The steps of a path. Branches of one trace share the steps that they have in common, so that a thousand endpoints do not
//! cost a thousand copies of the way to them.

use super::trace::Hop;
use serde::{Serialize, Serializer};
use std::fmt;
use std::sync::Arc;

/// A list of hops that forks cheaply.
#[derive(Clone, Default)]
pub struct Hops {
    shared: Option<Arc<Segment>>,
    own: Vec<Hop>,
}

struct Segment {
    before: Option<Arc<Segment>>,
    hops: Vec<Hop>,
}

impl Hops {
    pub fn push(&mut self, hop: Hop) {
        self.own.push(hop);
    }

    /// A second list that starts with all hops so far; from here on the two grow apart.
    pub fn fork(&mut self) -> Self {
        if !self.own.is_empty() {
            let hops = std::mem::take(&mut self.own);
            self.shared = Some(Arc::new(Segment { before: self.shared.take(), hops }));
        }
        self.own.reserve(16);
        Self { shared: self.shared.clone(), own: Vec::new() }
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Hop> {
        let mut segments = Vec::new();
        let mut at = self.shared.as_deref();
        while let Some(segment) = at {
            segments.push(segment.hops.as_slice());
            at = segment.before.as_deref();
        }
        segments.reverse();
        segments.push(&self.own);
        segments.into_iter().flatten()
    }

    pub fn len(&self) -> usize {
        self.iter().count()
    }

    pub fn is_empty(&self) -> bool {
        self.shared.is_none() && self.own.is_empty()
    }
}

/// A long chain of segments is taken apart in a loop, not by recursion.
impl Drop for Segment {
    fn drop(&mut self) {
        let mut next = self.before.take();
        while let Some(mut segment) = next.and_then(Arc::into_inner) {
            next = segment.before.take();
        }
    }
}

impl From<Vec<Hop>> for Hops {
    fn from(own: Vec<Hop>) -> Self {
        Self { shared: None, own }
    }
}

impl FromIterator<Hop> for Hops {
    fn from_iter<I: IntoIterator<Item = Hop>>(hops: I) -> Self {
        hops.into_iter().collect::<Vec<_>>().into()
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

    fn note(text: &'static str) -> Hop {
        Hop::Note { text: text.into() }
    }

    #[test]
    fn forks_share_the_past_and_part_ways() {
        let mut one = Hops::default();
        one.push(note("a"));
        let mut two = one.fork();
        one.push(note("b"));
        two.push(note("c"));
        assert_eq!(one, Hops::from(vec![note("a"), note("b")]));
        assert_eq!(two, Hops::from(vec![note("a"), note("c")]));
        assert_eq!(one.iter().next_back(), Some(&note("b")));
        assert_eq!(two.len(), 2);
    }

    #[test]
    fn a_very_long_list_is_dropped_without_recursion() {
        let mut hops = Hops::default();
        for _ in 0..50_000 {
            hops.push(note(""));
            hops.fork();
        }
        drop(hops);
    }
}
