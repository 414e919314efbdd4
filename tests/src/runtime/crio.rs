//! CRI as CRI-O answers it: a server with one pod whose answers have the shapes of CRI-O's sources (server/version.go,
//! sandbox_list.go, sandbox_status.go, container_list.go, image_status.go; internal/oci/container.go). It runs nothing: the pod's
//! network namespace and whatever listens in it are the test's.

use anyhow::{Context, Result};
use k8s_cri::v1::image_service_server::{ImageService, ImageServiceServer};
use k8s_cri::v1::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use k8s_cri::v1::{self, ContainerState, NamespaceMode, NamespaceOption, PodSandboxState};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tonic::codegen::tokio_stream::Empty;
use tonic::codegen::tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

/// What holds a pod's namespaces, which decides what `info` tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Infra {
    /// CRI-O itself (`drop_infra_ctr`, the default): the runtime's specification is all that there is.
    Dropped,
    /// The same in older versions, which told nothing then.
    DroppedSilently,
    /// A pause container with this process.
    Process(u32),
}

/// A pod with one container `main`.
#[derive(Clone, Debug)]
pub struct Pod {
    /// The sandbox's ID.
    pub id: String,
    pub namespace: &'static str,
    pub name: &'static str,
    pub uid: &'static str,
    pub infra: Infra,
    pub netns: PathBuf,
    pub ips: Vec<IpAddr>,
    pub image: &'static str,
    pub exposed: &'static [&'static str],
}

/// ID of the pod's image, and digest of its manifest.
const IMAGE: &str = "4f2ae8c16b0a3f9d7c5e1b2a4f6d8c0e9b7a5f3d1c2e4b6a8d0f9e7c5b3a1d2f";
const DIGEST: &str = "sha256:0c6e4b8a2d9f7e5c3b1a0d8f6e4c2b9a7d5f3e1c0b8a6d4f2e9c7b5a3d1f0e8c";

/// The server. Dropping it ends it.
pub struct Crio {
    folder: TempDir,
    _tokio: Runtime,
}

impl Crio {
    pub fn start(pod: Pod) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("porttrace-crio-").tempdir()?;
        let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = {
            let _entered = tokio.enter();
            tokio::net::UnixListener::bind(folder.path().join("crio.sock")).context("binding CRI-O's socket")?
        };
        let (runtime, images) = (RuntimeServiceServer::new(pod.clone()), ImageServiceServer::new(pod));
        let server = tonic::transport::Server::builder().add_service(runtime).add_service(images);
        tokio.spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        Ok(Self { folder, _tokio: tokio })
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("crio.sock")
    }
}

impl Pod {
    fn metadata(&self) -> v1::PodSandboxMetadata {
        let [name, uid, namespace] = [self.name, self.uid, self.namespace].map(str::to_owned);
        v1::PodSandboxMetadata { name, uid, namespace, attempt: 0 }
    }

    fn sandbox(&self) -> v1::PodSandbox {
        v1::PodSandbox {
            id: self.id.clone(),
            metadata: Some(self.metadata()),
            state: PodSandboxState::SandboxReady.into(),
            created_at: 1,
            annotations: secret("annotation"),
            labels: secret("label"),
            ..v1::PodSandbox::default()
        }
    }

