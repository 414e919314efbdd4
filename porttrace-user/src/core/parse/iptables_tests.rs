use super::*;
use crate::core::model::rules::{MarkOp, Match, MatchKind, Net, RecentOp, conditions};
use crate::core::model::trace::Fraction;
use crate::core::parse::iptables_blocks::unquantised;

fn read(text: &str) -> (Ruleset, Vec<String>) {
    let (ruleset, problems) = parse(text, "test", Flavour::IptablesNft, Family::V4);
    (ruleset, problems.into_iter().map(|problem| format!("{}: {}", problem.line, problem.message)).collect())
}

/// The only rule of a dump of the nat table with chains PREROUTING and X.
fn rule(line: &str) -> Rule {
    let (ruleset, problems) = read(&format!("*nat\n:PREROUTING ACCEPT [0:0]\n:X - [0:0]\n{line}\nCOMMIT\n"));
    assert_eq!(problems, [""; 0], "{line}");
    ruleset.tables[0].chains.iter().flat_map(|chain| &chain.rules).next().expect("a rule").clone()
}

fn kinds(rule: &Rule) -> Vec<(&MatchKind, bool)> {
    rule.matches.iter().map(|Match { kind, negated, .. }| (kind, *negated)).collect()
}

const ANY: u32 = u32::MAX;

#[test]
fn a_service_rule_reads_as_it_says() {
    let line = r#"[7:420] -A X ! -s 10.244.0.0/16 -d 10.96.0.1/32 -p tcp -m comment --comment "default/kubernetes:https cluster IP" -m tcp --dport 443 -j X"#;
    let rule = rule(line);
    assert_eq!(rule.counters(), Some((7, 420)));
    assert_eq!((rule.line, rule.text.read().as_str()), (4, &line[8..]));
    assert_eq!(rule.target, Target::Jump(1));
    assert_eq!(rule.comment().as_deref(), Some("default/kubernetes:https cluster IP"));
    assert_eq!(conditions(&rule.text.read()), "! -s 10.244.0.0/16 -d 10.96.0.1/32 -p tcp -m tcp --dport 443");
    let net = |addr: u32, mask| Net::V4 { addr, mask };
    assert_eq!(
        kinds(&rule),
        [
            (&MatchKind::Source(net(0x0af4_0000, 0xffff_0000)), true),
            (&MatchKind::Destination(net(0x0a60_0001, ANY)), false),
            (&MatchKind::Protocol(6), false),
            (&MatchKind::DestinationPort(443, 443), false),
        ]
    );
    let (start, len) = rule.matches[0].at;
    assert_eq!(&rule.text.read()[usize::from(start)..usize::from(start + len)], "! -s 10.244.0.0/16");
}

#[test]
fn recent_statistic_and_nfacct_read_whole() {
    let affinity =
        rule("-A X -m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-A --mask 255.255.255.255 --rsource -j X");
    let MatchKind::Recent(recent) = &affinity.matches[0].kind else { panic!("{affinity:?}") };
    assert_eq!((recent.op, &*recent.name, recent.seconds), (RecentOp::Check, "KUBE-SEP-A", Some(10800)));
    let random = rule("-A X -m statistic --mode random --probability 0.33333333349 -j X");
    assert_eq!(random.matches[0].kind, MatchKind::Random { num: 1, den: 3 });
    let counted = rule("-A X -m nfacct --nfacct-name  localhost_nps_accepted_pkts -j X");
    assert_eq!(counted.matches[0].kind, MatchKind::Always);
}

#[test]
fn probabilities_are_the_fractions_that_kube_proxy_meant() {
    for n in (1..=5_000u64).chain([9_999, 20_000]) {
        let written = format!("{:.10}", 1.0 / n as f64).parse::<f64>().expect("a number");
        let k = (written * f64::from(1u32 << 31)).round() as u32;
        // Beyond five digits the ten digits that kube-proxy writes no longer tell neighbours apart.
        let Fraction { num, den } = unquantised(k);
        assert_eq!((num, den), (1, n), "1/{n} became {num}/{den}");
    }
    assert_eq!(unquantised(1_717_986_918), Fraction { num: 858_993_459, den: 1 << 30 });
    assert_eq!(unquantised(0).as_f64(), 0.0);
}

#[test]
fn marks_of_every_spelling_become_one_operation() {
    for (text, value, mask) in [
        ("--set-xmark 0x4000/0x4000", 0x4000, 0x4000),
        ("--set-mark 0x1/0x2", 1, 3),
        ("--or-mark 0x8", 8, 8),
        ("--and-mark 0xff", 0, !0xff),
        ("--xor-mark 0x4000", 0x4000, 0),
    ] {
        assert_eq!(rule(&format!("-A X -j MARK {text}")).target, Target::Mark(MarkOp { value, mask }), "{text}");
    }
}

