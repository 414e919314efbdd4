//! Chains, routing and what stands between the hooks.

use super::*;

const TO_NODE: &str = "172.18.0.4:40000 > 172.18.0.3:22";
const TO_POD: &str = "172.18.0.4:40000 > 10.244.1.9:80";

fn filter(rules: &str) -> String {
    format!(
        "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:A - [0:0]\n:B - [0:0]\n{rules}\nCOMMIT\n"
    )
}

#[test]
fn chains_return_and_goto_does_not_come_back() {
    let jumps =
        filter("-A INPUT -j A\n-A INPUT -j DROP\n-A A -j B\n-A A -j RETURN\n-A A -j DROP\n-A B -s 1.1.1.1/32 -j DROP");
    assert_eq!(rules(&only(&node(&jumps, &[]), &packet(TO_NODE, "eth0"))), ["INPUT:1", "A:1", "A:2", "INPUT:2"]);
    let goes = filter("-A INPUT -j A\n-A INPUT -j ACCEPT\n-A A -g B\n-A A -j DROP");
    assert_eq!(rules(&only(&node(&goes, &[]), &packet(TO_NODE, "eth0"))), ["INPUT:1", "A:1", "INPUT:2"]);
    let from_base = filter("-A INPUT -g A\n-A INPUT -j DROP");
    assert_eq!(rules(&only(&node(&from_base, &[]), &packet(TO_NODE, "eth0"))), ["INPUT:1", "INPUT:policy"]);
}

#[test]
fn loops_and_missing_chains_end_in_unknown() {
    let around = filter("-A INPUT -j A\n-A A -j B\n-A B -j A");
    let branch = only(&node(&around, &[]), &packet(TO_NODE, "eth0"));
    assert!(matches!(&branch.verdict, Verdict::Unknown { because, .. } if because.contains("leads back to itself")));
    let (ruleset, _) = iptables::parse(&filter("-A INPUT -j GONE"), "test", Flavour::IptablesNft, Family::V4);
    let state = NodeState { rulesets: vec![Arc::new(ruleset)], ..node("", &[]) };
    assert!(matches!(only(&state, &packet(TO_NODE, "eth0")).verdict, Verdict::Unknown { .. }));
}

#[test]
fn chains_that_jump_too_often_are_given_up() {
    let mut text = String::from("*filter\n:INPUT ACCEPT [0:0]\n");
    (0..40).for_each(|at| text.push_str(&format!(":C{at} - [0:0]\n")));
    text.push_str("-A INPUT -j C0\n");
    (0..39).for_each(|at| text.push_str(&format!("-A C{at} -j C{}\n-A C{at} -j C{}\n", at + 1, at + 1)));
    text.push_str("COMMIT\n");
    let branch = only(&node(&text, &[]), &packet(TO_NODE, "eth0"));
    assert!(matches!(&branch.verdict, Verdict::Unknown { because, .. } if because.contains("gave up")));
}

#[test]
fn branches_beyond_the_limit_are_said() {
    let mut text = String::from("*filter\n:INPUT ACCEPT [0:0]\n");
    (0..13).for_each(|_| text.push_str("-A INPUT -m statistic --mode random --probability 0.5 -j MARK --or-mark 1\n"));
    text.push_str("COMMIT\n");
    let trace = trace(&node(&text, &[]), &packet(TO_NODE, "eth0"));
    assert_eq!(trace.branches.len(), 4096);
    assert!(trace.assumptions.iter().any(|text| text.contains("stopped at 4096")), "{:?}", trace.assumptions);
}

#[test]
fn routes_that_refuse_refuse() {
    let verdict = |dst: &str| only(&node("", &[]), &packet(&format!("172.18.0.4:1 > {dst}:1"), "eth0")).verdict;
    assert!(matches!(verdict("10.9.1.1"), Verdict::Dropped { reason: DropReason::Blackhole, .. }));
    assert!(matches!(verdict("10.8.1.1"), Verdict::Rejected { with, .. } if with == "icmp-host-unreachable"));
    assert!(matches!(verdict("10.7.1.1"), Verdict::Rejected { with, .. } if with == "icmp-admin-prohibited"));
    assert!(matches!(verdict("8.8.8.8"), Verdict::Forwarded { next_hop, .. } if next_hop == address("172.18.0.1")));
}

