//! Random routers: what a Kubernetes node looks like, with odd routes, policy rules and sysctls.

use crate::fuzz::rng::Rng;
use crate::fuzz::scenario::{Link, Node};
use porttrace_user::core::model::flow::Family;

/// Ports that rules name and packets go to. Few, so that they meet.
pub const PORTS: [u16; 7] = [53, 80, 443, 8081, 9088, 30080, 31234];

/// A router, and the addresses that rules and packets draw from.
pub struct World {
    pub node: Node,
    pub v4: Pool,
    pub v6: Pool,
    /// Bridge ports of `cni0`; empty when there is no bridge.
    pub bridge_ports: Vec<String>,
}

/// One family's addresses.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    /// The router's own, usable as sources.
    pub own: Vec<String>,
    /// Neighbours and what lies behind them, by the interface where they are.
    pub hosts: Vec<(String, String)>,
    /// Destinations without a host: Service addresses, martians, dead ends.
    pub others: Vec<String>,
    /// Prefixes for rules.
    pub nets: Vec<String>,
}

impl Pool {
    /// Any address of the pool, as a destination.
    pub fn destination(&self, rng: &mut Rng) -> String {
        match rng.below(10) {
            0..=3 => rng.choose(&self.own).clone(),
            4..=6 => rng.choose(&self.hosts).1.clone(),
            _ => rng.choose(&self.others).clone(),
        }
    }

    /// An address that something answers from: for NAT.
    pub fn host(&self, rng: &mut Rng) -> String {
        rng.choose(&self.hosts).1.clone()
    }
}

impl World {
    pub fn pool(&self, family: Family) -> &Pool {
        if family == Family::V4 { &self.v4 } else { &self.v6 }
    }

    /// Names of the router's interfaces as rules see them.
    pub fn interfaces(&self) -> Vec<String> {
        let links = self.node.links.iter().map(|link| link.bridge.clone().unwrap_or_else(|| link.name.clone()));
        let mut names: Vec<String> = links.chain(["lo".into()]).collect();
        names.dedup();
        names
    }

    pub fn random(rng: &mut Rng) -> Self {
        let bridged = rng.percent(25);
        let mut links: Vec<Link> =
            ["eth0", "eth1", "veth1a", "veth2b"].map(|name| Link { name: name.into(), bridge: None }).into();
        let mut world = Self { node: Node::default(), v4: pool_v4(), v6: pool_v6(), bridge_ports: Vec::new() };
        addresses(&mut world.node.ip);
        if bridged {
            world.bridge_ports = vec!["port1".into(), "port2".into()];
            links
                .extend(world.bridge_ports.iter().map(|name| Link { name: name.clone(), bridge: Some("cni0".into()) }));
            bridge(&mut world);
        }
        world.node.links = links;
        routes(rng, &mut world);
        policy(rng, &mut world);
        sysctls(rng, &mut world.node.sysctls);
        sets(&mut world.node.sets);
        world.node.sockets = strings(["0.0.0.0:53", "[::]:8081"]);
        for port in [80, 443, 9088, 30080] {
            world.node.sockets.extend([format!("172.18.0.3:{port}"), format!("[fc00:f853::3]:{port}")]);
        }
        world.node.accounting = vec!["seen".into(), "localhost_nps_accepted_pkts".into()];
        world
    }
}

fn strings<const N: usize>(items: [&str; N]) -> Vec<String> {
    items.map(String::from).into()
}

fn pairs<const N: usize>(items: [(&str, &str); N]) -> Vec<(String, String)> {
    items.map(|(link, address)| (link.into(), address.into())).into()
}

