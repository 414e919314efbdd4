//! Routes from their netlink messages.

use super::link::name;
use super::{Names, Taken};
use crate::core::model::state::{NextHop, RouteEntry};
use crate::core::model::trace::RouteKind;
use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop, RouteNextHopFlags,
    RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(super) fn route(message: RouteNetlinkMessage, names: &Names) -> Taken<RouteEntry> {
    let RouteNetlinkMessage::NewRoute(RouteMessage { header, attributes, .. }) = message else { return Ok(None) };
    // Entries of the route cache (exceptions) are not the table.
    if header.flags.contains(RouteFlags::Cloned) {
        return Ok(None);
    }
    let Some(kind) = kind(header.kind) else { return Ok(None) };
    let mut found = Found::default();
    for attribute in attributes {
        found.take(attribute, names);
    }
    let dst = network(&header, found.dst, header.destination_prefix_length)?;
    let src = (header.source_prefix_length != 0)
        .then(|| network(&header, found.src, header.source_prefix_length))
        .transpose()?;
    let mut nexthops = found.hops;
    if found.hop.interface.is_some() || found.hop.gateway.is_some() {
        nexthops.push(NextHop { weight: 1, dead: header.flags.contains(RouteFlags::Dead), ..found.hop });
    }
    Ok(Some(RouteEntry {
        kind,
        dst,
        table: table(found.table.unwrap_or(u32::from(header.table))),
        nexthops,
        prefsrc: found.prefsrc,
        metric: found.metric,
        tos: header.tos,
        src,
        scope: scope(u8::from(header.scope)),
        mtu: found.mtu,
    }))
}

/// The name of a routing table as `ip` prints it: three have names, the others are numbers.
pub(super) fn table(number: u32) -> String {
    match number {
        255 => "local".to_owned(),
        254 => "main".to_owned(),
        253 => "default".to_owned(),
        other => other.to_string(),
    }
}

/// `RT_SCOPE_*` as `ip` prints it.
pub(super) fn scope(number: u8) -> String {
    match number {
        0 => "global".to_owned(),
        200 => "site".to_owned(),
        253 => "link".to_owned(),
        254 => "host".to_owned(),
        255 => "nowhere".to_owned(),
        other => other.to_string(),
    }
}

/// The attributes of a route.
struct Found {
    dst: Option<IpAddr>,
    src: Option<IpAddr>,
    table: Option<u32>,
    hop: NextHop,
    hops: Vec<NextHop>,
    prefsrc: Option<IpAddr>,
    metric: u32,
    mtu: Option<u32>,
}

impl Default for Found {
    fn default() -> Self {
        let hop = NextHop { interface: None, gateway: None, weight: 1, dead: false };
        Self { dst: None, src: None, table: None, hop, hops: Vec::new(), prefsrc: None, metric: 0, mtu: None }
    }
}

impl Found {
    fn take(&mut self, attribute: RouteAttribute, names: &Names) {
        match attribute {
            RouteAttribute::Destination(address) => self.dst = ip(address),
            RouteAttribute::Source(address) => self.src = ip(address),
            RouteAttribute::Table(number) => self.table = Some(number),
            RouteAttribute::Oif(index) => self.hop.interface = Some(name(names, index)),
            RouteAttribute::Gateway(address) => self.hop.gateway = ip(address),
            RouteAttribute::Via(via) => self.hop.gateway = via_ip(via),
            RouteAttribute::PrefSource(address) => self.prefsrc = ip(address),
            RouteAttribute::Priority(metric) => self.metric = metric,
            RouteAttribute::Metrics(metrics) => {
                self.mtu = metrics.into_iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(mtu),
                    _ => None,
                });
            }
            RouteAttribute::MultiPath(hops) => self.hops = hops.into_iter().map(|hop| next_hop(hop, names)).collect(),
            _ => {}
        }
    }
}

fn next_hop(hop: RouteNextHop, names: &Names) -> NextHop {
    let gateway = hop.attributes.into_iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        RouteAttribute::Via(via) => via_ip(via),
        _ => None,
    });
    NextHop {
        interface: (hop.interface_index != 0).then(|| name(names, hop.interface_index)),
        gateway,
        weight: u32::from(hop.hops) + 1,
        dead: hop.flags.contains(RouteNextHopFlags::Dead),
    }
}

fn network(header: &RouteHeader, address: Option<IpAddr>, length: u8) -> Result<IpNet, String> {
    let unspecified = match header.address_family {
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    IpNet::new(address.unwrap_or(unspecified), length).map_err(|_| format!("a prefix of {length} bits"))
}

fn kind(kind: RouteType) -> Option<RouteKind> {
    Some(match kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Local => RouteKind::Local,
        RouteType::Broadcast => RouteKind::Broadcast,
        RouteType::Anycast => RouteKind::Anycast,
        RouteType::Multicast => RouteKind::Multicast,
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::Prohibit => RouteKind::Prohibit,
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Throw => RouteKind::Throw,
        _ => return None,
    })
}

fn ip(address: RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(address)),
        _ => None,
    }
}

fn via_ip(via: RouteVia) -> Option<IpAddr> {
    match via {
        RouteVia::Inet(address) => Some(IpAddr::V4(address)),
        RouteVia::Inet6(address) => Some(IpAddr::V6(address)),
        _ => None,
    }
}
