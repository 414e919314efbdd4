//! Random targets, each only where iptables allows it.

use super::chains::Place;
use super::node::PORTS;
use crate::fuzz::rng::Rng;
use porttrace_user::core::model::flow::Family;

/// Every target of the list, by the name it has in the coverage report.
pub const NAMES: &[&str] = &[
    "ACCEPT",
    "DROP",
    "REJECT",
    "RETURN",
    "jump",
    "goto",
    "DNAT",
    "SNAT",
    "MASQUERADE",
    "REDIRECT",
    "NETMAP",
    "MARK",
    "CONNMARK",
    "CT",
    "LOG",
    "NFLOG",
    "TOS",
    "DSCP",
    "TTL",
    "HL",
    "TCPMSS",
    "AUDIT",
    "CLASSIFY",
    "CHECKSUM",
    "ECN",
    "TRACE",
    "TPROXY",
    "NFQUEUE",
    "none",
];

/// A target for a rule with these matches (which may need a protocol). `guarded`: the rule has some condition, so that a final
/// verdict does not stop everything.
pub fn target(
    rng: &mut Rng,
    place: &Place,
    proto: &mut Option<String>,
    matches: &mut Vec<String>,
    guarded: bool,
) -> String {
    let final_verdict = rng.percent(if guarded { 18 } else { 4 });
    if final_verdict && place.table != "nat" {
        return verdict(rng, place, proto);
    }
    match place.table {
        "nat" => nat(rng, place, proto),
        "raw" if rng.percent(25) && guarded => "-j CT --notrack".into(),
        "raw" if rng.percent(20) => "-j TRACE".into(),
        // Another protocol stands there for a match that needs it.
        "mangle" if place.only(&["PREROUTING"]) && rng.percent(6) && is_tcp_or_udp(proto) => {
            proto.get_or_insert_with(|| "-p udp".into());
            format!("-j TPROXY --on-port 15001 --tproxy-mark 0x1/0x1{}", rng.pick(&["", &on_ip(place.family)]))
        }
        "mangle" if rng.percent(75) => mangle(rng, place, proto, matches),
        _ => plain(rng, guarded),
    }
}

/// Whether a rule is, or may be made, about TCP or UDP.
fn is_tcp_or_udp(proto: &Option<String>) -> bool {
    proto.as_deref().is_none_or(|proto| ["-p tcp", "-p udp"].contains(&proto))
}

fn on_ip(family: Family) -> String {
    format!(" --on-ip {}", if family == Family::V4 { "127.0.0.1" } else { "::1" })
}

fn verdict(rng: &mut Rng, place: &Place, proto: &mut Option<String>) -> String {
    if place.only(&["INPUT", "FORWARD", "OUTPUT"]) && place.table == "filter" && rng.percent(50) {
        return reject(rng, place, proto);
    }
    if rng.percent(3) { "-j NFQUEUE --queue-num 101".into() } else { "-j DROP".into() }
}

fn reject(rng: &mut Rng, place: &Place, proto: &mut Option<String>) -> String {
    if proto.as_deref() == Some("-p tcp") && rng.percent(60) {
        return "-j REJECT --reject-with tcp-reset".into();
    }
    let with = match place.family {
        Family::V4 => rng.pick(&[
            "icmp-port-unreachable",
            "icmp-host-unreachable",
            "icmp-net-prohibited",
            "icmp-admin-prohibited",
        ]),
        Family::V6 => {
            rng.pick(&["icmp6-port-unreachable", "icmp6-adm-prohibited", "icmp6-addr-unreachable", "icmp6-no-route"])
        }
    };
    format!("-j REJECT --reject-with {with}")
}

fn plain(rng: &mut Rng, guarded: bool) -> String {
    match rng.below(10) {
        0..=1 if guarded => "-j ACCEPT".into(),
        2..=3 if guarded => "-j RETURN".into(),
        4 => "-j LOG --log-prefix \"seen \"".into(),
        5 => rng.pick(&["-j NFLOG --nflog-group 5", "-j AUDIT --type accept"]).into(),
        6..=7 => mark(rng),
        _ => String::new(),
    }
}

fn mark(rng: &mut Rng) -> String {
    match rng.below(8) {
        0..=1 => "-j MARK --or-mark 0x4000".into(),
        2 => "-j MARK --set-xmark 0x2000/0x2000".into(),
        3 => "-j MARK --set-mark 0x1".into(),
        4 => format!("-j MARK {}", rng.pick(&["--xor-mark 0x4001", "--and-mark 0xffffbfff", "--set-xmark 0x3/0xff"])),
        5 => format!("-j CONNMARK --set-xmark {}", rng.pick(&["0x1/0xffffffff", "0x4000/0x4000", "0x3/0xff"])),
        6 => format!("-j CONNMARK --save-mark{}", rng.pick(&["", " --nfmask 0xf000 --ctmask 0xf000"])),
        _ => format!("-j CONNMARK --restore-mark{}", rng.pick(&["", " --nfmask 0xff --ctmask 0xff"])),
    }
}

