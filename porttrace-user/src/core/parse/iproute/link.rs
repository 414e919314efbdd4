//! Links, addresses, neighbours.

use super::{elements, is_false, is_zero, to_json};
use crate::core::model::state::{Address, Link, Neighbour};
use crate::core::parse::notes::Notes;
use crate::core::parse::words::{mac, mac_text};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct RawLink {
    #[serde(skip_serializing_if = "is_zero")]
    ifindex: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    link_index: Option<u32>,
    /// The name instead of `link_index`, when the other link is in the same namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<String>,
    ifname: String,
    flags: Vec<String>,
    #[serde(skip_serializing_if = "is_zero")]
    mtu: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    master: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    link_type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    link_netnsid: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    linkinfo: Option<RawInfo>,
    /// Only in `bridge -d -j link`.
    #[serde(skip_serializing_if = "Option::is_none")]
    hairpin: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    addr_info: Option<Vec<RawAddress>>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct RawInfo {
    #[serde(skip_serializing_if = "String::is_empty")]
    info_kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    info_slave_kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    info_slave_data: Option<RawPort>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct RawPort {
    #[serde(skip_serializing_if = "Option::is_none")]
    hairpin: Option<bool>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct RawAddress {
    family: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    local: Option<IpAddr>,
    prefixlen: u8,
    scope: String,
    #[serde(skip_serializing_if = "is_false")]
    secondary: bool,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct RawNeighbour {
    dst: Option<IpAddr>,
    dev: String,
    state: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lladdr: Option<String>,
}

/// Reads `ip -d -j link`; hairpin mode is there only where the tool is new enough (see [`apply_bridge_links`]).
pub fn links(text: &str, notes: &mut Notes) -> Option<Vec<Link>> {
    let mut peers = Vec::new();
    let mut links = elements(text, notes, |raw: RawLink| {
        if raw.ifname.is_empty() {
            return Err("no ifname".to_owned());
        }
        peers.push(raw.link.clone());
        Ok(link(raw))
    })?;
    let indexes: BTreeMap<String, u32> = links.iter().map(|link| (link.name.clone(), link.index)).collect();
    for (link, peer) in links.iter_mut().zip(peers) {
        link.peer_index = link.peer_index.or_else(|| indexes.get(&peer?).copied());
    }
    Some(links)
}

/// Adds what only `bridge -d -j link` says: the hairpin mode of bridge ports, and their bridge.
pub fn apply_bridge_links(links: &mut [Link], text: &str, notes: &mut Notes) {
    let ports = elements(text, notes, |raw: RawLink| Ok(raw)).unwrap_or_default();
    for port in ports {
        if let Some(link) = links.iter_mut().find(|link| link.name == port.ifname) {
            link.hairpin = port.hairpin.or(link.hairpin);
            link.master = link.master.take().or(port.master);
        }
    }
}

/// Reads `ip -j addr`.
pub fn addresses(text: &str, notes: &mut Notes) -> Option<Vec<Address>> {
    let per_link = elements(text, notes, |raw: RawLink| Ok((raw.ifname, raw.addr_info.unwrap_or_default())))?;
    let mut found = Vec::new();
    for (interface, raw) in per_link {
        for raw in raw {
            let Some(address) = raw.local else { continue };
            let widest = if address.is_ipv4() { 32 } else { 128 };
            if raw.prefixlen > widest {
                notes.add(0, format!("{interface}: {address}/{} is not an address", raw.prefixlen));
                continue;
            }
            found.push(Address {
                interface: interface.clone(),
                address,
                prefix: raw.prefixlen,
                scope: if raw.scope.is_empty() { "global".to_owned() } else { raw.scope },
                secondary: raw.secondary,
            });
        }
    }
    Some(found)
}

/// Reads `ip -j neigh`.
pub fn neighbours(text: &str, notes: &mut Notes) -> Option<Vec<Neighbour>> {
    elements(text, notes, |raw: RawNeighbour| {
        let address = raw.dst.ok_or("no dst")?;
        let mac = raw.lladdr.as_deref().and_then(mac);
        Ok(Neighbour { address, interface: raw.dev, state: raw.state.join(","), mac })
    })
}

/// Writes what [`links`] reads.
pub fn write_links(links: &[Link]) -> String {
    to_json(&links.iter().map(raw_link).collect::<Vec<_>>())
}

/// Writes what [`addresses`] reads.
pub fn write_addresses(addresses: &[Address]) -> String {
    let mut raw = Vec::<RawLink>::new();
    for address in addresses {
        let info = RawAddress {
            family: if address.address.is_ipv4() { "inet" } else { "inet6" }.to_owned(),
            local: Some(address.address),
            prefixlen: address.prefix,
            scope: address.scope.clone(),
            secondary: address.secondary,
        };
        match raw.last_mut() {
            Some(RawLink { ifname, addr_info: Some(infos), .. }) if *ifname == address.interface => infos.push(info),
            _ => raw.push(RawLink {
                ifname: address.interface.clone(),
                addr_info: Some(vec![info]),
                ..RawLink::default()
            }),
        }
    }
    to_json(&raw)
}

/// Writes what [`neighbours`] reads.
pub fn write_neighbours(neighbours: &[Neighbour]) -> String {
    let raw = |neighbour: &Neighbour| RawNeighbour {
        dst: Some(neighbour.address),
        dev: neighbour.interface.clone(),
        lladdr: neighbour.mac.map(mac_text),
        state: neighbour.state.split(',').filter(|state| !state.is_empty()).map(str::to_owned).collect(),
    };
    to_json(&neighbours.iter().map(raw).collect::<Vec<_>>())
}

fn link(raw: RawLink) -> Link {
    let has = |flag: &str| raw.flags.iter().any(|known| known == flag);
    let (up, loopback) = (has("UP"), has("LOOPBACK"));
    let info = raw.linkinfo.unwrap_or_default();
    let kind = if info.info_kind.is_empty() && loopback { "loopback".to_owned() } else { info.info_kind };
    Link {
        index: raw.ifindex,
        name: raw.ifname,
        kind,
        up,
        mtu: raw.mtu,
        master: raw.master,
        peer_index: raw.link_index,
        peer_netns: raw.link_netnsid,
        loopback,
        hairpin: info.info_slave_data.and_then(|port| port.hairpin),
    }
}

fn raw_link(link: &Link) -> RawLink {
    let flags = [("LOOPBACK", link.loopback), ("UP", link.up)];
    let info_kind = if link.loopback { String::new() } else { link.kind.clone() };
    let linkinfo = (!info_kind.is_empty() || link.hairpin.is_some()).then(|| RawInfo {
        info_kind,
        info_slave_kind: link.hairpin.map(|_| "bridge".to_owned()),
        info_slave_data: link.hairpin.map(|hairpin| RawPort { hairpin: Some(hairpin) }),
    });
    RawLink {
        ifindex: link.index,
        link_index: link.peer_index,
        ifname: link.name.clone(),
        flags: flags.iter().filter(|(_, set)| *set).map(|(flag, _)| (*flag).to_owned()).collect(),
        mtu: link.mtu,
        master: link.master.clone(),
        link_type: if link.loopback { "loopback" } else { "ether" }.to_owned(),
        link_netnsid: link.peer_netns,
        linkinfo,
        ..RawLink::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINKS: &str = r#"[{"ifindex":1,"ifname":"lo","flags":["LOOPBACK","UP","LOWER_UP"],"mtu":65536,"link_type":"loopback","inet6_addr_gen_mode":"eui64"},
        {"ifindex":2,"link_index":75,"ifname":"eth0","flags":["BROADCAST","MULTICAST","UP","LOWER_UP"],"mtu":1500,"link_type":"ether","link_netnsid":0,"linkinfo":{"info_kind":"veth"}},
        {"ifindex":5,"link":"p0","ifname":"p1","flags":["UP"],"mtu":1500,"linkinfo":{"info_kind":"veth"}},
        {"ifindex":6,"link":"p1","ifname":"p0","flags":["BROADCAST"],"mtu":1500,"master":"br0","linkinfo":{"info_kind":"veth","info_slave_kind":"bridge","info_slave_data":{"state":"forwarding","hairpin":true,"forward_delay_timer":14.72}}},
        {},{"ifindex":7}]"#;

    #[test]
    fn reads_links() {
        let mut notes = Notes::new("ip-link.json");
        let links = links(LINKS, &mut notes).unwrap();
        let notes = notes.finish();
        assert_eq!(notes.len(), 1);
        assert!(notes[0].message.starts_with("element 6 left out (no ifname)"), "{notes:?}");
        assert!(links[0].loopback && links[0].up && links[0].kind == "loopback");
        assert_eq!((links[1].peer_index, links[1].peer_netns, links[1].kind.as_str()), (Some(75), Some(0), "veth"));
        assert_eq!((links[2].peer_index, links[3].peer_index), (Some(6), Some(5)));
        assert_eq!((links[3].master.as_deref(), links[3].hairpin, links[3].up), (Some("br0"), Some(true), false));
        let mut again = Notes::new("again");
        assert_eq!(super::links(&write_links(&links), &mut again), Some(links));
    }

    #[test]
    fn bridge_links_add_hairpin() {
        let mut notes = Notes::new("bridge-link.json");
        let mut links = links(r#"[{"ifindex":6,"ifname":"p0"},{"ifindex":7,"ifname":"p1"}]"#, &mut notes).unwrap();
        let text = r#"[{"ifindex":6,"ifname":"p0","master":"br0","state":"forwarding","priority":32,"cost":2,"hairpin":false}]"#;
        apply_bridge_links(&mut links, text, &mut notes);
        assert_eq!((links[0].hairpin, links[0].master.as_deref(), links[1].hairpin), (Some(false), Some("br0"), None));
        apply_bridge_links(&mut links, "[]\n", &mut notes);
        assert_eq!(notes.finish(), []);
    }

    #[test]
    fn reads_addresses() {
        let text = r#"[{"ifindex":2,"ifname":"eth0","addr_info":[
            {"family":"inet","local":"10.9.0.1","prefixlen":24,"scope":"global","label":"v0"},
            {"family":"inet","local":"10.9.0.2","prefixlen":24,"scope":"global","secondary":true},
            {"family":"inet","local":"10.9.0.3","prefixlen":99},
            {"family":"inet6","local":"fe80::1","prefixlen":64,"scope":"link","tentative":true}]},
            {"ifname":"x","addr_info":[]}]"#;
        let mut notes = Notes::new("ip-addr.json");
        let found = addresses(text, &mut notes).unwrap();
        assert_eq!(found.len(), 3);
        assert!(found[1].secondary && found[2].scope == "link" && found[0].interface == "eth0");
        assert_eq!(notes.finish().len(), 1);
        let mut again = Notes::new("again");
        assert_eq!(addresses(&write_addresses(&found), &mut again), Some(found));
    }

    #[test]
    fn reads_neighbours_and_refuses_half_a_file() {
        let text = r#"[{"dst":"10.9.0.77","dev":"v0","lladdr":"02:00:00:00:00:01","state":["PERMANENT"]},{"dst":"x"}]"#;
        let mut notes = Notes::new("ip-neigh.json");
        let found = neighbours(text, &mut notes).unwrap();
        assert_eq!((found.len(), found[0].state.as_str()), (1, "PERMANENT"));
        assert_eq!(neighbours(&write_neighbours(&found), &mut notes), Some(found));
        assert_eq!(neighbours(&text[..50], &mut notes), None);
        assert_eq!(neighbours("", &mut notes), Some(Vec::new()));
        let notes = notes.finish();
        assert_eq!(notes.len(), 2);
        assert!(notes[1].message.starts_with("not a whole JSON array"), "{notes:?}");
    }
}
