//! `porttrace simulate` as people run it: what it prints on recorded nodes, its exit codes, and bad input.

use serde_json::Value;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn node() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/recorded/iptables-nft/broken/nodes/worker3")
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/listing").join(name)
}

/// Runs the command at 100 columns without colour; `input` goes to its standard input.
fn run(arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_porttrace"))
        .arg("simulate")
        .args(arguments)
        .env("COLUMNS", "100")
        .env_remove("NO_COLOR")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

/// A packet through the recorded node.
fn on_node(arguments: &str) -> Output {
    let node = node();
    let mut all = vec!["--snapshot", node.to_str().unwrap()];
    all.extend(arguments.split_whitespace());
    run(&all, b"")
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The one sentence on standard error, and the exit code.
fn complaint(output: &Output) -> (i32, String) {
    let lines = String::from_utf8(output.stderr.clone()).unwrap();
    (output.status.code().unwrap(), lines.lines().next().unwrap_or_default().to_owned())
}

#[test]
fn a_hostport_to_the_wrong_container_port() {
    insta::assert_snapshot!(text(&on_node("172.18.0.3:9088 --from 172.18.0.4")));
}

#[test]
fn a_nodeport_with_three_endpoints() {
    insta::assert_snapshot!(text(&on_node("172.18.0.3:30080 --from 172.18.0.4")));
}

#[test]
fn a_clusterip_from_the_node_itself_and_from_a_pod() {
    insta::assert_snapshot!("clusterip_local", text(&on_node("10.96.48.151:8088 --local")));
    insta::assert_snapshot!("clusterip_pod", text(&on_node("10.96.48.151:8088 --pod 10.244.1.9")));
}

#[test]
fn a_service_without_endpoints_is_rejected() {
    insta::assert_snapshot!(text(&on_node("172.18.0.3:30104 --from 172.18.0.4")));
}

#[test]
fn session_affinity_is_a_condition() {
    insta::assert_snapshot!(text(&on_node("172.18.0.3:30103 --from 172.18.0.4")));
}

#[test]
fn ipv6_destinations() {
    insta::assert_snapshot!(text(&on_node("[fc00:f853:ccd:e793::3]:9088 --from fc00:f853:ccd:e793::4")));
}

#[test]
fn why_names_the_rules_that_nearly_matched() {
    insta::assert_snapshot!(text(&on_node("172.18.0.3:9091 --from 172.18.0.4 --proto udp --why")));
}

#[test]
fn grepped_rows_answer_and_say_what_is_missing() {
    let listing = fs::read_to_string(data("recorded.nvL.txt")).unwrap();
    let rows: String = listing.lines().filter(|line| line.contains("9088")).map(|line| format!("{line}\n")).collect();
    let output = run(&["172.18.0.3:9088", "--from", "172.18.0.4", "--rules", "-"], rows.as_bytes());
    insta::assert_snapshot!(text(&output));
}

/// `grep SERVICE` has all endpoints, each with its share.
#[test]
fn grepped_rules_of_a_service_balance_as_all_rules_do() {
    let listing = fs::read_to_string(data("recorded.nvL.txt")).unwrap();
    let rows: String =
        listing.lines().filter(|line| line.contains("frontend")).map(|line| format!("{line}\n")).collect();
    let output = run(&["172.18.0.3:30080", "--from", "172.18.0.4", "--json", "--rules", "-"], rows.as_bytes());
    let answer: Value = serde_json::from_str(&text(&output)).unwrap();
    let branches = answer["branches"].as_array().unwrap();
    let ends: Vec<String> =
        branches.iter().map(|one| format!("{} {}", one["probability"], one["final"]["dst"])).collect();
    assert_eq!(ends, ["10.244.1.9", "10.244.2.9", "10.244.3.9"].map(|pod| format!("\"1/3\" \"{pod}\"")));
}

/// The hops of a walk over a listing are those over the dump of the same rules, text and line aside.
#[test]
fn a_listing_walks_like_the_dump() {
    let six = |proto: &str| format!("[fc00:f853:ccd:e793::3]:9088 --from fc00:f853:ccd:e793::4 --proto {proto}");
    let packets = [
        ("recorded.save.txt", "recorded.nvL.txt", "172.18.0.3:9088 --from 172.18.0.4".to_owned()),
        ("recorded.save.txt", "recorded.nvL-numbers.txt", "172.18.0.3:30080 --from 172.18.0.4".to_owned()),
        ("recorded.save.txt", "recorded.nvL.txt", "10.96.48.151:8088 --pod 10.244.1.9".to_owned()),
        ("recorded.save.txt", "recorded.nvL.txt", "172.18.0.3:5353 --from 172.18.0.4 --proto udp".to_owned()),
        ("recorded.save.txt", "recorded.nvL.txt", "172.18.0.3:30104 --from 172.18.0.4".to_owned()),
        ("recorded.save.txt", "recorded.nvL.txt", "203.0.113.10:80 --from 172.18.0.100".to_owned()),
        ("recorded6.save.txt", "recorded6.nvL.txt", six("tcp")),
        ("recorded6.save.txt", "recorded6.nvL.txt", six("udp")),
    ];
    for (dump, listing, packet) in packets {
        let walk = |rules: &str| {
            let rules = data(rules);
            let answer = text(&on_node(&format!("{packet} --json --rules {}", rules.display())));
            let mut answer: Value = serde_json::from_str(&answer).unwrap();
            for branch in answer["branches"].as_array_mut().unwrap() {
                let hops = branch["hops"].as_array_mut().unwrap();
                // A listing was made of raw too, which the dump leaves out because it has no rules.
                hops.retain(|hop| hop["rule"]["table"] != "raw");
                for hop in hops {
                    hop.as_object_mut().unwrap().remove("text");
                }
            }
            serde_json::to_string_pretty(&answer["branches"]).unwrap()
        };
        let (dumped, listed) = (walk(dump), walk(listing));
        assert!(dumped.contains("\"probability\""));
        for (one, two) in dumped.lines().zip(listed.lines()) {
            assert_eq!(one, two, "{packet}");
        }
        assert_eq!(dumped.len(), listed.len(), "{packet}");
    }
}

#[test]
fn lines_keep_to_a_narrow_terminal() {
    let node = node();
    for packet in ["172.18.0.3:30080", "172.18.0.3:9088", "172.18.0.3:30103", "172.18.0.3:30104"] {
        let output = Command::new(env!("CARGO_BIN_EXE_porttrace"))
            .args(["simulate", packet, "--from", "172.18.0.4", "--why", "--snapshot", node.to_str().unwrap()])
            .env("COLUMNS", "80")
            .output()
            .unwrap();
        let text = text(&output);
        let long: Vec<&str> = text.lines().filter(|line| line.chars().count() > 80).collect();
        assert!(text.lines().count() > 20 && long.is_empty(), "{long:#?}");
    }
}

#[test]
fn json_has_the_documented_members() {
    let answer: Value = serde_json::from_str(&text(&on_node("172.18.0.3:30080 --from 172.18.0.4 --json"))).unwrap();
    assert_eq!((&answer["schema"], &answer["kind"]), (&Value::from(1), &Value::from("trace")));
    assert_eq!(answer["packet"]["in"], "eth0");
    assert_eq!(answer["outcome"], "forwarded");
    let branches = answer["branches"].as_array().unwrap();
    assert_eq!(branches.len(), 3);
    for branch in branches {
        assert_eq!(branch["probability"], "1/3");
        assert_eq!((&branch["verdict"], &branch["masquerade"]), (&Value::from("forwarded"), &Value::from(true)));
        assert_eq!(branch["final"]["dport"], 80);
        assert_eq!(branch["final"]["dst"], branch["reply"]["src"]);
        assert!(branch["out"].is_string() && branch["hops"].as_array().unwrap().len() > 5);
        assert_eq!(branch["decisions"].as_array().unwrap().len(), 1);
    }
    let outs: Vec<&Value> = branches.iter().map(|branch| &branch["out"]).collect();
    assert_eq!(outs, ["veth30eb0bd3", "eth0", "eth0"]);
}

#[test]
fn one_line_of_a_batch_is_told_of_as_one() {
    let node = node();
    let arguments = ["--batch", "-", "--json", "--snapshot", node.to_str().unwrap()];
    let output = run(&arguments, b"rubbish\n");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.ends_with("\nporttrace: 1 line of the batch is no packet\n"), "{said}");
    let packet = br#"{"src":"172.18.0.4","sport":4000,"dst":"172.18.0.3","dport":30080,"proto":"tcp","in":"eth0"}"#;
    let output = run(&[&arguments[..], &["--expect", "dropped"]].concat(), packet);
    assert_eq!(output.status.code(), Some(3));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("expected dropped") && said.contains("but 1 packet does otherwise"), "{said}");
}

