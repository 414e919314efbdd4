//! Held against what nft itself printed of the same rules, and against what it may print otherwise.

use super::*;
use crate::core::model::native::{Expr, Field, Op, Operand, Part, Source, Value as Is, Verdict};
use crate::core::model::trace::Hook;
use std::fs;
use std::path::Path;

fn read(text: &str) -> (Vec<Ruleset>, Vec<String>) {
    let mut notes = Notes::new("test");
    let found = rulesets(text, &mut notes).expect("JSON of nft");
    (found, notes.finish().into_iter().map(|note| note.message).collect())
}

/// A ruleset of one table and one chain `c`, with these rules' expressions.
fn one(family: &str, rules: &[&str]) -> (Vec<Ruleset>, Vec<String>) {
    let rule = |(handle, expr): (usize, &&str)| {
        format!(r#"{{"rule":{{"family":"{family}","table":"t","chain":"c","handle":{handle},"expr":{expr}}}}}"#)
    };
    let rules: Vec<String> = rules.iter().enumerate().map(rule).collect();
    read(&format!(
        r#"{{"nftables":[{{"metainfo":{{}}}},{{"table":{{"family":"{family}","name":"t","handle":1}}}},
            {{"chain":{{"family":"{family}","table":"t","name":"c","handle":1,"type":"filter","hook":"input","prio":-5,"policy":"drop"}}}},
            {{"chain":{{"family":"{family}","table":"t","name":"d","handle":2}}}},{}]}}"#,
        rules.join(",")
    ))
}

fn statements(rulesets: &[Ruleset]) -> Vec<&[Statement]> {
    let rules = rulesets[0].tables[0].chains[0].rules.iter();
    rules
        .map(|rule| match &rule.target {
            Target::Native(all) => &*all.0,
            other => panic!("{other:?}"),
        })
        .collect()
}

/// Rules of a recorded node, as porttrace writes them and as nft did: the same, but for counters.
#[test]
fn rules_read_as_nft_writes_them() {
    let node = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/recorded/nftables/broken/nodes/worker3");
    let file = |name: &str| fs::read_to_string(node.join(name)).expect("a recorded file");
    let (found, problems) = read(&file("nft-ruleset.json"));
    assert_eq!(problems, [""; 0]);
    let ours = found.iter().flat_map(|set| &set.tables).flat_map(|table| {
        table.chains.iter().flat_map(|chain| chain.rules.iter().map(|rule| rule.text.read().to_string()))
    });
    let mut ours: Vec<String> = ours.collect();
    let listing = file("nft-ruleset.txt");
    let native = |table: &&str| !(table.starts_with("ip nat {") || table.starts_with("ip6 nat {"));
    let mut theirs: Vec<String> = Vec::new();
    for table in listing.split("table ").filter(native) {
        let mut chain = false;
        for line in table.lines() {
            chain = (chain || line.starts_with("\tchain ")) && line != "\t}";
            // A base chain's own line, and comments of chains.
            let is_rule = chain
                && line.starts_with("\t\t")
                && !line.trim().starts_with("type ")
                && !line.trim().starts_with("comment ");
            if is_rule {
                theirs.push(line.split(" # handle").next().unwrap_or(line).trim().to_owned());
            } else if let (Some(last), true) = (theirs.last_mut(), chain && line.starts_with("\t\t\t")) {
                last.push_str(line.trim());
            }
        }
    }
    ours.sort();
    theirs.sort();
    let missing: Vec<_> = ours.iter().filter(|line| !theirs.contains(line)).take(5).collect();
    let more: Vec<_> = theirs.iter().filter(|line| !ours.contains(line)).take(5).collect();
    assert!(missing.is_empty() && more.is_empty(), "ours {missing:#?}\ntheirs {more:#?}");
    assert!(ours.len() > 200, "{} rules", ours.len());
}

