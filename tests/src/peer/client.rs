//! The client: one connection or datagram at a time.

use super::{Answer, Outcome, Transport, parse_greeting};
use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

/// One connection to make.
#[derive(Clone, Debug)]
pub struct Connect {
    pub proto: Transport,
    pub to: SocketAddr,
    /// Own address and port; port 0 or `None` leave the choice to the kernel.
    pub bind: Option<SocketAddr>,
    pub timeout: Duration,
    /// How many bytes the server shall send after its greeting (TCP only).
    pub bytes: u64,
}

impl Connect {
    /// With a timeout of 2 s and nothing special.
    pub fn new(proto: Transport, to: SocketAddr) -> Self {
        Self { proto, to, bind: None, timeout: Duration::from_secs(2), bytes: 0 }
    }
}

/// Connects once from the calling thread's network namespace. Sends exactly one datagram for UDP.
///
/// # Errors
/// Only when no socket can be made or bound; everything that the network answers is an [`Outcome`].
pub fn connect(request: &Connect) -> Result<Answer> {
    let socket = bound_socket(request)?;
    let port = socket.local_addr()?.as_socket().map_or(0, |address| address.port());
    // A refused connect clears the socket's source address, so ask the routing table for it first; sends nothing.
    let source = source_towards(request).unwrap_or_else(|| wildcard(request.to));
    let mut answer = Answer {
        proto: request.proto,
        to: request.to,
        result: Outcome::Ok,
        detail: None,
        local: SocketAddr::new(source, port),
        saw: None,
        server_local: None,
        pod: None,
        bytes: 0,
        ms: 0.0,
    };
    let start = Instant::now();
    let exchanged = match request.proto {
        Transport::Tcp => over_tcp(socket, request, &mut answer),
        Transport::Udp => over_udp(&socket.into(), request, &mut answer),
    };
    answer.ms = start.elapsed().as_secs_f64() * 1e3;
    if let Err(error) = exchanged {
        answer.result = match error.kind() {
            ErrorKind::ConnectionRefused => Outcome::Refused,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::Timeout,
            _ => Outcome::Error,
        };
        answer.detail = (answer.result == Outcome::Error).then(|| error.to_string());
    }
    Ok(answer)
}

fn bound_socket(request: &Connect) -> Result<Socket> {
    let (kind, protocol) = match request.proto {
        Transport::Tcp => (Type::STREAM, Protocol::TCP),
        Transport::Udp => (Type::DGRAM, Protocol::UDP),
    };
    let socket = Socket::new(Domain::for_address(request.to), kind, Some(protocol)).context("making a socket")?;
    let bind = request.bind.unwrap_or_else(|| SocketAddr::new(wildcard(request.to), 0));
    if bind.port() != 0 {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&bind.into()).with_context(|| format!("binding to {bind}"))?;
    Ok(socket)
}

fn source_towards(request: &Connect) -> Option<IpAddr> {
    let bind = request.bind.map_or_else(|| wildcard(request.to), |bind| bind.ip());
    let probe = UdpSocket::bind((bind, 0)).ok()?;
    probe.connect(request.to).ok()?;
    Some(probe.local_addr().ok()?.ip())
}

fn over_tcp(socket: Socket, request: &Connect, answer: &mut Answer) -> std::io::Result<()> {
    socket.connect_timeout(&request.to.into(), request.timeout)?;
    let mut stream = std::net::TcpStream::from(socket);
    answer.local = stream.local_addr()?;
    stream.set_read_timeout(Some(request.timeout))?;
    stream.set_write_timeout(Some(request.timeout))?;
    stream.write_all(
        format!("GET /{} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", request.bytes, request.to).as_bytes(),
    )?;
    let mut response = Vec::new();
    stream.read_to_end(&mut response)?;
    answer.bytes = response.len() as u64;
    let body = response.windows(4).position(|window| window == b"\r\n\r\n").map_or(0, |end| end + 4);
    understood(answer, &response[body..])
}

fn over_udp(socket: &UdpSocket, request: &Connect, answer: &mut Answer) -> std::io::Result<()> {
    socket.connect(request.to)?;
    answer.local = socket.local_addr()?;
    socket.set_read_timeout(Some(request.timeout))?;
    socket.send(b"hello\n")?;
    let mut response = [0; 2048];
    let length = socket.recv(&mut response)?;
    answer.bytes = length as u64;
    understood(answer, &response[..length])
}

fn understood(answer: &mut Answer, body: &[u8]) -> std::io::Result<()> {
    let text = String::from_utf8_lossy(body);
    let Some((pod, saw, local)) = parse_greeting(&text) else {
        return Err(std::io::Error::other(format!("an answer that is not a lab server's, {} bytes", body.len())));
    };
    (answer.pod, answer.saw, answer.server_local) = (Some(pod), Some(saw), Some(local));
    Ok(())
}

fn wildcard(like: SocketAddr) -> IpAddr {
    if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}
