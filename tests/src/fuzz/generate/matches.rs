//! Random matches, with values from the pools that packets come from.

use super::chains::Place;
use super::node::PORTS;
use crate::fuzz::rng::Rng;
use porttrace_user::core::model::flow::Family;

/// Every match of the list, by the name it has in the coverage report. One that never matched in a whole run is a failure.
pub const NAMES: &[&str] = &[
    "-s",
    "-d",
    "-i",
    "-o",
    "-p",
    "tcp",
    "udp",
    "sctp",
    "icmp",
    "icmp6",
    "multiport",
    "addrtype",
    "conntrack",
    "state",
    "mark",
    "connmark",
    "comment",
    "statistic",
    "recent",
    "set",
    "iprange",
    "limit",
    "physdev",
    "mac",
    "owner",
    "socket",
    "rpfilter",
    "length",
    "tos",
    "dscp",
    "pkttype",
    "ttl",
    "hl",
    "nfacct",
    "string",
];

/// Adds one match. A match that needs a protocol sets `proto` (`-p tcp`), unless the rule has another one already.
pub fn add(rng: &mut Rng, place: &Place, proto: &mut Option<String>, matches: &mut Vec<String>) {
    // Some draws do not fit the place; a few tries find one that does.
    for _ in 0..20 {
        let Some((needs, text)) = draw(rng, place) else { continue };
        let name = text.split_whitespace().find(|word| *word != "!" && *word != "-m").unwrap_or_default().to_string();
        let same = |other: &String| other.split_whitespace().any(|word| word == name);
        if matches.iter().any(same) || needs.as_ref().is_some_and(|needs| proto.as_ref().is_some_and(|p| p != needs)) {
            continue;
        }
        if let Some(needs) = needs {
            *proto = Some(needs);
        }
        if !text.is_empty() {
            matches.push(text);
        }
        return;
    }
}

fn not(rng: &mut Rng) -> &'static str {
    if rng.percent(25) { "! " } else { "" }
}

fn draw(rng: &mut Rng, place: &Place) -> Option<(Option<String>, String)> {
    let (text, needs) = match rng.below(20) {
        0..=3 => (address(rng, place), None),
        4 => (interface(rng, place)?, None),
        5..=8 => {
            let (needs, text) = transport(rng, place)?;
            (text, Some(needs))
        }
        9 => (addrtype(rng, place), None),
        10..=11 => (conntrack(rng, place), None),
        12..=13 => (marks(rng), None),
        14 => (statistic(rng), None),
        15 => (set(rng, place)?, None),
        16 => (recent(rng), None),
        17 => (sender(rng, place)?, None),
        _ => (packet(rng, place), None),
    };
    Some((needs, text))
}

fn address(rng: &mut Rng, place: &Place) -> String {
    let pool = place.world.pool(place.family);
    let one = |rng: &mut Rng| if rng.percent(60) { pool.destination(rng) } else { rng.choose(&pool.nets).clone() };
    match rng.below(7) {
        0..=2 => format!("{}-d {}", not(rng), one(rng)),
        3..=5 => {
            format!("{}-s {}", not(rng), if rng.percent(60) { pool.host(rng) } else { rng.choose(&pool.nets).clone() })
        }
        _ => iprange(rng, place),
    }
}

fn iprange(rng: &mut Rng, place: &Place) -> String {
    let side = rng.pick(&["--src-range", "--dst-range"]);
    let range = if place.family == Family::V4 {
        rng.pick(&["172.18.0.1-172.18.0.4", "10.244.1.0-10.244.1.9", "10.96.0.0-10.96.255.255"])
    } else {
        rng.pick(&["fc00:f853::1-fc00:f853::4", "fd00:10:96::-fd00:10:96::ff"])
    };
    format!("-m iprange {}{side} {range}", not(rng))
}

fn interface(rng: &mut Rng, place: &Place) -> Option<String> {
    let mut names = place.world.interfaces();
    names.extend(["veth+".into(), "eth+".into()]);
    let name = rng.choose(&names).clone();
    let negation = not(rng);
    if place.only(&["PREROUTING", "INPUT", "FORWARD"]) && rng.percent(60) {
        return Some(format!("{negation}-i {name}"));
    }
    place.only(&["FORWARD", "OUTPUT", "POSTROUTING"]).then(|| format!("{negation}-o {name}"))
}

