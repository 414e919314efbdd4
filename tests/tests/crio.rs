//! What porttrace reads of pods where CRI-O runs them: from answers with the shapes of CRI-O's, a real network namespace with a real
//! listener, and the rules that CRI-O writes for a hostPort.

use anyhow::{Context, Result, ensure};
use porttrace_tests::netns::{ChildGuard, Netns};
use porttrace_tests::peer::{self, Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use porttrace_tests::runtime::crio::{Crio, Infra, Pod};
use porttrace_tests::watch::porttrace;
use porttrace_user::core::kube::hash;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;

/// The pod's address; other tests on this machine have pods of their own.
const POD: &str = "10.85.77.9";
const NODE: &str = "172.18.77.3";
const HOST_PORT: u16 = 9088;
const CONTAINER_PORT: u16 = 8081;

struct World {
    // Dropped in this order.
    server: ChildGuard,
    pod: Netns,
    node: Netns,
}

impl World {
    /// A pod behind a veth, in which port 80 is served, and the hostPort's rules, which lead to another port.
    fn new() -> Result<Self> {
        let (node, pod) = (Netns::new("crio")?, Netns::new("crio-pod")?);
        node.exec(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])?;
        let links = format!(
            "link add vethcrio type veth peer name eth0 netns {}\n\
             link set vethcrio up\n\
             route add {POD}/32 dev vethcrio\n\
             addr add {NODE}/32 dev lo\n",
            pod.name()
        );
        node.exec_with(["ip", "-batch", "-"], &links)?;
        let inside = format!("addr add {POD}/32 dev eth0\nlink set eth0 up\nroute add default dev eth0\n");
        pod.exec_with(["ip", "-batch", "-"], &inside)?;
        node.exec_with(["iptables-restore"], &rules(&id()))?;
        let mut command = pod.command(peer::binary()?);
        command.args(["serve", "--name", "frontend", "--tcp", "80"]);
        let server = ChildGuard::spawn(command)?;
        let ready = server.stdout.wait_for(Duration::from_secs(10), |line| (line == "ready").then_some(()));
        ready.with_context(|| format!("no server: {:?}", server.stderr.snapshot()))?;
        Ok(Self { server, pod, node })
    }

    fn crio(&self, infra: Infra) -> Result<Crio> {
        Crio::start(Pod {
            id: id(),
            namespace: "default",
            name: "frontend-5b79c8694b-6hjrc",
            uid: "11111111-1111-1111-1111-111111111111",
            infra,
            netns: self.pod.path().to_owned(),
            ips: vec![POD.parse()?],
            image: "quay.io/local/web:1",
            exposed: &["80/tcp"],
        })
    }

    fn porttrace(&self, crio: &Crio, arguments: &[&str]) -> Result<String> {
        let mut command = self.node.command(porttrace()?);
        command.args(arguments).arg("--cri-socket").arg(crio.socket()).env("COLUMNS", "110");
        let output = command.output()?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.success() && said.is_empty(), "{arguments:?}: {said}");
        let told = String::from_utf8(output.stdout)?;
        ensure!(!told.contains("SECRET"), "a secret in {told}");
        Ok(told)
    }
}

fn id() -> String {
    "5a".repeat(32)
}

/// As internal/hostport/hostport_iptables.go writes them.
fn rules(sandbox: &str) -> String {
    let chain = hash::crio_chain(sandbox, HOST_PORT, "tcp", "");
    let masquerade = chain.replace(hash::CRIO, "CRIO-MASQ-");
    let comment = format!(
        "-m comment --comment \"k8s_frontend-5b79c8694b-6hjrc_default_11111111-1111-1111-1111-111111111111_0 hostport {HOST_PORT}\""
    );
    let portals = "-m comment --comment \"kube hostport portals\" -m addrtype --dst-type LOCAL -j KUBE-HOSTPORTS";
    format!(
        "*nat\n:KUBE-HOSTPORTS - [0:0]\n:CRIO-HOSTPORTS-MASQ - [0:0]\n:{chain} - [0:0]\n:{masquerade} - [0:0]\n\
         -A PREROUTING {portals}\n-A OUTPUT {portals}\n\
         -A POSTROUTING -m comment --comment \"kube hostport masquerading\" -m conntrack --ctstate DNAT -j CRIO-HOSTPORTS-MASQ\n\
         -A KUBE-HOSTPORTS {comment} -m tcp -p tcp --dport {HOST_PORT} -j {chain}\n\
         -A CRIO-HOSTPORTS-MASQ {comment} -j {masquerade}\n\
         -A {chain} {comment} -m tcp -p tcp -j DNAT --to-destination={POD}:{CONTAINER_PORT}\n\
         -A {masquerade} {comment} -m conntrack --ctorigdstport {HOST_PORT} -m tcp -p tcp --dport {CONTAINER_PORT} \
         -s {POD} -d {POD} -j MASQUERADE\nCOMMIT\n"
    )
}

