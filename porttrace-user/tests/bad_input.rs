//! Whatever stands in a node's files or in an archive: nothing panics, nothing hangs, and the other files still count.

mod damage;

use damage::damage;
use porttrace_user::collect::snapshot;
use porttrace_user::core::model::state::NodeState;
use porttrace_user::core::parse::{self, Files};
use proptest::collection::vec;
use proptest::prelude::*;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
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

/// Runs `porttrace simulate`: exit code, standard output, standard error.
fn simulate(arguments: &[&str], snapshot: &Path) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_porttrace"));
    let output = command.arg("simulate").args(arguments).arg("--snapshot").arg(snapshot).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// A copy of the recorded node with some files changed.
fn changed(change: impl Fn(&str, Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in snapshot::read_files(&case()).unwrap() {
        let path = directory.path().join(&name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, change(&name, bytes)).unwrap();
    }
    directory
}

#[test]
fn lines_that_end_as_windows_ends_them_change_nothing() {
    let asked = ["172.18.0.3:9088", "--from", "172.18.0.4", "--json"];
    let node = changed(|_, bytes| String::from_utf8(bytes).unwrap().replace('\n', "\r\n").into_bytes());
    let (code, out, _) = simulate(&asked, node.path());
    assert_eq!((code, out), (0, simulate(&asked, &case()).1));
}

#[test]
fn rules_in_the_file_of_the_other_family_are_taken_by_their_header() {
    let asked = ["172.18.0.3:9088", "--from", "172.18.0.4", "--json"];
    let files = snapshot::read_files(&case()).unwrap();
    let node = changed(|name, bytes| match name {
        "iptables-save.txt" => files["ip6tables-save.txt"].clone(),
        "ip6tables-save.txt" => files["iptables-save.txt"].clone(),
        _ => bytes,
    });
    let (code, out, said) = simulate(&asked, node.path());
    assert_eq!((code, out), (0, simulate(&asked, &case()).1));
    assert!(said.contains("iptables-save.txt: its header says that ip6tables-save wrote it"), "{said}");
}

#[test]
fn addresses_of_the_other_family_are_said_and_decide_nothing() {
    let node = changed(|name, bytes| match name {
        "iptables-save.txt" => String::from_utf8(bytes).unwrap().replace("172.18.0.3", "fc00::3").into_bytes(),
        _ => bytes,
    });
    let (code, out, said) = simulate(&["172.18.0.3:30080", "--from", "172.18.0.4"], node.path());
    assert!(code == 0 && !out.is_empty(), "{code} {out}");
    assert!(said.lines().any(|line| line.contains("iptables-save.txt:") && line.contains("fc00::3")), "{said}");
}

#[test]
fn contradictions_and_nothing_end_in_one_sentence() {
    let asked = ["172.18.0.3:80", "--from", "172.18.0.4", "--in", "eth0"];
    for (more, says) in [
        (&["--local"][..], "'--in <INTERFACE>' cannot be used with '--local'"),
        (&["--pod", "10.244.1.9"], "'--in <INTERFACE>' cannot be used with '--pod <POD>'"),
        (&["--batch", "-"], "cannot be used with"),
    ] {
        let (code, out, said) = simulate(&[&asked[..], more].concat(), &case());
        assert!(code == 2 && out.is_empty() && said.contains(says), "{code} {said}");
    }
    let nothing = tempfile::NamedTempFile::new().unwrap();
    let (code, out, said) = simulate(&asked, nothing.path());
    assert!(code == 1 && out.is_empty() && said.lines().count() == 1, "{code} {said}");
    assert!(said.contains("is neither a directory nor a tar archive"), "{said}");
}

#[test]
fn bad_lines_of_a_batch_are_told_by_their_number() {
    let good = r#"{"src":"172.18.0.4","sport":1,"dst":"172.18.0.3","dport":9088,"in":"eth0"}"#;
    let bad = [
        (r#"{"src":1}"#.to_owned(), "expected IP address"),
        ("\"x\"".to_owned(), "expected an object with src"),
        ("\u{0}\u{1}".to_owned(), "expected value"),
        (good.replace("9088", "99999"), "expected u16"),
        (good.replace("\"eth0\"", "5"), "expected a string"),
        (good.replace("sport", "port"), "unknown field `port`"),
        (good.replace("172.18.0.3", "fc00::3"), "not of the same family"),
        ("[".repeat(50_000), "invalid"),
    ];
    let mut batch = tempfile::NamedTempFile::new().unwrap();
    for (line, _) in &bad {
        writeln!(batch, "{good}\n{line}").unwrap();
    }
    let path = batch.path().to_str().unwrap();
    let (code, out, said) = simulate(&["--batch", path], &case());
    assert!(code == 1 && said.contains("8 lines of the batch are no packets"), "{said}");
    assert_eq!(out.lines().filter(|line| line.starts_with('✓')).count(), bad.len());
    for (number, (line, says)) in bad.iter().enumerate() {
        let begins = format!("line {}: ", 2 * number + 2);
        let told = out.lines().find(|line| line.starts_with(&begins)).unwrap();
        assert!(told.contains(says) && !told.contains("struct"), "{line}: {told}");
    }
}
