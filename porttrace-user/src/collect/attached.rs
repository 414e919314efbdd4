//! Which network namespace is behind which address: pods that hang on this node by a pair of interfaces.

use super::{netlink, pods};
use crate::core::model::cluster::Sandbox;
use nix::sched::{CloneFlags, setns};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

/// A pod's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The pod's name where the container runtime told it, else that of the namespace.
    pub name: String,
    /// Inode number of the namespace.
    pub netns: u32,
    /// How to get in.
    pub path: PathBuf,
    pub addresses: BTreeSet<IpAddr>,
}

impl Attached {
    /// Whether its path still leads to it: a pod that is gone must not be kept alive by whoever looks into it.
    pub fn is_there(&self) -> bool {
        netns_of(&self.path) == Some(self.netns)
    }
}

/// The namespaces that have one of `wanted` and hang on the calling thread's namespace by an interface whose other end is in them
/// (`IFLA_LINK_NETNSID`: veth, netkit). Several nodes may share a machine, and have pods of the same addresses.
///
/// # Errors
/// One sentence when there are such pods and none can be entered.
pub fn behind(wanted: &BTreeSet<IpAddr>, sandboxes: &[Sandbox]) -> Result<Vec<Attached>, String> {
    let links = netlink::read_interfaces().links.unwrap_or_default();
    let peers: BTreeSet<i32> = links.iter().filter_map(|link| link.peer_netns).collect();
    let mut found = Vec::new();
    let mut refused = 0;
    for (name, path) in pods::places(sandboxes) {
        let Some((file, netns)) = File::open(&path).ok().zip(netns_of(&path)) else { continue };
        if !pods::number_of(&file).is_some_and(|number| peers.contains(&number)) {
            continue;
        }
        match addresses(file) {
            Some(addresses) if !addresses.is_disjoint(wanted) => found.push(Attached { name, netns, path, addresses }),
            Some(_) => {}
            None => refused += 1,
        }
    }
    if found.is_empty() && refused > 0 {
        return Err("pods are not followed inside: only root may enter their network namespaces".to_owned());
    }
    Ok(found)
}

/// Its addresses, asked on a thread of its own, which ends there.
fn addresses(namespace: File) -> Option<BTreeSet<IpAddr>> {
    let asked = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).ok()?;
        netlink::read_interfaces().addresses
    });
    let found = asked.join().ok()??;
    Some(found.into_iter().map(|own| own.address).filter(|own| !own.is_loopback()).collect())
}

fn netns_of(path: &Path) -> Option<u32> {
    u32::try_from(fs::metadata(path).ok()?.ino()).ok()
}
