//! Who else works on this node's network: daemons of this network namespace, CNI configurations, eBPF programs of others.

use crate::collect::{kube_proxy, probe};
use crate::core::doctor::facts::{Cluster, CniConfig, Daemon};
use crate::core::kube::ebpf::Network;
use crate::core::model::state::Link;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Programs whose names say what decides about packets here.
const DAEMONS: [&str; 10] = [
    "kube-proxy",
    "kubelet",
    "k3s",
    "rke2",
    "cilium-agent",
    "calico-node",
    "antrea-agent",
    "ovnkube",
    "kube-router",
    "flanneld",
];
/// Where CNI configurations lie: the usual place, k3s's, and microk8s's.
const CNI: [&str; 3] =
    ["/etc/cni/net.d", "/var/lib/rancher/k3s/agent/etc/cni/net.d", "/var/snap/microk8s/current/args/cni-network"];
/// Pins that Cilium and Calico make.
const PINS: [&str; 3] = ["/sys/fs/bpf/cilium", "/sys/fs/bpf/tc/globals", "/sys/fs/bpf/calico"];

pub fn cluster(links: &[Link]) -> Cluster {
    let names = links.iter().map(|link| (link.index, link.name.clone())).collect();
    let is_ebpf = |name: &str| Network::making(name).is_some();
    Cluster {
        ipvs_interface: links.iter().any(|link| link.name == "kube-ipvs0"),
        ipvs_services: ipvs_services(),
        daemons: daemons(),
        cni: CNI.into_iter().flat_map(|directory| cni_configs(Path::new(directory))).collect(),
        ebpf_interfaces: links.iter().map(|link| link.name.clone()).filter(|name| is_ebpf(name)).collect(),
        ebpf_pins: PINS.into_iter().filter(|path| is_pinned(path)).map(str::to_owned).collect(),
        programs: probe::foreign_programs(&names),
    }
}

/// Cilium's old pins share a directory with those of iproute2.
fn is_pinned(path: &str) -> bool {
    let mut names = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.file_name());
    if path.ends_with("globals") {
        names.any(|name| name.as_encoded_bytes().starts_with(b"cil") || name.as_encoded_bytes().starts_with(b"cali"))
    } else {
        names.next().is_some()
    }
}

/// Lines of virtual services: `TCP  0A600001:01BB rr`.
fn ipvs_services() -> usize {
    let text = fs::read_to_string("/proc/thread-self/net/ip_vs").unwrap_or_default();
    text.lines().filter(|line| ["TCP ", "UDP ", "SCTP ", "FWM "].iter().any(|kind| line.starts_with(kind))).count()
}

/// Daemons in this network namespace: on a machine that plays several nodes the others' are not ours.
fn daemons() -> Vec<Daemon> {
    let namespace = |path: &Path| fs::metadata(path).map(|metadata| metadata.ino()).ok();
    let own = namespace(Path::new("/proc/thread-self/ns/net"));
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let words = kube_proxy::words(&line);
        let program = words.first().map(|word| word.rsplit('/').next().unwrap_or_default().to_owned());
        let Some(name) = program.filter(|name| DAEMONS.contains(&name.as_str())) else { continue };
        // A namespace that may not be looked at counts as ours.
        if namespace(&entry.path().join("ns/net")).is_some_and(|number| Some(number) != own) {
            continue;
        }
        let proxy_mode = if name == "kube-proxy" { proxy_mode(&entry.path(), &words) } else { None };
        found.push(Daemon { name, pid, proxy_mode });
    }
    found.sort();
    found
}

/// kube-proxy's mode, as it says itself, else as it was told, else what it takes without a word.
fn proxy_mode(process: &Path, words: &[String]) -> Option<String> {
    kube_proxy::mode_of(process, words).ok()
}

/// `.conflist` files and their plugins, sorted by name: the runtime takes the first.
fn cni_configs(directory: &Path) -> Vec<CniConfig> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(directory).into_iter().flatten().flatten().map(|file| file.path()).collect();
    files.retain(|file| file.extension().is_some_and(|kind| kind == "conflist" || kind == "conf"));
    files.sort();
    files.into_iter().filter_map(|file| cni_config(&file)).collect()
}

fn cni_config(file: &Path) -> Option<CniConfig> {
    let config: Value = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    let alone = [config.clone()];
    let plugins = config["plugins"].as_array().map_or(&alone[..], Vec::as_slice);
    let kind = |plugin: &Value| plugin["type"].as_str().map(str::to_owned);
    let portmap = plugins.iter().find(|plugin| plugin["type"] == "portmap");
    Some(CniConfig {
        file: file.display().to_string(),
        plugins: plugins.iter().filter_map(kind).collect(),
        portmap_backend: portmap.and_then(|plugin| plugin["backend"].as_str()).map(str::to_owned),
    })
}
