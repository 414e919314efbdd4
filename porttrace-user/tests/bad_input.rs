//! Whatever stands in a node's files or in an archive: nothing panics, nothing hangs, and the other files still count.

use porttrace_user::collect::snapshot;
use porttrace_user::core::model::state::NodeState;
use porttrace_user::core::parse::{self, Files};
use proptest::collection::vec;
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const IPSET: &str = "create a hash:ip family inet hashsize 1024 maxelem 65536 netmask 24\nadd a 1.2.3.0\n\
    create b hash:ip,port,net family inet timeout 60 counters comment\nadd b 1.2.3.4,tcp:80,10.0.0.0/8 timeout 29 comment \"x\"\n";
const CONNTRACK: &str = "ipv4     2 tcp      6 118 TIME_WAIT src=172.18.0.4 dst=172.18.0.3 sport=35722 dport=30080 src=10.244.3.9 dst=172.18.0.3 sport=80 dport=53264 [ASSURED] mark=0 use=1\n\
    ipv6     10 udp      17 29 src=::1 dst=::1 sport=39067 dport=97 [UNREPLIED] src=::1 dst=::1 sport=97 dport=39067 mark=0 zone=5 use=2\n\
    ipv4     2 icmp     1 29 src=10.0.0.1 dst=10.0.0.2 type=8 code=0 id=77 src=10.0.0.2 dst=10.0.0.1 type=0 code=0 id=77 mark=0 use=1\n";
const RECENT: &str = "src=127.0.0.1 ttl: 64 last_seen: 4295507261 oldest_pkt: 3 4295507000, 4295507100, 4295507261\n";
const RULES: &str = r#"[{"priority":0,"src":"all","table":"local"},{"priority":11,"not":null,"src":"10.1.0.0","srclen":16,"iif":"v0","ipproto":"tcp","sport_start":1,"sport_end":5,"dport":80,"table":"100"},{"priority":15,"src":"all","tos":"0x10","goto":32766},{"priority":16,"src":"all","uid_start":5,"table":"main","suppress_prefixlen":0},{"priority":18,"src":"all","fwmark":"0x7","fwmask":"0xff","table":"local"}]"#;
const SNAPSHOT: &str = r#"{"format":1,"porttrace":"0.1.0","node":"worker3","taken":1,"kernel":"6.1","missing":["x"]}"#;

fn case() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/recorded/iptables-nft/broken/nodes/worker3")
}

/// A real node's files, cut to what is quick to read thousands of times, and one of every other kind.
fn sample() -> Files {
    let mut files = snapshot::read_files(&case()).unwrap();
    for (name, text) in [
        ("ipset.txt", IPSET),
        ("conntrack.txt", CONNTRACK),
        ("xt_recent/KUBE-SEP-X", RECENT),
        ("clock.txt", "jiffies=4295510261\nhz=250\n"),
        ("ip-rule.json", RULES),
        ("snapshot.json", SNAPSHOT),
    ] {
        files.insert(name.to_owned(), text.as_bytes().to_vec());
    }
    for (name, bytes) in &mut files {
        if name.ends_with(".txt") {
            *bytes = bytes.split_inclusive(|byte| *byte == b'\n').rev().take(60).collect::<Vec<_>>().concat();
        }
    }
    files
}

fn sample_and_state() -> &'static (Files, NodeState) {
    static ONCE: OnceLock<(Files, NodeState)> = OnceLock::new();
    ONCE.get_or_init(|| {
        let files = sample();
        let state = parse::state(&files);
        (files, state)
    })
}

