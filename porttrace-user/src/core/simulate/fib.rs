//! Routing tables: `fib_table_lookup` (net/ipv4/fib_trie.c), `fib6_node_lookup` and `fib6_backtrack` (net/ipv6/ip6_fib.c).

use crate::core::model::flow::Family;
use crate::core::model::name::Name;
use crate::core::model::state::RouteEntry;
use crate::core::model::trace::RouteKind;
use foldhash::HashMap;
use ipnet::IpNet;
use std::cmp::Reverse;
use std::net::IpAddr;

/// The bits of a TOS byte that IPv4 routes and policy rules are asked with (`IPTOS_RT_MASK`).
pub(super) const TOS_BITS: u8 = 0x1c;

/// One routing table of one family.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) family: Family,
    pub(super) name: Name,
    /// Routes by prefix length, longest first; those of one prefix in the order in which the kernel asks them.
    prefixes: Vec<(u8, HashMap<u128, Vec<Entry>>)>,
}

/// A route with its names ready to be shared.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) kind: RouteKind,
    pub(super) prefix: u8,
    pub(super) hops: Vec<Way>,
    pub(super) prefsrc: Option<IpAddr>,
    pub(super) table: Name,
    pub(super) text: Name,
    metric: u32,
    /// Only for packets with this TOS; 0: for all (IPv4).
    tos: u8,
    /// Only for packets from here (IPv6).
    src: Option<IpNet>,
}

/// One way out.
#[derive(Clone, Debug)]
pub(super) struct Way {
    pub(super) interface: Option<Name>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) weight: u32,
    dead: bool,
}

/// What a table is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) dst: IpAddr,
    pub(super) src: Option<IpAddr>,
    pub(super) tos: u8,
}

impl Table {
    pub(super) const fn new(family: Family, name: Name) -> Self {
        Self { family, name, prefixes: Vec::new() }
    }

    pub(super) fn add(&mut self, route: &RouteEntry) {
        let entry = Entry::new(route, &self.name);
        let place = self.prefixes.binary_search_by_key(&Reverse(entry.prefix), |(length, _)| Reverse(*length));
        let at = place.unwrap_or_else(|at| {
            self.prefixes.insert(at, (entry.prefix, HashMap::default()));
            at
        });
        if let Some((_, nets)) = self.prefixes.get_mut(at) {
            let list = nets.entry(masked(route.dst.addr(), entry.prefix)).or_default();
            let place = list.partition_point(|other| other.rank() <= entry.rank());
            list.insert(place, entry);
        }
    }

    /// The first route for `asked` that is `good`.
    pub(super) fn find(&self, asked: &Asked, good: impl Fn(&Entry) -> bool) -> Option<&Entry> {
        // Whether a node of the IPv6 tree was found; from there on, the tree is only climbed.
        let mut entered = false;
        for (length, nets) in &self.prefixes {
            let Some(list) = nets.get(&masked(asked.dst, *length)) else { continue };
            let mine = || list.iter().filter(|entry| entry.is_for(asked));
            // A prefix that has routes for some sources is passed by for all others, its routes for any source included
            // (`fib6_node_lookup_1`), unless it is the root.
            let specific = |entry: &Entry| entry.src.is_some();
            if !entered && *length != 0 && list.iter().any(specific) && !mine().any(specific) {
                continue;
            }
            entered = true;
            if let Some(found) = mine().find(|entry| entry.usable() && good(entry)) {
                return Some(found);
            }
        }
        None
    }
}

impl Entry {
    fn new(route: &RouteEntry, table: &Name) -> Self {
        let hops = route.nexthops.iter().map(|hop| Way {
            interface: hop.interface.as_deref().map(Name::from),
            gateway: hop.gateway,
            weight: hop.weight.max(1),
            dead: hop.dead,
        });
        Self {
            kind: route.kind,
            prefix: route.dst.prefix_len(),
            hops: hops.collect(),
            prefsrc: route.prefsrc,
            table: table.clone(),
            text: Name::from(describe(route)),
            metric: route.metric,
            tos: route.tos,
            src: route.src.filter(|src| src.prefix_len() != 0),
        }
    }

    /// Its place among the routes of one prefix: by TOS (`fib_find_alias`) or source, then by metric; else as in the dump.
    fn rank(&self) -> (Reverse<u8>, Reverse<u8>, u32) {
        (Reverse(self.tos), Reverse(self.src.map_or(0, |src| src.prefix_len())), self.metric)
    }

    fn is_for(&self, asked: &Asked) -> bool {
        (self.tos == 0 || self.tos == asked.tos & TOS_BITS)
            && self.src.is_none_or(|from| asked.src.is_some_and(|src| from.contains(&src)))
    }

    /// A default route for one TOS only: the kernel may pass it by (`fib_select_default`).
    pub(super) fn is_default_for_tos(&self) -> bool {
        self.prefix == 0 && self.tos != 0
    }

    /// It has a way that can be taken, or needs none.
    fn usable(&self) -> bool {
        self.hops.is_empty() || self.hops.iter().any(|way| !way.dead)
    }

    /// The ways that can be taken.
    pub(super) fn alive(&self) -> impl Iterator<Item = &Way> {
        self.hops.iter().filter(|way| !way.dead)
    }
}

