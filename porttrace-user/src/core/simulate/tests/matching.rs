//! One match at a time: a rule with it drops in filter INPUT or it does not.

use super::*;
use crate::core::model::trace::Decision;

const TO_NODE: &str = "172.18.0.4:40000 > 172.18.0.3:80";

/// Whether `-A INPUT {matches} -j DROP` takes the packet; `None` when the model cannot know.
fn takes(matches: &str, state: &[(&str, &str)], change: impl Fn(&mut Packet)) -> Option<bool> {
    let text = format!("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT {matches} -j DROP\nCOMMIT\n");
    let mut packet = packet(TO_NODE, "eth0");
    change(&mut packet);
    let trace = trace(&node(&text, state), &packet);
    match &trace.branches[..] {
        [one] => Some(matches!(one.verdict, Verdict::Dropped { reason: DropReason::Rule, .. })),
        [yes, no] => {
            assert!(matches!(
                yes.decisions[..],
                [Decision::Assumed { taken: true, .. } | Decision::Affinity { taken: true, .. }]
            ));
            assert!(matches!(no.verdict, Verdict::Delivered { .. }));
            None
        }
        more => panic!("{more:#?}"),
    }
}

fn is(matches: &str) -> Option<bool> {
    takes(matches, &[], |_| {})
}

#[test]
fn matches_on_the_packet_answer_yes_and_no() {
    for (yes, no) in [
        ("-s 172.18.0.0/16", "! -s 172.18.0.4/32"),
        ("-s 172.0.0.4/255.0.0.255", "-s 172.0.0.5/255.0.0.255"),
        ("-d 172.18.0.3/32", "-d 172.18.0.4/32"),
        ("-i eth0", "! -i eth0"),
        ("-i eth+", "-i ethernet+"),
        ("-p tcp", "! -p tcp"),
        ("-p tcp -m tcp --dport 80", "-p tcp -m tcp --dport 81:90"),
        ("-p tcp -m tcp ! --dport 81", "-p tcp -m tcp ! --dport 80"),
        ("-p tcp -m tcp --sport 1024:", "-p tcp -m tcp --sport :1023"),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", "-p tcp -m tcp --tcp-flags SYN,ACK ACK"),
        ("-p tcp -m multiport --dports 79,80:81", "-p tcp -m multiport --sports 80"),
        ("-p tcp -m multiport --ports 80", "-p tcp -m multiport ! --ports 40000"),
        ("-m addrtype --dst-type LOCAL", "-m addrtype ! --dst-type LOCAL"),
        ("-m addrtype --src-type UNICAST", "-m addrtype --src-type LOCAL"),
        ("-m addrtype --dst-type LOCAL --limit-iface-in", "-m addrtype --dst-type BROADCAST"),
        ("-m conntrack --ctstate NEW", "-m conntrack --ctstate RELATED,ESTABLISHED"),
        ("-m state --state NEW", "-m conntrack --ctstate DNAT"),
        ("-m conntrack --ctorigdst 172.18.0.3", "-m conntrack ! --ctorigdst 172.18.0.3"),
        ("-m conntrack --ctorigdstport 80", "-m conntrack --ctreplsrcport 81"),
        ("-m conntrack --ctdir ORIGINAL", "-m conntrack --ctdir REPLY"),
        ("-m conntrack --ctproto 6", "-m conntrack --ctstatus SEEN_REPLY"),
        ("-m mark --mark 0x0/0x4000", "-m mark --mark 0x4000/0x4000"),
        ("-m connmark --mark 0x0", "-m connmark --mark 0x1"),
        ("-m iprange --src-range 172.18.0.1-172.18.0.9", "-m iprange --dst-range 172.18.0.4-172.18.0.9"),
        ("-m length --length 40:100", "-m length --length 0:59"),
        ("-m ttl --ttl-eq 64", "-m ttl --ttl-lt 64"),
        ("-m ttl --ttl-gt 63", "-m ttl --ttl-gt 64"),
        ("-m pkttype --pkt-type unicast", "-m pkttype --pkt-type multicast"),
        ("-m physdev ! --physdev-is-bridged", "-m physdev --physdev-is-in"),
        ("-m tos --tos 0x00/0xff", "-m dscp --dscp 0x0a"),
        ("-m comment --comment \"a -j b\"", "-f"),
        ("-m nfacct --nfacct-name  x", "-p udp -m udp --dport 80"),
        ("-m rpfilter", "-m rpfilter --invert"),
        ("-m owner ! --uid-owner 0", "-m owner --uid-owner 0"),
    ] {
        assert_eq!(is(yes), Some(true), "{yes}");
        assert_eq!(is(no), Some(false), "{no}");
    }
}

