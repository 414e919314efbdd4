//! Routing tables: `fib_table_lookup` (net/ipv4/fib_trie.c), `fib6_node_lookup` and `fib6_backtrack` (net/ipv6/ip6_fib.c).

use crate::core::model::flow::Family;
use crate::core::model::name::Name;
use crate::core::model::state::RouteEntry;
use crate::core::model::trace::RouteKind;
use ipnet::IpNet;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The bits of a TOS byte that IPv4 routes and policy rules are asked with (`IPTOS_RT_MASK`).
pub(super) const TOS_BITS: u8 = 0x1c;

/// One routing table of one family.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) family: Family,
    pub(super) name: Name,
    /// A wider prefix stands before those within it.
    prefixes: Vec<Prefix>,
    /// The address space in pieces: where each begins, and the narrowest prefix that it lies in.
    spans: Vec<(u128, Option<u32>)>,
}

/// The routes of one prefix.
#[derive(Debug)]
struct Prefix {
    last: u128,
    length: u8,
    /// The narrowest prefix around this one.
    around: Option<u32>,
    /// In the order in which the kernel asks them.
    entries: Vec<Entry>,
    /// Some are for some sources only.
    by_source: bool,
}

/// A route, ready for lookup.
#[derive(Debug)]
pub(super) struct Entry {
    /// Its place among the routes of all tables.
    pub(super) number: u32,
    pub(super) kind: RouteKind,
    pub(super) prefix: u8,
    pub(super) hops: Vec<Way>,
    pub(super) prefsrc: Option<IpAddr>,
    /// It has a way that can be taken, or needs none.
    usable: bool,
    metric: u32,
    /// Only for packets with this TOS; 0: for all (IPv4).
    tos: u8,
    /// Only for packets from here (IPv6).
    src: Option<IpNet>,
}

/// One way out.
#[derive(Clone, Debug)]
pub(super) struct Way {
    /// Its place among the ways of its route.
    pub(super) number: u16,
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
    pub(super) fn new<'r>(family: Family, name: Name, routes: impl IntoIterator<Item = (u32, &'r RouteEntry)>) -> Self {
        let mut sorted: BTreeMap<(u128, u8), Vec<Entry>> = BTreeMap::new();
        for (number, route) in routes {
            let entry = Entry::new(number, route);
            let list = sorted.entry((masked(route.dst.addr(), entry.prefix), entry.prefix)).or_default();
            let place = list.partition_point(|other| other.rank() <= entry.rank());
            list.insert(place, entry);
        }
        let mut table = Self { family, name, prefixes: Vec::new(), spans: vec![(0, None)] };
        let mut around = None;
        for ((first, length), entries) in sorted {
            around = table.close(around, Some(first));
            let last = first | host_bits(family, length);
            table.spans.push((first, Some(table.prefixes.len() as u32)));
            let by_source = entries.iter().any(|entry| entry.src.is_some());
            table.prefixes.push(Prefix { last, length, around, entries, by_source });
            around = Some(table.prefixes.len() as u32 - 1);
        }
        table.close(around, None);
        table
    }

    /// Ends the open prefixes that do not reach as far as `next`; returns the narrowest that does.
    fn close(&mut self, mut open: Option<u32>, next: Option<u128>) -> Option<u32> {
        while let Some(prefix) = open.and_then(|at| self.prefixes.get(at as usize)) {
            if next.is_some_and(|next| next <= prefix.last) {
                break;
            }
            open = prefix.around;
            if let Some(after) = prefix.last.checked_add(1) {
                self.spans.push((after, open));
            }
        }
        open
    }

    /// The first route for `asked` that is `good`.
    pub(super) fn find(&self, asked: &Asked, good: impl Fn(&Entry) -> bool) -> Option<&Entry> {
        let address = bits(asked.dst);
        let after = self.spans.partition_point(|(start, _)| *start <= address);
        let mut at = self.spans.get(after.checked_sub(1)?)?.1;
        // Whether a node of the IPv6 tree was found; from there on, the tree is only climbed.
        let mut entered = false;
        while let Some(prefix) = at.and_then(|at| self.prefixes.get(at as usize)) {
            at = prefix.around;
            let mut mine = prefix.entries.iter().filter(|entry| entry.is_for(asked));
            // A prefix that has routes for some sources is passed by for all others, its routes for any source included
            // (`fib6_node_lookup_1`), unless it is the root.
            let elsewhere = prefix.by_source && prefix.length != 0 && !mine.clone().any(|entry| entry.src.is_some());
            if elsewhere && !entered {
                continue;
            }
            entered = true;
            if let Some(found) = mine.find(|entry| entry.usable && good(entry)) {
                return Some(found);
            }
        }
        None
    }
}

