//! Conntrack entries made over netlink, as many as one likes: what a node that holds too many connections has.

use crate::netlink::{NLM_F_CREATE, NetfilterSocket, Request, nested};
use crate::netns::Netns;
use anyhow::{Context, Result};
use std::net::Ipv4Addr;
use std::ops::Range;

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW`.
const CT_NEW: u16 = 1 << 8;
const AF_INET: u8 = 2;
/// include/uapi/linux/netfilter/nfnetlink_conntrack.h.
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_TIMEOUT: u16 = 7;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
/// `IPS_SEEN_REPLY | IPS_ASSURED | IPS_CONFIRMED`: an entry that the kernel does not throw out for a new one
/// (nf_conntrack_core.c, early_drop).
const STATUS: u32 = 2 | 4 | 8;
/// Seconds that they live, unless they are flushed.
const TIMEOUT: u32 = 600;
/// Messages in one datagram.
const BATCH: usize = 256;

/// Adds UDP entries to a namespace's table, one a number; those that it refuses are missing.
pub fn fill(netns: &Netns, numbers: Range<u32>) -> Result<()> {
    netns.run_in(|| {
        let mut socket = NetfilterSocket::open(0)?;
        let numbers: Vec<u32> = numbers.collect();
        for batch in numbers.chunks(BATCH) {
            let attributes: Vec<_> = batch.iter().map(|number| entry(*number)).collect();
            let attributes: Vec<Vec<(u16, &[u8])>> = attributes.iter().map(borrowed).collect();
            let requests: Vec<Request> = attributes
                .iter()
                .map(|attributes| Request { kind: CT_NEW, flags: NLM_F_CREATE, family: AF_INET, res_id: 0, attributes })
                .collect();
            socket.send(&requests).context("adding conntrack entries")?;
        }
        Ok(())
    })?
}

type Attributes = Vec<(u16, Vec<u8>)>;

fn borrowed(attributes: &Attributes) -> Vec<(u16, &[u8])> {
    attributes.iter().map(|(kind, payload)| (*kind, payload.as_slice())).collect()
}

/// The `number`-th connection: clients of 10.99.0.0/16, 16,384 ports each, to one server.
fn entry(number: u32) -> Attributes {
    let client = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 99, 0, 1)) + number / 16_384);
    let server = Ipv4Addr::new(10, 98, 0, 1);
    let port = 1024 + (number % 16_384) as u16;
    vec![
        (CTA_TUPLE_ORIG, tuple(client, port, server, 53)),
        (CTA_TUPLE_REPLY, tuple(server, 53, client, port)),
        (CTA_STATUS, STATUS.to_be_bytes().to_vec()),
        (CTA_TIMEOUT, TIMEOUT.to_be_bytes().to_vec()),
    ]
}

fn tuple(src: Ipv4Addr, sport: u16, dst: Ipv4Addr, dport: u16) -> Vec<u8> {
    let addresses = nested(&[(1, &src.octets()), (2, &dst.octets())]);
    let ports = nested(&[(1, &[17]), (2, &sport.to_be_bytes()), (3, &dport.to_be_bytes())]);
    nested(&[(CTA_TUPLE_IP, &addresses), (CTA_TUPLE_PROTO, &ports)])
}
