//! Random scenarios, each a pure function of its seed.

pub mod chains;
pub mod kube;
pub mod matches;
pub mod native;
pub mod node;
pub mod packets;
pub mod targets;

use super::rng::Rng;
use super::scenario::{Chain, Rule, Scenario, Table, Tables};
use node::World;
use porttrace_user::core::model::flow::{Family, Proto, Tuple};
use porttrace_user::core::model::trace::Packet;

/// The scenario of a seed, with about `packets` packets in it.
pub fn scenario(seed: u64, packets: usize) -> Scenario {
    let mut rng = Rng::new(seed);
    let world = World::random(&mut rng.fork());
    let mut draw = rng.fork();
    let kube = draw.percent(25);
    let flavours = flavours(&mut draw);
    let rules = |rng: &mut Rng| -> Vec<Tables> {
        let both = flavours.iter().flat_map(|legacy| [(Family::V4, *legacy), (Family::V6, *legacy)]);
        both.map(|(family, legacy)| {
            let tables = if kube { kube::tables(rng, &world, family) } else { chains::tables(rng, &world, family) };
            Tables { legacy, ..tables }
        })
        .collect()
    };
    let first = rules(&mut rng.fork());
    // An entry made while no nat chain existed stays open to the rules of a later nat table, which then match without any
    // effect (`nf_nat_setup_info` leaves confirmed entries alone). conntrack -L does not show which entries those are.
    let translated = first.iter().all(|tables| tables.tables.iter().any(|table| table.name == "nat"));
    let later = (draw.percent(30) && translated).then(|| rules(&mut rng.fork()));
    let mut wild = rng.fork();
    let native = if wild.percent(40) { native::tables(&mut wild, &world, flavours.len() == 1) } else { Vec::new() };
    let beside = if native.is_empty() { "" } else { " (native rules beside)" };
    Scenario {
        name: format!("seed {seed}{}{beside}", if kube { " (kube-proxy and portmap)" } else { "" }),
        native,
        listing: String::new(),
        probes: packets::probes(&mut rng.fork(), &world, packets),
        node: world.node,
        rules: first,
        later,
    }
}

/// Which flavours of iptables have rules (`true`: legacy), in the order in which they are loaded.
fn flavours(rng: &mut Rng) -> &'static [bool] {
    match rng.below(20) {
        0..=11 => &[false],
        12..=15 => &[true],
        16..=17 => &[false, true],
        _ => &[true, false],
    }
}

/// A scenario that is sure to hit the matches and targets that chance seldom does.
pub fn seldom(seed: u64, packets: usize) -> Scenario {
    let mut rng = Rng::new(seed);
    let world = std::iter::repeat_with(|| World::random(&mut rng)).find(|world| !world.bridge_ports.is_empty());
    let Some(world) = world else { return Scenario::default() };
    let mut probes = packets::probes(&mut rng, &world, packets);
    for probe in probes.iter_mut().take(10) {
        let from = ([172, 18, 0, 4], 20_000 + probe.id).into();
        let to = ([172, 18, 0, 3], [9088, 31234, 443][usize::from(probe.id % 3)]).into();
        probe.packet = Packet::first_of(Tuple::new(Proto::Udp, from, to), Some("eth0".into()));
        probe.packet.length = 80;
    }
    let rule = |matches: &[&str], target: &str| Rule::new(matches, target);
    let chain = |name: &str, rules| Chain { name: name.into(), policy: Some("ACCEPT".into()), rules };
    let arrival = vec![
        rule(&["-m socket"], ""),
        rule(&["-m mac --mac-source 02:00:00:00:01:01"], ""),
        rule(&["-m physdev --physdev-is-in"], "-j MARK --or-mark 0x10"),
        rule(&["-m rpfilter"], "-j MARK --or-mark 0x20"),
        rule(&["-m string --algo bm --string kube"], ""),
        rule(&["-p udp", "-m udp --dport 443"], "-j TPROXY --on-port 15001 --tproxy-mark 0x1/0x1"),
        rule(&["-p tcp"], "-j ECN --ecn-tcp-remove"),
        rule(&[], "-j CHECKSUM --checksum-fill"),
    ];
    let tables = |family| Tables {
        family,
        legacy: false,
        tables: vec![
            Table {
                name: "mangle".into(),
                chains: vec![
                    chain("PREROUTING", arrival.clone()),
                    chain("POSTROUTING", vec![rule(&[], "-j CLASSIFY --set-class 1:1")]),
                    chain("OUTPUT", vec![rule(&["-m owner --uid-owner 1000"], "-j MARK --or-mark 0x40")]),
                ],
            },
            Table {
                name: "raw".into(),
                chains: vec![chain("PREROUTING", vec![rule(&[], "-j TRACE"), rule(&[], "-j AUDIT --type accept")])],
            },
            Table {
                name: "filter".into(),
                chains: vec![chain(
                    "INPUT",
                    vec![rule(&["-p udp", "-m udp --dport 31234"], "-j NFQUEUE --queue-num 101")],
                )],
            },
        ],
    };
    let rules = vec![tables(Family::V4), tables(Family::V6)];
    Scenario { name: format!("seldom, seed {seed}"), node: world.node, rules, probes, ..Scenario::default() }
}
