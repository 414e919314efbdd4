//! What listens inside the pods of this node: their network namespaces are found by the container runtime's word, by
//! `ip netns` and by their processes, and asked.

use super::attributes::attributes;
use super::netlink::socket::Connection;
use super::{host, netlink, sockets};
use crate::core::model::cluster::{Part, Sandbox};
use crate::core::model::pods::PodSockets;
use crate::core::model::state::{Address, Socket};
use nix::sched::{CloneFlags, setns};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

/// Network namespaces asked at most: a node runs some hundred pods.
const MAX_NAMESPACES: usize = 2_000;
/// Where `ip netns` and the container runtimes keep namespaces.
const NAMED: &str = "/run/netns";

/// A network namespace on this machine that is not our own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Fit for a file name, unique on this machine: the pod's `NAMESPACE_NAME` where the runtime told it, else the name that
    /// `ip netns` knows, else `net-` and its inode number.
    pub name: String,
    pub addresses: Vec<Address>,
    pub sockets: Vec<Socket>,
    /// A link leads from our own network namespace into it.
    linked: bool,
}

/// What listens in these namespaces, by address; what the sandboxes' own say counts where an address occurs twice.
pub fn sockets(namespaces: &Part<Vec<Namespace>>) -> PodSockets {
    let mut pods = PodSockets::default();
    for namespace in namespaces.known().map(Vec::as_slice).unwrap_or_default().iter().rev() {
        pods.insert(namespace.addresses.iter().map(|address| address.address), &namespace.sockets);
    }
    pods
}

/// The network namespaces of this machine but our own, those of the sandboxes first. Those that cannot be entered are left
/// out, unless that is all of them.
pub fn namespaces(sandboxes: &[Sandbox]) -> Part<Vec<Namespace>> {
    let places = places(sandboxes);
    let count = places.len();
    let mut found: Vec<Namespace> =
        places.into_iter().take(MAX_NAMESPACES).filter_map(|(name, path)| ask(name, path)).collect();
    without_strangers(&mut found);
    if found.is_empty() && count > 0 {
        return Part::Missing(
            "what listens inside the pods is not known: only root may enter their network namespaces".to_owned(),
        );
    }
    Part::Known(found)
}

/// Several clusters may play on one kernel with the same addresses: where a namespace that a link of ours leads to has an
/// address, others that have it too are none of our pods.
fn without_strangers(namespaces: &mut Vec<Namespace>) {
    let own = |namespace: &Namespace| -> Vec<IpAddr> {
        let addresses = namespace.addresses.iter().map(|own| own.address);
        addresses.filter(|address| !address.is_loopback() && !is_link_local(*address)).collect()
    };
    let ours: BTreeSet<IpAddr> = namespaces.iter().filter(|namespace| namespace.linked).flat_map(own).collect();
    namespaces.retain(|namespace| namespace.linked || !own(namespace).iter().any(|address| ours.contains(address)));
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

/// The number that our network namespace has for this one, as it has for those at the other end of its links
/// (net/core/net_namespace.c, `rtnl_net_getid`).
pub(super) fn number_of(namespace: &File) -> Option<i32> {
    /// `RTM_GETNSID`, and its attributes `NETNSA_NSID` and `NETNSA_FD` (include/uapi/linux/net_namespace.h).
    const GET_NUMBER: u16 = 90;
    const NUMBER: u16 = 1;
    const FILE: u16 = 3;
    // struct rtgenmsg, padded; then the attribute: length, type, descriptor.
    let mut request = vec![0; 4];
    request.extend(8u16.to_ne_bytes());
    request.extend(FILE.to_ne_bytes());
    request.extend(namespace.as_raw_fd().to_ne_bytes());
    let number = |_, payload: &[u8]| {
        let (_, value) = attributes(payload.get(4..)?).find(|(kind, _)| *kind == NUMBER)?;
        Some(i32::from_ne_bytes(value.try_into().ok()?))
    };
    let asked = Connection::open(netlink_sys::protocols::NETLINK_ROUTE)
        .and_then(|mut connection| connection.get(GET_NUMBER, &request, number));
    asked.ok().flatten().filter(|number| *number >= 0)
}

/// Name and path of each namespace, once; a pod's stands before what else is found.
pub(super) fn places(sandboxes: &[Sandbox]) -> Vec<(String, PathBuf)> {
    let inode = |path: &Path| fs::metadata(path).map(|metadata| metadata.ino()).ok();
    let own = inode(Path::new("/proc/thread-self/ns/net"));
    let mut seen: BTreeMap<u64, ()> = own.into_iter().map(|own| (own, ())).collect();
    let mut places = Vec::new();
    let mut add = |name: Option<String>, path: PathBuf| {
        if let Some(number) = inode(&path)
            && seen.insert(number, ()).is_none()
        {
            places.push((name.unwrap_or_else(|| format!("net-{number}")), path));
        }
    };
    for sandbox in sandboxes.iter().filter(|sandbox| sandbox.ready) {
        if let Some(path) = sandbox.netns.as_deref().and_then(host::file) {
            add(Some(format!("{}_{}", sandbox.pod.namespace, sandbox.pod.name)), path);
        }
    }
    let named = host::file(NAMED).and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    let mut named: Vec<PathBuf> = named.map(|entry| entry.path()).collect();
    named.sort();
    for path in named {
        add(path.file_name().and_then(|name| name.to_str()).map(str::to_owned), path);
    }
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if process.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit) {
            add(None, process.path().join("ns/net"));
        }
    }
    places
}

/// Enters a namespace on a thread of its own, which ends there.
fn ask(name: String, path: PathBuf) -> Option<Namespace> {
    let namespace = File::open(path).ok()?;
    let linked = number_of(&namespace).is_some();
    thread::spawn(move || {
        // A file that holds no namespace (its mount is gone, or not to be seen from here) is refused here.
        setns(namespace, CloneFlags::CLONE_NEWNET).ok()?;
        Some(Namespace { name, addresses: netlink::read().addresses?, sockets: sockets::read(true).ok()?, linked })
    })
    .join()
    .ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(name: &str, addresses: &[&str], linked: bool) -> Namespace {
        let address = |text: &&str| Address {
            interface: "eth0".to_owned(),
            address: text.parse().expect("an address"),
            prefix: 24,
            scope: "global".to_owned(),
            secondary: false,
        };
        let addresses = addresses.iter().map(address).collect();
        Namespace { name: name.to_owned(), addresses, sockets: Vec::new(), linked }
    }

    #[test]
    fn a_stranger_with_the_address_of_a_pod_is_left_out() {
        let mut all = vec![
            namespace("another cluster's", &["127.0.0.1", "10.244.1.9", "fe80::1"], false),
            namespace("ours", &["127.0.0.1", "10.244.1.9", "fe80::1"], true),
            namespace("behind another node", &["127.0.0.1", "10.244.2.9", "fe80::1"], false),
            namespace("an empty one", &["127.0.0.1"], false),
        ];
        without_strangers(&mut all);
        let names: Vec<&str> = all.iter().map(|namespace| namespace.name.as_str()).collect();
        assert_eq!(names, ["ours", "behind another node", "an empty one"]);
    }
}
