//! Who may serve a port beside the rules that are followed.

use super::ebpf::{self, Network};
use crate::core::model::state::NodeState;

/// What to do where IPVS decides.
pub const IPVS_ADVICE: &str = "ask IPVS (`ipvsadm -Ln`), and go by what `porttrace watch` observes";

/// What to do where native nftables rules may decide that could not be read.
pub const NATIVE_ADVICE: &str = "install nft, by which porttrace reads them, and go by what `porttrace watch` observes";

/// Who may serve a port that no rule claims which is followed.
pub enum Server {
    Ebpf(Network),
    /// Its virtual servers with this port.
    Ipvs(String),
    /// Tables of native nftables rules that could not be read.
    Native(String),
    Nobody,
}

impl Server {
    pub fn of(state: &NodeState, port: u16) -> Self {
        let native = || state.native_dnat().map_or(Self::Nobody, Self::Native);
        match (ebpf::serving(state), state.virtual_servers(port)) {
            (Some(network), _) => Self::Ebpf(network),
            (None, Some(servers)) => Self::Ipvs(servers),
            (None, None) => native(),
        }
    }

    /// Whom to ask instead.
    pub const fn advice(&self) -> Option<&'static str> {
        match self {
            Self::Ebpf(network) => Some(network.advice()),
            Self::Ipvs(_) => Some(IPVS_ADVICE),
            Self::Native(_) => Some(NATIVE_ADVICE),
            Self::Nobody => None,
        }
    }

    /// Of a port that is known to be a Service's NodePort.
    pub fn of_node_port(&self, place: &str, sockets: &str) -> String {
        match self {
            Self::Ebpf(network) => {
                format!("{place}, which {} serves in eBPF: no rule tells what a client meets{sockets}", network.name())
            }
            Self::Ipvs(servers) => {
                format!("{place}, which IPVS takes (virtual server {servers}): {NOT_FOLLOWED}{sockets}")
            }
            Self::Native(tables) => {
                format!("{place}; no rule that could be read serves it{sockets}; native nftables rules may ({tables})")
            }
            Self::Nobody => format!("{place}, but no rule of this node serves it{sockets}"),
        }
    }

    /// Of one that is not.
    pub fn of_port(&self, port: u16, node: &str, sockets: &str) -> String {
        match self {
            Self::Ebpf(network) => format!(
                "no rule of {node} claims port {port}{sockets}; {} serves {} in eBPF here, and this may be one of them",
                network.name(),
                network.serves()
            ),
            Self::Ipvs(servers) => {
                format!("IPVS takes port {port} of {node} (virtual server {servers}): {NOT_FOLLOWED}{sockets}")
            }
            Self::Native(tables) => format!(
                "no rule of {node} that could be read claims port {port}{sockets}; native nftables rules may ({tables})"
            ),
            Self::Nobody => format!("nobody claims port {port} on {node}: it is no NodePort and no hostPort{sockets}"),
        }
    }
}

const NOT_FOLLOWED: &str = "that is not followed";