fn mangle(rng: &mut Rng, place: &Place, proto: &mut Option<String>, matches: &mut Vec<String>) -> String {
    let v4 = place.family == Family::V4;
    match rng.below(10) {
        0..=4 => mark(rng),
        5 => format!("-j TOS --set-tos {}", rng.pick(&["0x10/0xff", "0x08/0x3f"])),
        6 => format!("-j DSCP --set-dscp {}", rng.pick(&["0x0a", "0x2e"])),
        7 => format!(
            "-j {}",
            if v4 {
                rng.pick(&["TTL --ttl-set 33", "TTL --ttl-dec 1"])
            } else {
                rng.pick(&["HL --hl-set 33", "HL --hl-dec 1"])
            }
        ),
        8 if place.only(&["FORWARD", "OUTPUT", "POSTROUTING"]) && proto.is_none() => {
            *proto = Some("-p tcp".into());
            matches.push("-m tcp --tcp-flags SYN,RST SYN".into());
            "-j TCPMSS --clamp-mss-to-pmtu".into()
        }
        9 if v4 && proto.as_deref() == Some("-p tcp") => "-j ECN --ecn-tcp-remove".into(),
        9 if place.only(&["FORWARD", "OUTPUT", "POSTROUTING"]) => "-j CLASSIFY --set-class 1:1".into(),
        9 => "-j CHECKSUM --checksum-fill".into(),
        _ => plain(rng, !matches.is_empty()),
    }
}

fn nat(rng: &mut Rng, place: &Place, proto: &mut Option<String>) -> String {
    if rng.percent(25) {
        return match rng.below(5) {
            0 => "-j ACCEPT".into(),
            1 => "-j RETURN".into(),
            2..=3 => mark(rng),
            _ => String::new(),
        };
    }
    let ports = proto.as_deref().is_some_and(|proto| ["-p tcp", "-p udp", "-p sctp"].contains(&proto));
    if place.only(&["PREROUTING", "OUTPUT"]) {
        return destination(rng, place, ports);
    }
    source(rng, place, ports)
}

fn bracketed(place: &Place, address: &str, port: &str) -> String {
    if place.family == Family::V6 { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

fn destination(rng: &mut Rng, place: &Place, ports: bool) -> String {
    let pool = place.world.pool(place.family);
    let host = if rng.percent(80) { pool.host(rng) } else { pool.destination(rng) };
    let v4 = place.family == Family::V4;
    match rng.below(10) {
        0..=4 if ports => {
            let port = match rng.below(4) {
                0 => "8000-8003".to_string(),
                _ => rng.choose(&PORTS).to_string(),
            };
            format!("-j DNAT --to-destination {}", bracketed(place, &host, &port))
        }
        0..=5 => format!("-j DNAT --to-destination {host}"),
        6 => format!(
            "-j DNAT --to-destination {}{}",
            if v4 { "10.244.1.9-10.244.1.10" } else { "fd00:10:244:1::9-fd00:10:244:1::a" },
            rng.pick(&["", " --persistent"])
        ),
        7..=8 if ports => format!("-j REDIRECT --to-ports {}", rng.pick(&["8080", "9088", "7000-7003"])),
        7..=8 => "-j REDIRECT".into(),
        _ => format!("-j NETMAP --to {}", if v4 { "10.1.0.0/24" } else { "fd01::/64" }),
    }
}

fn source(rng: &mut Rng, place: &Place, ports: bool) -> String {
    let v4 = place.family == Family::V4;
    let own = if v4 {
        rng.pick(&["172.18.0.3", "172.18.0.33", "10.1.0.1", "192.0.2.200"])
    } else {
        rng.pick(&["fc00:f853::3", "fd01::1", "2001:db8:5::5"])
    };
    let postrouting = place.only(&["POSTROUTING"]);
    match rng.below(10) {
        0..=1 if ports => {
            format!("-j SNAT --to-source {}", bracketed(place, own, rng.pick(&["40000-50000", "41000-41999"])))
        }
        0..=3 => format!("-j SNAT --to-source {own}"),
        4 if postrouting && ports => "-j MASQUERADE --to-ports 50000-60000".into(),
        4..=5 if postrouting => "-j MASQUERADE --random-fully".into(),
        6..=7 if postrouting => "-j MASQUERADE".into(),
        8 if postrouting => format!("-j NETMAP --to {}", if v4 { "192.0.2.0/24" } else { "2001:db8:5::/64" }),
        _ => format!("-j SNAT --to-source {}", if v4 { "172.18.0.3-172.18.0.6" } else { "fc00:f853::3-fc00:f853::6" }),
    }
}
