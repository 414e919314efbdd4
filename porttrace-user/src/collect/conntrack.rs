//! Conntrack entries through ctnetlink, or from `/proc` where the kernel does not have it.

use super::attributes::{address, attributes, be16, be32};
use super::netlink::socket::{Connection, NetlinkError};
use crate::core::model::flow::{Proto, Tuple};
use crate::core::model::state::ConntrackEntry;
use crate::core::parse::conntrack as text;
use crate::core::parse::notes::Notes;
use std::fs;
use thiserror::Error;

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET` (include/uapi/linux/netfilter/nfnetlink_conntrack.h).
const GET: u16 = 0x0101;
const PROC: &str = "/proc/thread-self/net/nf_conntrack";

/// `enum tcp_conntrack` and `enum sctp_conntrack` by number, as `conntrack` prints them.
const TCP: [&str; 10] = [
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    "SYN_SENT2",
];
const SCTP: [&str; 10] = [
    "NONE",
    "CLOSED",
    "COOKIE_WAIT",
    "COOKIE_ECHOED",
    "ESTABLISHED",
    "SHUTDOWN_SENT",
    "SHUTDOWN_RECD",
    "SHUTDOWN_ACK_SENT",
    "HEARTBEAT_SENT",
    "HEARTBEAT_ACKED",
];

/// Why the entries are unknown.
#[derive(Debug, Error)]
#[error("conntrack entries are unknown: {netlink}; {PROC}: {proc}")]
pub struct ConntrackError {
    netlink: NetlinkError,
    proc: std::io::Error,
}

/// The entries of the calling thread's network namespace that `keep` wants, IPv4 and IPv6.
///
/// # Errors
/// When neither ctnetlink nor `/proc` gives them (both want CAP_NET_ADMIN or root).
pub fn dump(keep: impl Fn(&ConntrackEntry) -> bool) -> Result<Vec<ConntrackEntry>, ConntrackError> {
    // struct nfgenmsg { family, version, res_id }: family 0 asks for both.
    let answer = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)
        .and_then(|mut connection| connection.dump(GET, &[0; 4], |_, payload| entry(payload.get(4..)?).filter(&keep)));
    let netlink = match answer {
        Ok(entries) => return Ok(entries),
        Err(error) => error,
    };
    match fs::read(PROC) {
        Ok(bytes) => {
            let mut entries = text::entries(&String::from_utf8_lossy(&bytes), &mut Notes::new(PROC));
            entries.retain(keep);
            Ok(entries)
        }
        Err(proc) => Err(ConntrackError { netlink, proc }),
    }
}

/// Whether a connection goes to, or is redirected to, one of these ports.
pub fn concerns(entry: &ConntrackEntry, ports: &[u16]) -> bool {
    entry.original.proto.has_ports()
        && [entry.original.dport, entry.reply.sport].iter().any(|port| ports.contains(port))
}

pub(super) fn entry(bytes: &[u8]) -> Option<ConntrackEntry> {
    /// `IPS_SEEN_REPLY` and `IPS_ASSURED` (include/uapi/linux/netfilter/nf_conntrack_common.h).
    const SEEN_REPLY: u32 = 2;
    const ASSURED: u32 = 4;
    let (mut original, mut reply, mut status, mut state) = (None, None, 0, "");
    let (mut mark, mut timeout, mut zone) = (0, None, 0);
    // enum ctattr_type
    for (kind, value) in attributes(bytes) {
        match kind {
            1 => {
                original = tuple(value);
                zone = tuple_zone(value).unwrap_or(zone);
            }
            2 => reply = tuple(value),
            3 => status = be32(value)?,
            4 => state = protocol_state(value),
            7 => timeout = be32(value).map(u64::from),
            8 => mark = be32(value)?,
            18 => zone = be16(value)?,
            _ => {}
        }
    }
    Some(ConntrackEntry {
        original: original?,
        reply: reply?,
        state: state.to_owned(),
        assured: status & ASSURED != 0,
        unreplied: status & SEEN_REPLY == 0,
        mark,
        timeout,
        zone,
    })
}

/// `CTA_TUPLE_ZONE`: a zone of one direction only.
fn tuple_zone(bytes: &[u8]) -> Option<u16> {
    attributes(bytes).find(|(kind, _)| *kind == 3).and_then(|(_, value)| be16(value))
}

fn tuple(bytes: &[u8]) -> Option<Tuple> {
    let (mut src, mut dst, mut proto) = (None, None, None);
    let (mut sport, mut dport) = (0, 0);
    for (kind, value) in attributes(bytes) {
        match kind {
            // CTA_TUPLE_IP: sources are 1 (IPv4) and 3 (IPv6), destinations 2 and 4.
            1 => {
                for (kind, value) in attributes(value) {
                    match kind {
                        1 | 3 => src = address(value),
                        2 | 4 => dst = address(value),
                        _ => {}
                    }
                }
            }
            2 => (proto, sport, dport) = protocol(value)?,
            _ => {}
        }
    }
    Some(Tuple { proto: Proto::from_number(proto?), src: src?, sport, dst: dst?, dport })
}

/// `CTA_TUPLE_PROTO`: number and ports; for ICMP the identifier, then type and code.
fn protocol(bytes: &[u8]) -> Option<(Option<u8>, u16, u16)> {
    let (mut proto, mut sport, mut dport) = (None, 0, 0);
    for (kind, value) in attributes(bytes) {
        match kind {
            1 => proto = value.first().copied(),
            2 | 4 | 7 => sport = be16(value)?,
            3 => dport = be16(value)?,
            5 | 8 => dport |= u16::from(*value.first()?) << 8,
            6 | 9 => dport |= u16::from(*value.first()?),
            _ => {}
        }
    }
    Some((proto, sport, dport))
}

/// `CTA_PROTOINFO`: TCP's or SCTP's state, the first attribute inside.
fn protocol_state(bytes: &[u8]) -> &'static str {
    let of = |names: [&'static str; 10], value| {
        let number = attributes(value).find(|(kind, _)| *kind == 1).and_then(|(_, value)| value.first().copied());
        number.and_then(|number| names.get(usize::from(number)).copied()).unwrap_or_default()
    };
    attributes(bytes)
        .map(|(kind, value)| match kind {
            1 => of(TCP, value),
            3 => of(SCTP, value),
            _ => "",
        })
        .next()
        .unwrap_or_default()
}
