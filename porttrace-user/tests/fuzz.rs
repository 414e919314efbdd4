//! Every parser on arbitrary text and on spoiled real data, and packets through spoiled nodes: nothing panics, what is made of a
//! text is bounded by its size, what is printed reads as the same, and the branches of a walk share out the whole.
//!
//! `PROPTEST_CASES=100000 cargo test --release -p porttrace-user --test fuzz` makes a long run.

mod damage;

use damage::damage;
use porttrace_user::collect::snapshot;
use porttrace_user::core::kube::{hash, owners::Owners};
use porttrace_user::core::model::flow::{Family, Proto, Tuple};
use porttrace_user::core::model::rules::{Policy, Ruleset};
use porttrace_user::core::model::trace::{Decision, Flavour, Packet, Trace};
use porttrace_user::core::near_miss::near_misses;
use porttrace_user::core::parse::notes::Notes;
use porttrace_user::core::parse::{self, Files};
use porttrace_user::core::parse::{conntrack, iproute, ipset, iptables, listing, paste, recent, sockets, sysctl};
use porttrace_user::core::simulate::Simulator;
use porttrace_user::render::trace::json::Printer;
use proptest::prelude::*;
use std::fmt::{Debug, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::OnceLock;

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// What is printed reads as the same.
fn round<T: PartialEq + Debug>(value: &T, print: impl Fn(&T) -> String, read: impl Fn(&str) -> T) {
    let printed = print(value);
    assert_eq!(*value, read(&printed), "printed as {printed:?}");
}

fn every_parser(text: &str) {
    let lines = text.lines().count();
    for family in FAMILIES {
        let (ruleset, problems) = iptables::parse(text, "fuzz", Flavour::IptablesNft, family);
        let chains = || ruleset.tables.iter().flat_map(|table| &table.chains);
        let rules: usize = chains().map(|chain| chain.rules.len()).sum();
        assert!(rules <= lines && chains().count() <= lines && problems.len() <= 1001);
        let again = iptables::parse(&print(&ruleset), "fuzz", Flavour::IptablesNft, family).0;
        assert_eq!(meaning(&ruleset), meaning(&again));
        let routes = |text: &str| iproute::routes(text, family, &mut Notes::new("fuzz")).unwrap_or_default();
        round(&routes(text), |value| iproute::write_routes(value), routes);
        let policy = |text: &str| iproute::policy(text, family, &mut Notes::new("fuzz")).unwrap_or_default();
        round(&policy(text), |value| iproute::write_policy(value), policy);
    }
    let notes = || Notes::new("fuzz");
    round(
        &conntrack::entries(text, &mut notes()),
        |value| conntrack::write(value),
        |text| conntrack::entries(text, &mut notes()),
    );
    round(
        &sockets::sockets(text, &mut notes()),
        |value| sockets::write(value),
        |text| sockets::sockets(text, &mut notes()),
    );
    round(&sysctl::sysctls(text, &mut notes()), sysctl::write, |text| sysctl::sysctls(text, &mut notes()));
    let links = |text: &str| iproute::links(text, &mut notes()).unwrap_or_default();
    round(&links(text), |value| iproute::write_links(value), links);
    let mut known = links(text);
    iproute::apply_bridge_links(&mut known, text, &mut notes());
    let addresses = |text: &str| iproute::addresses(text, &mut notes()).unwrap_or_default();
    round(&addresses(text), |value| iproute::write_addresses(value), addresses);
    let neighbours = |text: &str| iproute::neighbours(text, &mut notes()).unwrap_or_default();
    round(&neighbours(text), |value| iproute::write_neighbours(value), neighbours);
    let clock = recent::Clock::parse(text);
    assert!(recent::entries(text, clock, &mut notes()).len() <= lines);
    assert!(ipset::sets(text, &mut notes()).len() <= lines);
    let (translated, _) = listing::translate(text, "fuzz");
    assert!(translated.len() <= 2 * lines);
    let (one, two) = (paste::read(text, "fuzz"), paste::read(text, "fuzz"));
    let mut all = paste::Paste::default();
    one.into_iter().chain(two).for_each(|paste| paste::merge(&mut all, paste));
    assert_eq!(hash::service_suffix(text, "tcp").len(), hash::endpoint_suffix(text, "tcp", text).len());
}

/// A ruleset as iptables-save prints it.
fn print(ruleset: &Ruleset) -> String {
    let mut out = String::new();
    for table in &ruleset.tables {
        let _ = writeln!(out, "*{}", table.name);
        for chain in &table.chains {
            let policy = chain.policy.map_or("-", |policy| if policy == Policy::Drop { "DROP" } else { "ACCEPT" });
            let _ = writeln!(out, ":{} {policy}", chain.name());
        }
        for rule in table.chains.iter().flat_map(|chain| &chain.rules) {
            let counters = rule.counters().map_or(String::new(), |(packets, bytes)| format!("[{packets}:{bytes}] "));
            let _ = writeln!(out, "{counters}{}", rule.text);
        }
        out.push_str("COMMIT\n");
    }
    out
}

/// A ruleset without the places of its lines, a line for each table, chain and rule.
fn meaning(ruleset: &Ruleset) -> Vec<String> {
    let mut lines = Vec::new();
    for table in &ruleset.tables {
        lines.push(table.name.to_string());
        for chain in &table.chains {
            lines.push(format!("{} {:?}", chain.name(), chain.policy));
            let rules = chain.rules.iter();
            lines.extend(
                rules.map(|rule| format!("{:?} {} {:?} {:?}", rule.counters(), rule.text, rule.matches, rule.target)),
            );
        }
    }
    lines
}

fn node() -> &'static Files {
    static ONCE: OnceLock<Files> = OnceLock::new();
    ONCE.get_or_init(|| {
        let node = "../tests/cases/recorded/iptables-nft/broken/nodes/worker3";
        let mut files = snapshot::read_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join(node)).unwrap();
        let native = "../tests/cases/recorded/nftables/broken/nodes/worker3/nft-ruleset.json";
        let native = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(native)).unwrap();
        files.insert("nft-ruleset.json".into(), native);
        files.insert("conntrack.txt".into(), CONNTRACK.into());
        files.insert("ss.txt".into(), "tcp LISTEN 0 128 0.0.0.0:22 0.0.0.0:*\nudp UNCONN 0 0 [::]:53 *:*\n".into());
        files
    })
}

