//! The rules of iptables-legacy that a traced packet matched: the kernel logs them (`trace_packet`,
//! net/ipv4/netfilter/ip_tables.c), whichever way the packet's trace bit was set. Verdicts are not logged.

use super::wire::headers_of;
use crate::netlink::{Message, NLM_F_ACK, NetfilterSocket, Request, text};
use anyhow::{Context, Result};
use porttrace_user::core::model::flow::Tuple;

/// `NFNL_SUBSYS_ULOG` with `NFULNL_MSG_PACKET` and `NFULNL_MSG_CONFIG`.
const PACKET: u16 = 4 << 8;
const CONFIG: u16 = 4 << 8 | 1;

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LegacyStep {
    /// Of the probe.
    pub id: u16,
    pub table: String,
    pub chain: String,
    /// From 1; one more than there are rules for the end of a chain.
    pub number: u32,
    /// The packet as it was then.
    pub tuple: Tuple,
}

/// Listens from its opening on, in the namespace of the opening thread.
pub struct LegacyReader(NetfilterSocket);

impl LegacyReader {
    pub fn open() -> Result<Self> {
        let mut reader = Self(NetfilterSocket::open(0)?);
        // NFULA_CFG_CMD: bind both families (PF_BIND), then group 0 (BIND). NFULA_CFG_MODE: whole packets. NFULA_CFG_QTHRESH: each
        // at once.
        for (family, kind, payload) in [
            (2, 1, &[3][..]),
            (10, 1, &[3]),
            (0, 1, &[1]),
            (0, 2, &[0, 0, 0xff, 0xff, 2, 0]),
            (0, 5, &1_u32.to_be_bytes()),
        ] {
            reader.configure(family, kind, payload)?;
        }
        Ok(reader)
    }

    fn configure(&mut self, family: u8, kind: u16, payload: &[u8]) -> Result<()> {
        let attributes = [(kind, payload)];
        let request = Request { kind: CONFIG, flags: NLM_F_ACK, family, res_id: 0, attributes: &attributes };
        self.0.request(&request).context("configuring nfnetlink_log")?;
        Ok(())
    }

    /// Moves what is waiting to `steps`. `false` when the kernel had to drop some.
    pub fn drain(&mut self, steps: &mut Vec<LegacyStep>) -> Result<bool> {
        steps.extend(self.0.drain()?.iter().filter(|message| message.kind == PACKET).filter_map(step));
        Ok(self.0.overruns == 0)
    }
}

impl Drop for LegacyReader {
    /// Gives the group back (UNBIND) for the next reader: a process that another thread starts just now may hold the socket open
    /// for a moment longer.
    fn drop(&mut self) {
        let _ = self.configure(0, 1, &[2]);
    }
}

/// `TRACE: nat:KUBE-SERVICES:rule:4 ` and the packet; the kernel's refusals are no probes.
fn step(message: &Message) -> Option<LegacyStep> {
    let (mut prefix, mut packet) = (String::new(), None);
    for (kind, payload) in message.attributes() {
        match kind {
            9 => packet = headers_of(payload),
            10 => prefix = text(payload),
            _ => {}
        }
    }
    let mut fields = prefix.strip_prefix("TRACE: ")?.trim_end().split(':');
    let (table, chain) = (fields.next()?.to_owned(), fields.next()?.to_owned());
    let number = fields.nth(1)?.parse().ok()?;
    let headers = packet.filter(|headers| headers.refuses.is_none())?;
    Some(LegacyStep { id: headers.id, table, chain, number, tuple: headers.tuple })
}
