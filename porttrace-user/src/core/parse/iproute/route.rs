//! Routes.

use super::{elements, is_zero, to_json};
use crate::core::model::flow::Family;
use crate::core::model::state::{NextHop, RouteEntry};
use crate::core::model::trace::RouteKind;
use crate::core::parse::notes::Notes;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct RawRoute {
    #[serde(rename = "type", skip_serializing_if = "String::is_empty")]
    kind: String,
    dst: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tos: Option<String>,
    /// Source-specific IPv6 routes.
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<RawVia>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dev: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    table: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefsrc: Option<IpAddr>,
    #[serde(skip_serializing_if = "is_zero")]
    metric: u32,
    flags: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    metrics: Vec<RawMetrics>,
    /// Only in IPv6 routes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pref: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    nexthops: Vec<RawHop>,
}

/// A gateway of the other family (`via inet6 fe80::1`).
#[derive(Serialize, Deserialize)]
struct RawVia {
    family: String,
    host: IpAddr,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct RawMetrics {
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct RawHop {
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<RawVia>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dev: Option<String>,
    weight: u32,
    flags: Vec<String>,
}

/// Reads `ip -j route show table all`. `family` is that of routes which do not show theirs (`default dev eth0`).
pub fn routes(text: &str, family: Family, notes: &mut Notes) -> Option<Vec<RouteEntry>> {
    elements(text, notes, |raw: RawRoute| route(raw, family))
}

/// Writes what [`routes`] reads.
pub fn write_routes(routes: &[RouteEntry]) -> String {
    to_json(&routes.iter().map(raw_route).collect::<Vec<_>>())
}

fn route(raw: RawRoute, family: Family) -> Result<RouteEntry, String> {
    let tos = raw.tos.as_deref().map_or(Ok(0), super::tos)?;
    let src = raw.from.as_deref().map(prefix).transpose()?;
    let kind = kind_of(&raw.kind)?;
    let family = family_of(&raw).unwrap_or(family);
    let dst = destination(&raw.dst, family)?;
    let mut nexthops: Vec<NextHop> = raw.nexthops.into_iter().map(next_hop).collect();
    if raw.dev.is_some() || raw.gateway.is_some() || raw.via.is_some() {
        nexthops.push(next_hop(RawHop {
            gateway: raw.gateway,
            via: raw.via,
            dev: raw.dev,
            weight: 1,
            flags: raw.flags,
        }));
    }
    Ok(RouteEntry {
        kind,
        dst,
        table: raw.table.unwrap_or_else(|| "main".to_owned()),
        nexthops,
        prefsrc: raw.prefsrc,
        metric: raw.metric,
        tos,
        src,
        scope: raw.scope.unwrap_or_else(|| "global".to_owned()),
        mtu: raw.metrics.first().and_then(|metrics| metrics.mtu),
    })
}

fn next_hop(raw: RawHop) -> NextHop {
    NextHop {
        interface: raw.dev,
        gateway: raw.gateway.or(raw.via.map(|via| via.host)),
        weight: raw.weight.max(1),
        dead: raw.flags.iter().any(|flag| flag == "dead"),
    }
}

fn kind_of(name: &str) -> Result<RouteKind, String> {
    Ok(match name {
        "" | "unicast" => RouteKind::Unicast,
        "local" => RouteKind::Local,
        "broadcast" => RouteKind::Broadcast,
        "anycast" => RouteKind::Anycast,
        "multicast" => RouteKind::Multicast,
        "unreachable" => RouteKind::Unreachable,
        "prohibit" => RouteKind::Prohibit,
        "blackhole" => RouteKind::Blackhole,
        "throw" => RouteKind::Throw,
        other => return Err(format!("unknown type {other}")),
    })
}

fn name_of(kind: RouteKind) -> &'static str {
    match kind {
        RouteKind::Unicast | RouteKind::None => "",
        RouteKind::Local => "local",
        RouteKind::Broadcast => "broadcast",
        RouteKind::Anycast => "anycast",
        RouteKind::Multicast => "multicast",
        RouteKind::Unreachable => "unreachable",
        RouteKind::Prohibit => "prohibit",
        RouteKind::Blackhole => "blackhole",
        RouteKind::Throw => "throw",
    }
}

/// The family that a route shows by an address in it, or by `pref`, which only IPv6 has.
fn family_of(raw: &RawRoute) -> Option<Family> {
    if raw.pref.is_some() {
        return Some(Family::V6);
    }
    let hop = raw.nexthops.iter().find_map(|hop| hop.gateway);
    let from = raw.from.as_deref().and_then(|from| prefix(from).ok()).map(|from| from.addr());
    raw.prefsrc.or(raw.gateway).or(hop).or(from).map(Family::of)
}

fn destination(text: &str, family: Family) -> Result<IpNet, String> {
    if matches!(text, "default" | "all" | "any") {
        return Ok(everything(family));
    }
    prefix(text)
}

/// `10.0.0.0/8`, or an address alone.
pub(super) fn prefix(text: &str) -> Result<IpNet, String> {
    let net = text.parse::<IpNet>().map(|net| net.trunc());
    net.or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).map_err(|_| format!("{text:?} is not a prefix"))
}

/// `0.0.0.0/0` or `::/0`.
pub(super) fn everything(family: Family) -> IpNet {
    let address = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    IpNet::new_assert(address, 0)
}

