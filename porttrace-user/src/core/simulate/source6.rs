//! Which of its IPv6 addresses the node uses towards a destination: `ipv6_dev_get_saddr` and its rules (net/ipv6/addrconf.c,
//! RFC 6724), with the default label table (net/ipv6/addrlabel.c).

use crate::core::model::state::Address;
use std::net::{IpAddr, Ipv6Addr};

/// The address with the highest score; of equal ones the first in the kernel's list.
pub(super) fn select(addresses: &[Address], device: &str, towards: Ipv6Addr) -> Option<IpAddr> {
    let own_only = towards.is_multicast() || scope(towards) <= LINK;
    let mut best: Option<(Score, IpAddr)> = None;
    for address in addresses {
        let IpAddr::V6(own) = address.address else { continue };
        if own.is_multicast() || own.is_unspecified() || own_only && address.interface != device {
            continue;
        }
        let score = score(own, address, device, towards);
        if best.as_ref().is_none_or(|(highest, _)| score > *highest) {
            best = Some((score, address.address));
        }
    }
    best.map(|(_, address)| address)
}

/// Same address, appropriate scope, outgoing interface, matching label, longest common prefix: earlier ones count more.
type Score = (bool, i16, bool, bool, u32);

fn score(own: Ipv6Addr, address: &Address, device: &str, towards: Ipv6Addr) -> Score {
    let (mine, theirs) = (scope(own), scope(towards));
    let scope = if mine >= theirs { -mine } else { mine - 128 };
    let common = (own.to_bits() ^ towards.to_bits()).leading_zeros().min(address.prefix.into());
    (own == towards, scope, address.interface == device, label(own) == label(towards), common)
}

/// `IPV6_ADDR_SCOPE_LINKLOCAL`.
const LINK: i16 = 2;

/// `ipv6_addr_src_scope`; `::1` counts as link-local there.
fn scope(address: Ipv6Addr) -> i16 {
    match address.segments()[0] {
        first if first & 0xff00 == 0xff00 => (first & 0xf).cast_signed(),
        first if first & 0xffc0 == 0xfe80 => LINK,
        first if first & 0xffc0 == 0xfec0 => 5,
        _ if address.is_loopback() => LINK,
        _ => 14,
    }
}

fn label(address: Ipv6Addr) -> u8 {
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 1] => 0,
        [0, 0, 0, 0, 0, 0xffff, ..] => 4,
        [0, 0, 0, 0, 0, 0, ..] => 3,
        [0x2001, 0, ..] => 6,
        [0x2001, second, ..] if second & 0xfff0 == 0x10 => 7,
        [0x2002, ..] => 2,
        [0x3ffe, ..] => 12,
        [first, ..] if first & 0xffc0 == 0xfec0 => 11,
        [first, ..] if first & 0xfe00 == 0xfc00 => 5,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(address: &str, prefix: u8, interface: &str) -> Address {
        let scope = if address.starts_with("fe80") { "link" } else { "global" };
        let address = address.parse().unwrap();
        Address { interface: interface.into(), address, prefix, scope: scope.into(), secondary: false }
    }

    #[test]
    fn without_an_address_on_the_interface_the_longest_common_prefix_wins() {
        let all = [own("fc00:f853::3", 64, "eth0"), own("fd01::1", 64, "eth1"), own("fd00:10:244:1::1", 128, "veth1a")];
        let chosen = |device: &str, towards: &str| select(&all, device, towards.parse().unwrap()).unwrap().to_string();
        assert_eq!(chosen("veth2b", "fd00:10:244:1::a"), "fd00:10:244:1::1");
        // The packet returns by lo: the destination itself is the source.
        assert_eq!(chosen("lo", "fd00:10:244:1::1"), "fd00:10:244:1::1");
        // The outgoing interface counts more than the prefix.
        assert_eq!(chosen("eth1", "fd00:10:244:1::a"), "fd01::1");
    }

    #[test]
    fn a_link_local_destination_is_reached_from_its_link_only() {
        let all = [own("fd01::1", 64, "eth1"), own("fe80::1", 64, "eth0")];
        assert_eq!(select(&all, "eth1", "fe80::9".parse().unwrap()).unwrap().to_string(), "fd01::1");
        assert_eq!(select(&all, "eth0", "fe80::9".parse().unwrap()).unwrap().to_string(), "fe80::1");
    }
}
