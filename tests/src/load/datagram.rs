//! Datagrams from any source port by one raw socket: one system call a connection.

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket};
use pnet::packet::ip::IpNextHeaderProtocols;
use pnet::packet::ipv4::MutableIpv4Packet;
use pnet::packet::udp::MutableUdpPacket;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

const IP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const PAYLOAD: &[u8] = b"ping";

/// Sends datagrams of one address pair. Belongs to the network namespace of the thread that made it.
pub struct RawSender {
    fd: OwnedFd,
    packet: Vec<u8>,
    to: SockaddrIn,
}

impl RawSender {
    pub fn new(from: Ipv4Addr, to: SocketAddrV4) -> Result<Self> {
        // IPPROTO_RAW takes the IP header as it is, but for its checksum and length, and never receives.
        let fd = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)
            .context("opening a raw socket")?;
        let mut packet = vec![0; IP_HEADER + UDP_HEADER + PAYLOAD.len()];
        let length = packet.len() as u16;
        let mut header = MutableIpv4Packet::new(&mut packet).context("no room for an IP header")?;
        header.set_version(4);
        header.set_header_length((IP_HEADER / 4) as u8);
        header.set_total_length(length);
        header.set_ttl(64);
        header.set_next_level_protocol(IpNextHeaderProtocols::Udp);
        header.set_source(from);
        header.set_destination(*to.ip());
        // A checksum of 0 says that there is none (RFC 768).
        let mut datagram = MutableUdpPacket::new(&mut packet[IP_HEADER..]).context("no room for a UDP header")?;
        datagram.set_destination(to.port());
        datagram.set_length((UDP_HEADER + PAYLOAD.len()) as u16);
        datagram.set_payload(PAYLOAD);
        Ok(Self { fd, packet, to: SocketAddrV4::new(*to.ip(), 0).into() })
    }

    /// Sends one from this port.
    pub fn send(&mut self, port: u16) -> Result<()> {
        self.packet[IP_HEADER..IP_HEADER + 2].copy_from_slice(&port.to_be_bytes());
        sendto(self.fd.as_raw_fd(), &self.packet, &self.to, MsgFlags::empty())
            .with_context(|| format!("sending a datagram from port {port} to {}", self.to))?;
        Ok(())
    }
}

/// Sends small datagrams of one flow for the given time, from a port of its own: how many.
pub fn flood(to: SocketAddrV4, duration: Duration) -> Result<u64> {
    /// Sent between two looks at the clock.
    const BURST: u64 = 64;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(to)?;
    let end = Instant::now() + duration;
    let mut sent = 0;
    while Instant::now() < end {
        for _ in 0..BURST {
            socket.send(PAYLOAD)?;
        }
        sent += BURST;
    }
    Ok(sent)
}
