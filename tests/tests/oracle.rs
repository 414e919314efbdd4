//! The simulator against the kernel, on random and on recorded states. `ORACLE_PACKETS` and `ORACLE_SEED` make longer or other
//! runs; the same seed gives the same scenarios.

use porttrace_tests::fuzz::facts;
use porttrace_tests::fuzz::generate::{scenario, seldom};
use porttrace_tests::fuzz::odds;
use porttrace_tests::fuzz::oracle::{Report, campaign, minimal};
use porttrace_tests::fuzz::recorded;
use porttrace_tests::privilege::may_run;
use std::env;
use std::path::Path;

/// Packets of one scenario's first round.
const BATCH: usize = 100;

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value:?} is not a number")))
}

fn show(report: &Report) {
    for broken in &report.broken {
        println!("not run: {broken}");
    }
    for refused in &report.refused {
        println!("refused by iptables: {refused}");
    }
    for one in report.disagreements.iter().take(number("ORACLE_SHOW", 5) as usize) {
        println!("\n=== {} packet {}\n{}", one.scenario, one.probe, one.text);
    }
}

#[test]
fn random_rules_and_packets() {
    if !may_run("the oracle") {
        return;
    }
    let packets = number("ORACLE_PACKETS", 8000) as usize;
    let seed = number("ORACLE_SEED", 1);
    let scenarios = packets.div_ceil(BATCH);
    let report = campaign(|index| match index {
        _ if index < scenarios => Some(scenario(seed + index as u64, BATCH)),
        _ if index == scenarios => Some(seldom(seed, BATCH)),
        _ => None,
    });
    println!("{report}");
    show(&report);
    if let Some(first) = report.disagreements.first().filter(|_| number("ORACLE_SHRINK", 1) == 1) {
        let of = |index: &usize| scenario(seed + *index as u64, BATCH).name == first.scenario;
        let found = (0..scenarios).find(of).map(|index| scenario(seed + index as u64, BATCH));
        if let Some((small, text)) = found.and_then(|whole| minimal(&whole, first.probe)) {
            println!("\n=== smallest of {}:\nip: {:#?}\nsysctls: {:?}", small.name, small.node.ip, small.node.sysctls);
            for table in &small.native {
                println!("{}", table.text());
            }
            for tables in small.rules.iter().chain(small.later.iter().flatten()) {
                println!("{:?}\n{}", tables.family, tables.text());
            }
            println!("{text}");
        }
    }
    assert!(report.broken.is_empty(), "{} scenarios could not be run", report.broken.len());
    assert!(report.refused.len() * 50 <= report.packets, "iptables refuses too many generated rules");
    assert!(report.disagreements.is_empty(), "{} of {} packets differ", report.disagreements.len(), report.packets);
    assert_eq!(report.coverage.missing(), Vec::<String>::new(), "never hit in the whole run");
}

#[test]
fn recorded_nodes() {
    if !may_run("the oracle") {
        return;
    }
    let seed = number("ORACLE_SEED", 1);
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases/recorded");
    let cases_of =
        ["iptables-nft/broken", "iptables-nft/fixed", "iptables-legacy/broken", "nftables/broken", "nftables/fixed"];
    let scenarios: Vec<_> = cases_of
        .iter()
        .flat_map(|case| {
            let node = cases.join(case).join("nodes/worker3");
            (0..4).map(move |round| (node.clone(), seed + round))
        })
        .map(|(case, seed)| recorded::scenario(&case, seed, 200).expect("the recorded case is there"))
        .collect();
    let report = campaign(|index| scenarios.get(index).cloned());
    println!("{report}");
    show(&report);
    assert!(report.broken.is_empty(), "{} scenarios could not be run", report.broken.len());
    assert!(report.disagreements.is_empty(), "{} of {} packets differ", report.disagreements.len(), report.packets);
}

#[test]
fn random_choices_come_as_often_as_the_branches_say() {
    if !may_run("the oracle") {
        return;
    }
    let odds = odds::balance(4, 800).expect("the kernel balances 800 connections");
    let chi = odds.chi_square();
    println!("{odds:?}, chi-square {chi:.2}");
    assert_eq!((odds.connections, odds.outcomes.len()), (800, 4));
    // Three degrees of freedom: more than 30.66 comes once in a million runs by chance.
    assert!(chi < 30.66, "chi-square {chi:.2}: {odds:?}");
}

#[test]
fn route_localnet_counts_on_the_interface_or_on_all() {
    if !may_run("the oracle") {
        return;
    }
    for (all, own) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let facts = facts::localnet(all, own).expect("a router");
        assert_eq!(
            facts,
            facts::Localnet { kernel: all | own == 1, simulator: all | own == 1 },
            "all {all}, eth0 {own}"
        );
    }
}

#[test]
fn a_mark_does_not_cross_network_namespaces() {
    if !may_run("the oracle") {
        return;
    }
    let seen = facts::mark_across().expect("two namespaces");
    assert_eq!(seen, facts::Marks { left_with: 1, arrived_with: 0, arrived_without: 1 });
}

#[test]
fn of_two_tables_at_one_priority_the_later_loaded_is_asked_first() {
    if !may_run("the oracle") {
        return;
    }
    for legacy_first in [false, true] {
        let order = facts::flavours(legacy_first).expect("a router");
        // Rules of both flavours accept NAT for the same packet: who is asked first decides.
        assert_eq!(order.kernel.port(), if legacy_first { 1001 } else { 1002 }, "legacy loaded first: {legacy_first}");
        assert_eq!(order.simulator, [1001, 1002], "both orders are among the branches");
    }
}

#[test]
fn a_node_port_of_a_real_kube_proxy_is_balanced_as_the_branches_say() {
    if !may_run("the lab") {
        return;
    }
    let odds = odds::node_port(450).expect("450 connections to the lab's NodePort");
    let chi = odds.chi_square();
    println!("{odds:?}, chi-square {chi:.2}");
    assert_eq!((odds.connections, odds.outcomes.len()), (450, 3));
    let equal = odds.outcomes.values().all(|(share, _)| (share - 1.0 / 3.0).abs() < 1e-9);
    assert!(equal, "{odds:?}");
    // Two degrees of freedom: P(χ² > x) = e^(-x/2), so that more than 41.4 comes once in 10⁹ runs by chance.
    assert!(chi < 41.4, "chi-square {chi:.2}: {odds:?}");
}
