//! `ipset save` output.

use super::notes::{Notes, quote};
use crate::core::model::flow::Family;
use crate::core::model::state::IpSet;
use std::collections::BTreeMap;

/// Reads `create` and `add` lines; sets by name.
pub fn sets(text: &str, notes: &mut Notes) -> BTreeMap<String, IpSet> {
    let mut sets = BTreeMap::<String, IpSet>::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut parts = line.splitn(3, ' ');
        match (parts.next(), parts.next(), parts.next()) {
            (Some("create" | "-N"), Some(name), Some(rest)) => {
                sets.insert(name.to_owned(), create(rest));
            }
            (Some("add" | "-A"), Some(name), Some(rest)) => match sets.get_mut(name) {
                Some(set) => set.members.push(member(rest)),
                None => notes.add(index + 1, format!("a member of a set that was not created: {}", quote(line))),
            },
            _ => notes.add(index + 1, format!("neither `create` nor `add`: {}", quote(line))),
        }
    }
    sets
}

fn create(rest: &str) -> IpSet {
    let (kind, options) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut words = options.split_ascii_whitespace();
    let mut family = None;
    while let Some(word) = words.next() {
        if word == "family" {
            family = match words.next() {
                Some("inet") => Some(Family::V4),
                Some("inet6") => Some(Family::V6),
                _ => None,
            };
        }
    }
    IpSet { kind: kind.to_owned(), family, options: options.to_owned(), members: Vec::new() }
}

/// The element with its `nomatch` or `wildcard`; timeout, counters, comment and skb extensions do not decide a match.
fn member(rest: &str) -> String {
    let (element, options) = rest.split_once(' ').unwrap_or((rest, ""));
    // A comment is quoted and may hold any word.
    let options = options.split_once('"').map_or(options, |(before, _)| before);
    let decides = |word: &&str| matches!(*word, "nomatch" | "wildcard");
    [element].into_iter().chain(options.split_ascii_whitespace().filter(decides)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_sets_of_every_kind() {
        let text = "\
create a hash:ip family inet hashsize 1024 maxelem 65536 netmask 24 bucketsize 12 initval 0xd7d99438
add a 1.2.3.0
create b hash:ip,port,net family inet hashsize 1024 maxelem 65536 timeout 60 counters comment bucketsize 12 initval 0xfff9ba2b
add b 1.2.3.4,tcp:80,10.0.0.0/8 timeout 29 packets 5 bytes 0 comment \"hello nomatch\"
create c bitmap:port range 0-1000
add c 80
create s hash:net family inet6 hashsize 1024 maxelem 65536
add s fd00::/8 nomatch
create i hash:net,iface family inet hashsize 1024 maxelem 65536 bucketsize 12 initval 0x3b1f0a4c
add i 10.0.0.0/8,veth timeout 9 wildcard nomatch
create l list:set size 8
add l a
add x 1.1.1.1
garbage
";
        let mut notes = Notes::new("ipset.txt");
        let sets = sets(text, &mut notes);
        assert_eq!(sets.keys().collect::<Vec<_>>(), ["a", "b", "c", "i", "l", "s"]);
        assert_eq!((sets["a"].kind.as_str(), sets["a"].family), ("hash:ip", Some(Family::V4)));
        assert!(sets["a"].options.contains("netmask 24"));
        assert_eq!(sets["b"].members, ["1.2.3.4,tcp:80,10.0.0.0/8"]);
        assert_eq!((sets["c"].family, sets["c"].members.as_slice()), (None, ["80".to_owned()].as_slice()));
        assert_eq!(sets["s"].members, ["fd00::/8 nomatch"]);
        assert_eq!(sets["i"].members, ["10.0.0.0/8,veth wildcard nomatch"]);
        assert_eq!(sets["l"].members, ["a"]);
        let lines: Vec<_> = notes.finish().iter().map(|note| note.line).collect();
        assert_eq!(lines, [13, 14]);
    }
}
