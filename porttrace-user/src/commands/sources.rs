//! Options of every command that looks at a live node: whom to ask.

use clap::Args;
use porttrace_user::collect::{facts, live};
use std::path::PathBuf;

#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "On a live node")]
pub struct Sources {
    /// The container runtime's socket (else looked for: containerd, CRI-O, k3s, k0s, microk8s)
    #[arg(long, value_name = "PATH")]
    cri_socket: Option<PathBuf>,
    /// How to reach the Kubernetes API (else KUBECONFIG, the pod's service account, the kubelet's or your own)
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// This node's name in the cluster (else NODE_NAME, the host's name, or the Node with our address)
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
}

impl Sources {
    /// What to collect, with these sources.
    pub fn options(&self, node: live::Options) -> facts::Options {
        facts::Options {
            node,
            cri_socket: self.cri_socket.clone(),
            kubeconfig: self.kubeconfig.clone(),
            node_name: self.node_name.clone(),
            without_api: false,
        }
    }
}