#[test]
fn sysctls_close_the_way() {
    let with = |change: &str| [("sysctl.txt", format!("{SYSCTLS}{change}\n"))];
    let verdict = |change: &str, text: &str, input: &str| {
        let files = with(change);
        only(&node("", &[(files[0].0, &files[0].1)]), &packet(text, input)).verdict
    };
    let dropped = |verdict: Verdict| match verdict {
        Verdict::Dropped { reason, .. } => Some(reason),
        _ => None,
    };
    assert_eq!(
        dropped(verdict("net.ipv4.conf.eth0.forwarding = 0", TO_POD, "eth0")),
        Some(DropReason::ForwardingDisabled)
    );
    assert_eq!(dropped(verdict("net.ipv4.conf.eth0.rp_filter = 1", TO_POD, "eth0")), None);
    let spoofed = "10.244.1.9:1 > 172.18.0.3:22";
    assert_eq!(dropped(verdict("net.ipv4.conf.eth0.rp_filter = 1", spoofed, "eth0")), Some(DropReason::RpFilter));
    assert_eq!(dropped(verdict("net.ipv4.conf.eth0.rp_filter = 2", spoofed, "eth0")), None);
    assert_eq!(
        dropped(verdict("", "172.18.0.3:1 > 172.18.0.3:22", "eth0")),
        Some(DropReason::Martian),
        "its own address"
    );
    assert_eq!(dropped(verdict("", "172.18.0.4:1 > 127.0.0.1:22", "eth0")), Some(DropReason::Martian));
    assert_eq!(dropped(verdict("net.ipv4.conf.eth0.route_localnet = 1", "172.18.0.4:1 > 127.0.0.1:22", "eth0")), None);
}

#[test]
fn what_the_node_sends_itself_comes_back_by_lo() {
    let text = "*mangle\n:OUTPUT ACCEPT [0:0]\n:PREROUTING ACCEPT [0:0]\n-A OUTPUT -j MARK --set-xmark 0x5/0xffffffff\n\
                -A PREROUTING -i lo -m mark --mark 0x5 -j ACCEPT\nCOMMIT\n*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j DNAT --to-destination 9.9.9.9\nCOMMIT\n";
    let branch = only(&node(text, &[]), &packet("172.18.0.3:1 > 172.18.0.3:22", ""));
    assert_eq!(
        rules(&branch),
        ["OUTPUT:1", "OUTPUT:policy", "PREROUTING:2"].map(|rule| rule.replace("PREROUTING:2", "PREROUTING:1"))
    );
    assert!(matches!(branch.verdict, Verdict::Delivered { listening: Some(true), .. }));
}

#[test]
fn output_is_routed_again_after_dnat_and_filter_keeps_the_old_interface() {
    let text = "*nat\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n-A OUTPUT -d 10.96.0.1/32 -j DNAT --to-destination 10.244.1.9\n\
                -A POSTROUTING -o veth1 -j MASQUERADE\nCOMMIT\n*filter\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -o eth0 -j ACCEPT\nCOMMIT\n";
    let branch = only(&node(text, &[]), &packet("172.18.0.3:1 > 10.96.0.1:80", ""));
    assert_eq!(rules(&branch), ["OUTPUT:1", "OUTPUT:1", "POSTROUTING:1"]);
    assert_eq!(branch.final_tuple, tuple("10.244.1.1:1 > 10.244.1.9:80"));
    let loopback = only(&node(text, &[]), &packet("127.0.0.1:1 > 10.96.0.1:80", ""));
    assert!(matches!(loopback.verdict, Verdict::Dropped { reason: DropReason::Martian, .. }), "{loopback:?}");
}

