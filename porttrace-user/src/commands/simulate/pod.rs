//! `--pod`: a pod by address or by name, from what the node or its snapshot knows of pods.

use porttrace_user::core::model::cluster::Pod;
use porttrace_user::core::model::facts::Facts;
use porttrace_user::core::model::flow::Family;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// So many names are offered when one is not known.
const OFFERED: usize = 8;

/// The pod's address of the destination's family.
///
/// # Errors
/// One sentence on what is not known, with the names that are.
pub fn address(pod: &str, family: Family, facts: &Facts) -> Result<IpAddr, String> {
    if let Ok(address) = pod.parse() {
        return Ok(address);
    }
    let known = known(facts);
    if known.is_empty() {
        let mut why: Vec<&str> =
            [facts.cluster.pods.get().err(), facts.sandboxes.get().err()].into_iter().flatten().collect();
        why.dedup();
        let why = if why.is_empty() { "there are none".to_owned() } else { why.join("; ") };
        return Err(format!(
            "the state does not know pods by name ({why}), so that {pod:?} means nothing here: give the pod's address \
             (kubectl get pod -o wide), or put objects/pods.json into a snapshot (kubectl get pods -A -o json)"
        ));
    }
    let named: Vec<&Known> = known.values().filter(|one| one.is(pod)).collect();
    match named.as_slice() {
        [] => Err(format!("no pod {pod:?} is known here, but {}", names(known.keys()))),
        [one] => one.address(family),
        several => {
            let full = several.iter().map(|one| &one.name);
            Err(format!("{pod:?} is the name of several pods: say which, {}", names(full)))
        }
    }
}

/// A pod that has a name, and where it is.
struct Known {
    /// `namespace/name`, or a name alone.
    name: String,
    addresses: Vec<IpAddr>,
    host_network: bool,
    elsewhere: Option<String>,
}

impl Known {
    fn is(&self, asked: &str) -> bool {
        self.name == asked || self.name.rsplit_once('/').is_some_and(|(_, name)| name == asked)
    }

    fn address(&self, family: Family) -> Result<IpAddr, String> {
        let name = &self.name;
        if self.host_network {
            return Err(format!("{name} uses the node's own network: use --local, with --from where it matters"));
        }
        if let Some(node) = &self.elsewhere {
            return Err(format!("{name} runs on node {node}, not on this one: use --from with its address"));
        }
        let mine = self.addresses.iter().find(|address| Family::of(**address) == family);
        let kind = if family == Family::V4 { "IPv4" } else { "IPv6" };
        mine.copied().ok_or_else(|| match self.addresses.as_slice() {
            [] => format!("{name} has no address (yet)"),
            [only, ..] => format!("{name} has no {kind} address, only {only}"),
        })
    }
}

/// Pods by name: what the Kubernetes API says, then the container runtime; where neither says anything the CNI, and network
/// namespaces that have a name (`ip netns`).
fn known(facts: &Facts) -> BTreeMap<String, Known> {
    let mut known = BTreeMap::new();
    let gone = |pod: &&Pod| !matches!(pod.phase.as_str(), "Succeeded" | "Failed");
    for pod in facts.cluster.pods.iter().filter(gone) {
        let elsewhere = pod.node.clone().filter(|node| facts.state.name.as_ref().is_some_and(|own| own != node));
        let name = pod.name.to_string();
        let (addresses, host_network) = (pod.ips.clone(), pod.host_network);
        known.insert(name.clone(), Known { name, addresses, host_network, elsewhere });
    }
    for sandbox in facts.sandboxes.iter().filter(|sandbox| sandbox.ready) {
        let name = sandbox.pod.to_string();
        let (addresses, host_network) = (sandbox.ips.clone(), sandbox.host_network);
        known.entry(name.clone()).or_insert(Known { name, addresses, host_network, elsewhere: None });
    }
    if known.is_empty() {
        let named = facts.namespaces.iter().filter(|(name, _)| !name.starts_with("net-"));
        for (name, addresses) in named.chain(&facts.cni) {
            let outside = |address: &&IpAddr| match address {
                IpAddr::V4(four) => !four.is_loopback(),
                IpAddr::V6(six) => !six.is_loopback() && !six.is_unicast_link_local(),
            };
            let addresses = addresses.iter().filter(outside).copied().collect();
            known.insert(name.clone(), Known { name: name.clone(), addresses, host_network: false, elsewhere: None });
        }
    }
    known
}

fn names<'a>(names: impl ExactSizeIterator<Item = &'a String>) -> String {
    let count = names.len();
    let list: Vec<&str> = names.take(OFFERED).map(String::as_str).collect();
    let more = if count > list.len() { format!(" and {} more", count - list.len()) } else { String::new() };
    format!("{}{more}", list.join(", "))
}
