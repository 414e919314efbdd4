//! Traces that connections have left: conntrack entries, counters of rules, what the kernel counts as dropped.

use crate::core::diagnose::place;
use crate::core::model::flow::Proto;
use crate::core::model::rules::Rule;
use crate::core::model::state::DropCounts;
use crate::core::ports::{Kind, Port};
use crate::core::quantity::count;
use crate::core::world::World;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Sentences of connections and rules at most.
const MOST: usize = 8;

/// Sentences.
pub(super) fn live(world: &World<'_>, ports: &[Port], pods: &BTreeSet<IpAddr>) -> Vec<String> {
    let mut said: Vec<String> = ports.iter().filter_map(|port| entries(world, port)).collect();
    if said.is_empty()
        && let Some(text) = to_pods(world, pods)
    {
        said.push(text);
    }
    for claim in ports.iter().flat_map(|port| &port.claims).filter(|claim| claim.kind != Kind::Listener) {
        let Some(at) = &claim.rule else { continue };
        if let Some((packets, bytes)) = world.rule(at).and_then(Rule::counters) {
            let connections = count(packets, "connection");
            said.push(format!("{connections} ({bytes} bytes) met {} since its rules were written", place(at)));
        }
    }
    said.truncate(MOST);
    said.extend(drops(world.facts.state.drops));
    said
}

/// Drops that the kernel counted, whatever the port; that there were none of a kind is worth saying too.
fn drops(counts: DropCounts) -> Option<String> {
    let all = [
        (counts.conntrack, "by conntrack, which could make no entry"),
        (counts.reverse_path, "by rp_filter"),
        (counts.listen_queue, "as a process did not accept connections fast enough"),
    ];
    let said: Vec<String> = all.iter().filter_map(|(count, why)| Some(format!("{} {why}", (*count)?))).collect();
    (!said.is_empty()).then(|| format!("packets dropped here so far, of any port: {}", said.join(", ")))
}

/// `3 connections to port 9088 are in conntrack: 2 ESTABLISHED, 1 without an answer`.
fn entries(world: &World<'_>, port: &Port) -> Option<String> {
    let all = world.facts.state.conntrack.as_ref()?;
    let mut states: BTreeMap<String, usize> = BTreeMap::new();
    let own = |address: IpAddr| {
        port.address.map_or_else(|| world.facts.is_own(address) == Some(true), |only| only == address)
    };
    for entry in all {
        let tuple = &entry.original;
        if tuple.dport == port.port && tuple.proto == port.proto && own(tuple.dst) {
            *states.entry(state(&entry.state, entry.unreplied, tuple.proto)).or_default() += 1;
        }
    }
    Some(sentence(&format!("port {}/{}", port.port, port.proto), &states))
}

fn to_pods(world: &World<'_>, pods: &BTreeSet<IpAddr>) -> Option<String> {
    let all = world.facts.state.conntrack.as_ref()?;
    let mut states: BTreeMap<String, usize> = BTreeMap::new();
    for entry in all.iter().filter(|entry| pods.contains(&entry.reply.src)) {
        *states.entry(state(&entry.state, entry.unreplied, entry.original.proto)).or_default() += 1;
    }
    (!pods.is_empty()).then(|| sentence("its pods on this node", &states))
}

fn state(state: &str, unreplied: bool, proto: Proto) -> String {
    match (unreplied, state) {
        (true, _) => "without an answer".to_owned(),
        (false, "") => format!("{proto} answered"),
        (false, state) => state.to_owned(),
    }
}

fn sentence(what: &str, states: &BTreeMap<String, usize>) -> String {
    let count: usize = states.values().sum();
    let each: Vec<String> = states.iter().map(|(state, count)| format!("{count} {state}")).collect();
    match count {
        0 => format!("no connection to {what} is in conntrack (a refused one leaves no entry)"),
        1 => format!("1 connection to {what} is in conntrack: {}", each.join(", ")),
        count => format!("{count} connections to {what} are in conntrack: {}", each.join(", ")),
    }
}
