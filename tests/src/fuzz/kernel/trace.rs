//! The kernel's own rule trace (`nft monitor trace`), read straight from netlink, and the numbers of the rules it names.

use crate::netlink::{self, Message, NLM_F_DUMP, NetfilterSocket, Request, text};
use anyhow::Result;
use porttrace_user::core::model::flow::Family;
use std::collections::BTreeMap;

/// `NFNLGRP_NFTRACE` (9) as a bit.
const TRACE_GROUP: u32 = 1 << 8;
/// `NFNL_SUBSYS_NFTABLES` with `NFT_MSG_NEWRULE`, `NFT_MSG_GETRULE`, `NFT_MSG_TRACE`
/// (include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h).
const NEW_RULE: u16 = 10 << 8 | 6;
const GET_RULE: u16 = 10 << 8 | 7;
const TRACE: u16 = 10 << 8 | 17;

/// One trace message.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Identifies the `sk_buff` while it lives; reused afterwards.
    pub id: u32,
    pub family: u8,
    pub table: String,
    pub chain: String,
    pub kind: Kind,
    pub handle: u64,
    pub verdict: Option<i32>,
    /// Target of a jump or goto.
    pub to: String,
    /// Headers, in the first message of a base chain only.
    pub network: Vec<u8>,
    pub transport: Vec<u8>,
    pub iif: u32,
    pub oif: u32,
    pub mark: u32,
    /// Policy of a base chain whose end was reached.
    pub policy: Option<u32>,
    /// Conntrack state bit (`NF_CT_STATE_*`), where this kernel tells it (6.16 and later).
    pub ct_state: Option<u32>,
}

/// `enum nft_trace_types`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    #[default]
    Unknown,
    Policy,
    Return,
    Rule,
}

/// Listens from its opening on, in the namespace of the opening thread.
pub struct Reader(NetfilterSocket);

impl Reader {
    pub fn open() -> Result<Self> {
        Ok(Self(NetfilterSocket::open(TRACE_GROUP)?))
    }

    /// Moves what is waiting to `reports`. `false` when the kernel had to drop some.
    pub fn drain(&mut self, reports: &mut Vec<Report>) -> Result<bool> {
        reports.extend(self.0.drain()?.iter().filter_map(report));
        Ok(self.0.overruns == 0)
    }
}

/// Family, table, chain, handle → the rule's position in its chain, from 1.
pub type Numbers = BTreeMap<(Family, String, String, u64), u32>;

/// Reads the numbers of all rules of both families in the calling thread's namespace.
pub fn numbers() -> Result<Numbers> {
    let mut numbers = Numbers::new();
    // Those of inet are in both families.
    for (code, family) in [(2, Family::V4), (10, Family::V6), (1, Family::V4), (1, Family::V6)] {
        let request = Request { kind: GET_RULE, flags: NLM_F_DUMP, family: code, res_id: 0, attributes: &[] };
        let answer = NetfilterSocket::open(0)?.request(&request)?;
        let mut counts = BTreeMap::<(String, String), u32>::new();
        for message in answer.iter().filter(|message| message.kind == NEW_RULE) {
            let (mut table, mut chain, mut handle) = (String::new(), String::new(), 0);
            for (kind, payload) in message.attributes() {
                match kind {
                    1 => table = text(payload),
                    2 => chain = text(payload),
                    3 => handle = number(payload),
                    _ => {}
                }
            }
            let count = counts.entry((table.clone(), chain.clone())).or_default();
            *count += 1;
            numbers.insert((family, table, chain, handle), *count);
        }
    }
    Ok(numbers)
}

fn report(message: &Message) -> Option<Report> {
    if message.kind != TRACE {
        return None;
    }
    let mut report = Report { family: message.family, ..Report::default() };
    for (kind, payload) in message.attributes() {
        match kind {
            1 => report.table = text(payload),
            2 => report.chain = text(payload),
            3 => report.handle = number(payload),
            4 => report.kind = kind_of(number(payload)),
            5 => verdict(payload, &mut report),
            6 => report.id = number(payload) as u32,
            8 => report.network = payload.to_vec(),
            9 => report.transport = payload.to_vec(),
            10 => report.iif = number(payload) as u32,
            12 => report.oif = number(payload) as u32,
            14 => report.mark = number(payload) as u32,
            15 => report.family = number(payload) as u8,
            16 => report.policy = Some(number(payload) as u32),
            21 => report.ct_state = Some(number(payload) as u32),
            _ => {}
        }
    }
    Some(report)
}

fn kind_of(number: u64) -> Kind {
    match number {
        1 => Kind::Policy,
        2 => Kind::Return,
        3 => Kind::Rule,
        _ => Kind::Unknown,
    }
}

fn verdict(payload: &[u8], report: &mut Report) {
    for (kind, payload) in netlink::attributes(payload) {
        match kind {
            1 => report.verdict = Some((number(payload) as u32).cast_signed()),
            2 => report.to = text(payload),
            _ => {}
        }
    }
}

/// A big-endian number of up to eight bytes.
fn number(payload: &[u8]) -> u64 {
    payload.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
