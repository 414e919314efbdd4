//! One connection really tried, from the calling thread's network namespace.

use crate::core::matrix::Tried;
use crate::core::model::flow::Proto;
use crate::core::reach::Outcome;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::timeout;

/// How long an answer may take; within one node it takes well under a millisecond.
const PATIENCE: Duration = Duration::from_millis(1_500);

/// Tries to reach `to` from `source` (an address of this node): a TCP connect that is closed at once, or one UDP datagram of
/// one zero byte. `None` for protocols that cannot be tried.
pub async fn attempt(proto: Proto, source: IpAddr, to: SocketAddr) -> Option<Tried> {
    let start = Instant::now();
    let result = match proto {
        Proto::Tcp => timeout(PATIENCE, connect(source, to)).await,
        Proto::Udp => timeout(PATIENCE, ask(source, to)).await,
        _ => return None,
    };
    let took = start.elapsed().as_secs_f64() * 1e3;
    let tried = |outcome, text: String| Some(Tried { outcome, text });
    match result {
        Ok(Ok(())) if proto == Proto::Udp => tried(Outcome::Works, format!("answered after {took:.1} ms")),
        Ok(Ok(())) => tried(Outcome::Works, format!("connected in {took:.1} ms")),
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => {
            tried(Outcome::Refused, format!("refused after {took:.1} ms"))
        }
        Ok(Err(error)) => tried(Outcome::Silent, format!("failed: {error}")),
        // A UDP server need not answer what it does not understand.
        Err(_) if proto == Proto::Udp => {
            tried(Outcome::Unknown, format!("neither an answer nor a refusal within {} ms", PATIENCE.as_millis()))
        }
        Err(_) => tried(Outcome::Silent, format!("no answer within {} ms", PATIENCE.as_millis())),
    }
}

async fn connect(source: IpAddr, to: SocketAddr) -> io::Result<()> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.bind(SocketAddr::new(source, 0))?;
    socket.connect(to).await.map(drop)
}

async fn ask(source: IpAddr, to: SocketAddr) -> io::Result<()> {
    let socket = UdpSocket::bind(SocketAddr::new(source, 0)).await?;
    socket.connect(to).await?;
    socket.send(&[0]).await?;
    socket.recv(&mut [0; 64]).await.map(drop)
}
