//! nf_tables' trace messages, straight from netlink (`nft monitor trace` without its text).

use super::headers::of_headers;
use super::trace::{Decided, Place, Step, TraceFilter};
use crate::netlink::{Message, NLM_F_DUMP, NetfilterSocket, Request, attributes, number, text};
use crate::netns::Netns;
use anyhow::{Context, Result, bail};
use porttrace_user::core::model::flow::{Family, Proto, Tuple};
use std::collections::BTreeMap;

/// The table that sets the trace bit; its own steps are left out.
const TABLE: &str = "ptl_trace";

const SUBSYSTEM: u16 = 10 << 8;
const GET_RULE: u16 = SUBSYSTEM | 7;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const TRACE: u16 = SUBSYSTEM | 17;
/// `NFNLGRP_NFTRACE` is group 9.
const TRACE_GROUP: u32 = 1 << 8;
/// `NFT_TRACETYPE_POLICY`. The end of a chain comes as RETURN or, from newer kernels, as a RULE without a handle.
const POLICY: u64 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

/// (family, table, handle) → number in its chain.
type Numbers = BTreeMap<(u8, String, u64), u32>;

pub struct NftTrace {
    events: NetfilterSocket,
    control: NetfilterSocket,
    numbers: Numbers,
    /// What the kernel said at the head of the base chain that a packet is in, by the packet's trace ID.
    passing: BTreeMap<u64, Pass>,
}

#[derive(Clone)]
struct Pass {
    /// The base chain, which the first message of a pass names.
    table: String,
    chain: String,
    tuple: Tuple,
    input: Option<u32>,
    output: Option<u32>,
}

impl NftTrace {
    pub fn start(netns: &Netns, filters: &[TraceFilter]) -> Result<Self> {
        let rules: String =
            filters.iter().map(|filter| format!("{} meta nftrace set 1\n", expression(*filter))).collect();
        let chain = |hook: &str| format!("chain {hook} {{\ntype filter hook {hook} priority -350\n{rules}}}\n");
        // Delete first what an earlier trace in this namespace left.
        let script = format!(
            "table inet {TABLE} {{}}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{}{}}}\n",
            chain("prerouting"),
            chain("output")
        );
        netns.exec_with(["nft", "-f", "-"], &script)?;
        let (events, control) = netns
            .run_in(|| Ok::<_, anyhow::Error>((NetfilterSocket::open(TRACE_GROUP)?, NetfilterSocket::open(0)?)))??;
        let mut trace = Self { events, control, numbers: Numbers::new(), passing: BTreeMap::new() };
        trace.reread_rules()?;
        Ok(trace)
    }

    pub fn reread_rules(&mut self) -> Result<()> {
        let request = Request { kind: GET_RULE, flags: NLM_F_DUMP, family: 0, res_id: 0, attributes: &[] };
        let mut counts: BTreeMap<(u8, String, String), u32> = BTreeMap::new();
        self.numbers.clear();
        for message in self.control.request(&request).context("listing the rules")? {
            if message.kind != NEW_RULE {
                continue;
            }
            let (mut table, mut chain, mut handle) = (String::new(), String::new(), 0);
            for (kind, payload) in message.attributes() {
                match kind {
                    1 => table = text(payload),
                    2 => chain = text(payload),
                    3 => handle = number(payload).unwrap_or_default(),
                    _ => {}
                }
            }
            let count = counts.entry((message.family, table.clone(), chain)).or_default();
            *count += 1;
            self.numbers.insert((message.family, table, handle), *count);
        }
        Ok(())
    }

    pub fn drain(&mut self) -> Result<Vec<Step>> {
        let messages = self.events.drain()?;
        if self.events.overruns > 0 {
            bail!("the kernel lost trace messages {} times", self.events.overruns);
        }
        Ok(messages.iter().filter(|message| message.kind == TRACE).filter_map(|message| self.step(message)).collect())
    }

