//! Kubernetes names, as far as a node's rules tell them.

pub mod ebpf;
pub mod hash;
mod native_owners;
pub mod owners;
pub mod server;
pub mod targets;