#[test]
fn a_batch_answers_in_order_and_goes_on_after_bad_lines() {
    let good = |dport: u16| {
        format!(r#"{{"src":"172.18.0.4","sport":4000,"dst":"172.18.0.3","dport":{dport},"proto":"tcp","in":"eth0"}}"#)
    };
    let mut lines: Vec<String> = (0..9000).map(|i| good(9000 + i % 100)).collect();
    lines[4] = "{\"src\":".to_owned();
    lines[5] = r#"{"src":"172.18.0.4","sport":0,"dst":"172.18.0.3","dport":80,"proto":"tcp","in":"eth0"}"#.to_owned();
    lines[6] = r#"{"src":"172.18.0.3","sport":1,"dst":"172.18.0.3","dport":80,"proto":"tcp","in":"eth0"}"#.to_owned();
    lines[7] = String::new();
    lines[8] = format!("{{\"src\":\"{}\"}}", "x".repeat(200_000));
    let node = node();
    let arguments = ["--batch", "-", "--json", "--snapshot", node.to_str().unwrap()];
    let output = run(&arguments, lines.join("\n").as_bytes());
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("4 lines of the batch are no packets"));
    let answers: Vec<Value> = output
        .stdout
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect();
    let numbers: Vec<u64> = answers.iter().map(|answer| answer["line"].as_u64().unwrap()).collect();
    let expected: Vec<u64> = (1..=9000).filter(|line| *line != 8).collect();
    assert_eq!(numbers, expected);
    for (i, says) in [(4, "EOF"), (5, "port 0"), (6, "is an address of this node"), (7, "longer than 64 KiB")] {
        assert_eq!(answers[i]["kind"], "error");
        assert!(answers[i]["error"].as_str().unwrap().contains(says), "{}", answers[i]);
    }
    assert_eq!(answers[0]["packet"]["dport"], 9000);
    let sent = r#"{"src":"172.18.0.3","sport":4000,"dst":"10.96.48.151","dport":8088,"proto":"tcp"}"#;
    let one: Value = serde_json::from_slice(&run(&arguments, sent.as_bytes()).stdout).unwrap();
    assert_eq!((&one["packet"]["in"], one["branches"].as_array().unwrap().len()), (&Value::Null, 3));
}

