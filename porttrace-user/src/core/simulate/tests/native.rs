//! Native nftables rules, each test about one thing that iptables does not have.

use super::*;
use crate::core::model::trace::Decision;

const TO_NODE: &str = "172.18.0.4:40000 > 172.18.0.3:30080";
const TO_POD: &str = "172.18.0.4:40000 > 10.244.1.9:80";

/// `family table`, with base chains (`name type hook priority`), other chains (a name alone), sets in JSON, and rules (chain and
/// expressions in JSON).
fn table(name: &str, chains: &[&str], sets: &[&str], rules: &[(&str, &str)]) -> String {
    let (family, table) = name.split_once(' ').expect("family and name");
    let place = format!(r#""family":"{family}","table":"{table}""#);
    let mut items = vec![format!(r#"{{"table":{{"family":"{family}","name":"{table}"}}}}"#)];
    for chain in chains {
        items.push(match chain.split(' ').collect::<Vec<_>>()[..] {
            [name, kind, hook, priority] => format!(
                r#"{{"chain":{{{place},"name":"{name}","type":"{kind}","hook":"{hook}","prio":{priority},"policy":"accept"}}}}"#
            ),
            _ => format!(r#"{{"chain":{{{place},"name":"{chain}"}}}}"#),
        });
    }
    items.extend(sets.iter().map(|set| format!(r#"{{"set":{{{place},{set}}}}}"#)));
    items.extend(
        rules.iter().map(|(chain, expr)| format!(r#"{{"rule":{{{place},"chain":"{chain}","expr":[{expr}]}}}}"#)),
    );
    items.join(",")
}

fn native(tables: &[String]) -> NodeState {
    let listing = format!(r#"{{"nftables":[{}]}}"#, tables.join(","));
    node("*filter\nCOMMIT\n", &[("nft-ruleset.json", &listing)])
}

fn one(chains: &[&str], rules: &[(&str, &str)]) -> NodeState {
    native(&[table("ip t", chains, &[], rules)])
}

const SYN_TO_80: &str = r#"{"match":{"op":"==","left":{"payload":{"protocol":"tcp","field":"dport"}},"right":80}}"#;

#[test]
fn a_number_that_is_drawn_makes_a_branch_for_each_outcome() {
    let to = |address: &str| format!(r#"{{"concat":["{address}",8080]}}"#);
    // Two of the four numbers lead to the same pod.
    let map = format!(
        r#"[0,{}],[1,{}],[2,{}],[3,{}]"#,
        to("10.244.1.9"),
        to("10.244.2.9"),
        to("10.244.1.9"),
        to("10.244.3.9")
    );
    let dnat = format!(
        r#"{{"dnat":{{"family":"ip","addr":{{"map":{{"key":{{"numgen":{{"mode":"random","mod":4,"offset":0}}}},"data":{{"set":[{map}]}}}}}}}}}}"#
    );
    let state = one(&["pre nat prerouting -100"], &[("pre", &dnat)]);
    let trace = trace(&state, &packet(TO_NODE, "eth0"));
    let found: Vec<(String, Fraction)> = trace
        .branches
        .iter()
        .map(|branch| (branch.final_tuple.destination().to_string(), branch.probability))
        .collect();
    let chance = Fraction::new;
    assert_eq!(
        found,
        [
            ("10.244.1.9:8080".to_owned(), chance(1, 2)),
            ("10.244.2.9:8080".to_owned(), chance(1, 4)),
            ("10.244.3.9:8080".to_owned(), chance(1, 4))
        ]
    );
    assert!(trace.branches.iter().all(|branch| matches!(branch.decisions[..], [Decision::Drawn { .. }])));
}

#[test]
fn a_goto_returns_to_its_callers_caller() {
    let state = one(
        &["fwd filter forward 0", "a", "b"],
        &[
            ("fwd", r#"{"jump":{"target":"a"}}"#),
            ("fwd", r#"{"counter":null}"#),
            ("a", r#"{"goto":{"target":"b"}}"#),
            ("a", r#"{"drop":null}"#),
            ("b", r#"{"counter":null}"#),
        ],
    );
    let branch = only(&state, &packet(TO_POD, "eth0"));
    assert_eq!(rules(&branch), ["fwd:1", "a:1", "b:1", "fwd:2", "fwd:policy"]);
}

#[test]
fn what_a_rule_did_before_a_match_failed_stays_done() {
    let mark = r#"{"mangle":{"key":{"meta":{"key":"mark"}},"value":64}}"#;
    let other = r#"{"match":{"op":"==","left":{"payload":{"protocol":"tcp","field":"dport"}},"right":81}}"#;
    let marked = r#"{"match":{"op":"==","left":{"meta":{"key":"mark"}},"right":64}}"#;
    let state = one(
        &["fwd filter forward 0"],
        &[("fwd", &format!("{mark},{other},{{\"accept\":null}}")), ("fwd", &format!("{marked},{{\"drop\":null}}"))],
    );
    let branch = only(&state, &packet(TO_POD, "eth0"));
    assert!(matches!(branch.verdict, Verdict::Dropped { reason: DropReason::Rule, .. }), "{:?}", branch.verdict);
}

/// `nft_nat_inet_eval`.
#[test]
fn nat_of_the_other_family_in_an_inet_table_does_nothing() {
    let six = r#"{"dnat":{"family":"ip6","addr":"fc00::9"}}"#;
    let four = r#"{"dnat":{"family":"ip","addr":"10.244.1.9","port":80}}"#;
    let chains = ["pre nat prerouting -100"];
    let state = native(&[table("inet t", &chains, &[], &[("pre", six), ("pre", four)])]);
    let branch = only(&state, &packet(TO_NODE, "eth0"));
    assert_eq!(branch.final_tuple.destination().to_string(), "10.244.1.9:80");
    assert_eq!(rules(&branch)[..2], ["pre:1", "pre:2"]);
}

#[test]
fn of_two_nat_chains_at_one_priority_either_may_come_first() {
    let to = |port: u16| format!(r#"{{"dnat":{{"addr":"10.244.1.9","port":{port}}}}}"#);
    let with = |priority: i32| {
        let chain = format!("pre nat prerouting {priority}");
        native(&[
            table("ip one", &["pre nat prerouting -100"], &[], &[("pre", &to(1))]),
            table("ip two", &[&chain], &[], &[("pre", &to(2))]),
        ])
    };
    let ports = |state: &NodeState| -> Vec<u16> {
        let trace = trace(state, &packet(TO_NODE, "eth0"));
        trace.branches.iter().map(|branch| branch.final_tuple.dport).collect()
    };
    // First as it would be if nobody had made chains anew: the later table's.
    assert_eq!(ports(&with(-100)), [2, 1]);
    assert_eq!((ports(&with(-99)), ports(&with(-101))), (vec![1], vec![2]));
}

/// NAT is done at -100, wherever its chains stand among each other.
#[test]
fn a_filter_chain_before_minus_100_sees_the_packet_as_it_came() {
    let dnat = r#"{"dnat":{"addr":"10.244.1.9","port":80}}"#;
    let drop = format!(r#"{SYN_TO_80},{{"drop":null}}"#);
    let with = |priority: i32| {
        let chain = format!("in filter prerouting {priority}");
        one(&["pre nat prerouting 50", &chain], &[("pre", dnat), ("in", &drop)])
    };
    let dropped = |priority| matches!(only(&with(priority), &packet(TO_NODE, "eth0")).verdict, Verdict::Dropped { .. });
    assert_eq!((dropped(-110), dropped(-90)), (false, true));
}

#[test]
fn what_is_not_known_forks_and_where_a_look_up_leads_ends() {
    let state = one(&["in filter input 0"], &[("in", r#"{"quota":{"val":1}},{"drop":null}"#)]);
    let trace_of = |state: &NodeState| trace(state, &packet(TO_NODE, "eth0"));
    let both = trace_of(&state);
    let [dropped, on] = &both.branches[..] else { panic!("{:#?}", both.branches) };
    assert!(matches!(dropped.verdict, Verdict::Dropped { .. }) && matches!(on.verdict, Verdict::Delivered { .. }));
    let key = r#"{"meta":{"key":"cgroup"}}"#;
    let vmap = format!(r#"{{"vmap":{{"key":{key},"data":{{"set":[[1,{{"drop":null}}]]}}}}}}"#);
    let open = trace_of(&one(&["in filter input 0"], &[("in", &vmap)]));
    let [ended, on] = &open.branches[..] else { panic!("{:#?}", open.branches) };
    assert!(matches!(ended.verdict, Verdict::Unknown { .. }) && matches!(on.verdict, Verdict::Delivered { .. }));
}

/// kube-proxy's session affinity.
#[test]
fn clients_that_packets_put_into_a_set_are_known_only_where_it_is_read_again() {
    let set = r#""name":"seen","type":"ipv4_addr","flags":["dynamic","timeout"],"elem":[{"elem":{"val":"172.18.0.4","expires":9}}]"#;
    let client = r#"{"payload":{"protocol":"ip","field":"saddr"}}"#;
    let asks = format!(r#"{{"match":{{"op":"==","left":{client},"right":"@seen"}}}},{{"drop":null}}"#);
    let mut state = native(&[table("ip t", &["in filter input 0"], &[set], &[("in", &asks)])]);
    assert!(matches!(only(&state, &packet(TO_NODE, "eth0")).verdict, Verdict::Dropped { .. }));
    state.sets_move = true;
    let open = trace(&state, &packet(TO_NODE, "eth0"));
    let decided: Vec<bool> = open
        .branches
        .iter()
        .map(|branch| match &branch.decisions[..] {
            [Decision::Affinity { taken, .. }] => *taken,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(decided, [true, false]);
    // What the packet itself did is known.
    let puts = format!(r#"{{"set":{{"op":"update","elem":{client},"set":"@seen"}}}}"#);
    let chains = ["pre filter prerouting 0", "in filter input 0"];
    let mut state = native(&[table("ip t", &chains, &[set], &[("pre", &puts), ("in", &asks)])]);
    state.sets_move = true;
    assert!(matches!(only(&state, &packet(TO_NODE, "eth0")).verdict, Verdict::Dropped { .. }));
}

#[test]
fn a_route_chain_that_changes_the_mark_looks_the_way_out_up_again() {
    let mark = r#"{"mangle":{"key":{"meta":{"key":"mark"}},"value":7}}"#;
    let policy = r#"[{"priority":0,"src":"all","table":"local"},{"priority":100,"src":"all","fwmark":"0x7","table":"200"},
        {"priority":32766,"src":"all","table":"main"}]"#;
    let routes =
        ROUTES.trim_end().trim_end_matches(']').to_owned() + r#",{"dst":"default","dev":"veth1","table":"200"}]"#;
    let with = |kind: &str| {
        let chain = format!("out {kind} output -150");
        let listing = format!(r#"{{"nftables":[{}]}}"#, table("ip t", &[&chain], &[], &[("out", mark)]));
        let files = [("nft-ruleset.json", listing.as_str()), ("ip-rule.json", policy), ("ip-route.json", &routes)];
        only(&node("*filter\nCOMMIT\n", &files), &packet("172.18.0.3:40000 > 198.51.100.7:80", ""))
    };
    let way = |branch: &Branch| branch.out_interface.as_ref().map(ToString::to_string);
    assert_eq!(way(&with("route")).as_deref(), Some("veth1"));
    assert_eq!(way(&with("filter")).as_deref(), Some("eth0"));
}
