//! Properties: the index changes nothing, and nothing panics.

use super::*;
use proptest::prelude::*;

fn rule() -> impl Strategy<Value = String> {
    let matches = prop_oneof![
        (0..6u8).prop_map(|host| format!("-d 172.18.0.{host}/32")),
        (0..6u8).prop_map(|host| format!("! -d 172.18.0.{host}/32")),
        (0..6u8).prop_map(|host| format!("-s 10.0.0.{host}/32")),
        (0..6u16).prop_map(|port| format!("-p tcp -m tcp --dport {port}")),
        (0..6u16).prop_map(|port| format!("-p tcp -m tcp ! --dport {port}")),
        (0..6u16, 0..6u16).prop_map(|(one, two)| format!("-p tcp -m multiport --dports {one},{two}")),
        (0..4u32).prop_map(|mark| format!("-m mark --mark {mark}")),
        Just("-m statistic --mode random --probability 0.5".to_owned()),
        Just(String::new()),
    ];
    let target = prop_oneof![
        4 => (0..4u8).prop_map(|chain| format!("-j C{chain}")),
        1 => (0..4u8).prop_map(|chain| format!("-g C{chain}")),
        2 => Just("-j RETURN".to_owned()),
        3 => (0..4u32).prop_map(|mark| format!("-j MARK --set-xmark {mark}")),
        1 => (0..6u8, 0..6u16).prop_map(|(host, port)| format!("-p tcp -j DNAT --to-destination 172.18.0.{host}:{port}")),
        1 => Just("-j ACCEPT".to_owned()),
    ];
    (matches, target).prop_map(|(matches, target)| {
        if target.starts_with("-p") && matches.starts_with("-p") { target } else { format!("{matches} {target}") }
    })
}

/// Chains only jump to later ones, so that nothing loops; all are long enough for an index.
fn dump() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::collection::vec(rule(), 12..30), 5).prop_map(|chains| {
        let mut text = String::from("*nat\n:PREROUTING ACCEPT [0:0]\n");
        (0..4).for_each(|at| text.push_str(&format!(":C{at} - [0:0]\n")));
        for (at, rules) in chains.iter().enumerate() {
            let name = if at == 0 { "PREROUTING".into() } else { format!("C{}", at - 1) };
            let later = |rule: &&String| (0..at).all(|to| !rule.ends_with(&format!(" C{to}")));
            rules
                .iter()
                .filter(later)
                .take(if at == 0 { 30 } else { 14 })
                .for_each(|rule| text.push_str(&format!("-A {name} {rule}\n")));
        }
        text + "COMMIT\n"
    })
}

fn any_packet() -> impl Strategy<Value = Packet> {
    (0..6u8, 0..6u8, 0..6u16, 0..4u32).prop_map(|(src, dst, dport, mark)| {
        let mut packet = packet(&format!("10.0.0.{src}:1000 > 172.18.0.{dst}:{dport}"), "eth0");
        packet.mark = mark;
        packet
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn the_index_changes_nothing(text in dump(), packet in any_packet()) {
        let state = node(&text, &[]);
        let simulator = Simulator::new(&state);
        let (with, without) = (simulator.trace(&packet), simulator.trace_linear(&packet));
        // A trace that was cut short by a limit was cut at another place.
        prop_assume!(without.branches.len() < 4096 && !format!("{:?}", without.branches).contains("gave up"));
        prop_assert_eq!(with, without);
    }

    #[test]
    fn branches_share_out_the_whole(text in dump(), packet in any_packet()) {
        let trace = trace(&node(&text, &[]), &packet);
        prop_assume!(trace.branches.len() < 4096);
        let sum: f64 = trace.branches.iter().map(|branch| branch.probability.as_f64()).sum();
        prop_assert!((sum - 1.0).abs() < 1e-9, "{sum}");
    }

    #[test]
    fn spoiled_dumps_are_read_and_walked(text in dump(), spoils in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40), packet in any_packet()) {
        let mut bytes = text.into_bytes();
        for (at, byte) in spoils {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let text = String::from_utf8_lossy(&bytes);
        let (ruleset, _) = iptables::parse(&text, "test", Flavour::IptablesNft, Family::V4);
        let state = NodeState { rulesets: vec![Arc::new(ruleset)], ..node("", &[]) };
        prop_assert!(!trace(&state, &packet).branches.is_empty());
    }

    #[test]
    fn any_text_is_read(text in "(?s).{0,400}") {
        for family in [Family::V4, Family::V6] {
            let (ruleset, _) = iptables::parse(&text, "test", Flavour::IptablesLegacy, family);
            let (again, _) = iptables::parse(&format!("*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING {text}"), "test", Flavour::IptablesLegacy, family);
            prop_assert!(again.tables.len() >= usize::from(ruleset.tables.is_empty()));
        }
    }
}