    fn status(&self, verbose: bool) -> v1::PodSandboxStatusResponse {
        let options = NamespaceOption { pid: NamespaceMode::Container.into(), ..NamespaceOption::default() };
        let mut ips = self.ips.iter().map(ToString::to_string);
        let network = v1::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| v1::PodIp { ip }).collect(),
        };
        let status = v1::PodSandboxStatus {
            id: self.id.clone(),
            metadata: Some(self.metadata()),
            state: PodSandboxState::SandboxReady.into(),
            created_at: 1,
            network: Some(network),
            linux: Some(v1::LinuxPodSandboxStatus { namespaces: Some(v1::Namespace { options: Some(options) }) }),
            labels: secret("label"),
            annotations: secret("annotation"),
            ..v1::PodSandboxStatus::default()
        };
        let info = if verbose { info(&self.info()) } else { HashMap::new() };
        v1::PodSandboxStatusResponse { status: Some(status), info, ..v1::PodSandboxStatusResponse::default() }
    }

    /// `createSandboxInfo`.
    fn info(&self) -> Value {
        match self.infra {
            Infra::Dropped => json!({"runtimeSpec": self.specification()}),
            Infra::DroppedSilently => json!({}),
            Infra::Process(pid) => {
                json!({"image": "registry.k8s.io/pause:3.10", "pid": pid, "runtimeSpec": self.specification()})
            }
        }
    }

    /// The OCI runtime's specification, with the namespaces that CRI-O pins (internal/config/nsmgr).
    fn specification(&self) -> Value {
        json!({
            "ociVersion": "1.2.0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["/pause"], "env": ["TOKEN=SECRET-env"], "cwd": "/"},
            "root": {"path": "/var/lib/containers/storage/overlay/merged", "readonly": true},
            "hostname": self.name,
            "annotations": {"io.kubernetes.cri-o.IP.0": self.ips[0], "note": "SECRET-annotation"},
            "linux": {
                "resources": {"cpu": {"shares": 2}},
                "cgroupsPath": format!("kubepods-besteffort.slice:crio:{}", self.id),
                "namespaces": [
                    {"type": "pid"}, {"type": "network", "path": self.netns},
                    {"type": "ipc", "path": "/var/run/ipcns/a"}, {"type": "uts", "path": "/var/run/utsns/a"},
                    {"type": "mount"},
                ],
            },
        })
    }

    /// What the kubelet asked for (an image's ID), and a digest that the image has; `user_specified_image` is not kept.
    fn container(&self) -> v1::Container {
        v1::Container {
            id: "c".repeat(64),
            pod_sandbox_id: self.id.clone(),
            metadata: Some(v1::ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: IMAGE.to_owned(), ..v1::ImageSpec::default() }),
            image_ref: self.digest(),
            image_id: IMAGE.to_owned(),
            state: ContainerState::ContainerRunning.into(),
            created_at: 2,
            labels: secret("label"),
            annotations: secret("annotation"),
        }
    }

    fn digest(&self) -> String {
        format!("{}@{DIGEST}", self.image.rsplit_once(':').map_or(self.image, |(name, _)| name))
    }

    /// An image that it does not know is no error.
    fn image(&self, asked: &str, verbose: bool) -> v1::ImageStatusResponse {
        if ![IMAGE, self.image, &self.digest()].contains(&asked) {
            return v1::ImageStatusResponse::default();
        }
        let image = v1::Image {
            id: IMAGE.to_owned(),
            repo_tags: vec![self.image.to_owned()],
            repo_digests: vec![self.digest()],
            size: 7,
            spec: Some(v1::ImageSpec::default()),
            ..v1::Image::default()
        };
        let ports: HashMap<&str, Value> = self.exposed.iter().map(|port| (*port, json!({}))).collect();
        let configuration = json!({
            "labels": {"note": "SECRET-image-label"},
            "imageSpec": {
                "created": "2026-01-01T00:00:00Z", "architecture": "amd64", "os": "linux",
                "config": {"ExposedPorts": ports, "Env": ["TOKEN=SECRET-image-env"], "Cmd": ["httpd"]},
                "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
            },
        });
        let info = if verbose { info(&configuration) } else { HashMap::new() };
        v1::ImageStatusResponse { image: Some(image), info }
    }
}

fn info(info: &Value) -> HashMap<String, String> {
    HashMap::from([("info".to_owned(), info.to_string())])
}

fn secret(kind: &str) -> HashMap<String, String> {
    HashMap::from([("note".to_owned(), format!("SECRET-{kind}"))])
}

fn version() -> v1::VersionResponse {
    v1::VersionResponse {
        version: "0.1.0".to_owned(),
        runtime_name: "cri-o".to_owned(),
        runtime_version: "1.34.0".to_owned(),
        runtime_api_version: "v1".to_owned(),
    }
}

