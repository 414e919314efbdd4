//! What a node is like, as far as watching it depends on that. Collected on the spot, or read back from a report.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// All that the doctor looks at. A part that is left out reads as "not known".
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Facts {
    pub node: String,
    /// `uname -r` and `uname -m`.
    pub kernel: String,
    pub machine: String,
    pub rights: Rights,
    /// The active mode of `/sys/kernel/security/lockdown` (`none`, `integrity`, `confidentiality`).
    pub lockdown: Option<String>,
    pub trials: Trials,
    pub conntrack: Conntrack,
    pub rules: Rules,
    pub cluster: Cluster,
}

/// Who asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rights {
    pub root: bool,
    /// Capabilities without which the probe does not start.
    pub missing: Vec<String>,
    /// Capabilities without which only the pods' insides stay hidden.
    pub missing_for_pods: Vec<String>,
}

/// What became of trying something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trial {
    /// It worked; a word on how.
    Works(String),
    /// The kernel refused, with its reason.
    Fails(String),
    /// It was not tried.
    Untried(String),
}

impl Default for Trial {
    fn default() -> Self {
        Self::Untried("nobody tried it".to_owned())
    }
}

impl Trial {
    pub const fn works(&self) -> bool {
        matches!(self, Self::Works(_))
    }

    /// Why it does not work, or how it does.
    pub fn text(&self) -> &str {
        match self {
            Self::Works(text) | Self::Fails(text) | Self::Untried(text) => text,
        }
    }
}

/// The probe's own programs, loaded and attached for a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trials {
    /// Where they were attached.
    pub place: String,
    /// The kernel's types and those of nf_conntrack: every member that the probe reads has a place.
    pub types: Trial,
    /// Maps with the ring buffer, as large as `watch` makes them.
    pub maps: Trial,
    /// The TC programs pass the verifier.
    pub tc: Trial,
    pub tcx: Trial,
    pub clsact: Trial,
    pub netfilter: Trial,
    pub fentry: Trial,
    pub kprobe: Trial,
    pub ctnetlink: Trial,
    /// `tp_btf/kfree_skb` and `tp_btf/tcp_send_reset`.
    pub drops: Trial,
    pub resets: Trial,
}

/// `net.netfilter.nf_conntrack_*`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Conntrack {
    pub max: Option<u64>,
    pub count: Option<u64>,
    pub buckets: Option<u64>,
    pub events: Option<u64>,
    pub acct: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    /// One for each flavour and family that holds rules.
    pub sets: Vec<RuleSet>,
    /// Tables of native nftables rules (`ip kube-proxy`).
    pub native: Vec<String>,
    /// What could not be read, a sentence each.
    pub unread: Vec<String>,
    /// Name of a tool → its version line; `None`: installed, and says none. What is not installed is not in it.
    pub tools: BTreeMap<String, Option<String>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RuleSet {
    /// `nft` or `legacy`.
    pub flavour: String,
    /// 4 or 6.
    pub family: u8,
    pub rules: usize,
    /// kube-proxy's chains of Services (`KUBE-SVC-…`), and whether nat's base chains jump to `KUBE-SERVICES`.
    pub services: usize,
    pub kube_services: bool,
    /// portmap's chains of hostPorts (`CNI-DN-…`), and CRI-O's (`KUBE-HP-…`).
    pub host_ports: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cluster {
    /// kube-proxy's dummy interface of the IPVS mode.
    pub ipvs_interface: bool,
    /// Virtual services in `/proc/net/ip_vs`.
    pub ipvs_services: usize,
    /// Daemons of Kubernetes and its networks in this network namespace.
    pub daemons: Vec<Daemon>,
    /// CNI configurations found on the node.
    pub cni: Vec<CniConfig>,
    /// Interfaces of networks that forward in eBPF (`cilium_host`, `bpfin.cali`).
    pub ebpf_interfaces: Vec<String>,
    /// Their pins in the BPF file system.
    pub ebpf_pins: Vec<String>,
    /// TC and XDP programs of others on interfaces.
    pub programs: Vec<Program>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Daemon {
    pub name: String,
    pub pid: u32,
    /// kube-proxy's mode, where its arguments or its configuration file say one.
    pub proxy_mode: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CniConfig {
    pub file: String,
    pub plugins: Vec<String>,
    /// portmap's `backend`, where the configuration says one.
    pub portmap_backend: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Program {
    pub interface: String,
    /// `tcx ingress`, `tc egress`, `xdp`, …
    pub place: String,
    /// Empty where it has none.
    pub name: String,
}
