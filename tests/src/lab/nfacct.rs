//! Accounting objects for the `nfacct` match: kube-proxy makes them over netlink, and its rules do not load without them.

use crate::netlink::{NLM_F_ACK, NLM_F_CREATE, NetfilterSocket, Request};
use crate::netns::Netns;
use anyhow::{Context, Result};

/// The objects that kube-proxy 1.31 and later makes (`pkg/proxy/metrics/metrics.go`, `IPTablesCTStateInvalidDroppedNFAcctCounter`
/// and `LocalhostNodePortAcceptedNFAcctCounter`).
const NAMES: [&str; 2] = ["ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts"];

/// `NFNL_SUBSYS_ACCT << 8 | NFNL_MSG_ACCT_NEW`.
const ACCT_NEW: u16 = 7 << 8;
const NFACCT_NAME: u16 = 1;

/// Makes kube-proxy's counters in a namespace.
pub fn create(netns: &Netns) -> Result<()> {
    netns.run_in(|| {
        let mut socket = NetfilterSocket::open(0)?;
        for name in NAMES {
            let name_with_nul = [name.as_bytes(), &[0]].concat();
            let flags = NLM_F_ACK | NLM_F_CREATE;
            let attributes: [(u16, &[u8]); 1] = [(NFACCT_NAME, &name_with_nul)];
            socket
                .request(&Request { kind: ACCT_NEW, flags, family: 0, res_id: 0, attributes: &attributes })
                .with_context(|| format!("making the counter {name}"))?;
        }
        Ok(())
    })?
}