#[test]
fn expectations_decide_the_exit_code() {
    let code = |arguments: &str| on_node(arguments).status.code().unwrap();
    for (packet, outcome) in [
        ("172.18.0.3:9088 --from 172.18.0.4", "forwarded"),
        ("172.18.0.3:30104 --from 172.18.0.4", "rejected"),
        ("172.18.0.3:30102 --from 172.18.0.4", "dropped"),
        ("172.18.0.3:22 --from 172.18.0.4", "rejected"),
        ("172.18.0.3:10250 --from 172.18.0.4 --proto icmp", "usage"),
    ] {
        for expected in ["forwarded", "rejected", "dropped", "delivered", "unknown"] {
            let wanted = if outcome == "usage" {
                2
            } else if outcome == expected {
                0
            } else {
                3
            };
            assert_eq!(code(&format!("{packet} --expect {expected}")), wanted, "{packet} {expected}");
        }
    }
    assert_eq!(code("172.18.0.3:9088 --from 172.18.0.4 --expect accepted"), 0);
    assert_eq!(code("172.18.0.3:9088 --from 172.18.0.4 --expect any:dropped"), 3);
    assert_eq!(code("172.18.0.3:9088 --from 172.18.0.4 --expect any:forwarded"), 0);
    assert_eq!(code("172.18.0.3:9088 --from 172.18.0.4 --expect soon"), 2);
}