    fn step(&mut self, message: &Message) -> Option<Step> {
        let raw = Raw::of(message);
        if let Some(tuple) = of_headers(raw.network, raw.transport) {
            let (table, chain) = (raw.table.clone(), raw.chain.clone());
            self.passing.insert(raw.id, Pass { table, chain, tuple, input: raw.input, output: raw.output });
        }
        if raw.table == TABLE {
            return None;
        }
        let pass = self.passing.get(&raw.id)?.clone();
        let place = match (raw.kind, raw.handle) {
            (POLICY, _) => Place::Policy,
            // The end of a base chain is followed by its policy.
            (_, 0) if (&raw.table, &raw.chain) == (&pass.table, &pass.chain) => return None,
            (_, 0) => Place::Return,
            _ => match self.numbers.get(&(message.family, raw.table.clone(), raw.handle)) {
                Some(number) => Place::Rule(*number),
                None => Place::Handle(raw.handle),
            },
        };
        let family = match message.family {
            NFPROTO_IPV4 => Family::V4,
            NFPROTO_IPV6 => Family::V6,
            _ => pass.tuple.family(),
        };
        Some(Step {
            family,
            table: raw.table,
            chain: raw.chain,
            place,
            tuple: pass.tuple,
            input: pass.input,
            output: pass.output,
            mark: raw.mark,
            decided: raw.decided,
        })
    }
}

/// `enum nft_trace_attributes`. The headers come only with the first message of each base chain.
#[derive(Default)]
struct Raw<'a> {
    table: String,
    chain: String,
    handle: u64,
    kind: u64,
    id: u64,
    network: &'a [u8],
    transport: &'a [u8],
    input: Option<u32>,
    output: Option<u32>,
    mark: u32,
    decided: Option<Decided>,
}

impl<'a> Raw<'a> {
    fn of(message: &'a Message) -> Self {
        let mut raw = Self::default();
        let small = |payload| number(payload).and_then(|number| u32::try_from(number).ok());
        for (kind, payload) in message.attributes() {
            match kind {
                1 => raw.table = text(payload),
                2 => raw.chain = text(payload),
                3 => raw.handle = number(payload).unwrap_or_default(),
                4 => raw.kind = number(payload).unwrap_or_default(),
                5 => raw.decided = verdict(payload),
                6 => raw.id = number(payload).unwrap_or_default(),
                8 => raw.network = payload,
                9 => raw.transport = payload,
                10 => raw.input = small(payload),
                12 => raw.output = small(payload),
                14 => raw.mark = small(payload).unwrap_or_default(),
                16 => raw.decided = small(payload).map(|policy| code(policy.cast_signed(), String::new())),
                _ => {}
            }
        }
        raw
    }
}

fn verdict(nested: &[u8]) -> Option<Decided> {
    let (mut number_of, mut chain) = (None, String::new());
    for (kind, payload) in attributes(nested) {
        match kind {
            1 => number_of = payload.try_into().ok().map(i32::from_be_bytes),
            2 => chain = text(payload),
            _ => {}
        }
    }
    Some(code(number_of?, chain))
}

/// `NF_*` and `enum nft_verdicts`.
fn code(code: i32, chain: String) -> Decided {
    match code {
        0 => Decided::Drop,
        1 => Decided::Accept,
        -1 | -2 => Decided::Continue,
        -3 => Decided::Jump(chain),
        -4 => Decided::Goto(chain),
        -5 => Decided::Return,
        other => Decided::Other(other),
    }
}

fn expression(filter: TraceFilter) -> String {
    let mut words = format!("meta l4proto {}", filter.proto.number());
    let name = match filter.proto {
        Proto::Tcp => "tcp",
        Proto::Udp => "udp",
        Proto::Sctp => "sctp",
        _ => return words,
    };
    if let Some(port) = filter.dport {
        words += &format!(" {name} dport {port}");
    }
    if filter.proto == Proto::Tcp && filter.first_only {
        words += " tcp flags & (fin | syn | rst | ack) == syn";
    }
    words
}