fn transport(rng: &mut Rng, place: &Place) -> Option<(String, String)> {
    let proto = rng.pick(&["tcp", "tcp", "udp", "udp", "sctp", "icmp"]);
    if proto == "icmp" {
        let kind = rng.pick(&["echo-request", "echo-request", "destination-unreachable"]);
        return Some(match place.family {
            Family::V4 => ("-p icmp".into(), format!("-m icmp {}--icmp-type {kind}", not(rng))),
            Family::V6 => ("-p ipv6-icmp".into(), format!("-m icmp6 {}--icmpv6-type {kind}", not(rng))),
        });
    }
    let needs = format!("-p {proto}");
    let port = *rng.choose(&PORTS);
    let negation = not(rng);
    let text = match rng.below(10) {
        0..=3 => format!("-m {proto} {negation}--dport {port}"),
        4 => format!("-m {proto} {negation}--dport {}:{}", port / 2, port),
        5 => format!("-m {proto} {negation}--sport 20000:{}", 20_000 + rng.range(1, 120)),
        6 if proto == "tcp" => format!(
            "-m tcp {}",
            match rng.below(3) {
                0 => format!("{negation}--syn"),
                1 => format!("{negation}--tcp-flags SYN,RST,ACK,FIN SYN"),
                _ => format!(
                    "{negation}--tcp-flags {} {}",
                    rng.pick(&["ALL", "ACK,FIN"]),
                    rng.pick(&["ACK", "FIN", "ACK,FIN"])
                ),
            }
        ),
        6 if proto == "sctp" => "-m sctp --chunk-types any INIT".into(),
        7..=8 => multiport(rng, negation),
        _ => String::new(),
    };
    Some((needs, text))
}

fn multiport(rng: &mut Rng, negation: &str) -> String {
    match rng.below(4) {
        0 => format!("-m multiport {negation}--sports 20001:20030,20050,20060:20090"),
        1 => format!("-m multiport {negation}--ports 80,9088,20010:20020"),
        2 => format!("-m multiport {negation}--dports 8000:9100"),
        _ => {
            let (a, b) = (rng.choose(&PORTS), rng.choose(&PORTS));
            format!("-m multiport {negation}--dports {a},{b},30000:30099")
        }
    }
}

fn addrtype(rng: &mut Rng, place: &Place) -> String {
    let kind =
        rng.pick(&["LOCAL", "LOCAL", "UNICAST", "BROADCAST", "UNICAST,LOCAL", "BLACKHOLE", "UNREACHABLE", "PROHIBIT"]);
    // xt_addrtype.c, addrtype_mt_checkentry_v1: IPv6 knows no BROADCAST, BLACKHOLE, UNREACHABLE or PROHIBIT.
    let kind = if place.family == Family::V6 && ["BROADCAST", "PROHIBIT", "BLACKHOLE", "UNREACHABLE"].contains(&kind) {
        "MULTICAST"
    } else {
        kind
    };
    let side = rng.pick(&["--dst-type", "--dst-type", "--src-type"]);
    let limit = match rng.below(12) {
        0 if place.only(&["PREROUTING", "INPUT", "FORWARD"]) => " --limit-iface-in",
        1 if place.only(&["FORWARD", "OUTPUT", "POSTROUTING"]) => " --limit-iface-out",
        _ => "",
    };
    format!("-m addrtype {}{side} {kind}{limit}", not(rng))
}

fn conntrack(rng: &mut Rng, place: &Place) -> String {
    let pool = place.world.pool(place.family);
    let states =
        rng.pick(&["NEW", "ESTABLISHED,RELATED", "INVALID", "NEW,UNTRACKED", "UNTRACKED", "RELATED", "ESTABLISHED"]);
    let negation = not(rng);
    match rng.below(12) {
        0..=3 => format!("-m conntrack {negation}--ctstate {states}"),
        4..=5 => format!("-m state {negation}--state {states}"),
        6 => format!("-m conntrack {negation}--ctstate {}", rng.pick(&["DNAT", "SNAT"])),
        7 => format!("-m conntrack {negation}--ctorigdst {}", pool.destination(rng)),
        8 => format!("-m conntrack {negation}--ctorigdstport {}", rng.choose(&PORTS)),
        9 => format!("-m conntrack --ctdir {}", rng.pick(&["ORIGINAL", "REPLY"])),
        10 => format!("-m conntrack {negation}--ctreplsrc {}", pool.destination(rng)),
        _ => format!("-m conntrack {negation}--ctstatus {}", rng.pick(&["NONE", "SEEN_REPLY", "CONFIRMED"])),
    }
}

fn marks(rng: &mut Rng) -> String {
    let value = rng.pick(&["0x4000/0x4000", "0x2000/0x2000", "0x1", "0x0/0x4000", "0x3/0xff"]);
    match rng.below(5) {
        0..=2 => format!("-m mark {}--mark {value}", not(rng)),
        3 => format!("-m connmark {}--mark {value}", not(rng)),
        _ => format!("-m comment --comment \"default/web:http -> {value}\""),
    }
}

fn statistic(rng: &mut Rng) -> String {
    if rng.percent(70) {
        format!("-m statistic --mode random {}--probability {}", not(rng), rng.pick(&["0.5", "0.33333333349", "0.25"]))
    } else {
        let every = rng.range(2, 4);
        format!("-m statistic --mode nth {}--every {every} --packet {}", not(rng), rng.range(0, every - 1))
    }
}