#[test]
fn requests_that_contradict_themselves_get_one_sentence() {
    for (arguments, says) in [
        ("172.18.0.3:80", "say who sends the packet"),
        ("172.18.0.3 --from 172.18.0.4", "needs a port"),
        ("172.18.0.3:0 --from 172.18.0.4", "port 0 is no port"),
        ("172.18.0.3:65536 --from 172.18.0.4", "is no port"),
        ("172.18.0.3:80 --from fd00::1", "not of the same family"),
        ("172.18.0.3:80 --from 172.18.0.3 --in eth0", "is an address of this node"),
        ("172.18.0.3:80 --from 172.18.0.4 --in eth9", "eth9 is no interface of this node"),
        ("172.18.0.3:80 --from 172.18.0.4 --local", "is no address of this node"),
        ("10.96.48.151:8088 --pod 10.244.2.9", "is no pod of this node"),
        ("10.96.48.151:8088 --pod web-0", "no pod \"web-0\" is known here, but"),
        ("10.96.48.151:8088 --pod web-0 --rules /dev/null", "no line that looks like a rule"),
        ("10.96.48.151:8088 --local --mac 02:00:00:00:00:01", "comes in no frame"),
        ("10.96.48.151:8088 --from 172.18.0.4 --uid 0", "has no user or group"),
        ("web:80 --local", "names are not resolved"),
        ("172.18.0.3:80 --from 172.18.0.4:41 --sport 42", "disagree"),
        ("172.18.0.3:80 --from 172.18.0.4 --rules /dev/null", "no line that looks like a rule"),
    ] {
        let (code, sentence) = complaint(&on_node(arguments));
        assert!(code == 2 && sentence.contains(says), "{arguments}: {code} {sentence}");
    }
}

#[test]
fn a_pod_is_found_by_its_name() {
    let by_address = text(&on_node("10.96.48.151:8088 --pod 10.244.1.9"));
    for name in ["frontend-a", "default/frontend-a"] {
        assert_eq!(text(&on_node(&format!("10.96.48.151:8088 --pod {name}"))), by_address, "{name}");
    }
    let (_, elsewhere) = complaint(&on_node("10.96.48.151:8088 --pod frontend-b"));
    assert!(elsewhere.contains("runs on node worker2, not on this one"), "{elsewhere}");
    let pasted =
        run(&["10.96.48.151:8088", "--pod", "web-0", "--rules", data("recorded.nvL.txt").to_str().unwrap()], b"");
    let (code, sentence) = complaint(&pasted);
    assert!(
        code == 2 && sentence.contains("does not know pods by name (only a snapshot, or a live node"),
        "{code} {sentence}"
    );
}

/// Runs a packet through pasted rules and gives all that was said.
fn pasted(rules: &[u8]) -> (i32, String) {
    let output = run(&["10.0.0.9:80", "--from", "10.0.0.1", "--rules", "-"], rules);
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(said).unwrap())
}

#[test]
fn bad_rules_are_told_and_the_rest_is_used() {
    let dump = fs::read(data("recorded.save.txt")).unwrap();
    let torn = &dump[..dump.len() / 2];
    let crlf = String::from_utf8(dump.clone()).unwrap().replace('\n', "\r\n");
    let head = "*nat\n:PREROUTING ACCEPT [0:0]\n:A - [0:0]\n:B - [0:0]\n";
    let unknown_table = format!("*bogus\n:X - [0:0]\nCOMMIT\n{head}COMMIT\n");
    let missing_chain = format!("{head}-A PREROUTING -j NOWHERE\nCOMMIT\n");
    let circle = format!("{head}-A PREROUTING -j A\n-A A -j B\n-A B -j A\nCOMMIT\n");
    let mixed = format!("{head}-A PREROUTING -d 10.0.0.3/32 -j A\n-A PREROUTING -d fd00::1/128 -p tcp -j A\nCOMMIT\n");
    let six = format!("{head}-A PREROUTING -d fd00::1/128 -p tcp -j A\nCOMMIT\n");
    let cases: [(&[u8], &str); 7] = [
        (torn, "has no COMMIT"),
        (crlf.as_bytes(), "10.0.0.1:40000 → 10.0.0.9:80"),
        (unknown_table.as_bytes(), "bogus"),
        (missing_chain.as_bytes(), "NOWHERE"),
        (circle.as_bytes(), "10.0.0.1:40000 → 10.0.0.9:80"),
        (mixed.as_bytes(), "fd00::1"),
        (six.as_bytes(), "no IPv4 rules"),
    ];
    for (rules, says) in cases {
        let (code, said) = pasted(rules);
        assert!(code == 0 && said.contains(says), "{says}: {code}\n{said}");
    }
    let (code, said) = pasted(&vec![b'x'; 257 << 20]);
    assert!(code == 1 && said.contains("larger than 256 MiB"), "{code} {said}");
    let (code, said) = pasted(b"\x00\xff\xfe garbage\n");
    assert!(code == 2 && said.contains("no line that looks like a rule"), "{code} {said}");
}

