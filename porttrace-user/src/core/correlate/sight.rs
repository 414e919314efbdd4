//! What of a packet's way would have been seen: only then does it mean something that it was not.

use crate::core::model::flow::Tuple;
use crate::core::model::trace::{Branch, Verdict};

/// What a probe sees of the way behind the rules, whatever becomes of a packet there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// That it is handed to a socket here.
    pub delivery: bool,
    /// By which interface it leaves when it was rewritten.
    pub rewritten: bool,
}

impl Sight {
    /// Everything.
    pub const WHOLE: Self = Self { delivery: true, rewritten: true };

    /// How a request ends by the rules, where nothing would have shown it.
    pub fn misses(self, request: Tuple, branch: Option<&Branch>) -> Option<&Verdict> {
        let verdict = &branch?.verdict;
        let is_missed = match verdict {
            Verdict::Delivered { .. } => !self.delivery,
            Verdict::Forwarded { to, .. } => !self.rewritten && *to != request,
            _ => false,
        };
        is_missed.then_some(verdict)
    }
}
