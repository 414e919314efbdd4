//! A node of the lab in kube-proxy's nftables mode, with portmap's nftables backend.
//!
//! Debian's portmap has no such backend yet: its rules are written here as portmap 1.9 does (portmap_nftables.go).

use super::topology::{FRONTEND, HOST_PORT, NodeName};
use super::{Lab, Phase};
use anyhow::Result;
use std::fmt::Write;
use std::net::IpAddr;

/// What real kube-proxy 1.36 (nftables mode) wrote on worker3 for the lab's Services.
pub const KUBE_PROXY: &str = include_str!("../../cases/lab/kube-proxy.nft");

/// The sandbox that portmap names in its comments.
pub const SANDBOX: &str = "bc1d537223c7f54b78e8d35b8bb4efde5e2973f4b0f233c1ff68c7abea7d2e7f";

impl Lab {
    /// Takes worker3's iptables rules away and writes native ones in their place.
    pub fn go_native(&self, phase: Phase) -> Result<()> {
        let node = self.node(NodeName::Worker3);
        node.exec(["nft", "flush", "ruleset"])?;
        node.exec_with(["nft", "-f", "-"], KUBE_PROXY)?;
        node.exec_with(["nft", "-f", "-"], &portmap(phase)).map(drop)
    }
}

/// The hostPorts of pod `frontend` on worker3.
pub fn portmap(phase: Phase) -> String {
    let mut text = String::new();
    let pod = [IpAddr::V4(NodeName::Worker3.pod_v4(FRONTEND)), IpAddr::V6(NodeName::Worker3.pod_v6(FRONTEND))];
    for address in pod {
        let (table, family, to) = match address {
            IpAddr::V4(_) => ("ip cni_hostport", "ip", format!("{address}:{}", phase.container_port())),
            IpAddr::V6(_) => ("ip6 cni_hostport", "ip6", format!("[{address}]:{}", phase.container_port())),
        };
        let comment = format!("comment \"{SANDBOX}\"");
        let mut hairpin = format!("{family} saddr {address} {family} daddr {address} masquerade {comment}\n");
        if address.is_ipv4() {
            let _ = writeln!(hairpin, "ip saddr 127.0.0.1 ip daddr {address} masquerade {comment}");
        }
        let _ = write!(
            text,
            "table {table} {{\n\
             comment \"CNI portmap plugin\"\n\
             chain hostports {{\n\
             tcp dport {HOST_PORT} dnat to {to} {comment}\n\
             udp dport {HOST_PORT} dnat to {to} {comment}\n\
             }}\n\
             chain hostip_hostports {{ }}\n\
             chain hostports_all {{ jump hostip_hostports\njump hostports\n}}\n\
             chain prerouting {{\ntype nat hook prerouting priority dstnat; policy accept;\n\
             fib daddr type local jump hostports_all\n}}\n\
             chain output {{\ntype nat hook output priority -100; policy accept;\n\
             fib daddr type local jump hostports_all\n}}\n\
             chain masquerading {{\ntype nat hook postrouting priority srcnat; policy accept;\n{hairpin}}}\n\
             }}\n"
        );
    }
    text
}