#[test]
fn control_characters_of_a_comment_never_reach_the_terminal() {
    let rules =
        "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -m comment --comment \"a\u{1b}[31m\u{7}b\" -j ACCEPT\nCOMMIT\n";
    let (code, said) = pasted(rules.as_bytes());
    assert!(code == 0 && said.contains("ACCEPT"), "{said}");
    assert!(!said.contains(['\u{1b}', '\u{7}']), "{said:?}");
}

#[test]
fn bad_snapshots_get_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let try_it = |path: &Path| {
        let arguments = ["10.0.0.9:80", "--from", "10.0.0.1", "--snapshot", path.to_str().unwrap()];
        complaint(&run(&arguments, b""))
    };
    fs::create_dir(path("empty")).unwrap();
    fs::write(path("text"), "hello").unwrap();
    let mut climbing = tar::Header::new_gnu();
    climbing.as_old_mut().name[..16].copy_from_slice(b"../../etc/passwd");
    climbing.set_size(0);
    climbing.set_cksum();
    let mut archive = tar::Builder::new(fs::File::create(path("climb.tar")).unwrap());
    archive.append(&climbing, &b""[..]).unwrap();
    archive.finish().unwrap();
    let mut bomb = tar::Builder::new(zstd::Encoder::new(fs::File::create(path("bomb.tar.zst")).unwrap(), 1).unwrap());
    let mut large = tar::Header::new_gnu();
    large.set_path("sysctl.txt").unwrap();
    large.set_size(600 << 20);
    large.set_cksum();
    bomb.append(&large, std::io::Read::take(std::io::repeat(b'a'), 600 << 20)).unwrap();
    bomb.into_inner().unwrap().finish().unwrap();
    for (name, says) in [
        ("missing", "cannot read the snapshot"),
        ("empty", "none of the files of a node"),
        ("text", "neither a directory nor a tar"),
        ("climb.tar", "nothing was read from it"),
        ("bomb.tar.zst", "this is not a node's snapshot"),
    ] {
        let (code, sentence) = try_it(&path(name));
        assert!(code == 1 && sentence.contains(says), "{name}: {code} {sentence}");
    }
}

#[test]
fn a_snapshot_of_another_version_is_read_with_a_remark() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("snapshot.json"), r#"{"format": 99, "porttrace": "9.9"}"#).unwrap();
    fs::write(dir.path().join("iptables-save.txt"), "*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n").unwrap();
    let output = run(&["10.0.0.9:80", "--from", "10.0.0.1", "--snapshot", dir.path().to_str().unwrap(), "-v"], b"");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("written in format 99"), "{said}");
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let node = node();
    let mut child = Command::new(env!("CARGO_BIN_EXE_porttrace"))
        .args(["simulate", "--batch", "-", "--json", "--snapshot", node.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let line = "{\"src\":\"172.18.0.4\",\"sport\":1,\"dst\":\"172.18.0.3\",\"dport\":9088,\"in\":\"eth0\"}\n";
    drop(child.stdin.take().unwrap().write_all(line.repeat(500).as_bytes()));
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap()), (Some(0), String::new()));
}
