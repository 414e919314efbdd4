//! The kernel as the oracle: random rulesets and packets go through a real node (a network namespace) and through the
//! simulator, and the two paths are held against each other.
//!
//! A [`scenario::Scenario`] describes a router (links, addresses, routes, rules) and the packets to send. [`kernel`] builds it
//! in two network namespaces, sends the packets and reads the kernel's own rule trace. [`compare`] asks the simulator for the
//! same packets in the state that was read back from the router.

pub mod compare;
pub mod coverage;
pub mod facts;
pub mod generate;
pub mod kernel;
pub mod odds;
pub mod oracle;
pub mod recorded;
pub mod rng;
pub mod run;
pub mod scenario;
pub mod shrink;
