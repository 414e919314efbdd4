//! `ports`, `explain` and `matrix --probe` as root on a node of the lab: its rules, its pods' sockets, real connections.

use porttrace_tests::lab::topology::NodeName;
use porttrace_tests::lab::{Lab, LabOptions};
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::porttrace;
use serde_json::Value;

fn json(lab: &Lab, arguments: &[&str]) -> Value {
    let mut command = lab.node(NodeName::Worker3).command(porttrace().unwrap());
    command.args(arguments).arg("--json").env("PATH", lab.tools.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn ids(explanation: &Value) -> Vec<&str> {
    explanation["findings"].as_array().unwrap().iter().filter_map(|finding| finding["id"].as_str()).collect()
}

/// Every cell that was tried came out as it was predicted; returns how many were.
fn tried(matrix: &Value) -> usize {
    let cells = matrix["rows"].as_array().unwrap().iter().flat_map(|row| row["cells"].as_array().unwrap());
    let tried: Vec<&Value> = cells.filter(|cell| cell["tried"].is_object()).collect();
    for cell in &tried {
        // That nobody answers a datagram shows in silence, which proves nothing.
        let silent = cell["outcome"] == "silent" && cell["tried"]["outcome"] == "unknown";
        assert!(silent || cell["tried"]["outcome"] == cell["outcome"], "{cell}\nin {matrix:#}");
    }
    tried.len()
}

#[test]
fn the_founding_story_is_told_and_tried_on_a_real_node() {
    if !may_run("explain in the lab") {
        return;
    }
    let mut lab = Lab::up(LabOptions::default()).unwrap();
    let broken = json(&lab, &["explain", "9088"]);
    assert!(ids(&broken).contains(&"no-listener"), "{broken:#}");
    assert_eq!(broken["verdict"][0]["outcome"], "refused", "{broken:#}");
    assert!(broken["verdict"][0]["sentence"].as_str().unwrap().contains("it listens on 80"), "{broken:#}");
    let matrix = json(&lab, &["matrix", "9088", "--probe"]);
    assert!(tried(&matrix) >= 3, "{matrix:#}");

    lab.repair().unwrap();
    let fixed = json(&lab, &["explain", "9088"]);
    assert!(!ids(&fixed).contains(&"no-listener"), "{fixed:#}");
    assert_eq!(fixed["verdict"][0]["outcome"], "works", "{fixed:#}");
    let matrix = json(&lab, &["matrix", "9088", "--probe"]);
    assert!(tried(&matrix) >= 3, "{matrix:#}");
    let ports = json(&lab, &["ports"]);
    let hosts: Vec<u64> = ports["ports"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|port| port["claims"].as_array().unwrap().iter().any(|claim| claim["kind"] == "host_port"))
        .filter_map(|port| port["port"].as_u64())
        .collect();
    assert!(hosts.contains(&9088), "{ports:#}");
}