#[test]
fn what_cannot_be_known_forks() {
    for unknown in [
        "-m hashlimit --hashlimit-upto 5/sec --hashlimit-name x",
        "-m mac --mac-source 00:11:22:33:44:55",
        "-m string --string \"x\" --algo bm",
        "-m bpf --bytecode \"1,6 0 0 0\"",
        "-m set --match-set gone src",
        "-p tcp -m tcp --tcp-option 5",
        "-m recent --rcheck --name KUBE-SEP-A --rsource",
    ] {
        let text = format!("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT {unknown} -j DROP\nCOMMIT\n");
        let (ruleset, _) = iptables::parse(&text, "test", Flavour::IptablesNft, Family::V4);
        let state = NodeState { rulesets: vec![Arc::new(ruleset)], ..node("", &[]) };
        let trace = trace(&state, &packet(TO_NODE, "eth0"));
        assert_eq!(trace.branches.len(), 2, "{unknown}");
        assert!(trace.branches.iter().all(|branch| branch.probability == Fraction::ONE));
    }
}

#[test]
fn the_sender_decides_where_it_is_known() {
    let mac = |packet: &mut Packet| packet.sender.mac = Some([0, 0x11, 0x22, 0x33, 0x44, 0x55]);
    assert_eq!(takes("-m mac --mac-source 00:11:22:33:44:55", &[], mac), Some(true));
    assert_eq!(takes("-m mac ! --mac-source 00:11:22:33:44:55", &[], mac), Some(false));
    let neighbour = r#"[{"dst":"172.18.0.4","dev":"eth0","lladdr":"00:11:22:33:44:55","state":["STALE"]}]"#;
    let learnt = |matches: &str| takes(matches, &[("ip-neigh.json", neighbour)], |_| {});
    assert_eq!(learnt("-m mac --mac-source 00:11:22:33:44:55"), Some(true));
    assert_eq!(learnt("-m mac --mac-source 00:11:22:33:44:56"), Some(false));
    let failed = neighbour.replace("STALE", "FAILED");
    assert_eq!(takes("-m mac --mac-source 00:11:22:33:44:55", &[("ip-neigh.json", &failed)], |_| {}), None);
    let owner = |matches: &str, uid: Option<u32>| {
        let text = format!("*filter\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT {matches} -j DROP\nCOMMIT\n");
        let mut packet = packet("172.18.0.3:40000 > 172.18.0.4:80", "");
        packet.sender.uid = uid;
        let trace = trace(&node(&text, &[]), &packet);
        (trace.branches.len() == 1).then(|| matches!(trace.branches[0].verdict, Verdict::Dropped { .. }))
    };
    assert_eq!(owner("-m owner --uid-owner 1000", Some(1000)), Some(true));
    assert_eq!(owner("-m owner --uid-owner 1000-2000", Some(2001)), Some(false));
    assert_eq!(owner("-m owner ! --uid-owner 1000", Some(0)), Some(true));
    assert_eq!(owner("-m owner --uid-owner 1000", None), None);
    assert_eq!(owner("-m owner --gid-owner 1000", Some(1000)), None);
    assert_eq!(owner("-m owner --socket-exists", None), Some(true));
}

#[test]
fn a_listening_socket_that_is_bound_to_an_address_is_found() {
    let listening = |local: &str, matches: &str| {
        takes(matches, &[("ss.txt", &format!("tcp LISTEN 0 128 {local} 0.0.0.0:*\n"))], |_| {})
    };
    assert_eq!(listening("172.18.0.3:80", "-m socket"), Some(true));
    assert_eq!(listening("172.18.0.3:81", "-m socket"), Some(false));
    assert_eq!(listening("0.0.0.0:80", "-m socket"), Some(false), "wildcard sockets do not count");
    assert_eq!(listening("0.0.0.0:80", "-m socket --nowildcard"), Some(true));
    assert_eq!(listening("172.18.0.3:80", "-m socket --transparent"), None);
    assert_eq!(takes("-m socket", &[("ss.txt", "-")], |_| {}), None);
}

