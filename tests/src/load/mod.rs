//! Load: many connections to the lab's ports, fast; servers that log each of them; and what the node's own netfilter counted.

mod client;
mod datagram;
mod server;
mod truth;

pub use client::{Batch, Made, Pace, Until, make, stay_on_one_cpu, stream};
pub use datagram::{RawSender, flood};
pub use server::{Mode, Server, Servers};
pub use truth::{NewConnections, entries};

use crate::lab::Lab;
use crate::lab::topology::{DNS, FRONTEND, NodeName};
use anyhow::Result;
use std::net::SocketAddrV4;

impl Servers {
    /// Servers in every `frontend` and `dns` pod, on the ports that the lab's Services and hostPorts lead to. The lab must
    /// have been raised without servers of its own.
    pub fn in_pods(lab: &Lab, mode: Mode) -> Result<Self> {
        let mut servers = Self::new(mode);
        for node in NodeName::ALL {
            let frontend = &lab.pod("frontend", node)?.netns;
            servers.tcp(frontend, SocketAddrV4::new(node.pod_v4(FRONTEND), 80))?;
            servers.udp(frontend, SocketAddrV4::new(node.pod_v4(FRONTEND), 80))?;
            servers.udp(&lab.pod("dns", node)?.netns, SocketAddrV4::new(node.pod_v4(DNS), 53))?;
        }
        Ok(servers)
    }
}
