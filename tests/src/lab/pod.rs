//! A pod: a network namespace attached by CNI, with a server inside.

use super::cni::{Attachment, Interface, PortMapping};
use super::rules::Tools;
use super::topology::NodeName;
use crate::netns::{ChildGuard, Netns};
use crate::peer::{self, Served};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What a pod shall be.
#[derive(Clone, Debug)]
pub struct PodSpec {
    pub name: &'static str,
    pub node: NodeName,
    /// Its number in the node's subnets: `.9` and `::9`.
    pub number: u8,
    pub mappings: Vec<PortMapping>,
    /// Ports that its server really listens on, TCP and UDP; no server without ports.
    pub tcp: Vec<u16>,
    pub udp: Vec<u16>,
    /// The address that its server listens on; any when `None`.
    pub listen: Option<IpAddr>,
    /// The server logs no requests.
    pub quiet: bool,
    /// The MTU of its interface, bytes.
    pub mtu: u32,
}

impl PodSpec {
    /// A pod without hostPorts and without a server.
    pub fn new(name: &'static str, node: NodeName, number: u8) -> Self {
        let (mappings, tcp, udp) = (Vec::new(), Vec::new(), Vec::new());
        Self { name, node, number, mappings, tcp, udp, listen: None, quiet: false, mtu: 1500 }
    }
}

/// What a pod needs of its node.
#[derive(Clone)]
pub struct Ground {
    pub node: Arc<Netns>,
    pub data: PathBuf,
    pub tools: Arc<Tools>,
    pub interface: Interface,
}

/// A running pod. Dropping it kills the server, runs CNI DEL and removes the namespace.
pub struct Pod {
    server: Option<ChildGuard>,
    /// Set while CNI ADD has succeeded and CNI DEL has not been run.
    attached: bool,
    pub netns: Netns,
    pub spec: PodSpec,
    ground: Ground,
    /// The sandbox ID, 64 hexadecimal digits.
    pub container_id: String,
    /// The node's end of its veth pair.
    pub host_interface: String,
}

impl Pod {
    /// Makes the namespace, attaches it and starts the server; returns when the server listens.
    pub fn start(spec: PodSpec, ground: Ground) -> Result<Self> {
        let netns = Netns::new(spec.name)?;
        super::node::no_duplicate_detection(&netns)?;
        let container_id = container_id()?;
        let mut pod =
            Self { server: None, attached: false, netns, spec, ground, container_id, host_interface: String::new() };
        let result = pod.attachment().add().with_context(|| format!("attaching pod {}", pod.spec.name))?;
        pod.attached = true;
        pod.host_interface = host_interface(&result)?;
        if !pod.spec.tcp.is_empty() || !pod.spec.udp.is_empty() {
            pod.server = Some(pod.start_server()?);
        }
        Ok(pod)
    }

    /// Its IPv4 and IPv6 address.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.spec.node.pod_v4(self.spec.number).into(), self.spec.node.pod_v6(self.spec.number).into()]
    }

    /// The first request that its server logged and that `pick` takes, waited for.
    pub fn served(&self, timeout: Duration, mut pick: impl FnMut(&Served) -> bool) -> Option<Served> {
        self.server
            .as_ref()?
            .stdout
            .wait_for(timeout, |line| serde_json::from_str::<Served>(line).ok().filter(|served| pick(served)))
    }

    /// Runs CNI DEL now, as kubelet does when a pod goes.
    pub fn stop(mut self) -> Result<()> {
        self.detach()
    }

    /// The pod is gone and nobody ran CNI DEL, as after a crash of the node: what the plugins wrote on the node stays.
    pub fn abandon(mut self) -> Result<()> {
        self.attached = false;
        self.server = None;
        // Its veth pair goes with the namespace, but the kernel takes its time.
        self.ground.node.exec(["ip", "link", "del", &self.host_interface]).map(drop)
    }

    /// Starts its server anew, on other ports or another address.
    pub fn serve(&mut self, tcp: &[u16], udp: &[u16], listen: Option<IpAddr>) -> Result<()> {
        self.server = None;
        (self.spec.tcp, self.spec.udp, self.spec.listen) = (tcp.to_vec(), udp.to_vec(), listen);
        self.server = Some(self.start_server()?);
        Ok(())
    }

    fn detach(&mut self) -> Result<()> {
        self.server = None;
        if std::mem::take(&mut self.attached) {
            self.attachment().del().with_context(|| format!("detaching pod {}", self.spec.name))?;
        }
        Ok(())
    }

    fn attachment(&self) -> Attachment<'_> {
        Attachment {
            node: &self.ground.node,
            node_name: self.spec.node,
            pod: &self.netns,
            container_id: &self.container_id,
            data: &self.ground.data,
            tools: &self.ground.tools,
            interface: self.ground.interface,
            addresses: self.addresses(),
            mappings: &self.spec.mappings,
            mtu: self.spec.mtu,
        }
    }

    fn start_server(&self) -> Result<ChildGuard> {
        let ports = |ports: &[u16]| ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
        let mut command = self.netns.command(peer::binary()?);
        let name = format!("{}@{}", self.spec.name, self.spec.node.name());
        command.args(["serve", "--name", &name]);
        for (option, list) in [("--tcp", &self.spec.tcp), ("--udp", &self.spec.udp)] {
            if !list.is_empty() {
                command.args([option, &ports(list)]);
            }
        }
        if let Some(address) = self.spec.listen {
            command.args(["--address", &address.to_string()]);
        }
        if self.spec.quiet {
            command.arg("--quiet");
        }
        let server = ChildGuard::spawn(command)?;
        let ready = server.stdout.wait_for(Duration::from_secs(10), |line| (line == "ready").then_some(()));
        if ready.is_none() {
            bail!("the server of pod {} does not get ready: {:?}", self.spec.name, server.stderr.snapshot());
        }
        Ok(server)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            eprintln!("{error:#}");
        }
    }
}

/// Removes several pods at once.
pub fn stop_all(pods: impl IntoIterator<Item = Pod>) {
    std::thread::scope(|scope| {
        for pod in pods {
            scope.spawn(move || drop(pod));
        }
    });
}

/// A fresh sandbox ID of the shape that containerd gives.
fn container_id() -> Result<String> {
    let uuid = || std::fs::read_to_string(Path::new("/proc/sys/kernel/random/uuid"));
    Ok(format!("{}{}", uuid()?, uuid()?).chars().filter(char::is_ascii_hexdigit).collect())
}

/// The interface of a CNI result that is not inside the sandbox and not the bridge.
fn host_interface(result: &Value) -> Result<String> {
    let interfaces = result["interfaces"].as_array().context("a CNI result without interfaces")?;
    interfaces
        .iter()
        .filter(|interface| interface["sandbox"].as_str().unwrap_or_default().is_empty())
        .filter_map(|interface| interface["name"].as_str())
        .find(|name| name.starts_with("veth"))
        .map(str::to_owned)
        .with_context(|| format!("no host interface in {result}"))
}
