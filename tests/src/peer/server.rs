//! The server: answers every connection and datagram with who it is and whom it saw.

use super::{Served, Transport, greeting, plain};
use anyhow::{Context, Result};
use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{IoSliceMut, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Threads that accept on each TCP port; a connection is answered on the thread that accepted it.
const ACCEPTORS: usize = 4;
/// A client that sends nothing for so long is let go.
const PATIENCE: Duration = Duration::from_secs(5);

/// What to serve; every port is opened for IPv4 and IPv6, or on one address.
#[derive(Clone, Debug, Default)]
pub struct Serve {
    /// Reported to the clients.
    pub name: String,
    pub tcp: Vec<u16>,
    pub udp: Vec<u16>,
    /// The address to listen on; any when `None`.
    pub address: Option<IpAddr>,
    /// Log no requests.
    pub quiet: bool,
}

/// Serves for ever. Prints `ready` when every port is open, then one [`Served`] as JSON a request.
pub fn serve(options: &Serve) -> Result<()> {
    let shared = Arc::new(options.clone());
    let mut threads = Vec::new();
    for &port in &options.tcp {
        let listener = tcp_listener(options.address, port).with_context(|| format!("listening on tcp port {port}"))?;
        for _ in 0..ACCEPTORS {
            let (listener, shared) = (listener.try_clone()?, shared.clone());
            threads.push(thread::spawn(move || serve_tcp(&listener, &shared)));
        }
    }
    for &port in &options.udp {
        let any = [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)];
        for address in options.address.map_or_else(|| any.to_vec(), |address| vec![address]) {
            let socket = udp_socket(SocketAddr::new(address, port)).with_context(|| format!("udp port {port}"))?;
            let shared = shared.clone();
            threads.push(thread::spawn(move || serve_udp(&socket, &shared)));
        }
    }
    say("ready");
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a server thread panicked"))??;
    }
    Ok(())
}

fn tcp_listener(address: Option<IpAddr>, port: u16) -> Result<TcpListener> {
    let at = SocketAddr::new(address.unwrap_or(Ipv6Addr::UNSPECIFIED.into()), port);
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    if at.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

fn udp_socket(address: SocketAddr) -> Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    } else {
        setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn serve_tcp(listener: &TcpListener, options: &Serve) -> Result<()> {
    loop {
        let (stream, peer) = listener.accept().context("accepting")?;
        // A client that went away is its own business.
        let _ = answer_tcp(stream, plain(peer), options);
    }
}

fn answer_tcp(mut stream: TcpStream, saw: SocketAddr, options: &Serve) -> Result<()> {
    let local = plain(stream.local_addr()?);
    log(options, Transport::Tcp, saw, local);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") && request.len() < 65_536 {
        match stream.read(&mut buffer)? {
            0 => break,
            read => request.extend_from_slice(&buffer[..read]),
        }
    }
    let greeting = greeting(&options.name, saw, local);
    let extra = wanted_bytes(&request);
    let length = greeting.len() + extra;
    stream.write_all(
        format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{greeting}").as_bytes(),
    )?;
    std::io::copy(&mut std::io::repeat(b'x').take(extra as u64), &mut stream)?;
    Ok(())
}

/// The number in `GET /<number> HTTP/1.1`; 0 without one.
fn wanted_bytes(request: &[u8]) -> usize {
    let text = String::from_utf8_lossy(request);
    text.split(' ').nth(1).and_then(|path| path.trim_start_matches('/').parse().ok()).unwrap_or(0)
}

fn serve_udp(socket: &UdpSocket, options: &Serve) -> Result<()> {
    let port = socket.local_addr()?.port();
    loop {
        let (saw, local) = receive(socket, port)?;
        log(options, Transport::Udp, saw, local);
        // The client may have gone.
        let _ = socket.send_to(greeting(&options.name, saw, local).as_bytes(), saw);
    }
}

/// One datagram's sender, and the address that it was sent to.
fn receive(socket: &UdpSocket, port: u16) -> Result<(SocketAddr, SocketAddr)> {
    let mut buffer = [0; 2048];
    let mut space = cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::empty())?;
    let from = message.address.context("a datagram without a sender")?;
    let saw = from
        .as_sockaddr_in()
        .map(|v4| SocketAddr::from((v4.ip(), v4.port())))
        .or_else(|| from.as_sockaddr_in6().map(|v6| SocketAddr::from((v6.ip(), v6.port()))))
        .context("a sender that is not an IP address")?;
    let local = message
        .cmsgs()?
        .find_map(|control| match control {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                Some(IpAddr::from(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr))))
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => Some(IpAddr::from(Ipv6Addr::from(info.ipi6_addr.s6_addr))),
            _ => None,
        })
        .context("a datagram without packet information")?;
    Ok((saw, SocketAddr::new(local, port)))
}

fn log(options: &Serve, proto: Transport, saw: SocketAddr, local: SocketAddr) {
    if options.quiet {
        return;
    }
    if let Ok(line) = serde_json::to_string(&Served { proto, saw, local }) {
        say(&line);
    }
}

/// One whole line at once: several threads speak.
fn say(line: &str) {
    let mut stdout = std::io::stdout().lock();
    // Nobody reads any more: serve on.
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}
