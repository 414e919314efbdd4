//! Facts that the kernel taught: each was once a disagreement between this model and the kernel's own trace of the same packet
//! (Linux 6.18, iptables 1.8.9), found by the oracle and made small.

use super::*;

fn dump(table: &str, rules: &str) -> String {
    let chains = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
    let heads: String = chains.iter().map(|chain| format!(":{chain} ACCEPT [0:0]\n")).collect();
    format!("*{table}\n{heads}{rules}\nCOMMIT\n")
}

fn udp(text: &str, input: &str) -> Packet {
    let mut packet = packet(text, input);
    packet.tuple.proto = Proto::Udp;
    packet.tcp_flags = 0;
    packet
}

#[test]
fn iptables_nft_asks_security_after_the_nat_of_input() {
    let both = dump("nat", "-A INPUT -j ACCEPT") + &dump("security", "-A INPUT -j ACCEPT");
    let branch = only(&node(&both, &[]), &packet("172.18.0.4:1 > 172.18.0.3:22", "eth0"));
    let tables: Vec<String> = branch
        .hops
        .iter()
        .filter_map(|hop| match hop {
            Hop::Rule { rule, .. } if *rule.chain == *"INPUT" => Some(rule.table.to_string()),
            _ => None,
        })
        .collect();
    assert_eq!(tables, ["nat", "security"]);
}

#[test]
fn recent_sets_even_where_the_rule_does_not_match_and_update_only_renews() {
    let seen = |first: &str| {
        let text = dump("filter", &format!("{first}\n-A INPUT -m recent --rcheck --name L --rsource -j DROP"));
        let state = node(&text, &[("xt_recent/L", "")]);
        let branch = only(&state, &packet("172.18.0.4:1 > 172.18.0.3:22", "eth0"));
        rules(&branch).contains(&"INPUT:2".to_string())
    };
    // The list is written before the port is looked at.
    assert!(seen("-A INPUT -p tcp -m recent --set --name L --rsource -m tcp --dport 99"));
    assert!(!seen("-A INPUT -m recent ! --update --name L --rsource"));
}

#[test]
fn recent_behind_a_random_match_sets_as_often_as_that_holds_though_the_rule_never_matches() {
    let never = "-m addrtype --src-type LOCAL -j ACCEPT";
    let outcomes = |between: &str, then: &str| {
        let first = format!("-A INPUT {between} -m recent --set --name L --rsource {then}");
        let text = dump("filter", &format!("{first}\n-A INPUT -m recent --rcheck --name L --rsource -j DROP"));
        let state = node(&text, &[("xt_recent/L", "")]);
        let trace = Simulator::new(&state).trace(&packet("172.18.0.4:1 > 172.18.0.3:22", "eth0"));
        let dropped = |branch: &Branch| matches!(branch.verdict, Verdict::Dropped { .. });
        let mut outcomes: Vec<(bool, String)> =
            trace.branches.iter().map(|branch| (dropped(branch), branch.probability.to_string())).collect();
        outcomes.sort();
        outcomes
    };
    let pairs =
        |list: &[(bool, &str)]| list.iter().map(|(dropped, odds)| (*dropped, (*odds).into())).collect::<Vec<_>>();
    assert_eq!(
        outcomes("-m statistic --mode random --probability 0.25", never),
        pairs(&[(false, "3/4"), (true, "1/4")])
    );
    assert_eq!(outcomes("-m statistic --mode random --probability 1.0", never), pairs(&[(true, "1")]));
    assert_eq!(outcomes("-m statistic --mode random --probability 0", never), pairs(&[(false, "1")]));
    // Whether the option is there is not known: both, each with its full probability.
    let unknown = "-p tcp -m tcp --tcp-option 8";
    assert_eq!(outcomes(unknown, never), pairs(&[(false, "1"), (true, "1")]));
    // A rule that does nothing else is not without effect either.
    assert_eq!(outcomes(unknown, ""), pairs(&[(false, "1"), (true, "1")]));
}