const CONNTRACK: &str = "ipv4     2 tcp      6 118 TIME_WAIT src=172.18.0.4 dst=172.18.0.3 sport=35722 dport=30080 src=10.244.3.9 dst=172.18.0.3 sport=80 dport=53264 [ASSURED] mark=0 use=1\n\
    ipv4     2 udp      17 29 src=172.18.0.4 dst=172.18.0.3 sport=4000 dport=30053 [UNREPLIED] src=10.244.1.9 dst=172.18.0.4 sport=53 dport=4000 mark=0 use=2\n";

/// Real texts of every kind that is parsed, of at most some 60 lines.
fn texts() -> &'static [Vec<u8>] {
    static ONCE: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    ONCE.get_or_init(|| {
        let listings = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/listing");
        let mut paths: Vec<_> = std::fs::read_dir(listings).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        let listings = paths.into_iter().map(|path| std::fs::read(path).unwrap());
        let all = node().values().cloned().chain(listings);
        all.flat_map(|text| {
            let lines: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').collect();
            let parts = [
                lines.first_chunk::<60>().map(|part| part.concat()),
                lines.last_chunk::<60>().map(|part| part.concat()),
            ];
            if lines.len() < 60 { vec![text] } else { parts.into_iter().flatten().collect() }
        })
        .collect()
    })
}

