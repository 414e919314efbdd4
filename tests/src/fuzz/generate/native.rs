//! Random native nftables rules, in one table or two beside those of iptables.

use super::node::{PORTS, Pool, World};
use crate::fuzz::rng::Rng;
use crate::fuzz::scenario::{NativeChain, NativeTable};
use porttrace_user::core::model::flow::Family;
use std::fmt::Write;

/// What rules hold when they are hit: each must be hit by some packet of a long run.
pub const NAMES: [&str; 44] = [
    "ip saddr",
    "ip daddr",
    "ip6 daddr",
    "daddr !=",
    "daddr {",
    "@addresses",
    "@services",
    "meta l4proto",
    "tcp dport",
    "udp sport",
    "th dport",
    "dport {",
    "tcp flags",
    "iifname",
    "oifname",
    "fib daddr type",
    "fib saddr type",
    "fib saddr . iif oif",
    "ct state",
    "ct status",
    "ct direction",
    "ct original",
    "ct mark",
    "meta mark &",
    "meta mark !=",
    "ip ttl",
    "ip dscp",
    "meta length",
    "meta pkttype",
    "skuid",
    "numgen random",
    "vmap {",
    "vmap @",
    "jump",
    "goto",
    "return",
    "meta mark set",
    "ct mark set",
    "notrack",
    "reject",
    "dnat to",
    "snat to",
    "masquerade",
    "redirect to",
];

/// Hooks, and priorities at which no chain of iptables stands.
const HOOKS: [(&str, &[i32]); 5] = [
    ("prerouting", &[-310, -310, -160, -110, -90, 10]),
    ("input", &[-160, -10, 10, 90, 160]),
    ("forward", &[-160, -10, 10, 160]),
    ("output", &[-310, -310, -160, -110, -90, 10, 160]),
    ("postrouting", &[-160, -10, 90, 110]),
];

/// What a chain's rules may do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Before conntrack.
    Raw,
    Filter,
    Route,
    Dnat,
    Snat,
}

struct Place<'w> {
    world: &'w World,
    /// `ip`, `ip6`, `inet`.
    family: &'static str,
    kind: Kind,
    hook: &'static str,
}

/// Tables of a scenario. `ties`: nat chains may have the priority of those of iptables.
pub fn tables(rng: &mut Rng, world: &World, ties: bool) -> Vec<NativeTable> {
    let families: &[&'static str] = match rng.below(4) {
        0 => &["ip", "ip6"],
        1 => &["ip"],
        _ => &["inet"],
    };
    families.iter().map(|family| table(rng, world, family, ties)).collect()
}

fn table(rng: &mut Rng, world: &World, family: &'static str, ties: bool) -> NativeTable {
    let mut chains = Vec::new();
    for (hook, priorities) in HOOKS {
        let priority = *rng.choose(priorities);
        let raw = priority < -200;
        let place = Place { world, family, kind: if raw { Kind::Raw } else { Kind::Filter }, hook };
        if rng.percent(70) {
            let policy = if rng.percent(5) { "drop" } else { "accept" };
            let base = format!("type filter hook {hook} priority {priority}; policy {policy};");
            chains.push(chain(rng, &place, &format!("{hook}-filter"), Some(base), 5));
        }
    }
    if rng.percent(30) {
        let place = Place { world, family, kind: Kind::Route, hook: "output" };
        let base = "type route hook output priority -155; policy accept;".to_owned();
        chains.push(chain(rng, &place, "output-route", Some(base), 3));
    }
    for (hook, kind, middle) in [
        ("prerouting", Kind::Dnat, -100),
        ("output", Kind::Dnat, -100),
        ("input", Kind::Snat, 100),
        ("postrouting", Kind::Snat, 100),
    ] {
        if rng.percent(75) {
            let away = *rng.choose(&[-1, 1]);
            let priority = if ties && rng.percent(40) { middle } else { middle + away };
            let place = Place { world, family, kind, hook };
            let base = format!("type nat hook {hook} priority {priority}; policy accept;");
            chains.push(chain(rng, &place, &format!("{hook}-nat"), Some(base), 5));
        }
    }
    let users: Vec<NativeChain> = (0..3)
        .map(|number| {
            let place = Place { world, family, kind: Kind::Filter, hook: "any" };
            let mut chain = chain(rng, &place, &format!("user-{number}"), None, 4);
            // They call only later ones.
            chain.rules.retain(|rule| (0..=number).all(|other| !rule.contains(&format!("user-{other}"))));
            chain
        })
        .collect();
    chains.extend(users);
    NativeTable { family: family.into(), name: format!("wild{family}"), sets: sets(rng, world, family), chains }
}

