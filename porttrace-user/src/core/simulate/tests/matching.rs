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
        "-m limit --limit 1/sec",
        "-m mac --mac-source 00:11:22:33:44:55",
        "-m string --string \"x\" --algo bm",
        "-m bpf --bytecode \"1,6 0 0 0\"",
        "-m socket",
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
