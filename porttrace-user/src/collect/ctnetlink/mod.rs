//! Conntrack's own events (ctnetlink): an entry was made, an entry is gone.
//!
//! Updates are not asked for: an entry's tuples are final before it enters the table (`nf_conntrack_confirm`,
//! net/netfilter/nf_conntrack_core.c), so they would tell nothing about NAT and be the larger part of the messages.

mod filter;
pub mod hold;
pub mod older;

use super::attributes::{attributes, be32};
use super::conntrack::{self, ConntrackError};
use crate::core::model::event::{Conntrack, Event};
use crate::core::model::flow::{Proto, Tuple};
use crate::core::model::state::ConntrackEntry;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use porttrace_ebpf::Kind;
use std::cell::Cell;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use thiserror::Error;

/// `NFNLGRP_CONNTRACK_NEW` and `NFNLGRP_CONNTRACK_DESTROY` (include/uapi/linux/netfilter/nfnetlink.h).
const GROUPS: [u32; 2] = [1, 3];
/// `NFNL_SUBSYS_CTNETLINK << 8` with `IPCTNL_MSG_CT_NEW` and `IPCTNL_MSG_CT_DELETE`.
const NEW: u16 = 0x0100;
const DELETE: u16 = 0x0102;
/// Room for some 30,000 messages that are not read yet, as much as the probe's ring buffer holds.
pub const RECEIVE_BYTES: u32 = 32 << 20;
/// Larger than any such message.
const MESSAGE: usize = 16 << 10;
const EVENTS: &str = "/proc/sys/net/netfilter/nf_conntrack_events";
/// `IPS_SEEN_REPLY` and what else a listing tells of an entry's status.
const SEEN_REPLY: u32 = 2;
const ASSURED: u32 = 4;
/// TCP's flags, and SCTP's first chunk.
const SYN: u8 = 2;
const ACK: u8 = 16;
const SCTP_INIT: u8 = 1;

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    pub entry: Conntrack,
    /// The entry is gone; bytes in both directions where conntrack counts them.
    pub gone: Option<(u64, u64)>,
}

#[derive(Debug, Error)]
pub enum CtnetlinkError {
    #[error("cannot {action} conntrack's event socket: {error}")]
    Socket { action: &'static str, error: io::Error },
    #[error("net.netfilter.nf_conntrack_events is 0: conntrack tells nobody of its entries; set it to 1 or 2")]
    Off,
    #[error("conntrack is not loaded here (there is no {EVENTS})")]
    Absent,
}

/// A socket that hears of the entries of connections to given ports.
pub struct Listener {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Listener {
    /// Subscribes in the network namespace of the calling thread. The kernel filters by the original destination port, so that
    /// what cannot be held is counted of these connections alone. `bytes`: room for messages that are not read yet, about
    /// a thousand each.
    pub fn open(ports: &[u16], bytes: u32) -> Result<Self, CtnetlinkError> {
        match fs::read_to_string(EVENTS).ok().as_deref().map(str::trim) {
            None => return Err(CtnetlinkError::Absent),
            Some("0") => return Err(CtnetlinkError::Off),
            Some(_) => {}
        }
        let failed = |action| move |error| CtnetlinkError::Socket { action, error };
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(failed("open"))?;
        socket.bind(&SocketAddr::new(0, 0)).map_err(failed("bind"))?;
        socket.set_non_blocking(true).map_err(failed("set up"))?;
        make_room(&socket, bytes);
        filter::attach(socket.as_raw_fd(), ports).map_err(failed("filter"))?;
        GROUPS.into_iter().try_for_each(|group| socket.add_membership(group)).map_err(failed("subscribe to"))?;
        Ok(Self { socket, buffer: Vec::with_capacity(MESSAGE) })
    }

    /// Appends what there is now; never waits. What the kernel could not queue shows in [`Self::dropped`].
    pub fn drain(&mut self, out: &mut Vec<Told>) -> Result<(), CtnetlinkError> {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => take(&self.buffer, out),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // Once for every time that the queue ran full; what is in it can be read on.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CtnetlinkError::Socket { action: "read", error }),
            }
        }
    }

