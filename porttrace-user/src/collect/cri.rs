//! What the container runtime says of the pods on this node: CRI, asked over its unix socket.
//!
//! Only questions are asked (Version and the List… and …Status calls). Of the answers, which carry environment, arguments,
//! labels and annotations too, only what [`Sandbox`] has a field for goes on.

use crate::core::model::cluster::{Container, ExposedPort, ObjectName, Part, Sandbox};
use crate::core::parse::cri as info;
use futures_util::{StreamExt, stream};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{self, ContainerState, NamespaceMode, PodSandboxState};
use std::collections::BTreeMap;
use std::future::Future;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

/// Where runtimes listen. One that serves a Kubernetes distribution alone comes before containerd's own place, where
/// a containerd of Docker's may listen, which speaks no CRI.
const SOCKETS: [&str; 6] = [
    "/run/k3s/containerd/containerd.sock",
    "/run/k0s/containerd.sock",
    "/var/snap/microk8s/common/run/containerd.sock",
    "/run/crio/crio.sock",
    "/run/cri-dockerd.sock",
    "/run/containerd/containerd.sock",
];
/// The longest wait for one answer; a runtime that hangs costs this once.
const PATIENCE: Duration = Duration::from_millis(1500);
/// The longest wait for everything, with a runtime that answers, but slowly.
const ALL: Duration = Duration::from_secs(5);
/// The kubelet takes answers of this size (pkg/kubelet/cri/remote/utils.go, `maxMsgSize`).
const LARGEST: usize = 16 << 20;
/// Questions on their way at once.
const AT_ONCE: usize = 16;