#[test]
fn what_came_as_a_broadcast_is_not_forwarded_even_after_dnat() {
    let routes = r#"[{"dst":"172.18.0.0/16","dev":"eth0","scope":"link"},{"dst":"10.244.1.9","dev":"veth1","scope":"link"},
        {"type":"broadcast","dst":"172.18.255.255","dev":"eth0","table":"local","scope":"link"}]"#;
    let rules = dump("nat", "-A PREROUTING -j DNAT --to-destination 10.244.1.9");
    let state = node(&rules, &[("ip-route.json", routes)]);
    let branch = only(&state, &udp("172.18.0.4:1 > 172.18.255.255:53", "eth0"));
    assert!(
        matches!(branch.verdict, Verdict::Dropped { reason: DropReason::Other { .. }, .. }),
        "{:?}",
        branch.verdict
    );
}

#[test]
fn with_local_routes_of_its_own_the_node_looks_at_every_source() {
    let local = r#"{"type":"local","dst":"172.18.0.3","dev":"eth0","table":"local","scope":"host"},
        {"type":"broadcast","dst":"172.18.255.255","dev":"eth0","table":"local","scope":"link"}"#;
    let verdict = |more: &str| {
        let routes = format!("[{local},{}{more}]", r#"{"dst":"172.18.0.0/16","dev":"eth0","scope":"link"}"#);
        only(&node("", &[("ip-route.json", &routes)]), &packet("172.18.255.255:1 > 172.18.0.3:22", "eth0")).verdict
    };
    assert!(matches!(verdict(""), Verdict::Delivered { .. }));
    let custom = r#",{"type":"local","dst":"10.66.0.0/16","dev":"lo","table":"local","scope":"host"}"#;
    assert!(matches!(verdict(custom), Verdict::Dropped { reason: DropReason::Martian, .. }));
}

#[test]
fn a_bitmap_of_ports_knows_tcp_and_udp_only() {
    let state = node(
        &dump("filter", "-A INPUT -m set --match-set P dst -j DROP"),
        &[("ipset.txt", "create P bitmap:port range 0-1023\nadd P 22\n")],
    );
    let verdict = |proto| {
        let mut asked = packet("172.18.0.4:1 > 172.18.0.3:22", "eth0");
        asked.tuple.proto = proto;
        only(&state, &asked).verdict
    };
    assert!(matches!(verdict(Proto::Udp), Verdict::Dropped { .. }));
    assert!(matches!(verdict(Proto::Sctp), Verdict::Delivered { .. }));
}

#[test]
fn targets_change_ttl_and_tos_for_the_rules_behind_them() {
    let rules = dump(
        "mangle",
        "-A PREROUTING -j TTL --ttl-set 33\n-A PREROUTING -j DSCP --set-dscp 0x0a\n-A INPUT -m ttl --ttl-eq 33 -m tos --tos 0x28/0xff -j DROP",
    );
    let branch = only(&node(&rules, &[]), &packet("172.18.0.4:1 > 172.18.0.3:22", "eth0"));
    assert!(matches!(branch.verdict, Verdict::Dropped { reason: DropReason::Rule, .. }), "{:?}", branch.verdict);
}

#[test]
fn a_source_port_that_the_kernel_chose_decides_no_rule() {
    let rules = dump("nat", "-A POSTROUTING -j MASQUERADE --random-fully")
        + &dump("filter", "-A INPUT -p tcp -m tcp --sport 1000 -j DROP");
    let state = node(&rules, &[]);
    assert_eq!(trace(&state, &packet("172.18.0.3:1000 > 10.244.1.1:22", "")).branches.len(), 2);
}

#[test]
fn what_came_back_by_lo_is_confirmed() {
    let rules = dump("raw", "-A PREROUTING -m conntrack --ctstatus CONFIRMED -j DROP");
    let branch = only(&node(&rules, &[]), &packet("172.18.0.3:1 > 172.18.0.3:22", ""));
    assert!(matches!(branch.verdict, Verdict::Dropped { reason: DropReason::Rule, .. }), "{:?}", branch.verdict);
}
