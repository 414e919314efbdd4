//! What porttrace reads of pods, against a real containerd, runc and CNI plugins.

use anyhow::{Context, Result, ensure};
use porttrace_tests::lab::rules::{IptablesFlavour, Tools};
use porttrace_tests::netns::Netns;
use porttrace_tests::peer::{Connect, Transport, connect};
use porttrace_tests::privilege::may_run;
use porttrace_tests::runtime::{Containerd, Image, NETWORK, PodSpec};
use porttrace_tests::watch::{Watch, porttrace};
use porttrace_user::collect::{facts, snapshot};
use porttrace_user::core::model::cluster::{Part, Sandbox};
use porttrace_user::core::model::facts::Facts;
use porttrace_user::core::model::flow::{Proto, Tuple};
use sha2::{Digest, Sha512};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

const WEB: Image = Image {
    name: "docker.io/local/web:1",
    command: &["httpd", "-f", "-p", "80"],
    exposed: &["80/tcp", "53/udp"],
    env: &["TOKEN=SECRET-image-env"],
};
const FRONTEND: PodSpec =
    PodSpec { namespace: "default", name: "frontend-a", host_network: false, host_port: Some((9088, 8081)) };
const AGENT: PodSpec = PodSpec { namespace: "kube-system", name: "agent", host_network: true, host_port: None };

struct World {
    // Dropped in this order.
    containerd: Containerd,
    node: Netns,
    frontend: String,
}

impl World {
    fn new() -> Result<Self> {
        let node = Netns::new("containerd")?;
        node.exec(["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
        let containerd = Containerd::start(&node)?;
        containerd.load(&WEB)?;
        let frontend = containerd.run_pod(FRONTEND, WEB.name)?;
        containerd.run_pod(AGENT, WEB.name)?;
        Ok(Self { containerd, node, frontend })
    }

    fn options(&self) -> facts::Options {
        facts::Options { cri_socket: Some(self.containerd.socket()), ..facts::Options::default() }
    }

    fn facts(&self) -> Result<Facts> {
        self.node.run_in(|| facts::read(&self.options()).0)
    }
}

fn sandbox<'a>(facts: &'a Facts, name: &str) -> Result<&'a Sandbox> {
    let known = facts.sandboxes.get().map_err(|why| anyhow::anyhow!("{why}"))?;
    known.iter().find(|sandbox| sandbox.pod.name == name).with_context(|| format!("{name} among {known:?}"))
}

#[test]
fn pods_are_read_from_a_real_containerd() -> Result<()> {
    if !may_run("a container runtime") {
        return Ok(());
    }
    let world = World::new()?;
    let facts = world.facts()?;
    let frontend = sandbox(&facts, "frontend-a")?;
    assert_eq!((frontend.id.as_str(), frontend.ready, frontend.host_network), (world.frontend.as_str(), true, false));
    assert_eq!(
        (frontend.pod.to_string().as_str(), frontend.pod_uid.as_str()),
        ("default/frontend-a", "uid-of-frontend-a")
    );
    let [container] = frontend.containers.as_slice() else { panic!("one container: {frontend:?}") };
    assert_eq!((container.name.as_str(), container.image.as_str(), container.running), ("main", WEB.name, true));
    let exposed: Vec<String> = container.exposed.iter().flatten().map(ToString::to_string).collect();
    assert_eq!(exposed, ["53/udp", "80/tcp"]);

    let agent = sandbox(&facts, "agent")?;
    assert_eq!((agent.host_network, agent.netns.as_deref(), agent.ips.len()), (true, None, 0));

    // The namespace is the pod's, and its addresses are those that the CNI's store has.
    let netns = frontend.netns.as_deref().context("the namespace")?;
    assert_ne!(std::fs::metadata(netns)?.ino(), u64::from(world.node.inode()?));
    ensure!(frontend.ips.len() == 2, "an IPv4 and an IPv6 address: {frontend:?}");
    for address in &frontend.ips {
        let reserved = std::fs::read_to_string(world.containerd.ipam().join("kindnet").join(address.to_string()))?;
        assert_eq!(reserved.lines().next(), Some(world.frontend.as_str()));
    }
    // libcni's cache is the machine's; of our own sandbox it says the same.
    let mut cached = facts.cni.get(&world.frontend).context("the CNI's result")?.clone();
    let mut addresses = frontend.ips.clone();
    cached.sort();
    addresses.sort();
    assert_eq!(cached, addresses);
    Ok(())
}

#[test]
fn listeners_chains_and_a_stopped_pod_are_real() -> Result<()> {
    if !may_run("a container runtime") {
        return Ok(());
    }
    let world = World::new()?;
    let address = sandbox(&world.facts()?, "frontend-a")?.ips[0];
    let facts = wait_for_listener(&world, address)?;
    let listeners = facts.listeners.get().map_err(|why| anyhow::anyhow!("{why}"))?;
    assert_eq!(listeners.listens(Proto::Tcp, address, 8081), Some(false));
    let ports = listeners.ports(Proto::Tcp, address).context("the pod's sockets")?;
    let [(80, Some(process))] = ports.as_slice() else { panic!("port 80 alone: {ports:?}") };
    ensure!(process.starts_with("busybox/"), "{process}");
    assert_eq!(facts.name_at(address).as_deref(), Some("default/frontend-a"));

    // portmap's chain is named after the network and the sandbox.
    let rules = world.node.exec(["iptables-save", "-t", "nat"])?;
    let chain = chain_of(&world.frontend);
    ensure!(rules.contains(&format!(":{chain} ")), "no {chain} in {rules}");
    ensure!(rules.contains(&format!("-A {chain} -p tcp -m tcp --dport 9088 -j DNAT --to-destination {address}:8081")));

    world.containerd.stop_pod(&world.frontend)?;
    let facts = world.facts()?;
    let stopped = sandbox(&facts, "frontend-a")?;
    assert_eq!((stopped.ready, stopped.netns.as_deref(), stopped.ips.len()), (false, None, 0));
    assert_eq!(facts.sandbox_at(address), None);
    Ok(())
}