fn pool_v4() -> Pool {
    Pool {
        own: strings(["172.18.0.3", "172.18.0.33", "10.1.0.1", "10.244.1.1", "127.0.0.1"]),
        hosts: pairs([
            ("eth0", "172.18.0.4"),
            ("eth0", "172.18.0.5"),
            ("eth0", "10.244.2.7"),
            ("eth0", "198.51.100.7"),
            ("eth1", "10.1.0.20"),
            ("eth1", "203.0.113.9"),
            ("veth1a", "10.244.1.9"),
            ("veth2b", "10.244.1.10"),
        ]),
        others: strings([
            "10.96.0.1",
            "10.96.48.151",
            "192.0.2.77",
            "172.18.255.255",
            "10.66.0.5",
            "10.67.0.5",
            "10.68.0.5",
        ]),
        nets: strings([
            "172.18.0.0/16",
            "10.244.0.0/16",
            "10.244.1.0/24",
            "10.96.0.0/12",
            "127.0.0.0/8",
            "10.1.0.0/24",
        ]),
    }
}

fn pool_v6() -> Pool {
    Pool {
        own: strings(["fc00:f853::3", "fd01::1", "fd00:10:244:1::1", "::1"]),
        hosts: pairs([
            ("eth0", "fc00:f853::4"),
            ("eth0", "fc00:f853::5"),
            ("eth0", "fd00:10:244:2::7"),
            ("eth1", "fd01::20"),
            ("eth1", "2001:db8::9"),
            ("veth1a", "fd00:10:244:1::9"),
            ("veth2b", "fd00:10:244:1::a"),
        ]),
        others: strings(["fd00:10:96::1", "fd00:10:96::abcd", "2001:db8:77::1", "fd66::5", "fd67::5", "fd68::5"]),
        nets: strings(["fc00:f853::/64", "fd00:10:244::/48", "fd00:10:244:1::/64", "fd00:10:96::/112", "fd01::/64"]),
    }
}

/// As ptp leaves it: pods by host routes, the pods' gateway address on every veth.
fn addresses(ip: &mut Vec<String>) {
    ip.extend(strings([
        "addr add 172.18.0.3/16 brd 172.18.255.255 dev eth0",
        "addr add 172.18.0.33/16 dev eth0",
        "addr add 10.1.0.1/24 dev eth1",
        "addr add 10.244.1.1/32 dev veth1a",
        "addr add 10.244.1.1/32 dev veth2b",
        "route add 10.244.1.9 dev veth1a src 10.244.1.1",
        "route add 10.244.1.10 dev veth2b src 10.244.1.1",
        "route add 10.244.2.0/24 via 172.18.0.5 dev eth0",
        "addr add fc00:f853::3/64 dev eth0 nodad",
        "addr add fd01::1/64 dev eth1 nodad",
        "addr add fd00:10:244:1::1/128 dev veth1a nodad",
        "route add fd00:10:244:1::9 dev veth1a src fd00:10:244:1::1",
        "route add fd00:10:244:1::a dev veth2b",
        "route add fd00:10:244:2::/64 via fc00:f853::5 dev eth0",
    ]));
}

/// Neighbours on a bridge need an address that the bridge has learnt.
fn bridge(world: &mut World) {
    world.node.ip.extend(strings([
        "addr add 10.244.3.1/24 dev cni0",
        "addr add fd00:10:244:3::1/64 dev cni0 nodad",
        "neigh add 10.244.3.11 lladdr 02:00:00:00:03:01 dev cni0 nud permanent",
        "neigh add 10.244.3.12 lladdr 02:00:00:00:03:02 dev cni0 nud permanent",
        "neigh add fd00:10:244:3::b lladdr 02:00:00:00:03:01 dev cni0 nud permanent",
        "neigh add fd00:10:244:3::c lladdr 02:00:00:00:03:02 dev cni0 nud permanent",
    ]));
    for (own, pool, hosts) in [
        ("10.244.3.1", &mut world.v4, ["10.244.3.11", "10.244.3.12"]),
        ("fd00:10:244:3::1", &mut world.v6, ["fd00:10:244:3::b", "fd00:10:244:3::c"]),
    ] {
        pool.own.push(own.into());
        for (port, host) in world.bridge_ports.iter().zip(hosts) {
            pool.hosts.push((port.clone(), host.into()));
        }
    }
}

