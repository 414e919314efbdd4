//! What listens inside the pods of this node.

use super::flow::Proto;
use super::state::Socket;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Listening sockets by the address of the network namespace that they are in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSockets {
    by_address: BTreeMap<IpAddr, Vec<Socket>>,
    /// Address → the first of the same namespace.
    first: BTreeMap<IpAddr, IpAddr>,
}

impl PodSockets {
    /// Adds a network namespace: its addresses and its sockets.
    pub fn insert(&mut self, addresses: impl IntoIterator<Item = IpAddr>, sockets: &[Socket]) {
        let addresses: BTreeSet<IpAddr> = addresses.into_iter().filter(|address| !address.is_loopback()).collect();
        for address in &addresses {
            self.by_address.insert(*address, sockets.to_vec());
            self.first.extend(addresses.first().map(|first| (*address, *first)));
        }
    }

    /// The address by which a namespace with several is called: its first, IPv4 before IPv6.
    pub fn first(&self, address: IpAddr) -> IpAddr {
        self.first.get(&address).copied().unwrap_or(address)
    }

    /// Forgets a namespace: its sockets do not tell what becomes of connections.
    pub fn forget(&mut self, address: IpAddr) {
        self.by_address.remove(&address);
    }

    /// The addresses of all namespaces, sorted.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.by_address.keys().copied()
    }

    /// All sockets of the namespace with this address; `None`: none was found.
    pub fn sockets(&self, address: IpAddr) -> Option<&[Socket]> {
        self.by_address.get(&address).map(Vec::as_slice)
    }

    /// Whether a process takes connections to this address and port; `None`: no namespace with the address was found.
    pub fn listens(&self, proto: Proto, address: IpAddr, port: u16) -> Option<bool> {
        let sockets = self.by_address.get(&address)?;
        Some(sockets.iter().any(|socket| socket.proto == proto && socket.port == port && takes(socket, address)))
    }

    /// Ports on which something takes connections to this address, with the process where known; `None` as above.
    pub fn ports(&self, proto: Proto, address: IpAddr) -> Option<Vec<(u16, Option<&str>)>> {
        let sockets = self.by_address.get(&address)?;
        let mut ports: Vec<(u16, Option<&str>)> = sockets
            .iter()
            .filter(|socket| socket.proto == proto && takes(socket, address))
            .map(|socket| (socket.port, socket.process.as_deref()))
            .collect();
        ports.sort_unstable();
        ports.dedup_by_key(|(port, _)| *port);
        Some(ports)
    }

    /// A socket on this port that is bound to the loopback address alone, and so out of reach from outside the pod.
    pub fn only_on_loopback(&self, proto: Proto, address: IpAddr, port: u16) -> bool {
        self.by_address.get(&address).is_some_and(|sockets| {
            let mut on_port = sockets.iter().filter(|socket| socket.proto == proto && socket.port == port).peekable();
            on_port.peek().is_some() && on_port.all(|socket| socket.address.is_loopback())
        })
    }
}

/// Whether a socket takes packets to `address` (net/ipv4/inet_hashtables.c, `compute_score`).
fn takes(socket: &Socket, address: IpAddr) -> bool {
    match socket.address {
        at if at == address => true,
        IpAddr::V4(any) => any.is_unspecified() && address.is_ipv4(),
        IpAddr::V6(any) => any.is_unspecified() && (address.is_ipv6() || !socket.v6only),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(address: &str, port: u16, v6only: bool) -> Socket {
        let address = address.parse().expect("an address");
        Socket { proto: Proto::Tcp, address, port, v6only, process: None }
    }

    #[test]
    fn wildcards_loopback_and_v6only_are_told_apart() {
        let pod: IpAddr = "10.244.1.9".parse().expect("an address");
        let mut pods = PodSockets::default();
        let sockets = [socket("::", 80, false), socket("::", 81, true), socket("127.0.0.1", 82, false)];
        pods.insert([pod], &sockets);
        assert_eq!(pods.listens(Proto::Tcp, pod, 80), Some(true));
        assert_eq!(pods.listens(Proto::Tcp, pod, 81), Some(false));
        assert_eq!(pods.listens(Proto::Tcp, pod, 82), Some(false));
        assert!(pods.only_on_loopback(Proto::Tcp, pod, 82) && !pods.only_on_loopback(Proto::Tcp, pod, 80));
        assert_eq!(pods.ports(Proto::Tcp, pod), Some(vec![(80, None)]));
        assert_eq!(pods.listens(Proto::Tcp, "10.244.1.10".parse().expect("an address"), 80), None);
    }
}
