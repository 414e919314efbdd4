//! The live log: one connection as a block of text, or as JSON lines.

pub mod block;
pub mod header;
mod inside;
pub mod json;
mod listener;
pub mod predicted;
mod silence;
pub mod words;

pub use crate::core::correlate::inside::Report;

use crate::core::correlate::inside::Inside;
use crate::core::correlate::sight::Sight;
use crate::core::kube::owners::Owners;
use crate::core::model::interfaces::Interfaces;
use crate::core::model::pods::PodSockets;
use crate::core::model::workloads::Workloads;
use std::collections::BTreeMap;

/// What the printer knows besides the connection itself.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    pub interfaces: &'a Interfaces,
    /// Who stands behind addresses and ports.
    pub owners: &'a Owners,
    /// What listens inside this node's pods.
    pub pods: &'a PodSockets,
    /// Who these pods are, where Kubernetes or the container runtime told it.
    pub workloads: &'a Workloads,
    /// `enum skb_drop_reason` of the running kernel.
    pub drop_reasons: &'a BTreeMap<u32, String>,
    /// What of the node's own part of the way would have been seen.
    pub sight: Sight,
    /// The silence after which a connection was judged, nanoseconds.
    pub silence_ns: u64,
}

impl<'a> Context<'a> {
    /// The same for lines of a pod: its interfaces are others.
    pub fn seen_by(&self, inside: Option<&'a Inside>) -> Self {
        Self { interfaces: inside.map_or(self.interfaces, |inside| &inside.interfaces), ..*self }
    }

    /// The kernel's name of a drop reason, or its number.
    pub fn drop_reason(&self, reason: u32) -> String {
        self.drop_reasons.get(&reason).cloned().unwrap_or_else(|| format!("reason {reason}"))
    }
}