fn routes(rng: &mut Rng, world: &mut World) {
    let ip = &mut world.node.ip;
    if rng.percent(75) {
        ip.extend(strings([
            "route add default via 172.18.0.1 dev eth0",
            "route add default via fc00:f853::1 dev eth0",
        ]));
    }
    ip.extend(strings([
        "route add 203.0.113.0/24 via 10.1.0.20 dev eth1",
        "route add 2001:db8::/64 via fd01::20 dev eth1",
    ]));
    for (net, net6) in [("10.66.0.0/16", "fd66::/64"), ("10.67.0.0/16", "fd67::/64"), ("10.68.0.0/16", "fd68::/64")] {
        let kind = rng.pick(&["blackhole", "unreachable", "prohibit", "throw", "local", "unicast"]);
        let (four, six) = match kind {
            "local" => (format!("{net} dev lo"), format!("{net6} dev lo")),
            "unicast" => (format!("{net} dev eth1"), format!("{net6} dev eth1")),
            _ => (net.to_string(), net6.to_string()),
        };
        ip.push(format!("route add {kind} {four}"));
        ip.push(format!("route add {kind} {six}"));
    }
    if rng.percent(25) {
        selective_routes(rng, ip);
    }
}

/// Routes for some TOS values (IPv4), for some sources (IPv6).
fn selective_routes(rng: &mut Rng, ip: &mut Vec<String>) {
    // No default route: among several, the state of neighbours decides (`fib_select_default`).
    for net in ["203.0.113.0/24", "10.244.2.0/24", "10.66.0.0/16", "198.51.100.0/24"] {
        if rng.percent(60) {
            let tos = rng.pick(&["0x08", "0x10", "0x18", "0xb8"]);
            ip.push(format!("route add {net} tos {tos} via 10.1.0.20 dev eth1 metric {}", rng.range(1, 3)));
        }
    }
    for net in ["2001:db8::/64", "fd00:10:244:2::/64", "fd00:10:244::/48", "fd66::/64", "default"] {
        if rng.percent(60) {
            let from = rng.pick(&["fc00:f853::/64", "fc00:f853::4", "fd00:10:244:1::/64", "fd01::/64"]);
            let via = rng.pick(&["via fd01::20 dev eth1", "via fc00:f853::5 dev eth0"]);
            ip.push(format!("-6 route add {net} from {from} {via} metric {}", rng.range(1, 3)));
        }
    }
}

fn policy(rng: &mut Rng, world: &mut World) {
    let ip = &mut world.node.ip;
    if rng.percent(60) {
        return;
    }
    ip.extend(strings(["route add default dev eth1 table 100", "-6 route add default dev eth1 table 100"]));
    for priority in 0..rng.range(1, 3) {
        let (selector, both) = match rng.below(7) {
            6 => (format!("tos {}", rng.pick(&["0x08", "0x10"])), true),
            0 => ("fwmark 0x1/0x1".to_string(), true),
            1 => ("fwmark 0x4000/0x4000".to_string(), true),
            2 => (format!("iif {}", rng.pick(&["eth0", "veth1a", "lo"])), true),
            3 => ("from 10.244.1.0/24".to_string(), false),
            4 => ("to 192.0.2.0/24".to_string(), false),
            _ => ("not fwmark 0x4000/0x4000 iif eth1".to_string(), true),
        };
        let action =
            rng.pick(&["lookup 100", "lookup 100", "lookup 100", "lookup main suppress_prefixlength 0", "prohibit"]);
        ip.push(format!("rule add pref {} {selector} {action}", 100 + priority));
        if both {
            ip.push(format!("-6 rule add pref {} {selector} {action}", 100 + priority));
        }
    }
}

