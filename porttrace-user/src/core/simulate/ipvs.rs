//! IPVS: where it takes a packet, the prediction ends. Which of its real servers gets the packet, and with which source, is not
//! followed yet.

use super::run::{Next, Run};
use super::walk::Walk;
use crate::core::model::state::{NodeState, VirtualAddress, VirtualServer};
use crate::core::model::trace::Verdict;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

/// kube-proxy's interface for the addresses of all Services (pkg/proxy/ipvs, `defaultDummyDevice`).
const DUMMY: &str = "kube-ipvs0";

#[derive(Debug, Default)]
pub(super) struct Ipvs {
    servers: HashMap<VirtualAddress, VirtualServer>,
    /// The list of virtual servers is part of the state.
    known: bool,
    /// Addresses on [`DUMMY`].
    addresses: HashSet<IpAddr>,
    dummy: bool,
}

/// A sentence where IPVS takes packets on this node, so that predictions end there.
pub fn in_use(state: &NodeState) -> Option<String> {
    Ipvs::new(state).in_use()
}

impl Ipvs {
    pub(super) fn new(state: &NodeState) -> Self {
        let servers = state.ipvs.iter().flatten().map(|server| (server.address, server.clone())).collect();
        let dummy = state.addresses.iter().flatten().filter(|address| address.interface == DUMMY);
        Self {
            servers,
            known: state.ipvs.is_some(),
            addresses: dummy.map(|address| address.address).collect(),
            dummy: state.links.iter().flatten().any(|link| link.name == DUMMY),
        }
    }

    /// A sentence where IPVS has something to say on this node.
    pub(super) fn in_use(&self) -> Option<String> {
        let who = if self.dummy { "kube-proxy uses IPVS here" } else { "IPVS is in use here" };
        match (self.servers.len(), self.dummy || !self.addresses.is_empty()) {
            (0, false) => None,
            (0, true) if !self.known => Some(format!(
                "{who}, and its virtual servers are not part of the state: what happens at them is unknown"
            )),
            (count, _) => Some(format!(
                "{who} ({count} virtual {}): where it takes a packet, the prediction ends",
                if count == 1 { "server" } else { "servers" }
            )),
        }
    }

    /// Why the prediction ends for a packet to this destination (`ip_vs_service_find`).
    fn takes(&self, walk: &Walk<'_>) -> Option<String> {
        let tuple = &walk.tuple;
        let endpoint = |port| VirtualAddress::Endpoint { proto: tuple.proto, address: tuple.dst, port };
        let asked = [VirtualAddress::Mark(walk.mark), endpoint(tuple.dport), endpoint(0)];
        let marked = walk.mark != 0;
        let found = asked.iter().skip(usize::from(!marked)).find_map(|address| self.servers.get(address));
        if let Some(server) = found {
            let VirtualServer { address, scheduler, real_servers } = server;
            let many = if *real_servers == 1 { "real server" } else { "real servers" };
            return Some(format!(
                "IPVS takes it: virtual server {address}, {real_servers} {many} by {scheduler}, which is not followed"
            ));
        }
        (!self.known && self.addresses.contains(&tuple.dst)).then(|| {
            format!(
                "{} is on {DUMMY}, and which of its ports IPVS takes is not part of the state (ip_vs.txt)",
                tuple.dst
            )
        })
    }
}

impl<'s> Run<'s> {
    /// IPVS looks at what is for this node and at what it sends, whatever the rules have made of it.
    pub(super) fn ipvs(&self, walk: &mut Walk<'s>) -> Next {
        walk.stage.entry += 1;
        match self.sim.ipvs.takes(walk) {
            Some(because) => Next::end(Verdict::Unknown { because, by: None }),
            None => Next::Go,
        }
    }
}
