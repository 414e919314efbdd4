//! `ss -lntup`-like listings.

use super::notes::{Notes, quote};
use crate::core::model::flow::Proto;
use crate::core::model::state::Socket;
use std::net::{IpAddr, Ipv6Addr};

/// Reads the listening (TCP, SCTP) and unconnected (UDP) sockets of a listing, with or without header and protocol
/// column; other lines of a listing (established connections) are skipped.
pub fn sockets(text: &str, notes: &mut Notes) -> Vec<Socket> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let Some(at) = words.iter().position(|word| matches!(*word, "LISTEN" | "UNCONN")) else {
            if !is_other_line(&words) {
                notes.add(index + 1, format!("not a line of `ss`: {}", quote(line)));
            }
            continue;
        };
        let proto = match at.checked_sub(1).and_then(|at| words.get(at)) {
            Some(name) => Proto::from_name(name).filter(|proto| proto.has_ports()),
            None => Some(if words[at] == "LISTEN" { Proto::Tcp } else { Proto::Udp }),
        };
        // Netlink, packet, raw and Unix sockets stand in the same listing when no protocol was asked for.
        let Some(proto) = proto else { continue };
        match words.get(at + 3).and_then(|local| endpoint(local)) {
            Some((address, port, v6only)) => {
                found.push(Socket { proto, address, port, v6only, process: process(line) });
            }
            None => notes.add(index + 1, format!("no local address and port: {}", quote(line))),
        }
    }
    found
}

/// Writes what [`sockets`] reads, in `ss`'s columns.
pub fn write(sockets: &[Socket]) -> String {
    let mut text = String::new();
    for socket in sockets {
        let state = if socket.proto == Proto::Udp { "UNCONN" } else { "LISTEN" };
        let local = match socket.address {
            IpAddr::V6(address) if address.is_unspecified() && !socket.v6only => format!("*:{}", socket.port),
            IpAddr::V6(address) => format!("[{address}]:{}", socket.port),
            IpAddr::V4(address) => format!("{address}:{}", socket.port),
        };
        let peer = if socket.address.is_ipv4() { "0.0.0.0:*" } else { "*:*" };
        text.push_str(&format!("{} {state} 0 0 {local} {peer}", socket.proto));
        if let Some((name, pid)) = socket.process.as_deref().and_then(|process| process.rsplit_once('/')) {
            text.push_str(&format!(" users:((\"{name}\",pid={pid},fd=0))"));
        }
        text.push('\n');
    }
    text
}

fn is_other_line(words: &[&str]) -> bool {
    const STATES: [&str; 10] = [
        "ESTAB",
        "SYN-SENT",
        "SYN-RECV",
        "FIN-WAIT-1",
        "FIN-WAIT-2",
        "TIME-WAIT",
        "CLOSE-WAIT",
        "LAST-ACK",
        "CLOSING",
        "CLOSED",
    ];
    words.is_empty() || words.contains(&"Local") || words.iter().take(2).any(|word| STATES.contains(word))
}

/// `0.0.0.0:80`, `[::]:80`, `*:80` (an IPv6 wildcard that takes IPv4 too), `127.0.0.53%lo:53`, `[fe80::1]%eth0:546`.
fn endpoint(text: &str) -> Option<(IpAddr, u16, bool)> {
    let (host, port) = text.rsplit_once(':')?;
    let port = port.parse().ok()?;
    if host == "*" {
        return Some((IpAddr::V6(Ipv6Addr::UNSPECIFIED), port, false));
    }
    let host = host.split_once('%').map_or(host, |(host, _)| host);
    let address = host.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
    Some((address, port, address == IpAddr::V6(Ipv6Addr::UNSPECIFIED)))
}

/// `users:(("name",pid=1,fd=3),…)` → `name/1`.
fn process(line: &str) -> Option<String> {
    let (_, after) = line.split_once("users:((\"")?;
    let (name, after) = after.split_once("\",pid=")?;
    let pid: u32 = after.split(',').next()?.parse().ok()?;
    Some(format!("{name}/{pid}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ss_prints() {
        let text = "\
Netid State  Recv-Q Send-Q  Local Address:Port  Peer Address:PortProcess
tcp LISTEN 0      4096   127.0.0.1:10249 0.0.0.0:*
tcp LISTEN 0      256            *:9090        *:*    users:((\"node agent\",pid=42,fd=3),(\"x\",pid=43,fd=3))
udp   UNCONN 0 0 127.0.0.53%lo:53 0.0.0.0:*
udp   UNCONN 0 0 [fe80::1]%eth0:546 [::]:*
LISTEN 0 128 [::]:22 [::]:*
tcp   ESTAB 0 0 10.0.0.1:22 10.0.0.2:5000
nl UNCONN 0 0 rtnl:kernel *
tcp LISTEN 0 5 nowhere *
what
";
        let mut notes = Notes::new("ss.txt");
        let found = sockets(text, &mut notes);
        let shown: Vec<_> = found.iter().map(|s| (s.proto, s.address.to_string(), s.port, s.v6only)).collect();
        assert_eq!(
            shown,
            [
                (Proto::Tcp, "127.0.0.1".to_owned(), 10249, false),
                (Proto::Tcp, "::".to_owned(), 9090, false),
                (Proto::Udp, "127.0.0.53".to_owned(), 53, false),
                (Proto::Udp, "fe80::1".to_owned(), 546, false),
                (Proto::Tcp, "::".to_owned(), 22, true),
            ]
        );
        assert_eq!(found[1].process.as_deref(), Some("node agent/42"));
        assert_eq!(notes.finish().iter().map(|note| note.line).collect::<Vec<_>>(), [9, 10]);
        let mut notes = Notes::new("again");
        assert_eq!(sockets(&write(&found), &mut notes), found);
        assert_eq!(notes.finish(), []);
    }
}
