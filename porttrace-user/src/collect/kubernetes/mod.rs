//! The Kubernetes API: this node's pods, the cluster's Services and EndpointSlices, this Node. Only list, get and watch are
//! asked for, each part may be refused alone, and nobody waits long for an API server that does not answer.

mod access;
mod list;
mod watch;

use crate::core::model::cluster::{Cluster, Part};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

pub use access::{Api, ApiError};
pub use watch::Watch;

/// Whom to ask, and as which node.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A kubeconfig; without one `KUBECONFIG`, the pod's service account, the kubelet's and the user's own are tried.
    pub kubeconfig: Option<PathBuf>,
    /// This node's name in the cluster; without one it is found by `NODE_NAME`, the host's name, or an address.
    pub node_name: Option<String>,
    /// This node's addresses, by which its Node object is told from others.
    pub addresses: Vec<IpAddr>,
}

/// The longest wait for the first answer, and for each page after it.
const PATIENCE: Duration = Duration::from_secs(3);
/// The longest wait for everything, with an API server that answers, but slowly.
const ALL: Duration = Duration::from_secs(10);

/// What the API said, and remarks about objects that were not understood.
#[derive(Clone, Debug)]
pub struct Answer {
    pub cluster: Part<Cluster>,
    pub remarks: Vec<String>,
}

/// Asks once for everything. Returns in a few seconds whatever the other side does.
pub fn read(options: &Options) -> Answer {
    let missing = |why: String| Answer { cluster: Part::Missing(why), remarks: Vec::new() };
    let (sender, receiver) = mpsc::channel();
    let options = options.clone();
    // On a thread of its own, which may outlive us: a kubeconfig can name a program that makes the credentials, and
    // nothing ends that one when it hangs.
    thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        let connected = runtime.block_on(access::connect(&options));
        // Nobody may be waiting any more.
        if sender.send(None).is_err() {
            return;
        }
        let answer = match connected {
            Ok(api) => runtime.block_on(list::all(&api, &options)),
            Err(error) => missing(error.to_string()),
        };
        drop(sender.send(Some(answer)));
        runtime.shutdown_background();
    });
    match receiver.recv_timeout(PATIENCE) {
        Ok(_) => {}
        Err(mpsc::RecvTimeoutError::Disconnected) => return missing("the Kubernetes API was not asked".to_owned()),
        Err(mpsc::RecvTimeoutError::Timeout) => {
            return missing("the program that the kubeconfig names for its credentials does not end".to_owned());
        }
    }
    match receiver.recv_timeout(ALL + PATIENCE) {
        Ok(Some(answer)) => answer,
        _ => missing("the Kubernetes API did not answer in time".to_owned()),
    }
}
