//! Netfilter's netlink family, as far as the oracle readers need it: requests with acknowledgement, dumps, multicast groups.

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, setsockopt, socket,
    sockopt,
};
use std::os::fd::{AsRawFd, OwnedFd};

pub const NLM_F_ACK: u16 = 4;
pub const NLM_F_CREATE: u16 = 0x400;
pub const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `struct nlmsghdr`, and `struct nfgenmsg` after it.
const HEADER: usize = 16;
const NFGEN: usize = 4;
/// Room for some 100,000 trace messages.
const RECEIVE_BUFFER: usize = 64 << 20;

/// A message of a netfilter subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Subsystem (high byte) and message type.
    pub kind: u16,
    pub family: u8,
    attributes: Vec<u8>,
}

impl Message {
    /// Attribute types (without the nested and byte-order flags) and their payloads, in order.
    pub fn attributes(&self) -> impl Iterator<Item = (u16, &[u8])> {
        attributes(&self.attributes)
    }
}

/// One request to a subsystem.
pub struct Request<'a> {
    /// Subsystem (high byte) and message type.
    pub kind: u16,
    /// `NLM_F_*` besides REQUEST.
    pub flags: u16,
    pub family: u8,
    pub res_id: u16,
    /// Types and payloads.
    pub attributes: &'a [(u16, &'a [u8])],
}

/// A netfilter netlink socket of the calling thread's network namespace.
pub struct NetfilterSocket {
    fd: OwnedFd,
    /// How often the kernel said that it had to throw messages away.
    pub overruns: u64,
}

impl NetfilterSocket {
    /// Opens a socket that listens to `groups` (a bit each, `1 << (group - 1)`).
    pub fn open(groups: u32) -> Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
            .context("opening a netfilter netlink socket")?;
        setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER).context("enlarging the receive buffer")?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups)).context("binding the netlink socket")?;
        Ok(Self { fd, overruns: 0 })
    }

    /// Sends a request and returns the answer up to its acknowledgement or the end of the dump.
    pub fn request(&mut self, request: &Request) -> Result<Vec<Message>> {
        sendto(self.fd.as_raw_fd(), &encode(request), &NetlinkAddr::new(0, 0), MsgFlags::empty())
            .context("sending a netlink request")?;
        let mut answer = Vec::new();
        loop {
            let Some(datagram) = self.receive(MsgFlags::empty())? else { continue };
            for (kind, body) in messages(&datagram) {
                match kind {
                    NLMSG_DONE => return Ok(answer),
                    NLMSG_ERROR => return error_of(body).map(|()| answer),
                    _ => answer.extend(message(kind, body)),
                }
            }
        }
    }

    /// Sends requests in one datagram and waits for no answer.
    pub fn send(&mut self, requests: &[Request]) -> Result<()> {
        let bytes: Vec<u8> = requests.iter().flat_map(encode).collect();
        sendto(self.fd.as_raw_fd(), &bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())
            .context("sending netlink requests")?;
        Ok(())
    }

    /// Everything that has arrived so far; does not wait.
    pub fn drain(&mut self) -> Result<Vec<Message>> {
        let mut all = Vec::new();
        loop {
            let before = self.overruns;
            match self.receive(MsgFlags::MSG_DONTWAIT)? {
                Some(datagram) => all.extend(messages(&datagram).filter_map(|(kind, body)| message(kind, body))),
                None if self.overruns > before => {}
                None => return Ok(all),
            }
        }
    }

    /// One datagram; `None` when there is none, or when messages were lost ([`NetfilterSocket::overruns`] counts it).
    fn receive(&mut self, flags: MsgFlags) -> Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; 1 << 17];
        match recv(self.fd.as_raw_fd(), &mut buffer, flags) {
            Ok(length) => {
                buffer.truncate(length);
                Ok(Some(buffer))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(Errno::ENOBUFS) => {
                self.overruns += 1;
                Ok(None)
            }
            Err(error) => Err(error).context("reading a netlink socket"),
        }
    }
}

/// Attributes of a nested attribute's payload.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & 0x3fff;
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// A big-endian number of 4 or 8 bytes.
pub fn number(payload: &[u8]) -> Option<u64> {
    match payload.len() {
        4 => Some(u64::from(u32::from_be_bytes(payload.try_into().ok()?))),
        8 => Some(u64::from_be_bytes(payload.try_into().ok()?)),
        _ => None,
    }
}

/// A string that ends with NUL.
pub fn text(payload: &[u8]) -> String {
    String::from_utf8_lossy(payload.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

/// Attributes as the payload of an attribute that holds them, or of a message.
pub fn nested(list: &[(u16, &[u8])]) -> Vec<u8> {
    let mut attributes = Vec::new();
    for (kind, payload) in list {
        attributes.extend(u16::try_from(4 + payload.len()).unwrap_or(u16::MAX).to_ne_bytes());
        attributes.extend(kind.to_ne_bytes());
        attributes.extend(*payload);
        attributes.resize(attributes.len().next_multiple_of(4), 0);
    }
    attributes
}

fn encode(request: &Request) -> Vec<u8> {
    let attributes = nested(request.attributes);
    let mut bytes = Vec::new();
    bytes.extend(u32::try_from(HEADER + NFGEN + attributes.len()).unwrap_or(u32::MAX).to_ne_bytes());
    bytes.extend(request.kind.to_ne_bytes());
    bytes.extend((request.flags | NLM_F_REQUEST).to_ne_bytes());
    bytes.extend([0; 8]); // sequence and port: not needed with one request at a time
    bytes.extend([request.family, 0]);
    bytes.extend(request.res_id.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

/// Kinds and bodies (after `struct nlmsghdr`) of a datagram's messages.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

fn message(kind: u16, body: &[u8]) -> Option<Message> {
    let family = *body.first()?;
    Some(Message { kind, family, attributes: body.get(NFGEN..)?.to_vec() })
}

fn error_of(body: &[u8]) -> Result<()> {
    match body.get(..4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(code) => bail!("the kernel refused a netlink request: {}", Errno::from_raw(-code)),
        None => bail!("a netlink answer of {} bytes", body.len()),
    }
}
