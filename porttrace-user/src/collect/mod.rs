//! The outside, turned into values: a node's state live or from a snapshot, the probe's events.

pub mod attached;
pub mod attempt;
mod attributes;
pub mod changes;
mod cni;
pub mod conntrack;
#[cfg(feature = "cri")]
pub mod cri;
pub mod ctnetlink;
pub mod doctor;
pub mod facts;
mod host;
pub mod inside;
pub mod kube_proxy;
pub mod kubernetes;
pub mod leftovers;
pub mod links;
pub mod live;
pub mod memory;
pub mod netlink;
pub mod nftables;
pub mod pods;
pub mod probe;
pub mod ruleset;
pub mod snapshot;
pub mod sockets;
pub mod sysctl;
mod timings;
mod tool;

pub use timings::Timings;
