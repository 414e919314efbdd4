//! Text to model. A line that is not understood becomes a diagnostic; the rest is kept.

pub mod conntrack;
pub mod cri;
pub mod drops;
mod facts;
pub mod iproute;
pub mod ipset;
pub mod iptables;
mod iptables_blocks;
mod iptables_matches;
mod iptables_modules;
mod iptables_options;
mod iptables_targets;
pub mod ipvs;
pub mod kube_proxy;
pub mod listing;
pub mod native;
pub mod nftables;
pub mod notes;
pub mod objects;
pub mod paste;
pub mod recent;
pub mod rulesets;
pub mod sockets;
mod state;
pub mod sysctl;
pub mod words;

pub use facts::facts;
pub use state::{FORMAT, Files, Metadata, state, state_of, with_network};
