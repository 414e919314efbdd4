//! Which address of a range the kernel takes: a hash of the addresses, the same after every reboot
//! (`find_best_ips_proto`, net/netfilter/nf_nat_core.c; `jhash2`, include/linux/jhash.h).

use crate::core::model::flow::Tuple;
use crate::core::model::trace::Manip;
use std::net::{IpAddr, Ipv6Addr};

/// The address for a connection whose tuple was `old`. The kernel writes each word of the new address into the tuple before it
/// takes the destination's word into the hash: for DNAT that is the new one.
pub(super) fn pick((low, high): (IpAddr, IpAddr), old: &Tuple, manip: Manip, persistent: bool) -> IpAddr {
    if low == high {
        return low;
    }
    let max = if low.is_ipv4() { 0 } else { 3 };
    let (low, high) = (host_words(low), host_words(high));
    let (src, dst) = (words(old.src), words(old.dst));
    let mut hash = jhash2(src, if persistent { 0 } else { dst[max] });
    let mut full = false;
    let mut chosen = low;
    for at in 0..=max {
        let (from, count) =
            if full { (0, u32::MAX) } else { (low[at], high[at].wrapping_sub(low[at]).wrapping_add(1)) };
        chosen[at] = from.wrapping_add(((u64::from(hash) * u64::from(count)) >> 32) as u32);
        full |= chosen[at] != high[at];
        if !persistent {
            hash ^= if manip == Manip::Dnat { chosen[at].swap_bytes() } else { dst[at] };
        }
    }
    if max == 0 {
        IpAddr::V4(chosen[0].into())
    } else {
        let bits = chosen.iter().fold(0u128, |bits, word| bits << 32 | u128::from(*word));
        IpAddr::V6(Ipv6Addr::from_bits(bits))
    }
}

/// An address as numbers of 32 bits.
fn host_words(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(four) => [four.to_bits(), 0, 0, 0],
        IpAddr::V6(six) => quarters(six.to_bits()),
    }
}

fn quarters(bits: u128) -> [u32; 4] {
    [(bits >> 96) as u32, (bits >> 64) as u32, (bits >> 32) as u32, bits as u32]
}

/// `union nf_inet_addr` as the words that a little-endian kernel hashes.
fn words(address: IpAddr) -> [u32; 4] {
    host_words(address).map(u32::swap_bytes)
}

fn jhash2(key: [u32; 4], initval: u32) -> u32 {
    let start = 0xdead_beef_u32.wrapping_add(4 << 2).wrapping_add(initval);
    let (mut a, mut b, mut c) = (start.wrapping_add(key[0]), start.wrapping_add(key[1]), start.wrapping_add(key[2]));
    // __jhash_mix
    for (shift, which) in [(4, 0), (6, 1), (8, 2), (16, 0), (19, 1), (4, 2)] {
        match which {
            0 => (a, c) = (a.wrapping_sub(c) ^ c.rotate_left(shift), c.wrapping_add(b)),
            1 => (b, a) = (b.wrapping_sub(a) ^ a.rotate_left(shift), a.wrapping_add(c)),
            _ => (c, b) = (c.wrapping_sub(b) ^ b.rotate_left(shift), b.wrapping_add(a)),
        }
    }
    a = a.wrapping_add(key[3]);
    // __jhash_final
    c = (c ^ b).wrapping_sub(b.rotate_left(14));
    a = (a ^ c).wrapping_sub(c.rotate_left(11));
    b = (b ^ a).wrapping_sub(a.rotate_left(25));
    c = (c ^ b).wrapping_sub(b.rotate_left(16));
    a = (a ^ c).wrapping_sub(c.rotate_left(4));
    b = (b ^ a).wrapping_sub(a.rotate_left(14));
    (c ^ b).wrapping_sub(b.rotate_left(24))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::flow::Proto;

    /// What Linux 6.18 chose for `-j DNAT --to-destination fd00:10:244:1::9-fd00:10:244:1::a`.
    #[test]
    fn dnat_hashes_the_new_address() {
        let address = |text: &str| -> IpAddr { text.parse().expect("an address") };
        let range = (address("fd00:10:244:1::9"), address("fd00:10:244:1::a"));
        for (src, chosen) in [
            ("fc00:f853::3", "fd00:10:244:1::a"),
            ("fd00:10:96::1", "fd00:10:244:1::a"),
            ("fd00:10:244:1::9", "fd00:10:244:1::9"),
            ("fd00:10:244:3::b", "fd00:10:244:1::9"),
        ] {
            let old =
                Tuple { proto: Proto::Tcp, src: address(src), sport: 1, dst: address("2001:db8:77::1"), dport: 1 };
            assert_eq!(pick(range, &old, Manip::Dnat, false), address(chosen), "{src}");
        }
    }
}