#[test]
fn nat_targets_read_their_ranges() {
    let range = |line: &str| match rule(line).target {
        Target::Dnat(range) | Target::Masquerade(range) | Target::Redirect(range) | Target::Snat(range) => *range,
        other => panic!("{other:?}"),
    };
    let dnat = range("-A X -p tcp -j DNAT --to-destination 10.0.0.1-10.0.0.3:80-90/85 --random --persistent");
    let net = |addr| Net::V4 { addr, mask: ANY };
    assert_eq!(dnat.addresses, Some((net(0x0a00_0001), net(0x0a00_0003))));
    assert_eq!((dnat.ports, dnat.base_port, dnat.random, dnat.persistent), (Some((80, 90)), Some(85), true, true));
    assert_eq!(range("-A X -j DNAT --to-destination :8080").addresses, None);
    assert!(range("-A X -j MASQUERADE --random-fully").random);
    assert_eq!(range("-A X -p tcp -j REDIRECT --to-ports 8080").ports, Some((8080, 8080)));
    for to in ["10.0.0.1", "10.0.0.1-10.0.0.3:80-90/85", ":8080", "fd00::1", "[fd00::1]:80", "[fd00::1-fd00::9]:80-81"]
    {
        assert_eq!(range(&format!("-A X -p tcp -j SNAT --to-source {to}")).to_string(), to);
    }
    assert_eq!(range("-A X -p tcp -j REDIRECT --to-ports 80-81").to_string(), "80-81");
}

#[test]
fn what_is_not_understood_is_kept_and_reported() {
    let text = "*nat\r\n:PREROUTING ACCEPT [0:0]\r\n-A PREROUTING -m u32 --u32 \"0x0=0\" -p tcp -j GONE\r\n\
                -A PREROUTING -d fd00::1/128 -j ACCEPT\r\nwhat is this\r\n:LATE - [0:0]\r\n";
    let (ruleset, problems) = read(text);
    let rules = &ruleset.tables[0].chains[0].rules;
    assert!(matches!(&rules[0].matches[0].kind, MatchKind::Unknown(text) if text.contains("--u32")));
    assert_eq!(rules[0].target, Target::Missing("GONE".into()));
    assert!(matches!(&rules[1].matches[0].kind, MatchKind::Unknown(_)));
    let lines: Vec<&str> = problems.iter().map(|text| text.split(':').next().unwrap_or("")).collect();
    assert_eq!(lines, ["3", "4", "5", "0", "3"], "{problems:?}");
}

#[test]
fn a_torn_quote_makes_no_chain() {
    let (ruleset, problems) =
        read("*nat\n:X - [0:0]\n-A dual:http\" -j X\n-N a\"b c\n-P a\"b DROP\n-A X -j X\nCOMMIT\n");
    let names: Vec<&str> = ruleset.tables[0].chains.iter().map(|chain| chain.name()).collect();
    assert_eq!(names, ["X"]);
    assert_eq!(ruleset.tables[0].chains[0].rules.len(), 1);
    let expected = [
        r#"3: not a rule: "-A dual:http\" -j X""#,
        r#"4: not a rule: "-N a\"b c""#,
        r#"5: not a rule: "-P a\"b DROP""#,
    ];
    assert_eq!(problems, expected);
}

#[test]
fn no_chain_takes_the_name_of_a_target() {
    let text = "*filter\n:INPUT ACCEPT [0:0]\n:LOG - [0:0]\n-A INPUT -j ACCEPT\n-A ACCEPT -j DROP\n-A INPUT -j ACCEPT\nCOMMIT\n";
    let (ruleset, problems) = read(text);
    let targets: Vec<_> =
        ruleset.tables[0].chains.iter().flat_map(|chain| &chain.rules).map(|rule| &rule.target).collect();
    assert_eq!(targets, [&Target::Accept, &Target::Accept]);
    let expected = [r#"3: "LOG" is a target and cannot be a chain: left out"#, r#"5: not a rule: "-A ACCEPT -j DROP""#];
    assert_eq!(problems, expected);
}

#[test]
fn a_jump_may_come_before_its_chain() {
    let (ruleset, problems) = read("*nat\n:A - [0:0]\n-A A -g LATE\n-A A -j LATE\n:LATE - [0:0]\nCOMMIT\n");
    assert_eq!(problems, [""; 0]);
    let targets: Vec<_> = ruleset.tables[0].chains[0].rules.iter().map(|rule| &rule.target).collect();
    assert_eq!(targets, [&Target::Goto(1), &Target::Jump(1)]);
}

#[test]
fn many_bad_lines_are_counted_not_listed() {
    let (_, problems) = read(&"?\n".repeat(3000));
    assert_eq!(problems.len(), MAX_DIAGNOSTICS + 1);
    assert_eq!(problems.last().map(String::as_str), Some("0: 2000 more lines were not understood"));
}
