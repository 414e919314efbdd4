//! The way to the API server: which credentials, and what its refusals mean.

use super::{Options, PATIENCE};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;

/// The kubelet's kubeconfig: kubeadm, its old place, k3s, RKE2, k0s, microk8s.
const KUBELET: [&str; 6] = [
    "/etc/kubernetes/kubelet.conf",
    "/var/lib/kubelet/kubeconfig",
    "/var/lib/rancher/k3s/agent/kubelet.kubeconfig",
    "/var/lib/rancher/rke2/agent/kubelet.kubeconfig",
    "/var/lib/k0s/kubelet.conf",
    "/var/snap/microk8s/current/credentials/kubelet.config",
];
/// The administrator's, where a distribution writes one for root on a node: k3s, RKE2.
const ADMIN: [&str; 2] = ["/etc/rancher/k3s/k3s.yaml", "/etc/rancher/rke2/rke2.yaml"];
/// What Kubernetes mounts into a pod.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
const CONNECT: Duration = Duration::from_secs(2);

/// Why the API told nothing, or not this.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ApiError {
    #[error(
        "the Kubernetes API was not asked: there is no kubeconfig (--kubeconfig, KUBECONFIG) and no service account here"
    )]
    NoConfig,
    #[error("{from} cannot be used: {why}")]
    Config { from: String, why: String },
    #[error("the API server at {server} did not answer in time")]
    Silent { server: String },
    #[error("the API server at {server} cannot be reached: {why}")]
    Unreachable { server: String, why: String },
    #[error("the API server at {server} does not accept the credentials of {from}")]
    Unauthorized { server: String, from: String },
    #[error("forbidden: {message}")]
    Forbidden { message: String },
    #[error("the API server at {server} answered with an error: {why}")]
    Refused { server: String, code: u16, why: String },
    #[error("the API server at {server} answered what is not understood: {why}")]
    Nonsense { server: String, why: String },
    #[error("{0}")]
    Node(String),
}

/// Where the credentials come from.
enum Origin {
    File(PathBuf),
    Environment,
    ServiceAccount,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "the kubeconfig {}", path.display()),
            Self::Environment => f.write_str("the kubeconfig that KUBECONFIG names"),
            Self::ServiceAccount => f.write_str("the pod's service account"),
        }
    }
}

/// An API server, and credentials for it.
#[derive(Clone)]
pub struct Api {
    pub(super) client: Client,
    server: String,
    from: String,
}

/// Reads the credentials. Nothing is asked of the server yet.
pub(super) async fn connect(options: &Options) -> Result<Api, ApiError> {
    let origin = origin(options, Path::new("/"), |name| env::var_os(name)).ok_or(ApiError::NoConfig)?;
    let from = origin.to_string();
    let unusable = |why: String| ApiError::Config { from: from.clone(), why };
    let kubeconfig = match &origin {
        Origin::File(path) => Some(Kubeconfig::read_from(path).map_err(|error| unusable(chain(&error)))?),
        Origin::Environment => Kubeconfig::from_env().map_err(|error| unusable(chain(&error)))?,
        Origin::ServiceAccount => None,
    };
    let mut config = match kubeconfig {
        Some(kubeconfig) => Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .map_err(|error| unusable(chain(&error)))?,
        None => Config::incluster().map_err(|error| unusable(chain(&error)))?,
    };
    config.connect_timeout = Some(CONNECT);
    // Our own deadlines are shorter than its patience.
    config.default_retry = false;
    let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
    let client = Client::try_from(config).map_err(|error| unusable(chain(&error)))?;
    Ok(Api { client, server, from })
}