fn chain(rng: &mut Rng, place: &Place<'_>, name: &str, base: Option<String>, most: u32) -> NativeChain {
    let count = rng.range(1, most);
    let rules = (0..count).map(|_| rule(rng, place)).collect();
    NativeChain { name: name.into(), base, rules }
}

/// Families that packets of such a table may have.
fn own(rng: &mut Rng, family: &str) -> Family {
    match family {
        "ip" => Family::V4,
        "ip6" => Family::V6,
        _ if rng.percent(60) => Family::V4,
        _ => Family::V6,
    }
}

const fn word(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn sets(rng: &mut Rng, world: &World, family: &str) -> Vec<String> {
    let mut sets = Vec::new();
    for (of, name) in [(Family::V4, "4"), (Family::V6, "6")] {
        if family == "ip" && of == Family::V6 || family == "ip6" && of == Family::V4 {
            continue;
        }
        let pool = world.pool(of);
        let kind = if of == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
        let nets: Vec<String> = pool.nets.iter().take(2).cloned().collect();
        let all = [nets, vec![pool.destination(rng)]].concat().join(", ");
        sets.push(format!(
            "set addresses{name} {{ type {kind}; flags interval; auto-merge; elements = {{ {all} }}; }}"
        ));
        let mut elements = Vec::new();
        for (at, port) in PORTS.iter().enumerate() {
            let verdict = rng.pick(&["goto user-1", "jump user-2", "accept", "continue", "return"]);
            let address = pool.destination(rng);
            let element = format!("{address} . {} . {port}", ["tcp", "udp"][at % 2]);
            elements.push((element, verdict.to_owned()));
        }
        let keys: Vec<&str> = elements.iter().map(|(key, _)| key.as_str()).collect();
        let pairs: Vec<String> = elements.iter().map(|(key, verdict)| format!("{key} : {verdict}")).collect();
        let of = format!("type {kind} . inet_proto . inet_service");
        sets.push(format!("set services{name} {{ {of}; elements = {{ {} }}; }}", keys.join(", ")));
        sets.push(format!("map services-map{name} {{ {of} : verdict; elements = {{ {} }}; }}", pairs.join(", ")));
    }
    sets
}

fn rule(rng: &mut Rng, place: &Place<'_>) -> String {
    let mut rule = String::new();
    let mut proto = None;
    for _ in 0..rng.below(3) {
        let _ = write!(rule, "{} ", condition(rng, place, &mut proto));
    }
    if rng.percent(10) {
        rule.push_str("counter ");
    }
    rule + &effect(rng, place, proto)
}

/// A condition; `proto`: what the rule asks of the protocol, which it asks once.
fn condition(rng: &mut Rng, place: &Place<'_>, proto: &mut Option<&'static str>) -> String {
    let family = own(rng, place.family);
    let (pool, word) = (place.world.pool(family), word(family));
    let port = *rng.choose(&PORTS);
    let not = rng.pick(&["", "", "!= "]);
    match rng.below(24) {
        0 => format!("{word} saddr {not}{}", pool.host(rng)),
        1 => format!("{word} daddr {not}{}", pool.destination(rng)),
        2 => format!("{word} daddr {not}{}", rng.choose(&pool.nets)),
        3 => {
            let mut all = vec![pool.destination(rng), pool.destination(rng)];
            all.sort();
            all.dedup();
            format!("{word} daddr {not}{{ {} }}", all.join(", "))
        }
        4 => format!("{word} {} {not}@addresses{}", rng.pick(&["saddr", "daddr"]), number(family)),
        5 => format!("{word} daddr . meta l4proto . th dport @services{}", number(family)),
        6..=8 => ports(rng, proto, port),
        9 => format!("iifname {not}{}", interface(rng, place.world)),
        10 if matches!(place.hook, "forward" | "output" | "postrouting") => {
            format!("oifname {not}{}", interface(rng, place.world))
        }
        11 => {
            format!("fib {} type {not}{}", rng.pick(&["daddr", "saddr"]), rng.pick(&["local", "unicast", "broadcast"]))
        }
        10 | 12 if matches!(place.hook, "prerouting" | "input") => rng
            .pick(&["fib daddr . iif type local", "fib saddr . iif oif missing", "fib saddr . mark . iif oif exists"])
            .into(),
        13 => rng
            .pick(&[
                "ct state new",
                "ct state established,related",
                "ct state invalid",
                "ct state != new",
                "ct state { new, established }",
            ])
            .into(),
        14 => rng.pick(&["ct status dnat", "ct status snat", "ct status assured", "ct status dnat,snat"]).into(),
        15 => rng.pick(&["ct direction original", "ct direction reply", "ct mark 0x1", "ct mark 0x0"]).into(),
        16 => match rng.below(2) {
            0 => format!("ct original {word} daddr {}", pool.destination(rng)),
            _ => format!("meta l4proto {{ tcp, udp }} ct original proto-dst {port}"),
        },
        17 => rng
            .pick(&["meta mark & 0x4000 == 0x4000", "meta mark & 0x4000 != 0", "meta mark != 0x0", "meta mark 0x1"])
            .into(),
        18 if proto.is_none() => {
            *proto = Some("tcp");
            rng.pick(&["tcp flags & (syn | ack) == syn", "tcp flags syn", "tcp flags & rst == rst"]).into()
        }
        19 if family == Family::V4 => rng.pick(&["ip ttl > 1", "ip ttl 64", "ip dscp cs1", "ip dscp != cs0"]).into(),
        20 => rng
            .pick(&["meta length > 100", "meta length 40-90", "meta pkttype host", "meta pkttype { host, broadcast }"])
            .into(),
        21 if place.hook == "output" => rng.pick(&["meta skuid 1000", "meta skuid != 1000", "meta skuid 0-999"]).into(),
        22 => rng.pick(&["numgen random mod 3 < 2", "numgen random mod 2 0", "numgen inc mod 2 0"]).into(),
        _ => format!("meta l4proto {not}{}", rng.pick(&["tcp", "udp", "sctp", "icmp", "{ tcp, udp }"])),
    }
}

fn number(family: Family) -> &'static str {
    match family {
        Family::V4 => "4",
        Family::V6 => "6",
    }
}

