//! What listens inside the pods of this node: their network namespaces are found by the container runtime's word, by
//! `ip netns` and by their processes, and asked.

use super::{host, netlink, sockets};
use crate::core::model::cluster::{Part, Sandbox};
use crate::core::model::pods::PodSockets;
use crate::core::model::state::{Address, Socket};
use nix::sched::{CloneFlags, setns};
use std::collections::BTreeMap;
use std::fs::{self, File};
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
    let found: Vec<Namespace> =
        places.into_iter().take(MAX_NAMESPACES).filter_map(|(name, path)| ask(name, path)).collect();
    if found.is_empty() && count > 0 {
        return Part::Missing(
            "what listens inside the pods is not known: only root may enter their network namespaces".to_owned(),
        );
    }
    Part::Known(found)
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
    thread::spawn(move || {
        // A file that holds no namespace (its mount is gone, or not to be seen from here) is refused here.
        setns(namespace, CloneFlags::CLONE_NEWNET).ok()?;
        Some(Namespace { name, addresses: netlink::read().addresses?, sockets: sockets::read(true).ok()? })
    })
    .join()
    .ok()?
}