#[test]
fn several_next_hops_share_the_load() {
    let routes = r#"[{"dst":"default","nexthops":[{"gateway":"172.18.0.1","dev":"eth0","weight":1},{"gateway":"172.18.0.2","dev":"eth0","weight":3}]}]"#;
    let trace = trace(&node("", &[("ip-route.json", routes)]), &packet("10.244.1.9:1 > 8.8.8.8:53", "veth1"));
    let shares: Vec<_> = trace.branches.iter().map(|branch| branch.probability.to_string()).collect();
    assert_eq!(shares, ["1/4", "3/4"]);
}

#[test]
fn a_state_without_routes_says_what_it_assumes() {
    let text = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j DNAT --to-destination 10.244.1.9:80\nCOMMIT\n";
    let missing = [("ip-route.json", "-"), ("ip6-route.json", "-"), ("ip-addr.json", "-"), ("sysctl.txt", "-")];
    let trace = trace(&node(text, &missing), &packet(TO_NODE, "eth0"));
    assert_eq!(trace.branches.len(), 2);
    assert!(trace.branches.iter().all(|branch| branch.final_tuple.dst == address("10.244.1.9")));
    assert!(trace.assumptions.iter().any(|text| text.contains("routes are not part")), "{:?}", trace.assumptions);
}

#[test]
fn bridged_packets_stay_on_their_bridge() {
    let links = r#"[{"ifindex":3,"ifname":"br0","flags":["UP"],"linkinfo":{"info_kind":"bridge"}},
        {"ifindex":4,"ifname":"port1","flags":["UP"],"master":"br0","linkinfo":{"info_kind":"veth"}}]"#;
    let addresses =
        ADDRESSES.replace("veth1", "br0").replace(r#""10.244.1.1","prefixlen":32"#, r#""10.244.1.1","prefixlen":24"#);
    let files = |setting: &str| {
        [
            ("ip-link.json", links.to_owned()),
            ("ip-addr.json", addresses.clone()),
            ("sysctl.txt", format!("{SYSCTLS}net.bridge.bridge-nf-call-iptables = {setting}\n")),
        ]
    };
    let routes = r#"[{"dst":"10.244.1.0/24","dev":"br0","scope":"link"}]"#;
    let text = "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -i br0 -o br0 -m physdev --physdev-in port1 --physdev-is-bridged -j DROP\nCOMMIT\n";
    for (setting, dropped) in [("1", true), ("0", false)] {
        let files = files(setting);
        let mut changes: Vec<(&str, &str)> = files.iter().map(|(name, text)| (*name, text.as_str())).collect();
        changes.push(("ip-route.json", routes));
        let branch = only(&node(text, &changes), &packet("10.244.1.9:1 > 10.244.1.8:80", "port1"));
        assert_eq!(matches!(branch.verdict, Verdict::Dropped { .. }), dropped, "{setting}: {}", notes(&branch));
    }
}

#[test]
fn two_flavours_on_one_nat_hook_fork_when_the_order_matters() {
    let dump = |to: &str| {
        format!("*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j DNAT --to-destination {to}\nCOMMIT\n")
    };
    let mut state = node(&dump("10.244.1.9:1"), &[]);
    let (legacy, _) = iptables::parse(&dump("10.244.1.9:2"), "test", Flavour::IptablesLegacy, Family::V4);
    state.rulesets.push(Arc::new(legacy));
    let trace = trace(&state, &packet(TO_NODE, "eth0"));
    let ports: Vec<_> = trace.branches.iter().map(|branch| branch.final_tuple.dport).collect();
    assert_eq!(ports, [1, 2]);
}

