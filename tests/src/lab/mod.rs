//! The lab: three nodes, an outside client and pods, with real CNI plugins and kube-proxy's real rules.
//!
//! The story: the image of pod `frontend` listens on 80, but its manifest says `containerPort: 8081, hostPort: 9088`
//! ([`Phase::Broken`]), until somebody writes 80 ([`Phase::Fixed`], [`Lab::repair`]).

pub mod cni;
pub mod conntrack;
pub mod native;
pub mod nfacct;
mod node;
pub mod pod;
pub mod proxy;
pub mod rules;
pub mod topology;

use crate::netns::Netns;
use crate::peer::{self, Answer, Connect, Transport};
use anyhow::{Context, Result, anyhow};
use cni::{Interface, PortMapping};
use pod::{Ground, Pod, PodSpec};
use rules::{IptablesFlavour, KUBE_PROXY_V4, KUBE_PROXY_V6, Tools};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use topology::{CLIENT, DNS, FRONTEND, HOST_PORT, NodeName};

/// Where the story stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Phase {
    /// hostPort 9088 leads to 8081, where nothing listens.
    #[default]
    Broken,
    /// hostPort 9088 leads to 80.
    Fixed,
}

impl Phase {
    /// The containerPort of pod `frontend`.
    pub const fn container_port(self) -> u16 {
        match self {
            Self::Broken => 8081,
            Self::Fixed => 80,
        }
    }
}

/// What lab to make.
#[derive(Clone, Copy, Debug, Default)]
pub struct LabOptions {
    pub phase: Phase,
    pub flavour: IptablesFlavour,
    pub interface: Interface,
    /// The servers log no requests ([`Pod::served`] then finds none): for measuring.
    pub quiet: bool,
    /// The pods run no servers: whoever raises the lab brings its own ([`crate::load::Servers`]).
    pub bare: bool,
}

/// Where a connection to worker3 starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// worker3 itself, by its address.
    Node,
    /// worker3 itself, by 127.0.0.1 or ::1.
    Loopback,
    /// worker2.
    OtherNode,
    /// The client outside of the cluster.
    Outside,
    /// Pod `client` on worker3.
    Pod,
    /// Pod `client` on worker2.
    OtherPod,
}

impl Origin {
    pub const ALL: [Self; 6] = [Self::Node, Self::Loopback, Self::OtherNode, Self::Outside, Self::Pod, Self::OtherPod];

    /// worker3's address as this client writes it.
    pub const fn target(self, v6: bool) -> IpAddr {
        match (self, v6) {
            (Self::Loopback, false) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            (Self::Loopback, true) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            (_, false) => IpAddr::V4(NodeName::Worker3.v4()),
            (_, true) => IpAddr::V6(NodeName::Worker3.v6()),
        }
    }
}

/// A running lab. Dropping it removes everything, with CNI DEL for every pod.
pub struct Lab {
    pods: BTreeMap<(&'static str, NodeName), Pod>,
    nodes: BTreeMap<NodeName, Ground>,
    pub outside: Netns,
    pub switch: Netns,
    pub tools: Arc<Tools>,
    _directory: TemporaryDirectory,
}

impl Lab {
    /// Raises the lab; everything is ready when this returns.
    ///
    /// # Errors
    /// Not root, a missing tool (ip, iptables, the CNI plugins), or one that failed: the error says which and how.
    pub fn up(options: LabOptions) -> Result<Self> {
        check_tools(options)?;
        let directory = TemporaryDirectory::new()?;
        let bin = directory.subdirectory("bin")?;
        let tools = Arc::new(Tools::new(bin, options.flavour)?);
        let switch = node::switch()?;
        let outside = node::outside(&switch)?;
        let mut nodes = BTreeMap::new();
        let mut pods = BTreeMap::new();
        for raised in raise_nodes(&switch, &directory, &tools, options) {
            let (name, ground, started) = raised?;
            nodes.insert(name, ground);
            pods.extend(started.into_iter().map(|pod| ((pod.spec.name, name), pod)));
        }
        Ok(Self { pods, nodes, outside, switch, tools, _directory: directory })
    }

    /// A node's namespace.
    pub fn node(&self, name: NodeName) -> &Netns {
        &self.nodes[&name].node
    }

    /// A pod by name (`frontend`, `dns`, `client`) and node.
    pub fn pod(&self, name: &'static str, node: NodeName) -> Result<&Pod> {
        self.pods.get(&(name, node)).ok_or_else(|| anyhow!("no pod {name} on {}", node.name()))
    }

    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// The namespace in which a client sits.
    pub fn netns(&self, origin: Origin) -> Result<&Netns> {
        Ok(match origin {
            Origin::Node | Origin::Loopback => self.node(NodeName::Worker3),
            Origin::OtherNode => self.node(NodeName::Worker2),
            Origin::Outside => &self.outside,
            Origin::Pod => &self.pod("client", NodeName::Worker3)?.netns,
            Origin::OtherPod => &self.pod("client", NodeName::Worker2)?.netns,
        })
    }

    /// Connects once from a client.
    pub fn connect(&self, origin: Origin, request: &Connect) -> Result<Answer> {
        self.netns(origin)?.run_in(|| peer::connect(request))?
    }

    /// Connects once to worker3's port (hostPort, NodePort), by the address that this client would use.
    pub fn connect_to_node(&self, origin: Origin, proto: Transport, v6: bool, port: u16) -> Result<Answer> {
        self.connect(origin, &Connect::new(proto, SocketAddr::new(origin.target(v6), port)))
    }

