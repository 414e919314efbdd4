//! A real containerd of our own: its root, state and socket in a temporary folder, its pods' network made by the real CNI
//! plugins in a network namespace that plays the node. Everything is gone when the guard is dropped.

mod config;
pub mod crio;
mod image;
mod traces;

use crate::lab::cni::PLUGINS;
use crate::netns::{ChildGuard, Netns, run};
use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{self, NamespaceMode, NamespaceOption};
use nix::sys::signal::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

pub use image::Image;

/// The name of the pods' network, which the names of portmap's chains are made from.
pub const NETWORK: &str = "kindnet";
/// Where libcni keeps what the plugins answered; containerd gives it no other place.
const RESULTS: &str = "/var/lib/cni/results";
/// The image of the sandboxes' own process.
const PAUSE: &str = "docker.io/local/pause:1";
/// How long containerd may take to answer, on a busy machine.
const START: Duration = Duration::from_secs(60);

/// A pod to be started.
#[derive(Clone, Copy, Debug)]
pub struct PodSpec<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub host_network: bool,
    /// Host port and container port, over TCP.
    pub host_port: Option<(u16, u16)>,
}

/// containerd in the network namespace of a node. Dropping it ends its pods and removes its files, also while panicking.
pub struct Containerd {
    daemon: ChildGuard,
    folder: TempDir,
    cgroup: String,
    tokio: tokio::runtime::Runtime,
    sandboxes: Mutex<Vec<String>>,
}

impl Containerd {
    /// Starts it in `node`, and waits until its CRI answers.
    pub fn start(node: &Netns) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("porttrace-containerd-").tempdir()?;
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("cni"))?;
        fs::write(at("cni/10-test.conflist"), config::network(NETWORK, &at("ipam")))?;
        fs::write(at("config.toml"), config::containerd(folder.path(), PLUGINS, PAUSE))?;
        let daemon = node.spawn(["containerd".as_ref(), "--config".as_ref(), at("config.toml").as_os_str()])?;
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let cgroup = format!("/porttrace-{}-{}", std::process::id(), node.name());
        let containerd = Self { daemon, folder, cgroup, tokio, sandboxes: Mutex::default() };
        let booted = |line: &str| line.contains("containerd successfully booted").then_some(());
        if containerd.daemon.stderr.wait_for(START, booted).is_none() {
            bail!("containerd does not come up; it said {:?}", containerd.daemon.stderr.snapshot());
        }
        containerd.load(&Image { name: PAUSE, command: &["sleep", "100000"], exposed: &[], env: &[] })?;
        Ok(containerd)
    }

    /// The socket on which CRI answers.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("containerd.sock")
    }

    /// Where host-local keeps the addresses that it gave away.
    pub fn ipam(&self) -> PathBuf {
        self.folder.path().join("ipam")
    }

    /// The daemon's process ID.
    pub fn id(&self) -> u32 {
        self.daemon.id()
    }

    /// Makes an image known, as `ctr images import` does with what `docker save` wrote.
    pub fn load(&self, image: &Image) -> Result<()> {
        let file = self.folder.path().join("image.tar");
        fs::write(&file, image.archive()?)?;
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(self.socket()).args(["--namespace", "k8s.io", "images", "import"]);
        run(ctr.args(["--snapshotter", "native"]).arg(&file), None).map(drop)
    }

    /// Starts a pod with one container of an image that is known; its sandbox's ID.
    pub fn run_pod(&self, pod: PodSpec, image: &str) -> Result<String> {
        self.tokio.block_on(async {
            let channel = self.channel().await?;
            let mut runtime = RuntimeServiceClient::new(channel.clone());
            let sandbox_config = self.sandbox_config(pod);
            let sandbox = v1::RunPodSandboxRequest { config: Some(sandbox_config.clone()), ..Default::default() };
            let id = runtime.run_pod_sandbox(sandbox).await.context("RunPodSandbox")?.into_inner().pod_sandbox_id;
            self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner).push(id.clone());
            let container = v1::ContainerConfig {
                metadata: Some(v1::ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
                image: Some(v1::ImageSpec { image: image.to_owned(), ..Default::default() }),
                envs: vec![v1::KeyValue { key: "PASSWORD".to_owned(), value: "SECRET-container-env".to_owned() }],
                annotations: [("note".to_owned(), "SECRET-container-annotation".to_owned())].into(),
                log_path: "main.log".to_owned(),
                linux: Some(v1::LinuxContainerConfig::default()),
                ..Default::default()
            };
            let create = v1::CreateContainerRequest {
                pod_sandbox_id: id.clone(),
                config: Some(container),
                sandbox_config: Some(sandbox_config),
            };
            let container =
                runtime.create_container(create).await.context("CreateContainer")?.into_inner().container_id;
            let start = v1::StartContainerRequest { container_id: container };
            runtime.start_container(start).await.context("StartContainer")?;
            Ok(id)
        })
    }

    /// Stops a pod, which takes its network away; its sandbox stays known.
    pub fn stop_pod(&self, sandbox: &str) -> Result<()> {
        self.tokio.block_on(async {
            let mut runtime = RuntimeServiceClient::new(self.channel().await?);
            let stop = v1::StopPodSandboxRequest { pod_sandbox_id: sandbox.to_owned() };
            runtime.stop_pod_sandbox(stop).await.context("StopPodSandbox").map(drop)
        })
    }

    fn sandbox_config(&self, pod: PodSpec) -> v1::PodSandboxConfig {
        let network = if pod.host_network { NamespaceMode::Node } else { NamespaceMode::Pod };
        let namespaces = NamespaceOption { network: network.into(), ..Default::default() };
        let security = v1::LinuxSandboxSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
        let mapping = |(host, container): (u16, u16)| v1::PortMapping {
            host_port: host.into(),
            container_port: container.into(),
            ..Default::default()
        };
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: pod.name.to_owned(),
                uid: format!("uid-of-{}", pod.name),
                namespace: pod.namespace.to_owned(),
                attempt: 0,
            }),
            // Who shares the network namespace shares the UTS namespace, and leaves its name alone.
            hostname: if pod.host_network { String::new() } else { pod.name.to_owned() },
            log_directory: self.folder.path().join("logs").display().to_string(),
            port_mappings: pod.host_port.map(mapping).into_iter().collect(),
            labels: [("note".to_owned(), "SECRET-pod-label".to_owned())].into(),
            annotations: [("note".to_owned(), "SECRET-pod-annotation".to_owned())].into(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup.clone(),
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    async fn channel(&self) -> Result<Channel> {
        let socket = self.socket();
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(socket).await?)) }
        });
        Ok(Endpoint::from_static("http://localhost").connect_with_connector(connect).await?)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // The pods' processes first: without the daemon nobody starts them again.
        let _ = self.daemon.signal(Signal::SIGKILL);
        traces::kill_users(self.folder.path());
        traces::kill_cgroup(&self.cgroup);
        traces::unmount_below(self.folder.path());
        traces::remove_cgroup(&self.cgroup);
        for sandbox in self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for name in [format!("{NETWORK}-{sandbox}-eth0"), format!("cni-loopback-{sandbox}-lo")] {
                let _ = fs::remove_file(Path::new(RESULTS).join(name));
            }
        }
    }
}
