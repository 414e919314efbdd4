//! Network interfaces of the current network namespace, followed as they come and go (`RTM_NEWLINK`, `RTM_DELLINK`).

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `RTNLGRP_LINK`.
const LINK_GROUP: u32 = 1;
/// Room for the messages of some thousand interfaces that appear at once.
const RECEIVE_BYTES: usize = 4 << 20;

/// Names of vanished interfaces that are kept.
const GONE: usize = 4096;

/// A change of the set of interfaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkChange {
    Added { index: u32, name: String },
    Renamed { index: u32, name: String },
    Removed { index: u32, name: String },
}

#[derive(Debug, Error)]
pub enum LinkError {
    #[error("cannot {action} a route netlink socket: {error}")]
    Socket { action: &'static str, error: io::Error },
    #[error("the kernel's answer to the request for its interfaces: {0}")]
    Answer(String),
}

/// Follows the interfaces of the namespace in which it was made.
pub struct LinkWatcher {
    socket: AsyncFd<Socket>,
    /// A socket of its own for listings, so that answers and announcements do not mix.
    lister: Socket,
    present: BTreeMap<u32, String>,
    /// Of these and of the last that vanished, so that late events of a vanished interface can still be told.
    names: BTreeMap<u32, String>,
    /// Indices that are only in `names`, the oldest first.
    gone: VecDeque<u32>,
}

impl LinkWatcher {
    /// Subscribes, then lists: nothing falls between. Needs a tokio runtime with I/O. Blocks for one listing.
    pub fn new() -> Result<Self, LinkError> {
        let failed = |action| move |error| LinkError::Socket { action, error };
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed("open"))?;
        socket.bind(&SocketAddr::new(0, 0)).map_err(failed("bind"))?;
        // Best effort: a small buffer only means that the interfaces are listed again more often.
        let _ = socket.set_rx_buf_sz(RECEIVE_BYTES as libc::c_int);
        socket.add_membership(LINK_GROUP).map_err(failed("subscribe"))?;
        socket.set_non_blocking(true).map_err(failed("set up"))?;
        let mut lister = Socket::new(NETLINK_ROUTE).map_err(failed("open"))?;
        lister.bind(&SocketAddr::new(0, 0)).map_err(failed("bind"))?;
        lister.connect(&SocketAddr::new(0, 0)).map_err(failed("connect"))?;
        let present = list(&lister)?;
        let names = present.clone();
        // SAFETY: the socket owns its descriptor, which stays the same until the socket is dropped.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }
            .map_err(|error| LinkError::Socket { action: "poll", error: error.into() })?;
        Ok(Self { socket, lister, present, names, gone: VecDeque::new() })
    }

    /// The interfaces that are there now, by index.
    pub const fn present(&self) -> &BTreeMap<u32, String> {
        &self.present
    }

    /// Names by index of all interfaces that are or, not long ago, were there; an index that was used twice has the newer name.
    pub const fn names(&self) -> &BTreeMap<u32, String> {
        &self.names
    }

    /// Waits for changes and returns them in the kernel's order; never empty. Safe to cancel. When the kernel had more to
    /// say than fits (`ENOBUFS`), the interfaces are listed again and compared.
    pub async fn changed(&mut self) -> Result<Vec<LinkChange>, LinkError> {
        loop {
            let mut guard =
                self.socket.readable().await.map_err(|error| LinkError::Socket { action: "wait for", error })?;
            let mut changes = Vec::new();
            let outcome = drain(guard.get_inner(), &mut |change| changes.push(change));
            match outcome {
                Ok(()) => guard.clear_ready(),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    drop(guard);
                    let listed = list(&self.lister)?;
                    let changes = self.compare(listed);
                    if !changes.is_empty() {
                        return Ok(changes);
                    }
                    continue;
                }
                Err(error) => return Err(LinkError::Socket { action: "read", error }),
            }
            drop(guard);
            let changes: Vec<_> = changes.into_iter().filter_map(|seen| self.apply(seen)).collect();
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }

