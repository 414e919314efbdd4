//! Fixtures: `tests/data/listing`, rules that a real iptables 1.8.9 held, printed by `-save` and by `-L` in one go.

use super::*;
use std::collections::BTreeMap;

macro_rules! data {
    ($name:literal) => {
        include_str!(concat!("../../../../tests/data/listing/", $name))
    };
}

/// Table → chain → rules, without counters.
fn rules(save: &str) -> BTreeMap<(String, String), Vec<String>> {
    let mut table = String::new();
    let mut rules: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for line in save.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.to_owned();
        } else if let Some(at) = line.find("-A ") {
            let (chain, body) = line[at + 3..].split_once(' ').unwrap_or((&line[at + 3..], ""));
            rules.entry((table.clone(), chain.to_owned())).or_default().push(body.trim().to_owned());
        }
    }
    rules
}

/// Rules of `save` that come back differently from `listing`: (as saved, as translated).
fn differences(save: &str, listing: &str, family: Family) -> Vec<(String, String)> {
    let (translated, _) = translate(listing, "listing");
    let back = translated.iter().find(|t| t.family == family).map(|t| rules(&t.save)).unwrap_or_default();
    let saved = rules(save);
    assert_eq!(saved.keys().collect::<Vec<_>>(), back.keys().collect::<Vec<_>>());
    let mut different = Vec::new();
    for (place, rules) in &saved {
        assert_eq!(rules.len(), back[place].len(), "{place:?}");
        different.extend(rules.iter().zip(&back[place]).filter(|(a, b)| a != b).map(|(a, b)| (a.clone(), b.clone())));
    }
    different
}

#[test]
fn recorded_rules_come_back_word_for_word() {
    assert_eq!(differences(data!("recorded.save.txt"), data!("recorded.nvL.txt"), Family::V4), []);
    assert_eq!(differences(data!("recorded.save.txt"), data!("recorded.nvL-numbers.txt"), Family::V4), []);
    assert_eq!(differences(data!("recorded6.save.txt"), data!("recorded6.nvL.txt"), Family::V6), []);
}

#[test]
fn what_a_listing_loses_is_exactly_this() {
    let lost = |save, listing, family| -> Vec<String> {
        differences(save, listing, family).into_iter().map(|(_, back)| back).collect()
    };
    let expected = [
        // One phrase for each end of the range.
        "-m iprange --src-range 10.0.0.1-10.0.0.9 -m iprange --dst-range 10.1.0.1-10.1.0.2 -j ACCEPT",
        "-m listed --listed \"STRING match \\\"bad stuff\\\" ALGO name bm\" -j DROP",
        "-p sctp -m sctp -m listed --listed \"any 0x0001\" -j ACCEPT",
        // Numbers for names.
        "-p 47 -j ACCEPT",
        "! -p 50 -j ACCEPT",
        // Extensions that porttrace does not decide anyway: whatever they print is an unknown match.
        "-m listed --listed \"#conn src/24 > 10\" -j DROP",
        "-m listed --listed \"limit: up to 5/sec burst 5 mode srcip\" -j ACCEPT",
        "-m listed --listed \"TIME from 08:00:00 to 18:00:00 UTC\" -j ACCEPT",
        "-m listed --listed \"u32 \\\"0x0=0x1\\\"\" -j DROP",
        "-m listed --listed \"match bpf 6 0 0 65535\" -j DROP",
        "-m listed --listed \"helper match \\\"ftp\\\"\" -j ACCEPT",
        // Both print NOTRACK.
        "-p udp -m udp --dport 1:1024 -j CT --notrack",
    ];
    assert_eq!(lost(data!("zoo.save.txt"), data!("zoo.nvL-numbers.txt"), Family::V4), expected);
    let expected = [
        "-m listed --listed \"rt type:0\" -j DROP",
        "-m listed --listed eui64 -j DROP",
        "-m listed --listed \"ipv6header flags:0x80\" -j DROP",
    ];
    assert_eq!(lost(data!("zoo6.save.txt"), data!("zoo6.nvL-numbers.txt"), Family::V6), expected);
}

fn v4(text: &str) -> Translated {
    translate(text, "paste").0.remove(0)
}

#[test]
fn names_instead_of_numbers_are_understood() {
    let named = v4(data!("zoo.filter.L.txt"));
    let rules = rules(&named.save);
    let input = &rules[&("filter".to_owned(), "INPUT".to_owned())];
    assert_eq!(input[1], "-p tcp -m tcp --dport 22 --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT");
    assert_eq!(input[5], "-p icmp -m icmp --icmp-type fragmentation-needed -j ACCEPT");
    assert_eq!(input[31], "-s 10.0.0.0/8 ! -d 10.96.0.0/12 ! -p tcp -j REJECT --reject-with icmp-admin-prohibited");
    assert!(named.missing.iter().any(|sentence| sentence.contains("without -v")), "{:?}", named.missing);
}

fn grep(listing: &str, keep: impl Fn(&str) -> bool) -> String {
    listing.lines().filter(|line| keep(line)).map(|line| format!("{line}\n")).collect()
}

/// The rules of some chains as they come back from a grepped listing, and those of the whole one.
fn grepped(keep: impl Fn(&str) -> bool, chains: &[&str]) -> [Vec<Vec<String>>; 2] {
    let listing = data!("recorded.nvL.txt");
    [grep(listing, keep), listing.to_owned()].map(|text| {
        let rules = rules(&v4(&text).save);
        chains
            .iter()
            .map(|chain| rules.get(&("nat".to_owned(), (*chain).to_owned())).cloned().unwrap_or_default())
            .collect()
    })
}

