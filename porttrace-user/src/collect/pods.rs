//! What listens inside the pods of this node: their network namespaces are found by their processes, and asked.

use super::{netlink, sockets};
use crate::core::model::pods::PodSockets;
use crate::core::model::state::Socket;
use nix::sched::{CloneFlags, setns};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread;

/// Network namespaces asked at most: a node runs some hundred pods.
const MAX_NAMESPACES: usize = 2_000;

/// Reads the listening sockets of every network namespace on this machine but our own. Namespaces that cannot be entered are
/// left out: nothing is then known of them.
pub fn read() -> PodSockets {
    let mut pods = PodSockets::default();
    for (_, path) in namespaces().into_iter().take(MAX_NAMESPACES) {
        if let Some((addresses, sockets)) = ask(path) {
            pods.insert(addresses, &sockets);
        }
    }
    pods
}

/// One process's path for each network namespace, by inode number.
fn namespaces() -> BTreeMap<u64, PathBuf> {
    let own = fs::metadata("/proc/thread-self/ns/net").map(|metadata| metadata.ino()).ok();
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if !entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit) {
            continue;
        }
        let path = entry.path().join("ns/net");
        if let Ok(metadata) = fs::metadata(&path)
            && Some(metadata.ino()) != own
        {
            found.entry(metadata.ino()).or_insert(path);
        }
    }
    found
}

/// Enters a namespace on a thread of its own, which ends there.
fn ask(path: PathBuf) -> Option<(Vec<IpAddr>, Vec<Socket>)> {
    let namespace = File::open(path).ok()?;
    thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).ok()?;
        let addresses = netlink::read().addresses?.into_iter().map(|address| address.address).collect();
        Some((addresses, sockets::read(true).ok()?))
    })
    .join()
    .ok()?
}
