//! The facts of a node, ready to be asked: who claims what, where a packet would go, who could send one.

use super::kube::ebpf;
use super::kube::owners::Owners;
use super::model::cluster::{Service, ServicePort};
use super::model::facts::Facts;
use super::model::flow::{Family, Proto, Tuple};
use super::model::name::Name;
use super::model::rules::Rule;
use super::model::state::RouteEntry;
use super::model::trace::{Packet, RouteKind, RuleRef, Trace};
use super::simulate::Simulator;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// A client's port in predictions: within the ephemeral range of every system.
const CLIENT_PORT: u16 = 40_000;

/// [`Facts`] with what is computed from them once.
#[derive(Debug)]
pub struct World<'a> {
    pub facts: &'a Facts,
    pub owners: Arc<Owners>,
    simulator: Arc<Simulator>,
}

/// A pod on this node: its address, the interface that it is behind, its name where known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPod {
    pub address: IpAddr,
    pub interface: String,
    pub name: Option<String>,
}

impl<'a> World<'a> {
    pub fn new(facts: &'a Facts) -> Self {
        // Predictions are about new connections: entries of older ones would only stand in the way.
        let mut state = facts.state.clone();
        state.conntrack = Some(Vec::new());
        Self::of(facts, Arc::new(Owners::of(&facts.state)), Arc::new(Simulator::new(&state)))
    }

    /// The same with claims and simulator that were made of these facts' state before.
    pub const fn of(facts: &'a Facts, owners: Arc<Owners>, simulator: Arc<Simulator>) -> Self {
        Self { facts, owners, simulator }
    }

    /// The first packet of a connection from `src`, sent by this node if the address is its own, otherwise arriving by the
    /// interface to which the route back to it points.
    pub fn trace(&self, proto: Proto, src: IpAddr, dst: IpAddr, dport: u16) -> Trace {
        let tuple = Tuple { proto, src, sport: CLIENT_PORT, dst, dport };
        let input = match self.facts.is_own(src) {
            Some(true) => None,
            _ => Some(self.interface_towards(src).map_or_else(|| self.uplink_or("eth0", src), Name::from)),
        };
        self.simulator.trace(&Packet::first_of(tuple, input))
    }

    /// The same, by an interface of choice.
    pub fn arriving(&self, tuple: Tuple, interface: &str) -> Trace {
        self.simulator.trace(&Packet::first_of(tuple, Some(interface.into())))
    }

    /// Whether kube-proxy's rules are here and could be read: chains of Services, not only the empty ones of other modes.
    pub fn has_proxy_rules(&self) -> bool {
        let mut native = self.facts.state.native_rules.iter().flat_map(|set| &set.tables);
        ebpf::writes_iptables(&self.facts.state) || native.any(|table| table.name.ends_with(" kube-proxy"))
    }

    /// The network that serves Services in eBPF here instead of kube-proxy, in whatever mode.
    pub fn replaced(&self) -> Option<ebpf::Network> {
        ebpf::serving(&self.facts.state)
    }

    /// Whether nothing but the rules that are followed decides where connections to this node's ports and to Services go.
    pub fn rules_decide(&self) -> bool {
        self.replaced().is_none() && self.facts.state.native_dnat().is_none()
    }

