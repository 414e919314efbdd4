//! Matches on the sender and the receiver of a packet: MAC address, owner of the socket, listening socket.

use super::conn::CtInfo;
use super::matches::Answer;
use super::routing::{Found, Key};
use super::run::Run;
use super::walk::Walk;
use crate::core::model::flow::{Direction, Proto};
use crate::core::model::rules::{Owner, SocketMatch};
use crate::core::parse::words::mac_text as text;
use std::net::IpAddr;

/// Kinds of links whose packets have no Ethernet header (`ARPHRD_ETHER`).
const WITHOUT_ETHERNET: [&str; 10] =
    ["ipip", "sit", "gre", "ip6tnl", "ip6gre", "vti", "vti6", "xfrm", "wireguard", "tun"];

/// `owner_mt` (net/netfilter/xt_owner.c): a packet without a socket has no owner, and a copy has none (`__skb_clone`).
pub(super) fn owner(walk: &Walk<'_>, asked: &Owner) -> Answer {
    if !walk.local || walk.looped || walk.copied.is_some() {
        return false.into();
    }
    let within = |id: Option<u32>, (low, high): (u32, u32), what: &str, option: &str| match id {
        Some(id) => (low..=high).contains(&id).into(),
        None => Answer::Unknown(format!("whose {what} the sending process has (give {option})")),
    };
    match *asked {
        Owner::Exists => true.into(),
        Owner::Uid(low, high) => within(walk.packet.sender.uid, (low, high), "user ID", "--uid"),
        Owner::Gid(low, high) => within(walk.packet.sender.gid, (low, high), "group ID", "--gid"),
    }
}

impl<'s> Run<'s> {
    /// `mac_mt` (net/netfilter/xt_mac.c): false, negated or not, for what did not come in an Ethernet frame.
    pub(super) fn mac(&mut self, walk: &Walk<'_>, asked: [u8; 6]) -> Answer {
        let Some(input) = walk.input_name().filter(|input| !walk.looped && *input != "lo") else {
            return Answer::Never;
        };
        if self.sim.config.link(input).is_some_and(|link| WITHOUT_ETHERNET.contains(&link.kind.as_str())) {
            return Answer::Never;
        }
        if let Some(mac) = walk.packet.sender.mac {
            return (mac == asked).into();
        }
        match self.neighbour_of(walk, input) {
            Some((address, mac)) => {
                self.assume(format!("the frame comes from {}, the neighbour {address} behind {input}", text(mac)));
                (mac == asked).into()
            }
            None => Answer::Unknown(format!("from which MAC address the frame comes (give --mac): {}", text(asked))),
        }
    }

    /// Who puts packets of this source on the link: the source itself, or the router towards it.
    fn neighbour_of(&mut self, walk: &Walk<'_>, input: &str) -> Option<(IpAddr, [u8; 6])> {
        let src = match walk.conn.direction {
            Direction::Original => walk.conn.original.src,
            Direction::Reply => walk.conn.reply.src,
        };
        let mut back = Key::of(walk, "lo");
        (back.dst, back.src, back.output, back.mark) = (src, None, Some(input), 0);
        let sim = self.sim;
        let Found::Route(entry) = sim.routing.lookup(&back, &mut |_| {}) else { return None };
        let way = entry.alive().find(|way| way.interface.as_deref() == Some(input))?;
        let address = way.gateway.unwrap_or(src);
        Some((address, self.sim.config.neighbour(input, address)?))
    }

    /// `socket_match` and `nf_sk_lookup_slow_v4` (net/netfilter/xt_socket.c, net/ipv4/netfilter/nf_socket_ipv4.c). The state
    /// has listening and unconnected sockets only: for a connection that exists already the answer is not known.
    pub(super) fn socket(&mut self, walk: &Walk<'_>, asked: &SocketMatch) -> Answer {
        let tuple = &walk.tuple;
        if !matches!(tuple.proto, Proto::Tcp | Proto::Udp) {
            return false.into();
        }
        if walk.conn.state == CtInfo::Established {
            return Answer::Unknown("whether the connection has a socket on this node".into());
        }
        let Some(found) = self.sim.config.listener(tuple) else {
            return Answer::Unknown("whether a socket is there: sockets are not part of the state".into());
        };
        let Some(socket) = found else { return false.into() };
        // "Ignore sockets listening on INADDR_ANY, unless XT_SOCKET_NOWILDCARD is set".
        if socket.address.is_unspecified() && !asked.nowildcard {
            return false.into();
        }
        let place = format!("{}:{}", socket.address, socket.port);
        if asked.transparent {
            return Answer::Unknown(format!("whether the socket {place} is transparent"));
        }
        if asked.restore_mark {
            return Answer::Unknown(format!("the mark of the socket {place}"));
        }
        true.into()
    }
}