fn packet() -> impl Strategy<Value = Packet> {
    let ends = prop::sample::select(vec![
        ("172.18.0.4:4000", "172.18.0.3:30080", Some("eth0")),
        ("172.18.0.4:35722", "172.18.0.3:30080", Some("eth0")),
        ("172.18.0.4:4000", "172.18.0.3:9088", Some("eth0")),
        ("172.18.0.4:4000", "172.18.0.3:30103", Some("eth0")),
        ("172.18.0.4:4000", "172.18.0.3:30053", Some("eth0")),
        ("172.18.0.100:4000", "203.0.113.10:80", Some("eth0")),
        ("172.18.0.3:4000", "10.96.48.151:8088", None),
        ("127.0.0.1:4000", "127.0.0.1:9088", None),
        ("10.244.1.9:80", "172.18.0.4:4000", Some("vethf8cbcc86")),
        ("[fc00:f853:ccd:e793::4]:4000", "[fc00:f853:ccd:e793::3]:9088", Some("eth0")),
    ]);
    let proto = prop::sample::select(vec![Proto::Tcp, Proto::Udp, Proto::Sctp]);
    (ends, proto, prop_oneof![Just(0u32), any::<u32>()], prop_oneof![4 => Just(2u8), 1 => any::<u8>()]).prop_map(
        |((src, dst, input), proto, mark, flags)| {
            let end = |text: &str| text.parse::<SocketAddr>().unwrap();
            let mut packet = Packet::first_of(Tuple::new(proto, end(src), end(dst)), input.map(Into::into));
            packet.mark = mark;
            packet.tcp_flags = if proto == Proto::Tcp { flags } else { 0 };
            packet
        },
    )
}

/// Nothing is lost and nothing is told twice: random choices share out the whole; what is assumed may come on top.
fn shares(trace: &Trace) -> Result<(), TestCaseError> {
    prop_assert!(!trace.branches.is_empty());
    if trace.assumptions.iter().any(|text| text.starts_with("stopped at ")) {
        return Ok(());
    }
    let sum: f64 = trace.branches.iter().map(|branch| branch.probability.as_f64()).sum();
    let random = |decision: &Decision| matches!(decision, Decision::Random { .. } | Decision::Drawn { .. });
    let sure = trace.branches.iter().all(|branch| branch.decisions.iter().all(random));
    prop_assert!(sum > 1.0 - 1e-6 && (!sure || sum < 1.0 + 1e-6), "the sum is {sum}");
    Ok(())
}

/// Found by a long run: a repeated piece tore a comment's quotes, and the rest of the line was taken for a chain's name.
#[test]
fn a_rule_that_begins_within_a_comment_is_parsed() {
    let line = "-A KUBE-SEP-URYEGYBIBEJNO322 -p tcp -m comment --comment \"default/dual:http\" -j KUBE-MARK-MASQ\n";
    let torn =
        format!("*nat\n:KUBE-SERVICES - [0:0]\n-A dual:http\" -j KUBE-MARK-MASQ\n:KUBE-SVC-A - [0:0]\n{line}COMMIT\n");
    every_parser(&torn);
}

proptest! {
    #[test]
    fn any_text_is_parsed(text in "(?s).{0,300}", bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        every_parser(&text);
        every_parser(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn spoiled_texts_are_parsed(which in any::<prop::sample::Index>(), damage in damage()) {
        let mut text = texts()[which.index(texts().len())].clone();
        damage.iter().for_each(|one| one.apply(&mut text));
        every_parser(&String::from_utf8_lossy(&text));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.div_ceil(4), ..ProptestConfig::default() })]

    /// With the index over long chains and without it.
    #[test]
    fn packets_walk_through_spoiled_nodes(
        spoils in prop::collection::vec((any::<prop::sample::Index>(), damage()), 0..4),
        packets in prop::collection::vec(packet(), 1..4),
    ) {
        let mut files = node().clone();
        for (which, damage) in spoils {
            let name = files.keys().nth(which.index(files.len())).unwrap().clone();
            damage.iter().for_each(|one| one.apply(files.get_mut(&name).unwrap()));
        }
        let state = parse::state(&files);
        let simulator = Simulator::new(&state);
        Owners::of(&state);
        for packet in packets {
            let trace = simulator.trace(&packet);
            shares(&trace)?;
            prop_assert_eq!(&trace, &simulator.trace_linear(&packet));
            trace.branches.iter().take(2).for_each(|branch| drop(near_misses(branch)));
            let mut json = Vec::new();
            Printer::new(false).answer(&trace, None, &mut json).unwrap();
            let answer: serde_json::Value = serde_json::from_slice(&json).unwrap();
            prop_assert_eq!(answer["branches"].as_array().unwrap().len(), trace.branches.len());
        }
    }
}
