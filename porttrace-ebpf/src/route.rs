//! The routing decision that a packet carries: its `dst_entry`.

use crate::maps::offset;
use crate::skb::{Access, ifindex_of};
use porttrace_ebpf::{Event, Kind};

/// `SKB_DST_PTRMASK`: the lowest bit says that the packet holds no reference.
const POINTER: u64 = !1;
/// `DST_FAKE_RTABLE` (a bridge's) and `DST_METADATA` (a tunnel's): no routes (include/net/dst.h).
const NO_ROUTE: u16 = 0x10 | 0x80;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// `RTF_*` (include/uapi/linux/ipv6_route.h).
const GATEWAY: u32 = 0x2;
const ANYCAST: u32 = 0x0010_0000;
const LOCAL: u32 = 0x8000_0000;

/// `RTN_*` (include/uapi/linux/rtnetlink.h).
const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;
const RTN_ANYCAST: u8 = 4;
const RTN_MULTICAST: u8 = 5;

/// Fills in the route of the packet that the event describes; leaves it open where there is none. `S` reads the packet, `A` the rest.
#[inline(always)]
pub fn describe_route<S: Access, A: Access>(event: &mut Event, skb: u64) {
    let dst = S::read::<u64>(skb + offset!(skb_refdst)) & POINTER;
    if dst == 0 || A::read::<u16>(dst + offset!(dst_flags)) & NO_ROUTE != 0 {
        return;
    }
    match event.head.packet.family {
        4 => ipv4::<A>(event, dst),
        6 => ipv6::<A>(event, dst),
        _ => return,
    }
    // Netfilter's own word of the output interface stands in its programs' events.
    if event.head.kind == Kind::Confirmed as u8 && event.head.route_type == RTN_UNICAST {
        event.head.out_ifindex = ifindex_of::<A>(A::read(dst + offset!(dst_dev)));
    }
}

/// `struct rtable`: `rt_nexthop` (include/net/route.h).
#[inline(always)]
fn ipv4<A: Access>(event: &mut Event, dst: u64) {
    if offset!(rt_type) == 0 {
        return;
    }
    event.head.route_type = A::read::<u16>(dst + offset!(rt_type)) as u8;
    match A::read::<u8>(dst + offset!(rt_gw_family)) {
        AF_INET => {
            let gateway: u32 = A::read(dst + offset!(rt_gw));
            event.next_hop[..4].copy_from_slice(&gateway.to_ne_bytes());
            event.head.next_hop_family = 4;
        }
        AF_INET6 => {
            event.next_hop = bytes(A::read(dst + offset!(rt_gw)));
            event.head.next_hop_family = 6;
        }
        _ => {}
    }
}

/// `struct rt6_info`: `rt6_nexthop` (include/net/ip6_route.h).
#[inline(always)]
fn ipv6<A: Access>(event: &mut Event, dst: u64) {
    if offset!(rt6_flags) == 0 {
        return;
    }
    let flags: u32 = A::read(dst + offset!(rt6_flags));
    event.head.route_type = if flags & LOCAL != 0 {
        RTN_LOCAL
    } else if flags & ANYCAST != 0 {
        RTN_ANYCAST
    } else if event.head.packet.dst[0] == 0xff {
        RTN_MULTICAST
    } else {
        RTN_UNICAST
    };
    if flags & GATEWAY != 0 {
        event.next_hop = bytes(A::read(dst + offset!(rt6_gateway)));
        event.head.next_hop_family = 6;
    }
}

#[inline(always)]
const fn bytes(words: [u64; 2]) -> [u8; 16] {
    // SAFETY: plain bytes of the same size.
    unsafe { core::mem::transmute(words) }
}