    /// Messages that the kernel could not queue, since the start (`sk_drops`, counted by `netlink_overrun`,
    /// net/netlink/af_netlink.c).
    pub fn dropped(&self) -> Result<u64, CtnetlinkError> {
        /// Number and index of the values (include/uapi/linux/sock_diag.h).
        const VALUES: usize = 9;
        const DROPS: usize = 8;
        let mut values = [0u32; VALUES];
        let mut length = size_of_val(&values) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes to `values`.
        let answer = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                values.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if answer < 0 {
            return Err(CtnetlinkError::Socket { action: "ask", error: io::Error::last_os_error() });
        }
        Ok(u64::from(values[DROPS]))
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The entries that are there already, of connections to these ports, `most` of them at most; and how many more there are.
///
/// # Errors
/// As [`conntrack::dump`].
pub fn present(ports: &[u16], most: usize) -> Result<(Vec<Conntrack>, usize), ConntrackError> {
    let found = Cell::new(0);
    let keep = |entry: &ConntrackEntry| {
        let is_wanted = entry.original.proto.has_ports() && ports.contains(&entry.original.dport);
        found.set(found.get() + usize::from(is_wanted));
        is_wanted && found.get() <= most
    };
    let entries = conntrack::dump(keep)?;
    Ok((entries.iter().map(|entry| as_seen(entry, 0, status(entry))).collect(), found.get() - entries.len()))
}

/// The tuples under which packets of an entry travel: as sent, rewritten, and both back. The state in between (destination
/// rewritten, source not yet) is one too, where both are.
pub fn tuples(entry: &Conntrack) -> [Tuple; 6] {
    let Conntrack { original, reply, .. } = *entry;
    let between = Tuple { dst: reply.src, dport: reply.sport, ..original };
    [original, original.inverted(), reply, reply.inverted(), between, between.inverted()]
}

/// A packet seen by TC that may have made an entry.
fn opens(event: &Event) -> bool {
    matches!(event.kind, Kind::TcIngress | Kind::TcEgress)
        && event.packet.is_some_and(|packet| match packet.proto {
            Proto::Tcp => event.l4_flags & (SYN | ACK) == SYN,
            Proto::Sctp => event.l4_flags == SCTP_INIT,
            _ => !event.is_reply,
        })
}

/// An event about an entry, and no packet.
fn of_entry(netns: u32, kind: Kind, entry: Conntrack, time_ns: u64) -> Event {
    Event {
        time_ns,
        kind,
        packet: None,
        conntrack: Some(entry),
        is_reply: false,
        icmp_sender: None,
        netns,
        ifindex: 0,
        out_ifindex: 0,
        route: None,
        hook: 0,
        mark: 0,
        reason: 0,
        length: 0,
        payload: 0,
        l4_flags: 0,
        tcp_seq: 0,
        tcp_ack: 0,
        ttl: 0,
        icmp_type: 0,
        icmp_code: 0,
        orig_bytes: 0,
        reply_bytes: 0,
    }
}

/// As large as allowed; a smaller queue only overruns sooner, and that is counted.
fn make_room(socket: &Socket, bytes: u32) {
    let size = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    // SAFETY: the option's value is a C int that outlives the call.
    let forced = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const size).cast(),
            size_of_val(&size) as libc::socklen_t,
        )
    };
    if forced < 0 {
        let _ = socket.set_rx_buf_sz(size);
    }
}

/// The messages of one datagram; what is no conntrack message is passed over.
fn take(bytes: &[u8], out: &mut Vec<Told>) {
    let mut rest = bytes;
    while rest.len() >= 16 {
        let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
        let kind = u16::from_ne_bytes([rest[4], rest[5]]);
        let Some(payload) = rest.get(20..length) else { return };
        if matches!(kind, NEW | DELETE) {
            out.extend(told(payload, kind == DELETE));
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}

/// `payload` begins after `struct nfgenmsg`.
fn told(payload: &[u8], gone: bool) -> Option<Told> {
    let entry = conntrack::entry(payload)?;
    let (mut id, mut bytes) = (0, (0, 0));
    let mut flags = status(&entry);
    // enum ctattr_type
    for (kind, value) in attributes(payload) {
        match kind {
            3 => flags = be32(value)?,
            9 => bytes.0 = counted(value),
            10 => bytes.1 = counted(value),
            12 => id = be32(value)?,
            _ => {}
        }
    }
    Some(Told { entry: as_seen(&entry, u64::from(id), flags), gone: gone.then_some(bytes) })
}

/// `CTA_COUNTERS_BYTES`.
fn counted(bytes: &[u8]) -> u64 {
    let found = attributes(bytes).find(|(kind, _)| *kind == 2).map(|(_, value)| value);
    found.and_then(|value| value.first_chunk()).map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

fn status(entry: &ConntrackEntry) -> u32 {
    (if entry.assured { ASSURED } else { 0 }) | (if entry.unreplied { 0 } else { SEEN_REPLY })
}

fn as_seen(entry: &ConntrackEntry, id: u64, status: u32) -> Conntrack {
    let ConntrackEntry { original, reply, mark, .. } = *entry;
    Conntrack { original, reply, id, status, mark, is_new: false, is_reply: false }
}
