//! Links, addresses and neighbours from their netlink messages.

use super::{Names, Taken};
use crate::core::model::state::{Address, Link, Neighbour};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{InfoBridgePort, InfoPortData, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use std::net::IpAddr;

/// A link; its master stays an index (`if7`) until [`name_masters`] knows all names.
pub(super) fn link(message: RouteNetlinkMessage) -> Taken<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else { return Ok(None) };
    let loopback = message.header.flags.contains(LinkFlags::Loopback);
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: if loopback { "loopback".to_owned() } else { String::new() },
        up: message.header.flags.contains(LinkFlags::Up),
        mtu: 0,
        master: None,
        peer_index: None,
        peer_netns: None,
        loopback,
        hairpin: None,
    };
    fill(&mut link, message);
    if link.name.is_empty() { Err(format!("link {} without a name", link.index)) } else { Ok(Some(link)) }
}

fn fill(link: &mut Link, message: LinkMessage) {
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Controller(index) if index != 0 => link.master = Some(unnamed(index)),
            LinkAttribute::Link(index) if index != 0 => link.peer_index = Some(index),
            LinkAttribute::LinkNetNsId(id) => link.peer_netns = Some(id),
            LinkAttribute::LinkInfo(infos) => infos.into_iter().for_each(|info| fill_info(link, info)),
            _ => {}
        }
    }
}

fn fill_info(link: &mut Link, info: LinkInfo) {
    match info {
        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
        LinkInfo::PortData(InfoPortData::BridgePort(attributes)) => {
            link.hairpin = attributes.iter().find_map(|attribute| match attribute {
                InfoBridgePort::HairpinMode(on) => Some(*on),
                _ => None,
            });
        }
        _ => {}
    }
}

/// Puts names in the place of masters' indexes.
pub(super) fn name_masters(links: &mut [Link], names: &Names) {
    for link in links {
        let index = link.master.as_ref().and_then(|master| master.strip_prefix("if")?.parse().ok());
        if let Some(name) = index.and_then(|index: u32| names.get(&index)) {
            link.master = Some(name.clone());
        }
    }
}

/// The name of an interface, or `if7` for one that is not (or no longer) listed.
pub(super) fn name(names: &Names, index: u32) -> String {
    names.get(&index).cloned().unwrap_or_else(|| unnamed(index))
}

fn unnamed(index: u32) -> String {
    format!("if{index}")
}

pub(super) fn address(message: RouteNetlinkMessage, names: &Names) -> Taken<Address> {
    let RouteNetlinkMessage::NewAddress(AddressMessage { header, attributes, .. }) = message else { return Ok(None) };
    let mut local = None;
    let mut plain = None;
    for attribute in attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(address),
            AddressAttribute::Address(address) => plain = Some(address),
            _ => {}
        }
    }
    // On a point-to-point link IFA_ADDRESS is the other end (include/uapi/linux/if_addr.h).
    let Some(address) = local.or(plain) else { return Ok(None) };
    Ok(Some(Address {
        interface: name(names, header.index),
        address,
        prefix: header.prefix_len,
        scope: super::route::scope(u8::from(header.scope)),
        // The same bit means "temporary" in IPv6.
        secondary: address.is_ipv4() && header.flags.contains(AddressHeaderFlags::Secondary),
    }))
}

pub(super) fn neighbour(message: RouteNetlinkMessage, names: &Names) -> Taken<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return Ok(None) };
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    });
    let state = message.header.state;
    // As `ip neigh`: entries without address resolution (multicast, loopback) are not listed.
    let (Some(address), false) = (address, matches!(state, NeighbourState::Noarp | NeighbourState::None)) else {
        return Ok(None);
    };
    let interface = name(names, message.header.ifindex);
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLocalAddress(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
        _ => None,
    });
    Ok(Some(Neighbour { address, interface, state: state.to_string().to_uppercase(), mac }))
}