/// One way to spoil bytes; positions are fractions of the length.
#[derive(Clone, Debug)]
enum Damage {
    Delete(f64, usize),
    Insert(f64, Vec<u8>),
    Overwrite(f64, u8),
    Cut(f64),
    Repeat(f64, usize),
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let at = |place: &f64| ((bytes.len() as f64) * place) as usize;
        match self {
            Self::Delete(place, length) => {
                let start = at(place);
                bytes.drain(start..(start + length).min(bytes.len()));
            }
            Self::Insert(place, new) => {
                let start = at(place);
                bytes.splice(start..start, new.iter().copied());
            }
            Self::Overwrite(place, byte) => {
                let start = at(place);
                if let Some(old) = bytes.get_mut(start) {
                    *old = *byte;
                }
            }
            Self::Cut(place) => bytes.truncate(at(place)),
            Self::Repeat(place, length) => {
                let start = at(place);
                let piece = bytes[start..(start + length).min(bytes.len())].to_vec();
                bytes.splice(start..start, piece);
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let words = prop::sample::select(vec![
        "\"",
        "-1",
        "99999999999999999999",
        "\r\n",
        "\0",
        "\u{fffd}",
        "[[[[",
        "{}",
        "null",
        "-A",
        " --",
        "!",
        "=",
        "/",
        ":",
        "0x",
        "255.255.255.256",
        "::",
        "%",
        ",",
        "[UNREPLIED]",
        "src=",
        "é",
    ]);
    let new = prop_oneof![vec(any::<u8>(), 0..8), words.prop_map(|word| word.as_bytes().to_vec())];
    let one = prop_oneof![
        (0.0..1.0, 0usize..40).prop_map(|(place, length)| Damage::Delete(place, length)),
        (0.0..1.0, new).prop_map(|(place, new)| Damage::Insert(place, new)),
        (0.0..1.0, any::<u8>()).prop_map(|(place, byte)| Damage::Overwrite(place, byte)),
        (0.0..1.0).prop_map(Damage::Cut),
        (0.0..1.0, 0usize..200).prop_map(|(place, length)| Damage::Repeat(place, length)),
    ];
    vec(one, 1..6)
}

#[test]
fn recorded_nodes_are_read_without_complaint() {
    let state = snapshot::read(&case()).unwrap();
    let complaints: Vec<_> = state.diagnostics.iter().filter(|note| !note.message.starts_with("not there: ")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    assert_eq!(state.addresses.unwrap().len(), 35);
    assert_eq!(state.routes.unwrap().len(), 110);
    assert_eq!(state.links.unwrap().len(), 12);
    assert_eq!(state.rulesets.len(), 2);
    let missing: Vec<_> = state.diagnostics.iter().map(|note| note.source.as_str()).collect();
    assert_eq!(missing, ["conntrack.txt", "ip-neigh.json"]);
}

proptest! {
    #[test]
    fn a_spoiled_file_harms_no_other(damage in damage(), which in any::<prop::sample::Index>()) {
        let (mut files, expected) = sample_and_state().clone();
        let name = files.keys().nth(which.index(files.len())).unwrap().clone();
        let bytes = files.get_mut(&name).unwrap();
        damage.iter().for_each(|one| one.apply(bytes));
        let state = parse::state(&files);
        prop_assert!(name == "sysctl.txt" || state.sysctls == expected.sysctls);
        prop_assert!(name == "ip-route.json" || name == "ip6-route.json" || state.routes == expected.routes);
        prop_assert!(name == "conntrack.txt" || state.conntrack == expected.conntrack);
        prop_assert!(name.ends_with("-link.json") || state.links == expected.links);
    }

    #[test]
    fn any_bytes_are_survived(bytes in vec(any::<u8>(), 0..300), text in "\\PC{0,200}") {
        for content in [bytes, text.into_bytes()] {
            let files: Files = sample_and_state().0.keys().cloned().map(|name| (name, content.clone())).collect();
            parse::facts(&files);
        }
    }

    #[test]
    fn a_spoiled_archive_is_read_or_refused(damage in damage(), packed in any::<bool>()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node");
        snapshot::write(&sample_and_state().0, &path).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        if !packed {
            bytes = zstd::decode_all(bytes.as_slice()).unwrap();
        }
        damage.iter().for_each(|one| one.apply(&mut bytes));
        fs::write(&path, &bytes).unwrap();
        match snapshot::read(&path) {
            Ok(_) => {}
            Err(error) => prop_assert_eq!(error.to_string().lines().count(), 1),
        }
    }
}