/// Where credentials are, below `root`; `variable` tells the environment's variables.
fn origin(options: &Options, root: &Path, variable: impl Fn(&str) -> Option<OsString>) -> Option<Origin> {
    if let Some(path) = &options.kubeconfig {
        return Some(Origin::File(path.clone()));
    }
    if variable("KUBECONFIG").is_some_and(|value| !value.is_empty()) {
        return Some(Origin::Environment);
    }
    if variable("KUBERNETES_SERVICE_HOST").is_some() && below(root, TOKEN).exists() {
        return Some(Origin::ServiceAccount);
    }
    // The kubelet's speaks of this node's own cluster; what lies at home may speak of any.
    let home = variable("HOME").map(|home| Path::new(&home).join(".kube/config"));
    let readable = |path: &PathBuf| File::open(path).is_ok();
    let usual = KUBELET.iter().chain(&ADMIN).map(|path| below(root, path));
    usual.chain(home).find(readable).map(Origin::File)
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

impl Api {
    /// What a failure of the client means.
    pub(super) fn error(&self, error: &kube::Error) -> ApiError {
        let server = self.server.clone();
        match error {
            kube::Error::Api(status) => match status.code {
                401 => ApiError::Unauthorized { server, from: self.from.clone() },
                403 => ApiError::Forbidden { message: line(&status.message) },
                code => ApiError::Refused { server, code, why: format!("{code} {}", line(&status.message)) },
            },
            kube::Error::SerdeError(error) => ApiError::Nonsense { server, why: line(&error.to_string()) },
            error => ApiError::Unreachable { server, why: root(error) },
        }
    }

    /// One answer as text, or why there is none.
    pub(super) async fn text(&self, request: http::Request<Vec<u8>>) -> Result<String, ApiError> {
        match tokio::time::timeout(PATIENCE, self.client.request_text(request)).await {
            Err(_) => Err(self.silent()),
            Ok(answer) => answer.map_err(|error| self.error(&error)),
        }
    }

    pub(super) fn silent(&self) -> ApiError {
        ApiError::Silent { server: self.server.clone() }
    }

    pub(super) fn nonsense(&self, why: &str) -> ApiError {
        ApiError::Nonsense { server: self.server.clone(), why: line(why) }
    }
}

/// An error with its causes, on one line.
fn chain(error: &dyn Error) -> String {
    let mut text = line(&error.to_string());
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = line(&error.to_string());
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// The innermost cause, which says what happened ("Connection refused", "invalid peer certificate").
fn root(error: &dyn Error) -> String {
    let mut innermost: &dyn Error = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    line(&innermost.to_string())
}

/// Text from elsewhere: one line, of bounded length, nothing that a terminal obeys.
fn line(text: &str) -> String {
    const LONGEST: usize = 300;
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A file system with these files, all empty.
    fn root(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for file in files {
            let path = below(folder.path(), file);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, "").expect("a file");
        }
        folder
    }

    /// What is found, without the root that it was looked for below.
    fn found(root: &Path, variables: &[(&str, &str)]) -> String {
        let variable =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(*value));
        let origin = origin(&Options::default(), root, variable);
        let text = origin.map_or_else(String::new, |origin| origin.to_string());
        text.replace(&root.display().to_string(), "")
    }

    #[test]
    fn credentials_are_looked_for_in_order() {
        let kubeadm = "/etc/kubernetes/kubelet.conf";
        let agent = "/var/lib/rancher/k3s/agent/kubelet.kubeconfig";
        let admin = "/etc/rancher/k3s/k3s.yaml";
        let token = "/var/run/secrets/kubernetes.io/serviceaccount/token";
        let all = root(&[kubeadm, agent, admin, token]);
        let in_pod = [("KUBERNETES_SERVICE_HOST", "10.96.0.1")];
        assert_eq!(found(all.path(), &[("KUBECONFIG", "/x"), in_pod[0]]), "the kubeconfig that KUBECONFIG names");
        assert_eq!(found(all.path(), &in_pod), "the pod's service account");
        assert_eq!(found(all.path(), &[("KUBECONFIG", "")]), format!("the kubeconfig {kubeadm}"));
        // A k3s agent has its kubelet's, a server without an agent the administrator's.
        assert_eq!(found(root(&[agent, admin]).path(), &[]), format!("the kubeconfig {agent}"));
        assert_eq!(found(root(&[admin]).path(), &[]), format!("the kubeconfig {admin}"));
        assert_eq!(found(root(&[]).path(), &in_pod), "");
        let home = root(&["/root/.kube/config"]);
        let place = home.path().join("root").display().to_string();
        assert_eq!(found(home.path(), &[("HOME", &place)]), "the kubeconfig /root/.kube/config");
    }
}