impl Entry {
    fn new(number: u32, route: &RouteEntry) -> Self {
        let hops = (0..).zip(&route.nexthops).map(|(number, hop)| Way {
            number,
            interface: hop.interface.as_deref().map(Name::from),
            gateway: hop.gateway,
            weight: hop.weight.max(1),
            dead: hop.dead,
        });
        Self {
            number,
            kind: route.kind,
            prefix: route.dst.prefix_len(),
            hops: hops.collect(),
            usable: route.nexthops.is_empty() || route.nexthops.iter().any(|hop| !hop.dead),
            prefsrc: route.prefsrc,
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

    /// The ways that can be taken.
    pub(super) fn alive(&self) -> impl Iterator<Item = &Way> {
        self.hops.iter().filter(|way| !way.dead)
    }
}

/// The first `prefix` bits of an address.
fn masked(address: IpAddr, prefix: u8) -> u128 {
    bits(address) & !host_bits(Family::of(address), prefix)
}

/// An address as a number.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(four) => four.to_bits().into(),
        IpAddr::V6(six) => six.to_bits(),
    }
}

/// The bits behind a prefix, all set.
const fn host_bits(family: Family, prefix: u8) -> u128 {
    let length = match family {
        Family::V4 => 32,
        Family::V6 => 128,
    };
    match u128::MAX.checked_shr(128 - (length - prefix as u32)) {
        Some(bits) => bits,
        None => 0,
    }
}

/// As `ip route` prints it.
pub(super) fn describe(route: &RouteEntry) -> String {
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
    use crate::core::model::name::name;
    use crate::core::parse::iproute;
    use crate::core::parse::notes::Notes;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

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

    proptest! {
        /// Whatever prefixes lie in each other, and at both ends of the address space.
        #[test]
        fn the_narrowest_prefix_wins(nets in vec((any::<u8>(), 0u8..=32), 0..24), asked in vec(any::<u8>(), 1..24)) {
            let spread = |byte: u8| Ipv4Addr::from(u32::from_be_bytes([byte; 4]));
            let route = |(byte, length): &(u8, u8)| {
                let net = IpNet::new(spread(*byte).into(), *length).expect("a net").trunc();
                format!(r#"{{"dst":"{net}","dev":"d{length}"}}"#)
            };
            let dump = format!("[{}]", nets.iter().map(route).collect::<Vec<_>>().join(","));
            let routes = iproute::routes(&dump, Family::V4, &mut Notes::new("routes")).expect("routes");
            let table = Table::new(Family::V4, name!("main"), (0..).zip(&routes));
            for byte in asked {
                let dst = IpAddr::V4(spread(byte));
                let found = table.find(&Asked { dst, src: None, tos: 0 }, |_| true).map(|entry| entry.prefix);
                let fits = routes.iter().filter(|route| route.dst.contains(&dst));
                prop_assert_eq!(found, fits.map(|route| route.dst.prefix_len()).max(), "{} in {}", dst, dump);
            }
        }
    }

    fn way(routes: &str, family: Family, dst: &str, src: Option<&str>, tos: u8) -> String {
        let mut notes = Notes::new("routes");
        let routes = iproute::routes(routes, family, &mut notes).expect("routes");
        let table = Table::new(family, name!("main"), (0..).zip(&routes));
        assert_eq!(notes.finish(), []);
        let address = |text: &str| text.parse().expect("an address");
        let asked = Asked { dst: address(dst), src: src.map(address), tos };
        let found = table.find(&asked, |_| true).expect("a route");
        found.hops[0].interface.as_deref().unwrap_or_default().to_owned()
    }
}
