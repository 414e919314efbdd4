//! The lab: a cluster of network namespaces on one machine, and what the tests that run in it need.

pub mod bpf;
pub mod fuzz;
pub mod lab;
pub mod lines;
pub mod load;
mod netlink;
pub mod netns;
pub mod nodeport;
pub mod oracle;
pub mod peer;
pub mod privilege;
pub mod refuse;
pub mod reload;
pub mod runtime;
pub mod watch;