/// Why nothing is known from the runtime.
#[derive(Debug, Error)]
pub enum CriError {
    #[error("no container runtime listens in the usual places; name its socket with --cri-socket")]
    NoSocket,
    #[error("cannot reach the container runtime at {}: {why}", socket.display())]
    Connect { socket: PathBuf, why: String },
    #[error("the container runtime at {} did not answer {call} in time", socket.display())]
    Silent { socket: PathBuf, call: &'static str },
    #[error("{} speaks no CRI v1: its CRI plugin is switched off, or it is older than containerd 1.6", socket.display())]
    NotCri { socket: PathBuf },
    #[error("the container runtime at {} refused {call}: {why}", socket.display())]
    Refused { socket: PathBuf, call: &'static str, why: String },
}

/// The pods' sandboxes with their containers, sorted by pod; of this socket, or of the first usual one that speaks CRI.
/// Never waits long for a runtime that hangs.
pub async fn read(socket: Option<&Path>) -> Part<Vec<Sandbox>> {
    match find(socket).await {
        Ok(runtime) => runtime.sandboxes().await.map_or_else(|error| Part::Missing(error.to_string()), Part::Known),
        Err(error) => Part::Missing(error.to_string()),
    }
}

async fn find(socket: Option<&Path>) -> Result<Runtime, CriError> {
    if let Some(socket) = socket {
        // Kubernetes writes sockets as URLs.
        let socket = socket.to_str().and_then(|text| text.strip_prefix("unix://")).map_or(socket, Path::new);
        return Runtime::connect(socket).await;
    }
    let mut first = None;
    for socket in usual(super::host::file) {
        match Runtime::connect(&socket).await {
            Ok(runtime) => return Ok(runtime),
            Err(error) => drop(first.get_or_insert(error)),
        }
    }
    Err(first.unwrap_or(CriError::NoSocket))
}

/// The usual sockets that are there; `place` says where a file of the node is to be found.
fn usual(place: impl Fn(&'static str) -> Option<PathBuf>) -> Vec<PathBuf> {
    SOCKETS.into_iter().filter_map(place).filter(|path| is_socket(path)).collect()
}

fn is_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// A runtime that has said its name.
struct Runtime {
    socket: PathBuf,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    until: Instant,
}

impl Runtime {
    async fn connect(socket: &Path) -> Result<Self, CriError> {
        let socket = socket.to_owned();
        let failed = |why: String| CriError::Connect { socket: socket.clone(), why };
        // Before anything of HTTP/2, so that "no such file" and "permission denied" are said as such.
        let stream = UnixStream::connect(&socket).await.map_err(|error| failed(reason(&error)))?;
        let mut stream = Some(stream);
        let again = socket.clone();
        let connector = tower::service_fn(move |_| {
            let (ready, again) = (stream.take(), again.clone());
            async move {
                let stream = match ready {
                    Some(stream) => stream,
                    None => UnixStream::connect(again).await?,
                };
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        // The address is never used: the connector knows where to go.
        let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector);
        let runtime = Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(LARGEST),
            images: ImageServiceClient::new(channel).max_decoding_message_size(LARGEST),
            until: Instant::now() + ALL,
            socket,
        };
        let question = v1::VersionRequest { version: String::new() };
        runtime.ask("Version", runtime.runtime.clone().version(question)).await?;
        Ok(runtime)
    }

    async fn ask<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CriError> {
        let socket = || self.socket.clone();
        match timeout_at(self.until.min(Instant::now() + PATIENCE), answer).await {
            Err(_) => Err(CriError::Silent { socket: socket(), call }),
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) if status.code() == Code::Unimplemented => Err(CriError::NotCri { socket: socket() }),
            Ok(Err(status)) => Err(CriError::Refused { socket: socket(), call, why: status.message().to_owned() }),
        }
    }

    async fn sandboxes(&self) -> Result<Vec<Sandbox>, CriError> {
        let list = v1::ListPodSandboxRequest::default();
        let listed = self.ask("ListPodSandbox", self.runtime.clone().list_pod_sandbox(list)).await?.items;
        let mut containers = self.containers().await?;
        let each = listed.into_iter().map(|sandbox| self.sandbox(sandbox));
        let mut sandboxes: Vec<Sandbox> = Vec::new();
        let mut answers = stream::iter(each).buffer_unordered(AT_ONCE);
        while let Some(answer) = answers.next().await {
            sandboxes.extend(answer?);
        }
        for sandbox in &mut sandboxes {
            sandbox.containers = containers.remove(&sandbox.id).unwrap_or_default();
        }
        sandboxes.sort_by(|a, b| (&a.pod, &a.id).cmp(&(&b.pod, &b.id)));
        Ok(sandboxes)
    }

    /// A sandbox without its containers; `None` when it went away meanwhile.
    async fn sandbox(&self, listed: v1::PodSandbox) -> Result<Option<Sandbox>, CriError> {
        let ready = listed.state() == PodSandboxState::SandboxReady;
        let metadata = listed.metadata.unwrap_or_default();
        let sandbox = Sandbox {
            pod: ObjectName { namespace: metadata.namespace, name: metadata.name },
            pod_uid: metadata.uid,
            ready,
            id: listed.id,
            ..Sandbox::default()
        };
        if !ready {
            return Ok(Some(sandbox));
        }
        let question = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.id.clone(), verbose: true };
        match self.ask("PodSandboxStatus", self.runtime.clone().pod_sandbox_status(question)).await {
            Ok(answer) => Ok(Some(with_network(sandbox, answer))),
            Err(CriError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The containers by sandbox: of each name the one that runs, else the newest.
    async fn containers(&self) -> Result<BTreeMap<String, Vec<Container>>, CriError> {
        let list = v1::ListContainersRequest::default();
        let mut listed = self.ask("ListContainers", self.runtime.clone().list_containers(list)).await?.containers;
        let images = self.images(listed.iter().map(image_id)).await?;
        listed.sort_by_key(|container| (container.state() == ContainerState::ContainerRunning, container.created_at));
        let mut by_sandbox: BTreeMap<String, BTreeMap<String, Container>> = BTreeMap::new();
        for one in listed {
            let container = container(&one, &images);
            by_sandbox.entry(one.pod_sandbox_id).or_default().insert(container.name.clone(), container);
        }
        Ok(by_sandbox.into_iter().map(|(sandbox, all)| (sandbox, all.into_values().collect())).collect())
    }

    /// What is known of each of these images; those that the runtime does not know are left out.
    async fn images(&self, ids: impl Iterator<Item = String>) -> Result<BTreeMap<String, Image>, CriError> {
        let ids: std::collections::BTreeSet<String> = ids.filter(|id| !id.is_empty()).collect();
        let mut answers = stream::iter(ids.into_iter().map(|id| self.image(id))).buffer_unordered(AT_ONCE);
        let mut found = BTreeMap::new();
        while let Some(answer) = answers.next().await {
            found.extend(answer?);
        }
        Ok(found)
    }

    async fn image(&self, id: String) -> Result<Option<(String, Image)>, CriError> {
        let image = v1::ImageSpec { image: id.clone(), ..v1::ImageSpec::default() };
        let question = v1::ImageStatusRequest { image: Some(image), verbose: true };
        match self.ask("ImageStatus", self.images.clone().image_status(question)).await {
            Ok(answer) => {
                let names = answer.image.unwrap_or_default();
                let name = names.repo_tags.into_iter().chain(names.repo_digests).next();
                let exposed = answer.info.get("info").and_then(|text| info::exposed(text));
                Ok(Some((id, Image { name, exposed })))
            }
            Err(CriError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What ImageStatus says of an image.
struct Image {
    name: Option<String>,
    /// `None`: its configuration cannot be had.
    exposed: Option<Vec<ExposedPort>>,
}

fn with_network(mut sandbox: Sandbox, answer: v1::PodSandboxStatusResponse) -> Sandbox {
    let status = answer.status.unwrap_or_default();
    let options = status.linux.and_then(|linux| linux.namespaces?.options);
    sandbox.host_network = options.is_some_and(|options| options.network() == NamespaceMode::Node);
    if sandbox.host_network {
        return sandbox;
    }
    sandbox.netns = answer.info.get("info").and_then(|text| info::namespace(text)).map(|namespace| namespace.path());
    let network = status.network.unwrap_or_default();
    let addresses = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|more| more.ip));
    sandbox.ips = addresses.filter_map(|address| address.parse().ok()).collect();
    sandbox
}

fn container(listed: &v1::Container, images: &BTreeMap<String, Image>) -> Container {
    let image = listed.image.clone().unwrap_or_default();
    let known = images.get(&image_id(listed));
    // CRI-O repeats what the kubelet asked for, and that is the image's ID (internal/factory/container, `UserRequestedImage`).
    let tag = || known.and_then(|known| known.name.clone()).filter(|_| is_id(&image.image));
    let named = Some(image.user_specified_image.clone()).filter(|name| !name.is_empty()).or_else(tag);
    Container {
        id: listed.id.clone(),
        name: listed.metadata.as_ref().map(|metadata| metadata.name.clone()).unwrap_or_default(),
        image: named.unwrap_or(image.image),
        running: listed.state() == ContainerState::ContainerRunning,
        exposed: known.and_then(|known| known.exposed.clone()),
    }
}

/// Whether it is an image's digest, with or without its algorithm, and no name.
fn is_id(image: &str) -> bool {
    let digits = image.strip_prefix("sha256:").unwrap_or(image);
    digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// By what ImageStatus finds the image that a container was made from.
fn image_id(container: &v1::Container) -> String {
    let named = || container.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
    [&container.image_id, &container.image_ref].into_iter().find(|id| !id.is_empty()).cloned().unwrap_or_else(named)
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such socket".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied; run it as root".to_owned(),
        io::ErrorKind::ConnectionRefused => "nobody listens there".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
#[path = "cri_tests.rs"]
mod tests;
