//! Listening and bound sockets through sock_diag, with their processes where those are wanted.

use super::attributes::attributes;
use super::netlink::socket::{Connection, NetlinkError};
use crate::core::model::flow::Proto;
use crate::core::model::state::Socket;
use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

/// `SOCK_DIAG_BY_FAMILY` (include/uapi/linux/sock_diag.h).
const BY_FAMILY: u16 = 20;
/// `TCP_CLOSE` (an unconnected UDP socket) and `TCP_LISTEN` (include/net/tcp_states.h).
const CLOSE: u32 = 7;
const LISTEN: u32 = 10;

/// The sockets of the calling thread's network namespace that wait for others, sorted.
///
/// # Errors
/// When the kernel has no sock_diag.
pub fn read(with_processes: bool) -> Result<Vec<Socket>, NetlinkError> {
    let mut connection = Connection::open(netlink_sys::protocols::NETLINK_SOCK_DIAG)?;
    let mut found = Vec::new();
    for proto in [Proto::Tcp, Proto::Udp, Proto::Sctp] {
        // Asking about SCTP would load its module.
        if proto == Proto::Sctp && !Path::new("/proc/thread-self/net/sctp").exists() {
            continue;
        }
        let state = if proto == Proto::Udp { CLOSE } else { LISTEN };
        for family in [libc::AF_INET, libc::AF_INET6] {
            let request = request(family, proto, 1 << state);
            match connection.dump(BY_FAMILY, &request, |_, payload| socket(proto, payload)) {
                Ok(sockets) => found.extend(sockets),
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    let processes = if with_processes { processes(&found) } else { BTreeMap::new() };
    let mut sockets: Vec<Socket> =
        found.into_iter().map(|(socket, inode)| Socket { process: processes.get(&inode).cloned(), ..socket }).collect();
    sockets.sort();
    // SO_REUSEPORT makes many that look alike.
    sockets.dedup();
    Ok(sockets)
}

/// The kernel has no such family (IPv6 switched off) or no such handler.
fn is_absent(error: &NetlinkError) -> bool {
    matches!(error, NetlinkError::Refused(error)
        if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)))
}

/// `struct inet_diag_req_v2` (include/uapi/linux/inet_diag.h): family, protocol, extensions, padding, states, and an id
/// of 48 bytes that stays empty.
fn request(family: i32, proto: Proto, states: u32) -> Vec<u8> {
    let mut request = vec![u8::try_from(family).unwrap_or(0), proto.number(), 0, 0];
    request.extend_from_slice(&states.to_ne_bytes());
    request.resize(56, 0);
    request
}

/// `struct inet_diag_msg`: the source port stands at 4, the source address at 8, the inode at 68; attributes follow at 72.
fn socket(proto: Proto, message: &[u8]) -> Option<(Socket, u32)> {
    const V6ONLY: u16 = 11;
    let port = u16::from_be_bytes(*message.get(4..)?.first_chunk()?);
    let address: IpAddr = match i32::from(*message.first()?) {
        libc::AF_INET => message.get(8..)?.first_chunk::<4>().copied()?.into(),
        libc::AF_INET6 => message.get(8..)?.first_chunk::<16>().copied()?.into(),
        _ => return None,
    };
    let inode = u32::from_ne_bytes(*message.get(68..)?.first_chunk()?);
    let v6only = attributes(message.get(72..)?).any(|(kind, value)| kind == V6ONLY && value.first() == Some(&1));
    // An unbound UDP socket (port 0) waits for nobody.
    (port != 0).then_some((Socket { proto, address, port, v6only, process: None }, inode))
}

/// `name/pid` by socket inode, for these sockets, from `/proc/PID/fd`; processes that are not ours to see are left out.
fn processes(sockets: &[(Socket, u32)]) -> BTreeMap<u32, String> {
    let mut names = BTreeMap::new();
    let wanted: std::collections::BTreeSet<u32> = sockets.iter().map(|(_, inode)| *inode).collect();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if names.len() == wanted.len() {
            break;
        }
        for file in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let inode = fs::read_link(file.path()).ok().and_then(|target| socket_inode(target.to_str()?));
            if let Some(inode) = inode.filter(|inode| wanted.contains(inode)) {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                names.entry(inode).or_insert_with(|| format!("{}/{pid}", name.trim()));
            }
        }
    }
    names
}

/// `socket:[1234]` → 1234.
fn socket_inode(target: &str) -> Option<u32> {
    target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}
