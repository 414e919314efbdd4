//! The live log: one connection as a block of text, or as JSON lines.

pub mod block;
pub mod header;
pub mod json;
mod listener;
pub mod words;

use crate::core::correlate::flow::Flow;
use crate::core::correlate::judge::Outcome;
use crate::core::correlate::story::Story;
use crate::core::diagnose::Finding;
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
    /// The silence after which a connection was judged, nanoseconds.
    pub silence_ns: u64,
}

impl Context<'_> {
    /// The kernel's name of a drop reason, or its number.
    pub fn drop_reason(&self, reason: u32) -> String {
        self.drop_reasons.get(&reason).cloned().unwrap_or_else(|| format!("reason {reason}"))
    }
}

/// One connection, judged and told.
#[derive(Clone, Debug)]
pub struct Report {
    pub flow: Flow,
    pub story: Story,
    pub outcome: Outcome,
    /// Why it failed, where a finding explains it.
    pub finding: Option<Finding>,
}
