//! How often something is read again that changes without a word.

use super::output::Clock;
use std::time::Duration;

/// Nothing is read more often than this, whatever fails.
pub const MOMENT: Duration = Duration::from_millis(100);

/// When something was read, CLOCK_MONOTONIC.
#[derive(Clone, Copy)]
pub struct Reading {
    pub begun_ns: u64,
    ended_ns: u64,
}

impl Reading {
    /// One that was begun then, and ends now.
    pub fn since(begun_ns: u64) -> Self {
        Self { begun_ns, ended_ns: Clock::now() }
    }

    /// One that took no time.
    pub const fn at(ns: u64) -> Self {
        Self { begun_ns: ns, ended_ns: ns }
    }

    /// Whether it may be read again: not more often than this, and for at most a fifth of the time.
    pub fn is_due(self, every: Duration) -> bool {
        let every = u64::try_from(every.as_nanos()).unwrap_or(u64::MAX);
        Clock::now().saturating_sub(self.ended_ns) >= every.max(4 * (self.ended_ns - self.begun_ns))
    }
}
