//! Networks that serve Services in eBPF instead of kube-proxy: there the rules do not tell where a packet goes.

use crate::core::model::state::NodeState;

/// Such a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    Cilium,
    Calico,
}

impl Network {
    /// The network that makes links of this name where it forwards in eBPF: Cilium its `cilium_…`, Calico a pair for NAT
    /// (felix/dataplane/linux/dataplanedefs).
    pub fn making(link: &str) -> Option<Self> {
        match link {
            "bpfin.cali" | "bpfout.cali" => Some(Self::Calico),
            _ => link.starts_with("cilium_").then_some(Self::Cilium),
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Cilium => "Cilium",
            Self::Calico => "Calico",
        }
    }

    /// What it takes over from kube-proxy and the CNI's portmap.
    pub const fn serves(self) -> &'static str {
        match self {
            Self::Cilium => "Services and hostPorts",
            Self::Calico => "Services",
        }
    }

    /// Whom to ask instead.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Cilium => {
                "ask Cilium (`cilium-dbg service list`, `cilium-dbg bpf lb list`), and go by what `porttrace watch` observes"
            }
            Self::Calico => "ask Calico (`calico-node -bpf nat dump`), and go by what `porttrace watch` observes",
        }
    }

    /// That, and what it costs, in a sentence.
    pub fn sentence(self) -> String {
        format!(
            "{} serves {} in eBPF here, and kube-proxy has no rules: what porttrace predicts from rules does not hold on this node",
            self.name(),
            self.serves()
        )
    }
}

/// The network that serves this node's Services in eBPF: its links are here, and nothing of kube-proxy's is.
pub fn serving(state: &NodeState) -> Option<Network> {
    let links = || state.links.iter().flatten().map(|link| link.name.as_str());
    let network = links().find_map(Network::making)?;
    let writes_nftables = state.native.iter().any(|base| base.table == "kube-proxy");
    let has_proxy = writes_iptables(state) || writes_nftables || links().any(|link| link == "kube-ipvs0");
    (!has_proxy).then_some(network)
}

/// Whether kube-proxy's iptables rules are here: chains of Services, not only the empty ones of other modes.
pub fn writes_iptables(state: &NodeState) -> bool {
    let tables = state.rulesets.iter().flat_map(|set| &set.tables).filter(|table| table.name == "nat");
    tables
        .flat_map(|table| &table.chains)
        .any(|chain| chain.name().starts_with("KUBE-SVC-") || chain.name().starts_with("KUBE-SEP-"))
}