    /// Who does not do what no rule that is followed does.
    pub fn no_rule(&self) -> &'static str {
        if self.facts.state.native_dnat().is_some() { "no iptables rule" } else { "no rule" }
    }

    /// That native nftables rules may send connections elsewhere, and what it costs, in a sentence.
    pub fn native_sentence(&self) -> Option<String> {
        let tables = self.facts.state.native_dnat()?;
        let whose = if self.facts.state.native.iter().any(|base| base.table == "kube-proxy" && base.is_dnat()) {
            "kube-proxy writes native nftables rules"
        } else {
            "native nftables rules may send connections elsewhere"
        };
        Some(format!(
            "{whose} here (table {tables}), and porttrace could not read them: what it predicts for Services and ports of this node \
             may not hold"
        ))
    }

    /// The Services that Kubernetes knows to have this NodePort, whatever the rules say.
    pub fn with_node_port(
        &self,
        port: u16,
        proto: Option<Proto>,
    ) -> impl Iterator<Item = (&'a Service, &'a ServicePort)> {
        let ports =
            self.facts.cluster.services.iter().flat_map(|service| service.ports.iter().map(move |of| (service, of)));
        ports.filter(move |(_, of)| of.node_port == Some(port) && proto.is_none_or(|proto| proto == of.proto))
    }

    fn uplink_or(&self, otherwise: &'static str, towards: IpAddr) -> Name {
        self.uplink(Family::of(towards)).map_or_else(|| Name::from(otherwise), Name::from)
    }

    /// The rule at a place.
    pub fn rule(&self, at: &RuleRef) -> Option<&'a Rule> {
        let ruleset = self.facts.state.all_rules().filter(|set| set.flavour == at.flavour && set.family == at.family);
        let mut tables = ruleset.flat_map(|set| &set.tables).filter(|table| *table.name == *at.table);
        let number = usize::try_from(at.number()?).ok()?;
        tables.find_map(|table| table.chain(&at.chain)).and_then(|chain| chain.rules.get(number.checked_sub(1)?))
    }

    /// The best route of the table main.
    pub fn route(&self, to: IpAddr) -> Option<&'a RouteEntry> {
        let routes = self.facts.state.routes.iter().flatten();
        let usable = routes.filter(|route| matches!(route.table.as_str(), "main" | "254") && route.dst.contains(&to));
        usable.min_by_key(|route| (std::cmp::Reverse(route.dst.prefix_len()), route.metric))
    }

    pub fn interface_towards(&self, to: IpAddr) -> Option<&'a str> {
        self.route(to)?.nexthops.iter().find(|hop| !hop.dead)?.interface.as_deref()
    }

    /// The interface of the default route.
    pub fn uplink(&self, family: Family) -> Option<&'a str> {
        let routes = self.facts.state.routes.iter().flatten();
        let mut defaults = routes
            .filter(|route| route.dst.prefix_len() == 0 && Family::of(route.dst.addr()) == family)
            .filter(|route| matches!(route.table.as_str(), "main" | "254") && route.kind == RouteKind::Unicast);
        let by_default = defaults.find_map(|route| route.nexthops.first()?.interface.as_deref());
        by_default.or_else(|| {
            let own = self.own_addresses().find(|(address, _)| Family::of(*address) == family);
            own.map(|(_, interface)| interface)
        })
    }

    /// Addresses of this node that others can use, with their interfaces: those of the uplink first.
    pub fn own_addresses(&self) -> impl Iterator<Item = (IpAddr, &'a str)> {
        let all = self.facts.state.addresses.iter().flatten();
        all.filter(|own| own.scope == "global" && !own.address.is_loopback())
            .map(|own| (own.address, own.interface.as_str()))
    }

    /// The node's address: the one that Kubernetes knows it by, else the first of its uplink.
    pub fn node_address(&self, family: Family) -> Option<IpAddr> {
        let fits = |address: &IpAddr| Family::of(*address) == family && self.facts.is_own(*address) != Some(false);
        let node = self.facts.cluster.nodes.iter().find(|node| Some(&node.name) == self.facts.state.name.as_ref());
        let by_name = node.and_then(|node| node.addresses.iter().copied().find(fits));
        let by_any = || {
            self.facts
                .cluster
                .nodes
                .iter()
                .flat_map(|node| node.addresses.iter().copied())
                .find(|address| Family::of(*address) == family && self.facts.is_own(*address) == Some(true))
        };
        let uplink = self.uplink(family);
        let by_uplink = || {
            let mut own = self.own_addresses().filter(|(address, _)| Family::of(*address) == family);
            own.find(|(_, interface)| Some(*interface) == uplink).map(|(address, _)| address)
        };
        by_name.or_else(by_any).or_else(by_uplink)
    }

    /// Another node: its address and name, as Kubernetes knows them, else a gateway to other pods.
    pub fn other_node(&self, family: Family) -> Option<(IpAddr, Option<String>)> {
        let own = self.node_address(family);
        let mut others = self.facts.cluster.nodes.iter().filter(|node| {
            node.addresses.iter().all(|address| Some(*address) != own && self.facts.is_own(*address) != Some(true))
        });
        let known = others.find_map(|node| {
            let address = node.addresses.iter().copied().find(|address| Family::of(*address) == family)?;
            Some((address, Some(node.name.clone())))
        });
        known.or_else(|| {
            let routes = self.facts.state.routes.iter().flatten();
            let mut gateways = routes
                .filter(|route| route.dst.prefix_len() > 0 && Family::of(route.dst.addr()) == family)
                .filter_map(|route| route.nexthops.first()?.gateway);
            gateways.next().map(|gateway| (gateway, None))
        })
    }

    /// A client that is neither a node nor a pod: an address for documentation (RFC 5737, RFC 3849).
    pub const fn outsider(family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            Family::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        }
    }

    /// Pods of this node, by address.
    pub fn local_pods(&self, family: Family) -> Vec<LocalPod> {
        let mut candidates: Vec<IpAddr> =
            self.facts.cluster.pods.iter().filter(|pod| !pod.host_network).flat_map(|pod| pod.ips.clone()).collect();
        candidates.extend(
            self.facts.sandboxes.iter().filter(|sandbox| sandbox.ready).flat_map(|sandbox| sandbox.ips.clone()),
        );
        candidates.extend(self.facts.listeners.known().into_iter().flat_map(|pods| pods.addresses()));
        candidates.extend(
            self.facts.state.routes.iter().flatten().filter(|route| is_host(route)).map(|route| route.dst.addr()),
        );
        // A link-local address is every interface's, whether or not anybody uses IPv6, and reaches no further.
        let counts = |address: &IpAddr| match address {
            IpAddr::V4(four) => family == Family::V4 && !four.is_link_local(),
            IpAddr::V6(six) => family == Family::V6 && !six.is_unicast_link_local(),
        };
        candidates.retain(|address| counts(address) && self.facts.is_own(*address) != Some(true));
        candidates.sort_unstable();
        candidates.dedup();
        let behind = |address| {
            let interface = self.behind(address)?.to_owned();
            Some(LocalPod { address, interface, name: self.facts.name_at(address) })
        };
        candidates.into_iter().filter_map(behind).collect()
    }

    /// The interface behind which an address is, when that is a pod's: reached without a gateway, and not by the uplink.
    pub fn behind(&self, address: IpAddr) -> Option<&'a str> {
        let hop = self.route(address)?.nexthops.first()?;
        let interface = hop.interface.as_deref().filter(|_| hop.gateway.is_none())?;
        (Some(interface) != self.uplink(Family::of(address)) && interface != "lo").then_some(interface)
    }

    /// An address that another node's pod has: a hostPort's leftover is another finding.
    pub fn is_other_nodes(&self, address: IpAddr) -> bool {
        let here = self.facts.state.name.as_deref();
        let pods = &self.facts.cluster.pods;
        let by_gateway = self.route(address).is_some_and(|route| {
            route.dst.prefix_len() > 0 && route.nexthops.first().is_some_and(|hop| hop.gateway.is_some())
        });
        by_gateway || pods.iter().any(|pod| pod.ips.contains(&address) && pod.node.as_deref() != here)
    }

    /// A pod of another node, with its name and node where known.
    pub fn remote_pod(&self, family: Family) -> Option<(IpAddr, Option<String>)> {
        let here = self.facts.state.name.as_deref();
        let pods = self.facts.cluster.pods.iter().filter(|pod| !pod.host_network && pod.node.as_deref() != here);
        let mut known = pods.filter_map(|pod| {
            let address = pod.ips.iter().copied().find(|address| Family::of(*address) == family)?;
            (self.behind(address).is_none()).then(|| (address, Some(pod.name.to_string())))
        });
        known.next().or_else(|| {
            let routes = self.facts.state.routes.iter().flatten();
            let mut far = routes.filter(|route| {
                let gateway = route.nexthops.first().is_some_and(|hop| hop.gateway.is_some());
                gateway && route.dst.prefix_len() > 0 && Family::of(route.dst.addr()) == family
            });
            far.find_map(|route| route.dst.hosts().nth(1)).map(|address| (address, None))
        })
    }
}

fn is_host(route: &RouteEntry) -> bool {
    let length = if route.dst.addr().is_ipv4() { 32 } else { 128 };
    route.dst.prefix_len() == length && matches!(route.table.as_str(), "main" | "254")
}
