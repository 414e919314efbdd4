//! How long the parts of a collection took.

use std::time::{Duration, Instant};

/// Parts and their durations, in the order in which they were noted; parts may have run side by side.
#[derive(Clone, Debug, Default)]
pub struct Timings {
    pub parts: Vec<(&'static str, Duration)>,
    /// Wall time of everything.
    pub total: Duration,
}

impl Timings {
    /// Runs a part that nothing runs beside.
    pub fn measure<T>(&mut self, name: &'static str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let value = work();
        self.add(name, start.elapsed());
        self.total += start.elapsed();
        value
    }

    /// The duration of a part, zero when it did not run.
    pub fn of(&self, name: &str) -> Duration {
        self.parts.iter().filter(|(part, _)| *part == name).map(|(_, took)| *took).sum()
    }

    pub(super) fn add(&mut self, name: &'static str, took: Duration) {
        self.parts.push((name, took));
    }

    /// Runs parts that note themselves; their wall time is added once.
    pub(super) fn measure_into(&mut self, work: impl FnOnce(&mut Self)) {
        let start = Instant::now();
        work(self);
        self.total += start.elapsed();
    }
}