fn sysctls(rng: &mut Rng, sysctls: &mut Vec<(String, String)>) {
    let mut set = |key: &str, value: u32| sysctls.push((key.into(), value.to_string()));
    let forwarding = u32::from(rng.percent(92));
    set("ipv4/ip_forward", forwarding);
    set("ipv6/conf/all/forwarding", forwarding);
    set("ipv4/conf/all/rp_filter", if rng.percent(70) { 0 } else { rng.range(1, 2) });
    for link in ["eth0", "eth1", "veth1a", "veth2b"] {
        set(&format!("ipv4/conf/{link}/rp_filter"), if rng.percent(60) { 0 } else { rng.range(0, 2) });
        if rng.percent(20) {
            set(&format!("ipv4/conf/{link}/route_localnet"), 1);
        }
        if rng.percent(10) {
            set(&format!("ipv4/conf/{link}/accept_local"), 1);
        }
        if rng.percent(5) {
            set(&format!("ipv4/conf/{link}/forwarding"), 0);
        }
    }
    if rng.percent(20) {
        set("ipv4/conf/all/route_localnet", 1);
    }
    if rng.percent(30) {
        set("ipv4/conf/all/src_valid_mark", 1);
    }
}

fn sets(sets: &mut Vec<String>) {
    sets.extend(strings([
        "create s-ip hash:ip",
        "add s-ip 172.18.0.4",
        "add s-ip 10.96.48.151",
        "add s-ip 172.18.0.3",
        "create s-mask hash:ip netmask 24",
        "add s-mask 172.18.0.0",
        "add s-mask 10.244.1.0",
        "create s-ipport hash:ip,port",
        "add s-ipport 172.18.0.3,tcp:9088",
        "add s-ipport 10.96.48.151,udp:53",
        "add s-ipport 172.18.0.3,udp:80",
        "create s-ipportip hash:ip,port,ip",
        "add s-ipportip 172.18.0.3,tcp:80,172.18.0.4",
        "add s-ipportip 10.96.0.1,tcp:443,172.18.0.5",
        "create s-ipportnet hash:ip,port,net",
        "add s-ipportnet 172.18.0.3,tcp:80,172.18.0.0/24",
        "create s-net hash:net",
        "add s-net 10.244.0.0/16",
        "add s-net 10.244.1.9/32 nomatch",
        "add s-net 172.18.0.5/32",
        "create s-netport hash:net,port",
        "add s-netport 172.18.0.0/16,tcp:443",
        "add s-netport 10.96.0.0/12,udp:53",
        "create s-netiface hash:net,iface",
        "add s-netiface 172.18.0.0/16,eth0",
        "add s-netiface 172.18.0.4/31,eth1",
        "add s-netiface 172.18.0.5,eth wildcard",
        "add s-netiface 198.51.100.0/24,eth0 nomatch",
        "add s-netiface 0.0.0.0/1,eth0",
        "add s-netiface 10.244.0.0/16,physdev:veth1a",
        "add s-netiface 10.244.3.0/24,cni0",
        "add s-netiface 10.244.3.12,physdev:port2",
        "add s-netiface 10.244.3.11,port1",
        "create s-port bitmap:port range 1-32000",
        "add s-port 80",
        "add s-port 9088",
        "add s-port 30000-30100",
        "create s-bip bitmap:ip range 172.18.0.0/24",
        "add s-bip 172.18.0.5",
        "create s-list list:set",
        "add s-list s-ip",
        "create s6-ip hash:ip family inet6",
        "add s6-ip fc00:f853::4",
        "add s6-ip fc00:f853::3",
        "create s6-ipport hash:ip,port family inet6",
        "add s6-ipport fc00:f853::3,tcp:9088",
        "add s6-ipport fd00:10:96::1,udp:53",
        "create s6-net hash:net family inet6",
        "add s6-net fd00:10:244::/48",
        "add s6-net fd00:10:244:1::9/128 nomatch",
    ]));
}
