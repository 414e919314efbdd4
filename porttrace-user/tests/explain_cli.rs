//! `ports`, `explain` and `matrix` on recorded nodes, as a person sees them; reviewed by eye.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn porttrace(arguments: &[&str]) -> Output {
    let node = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/recorded");
    let arguments = arguments.iter().map(|one| one.replace("@", &format!("{}/", node.display())));
    Command::new(env!("CARGO_BIN_EXE_porttrace"))
        .args(arguments)
        .env("COLUMNS", "80")
        .env_remove("NO_COLOR")
        .output()
        .expect("porttrace runs")
}

fn text(arguments: &[&str]) -> String {
    let output = porttrace(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

const BROKEN: &str = "@iptables-nft/broken/nodes/worker3";
const FIXED: &str = "@iptables-nft/fixed/nodes/worker3";

/// The founding story: hostPort 9088 leads to containerPort 8081, the server listens on 80.
#[test]
fn the_founding_story() {
    insta::assert_snapshot!("explain_9088_broken", text(&["explain", "9088", "--snapshot", BROKEN]));
    insta::assert_snapshot!("matrix_9088_broken", text(&["matrix", "9088", "--snapshot", BROKEN]));
    insta::assert_snapshot!("explain_9088_fixed", text(&["explain", "9088", "--snapshot", FIXED]));
}

#[test]
fn ports_of_a_node() {
    insta::assert_snapshot!("ports_broken", text(&["ports", "--snapshot", BROKEN]));
}

#[test]
fn services_pods_and_ports_with_several_owners() {
    for (name, what) in [
        ("frontend", "svc/frontend"),
        ("headless", "svc/headless"),
        ("multi_a", "pod/multi-a"),
        ("collide", "30081"),
        ("stale_9094", "9094"),
        ("service_port_8088", "8088"),
        ("noep_30104", "30104/tcp"),
        ("nobody_12345", "12345"),
    ] {
        insta::assert_snapshot!(format!("explain_{name}"), text(&["explain", what, "--snapshot", FIXED]));
    }
    insta::assert_snapshot!("matrix_frontend", text(&["matrix", "svc/frontend", "--snapshot", FIXED]));
}

/// What a command says of a port of the recorded node with some files changed: `change` gets each name with its text, and `more` are beside
/// them.
fn told_of(command: &[&str], change: impl Fn(&Path, String) -> String, more: &[(&str, &str)]) -> String {
    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/recorded").join(&FIXED[1..]);
    let node = tempfile::tempdir().expect("a directory");
    for entry in std::fs::read_dir(recorded).expect("the recorded node") {
        let path = entry.expect("a file").path();
        let text = change(&path, std::fs::read_to_string(&path).expect("text"));
        std::fs::write(node.path().join(path.file_name().expect("a name")), text).expect("a copy");
    }
    for (name, text) in more {
        std::fs::write(node.path().join(name), text).expect("a file");
    }
    let told = text(&[command, &["--snapshot", node.path().to_str().expect("UTF-8")]].concat());
    told.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Somebody's own DNAT rule is no hostPort, and the port is not nobody's.
#[test]
fn a_port_that_other_rules_take_is_not_refused() {
    let own = "-A PREROUTING -p tcp -m tcp --dport 12345 -j DNAT --to-destination 10.244.1.9:80";
    let with_own = |path: &Path, text: String| match text.split_once("-A PREROUTING") {
        Some((before, after)) if path.ends_with("iptables-save.txt") => {
            assert!(before.contains("*nat"));
            format!("{before}{own}\n-A PREROUTING{after}")
        }
        _ => text,
    };
    let told = told_of(&["explain", "12345"], with_own, &[]);
    let line = "tcp 12345 on worker3 is no NodePort and no hostPort, but other rules take it:";
    assert!(told.contains(&format!("{line} it goes on to 10.244.1.9 by ")), "{told}");
    assert!(!told.contains("nobody claims"), "{told}");
}

/// Nor is one nobody's that IPVS may serve, or native nftables rules that could not be read.
#[test]
fn a_port_that_is_served_by_what_is_not_followed_is_not_refused() {
    let as_it_is = |_: &Path, text: String| text;
    assert!(told_of(&["explain", "12345"], as_it_is, &[]).starts_with("✗ nobody claims port 12345 on worker3"));
    let hooks = "ip kube-proxy nat-prerouting nat prerouting -100 dnat\n";
    let native = told_of(&["explain", "12345"], as_it_is, &[("nft-hooks.txt", hooks)]);
    assert!(native.starts_with("? no rule of worker3 that could be read claims port 12345"), "{native}");
    assert!(native.contains("native nftables rules may (ip kube-proxy)"), "{native}");
    let servers = "Prot LocalAddress:Port Scheduler Flags\nTCP  172.18.0.3:12345 rr\n  -> 10.244.1.9:80 Masq 1 0 0\n";
    let ipvs = told_of(&["explain", "12345"], as_it_is, &[("ip_vs.txt", servers)]);
    let line = "? IPVS takes port 12345 of worker3 (virtual server tcp 172.18.0.3:12345): that is not followed";
    assert!(ipvs.starts_with(line), "{ipvs}");
}

/// With the image's ExposedPorts, and every fact.
#[test]
fn the_image_is_asked_where_the_runtime_is_known() {
    let case = format!("{}/../tests/cases/findings/base", env!("CARGO_MANIFEST_DIR"));
    insta::assert_snapshot!("explain_with_cri", text(&["explain", "9088", "--snapshot", &case]));
}

#[test]
fn json_holds_what_the_text_says() {
    let json = |arguments: &[&str]| -> Value { serde_json::from_str(&text(arguments)).expect("JSON") };
    let explanation = json(&["explain", "9088", "--json", "--snapshot", BROKEN]);
    assert_eq!(explanation["schema"], 1);
    assert_eq!(explanation["kind"], "explanation");
    assert_eq!(explanation["subject"]["kind"], "port");
    assert_eq!(explanation["verdict"][0]["outcome"], "refused");
    assert_eq!(explanation["findings"][0]["id"], "no-listener");
    assert_eq!(explanation["ports"][0]["claims"][0]["to"], "10.244.1.9:8081");
    let matrix = json(&["matrix", "9088", "--json", "--snapshot", BROKEN]);
    assert_eq!((&matrix["kind"], &matrix["ways"][0]["kind"]), (&"matrix".into(), &"pod".into()));
    assert_eq!(matrix["rows"].as_array().map(Vec::len), Some(7));
    let ports = json(&["ports", "--json", "--snapshot", BROKEN]);
    assert!(ports["ports"].as_array().is_some_and(|ports| ports.len() > 40));
}

#[test]
fn what_cannot_be_asked_is_said_in_one_sentence() {
    for (arguments, code, said) in [
        (vec!["explain", "nonsense", "--snapshot", BROKEN], 2, "is neither a port"),
        (vec!["explain", "0", "--snapshot", BROKEN], 2, "is neither a port"),
        (vec!["explain", "svc/", "--snapshot", BROKEN], 2, "is neither a port"),
        (vec!["explain", "80/icmp", "--snapshot", BROKEN], 2, "is neither a port"),
        (
            vec!["explain", "default/frontend", "--snapshot", BROKEN],
            2,
            "say svc/default/frontend or pod/default/frontend",
        ),
        (vec!["explain", "deploy/frontend", "--snapshot", BROKEN], 2, "ask for its Service (svc/frontend)"),
        (vec!["explain", "pod/client", "-n", "apps", "--snapshot", BROKEN], 1, "there is no pod apps/client"),
        (vec!["explain", "svc/nobody", "--snapshot", BROKEN], 1, "there is no Service default/nobody"),
        (vec!["explain", "svc/kube-dns", "--snapshot", BROKEN], 1, "but kube-system/kube-dns (-n kube-system)"),
        (vec!["explain", "pod/nobody", "--snapshot", BROKEN], 1, "there is no pod default/nobody"),
        (vec!["matrix", "12345", "--snapshot", BROKEN], 1, "no way leads there"),
        (vec!["ports", "--snapshot", "/nowhere"], 1, "cannot read the snapshot /nowhere"),
    ] {
        let output = porttrace(&arguments);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(message.contains(said) && message.lines().count() == 1, "{arguments:?}: {message}");
    }
    let output = porttrace(&["explain", "9088", "--check", "--snapshot", BROKEN]);
    assert_eq!(output.status.code(), Some(3));
}

/// Without the API a Service is known by kube-proxy's rules, a pod by the container runtime; what they cannot tell is said.
#[test]
fn names_are_known_without_the_api() {
    let base = format!("{}/../tests/cases/findings/base", env!("CARGO_MANIFEST_DIR"));
    let nodes = format!("{base}/objects/nodes.json");
    let asked = |what| text(&["explain", what, "--snapshot", &base, "--objects", &nodes]);
    let service = asked("svc/web");
    assert!(service.starts_with("? tcp 30080 on n1 is NodePort of Service default/web:http"), "{service}");
    assert!(service.contains("Service port    80/tcp (http)    kube-proxy's rules: on 10.96.0.80"), "{service}");
    assert!(service.contains("selector-matches-nothing"), "{service}");
    let pod = asked("pod/web");
    assert!(pod.starts_with("✓ tcp 9088 on n1 is hostPort of pod default/web-1"), "{pod}");
    assert!(asked("pod/dns").contains("port map of pod default/dns-1 (10.244.1.3)"));
    let by_snapshot = text(&["explain", "pod/frontend", "--snapshot", BROKEN]);
    assert!(by_snapshot.contains("port map of pod default/frontend-a"), "{by_snapshot}");
}

/// Objects on the command line take the place of the snapshot's.
#[test]
fn objects_from_files() {
    let case = format!("{}/../tests/cases/findings", env!("CARGO_MANIFEST_DIR"));
    let node = format!("{case}/base");
    let pods = format!("{case}/no-listener/objects/pods.json");
    let text = text(&["explain", "9088", "--snapshot", &node, "--objects", &pods]);
    assert!(text.contains("but the pod spec"), "{text}");
    assert!(text.contains("Services are not known: not among the"), "{text}");
}