/// Implements a service: what it answers, and then what nobody may ask it here.
macro_rules! serve {
    (
        $service:ident { $($stream:item)? }
        answers { $($call:ident($question:ident) -> $answer:ident = |$pod:ident, $asked:ident| $with:expr;)* }
        refuses { $($other:ident($other_question:ident) -> $other_answer:ty;)* }
    ) => {
        #[tonic::async_trait]
        impl $service for Pod {
            $($stream)?
            $(async fn $call(&self, request: Request<v1::$question>) -> Result<Response<v1::$answer>, Status> {
                let ($pod, $asked) = (self, request.into_inner());
                Ok(Response::new($with))
            })*
            $(async fn $other(&self, _: Request<v1::$other_question>) -> Result<Response<$other_answer>, Status> {
                Err(Status::permission_denied("porttrace asks only for lists and states"))
            })*
        }
    };
}

serve! {
    RuntimeService {
        type GetContainerEventsStream = Empty<Result<v1::ContainerEventResponse, Status>>;
    }
    answers {
        version(VersionRequest) -> VersionResponse = |_pod, _asked| version();
        list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse = |pod, _asked| v1::ListPodSandboxResponse {
            items: vec![pod.sandbox()],
        };
        pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse = |pod, asked| {
            if asked.pod_sandbox_id != pod.id {
                return Err(Status::not_found(format!("could not find pod {:?}", asked.pod_sandbox_id)));
            }
            pod.status(asked.verbose)
        };
        list_containers(ListContainersRequest) -> ListContainersResponse = |pod, _asked| v1::ListContainersResponse {
            containers: vec![pod.container()],
        };
    }
    refuses {
        run_pod_sandbox(RunPodSandboxRequest) -> v1::RunPodSandboxResponse;
        stop_pod_sandbox(StopPodSandboxRequest) -> v1::StopPodSandboxResponse;
        remove_pod_sandbox(RemovePodSandboxRequest) -> v1::RemovePodSandboxResponse;
        create_container(CreateContainerRequest) -> v1::CreateContainerResponse;
        start_container(StartContainerRequest) -> v1::StartContainerResponse;
        stop_container(StopContainerRequest) -> v1::StopContainerResponse;
        remove_container(RemoveContainerRequest) -> v1::RemoveContainerResponse;
        container_status(ContainerStatusRequest) -> v1::ContainerStatusResponse;
        update_container_resources(UpdateContainerResourcesRequest) -> v1::UpdateContainerResourcesResponse;
        reopen_container_log(ReopenContainerLogRequest) -> v1::ReopenContainerLogResponse;
        exec_sync(ExecSyncRequest) -> v1::ExecSyncResponse;
        exec(ExecRequest) -> v1::ExecResponse;
        attach(AttachRequest) -> v1::AttachResponse;
        port_forward(PortForwardRequest) -> v1::PortForwardResponse;
        container_stats(ContainerStatsRequest) -> v1::ContainerStatsResponse;
        list_container_stats(ListContainerStatsRequest) -> v1::ListContainerStatsResponse;
        pod_sandbox_stats(PodSandboxStatsRequest) -> v1::PodSandboxStatsResponse;
        list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> v1::ListPodSandboxStatsResponse;
        update_runtime_config(UpdateRuntimeConfigRequest) -> v1::UpdateRuntimeConfigResponse;
        status(StatusRequest) -> v1::StatusResponse;
        checkpoint_container(CheckpointContainerRequest) -> v1::CheckpointContainerResponse;
        get_container_events(GetEventsRequest) -> Self::GetContainerEventsStream;
        list_metric_descriptors(ListMetricDescriptorsRequest) -> v1::ListMetricDescriptorsResponse;
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> v1::ListPodSandboxMetricsResponse;
        runtime_config(RuntimeConfigRequest) -> v1::RuntimeConfigResponse;
    }
}

serve! {
    ImageService {}
    answers {
        image_status(ImageStatusRequest) -> ImageStatusResponse = |pod, asked| {
            pod.image(&asked.image.unwrap_or_default().image, asked.verbose)
        };
    }
    refuses {
        list_images(ListImagesRequest) -> v1::ListImagesResponse;
        pull_image(PullImageRequest) -> v1::PullImageResponse;
        remove_image(RemoveImageRequest) -> v1::RemoveImageResponse;
        image_fs_info(ImageFsInfoRequest) -> v1::ImageFsInfoResponse;
    }
}