fn set(rng: &mut Rng, place: &Place) -> Option<String> {
    let sets = [
        ("s-ip", 1),
        ("s-ipport", 2),
        ("s-ipportip", 3),
        ("s-ipportnet", 3),
        ("s-net", 1),
        ("s-netport", 2),
        ("s-netiface", 2),
        ("s-port", 1),
        ("s-bip", 1),
        ("s-list", 1),
        ("s-mask", 1),
    ];
    let six = [("s6-ip", 1), ("s6-ipport", 2), ("s6-net", 1), ("s-port", 1)];
    let (name, dimensions) = if place.family == Family::V4 { *rng.choose(&sets) } else { *rng.choose(&six) };
    let flags = match name {
        "s-netiface" if place.only(&["PREROUTING", "INPUT", "FORWARD"]) => "src,src",
        "s-netiface" => return None,
        "s-ipportip" | "s-ipportnet" => "dst,dst,src",
        _ if dimensions == 2 => rng.pick(&["dst,dst", "src,dst"]),
        "s-port" => "dst",
        _ => rng.pick(&["src", "dst"]),
    };
    Some(format!("-m set {}--match-set {name} {flags}", not(rng)))
}

fn recent(rng: &mut Rng) -> String {
    let list = rng.pick(&["KUBE-SEP-A", "KUBE-SEP-B"]);
    match rng.below(5) {
        0..=1 => format!("-m recent --name {list} --set"),
        2 => format!("-m recent --name {list} {}--rcheck --seconds 10800 --reap", not(rng)),
        3 => format!("-m recent --name {list} {}--update --seconds 60", not(rng)),
        _ => format!("-m recent --name {list} --rdest {}--rcheck", not(rng)),
    }
}

/// Matches that look at who sent the packet, or for whom it is.
fn sender(rng: &mut Rng, place: &Place) -> Option<String> {
    let negation = not(rng);
    match rng.below(6) {
        0 if place.only(&["OUTPUT", "POSTROUTING"]) => {
            Some(format!("-m owner {negation}--uid-owner {}", rng.pick(&["0", "1000", "60000-65535"])))
        }
        1 if place.only(&["PREROUTING", "INPUT", "FORWARD"]) => {
            Some(format!("-m mac {negation}--mac-source 02:00:00:00:01:0{}", rng.range(1, 4)))
        }
        2 | 5 if place.only(&["PREROUTING", "INPUT"]) && place.table == "mangle" => {
            Some(rng.pick(&["-m socket", "-m socket", "-m socket --transparent", "-m socket --nowildcard"]).into())
        }
        3 if place.only(&["PREROUTING"]) && ["raw", "mangle"].contains(&place.table) => {
            Some(format!("-m rpfilter {}", rng.pick(&["", "--loose", "--validmark", "--invert", "--loose --invert"])))
        }
        4 if place.only(&["PREROUTING", "INPUT", "FORWARD"]) && !place.world.bridge_ports.is_empty() => Some(format!(
            "-m physdev {negation}{}",
            rng.pick(&["--physdev-in port1", "--physdev-in port+", "--physdev-is-in", "--physdev-is-bridged"])
        )),
        _ => None,
    }
}

/// Matches on the packet's own bytes, and those that always hold or depend on time.
fn packet(rng: &mut Rng, place: &Place) -> String {
    let negation = not(rng);
    match rng.below(9) {
        0 => format!("-m length {negation}--length {}", rng.pick(&["0:100", "48", "60", "100:300"])),
        1 => format!("-m tos {negation}--tos {}", rng.pick(&["0x10/0xff", "0x08/0x3f", "0x00/0xff"])),
        2 => format!("-m dscp {negation}--dscp {}", rng.pick(&["0x0a", "0x2e", "0x00", "0x04"])),
        3 => format!("-m pkttype {negation}--pkt-type {}", rng.pick(&["unicast", "broadcast", "multicast"])),
        4 => match place.family {
            Family::V4 => {
                format!("-m ttl {}", rng.pick(&["--ttl-eq 64", "--ttl-gt 10", "--ttl-lt 64", "! --ttl-eq 63"]))
            }
            Family::V6 => format!("-m hl {}", rng.pick(&["--hl-eq 64", "--hl-gt 10", "--hl-lt 64", "! --hl-eq 63"])),
        },
        5 => "-m nfacct --nfacct-name seen".into(),
        6 => format!("-m limit --limit {}", rng.pick(&["10/sec --limit-burst 5000", "1000/sec --limit-burst 8000"])),
        7 => "-m string --algo bm --string kube".into(),
        _ => "-m comment --comment \"kubernetes service portals\"".into(),
    }
}