#[test]
fn a_rate_limit_is_taken_as_not_used_up_and_that_is_said() {
    assert_eq!(is("-m limit --limit 1/min --limit-burst 3"), Some(true));
    let text = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m limit --limit 1/min -j DROP\nCOMMIT\n";
    let assumptions = trace(&node(text, &[]), &packet(TO_NODE, "eth0")).assumptions;
    assert!(assumptions.iter().any(|text| text.contains("rate limits")), "{assumptions:?}");
}

#[test]
fn sets_answer_by_their_members() {
    let sets = "create nets hash:net family inet\nadd nets 172.18.0.0/16\nadd nets 172.18.0.4 nomatch\n\
                create ports hash:ip,port family inet\nadd ports 172.18.0.3,tcp:80\n\
                create both list:set size 8\nadd both ports\n";
    let is = |matches: &str| takes(matches, &[("ipset.txt", sets)], |_| {});
    assert_eq!(is("-m set --match-set nets dst"), Some(true));
    assert_eq!(is("-m set --match-set nets src"), Some(false), "nomatch of the longer prefix");
    assert_eq!(is("-m set --match-set ports dst,dst"), Some(true));
    assert_eq!(is("-m set ! --match-set ports dst,dst"), Some(false));
    assert_eq!(is("-m set --match-set ports src,src"), Some(false));
    assert_eq!(is("-m set --match-set both dst,dst"), Some(true));
}

#[test]
fn a_network_with_another_interface_hides_wider_networks() {
    let is = |members: &str| {
        let added: String = members.split("; ").map(|member| format!("add pairs {member}\n")).collect();
        let sets = format!("create pairs hash:net,iface family inet\n{added}");
        takes("-m set --match-set pairs src,src", &[("ipset.txt", &sets)], |_| {})
    };
    assert_eq!(is("172.18.0.0/16,eth0"), Some(true));
    assert_eq!(is("172.18.0.0/16,eth0; 172.18.0.0/24,eth1"), Some(false));
    assert_eq!(is("172.18.0.0/24,eth1; 172.18.0.0/24,eth0"), Some(true));
    assert_eq!(is("172.18.0.0/16,eth0; 172.18.0.0/24,eth1 nomatch"), Some(false));
    assert_eq!(is("172.18.0.0/16,eth0; 172.19.0.0/24,eth1"), Some(true));
    assert_eq!(is("172.18.0.0/16,eth wildcard"), Some(true));
    assert_eq!(is("172.18.0.0/16,et"), Some(false));
    assert_eq!(is("172.18.0.0/16,physdev:eth0"), Some(false));
    assert_eq!(is("172.18.0.0/16,eth0; 172.18.0.0/24,physdev:eth0"), Some(true));
}

#[test]
fn conntrack_states_follow_the_packet_and_the_entry() {
    let entry = "ipv4 2 tcp 6 100 ESTABLISHED src=172.18.0.4 dst=172.18.0.3 sport=40000 dport=80 src=172.18.0.3 dst=172.18.0.4 sport=80 dport=40000 [ASSURED] mark=7 use=1\n";
    let ack = |packet: &mut Packet| packet.tcp_flags = 0x10;
    let known = |matches: &str| takes(matches, &[("conntrack.txt", entry)], ack);
    assert_eq!(known("-m conntrack --ctstate ESTABLISHED"), Some(true));
    assert_eq!(known("-m conntrack --ctstatus ASSURED"), Some(true));
    assert_eq!(known("-m connmark --mark 0x7"), Some(true));
    let rst = |packet: &mut Packet| packet.tcp_flags = 0x04;
    assert_eq!(takes("-m conntrack --ctstate INVALID", &[], rst), Some(true));
    assert_eq!(takes("-m conntrack --ctstate NEW", &[], ack), Some(true), "tcp_loose picks it up");
    assert_eq!(takes("-m conntrack ! --ctorigdst 10.0.0.1", &[], rst), Some(false), "no entry, no match");
}