    /// Replaces a pod: CNI DEL, a changed spec, a new sandbox.
    pub fn redeploy(&mut self, name: &'static str, node: NodeName, change: impl FnOnce(&mut PodSpec)) -> Result<()> {
        let old = self.take_pod(name, node)?;
        let mut spec = old.spec.clone();
        old.stop()?;
        change(&mut spec);
        self.start_pod(spec).map(drop)
    }

    /// Adds a pod.
    ///
    /// # Errors
    /// When there is one of this name on the node, or it cannot be attached.
    pub fn start_pod(&mut self, spec: PodSpec) -> Result<&mut Pod> {
        let key = (spec.name, spec.node);
        if self.pods.contains_key(&key) {
            return Err(anyhow!("there is a pod {} on {} already", spec.name, spec.node.name()));
        }
        let pod = Pod::start(spec, self.nodes[&key.1].clone())?;
        Ok(self.pods.entry(key).or_insert(pod))
    }

    /// Takes a pod out of the lab: to stop it, or to leave its leftovers behind.
    pub fn take_pod(&mut self, name: &'static str, node: NodeName) -> Result<Pod> {
        self.pods.remove(&(name, node)).ok_or_else(|| anyhow!("no pod {name} on {}", node.name()))
    }

    /// As [`Lab::pod`], to change its server.
    pub fn pod_mut(&mut self, name: &'static str, node: NodeName) -> Result<&mut Pod> {
        self.pods.get_mut(&(name, node)).ok_or_else(|| anyhow!("no pod {name} on {}", node.name()))
    }

    /// Redeploys pod `frontend` of worker3 with the right containerPort: a new sandbox with the same address.
    pub fn repair(&mut self) -> Result<()> {
        let node = NodeName::Worker3;
        self.redeploy("frontend", node, |spec| spec.mappings = host_port_mappings(Phase::Fixed))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        pod::stop_all(std::mem::take(&mut self.pods).into_values());
    }
}

/// The story's hostPorts.
fn host_port_mappings(phase: Phase) -> Vec<PortMapping> {
    let container_port = phase.container_port();
    ["tcp", "udp"]
        .map(|protocol| PortMapping { host_port: HOST_PORT, container_port, protocol, host_ip: None })
        .to_vec()
}

fn pod_specs(node: NodeName, phase: Phase) -> Vec<PodSpec> {
    let mappings = if node == NodeName::Worker3 { host_port_mappings(phase) } else { Vec::new() };
    let mut specs = vec![
        PodSpec { mappings, tcp: vec![80], udp: vec![80], ..PodSpec::new("frontend", node, FRONTEND) },
        PodSpec { udp: vec![53], ..PodSpec::new("dns", node, DNS) },
    ];
    if node != NodeName::Worker {
        specs.push(PodSpec::new("client", node, CLIENT));
    }
    specs
}

/// Every temporary directory of the lab starts like this, then `<pid>-<random>`.
const DIRECTORY_PREFIX: &str = "ptlab-";

type RaisedNode = (NodeName, Ground, Vec<Pod>);

/// The nodes with their pods, each on a thread of its own.
fn raise_nodes(
    switch: &Netns,
    directory: &TemporaryDirectory,
    tools: &Arc<Tools>,
    options: LabOptions,
) -> Vec<Result<RaisedNode>> {
    thread::scope(|scope| {
        let threads = NodeName::ALL.map(|name| {
            scope.spawn(move || {
                raise_node(switch, directory, tools.clone(), options, name)
                    .with_context(|| format!("raising {}", name.name()))
            })
        });
        threads.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).into()
    })
}

fn raise_node(
    switch: &Netns,
    directory: &TemporaryDirectory,
    tools: Arc<Tools>,
    options: LabOptions,
    name: NodeName,
) -> Result<RaisedNode> {
    let netns = node::node(switch, name)?;
    nfacct::create(&netns)?;
    tools.restore(&netns, "iptables", KUBE_PROXY_V4)?;
    tools.restore(&netns, "ip6tables", KUBE_PROXY_V6)?;
    let data = directory.subdirectory(name.name())?;
    let ground = Ground { node: Arc::new(netns), data, tools, interface: options.interface };
    let mut pods = Vec::new();
    for spec in pod_specs(name, options.phase) {
        let mut spec = PodSpec { quiet: options.quiet, ..spec };
        if options.bare {
            (spec.tcp, spec.udp) = (Vec::new(), Vec::new());
        }
        pods.push(Pod::start(spec, ground.clone())?);
    }
    Ok((name, ground, pods))
}

fn check_tools(options: LabOptions) -> Result<()> {
    let needed = [
        ("iptables", Path::new("/usr/sbin").join(options.flavour.binary())),
        ("containernetworking-plugins", Path::new(cni::PLUGINS).join("portmap")),
    ];
    for (package, path) in needed {
        if !path.exists() {
            return Err(anyhow!("{} is missing: install {package}", path.display()));
        }
    }
    Ok(())
}

/// A directory of our own, removed with everything in it.
struct TemporaryDirectory(PathBuf);

impl TemporaryDirectory {
    fn new() -> Result<Self> {
        let home = std::env::temp_dir();
        remove_leftovers(&home);
        let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("making a unique name")?;
        let path = home.join(format!("{DIRECTORY_PREFIX}{}-{}", std::process::id(), id.trim()));
        std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }

    fn subdirectory(&self, name: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for TemporaryDirectory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{} stays behind: {error}", self.0.display());
        }
    }
}

/// Directories of processes that were killed before they could remove them.
fn remove_leftovers(home: &Path) {
    for entry in std::fs::read_dir(home).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner =
            name.to_str().and_then(|name| name.strip_prefix(DIRECTORY_PREFIX)?.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // Somebody else may be sweeping too.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