fn raw_route(route: &RouteEntry) -> RawRoute {
    let family = Family::of(route.dst.addr());
    let mut raw = RawRoute {
        kind: name_of(route.kind).to_owned(),
        dst: if route.dst.prefix_len() == 0 { "default".to_owned() } else { route.dst.to_string() },
        table: (route.table != "main").then(|| route.table.clone()),
        scope: (route.scope != "global").then(|| route.scope.clone()),
        prefsrc: route.prefsrc,
        metric: route.metric,
        tos: (route.tos != 0).then(|| format!("{:#04x}", route.tos)),
        from: route.src.map(|src| src.to_string()),
        metrics: route.mtu.map(|mtu| RawMetrics { mtu: Some(mtu) }).into_iter().collect(),
        pref: (family == Family::V6).then(|| "medium".to_owned()),
        ..RawRoute::default()
    };
    let mut hops: Vec<RawHop> = route.nexthops.iter().map(|hop| raw_hop(hop, family)).collect();
    match hops.pop() {
        // One hop of weight 1 stands in the route itself.
        Some(only) if hops.is_empty() && only.weight == 1 => {
            (raw.gateway, raw.via, raw.dev, raw.flags) = (only.gateway, only.via, only.dev, only.flags);
        }
        Some(last) => {
            hops.push(last);
            raw.nexthops = hops;
        }
        None => {}
    }
    raw
}

fn raw_hop(hop: &NextHop, family: Family) -> RawHop {
    let same = |gateway: &IpAddr| Family::of(*gateway) == family;
    let via = hop
        .gateway
        .filter(|gateway| !same(gateway))
        .map(|host| RawVia { family: if host.is_ipv4() { "inet" } else { "inet6" }.to_owned(), host });
    RawHop {
        gateway: hop.gateway.filter(same),
        via,
        dev: hop.interface.clone(),
        weight: hop.weight,
        flags: if hop.dead { vec!["dead".to_owned()] } else { Vec::new() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: &str = r#"[{"dst":"default","gateway":"172.18.0.1","dev":"eth0","flags":[]},
{"type":"throw","dst":"10.54.0.0/16","table":"100","flags":[]},
{"dst":"10.56.0.0/16","gateway":"10.9.0.9","dev":"v0","table":"100","prefsrc":"10.9.0.2","flags":[],"metrics":[{"mtu":1400,"advmss":1300}]},
{"type":"unreachable","dst":"10.52.0.0/16","metric":77,"flags":[]},
{"dst":"10.55.0.0/16","via":{"family":"inet6","host":"fe80::1"},"dev":"v0","flags":["dead","linkdown"]},
{"dst":"10.57.0.0/16","tos":"0x10","gateway":"10.9.0.9","dev":"v0","flags":["onlink"]},
{"dst":"10.58.0.0/16","tos":"mine","dev":"v0","flags":[]},
{"dst":"10.58.0.0/16","tos":"AF41","dev":"v0","flags":[]},
{"dst":"default","from":"fd99::/64","dev":"v0","flags":[]},
{"dst":"10.59.0.0/16","nhid":1,"gateway":"10.9.0.9","dev":"v0","flags":["linkdown"]},
{"type":"local","dst":"10.9.0.1","dev":"v0","table":"local","protocol":"kernel","scope":"host","prefsrc":"10.9.0.1","flags":[]},
{"dst":"fd50::/64","metric":1024,"flags":[],"pref":"medium","nexthops":[{"gateway":"fd99::9","dev":"v0","weight":3,"flags":[]},{"gateway":"fd99::8","dev":"v0","weight":1,"flags":["dead"]}]},
{"dst":"default","dev":"v0","metric":1024,"flags":[],"pref":"medium"},
{"type":"anycast","dst":"fd99::","dev":"v0","table":"local","protocol":"kernel","metric":0,"flags":[],"pref":"medium"},
{"type":"multicast","dst":"ff00::/8","dev":"v1","table":"local","protocol":"kernel","metric":256,"flags":[],"pref":"medium"}]"#;

    #[test]
    fn reads_routes_of_both_families() {
        let mut notes = Notes::new("ip-route.json");
        let found = routes(ROUTES, Family::V4, &mut notes).unwrap();
        let notes = notes.finish();
        assert_eq!(notes.len(), 1);
        assert!(notes[0].message.contains("\"mine\" is no TOS"), "{notes:?}");
        assert_eq!(found.len(), 14);
        assert_eq!((found[5].tos, found[6].tos, found[5].src), (0x10, 0x88, None));
        assert_eq!((found[7].dst.to_string(), found[7].src.unwrap().to_string()), ("::/0".into(), "fd99::/64".into()));
        let mut again = Notes::new("again");
        assert_eq!(routes(&write_routes(&found), Family::V4, &mut again).as_ref(), Some(&found));
        assert_eq!(again.finish(), []);
        let found = [&found[..5], &found[8..]].concat();
        assert_eq!((found[0].dst.to_string().as_str(), found[0].table.as_str()), ("0.0.0.0/0", "main"));
        assert_eq!((found[1].kind, found[1].nexthops.len()), (RouteKind::Throw, 0));
        assert_eq!((found[2].mtu, found[2].prefsrc), (Some(1400), Some([10, 9, 0, 2].into())));
        assert!(found[4].nexthops[0].dead && !found[5].nexthops[0].dead);
        assert_eq!(found[4].nexthops[0].gateway.unwrap().to_string(), "fe80::1");
        assert_eq!(found[6].dst.to_string(), "10.9.0.1/32");
        assert_eq!(found[7].nexthops.iter().map(|h| (h.weight, h.dead)).collect::<Vec<_>>(), [(3, false), (1, true)]);
        assert_eq!(found[8].dst.to_string(), "::/0");
        assert_eq!(found[9].kind, RouteKind::Anycast);
    }
}