#[test]
fn a_pod_of_crio_is_explained() -> Result<()> {
    if !may_run("a pod of CRI-O") {
        return Ok(());
    }
    let world = World::new()?;
    // The rules are true: from the node's own address they lead to the pod, which refuses 8081.
    let request = Connect::new(Transport::Tcp, SocketAddr::new(NODE.parse()?, HOST_PORT));
    ensure!(world.node.run_in(|| peer::connect(&request))??.result == Outcome::Refused);
    for infra in [Infra::Dropped, Infra::DroppedSilently, Infra::Process(world.server.id())] {
        let crio = world.crio(infra)?;
        let told: Value = serde_json::from_str(&world.porttrace(&crio, &["explain", "9088", "--json"])?)?;
        explained(&told).with_context(|| format!("{infra:?}: {told:#}"))?;
        let text = world.porttrace(&crio, &["explain", "9088"])?;
        ensure!(
            text.contains("image quay.io/local/web:1") && text.contains("hostPort of pod default/frontend-"),
            "{text}"
        );
        let ports: Value = serde_json::from_str(&world.porttrace(&crio, &["ports", "--json"])?)?;
        let [port] = ports["ports"].as_array().map(Vec::as_slice).context("ports")? else { panic!("{ports:#}") };
        let claim = &port["claims"][0];
        assert_eq!(claim["kind"], "host_port", "{ports:#}");
        assert_eq!(
            (&claim["who"], &claim["to"]),
            (&json!("default/frontend-5b79c8694b-6hjrc"), &json!("10.85.77.9:8081"))
        );
        let runtime_is_missing =
            ports["missing"].as_array().is_some_and(|all| all.iter().any(|one| one.to_string().contains("runtime")));
        ensure!(!runtime_is_missing, "{ports:#}");
    }
    Ok(())
}

/// The finding knows the listener and the image; and each word of the pod's map is there.
fn explained(told: &Value) -> Result<()> {
    let findings = told["findings"].as_array().context("findings")?;
    let ids: Vec<&Value> = findings.iter().map(|finding| &finding["id"]).collect();
    // CRI-O serves no hostPort on 127.0.0.1, nor sets route_localnet.
    assert_eq!(ids, ["no-listener", "localhost-not-served"]);
    let finding = &findings[0];
    let sentence = finding["sentence"].as_str().context("a sentence")?;
    ensure!(sentence.ends_with("where nothing listens; it listens on 80 (the image exposes 80/tcp)"), "{sentence}");
    let change = "set containerPort 8081 (hostPort 9088) in pod default/frontend-5b79c8694b-6hjrc to 80";
    assert_eq!(finding["change"], change);
    let [map] = told["maps"].as_array().map(Vec::as_slice).context("maps")? else { anyhow::bail!("not one map") };
    assert_eq!(map["title"], "pod default/frontend-5b79c8694b-6hjrc (10.85.77.9)");
    let words = map["words"].as_array().context("words")?;
    let word = |name: &str| {
        let word = words.iter().find(|word| word["word"] == name);
        word.map(|word| (word["value"].clone(), word["source"].clone(), word["agrees"].clone()))
    };
    let rule = format!("rule nat {} #1", hash::crio_chain(&id(), HOST_PORT, "tcp", ""));
    assert_eq!(word("hostPort"), Some((json!("9088/tcp"), json!(rule), Value::Null)));
    assert_eq!(word("containerPort").map(|word| (word.0, word.2)), Some((json!("8081/tcp"), json!(false))));
    assert_eq!(word("ExposedPorts"), Some((json!("80/tcp"), json!("image quay.io/local/web:1"), Value::Null)));
    assert_eq!(word("listening").map(|word| word.0), Some(json!("80/tcp")));
    Ok(())
}