/// The whole story: a hostPort that leads to a port where nothing listens, seen from outside.
#[test]
fn a_refusal_names_the_pod_and_what_its_image_exposes() -> Result<()> {
    if !may_run("a container runtime") {
        return Ok(());
    }
    let world = World::new()?;
    let address = sandbox(&world.facts()?, "frontend-a")?.ips[0];
    wait_for_listener(&world, address)?;
    let outside = Netns::new("outside")?;
    world.node.exec(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", outside.name()])?;
    for (netns, own) in [(&world.node, "172.18.0.3/16"), (&outside, "172.18.0.100/16")] {
        netns.exec(["ip", "addr", "add", own, "dev", "eth0"])?;
        netns.exec(["ip", "link", "set", "eth0", "up"])?;
    }
    let bin = tempfile::tempdir()?;
    let tools = Tools::new(bin.path().to_owned(), IptablesFlavour::Nft)?;
    let socket = world.containerd.socket();
    let arguments = ["9088", "--cri-socket", socket.to_str().context("a path")?];
    let mut watch = Watch::start(&world.node, &tools, &arguments)?;
    let request = Connect::new(Transport::Tcp, "172.18.0.3:9088".parse()?);
    let answer = outside.run_in(|| connect(&request))??;
    let original = Tuple::new(Proto::Tcp, answer.local, answer.to);
    let told = watch.connection(original, Duration::from_secs(20))?;
    let text = told.verdict["text"].as_str().context("a verdict")?;
    let cause =
        "no-listener: nothing listens on 8081 in pod default/frontend-a (it listens on 80; the image exposes 80/tcp)";
    ensure!(text.ends_with(cause), "{text}");
    ensure!(told.verdict["finding"]["id"] == "no-listener", "{}", told.verdict);
    let change = "set containerPort 8081 (hostPort 9088) in pod default/frontend-a to 80";
    ensure!(told.verdict["advice"] == change, "{}", told.verdict);
    Ok(())
}

/// `simulate --pod NAME` on a live node.
#[test]
fn a_packet_is_simulated_from_a_pod_by_its_name() -> Result<()> {
    if !may_run("a container runtime") {
        return Ok(());
    }
    let world = World::new()?;
    let frontend = sandbox(&world.facts()?, "frontend-a")?.clone();
    let source = frontend.ips.iter().find(|address| address.is_ipv4()).context("an IPv4 address")?;
    let socket = world.containerd.socket();
    let run = |pod: &str| -> Result<(Option<i32>, String, String)> {
        let mut command = world.node.command(porttrace()?);
        command.args(["simulate", "127.0.0.1:9088", "--json", "--pod", pod, "--cri-socket"]).arg(&socket);
        let output = command.output()?;
        Ok((output.status.code(), String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?))
    };
    for name in ["frontend-a", "default/frontend-a"] {
        let (code, answer, said) = run(name)?;
        assert_eq!(code, Some(0), "{said}");
        let answer: serde_json::Value = serde_json::from_str(&answer)?;
        assert_eq!(answer["packet"]["src"], source.to_string(), "{answer:#}");
        let way = world.node.exec(["ip", "-j", "route", "get", &source.to_string()])?;
        let way: serde_json::Value = serde_json::from_str(&way)?;
        assert_eq!(answer["packet"]["in"], way[0]["dev"], "{answer:#}");
    }
    let (code, _, said) = run("agent")?;
    ensure!(code == Some(2) && said.contains("uses the node's own network"), "{said}");
    let (code, _, said) = run("nobody")?;
    ensure!(code == Some(2) && said.contains("no pod \"nobody\" is known here, but default/frontend-a"), "{said}");
    Ok(())
}

/// Environment, labels and annotations of pods, containers and images stay where they are.
#[test]
fn a_snapshot_of_real_pods_holds_no_secrets() -> Result<()> {
    if !may_run("a container runtime") {
        return Ok(());
    }
    let world = World::new()?;
    let collected = world.node.run_in(|| facts::collect(&world.options()))?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("node.tar.zst");
    snapshot::write(&collected.files, &path)?;
    let files = snapshot::read_files(&path)?;
    for (name, bytes) in &files {
        ensure!(
            !bytes.windows(6).any(|part| part == b"SECRET"),
            "a secret in {name}: {}",
            String::from_utf8_lossy(bytes)
        );
    }
    let facts = porttrace_user::core::parse::facts(&files);
    let frontend = sandbox(&facts, "frontend-a")?;
    assert_eq!(frontend.containers[0].exposed.as_ref().map(Vec::len), Some(2));
    ensure!(files.contains_key("netns/default_frontend-a/state.json"), "{:?}", files.keys());
    ensure!(matches!(facts.listeners, Part::Known(_)), "{:?}", facts.listeners);
    Ok(())
}

fn wait_for_listener(world: &World, address: IpAddr) -> Result<Facts> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let facts = world.facts()?;
        let listens = facts.listeners.known().and_then(|known| known.listens(Proto::Tcp, address, 80));
        if listens == Some(true) {
            return Ok(facts);
        }
        ensure!(Instant::now() < deadline, "nothing listens on {address}:80: {:?}", facts.listeners);
    }
}

/// utils/utils.go of the CNI plugins, `FormatChainName`.
fn chain_of(sandbox: &str) -> String {
    let digest = Sha512::digest(format!("{NETWORK}{sandbox}"));
    let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("CNI-DN-{}", &digits[..21])
}