#[test]
fn where_native_rules_that_were_not_read_may_send_it_elsewhere_the_path_forks() {
    let dump = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j DNAT --to-destination 10.244.1.9:1\nCOMMIT\n";
    let at = |hooks: &str| trace(&node(dump, &[("nft-hooks.txt", hooks)]), &packet(TO_NODE, "eth0"));
    let [rewritten, open] = [false, true].map(|unknown| {
        let trace =
            at("ip kube-proxy nat-prerouting nat prerouting -100 dnat\ninet fw in filter prerouting -150 no-dnat\n");
        let of = |branch: &&Branch| matches!(branch.verdict, Verdict::Unknown { .. }) == unknown;
        let said = trace.assumptions.iter().filter(|text| text.contains("could not be read")).count();
        assert_eq!((trace.branches.len(), said, trace.unfollowed.may_snat), (2, 2, false));
        assert_eq!(trace.unfollowed.tables, ["inet fw", "ip kube-proxy"]);
        trace.branches.iter().find(of).expect("both ways").clone()
    });
    assert_eq!((rewritten.final_tuple.dport, open.final_tuple.dport), (1, packet(TO_NODE, "eth0").tuple.dport));
    let Verdict::Unknown { because, .. } = &open.verdict else { panic!("{open:?}") };
    assert!(because.starts_with("chain nat-prerouting of nftables table ip kube-proxy may send"), "{because}");
    // What cannot send it elsewhere, or is of the other family, leaves one way; that it was not read is said.
    let other = at(
        "ip kube-proxy nat-postrouting nat postrouting 100 dnat\nip6 kube-proxy nat-prerouting nat prerouting -100 dnat\n",
    );
    assert_eq!((other.branches.len(), other.unfollowed.may_snat), (1, true));
    assert_eq!(other.unfollowed.tables, ["ip kube-proxy"]);
    let none = at("");
    assert!(none.unfollowed.tables.is_empty() && none.branches.len() == 1, "{:?}", none.branches);
}

#[test]
fn where_ipvs_takes_a_packet_the_prediction_ends() {
    let addresses = ADDRESSES.trim_end().trim_end_matches(']').to_owned()
        + r#",{"ifindex":9,"ifname":"kube-ipvs0","addr_info":[{"family":"inet","local":"10.96.0.1","prefixlen":32,"scope":"global"}]}]"#;
    let links = r#"[{"ifindex":9,"ifname":"kube-ipvs0","linkinfo":{"info_kind":"dummy"}}]"#;
    let list = "TCP  10.96.0.1:443 rr\n  -> 172.18.0.2:6443 Masq 1 0 0\n";
    let list = format!("Prot LocalAddress:Port Scheduler Flags\n{list}");
    let text = "*nat\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n-A INPUT -j ACCEPT\n-A OUTPUT -j ACCEPT\nCOMMIT\n*filter\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n-A INPUT -j ACCEPT\n-A OUTPUT -j ACCEPT\nCOMMIT\n";
    let at = |packet: &Packet, list: &str| {
        let files = [("ip-addr.json", addresses.as_str()), ("ip-link.json", links), ("ip_vs.txt", list)];
        let trace = trace(&node(text, &files), packet);
        assert!(trace.assumptions.iter().any(|text| text.contains("kube-proxy uses IPVS")), "{:?}", trace.assumptions);
        trace.branches.into_iter().next().expect("a branch")
    };
    let because = |branch: &Branch| match &branch.verdict {
        Verdict::Unknown { because, .. } => because.clone(),
        other => panic!("{other:?}"),
    };
    let outside = at(&packet("172.18.0.4:1 > 10.96.0.1:443", "eth0"), &list);
    assert!(
        because(&outside).contains("virtual server tcp 10.96.0.1:443, 1 real server by rr"),
        "{}",
        because(&outside)
    );
    // filter INPUT (0) comes before IPVS (99), nat INPUT (100) behind it; in OUTPUT nat (-100) comes first.
    assert_eq!(rules(&outside), ["INPUT:1"]);
    let inside = at(&packet("10.96.0.1:1 > 10.96.0.1:443", ""), &list);
    assert_eq!((because(&inside), rules(&inside)), (because(&outside), vec!["OUTPUT:1".to_owned()]));
    let other = at(&packet("172.18.0.4:1 > 10.96.0.1:80", "eth0"), &list);
    assert!(matches!(other.verdict, Verdict::Delivered { listening: Some(false), .. }), "{:?}", other.verdict);
    let unread = at(&packet("172.18.0.4:1 > 10.96.0.1:80", "eth0"), "# not permitted");
    assert!(because(&unread).contains("not part of the state"));
}
