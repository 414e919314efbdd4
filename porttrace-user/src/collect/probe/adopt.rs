//! Connections that the kernel side is told of, as it did not see them begin: those that are older than the session, and with
//! conntrack's events all.

use super::config::ProbeConfig;
use super::ports::Ports;
use super::tracked::Tracked;
use crate::collect::ctnetlink;
use crate::core::model::event::Conntrack;
use porttrace_ebpf::ROLE_OPENING;

/// Lets the kernel side know a rewritten connection: its packets then need no prediction.
pub fn adopt(tracked: &Tracked, ports: &Ports, entry: &Conntrack) {
    let rewritten = entry.reply.inverted();
    if rewritten != entry.original {
        tracked.set_role(&rewritten, ROLE_OPENING);
    }
    ports.track(entry.reply.sport);
}

/// Lets the kernel side know the connections that are older than the session, as many as its table has room for: their entries.
pub fn adopt_older(
    config: &ProbeConfig,
    tracked: &Tracked,
    ports: &Ports,
    degradations: &mut Vec<String>,
) -> Vec<Conntrack> {
    // Each has two tuples there, and others come.
    let most = config.tracked as usize / 4;
    let (entries, others) = ctnetlink::present(&config.ports, most).unwrap_or_else(|error| {
        degradations.push(format!("connections that are older than this session cannot be followed: {error}"));
        (Vec::new(), 0)
    });
    if others > 0 {
        let all = entries.len() + others;
        degradations.push(format!("of {all} connections older than this session only {} are followed", entries.len()));
    }
    for entry in &entries {
        tracked.set_role(&entry.original, ROLE_OPENING);
        adopt(tracked, ports, entry);
    }
    entries
}