impl Way {
    pub(super) const fn new(interface: Option<Name>, gateway: Option<IpAddr>) -> Self {
        Self { interface, gateway, weight: 1, dead: false }
    }
}

/// The first `prefix` bits of an address.
fn masked(address: IpAddr, prefix: u8) -> u128 {
    match address {
        IpAddr::V4(four) => {
            u128::from(four.to_bits() & u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0))
        }
        IpAddr::V6(six) => six.to_bits() & u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0),
    }
}

/// As `ip route` prints it.
fn describe(route: &RouteEntry) -> String {
    let kind = match route.kind {
        RouteKind::Unicast | RouteKind::None => "",
        RouteKind::Local => "local ",
        RouteKind::Broadcast => "broadcast ",
        RouteKind::Anycast => "anycast ",
        RouteKind::Multicast => "multicast ",
        RouteKind::Unreachable => "unreachable ",
        RouteKind::Prohibit => "prohibit ",
        RouteKind::Blackhole => "blackhole ",
        RouteKind::Throw => "throw ",
    };
    let mut text = format!("{kind}{}", network(route.dst));
    if let Some(src) = route.src {
        text.push_str(&format!(" from {}", network(src)));
    }
    if route.tos != 0 {
        text.push_str(&format!(" tos {:#04x}", route.tos));
    }
    for hop in &route.nexthops {
        let many = if route.nexthops.len() > 1 { " nexthop" } else { "" };
        let via = hop.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        let dev = hop.interface.as_deref().map(|name| format!(" dev {name}")).unwrap_or_default();
        text.push_str(&format!("{many}{via}{dev}"));
    }
    if route.metric != 0 {
        text.push_str(&format!(" metric {}", route.metric));
    }
    text
}

fn network(net: IpNet) -> String {
    match net.prefix_len() {
        0 => "default".to_owned(),
        length if length == net.max_prefix_len() => net.addr().to_string(),
        _ => net.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::parse::iproute;
    use crate::core::parse::notes::Notes;

    /// Made by `ip route add`, asked by `ip route get` (Linux 6.18).
    const FOUR: &str = r#"[{"dst":"192.0.2.0/24","tos":"EF","gateway":"10.1.0.9","dev":"d1"},
{"dst":"192.0.2.0/24","tos":"0x1c","gateway":"10.1.0.9","dev":"d2","metric":5},
{"dst":"192.0.2.0/24","tos":"0x10","gateway":"10.1.0.9","dev":"d3","metric":5},
{"dst":"192.0.2.0/24","gateway":"10.0.0.9","dev":"d0"}]"#;

    #[test]
    fn ipv4_routes_are_chosen_by_three_bits_of_the_tos() {
        for (tos, device) in [
            (0, "d0"),
            (0x10, "d3"),
            (0x11, "d3"),
            (0x30, "d3"),
            (0x1c, "d2"),
            (0xfc, "d2"),
            (0xb8, "d0"),
            (0x20, "d0"),
        ] {
            assert_eq!(way(FOUR, Family::V4, "192.0.2.1", None, tos), device, "{tos:#x}");
        }
    }

    const SIX: &str = r#"[{"dst":"default","from":"fd02::/64","gateway":"fd02::9","dev":"d2"},
{"dst":"2001:db8:1::/48","gateway":"fd00::9","dev":"never","metric":100},
{"dst":"2001:db8:1::/48","from":"fd02::/64","gateway":"fd01::9","dev":"d1","metric":1000},
{"dst":"2001:db8:1::/48","from":"fd02::1","gateway":"fd03::8","dev":"d3"},
{"dst":"2001:db8:1:1::/64","from":"fd03::/64","gateway":"fd03::9","dev":"d4"},
{"dst":"default","gateway":"fd00::8","dev":"d0"}]"#;

    #[test]
    fn ipv6_routes_for_a_source_hide_those_of_the_same_prefix_from_all_others() {
        for (src, to_48, to_64, elsewhere) in [
            (None, "d0", "d0", "d0"),
            (Some("fd09::1"), "d0", "d0", "d0"),
            (Some("fd02::1"), "d3", "d3", "d2"),
            (Some("fd02::7"), "d1", "d1", "d2"),
            (Some("fd03::1"), "d0", "d4", "d0"),
        ] {
            let found =
                ["2001:db8:1::1", "2001:db8:1:1::1", "2001:db8:2::1"].map(|dst| way(SIX, Family::V6, dst, src, 0));
            assert_eq!(found, [to_48, to_64, elsewhere], "{src:?}");
        }
    }

    fn way(routes: &str, family: Family, dst: &str, src: Option<&str>, tos: u8) -> String {
        let mut notes = Notes::new("routes");
        let mut table = Table::new(family, Name::Static("main"));
        iproute::routes(routes, family, &mut notes).expect("routes").iter().for_each(|route| table.add(route));
        assert_eq!(notes.finish(), []);
        let address = |text: &str| text.parse().expect("an address");
        let asked = Asked { dst: address(dst), src: src.map(address), tos };
        let found = table.find(&asked, |_| true).expect("a route");
        found.hops[0].interface.as_deref().unwrap_or_default().to_owned()
    }
}
