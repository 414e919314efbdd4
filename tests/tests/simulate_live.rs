//! `porttrace simulate` on a live node, asked without a cluster around it.

use porttrace_tests::netns::Netns;
use porttrace_tests::privilege::may_run;
use porttrace_tests::watch::porttrace;
use serde_json::Value;

/// Without container runtime and Kubernetes API a pod still has a network namespace with a name.
#[test]
fn a_pod_is_found_by_the_name_of_its_network_namespace() {
    if !may_run("a live node") {
        return;
    }
    let (node, pod) = (Netns::new("node").unwrap(), Netns::new("pod").unwrap());
    node.exec(["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "eth0", "netns", pod.name()]).unwrap();
    for (netns, link, address) in [(&node, "veth0", "10.9.0.1/32"), (&pod, "eth0", "10.9.0.7/32")] {
        netns.exec(["ip", "addr", "add", address, "dev", link]).unwrap();
        netns.exec(["ip", "link", "set", link, "up"]).unwrap();
    }
    node.exec(["ip", "route", "add", "10.9.0.7", "dev", "veth0"]).unwrap();
    let output = |name: &str| {
        let mut command = node.command(porttrace().unwrap());
        command.args(["simulate", "10.9.0.1:9088", "--json", "--pod", name, "--cri-socket", "/nonexistent"]);
        command.args(["--kubeconfig", "/nonexistent"]).output().unwrap()
    };
    let found = output(pod.name());
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    let answer: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!((&answer["packet"]["src"], &answer["packet"]["in"]), (&Value::from("10.9.0.7"), &Value::from("veth0")));
    let other = output("nobody");
    let said = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(other.status.code() == Some(2) && said.contains("no pod \"nobody\" is known here"), "{said}");
}