fn interface(rng: &mut Rng, world: &World) -> String {
    if rng.percent(25) { "\"veth*\"".into() } else { format!("\"{}\"", rng.choose(&world.interfaces())) }
}

fn ports(rng: &mut Rng, proto: &mut Option<&'static str>, port: u16) -> String {
    let of = match *proto {
        Some(of) => of,
        None => rng.pick(&["tcp", "udp"]),
    };
    *proto = Some(if of == "tcp" { "tcp" } else { "udp" });
    let other = PORTS[(usize::from(port) + 3) % PORTS.len()];
    match rng.below(6) {
        0 => format!("{of} dport {{ {}, {} }}", port.min(other), port.max(other).max(port.min(other) + 1)),
        1 => format!("{of} dport {}-{}", port.min(9000), port.max(9000)),
        2 => format!("{of} sport 20000-20050"),
        3 => format!("{of} dport != {port}"),
        4 => format!("meta l4proto {of} th dport {port}"),
        _ => format!("{of} dport {port}"),
    }
}

fn effect(rng: &mut Rng, place: &Place<'_>, proto: Option<&'static str>) -> String {
    let user = rng.range(0, 2);
    match rng.below(16) {
        0..=1 => format!("jump user-{user}"),
        2 => format!("goto user-{user}"),
        3 => rng
            .pick(&["meta mark set 0x1", "meta mark set meta mark | 0x4000", "meta mark set meta mark & 0xff ^ 0x10"])
            .into(),
        4 => rng.pick(&["meta mark set meta mark | 0x2000 jump user-0", "meta mark set 0x2", "counter"]).into(),
        5 if place.kind == Kind::Raw => "notrack".into(),
        5 => rng.pick(&["ct mark set 0x1", "ct mark set meta mark", "meta mark set ct mark"]).into(),
        6 => rng.pick(&["return", "accept", "limit rate 100000/second accept"]).into(),
        7 => "tcp dport vmap { 80 : jump user-0, 443 : accept, 9088 : goto user-1, 30080-30090 : return }".into(),
        8 => {
            let family = own(rng, place.family);
            format!("{} daddr . meta l4proto . th dport vmap @services-map{}", word(family), number(family))
        }
        9 => "numgen random mod 3 vmap { 0 : jump user-0, 1 : jump user-1, 2 : return }".into(),
        _ => match place.kind {
            Kind::Raw => rng.pick(&["notrack", "drop", "accept", "counter", "meta mark set 0x8"]).into(),
            Kind::Filter if place.hook == "any" => rng.pick(&["accept", "drop", "return", "meta mark set 0x20"]).into(),
            Kind::Filter | Kind::Route => filter(rng, place, proto),
            Kind::Dnat => dnat(rng, place, proto),
            Kind::Snat => snat(rng, place),
        },
    }
}

