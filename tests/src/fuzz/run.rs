//! Runs a scenario on the kernel, in one round or two.

use super::kernel::live::Lists;
use super::kernel::path::{Arrival, Path};
use super::kernel::router::Router;
use super::kernel::send::{Sent, Watched};
use super::kernel::trace::numbers;
use super::scenario::{Link, NativeTable, Probe, Scenario, Tables};
use anyhow::Result;
use porttrace_user::core::model::flow::Proto;
use porttrace_user::core::model::state::NodeState;
use porttrace_user::core::model::trace::Packet;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Ids of a second round start here.
const SECOND: u16 = 5000;

/// One set of rules, the packets sent through it, and what the kernel did.
#[derive(Debug)]
pub struct Round {
    /// As it was before the first packet.
    pub state: NodeState,
    pub probes: Vec<Probe>,
    pub paths: BTreeMap<u16, Path>,
    /// The lists of `-m recent` before a probe, where they changed since the one before.
    pub recent: BTreeMap<u16, Lists>,
    /// The router's interfaces by index.
    pub names: BTreeMap<u32, String>,
    /// Rules that iptables refused.
    pub refused: Vec<String>,
}

/// A whole scenario's rounds.
#[derive(Debug, Default)]
pub struct Outcome {
    pub rounds: Vec<Round>,
    /// Batches that had to be sent again in halves, because the kernel dropped trace messages.
    pub halved: usize,
}

/// Runs it; a batch whose trace was lost is split and each half gets a new router.
pub fn run(scenario: &Scenario) -> Result<Outcome> {
    let router = Router::build(&scenario.node)?;
    let mut rounds = Vec::new();
    let Some(first) = round(&router, (&scenario.rules, &scenario.listing, &scenario.native), &scenario.probes)? else {
        return halves(scenario);
    };
    let second = scenario.later.as_ref().map(|rules| (rules, followers(scenario, &first)));
    rounds.push(first);
    if let Some((rules, probes)) = second {
        let Some(second) = round(&router, (rules, "", &[]), &probes)? else { return halves(scenario) };
        rounds.push(second);
    }
    Ok(Outcome { rounds, halved: 0 })
}

fn round(
    router: &Router,
    (rules, listing, native): (&[Tables], &str, &[NativeTable]),
    probes: &[Probe],
) -> Result<Option<Round>> {
    let probes: &[Probe] = &probes.iter().map(|probe| router.known(probe)).collect::<Vec<_>>();
    let mut refused = router.load(rules)?;
    refused.extend(router.load_native(listing, native)?);
    let numbers = router.inside.run_in(numbers)??;
    let state = router.state()?;
    let how = Watched {
        remembers: rules.iter().any(|tables| tables.text().contains("-m recent")),
        legacy: rules.iter().any(|tables| tables.legacy),
    };
    let Ok(Sent { paths, recent }) = router.send(probes, &numbers, how)? else { return Ok(None) };
    Ok(Some(Round { state, probes: probes.to_vec(), paths, recent, names: router.names.clone(), refused }))
}

fn halves(scenario: &Scenario) -> Result<Outcome> {
    anyhow::ensure!(scenario.probes.len() > 1, "the kernel drops trace messages even for one packet");
    let (left, right) = scenario.probes.split_at(scenario.probes.len() / 2);
    let mut all = Outcome { halved: 1, ..Outcome::default() };
    for half in [left, right] {
        let outcome = run(&Scenario { probes: half.to_vec(), ..scenario.clone() })?;
        all.halved += outcome.halved;
        all.rounds.extend(outcome.rounds);
    }
    Ok(all)
}

/// The second round: the first round's flows again, and answers to those that got through.
fn followers(scenario: &Scenario, first: &Round) -> Vec<Probe> {
    let follow = |probe: &Probe| -> Option<Probe> {
        let id = SECOND + probe.id;
        let path = first.paths.get(&probe.id)?;
        // A broadcast by a bridge port whose flooded copy was dropped is confirmed before any NAT of INPUT (`br_nf_local_in`):
        // its entry stays open to later rules, which match without effect. conntrack -L does not show it.
        let broadcast = matches!(probe.packet.tuple.dst, IpAddr::V4(dst) if dst.octets()[2..] == [255, 255]);
        let by_port = |link: &Link| Some(link.name.as_str()) == probe.packet.input.as_deref() && link.bridge.is_some();
        if broadcast && scenario.node.links.iter().any(by_port) {
            return None;
        }
        if probe.id.is_multiple_of(2) {
            return Some(Probe { id, ..probe.clone() });
        }
        let [arrival] = path.arrivals.as_slice() else { return None };
        answer(scenario, probe, arrival, id)
    };
    scenario.probes.iter().filter_map(follow).collect()
}

fn answer(scenario: &Scenario, probe: &Probe, arrival: &Arrival, id: u16) -> Option<Probe> {
    let tuple = arrival.tuple.inverted();
    // The craft knows no ICMP answers and no SCTP INIT-ACK.
    if !matches!(tuple.proto, Proto::Tcp | Proto::Udp) {
        return None;
    }
    let link = scenario.node.links.iter().find(|link| link.name == arrival.link)?;
    let mut packet = Packet::first_of(tuple, Some(link.name.as_str().into()));
    packet.length = probe.packet.length;
    packet.tos = probe.packet.tos;
    if tuple.proto == Proto::Tcp {
        packet.tcp_flags = 0x12;
    }
    Some(Probe { id, packet, uid: 0, mac: probe.mac })
}
