//! Sysctls, links, addresses, sockets and conntrack entries, ready for lookup.

use crate::core::model::flow::{Direction, Family, Proto, Tuple};
use crate::core::model::name::Name;
use crate::core::model::state::{Address, ConntrackEntry, Link, Neighbour, NodeState, Socket};
use foldhash::HashMap;
use std::net::IpAddr;

/// `net.ipv4.conf.INTERFACE`, as far as it decides a path. `None`: not part of the state.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct InterfaceConf {
    pub(super) forwarding: Option<u8>,
    pub(super) rp_filter: Option<u8>,
    pub(super) route_localnet: Option<u8>,
    pub(super) accept_local: Option<u8>,
    pub(super) src_valid_mark: Option<u8>,
}

impl InterfaceConf {
    /// What holds for an interface with these settings beside those of `all`: its own forwarding, the stricter rp_filter, and
    /// the rest where either has it (`IN_DEV_MAXCONF`, `IN_DEV_ORCONF`, include/linux/inetdevice.h).
    fn beside(self, all: Self) -> Self {
        Self {
            forwarding: self.forwarding.or(all.forwarding),
            rp_filter: self.rp_filter.max(all.rp_filter),
            route_localnet: self.route_localnet.max(all.route_localnet),
            accept_local: self.accept_local.max(all.accept_local),
            src_valid_mark: self.src_valid_mark.max(all.src_valid_mark),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Config {
    /// Interfaces with settings of their own, those of `all` taken in.
    four: HashMap<String, InterfaceConf>,
    /// `net.ipv4.conf.all`.
    all: InterfaceConf,
    /// `net.ipv6.conf.all.forwarding`.
    pub(super) forwarding6: Option<u8>,
    pub(super) bridge_nf4: Option<u8>,
    pub(super) bridge_nf6: Option<u8>,
    /// `nf_conntrack_tcp_loose`.
    pub(super) tcp_loose: Option<u8>,
    links: HashMap<String, Link>,
    names: Vec<Name>,
    /// MAC addresses by interface and address.
    neighbours: HashMap<(String, IpAddr), [u8; 6]>,
    addresses: Option<Vec<Address>>,
    sockets: Option<Vec<Socket>>,
    entries: Option<Vec<ConntrackEntry>>,
    by_tuple: HashMap<Tuple, (u32, Direction)>,
}

impl Config {
    pub(super) fn new(state: &NodeState) -> Self {
        let mut config = Self {
            addresses: state.addresses.clone(),
            sockets: state.sockets.clone(),
            entries: state.conntrack.clone(),
            ..Self::default()
        };
        for (key, value) in state.sysctls.iter().flatten() {
            if let Ok(value) = value.trim().parse::<u8>() {
                config.sysctl(key, value);
            }
        }
        config.all = config.four.remove("all").unwrap_or_default();
        for own in config.four.values_mut() {
            *own = own.beside(config.all);
        }
        let mut links: Vec<&Link> = state.links.iter().flatten().collect();
        links.sort_by_key(|link| link.index);
        config.names = links.iter().map(|link| Name::from(link.name.as_str())).collect();
        config.links = links.into_iter().map(|link| (link.name.clone(), link.clone())).collect();
        config.neighbours = neighbours(state);
        for (index, entry) in config.entries.iter().flatten().enumerate() {
            config.by_tuple.entry(entry.original).or_insert((index as u32, Direction::Original));
            config.by_tuple.entry(entry.reply).or_insert((index as u32, Direction::Reply));
        }
        config
    }

    fn sysctl(&mut self, key: &str, value: u8) {
        match key {
            "net.ipv6.conf.all.forwarding" => self.forwarding6 = Some(value),
            "net.bridge.bridge-nf-call-iptables" => self.bridge_nf4 = Some(value),
            "net.bridge.bridge-nf-call-ip6tables" => self.bridge_nf6 = Some(value),
            "net.netfilter.nf_conntrack_tcp_loose" => self.tcp_loose = Some(value),
            "net.ipv4.ip_forward" => self.four.entry("all".into()).or_default().forwarding = Some(value),
            _ => {}
        }
        let Some((interface, name)) = key.strip_prefix("net.ipv4.conf.").and_then(|rest| rest.rsplit_once('.')) else {
            return;
        };
        // sysctl writes the dots of an interface's name as slashes.
        let conf = self.four.entry(interface.replace('/', ".")).or_default();
        match name {
            "forwarding" => conf.forwarding = Some(value),
            "rp_filter" => conf.rp_filter = Some(value),
            "route_localnet" => conf.route_localnet = Some(value),
            "accept_local" => conf.accept_local = Some(value),
            "src_valid_mark" => conf.src_valid_mark = Some(value),
            _ => {}
        }
    }

    /// What holds for an interface.
    pub(super) fn interface(&self, name: &str) -> InterfaceConf {
        self.four.get(name).copied().unwrap_or(self.all)
    }

    pub(super) fn link(&self, name: &str) -> Option<&Link> {
        self.links.get(name)
    }

    /// How many ports a bridge has.
    pub(super) fn ports(&self, bridge: &str) -> usize {
        self.links.values().filter(|link| link.master.as_deref() == Some(bridge)).count()
    }

    /// The Ethernet address of a neighbour.
    pub(super) fn neighbour(&self, interface: &str, address: IpAddr) -> Option<[u8; 6]> {
        self.neighbours.get(&(interface.to_owned(), address)).copied()
    }

    /// The interface's name, shared.
    pub(super) fn name(&self, name: &str) -> Option<&Name> {
        self.names.iter().find(|known| **known == *name)
    }

    /// `inet_select_addr(device, towards, RT_SCOPE_UNIVERSE)` (net/ipv4/devinet.c) or, for IPv6, `ipv6_dev_get_saddr`. The
    /// outer `None`: addresses are not part of the state.
    pub(super) fn source_address(&self, device: &str, towards: IpAddr) -> Option<Option<IpAddr>> {
        let addresses = self.addresses.as_ref()?;
        if let IpAddr::V6(towards) = towards {
            return Some(super::source6::select(addresses, device, towards));
        }
        let usable = |address: &&Address| address.address.is_ipv4() && address.scope == "global" && !address.secondary;
        let here = || addresses.iter().filter(usable).filter(|address| address.interface == device);
        let near = |address: &&Address| common_bits(address.address, towards) >= address.prefix;
        let chosen = here().find(near).or_else(|| here().next()).or_else(|| addresses.iter().find(usable));
        Some(chosen.map(|address| address.address))
    }

    pub(super) fn has_address(&self, device: &str, address: IpAddr) -> bool {
        self.addresses.iter().flatten().any(|own| own.interface == device && own.address == address)
    }

    /// The first address of an interface, as REDIRECT takes it (`nf_nat_redirect_ipv4`, `nf_nat_redirect_ipv6`): for IPv6 one of
    /// the scope that `instead_of` has.
    pub(super) fn first_address(&self, device: &str, instead_of: IpAddr) -> Option<Option<IpAddr>> {
        let addresses = self.addresses.as_ref()?;
        let fits = |address: &Address| match (address.address, instead_of) {
            (IpAddr::V4(_), IpAddr::V4(_)) => true,
            (IpAddr::V6(own), IpAddr::V6(old)) => {
                old.is_loopback() == own.is_loopback() && old.is_unicast_link_local() == own.is_unicast_link_local()
            }
            _ => false,
        };
        let own = |address: &&Address| address.interface == device && fits(address);
        Some(addresses.iter().find(own).map(|address| address.address))
    }

    /// The network of an address on this interface that contains `address`: it is reachable without a router.
    pub(super) fn on_link(&self, device: &str, address: IpAddr) -> bool {
        self.addresses.iter().flatten().any(|own| {
            own.interface == device
                && Family::of(own.address) == Family::of(address)
                && common_bits(own.address, address) >= own.prefix
        })
    }

    /// The socket that a packet to `tuple`'s destination finds: `None` where sockets are not known or have no ports,
    /// `Some(None)` where there is none.
    pub(super) fn listener(&self, tuple: &Tuple) -> Option<Option<&Socket>> {
        let sockets = self.sockets.as_ref().filter(|_| tuple.proto.has_ports())?;
        let takes = |socket: &&Socket| {
            let any = match socket.address {
                IpAddr::V4(four) => four.is_unspecified() && tuple.dst.is_ipv4(),
                IpAddr::V6(six) => six.is_unspecified() && (tuple.dst.is_ipv6() || !socket.v6only),
            };
            socket.proto == tuple.proto && socket.port == tuple.dport && (any || socket.address == tuple.dst)
        };
        Some(
            sockets
                .iter()
                .find(|socket| takes(socket) && socket.address == tuple.dst)
                .or_else(|| sockets.iter().find(takes)),
        )
    }

    /// The conntrack entry that a packet belongs to; the outer `None`: entries are not part of the state.
    pub(super) fn entry(&self, tuple: &Tuple) -> Option<Option<(&ConntrackEntry, Direction)>> {
        let entries = self.entries.as_ref()?;
        let hit = self.by_tuple.get(tuple).and_then(|&(index, way)| Some((entries.get(index as usize)?, way)));
        Some(hit)
    }
}

fn neighbours(state: &NodeState) -> HashMap<(String, IpAddr), [u8; 6]> {
    let usable = |neighbour: &&Neighbour| !["FAILED", "INCOMPLETE"].contains(&neighbour.state.as_str());
    let known = state.neighbours.iter().flatten().filter(usable);
    known.filter_map(|one| Some(((one.interface.clone(), one.address), one.mac?))).collect()
}

/// A shared name for a protocol's port-less tuples: ICMP type and code of an echo request, unless the tuple says otherwise.
pub(super) fn icmp_type(tuple: &Tuple) -> (u8, u8) {
    match (tuple.dport.to_be_bytes(), tuple.proto) {
        ([0, 0], Proto::Icmpv6) => (128, 0),
        ([0, 0], _) => (8, 0),
        ([kind, code], _) => (kind, code),
    }
}

fn common_bits(one: IpAddr, other: IpAddr) -> u8 {
    let same = match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        (IpAddr::V6(one), IpAddr::V6(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        _ => 0,
    };
    same as u8
}
