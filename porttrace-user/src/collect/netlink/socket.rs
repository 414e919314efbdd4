//! Netlink requests: one socket, one dump at a time, messages as raw bytes.

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_ECHO, NLM_F_REQUEST, NetlinkBuffer};
use netlink_sys::{Socket, SocketAddr};
use std::io;
use thiserror::Error;

/// `NLMSG_ERROR`, `NLMSG_DONE`, `NLMSG_OVERRUN` (include/uapi/linux/netlink.h).
const ERROR: u16 = 2;
const DONE: u16 = 3;
const OVERRUN: u16 = 4;
/// `NLM_F_DUMP_INTR`: the table changed while it was listed.
const DUMP_INTERRUPTED: u16 = 0x10;
/// How often a listing is begun again when it was interrupted by a change.
const ATTEMPTS: usize = 5;
/// Larger than any message that the kernel packs into one dump answer (32 KiB).
const BUFFER: usize = 256 * 1024;

/// Why the kernel did not answer.
#[derive(Debug, Error)]
pub enum NetlinkError {
    #[error("netlink: {0}")]
    Io(#[from] io::Error),
    #[error("netlink: the kernel refuses: {0}")]
    Refused(io::Error),
    #[error("netlink: an answer that is no netlink message")]
    Malformed,
    #[error("netlink: the table changed {ATTEMPTS} times while it was listed")]
    Interrupted,
}

/// A socket of one netlink protocol, in the network namespace of the thread that opened it.
pub struct Connection {
    socket: Socket,
    sequence: u32,
}

impl Connection {
    /// Opens a socket (`NETLINK_ROUTE`, `NETLINK_NETFILTER`, `NETLINK_SOCK_DIAG`).
    ///
    /// # Errors
    /// When the kernel has no such protocol, or a resource limit is reached.
    pub fn open(protocol: isize) -> Result<Self, NetlinkError> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Lists a table: sends `request` (the bytes after the netlink header) and collects what `take` makes of each
    /// answer (its type and the bytes after the header). Begun again when the table changes meanwhile.
    ///
    /// # Errors
    /// What the kernel answered, or that the table never held still.
    pub fn dump<T>(
        &mut self,
        kind: u16,
        request: &[u8],
        mut take: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        for _ in 0..ATTEMPTS {
            self.send(kind, NLM_F_REQUEST | NLM_F_DUMP, request)?;
            let mut found = Vec::new();
            let whole = self.receive(|kind, payload| found.extend(take(kind, payload)))?;
            if whole {
                return Ok(found);
            }
        }
        Err(NetlinkError::Interrupted)
    }

    /// Asks for one thing and gives what `take` makes of the answer.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn get<T>(
        &mut self,
        kind: u16,
        request: &[u8],
        mut take: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> Result<Option<T>, NetlinkError> {
        // NLM_F_ACK ends the answer as DONE ends a dump; traffic control only tells its multicast group without NLM_F_ECHO
        // (`qdisc_get_notify`, net/sched/sch_api.c).
        self.send(kind, NLM_F_REQUEST | NLM_F_ACK | NLM_F_ECHO, request)?;
        let mut found = None;
        self.receive(|kind, payload| found = found.take().or_else(|| take(kind, payload)))?;
        Ok(found)
    }

    /// Asks for a change (`flags` beyond REQUEST and ACK) and waits until it is made.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn change(&mut self, kind: u16, flags: u16, request: &[u8]) -> Result<(), NetlinkError> {
        self.send(kind, NLM_F_REQUEST | NLM_F_ACK | flags, request)?;
        self.receive(|_, _| ()).map(|_| ())
    }

    /// As [`Connection::change`] for several changes in one system call: the kernel makes them one after the other
    /// (`netlink_rcv_skb`, net/netlink/af_netlink.c), each whatever came of the ones before, and a process that is killed
    /// has made all of them or none. What came of each.
    ///
    /// # Errors
    /// When the kernel cannot be asked; its refusals are in the result.
    pub fn change_together<const N: usize>(
        &mut self,
        changes: [(u16, u16, &[u8]); N],
    ) -> Result<[Result<(), NetlinkError>; N], NetlinkError> {
        let mut bytes = Vec::new();
        for (kind, flags, request) in changes {
            let flags = NLM_F_REQUEST | NLM_F_ACK | flags;
            bytes.extend(self.message(kind, flags, request)?);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        let last = self.sequence;
        self.socket.send(&bytes, 0)?;
        let mut outcomes = std::array::from_fn(|_| Ok(()));
        for (index, outcome) in outcomes.iter_mut().enumerate() {
            self.sequence = last.wrapping_sub((N - 1 - index) as u32);
            *outcome = match self.receive(|_, _| ()) {
                Err(error @ (NetlinkError::Io(_) | NetlinkError::Malformed)) => return Err(error),
                answered => answered.map(|_| ()),
            };
        }
        Ok(outcomes)
    }

    fn send(&mut self, kind: u16, flags: u16, request: &[u8]) -> Result<(), NetlinkError> {
        let bytes = self.message(kind, flags, request)?;
        self.socket.send(&bytes, 0)?;
        Ok(())
    }

    /// A message with the next sequence number.
    fn message(&mut self, kind: u16, flags: u16, request: &[u8]) -> Result<Vec<u8>, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = vec![0; 16];
        let length = u32::try_from(16 + request.len()).map_err(|_| NetlinkError::Malformed)?;
        let mut header = NetlinkBuffer::new(&mut bytes);
        header.set_length(length);
        header.set_message_type(kind);
        header.set_flags(flags);
        header.set_sequence_number(self.sequence);
        header.set_port_number(0);
        bytes.extend_from_slice(request);
        Ok(bytes)
    }

    /// Reads the answer to the last request; `false` when the kernel says that it is not consistent.
    fn receive(&mut self, mut take: impl FnMut(u16, &[u8])) -> Result<bool, NetlinkError> {
        let mut whole = true;
        let mut buffer = Vec::with_capacity(BUFFER);
        loop {
            buffer.clear();
            self.socket.recv(&mut buffer, 0)?;
            let mut rest = buffer.as_slice();
            while !rest.is_empty() {
                let message = NetlinkBuffer::new_checked(rest).map_err(|_| NetlinkError::Malformed)?;
                let length = message.length() as usize;
                let payload = rest.get(16..length).ok_or(NetlinkError::Malformed)?;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                // An answer to an earlier, abandoned request.
                if message.sequence_number() != self.sequence {
                    continue;
                }
                whole &= message.flags() & DUMP_INTERRUPTED == 0;
                match message.message_type() {
                    DONE | ERROR => return status(payload).map(|()| whole),
                    OVERRUN => whole = false,
                    kind => take(kind, payload),
                }
            }
        }
    }
}

/// DONE and ERROR begin with a negative errno, or 0.
fn status(payload: &[u8]) -> Result<(), NetlinkError> {
    let code = payload.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    if code == 0 { Ok(()) } else { Err(NetlinkError::Refused(io::Error::from_raw_os_error(-code))) }
}
