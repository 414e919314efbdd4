//! The lab: a cluster of network namespaces on one machine, and what the tests that run in it need.

pub mod lab;
pub mod lines;
pub mod netns;
pub mod peer;
pub mod privilege;
