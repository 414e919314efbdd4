//! Accounting objects for the `nfacct` match: kube-proxy makes them over netlink, and its rules do not load without them.

use crate::netns::Netns;
use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};
use std::os::fd::AsRawFd;

/// The objects that kube-proxy 1.31 and later makes (`pkg/proxy/metrics/metrics.go`, `IPTablesCTStateInvalidDroppedNFAcctCounter`
/// and `LocalhostNodePortAcceptedNFAcctCounter`).
const NAMES: [&str; 2] = ["ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts"];

const NFNL_SUBSYS_ACCT: u16 = 7;
const NFNL_MSG_ACCT_NEW: u16 = 0;
const NFACCT_NAME: u16 = 1;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;

/// Makes kube-proxy's counters in a namespace.
pub fn create(netns: &Netns) -> Result<()> {
    netns.run_in(|| NAMES.iter().try_for_each(|name| create_one(name)))?
}

fn create_one(name: &str) -> Result<()> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
        .context("opening a netfilter netlink socket")?;
    sendto(socket.as_raw_fd(), &request(name), &NetlinkAddr::new(0, 0), MsgFlags::empty())
        .with_context(|| format!("asking for the counter {name}"))?;
    let mut answer = [0; 512];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    match answer.get(16..20).filter(|_| length >= 20) {
        Some([0, 0, 0, 0]) => Ok(()),
        Some(errno) => bail!("making the counter {name}: errno {}", -i32::from_ne_bytes(errno.try_into()?)),
        None => bail!("making the counter {name}: an answer of {length} bytes"),
    }
}

/// `struct nlmsghdr`, `struct nfgenmsg`, one attribute.
fn request(name: &str) -> Vec<u8> {
    let mut attribute = Vec::new();
    let length = u16::try_from(4 + name.len() + 1).unwrap_or(u16::MAX);
    attribute.extend(length.to_ne_bytes());
    attribute.extend(NFACCT_NAME.to_ne_bytes());
    attribute.extend(name.as_bytes());
    attribute.push(0);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    let mut message = Vec::new();
    message.extend(u32::try_from(16 + 4 + attribute.len()).unwrap_or(u32::MAX).to_ne_bytes());
    message.extend((NFNL_SUBSYS_ACCT << 8 | NFNL_MSG_ACCT_NEW).to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE).to_ne_bytes());
    message.extend([0; 8]); // sequence and port: the kernel fills them in
    message.extend([0; 4]); // nfgen_family, version, res_id
    message.extend(attribute);
    message
}
