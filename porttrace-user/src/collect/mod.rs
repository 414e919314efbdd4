//! The outside, turned into values: a node's state live or from a snapshot, the probe's events.

pub mod snapshot;