    /// Takes in one announcement; `None` when it says nothing new about existence or name.
    fn apply(&mut self, seen: Announcement) -> Option<LinkChange> {
        let Announcement { index, name, gone } = seen;
        if gone {
            let name = self.present.remove(&index)?;
            self.forget_oldest(index);
            return Some(LinkChange::Removed { index, name });
        }
        self.names.insert(index, name.clone());
        match self.present.insert(index, name.clone()) {
            None => Some(LinkChange::Added { index, name }),
            Some(old) if old != name => Some(LinkChange::Renamed { index, name }),
            Some(_) => None,
        }
    }

    /// A node whose pods come and go for months has seen many interfaces.
    fn forget_oldest(&mut self, gone: u32) {
        self.gone.push_back(gone);
        if self.gone.len() > GONE
            && let Some(oldest) = self.gone.pop_front()
            && !self.present.contains_key(&oldest)
            && !self.gone.contains(&oldest)
        {
            self.names.remove(&oldest);
        }
    }

    fn compare(&mut self, listed: BTreeMap<u32, String>) -> Vec<LinkChange> {
        let vanished: Vec<u32> = self.present.keys().filter(|index| !listed.contains_key(index)).copied().collect();
        let gone = vanished.into_iter().map(|index| Announcement { index, name: String::new(), gone: true });
        let there = listed.into_iter().map(|(index, name)| Announcement { index, name, gone: false });
        gone.chain(there).filter_map(|seen| self.apply(seen)).collect()
    }
}

/// One `RTM_NEWLINK` or `RTM_DELLINK`.
struct Announcement {
    index: u32,
    name: String,
    gone: bool,
}

/// Reads until the socket has no more.
fn drain(socket: &Socket, found: &mut dyn FnMut(Announcement)) -> io::Result<()> {
    loop {
        match socket.recv_from_full() {
            Ok((bytes, _)) => {
                for message in messages::<RouteNetlinkMessage>(&bytes) {
                    match message.payload {
                        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                            announcement(&link, false).into_iter().for_each(&mut *found);
                        }
                        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) => {
                            announcement(&link, true).into_iter().for_each(&mut *found);
                        }
                        _ => {}
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// A bridge announces its ports in the same group, with family AF_BRIDGE: a port that leaves a bridge is no interface gone.
fn announcement(link: &LinkMessage, gone: bool) -> Option<Announcement> {
    if link.header.interface_family != AddressFamily::Unspec {
        return None;
    }
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })?;
    Some(Announcement { index: link.header.index, name, gone })
}

fn list(socket: &Socket) -> Result<BTreeMap<u32, String>, LinkError> {
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(LinkMessage::default()));
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0).map_err(|error| LinkError::Socket { action: "write to", error })?;
    let mut present = BTreeMap::new();
    loop {
        let (bytes, _) = socket.recv_from_full().map_err(|error| LinkError::Socket { action: "read", error })?;
        for message in messages::<RouteNetlinkMessage>(&bytes) {
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                    if let Some(seen) = announcement(&link, false) {
                        present.insert(seen.index, seen.name);
                    }
                }
                NetlinkPayload::Done(_) => return Ok(present),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(LinkError::Answer(error.to_io().to_string()));
                }
                _ => {}
            }
        }
    }
}

/// The messages of one datagram; what cannot be parsed is skipped, what is cut short ends it.
pub(crate) fn messages<T: NetlinkDeserializable>(bytes: &[u8]) -> impl Iterator<Item = NetlinkMessage<T>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        while rest.len() >= 16 {
            let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            if length < 16 || length > rest.len() {
                return None;
            }
            let message = NetlinkMessage::deserialize(&rest[..length]).ok();
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            if message.is_some() {
                return message;
            }
        }
        None
    })
}
