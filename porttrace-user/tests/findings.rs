//! Every finding fires in its case and nowhere else; what recorded nodes get was read by eye.

use porttrace_user::collect::snapshot;
use porttrace_user::core::diagnose::{self, Report};
use porttrace_user::core::model::facts::Facts;
use porttrace_user::core::parse;
use porttrace_user::core::world::World;
use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Cases of findings that have one of their own already.
const OTHERS: [&str; 2] = ["stale-hostport-crio", "kube-proxy-replaced-calico"];

fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/findings")
}

/// The base node with a case's files on top.
fn case(name: &str) -> (Facts, Option<IpAddr>) {
    let mut files = snapshot::read_files(&cases().join("base")).expect("the base node");
    if name != "base" {
        files.extend(snapshot::read_files(&cases().join(name)).expect("a case"));
    }
    let client = fs::read_to_string(cases().join(name).join("client.txt")).ok();
    (parse::facts(&files), client.map(|text| text.trim().parse().expect("an address")))
}

fn diagnosed(facts: &Facts, client: Option<IpAddr>) -> Report {
    diagnose::diagnose(&World::new(facts), client)
}

fn shown(report: &Report) -> String {
    let findings = report.findings.iter().map(|finding| {
        let evidence: String =
            finding.evidence.iter().map(|one| format!("    {} {}: {}\n", one.kind, one.place, one.text)).collect();
        format!("{:?} {}: {}\n{evidence}  → {}\n", finding.severity, finding.id, finding.sentence, finding.change)
    });
    let unchecked = report.unchecked.iter().map(|one| format!("unchecked {}: {}\n", one.id, one.why));
    findings.chain(unchecked).collect()
}

#[test]
fn the_healthy_node_has_no_finding_and_nearly_everything_is_checked() {
    let (facts, client) = case("base");
    let report = diagnosed(&facts, client);
    assert_eq!(shown(&report), "");
    let complaints: Vec<_> =
        facts.state.diagnostics.iter().filter(|note| !note.message.starts_with("not there")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[test]
fn every_finding_fires_in_its_case_and_no_other_does() {
    let mut wrong = Vec::new();
    for id in diagnose::ids().chain(OTHERS) {
        let expected = fs::read_to_string(cases().join(id).join("expect.txt")).unwrap_or_default();
        let expected: BTreeSet<&str> = expected.lines().collect();
        let (facts, client) = case(id);
        let report = diagnosed(&facts, client);
        let found: BTreeSet<&str> = report.findings.iter().map(|finding| finding.id).collect();
        let of = id.trim_end_matches("-crio").trim_end_matches("-calico");
        if found != expected || !expected.contains(of) {
            wrong.push(format!("{id}: expected {expected:?}, but found\n{}", shown(&report)));
        }
        let bare: Vec<&str> = report
            .findings
            .iter()
            .filter(|finding| finding.evidence.is_empty() || finding.change.is_empty())
            .map(|finding| finding.id)
            .collect();
        assert!(bare.is_empty(), "findings without evidence or change: {bare:?}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_findings_of_each_case_read_well() {
    let all: String = diagnose::ids()
        .chain(OTHERS)
        .map(|id| {
            let (facts, client) = case(id);
            format!("# {id}\n{}\n", shown(&diagnosed(&facts, client)))
        })
        .collect();
    insta::assert_snapshot!("cases", all);
}

#[test]
fn recorded_nodes_get_what_is_wrong_with_them_and_no_more() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/recorded");
    for (name, node) in [
        ("iptables_nft_broken", "iptables-nft/broken/nodes/worker3"),
        ("iptables_legacy_broken", "iptables-legacy/broken/nodes/worker3"),
        ("iptables_nft_fixed_worker3", "iptables-nft/fixed/nodes/worker3"),
        ("iptables_nft_fixed_worker2", "iptables-nft/fixed/nodes/worker2"),
        ("iptables_nft_fixed_worker", "iptables-nft/fixed/nodes/worker"),
        ("nftables_broken", "nftables/broken/nodes/worker3"),
        ("nftables_fixed", "nftables/fixed/nodes/worker3"),
    ] {
        let files = snapshot::read_files(&folder.join(node)).expect("a recorded node");
        let report = diagnosed(&parse::facts(&files), None);
        insta::assert_snapshot!(name, shown(&report));
    }
}

/// Facts that are not there are said, and nothing is guessed: rules alone, sockets alone, nothing at all.
#[test]
fn without_facts_checks_say_what_they_lack() {
    let report = diagnosed(&Facts::default(), None);
    assert!(report.findings.is_empty(), "{}", shown(&report));
    let unchecked: BTreeSet<&str> = report.unchecked.iter().map(|one| one.id).collect();
    for id in [
        "no-listener",
        "stale-hostport",
        "selector-matches-nothing",
        "ip-forward-off",
        "stale-udp-entry",
        "mtu-too-big",
    ] {
        assert!(unchecked.contains(id), "{id} was not said to be unchecked: {unchecked:?}");
    }
    for id in diagnose::ids() {
        let (mut facts, client) = case(id);
        facts.cluster = Default::default();
        facts.sandboxes = Default::default();
        facts.listeners = Default::default();
        let expected = fs::read_to_string(cases().join(id).join("expect.txt")).unwrap_or_default();
        let report = diagnosed(&facts, client);
        let found: Vec<&str> = report.findings.iter().map(|finding| finding.id).collect();
        // Without the API, kube-proxy's REJECT rules are all that tells of Services without endpoints.
        let by_rules = |found: &&&str| **found != "service-without-endpoints";
        let more: Vec<_> =
            found.iter().filter(by_rules).filter(|id| !expected.lines().any(|line| line == **id)).collect();
        assert!(more.is_empty(), "{id}: {more:?} without the API, but not with it");
    }
}

/// k3s's load balancer has rules in its pod instead of a listener.
#[test]
fn a_pod_of_k3s_s_load_balancer_needs_no_listener() {
    let mut files = snapshot::read_files(&cases().join("base")).expect("the base node");
    files.extend(snapshot::read_files(&cases().join("no-listener")).expect("a case"));
    for text in files.values_mut() {
        *text = String::from_utf8_lossy(text).replace("\"web-1\"", "\"svclb-web-1\"").into_bytes();
    }
    let facts = parse::facts(&files);
    assert_eq!(facts.balancer_at("10.244.1.2".parse().expect("an address")).as_deref(), Some("default/svclb-web-1"));
    let report = diagnosed(&facts, None);
    assert!(report.findings.iter().all(|finding| finding.id != "no-listener"), "{}", shown(&report));
}

#[test]
fn every_finding_is_documented() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/findings.md"))
        .expect("docs/findings.md");
    let documented: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    assert_eq!(documented, diagnose::ids().collect::<Vec<_>>());
}