#[test]
fn a_base_chain_stands_where_it_says_and_inet_is_of_both_families() {
    let (found, problems) = one("inet", &[r#"[{"drop":null}]"#]);
    assert_eq!(problems, [""; 0]);
    let shown: Vec<_> = found.iter().map(|set| (set.family, set.tables[0].name.to_string())).collect();
    assert_eq!(shown, [(Family::V4, "inet t".to_owned()), (Family::V6, "inet t".to_owned())]);
    let chain = &found[0].tables[0].chains[0];
    let base = chain.base.expect("a base chain");
    assert_eq!((base.kind, base.hook, base.priority), (BaseKind::Filter, Hook::Input, -5));
    assert_eq!((chain.policy, found[0].tables[0].chains[1].base), (Some(Policy::Drop), None));
    assert_eq!(statements(&found), [&[Statement::Verdict(Verdict::Drop)]]);
}

#[test]
fn words_mean_what_their_place_says() {
    let (found, problems) = one(
        "ip",
        &[
            r#"[{"match":{"op":"in","left":{"ct":{"key":"state"}},"right":["established","related"]}},{"accept":null}]"#,
            r#"[{"match":{"op":"==","left":{"&":[{"payload":{"protocol":"tcp","field":"flags"}},["fin","syn"]]},"right":"syn"}}]"#,
            r#"[{"match":{"op":"==","left":{"fib":{"result":"type","flags":["daddr"]}},"right":"local"}},{"jump":{"target":"d"}}]"#,
            r#"[{"match":{"op":"!=","left":{"payload":{"protocol":"ip","field":"saddr"}},"right":{"prefix":{"addr":"10.0.0.0","len":8}}}}]"#,
            r#"[{"match":{"op":"==","left":{"meta":{"key":"iifname"}},"right":{"set":["eth0","veth*"]}}}]"#,
            r#"[{"match":{"op":"==","left":{"fib":{"result":"oif","flags":["saddr","iif"]}},"right":false}},{"drop":null}]"#,
        ],
    );
    assert_eq!(problems, [""; 0]);
    let all = statements(&found);
    let number = |number| Operand::Parts([Part::One(Is::Number(number))].into());
    assert_eq!(all[0][0], Statement::Match { left: Expr::Field(Field::CtState), op: Op::Any, right: number(2 | 4) });
    let Statement::Match { left: Expr::Bits { right, .. }, op: Op::Is, right: syn } = &all[1][0] else {
        panic!("{:?}", all[1]);
    };
    assert_eq!((&**right, syn), (&Expr::Constant([Part::One(Is::Number(3))].into()), &number(2)));
    assert!(matches!(&all[2][0], Statement::Match { right, .. } if *right == number(2)), "{:?}", all[2]);
    assert_eq!(all[2][1], Statement::Verdict(Verdict::Jump(1)));
    let address = |text: &str| Is::Address(text.parse().expect("an address"));
    let Statement::Match { op: Op::IsNot, right: Operand::Parts(parts), .. } = &all[3][0] else {
        panic!("{:?}", all[3]);
    };
    assert_eq!(**parts, [Part::Span(address("10.0.0.0"), address("10.255.255.255"))]);
    let Statement::Match { right: Operand::Set(Source::Inline(set)), .. } = &all[4][0] else { panic!("{:?}", all[4]) };
    let holds = |name: &str| set.find(&[Is::Name(name.into())]).is_some();
    assert!(holds("eth0") && holds("veth1") && !holds("eth1"));
    let missing =
        Statement::Match { left: Expr::Field(Field::ReversePath { marked: false }), op: Op::Is, right: number(0) };
    assert_eq!(all[5][0], missing);
    assert_eq!(&*found[0].tables[0].chains[0].rules[5].text.read(), "fib saddr . iif oif missing drop");
}

#[test]
fn what_is_not_understood_is_said_and_may_match_or_not() {
    let (found, problems) = one(
        "ip",
        &[
            r#"[{"quota":{"val":1,"val_unit":"bytes"}},{"accept":null}]"#,
            r#"[{"match":{"op":"==","left":{"meta":{"key":"cgroup"}},"right":7}},{"drop":null}]"#,
            r#"[{"goto":{"target":"gone"}}]"#,
            r#"[{"match":{"op":"==","left":{"payload":{"protocol":"tcp","field":"dport"}},"right":"@nowhere"}}]"#,
            r#"[{"counter":{"packets":1,"bytes":2}},{"log":{"prefix":"x"}}]"#,
        ],
    );
    let all = statements(&found);
    assert_eq!(all[0][0], Statement::Unknown("quota".into()));
    assert!(matches!(&all[1][0], Statement::Match { left: Expr::Unknown(what), .. } if **what == *"meta cgroup"));
    assert_eq!(all[2][0], Statement::Verdict(Verdict::Missing("gone".into())));
    assert!(matches!(&all[3][0], Statement::Match { right: Operand::Set(Source::Missing(_)), .. }), "{:?}", all[3]);
    assert!(all[4].is_empty());
    let said = |what: &str| problems.iter().any(|problem| problem.contains(what));
    assert!(said("quota is not understood") && said("meta cgroup is not understood"), "{problems:?}");
}

#[test]
fn a_map_element_that_is_not_understood_leaves_the_others() {
    let text = r#"{"nftables":[{"table":{"family":"ip","name":"t","handle":1}},
        {"map":{"family":"ip","name":"m","table":"t","type":["inet_proto","inet_service"],"map":"verdict","elem":[
            [{"concat":["tcp",80]},{"drop":null}],
            [{"elem":{"val":{"concat":["udp",53]},"comment":"dns"}},{"accept":null}],
            [{"concat":["tcp","what"]},{"drop":null}]]}}]}"#;
    let (found, problems) = read(text);
    let map = &found[0].tables[0].sets[0];
    let at = |proto, port| map.find(&[Is::Number(proto), Is::Number(port)]);
    assert_eq!(at(6, 80), Some(Some(&Datum::Verdict(Verdict::Drop))));
    assert_eq!(at(17, 53), Some(Some(&Datum::Verdict(Verdict::Accept))));
    assert!(map.has_unknown && at(6, 81).is_none());
    assert!(map.elements().any(|(.., comment)| comment.is_some_and(|text| **text == *"dns")));
    assert!(problems[0].contains("set m is not understood"), "{problems:?}");
}

#[test]
fn what_is_no_listing_is_an_error_or_nothing() {
    for text in ["", "[]", "{}", r#"{"nftables":7}"#] {
        assert!(rulesets(text, &mut Notes::new("test")).is_err(), "{text}");
    }
    assert_eq!(read(r#"{"nftables":[7,{"rule":{}},{"chain":null},{"x":1}]}"#).0, []);
}
