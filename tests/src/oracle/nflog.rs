//! The log lines of legacy iptables' TRACE, through nfnetlink_log group 0 (the kernel's syslog logger is silent in namespaces).

use super::headers::of_packet;
use super::trace::{Place, Step, TraceFilter};
use crate::lab::rules::Tools;
use crate::netlink::{Message, NLM_F_ACK, NetfilterSocket, Request, number, text};
use crate::netns::Netns;
use anyhow::{Context, Result, bail};
use porttrace_user::core::model::flow::{Family, Proto};

const PACKET: u16 = 4 << 8;
const CONFIG: u16 = 4 << 8 | 1;
const NFULA_CFG_CMD: u16 = 1;
const NFULA_CFG_MODE: u16 = 2;
const NFULA_CFG_QTHRESH: u16 = 5;
const CMD_BIND: u8 = 1;
const CMD_PF_BIND: u8 = 3;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

pub struct NflogTrace {
    socket: NetfilterSocket,
}

impl NflogTrace {
    pub fn start(netns: &Netns, tools: &Tools, filters: &[TraceFilter]) -> Result<Self> {
        let mut socket = netns.run_in(|| NetfilterSocket::open(0))??;
        for family in [NFPROTO_IPV4, NFPROTO_IPV6] {
            configure(&mut socket, family, NFULA_CFG_CMD, &[CMD_PF_BIND])?;
        }
        configure(&mut socket, 0, NFULA_CFG_CMD, &[CMD_BIND])?;
        // Copy whole packets (struct nfulnl_msg_config_mode), and send each at once.
        configure(&mut socket, 0, NFULA_CFG_MODE, &[0, 0, 0xff, 0xff, 2, 0])?;
        configure(&mut socket, 0, NFULA_CFG_QTHRESH, &1u32.to_be_bytes())?;
        for filter in filters {
            switch_on(netns, tools, *filter)?;
        }
        Ok(Self { socket })
    }

    pub fn drain(&mut self) -> Result<Vec<Step>> {
        let messages = self.socket.drain()?;
        if self.socket.overruns > 0 {
            bail!("the kernel lost log messages {} times", self.socket.overruns);
        }
        Ok(messages.iter().filter(|message| message.kind == PACKET).filter_map(step).collect())
    }
}

/// `-j TRACE` in the raw tables of both families.
fn switch_on(netns: &Netns, tools: &Tools, filter: TraceFilter) -> Result<()> {
    for family in ["iptables", "ip6tables"] {
        for chain in ["PREROUTING", "OUTPUT"] {
            let tool = tools.tool(family).display().to_string();
            let mut argv: Vec<String> = [tool.as_str(), "-w", "10", "-t", "raw", "-I", chain].map(String::from).into();
            argv.extend(matches(filter));
            argv.extend(["-j", "TRACE"].map(String::from));
            netns.exec(argv)?;
        }
    }
    Ok(())
}

fn configure(socket: &mut NetfilterSocket, family: u8, kind: u16, payload: &[u8]) -> Result<()> {
    socket
        .request(&Request { kind: CONFIG, flags: NLM_F_ACK, family, res_id: 0, attributes: &[(kind, payload)] })
        .context("configuring nfnetlink_log")
        .map(drop)
}

/// `TRACE: nat:KUBE-SERVICES:rule:4 ` and the packet.
fn step(message: &Message) -> Option<Step> {
    let (mut prefix, mut packet, mut input, mut output, mut mark) = (String::new(), None, None, None, 0);
    let small = |payload| number(payload).and_then(|number| u32::try_from(number).ok());
    for (kind, payload) in message.attributes() {
        match kind {
            2 => mark = small(payload).unwrap_or_default(),
            4 => input = small(payload),
            5 => output = small(payload),
            9 => packet = of_packet(payload),
            10 => prefix = text(payload),
            _ => {}
        }
    }
    let mut fields = prefix.strip_prefix("TRACE: ")?.trim_end().split(':');
    let (table, chain) = (fields.next()?.to_owned(), fields.next()?.to_owned());
    let place = match (fields.next()?, fields.next()?.parse().ok()?) {
        ("rule", number) => Place::Rule(number),
        ("policy", _) => Place::Policy,
        _ => Place::Return,
    };
    let tuple = packet?;
    Some(Step { family: Family::of(tuple.dst), table, chain, place, tuple, input, output, mark, decided: None })
}

fn matches(filter: TraceFilter) -> Vec<String> {
    let mut words = vec!["-p".to_owned(), filter.proto.number().to_string()];
    if let Some(port) = filter.dport.filter(|_| filter.proto.has_ports()) {
        words.extend(["--dport".to_owned(), port.to_string()]);
    }
    if filter.proto == Proto::Tcp && filter.first_only {
        words.push("--syn".to_owned());
    }
    words
}
