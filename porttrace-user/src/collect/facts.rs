//! All that can be had of this node and its pods at once: the node's state, the Kubernetes API, the container runtime, the pods'
//! network namespaces, the CNI's results. Each is optional, and named when it is missing.

use super::live::{self, Collected};
use super::pods::{self, Namespace};
use super::{Timings, cni, kube_proxy, kubernetes, netlink};
use crate::core::model::cluster::{Part, Sandbox};
use crate::core::model::facts::Facts;
use crate::core::parse::{self, Files, Metadata, iproute};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

/// Where to ask, beyond what the node itself tells.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub node: live::Options,
    /// The container runtime's socket; without one it is looked for.
    pub cri_socket: Option<PathBuf>,
    /// The kubeconfig; without one it is looked for.
    pub kubeconfig: Option<PathBuf>,
    /// This node's name in the cluster; without one it is found out.
    pub node_name: Option<String>,
    /// Leave the Kubernetes API alone.
    pub without_api: bool,
}

/// Collects everything and turns it into facts. Never fails: each part that could not be had says why.
pub fn read(options: &Options) -> (Facts, Timings) {
    let Collected { files, mut timings } = collect(options);
    let facts = timings.measure("parse", || parse::facts(&files));
    (facts, timings)
}

/// Collects everything as the files of a snapshot, its parts side by side. What objects carry beyond the model
/// (environment, annotations, secrets) is in none of them.
pub fn collect(options: &Options) -> Collected {
    let start = Instant::now();
    // The state belongs to the calling thread's network namespace, and so do the threads that it starts.
    let (mut collected, parts) = thread::scope(|scope| {
        let pods = scope.spawn(|| ("pods", pods(options), Remarks::default(), start.elapsed()));
        let cluster = scope.spawn(|| {
            let (files, remarks) = if options.without_api { Default::default() } else { cluster(options) };
            ("kubernetes", files, remarks, start.elapsed())
        });
        let proxy = scope.spawn(|| ("kube-proxy", proxy(), Remarks::default(), start.elapsed()));
        (live::collect(options.node), [pods.join(), cluster.join(), proxy.join()])
    });
    let mut remarks = Remarks::default();
    for part in parts {
        match part {
            Ok((name, files, more, took)) => {
                collected.files.extend(files);
                collected.timings.add(name, took);
                remarks.node = remarks.node.or(more.node);
                remarks.missing.extend(more.missing);
            }
            Err(_) => remarks.missing.push("one part of the collection broke off".to_owned()),
        }
    }
    remark(&mut collected.files, remarks);
    collected.timings.total = start.elapsed();
    collected
}

/// What the parts say about the collection itself.
#[derive(Default)]
struct Remarks {
    /// This node's name in the cluster.
    node: Option<String>,
    missing: Vec<String>,
}

/// Notes it where the collection says the like of the node.
fn remark(files: &mut Files, remarks: Remarks) {
    const NAME: &str = "snapshot.json";
    let known = files.get(NAME).and_then(|text| serde_json::from_slice::<Metadata>(text).ok());
    let mut metadata = known.unwrap_or_default();
    metadata.node = remarks.node.or(metadata.node);
    metadata.missing.extend(remarks.missing);
    write(files, NAME, &metadata);
}

/// How to ask the Kubernetes API, from the network namespace of the calling thread.
pub fn kubernetes_options(options: &Options) -> kubernetes::Options {
    let addresses = netlink::read().addresses.unwrap_or_default();
    kubernetes::Options {
        kubeconfig: options.kubeconfig.clone(),
        node_name: options.node_name.clone(),
        addresses: addresses.into_iter().map(|own| own.address).filter(|own| !own.is_loopback()).collect(),
    }
}

fn cluster(options: &Options) -> (Files, Remarks) {
    let answer = kubernetes::read(&kubernetes_options(options));
    let mut files = Files::new();
    write(&mut files, "cluster.json", &answer.cluster);
    let node = answer.cluster.known().and_then(|cluster| cluster.pods_of.clone());
    (files, Remarks { node, missing: answer.remarks })
}

/// What kube-proxy was told; no file when nothing is known of it.
fn proxy() -> Files {
    let mut files = Files::new();
    if let Part::Known(config) = kube_proxy::read() {
        let mode = format!("{}\n", config.mode);
        files.insert("proxy-mode.txt".to_owned(), mode.into_bytes());
        files.insert("kube-proxy-config.json".to_owned(), parse::kube_proxy::write(&config).into_bytes());
    }
    files
}

/// The runtime's sandboxes, then the namespaces that it names and those that it does not know.
fn pods(options: &Options) -> Files {
    let sandboxes = sandboxes(options);
    let known: &[Sandbox] = sandboxes.known().map_or(&[], Vec::as_slice);
    let namespaces = pods::namespaces(known);
    let mut files = Files::new();
    write(&mut files, "cri.json", &sandboxes);
    for namespace in &namespaces {
        write(&mut files, &format!("netns/{}/state.json", file_name(&namespace.name)), &state(namespace));
    }
    let found = match &namespaces {
        Part::Known(_) => Part::Known(()),
        Part::Missing(why) => Part::Missing(why.clone()),
    };
    write(&mut files, "netns.json", &found);
    let results: BTreeMap<String, Value> = cni::results();
    if !results.is_empty() {
        write(&mut files, "cni-results.json", &results);
    }
    files
}

/// The container runtime's sandboxes.
#[cfg(feature = "cri")]
pub fn sandboxes(options: &Options) -> Part<Vec<Sandbox>> {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(super::cri::read(options.cri_socket.as_deref())),
        Err(error) => Part::Missing(format!("the container runtime was not asked: {error}")),
    }
}

/// The container runtime's sandboxes: not in this build.
#[cfg(not(feature = "cri"))]
pub fn sandboxes(_: &Options) -> Part<Vec<Sandbox>> {
    Part::Missing("this porttrace was built without the feature `cri`, and asks no container runtime".to_owned())
}

/// A namespace in the shape in which snapshots keep it.
fn state(namespace: &Namespace) -> Value {
    // What the writer makes is JSON.
    let addresses: Value = serde_json::from_str(&iproute::write_addresses(&namespace.addresses)).unwrap_or_default();
    let listing = parse::sockets::write(&namespace.sockets);
    let listen: Vec<Vec<&str>> = listing.lines().map(|line| line.split_ascii_whitespace().collect()).collect();
    json!({"addr": addresses, "listen": listen})
}

/// Names come from a container runtime and from a folder: what no pod's name can have is written as a dash.
fn file_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
    let name: String = name.chars().map(plain).collect();
    if name.trim_matches('.').is_empty() { "unnamed".to_owned() } else { name }
}

fn write(files: &mut Files, name: &str, value: &impl Serialize) {
    // Plain data with string keys always serialises.
    let text = serde_json::to_string_pretty(value).unwrap_or_default() + "\n";
    files.insert(name.to_owned(), text.into_bytes());
}