fn filter(rng: &mut Rng, place: &Place<'_>, proto: Option<&str>) -> String {
    let may_reject = matches!(place.hook, "input" | "forward" | "output");
    match rng.below(6) {
        0 => "drop".into(),
        1..=2 if may_reject && proto == Some("tcp") && rng.percent(50) => "reject with tcp reset".into(),
        1..=2 if may_reject => "reject".into(),
        _ => rng.pick(&["accept", "counter", "meta mark set 0x40"]).into(),
    }
}

fn target(rng: &mut Rng, pool: &Pool, family: Family) -> (String, String) {
    let address = pool.host(rng);
    let port = *rng.choose(&PORTS);
    let with_port = if family == Family::V4 { format!("{address}:{port}") } else { format!("[{address}]:{port}") };
    (address, with_port)
}

fn dnat(rng: &mut Rng, place: &Place<'_>, proto: Option<&str>) -> String {
    let family = own(rng, place.family);
    let pool = place.world.pool(family);
    let word = if place.family == "inet" { format!("{} ", word(family)) } else { String::new() };
    let (address, with_port) = target(rng, pool, family);
    let asks = if proto.is_some() { String::new() } else { format!("meta l4proto {} ", rng.pick(&["tcp", "udp"])) };
    match rng.below(5) {
        0 => format!("dnat {word}to {address}"),
        1 => format!("{asks}redirect to :{}", rng.choose(&PORTS)),
        2 => {
            let (other, _) = target(rng, pool, family);
            let ports = [*rng.choose(&PORTS), *rng.choose(&PORTS)];
            let map = format!("0 : {address} . {}, 1 : {other} . {}", ports[0], ports[1]);
            let word = self::word(family);
            format!("{asks}dnat {word} to numgen random mod 2 map {{ {map} }}")
        }
        _ => format!("{asks}dnat {word}to {with_port}"),
    }
}

fn snat(rng: &mut Rng, place: &Place<'_>) -> String {
    let family = own(rng, place.family);
    let word = if place.family == "inet" { format!("{} ", word(family)) } else { String::new() };
    let own: Vec<&String> =
        place.world.pool(family).own.iter().filter(|one| !one.starts_with("127.") && *one != "::1").collect();
    if place.hook == "input" {
        return format!("snat {word}to {}", rng.choose(&own));
    }
    match rng.below(4) {
        0 => format!("snat {word}to {}", rng.choose(&own)),
        1 => "masquerade fully-random".into(),
        2 => "masquerade random".into(),
        _ => "masquerade".into(),
    }
}
