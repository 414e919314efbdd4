//! The segment: a switch namespace with a bridge, and what hangs on it.

use super::topology::{GATEWAY_V4, GATEWAY_V6, NodeName, OUTSIDE_V4, OUTSIDE_V6};
use crate::netns::Netns;
use anyhow::{Context, Result};
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// Sysctls of a node: forwarding and `route_localnet` as kubelet and kube-proxy (iptables mode) set them, no rp_filter as kind has it.
const NODE_SYSCTLS: [(&str, &str); 6] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv4/conf/all/route_localnet", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    ("net/netfilter/nf_conntrack_acct", "0"),
];

/// The switch: a bridge `br0` that is also the segment's gateway.
pub fn switch() -> Result<Netns> {
    let netns = Netns::new("switch")?;
    no_duplicate_detection(&netns)?;
    let batch = format!(
        "link add br0 type bridge forward_delay 0 stp_state 0 mcast_snooping 0\n\
         addr add {GATEWAY_V4}/16 dev br0\n\
         addr add {GATEWAY_V6}/64 dev br0 nodad\n\
         link set br0 up\n"
    );
    netns.exec_with(["ip", "-batch", "-"], &batch)?;
    Ok(netns)
}

/// A node on the switch, forwarding, with routes to the other nodes' pods.
pub fn node(switch: &Netns, name: NodeName) -> Result<Netns> {
    let netns = Netns::new(name.name())?;
    no_duplicate_detection(&netns)?;
    set_sysctls(&netns, &NODE_SYSCTLS)?;
    plug_in(switch, &netns, name.name(), name.v4(), name.v6())?;
    let mut batch = String::new();
    for other in NodeName::ALL.into_iter().filter(|other| *other != name) {
        let subnet = other.subnet();
        batch += &format!("route add 10.244.{subnet}.0/24 via {} dev eth0\n", other.v4());
        batch += &format!("route add fd00:10:244:{subnet}::/64 via {} dev eth0\n", other.v6());
    }
    netns.exec_with(["ip", "-batch", "-"], &batch)?;
    Ok(netns)
}

/// The outside client.
pub fn outside(switch: &Netns) -> Result<Netns> {
    let netns = Netns::new("ext")?;
    no_duplicate_detection(&netns)?;
    plug_in(switch, &netns, "ext", OUTSIDE_V4, OUTSIDE_V6)?;
    Ok(netns)
}

/// Addresses in this namespace are usable at once: no interface of it runs duplicate address detection.
pub fn no_duplicate_detection(netns: &Netns) -> Result<()> {
    set_sysctls(netns, &[("net/ipv6/conf/all/accept_dad", "0"), ("net/ipv6/conf/default/accept_dad", "0")])
}

/// Writes `/proc/sys` files in a namespace.
pub fn set_sysctls(netns: &Netns, settings: &[(&str, &str)]) -> Result<()> {
    netns.run_in(|| {
        for (key, value) in settings {
            let path = Path::new("/proc/sys").join(key);
            fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))?;
        }
        Ok(())
    })?
}

/// A veth pair: `eth0` inside, the port `port` on the switch's bridge; addresses and default routes.
fn plug_in(switch: &Netns, netns: &Netns, port: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
    let pair = format!(
        "link add {port} type veth peer name eth0 netns {}\n\
         link set {port} master br0\n\
         link set {port} up\n",
        netns.name()
    );
    switch.exec_with(["ip", "-batch", "-"], &pair)?;
    let inside = format!(
        "link set eth0 up\n\
         addr add {v4}/16 dev eth0\n\
         addr add {v6}/64 dev eth0 nodad\n\
         route add default via {GATEWAY_V4} dev eth0\n\
         route add default via {GATEWAY_V6} dev eth0\n"
    );
    netns.exec_with(["ip", "-batch", "-"], &inside).map(drop)
}