#[test]
fn grepped_rules_of_portmap_find_their_chains() {
    let pod = "CNI-DN-dfbe90159831def0cdfae";
    let [some, all] = grepped(|line| line.contains("9088"), &[pod, "CNI-HOSTPORT-DNAT", "PREROUTING", "OUTPUT"]);
    assert_eq!(some[0], all[0]);
    assert!(all[1].contains(&some[1][0]) && some[1].len() == 1, "{some:?}");
    assert_eq!(some[2], ["-m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT"]);
    assert_eq!(some[2], some[3]);
    let missing = v4(&grep(data!("recorded.nvL.txt"), |line| line.contains("9088"))).missing;
    assert!(missing[0].starts_with("4 nat rules stand without their"), "{missing:?}");
}

#[test]
fn grepped_rules_of_kube_proxy_find_their_chains() {
    let suffix = "UHJVR435UML62OOS";
    let [outside, service] = ["EXT", "SVC"].map(|kind| format!("KUBE-{kind}-{suffix}"));
    let chains =
        [&*outside, &*service, "KUBE-SEP-XYJSGLKBOREFOWOO", "KUBE-SEP-52RNI6AZYXMX5ORD", "KUBE-SEP-P3VGBV6S4QR4RTKX"];
    let [some, all] = grepped(|line| line.contains("default/frontend:http"), &chains);
    assert_eq!(some, all, "the one rule without a comment included");
}

/// `grep CNI-DN` keeps the headers of pods' chains, and jumps from another one.
#[test]
fn rules_below_the_header_of_another_chain_go_back_to_their_own() {
    let pod = "CNI-DN-dfbe90159831def0cdfae";
    let [some, all] = grepped(|line| line.contains("CNI-DN"), &[pod, "CNI-HOSTPORT-DNAT"]);
    assert_eq!(some[0], Vec::<String>::new());
    assert_eq!(some[1], all[1]);
}

#[test]
fn rules_that_nothing_names_are_one_list_that_every_packet_walks() {
    let row = |target: &str, rest: &str| format!("    0     0 {target}  6  --  *  *  0.0.0.0/0  0.0.0.0/0  {rest}\n");
    let translated = v4(&(row("MINE", "tcp dpt:80") + &row("DNAT", "tcp dpt:80 to:10.0.0.1:81")));
    let rules = rules(&translated.save);
    let place = |chain: &str| ("nat".to_owned(), chain.to_owned());
    assert_eq!(rules[&place("PREROUTING")], ["-j ?"]);
    assert_eq!(rules[&place("OUTPUT")], ["-j ?"]);
    assert_eq!(rules[&place("?")].len(), 2);
    assert!(translated.save.contains(":MINE - "));
    assert!(translated.missing[0].starts_with("2 nat rules stand without their"), "{:?}", translated.missing);
}

#[test]
fn grep_that_keeps_headers_and_numbers_keeps_the_numbers() {
    let listing = data!("recorded.nvL-numbers.txt");
    let keep = |line: &&str| line.starts_with("Chain ") || line.contains("9088");
    let grepped: String = listing.lines().filter(keep).map(|line| format!("{line}\n")).collect();
    let rules = rules(&v4(&grepped).save);
    let whole = differences_place(listing);
    for (place, row) in
        [(("nat", "CNI-HOSTPORT-DNAT"), "multiport --dports 9088"), (("nat", "CNI-DN-dfbe90159831def0cdfae"), "DNAT")]
    {
        let place = (place.0.to_owned(), place.1.to_owned());
        let position = |rules: &[String]| rules.iter().position(|rule| rule.contains(row)).unwrap();
        assert_eq!(position(&rules[&place]), position(&whole[&place]));
    }
}

fn differences_place(listing: &str) -> BTreeMap<(String, String), Vec<String>> {
    rules(&v4(listing).save)
}

#[test]
fn rules_as_iptables_s_prints_them() {
    let translated = v4(
        "# iptables -t nat -vS\n-P PREROUTING ACCEPT -c 1 2\n-N X\n-A PREROUTING -p tcp -c 3 180 -j X\n-A X -j DNAT --to-destination 10.0.0.1\n",
    );
    assert!(
        translated.save.starts_with("*nat\n:PREROUTING ACCEPT [0:0]\n:X - [0:0]\n[3:180] -A PREROUTING -p tcp -j X\n")
    );
    assert_eq!(translated.lines, [0, 0, 0, 4, 5, 0]);
}

#[test]
fn kinds_are_told_apart() {
    assert_eq!(kind(data!("recorded.save.txt")), Kind::Save);
    assert_eq!(kind(data!("recorded.nvL.txt")), Kind::Listing);
    assert_eq!(kind("hello\nworld, this is 10.0.0.1 and 10.0.0.2\n"), Kind::Neither);
    assert_eq!(kind(""), Kind::Neither);
}

#[test]
fn a_comment_that_ends_like_a_comment() {
    let row = "DNAT  6  --  *  *  0.0.0.0/0  0.0.0.0/0  /* a */ b */ tcp dpt:80 to:10.0.0.1:81";
    let line = format!("    0     0 {row}");
    let rules = rules(&v4(&line).save);
    assert_eq!(
        rules[&("nat".to_owned(), "?".to_owned())],
        ["-p tcp -m comment --comment \"a */ b\" -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:81"]
    );
}
