//! Rows that were pasted without their `Chain …` line (grep leaves it out), given back to their chains: kube-proxy's and portmap's
//! chain names can be computed from what the rows say.

use super::draft::Entry;
use crate::core::kube::hash::{endpoint_suffix, service_suffix};
use crate::core::parse::words::{Words, unquote};
use std::collections::BTreeMap;

/// What a row says that tells its chain.
#[derive(Default)]
struct Said {
    comment: String,
    proto: Option<String>,
    source: Option<String>,
    ports: Vec<String>,
    to: Option<String>,
}

/// The chain of each row, `None` where it cannot be told, in the order of the rows. Rows are of table nat.
pub(super) fn chains(entries: &[&Entry]) -> Vec<Option<String>> {
    let said: Vec<Said> = entries.iter().map(|entry| Said::by(&entry.body)).collect();
    let mut found: Vec<Option<String>> = entries.iter().zip(&said).map(|(entry, said)| by_name(entry, said)).collect();
    for (at, entry) in entries.iter().enumerate() {
        if found[at].is_none() {
            found[at] = by_neighbour(entry, &said[at], entries, &said, &found);
        }
    }
    // The same jumps stand in PREROUTING and OUTPUT, which is listed later.
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    for (entry, chain) in entries.iter().zip(&mut found) {
        if chain.as_deref() == Some("PREROUTING") {
            let times = seen.entry(&entry.target).or_default();
            *times += 1;
            if *times > 1 {
                *chain = Some("OUTPUT".to_owned());
            }
        }
    }
    found
}

/// Whether a rule with this target never stands in this chain: its own `Chain …` line was left out.
pub(super) fn is_astray(chain: &str, target: &str) -> bool {
    let is = |name: &str, starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
    if target.starts_with("CNI-DN-") {
        return is(chain, &["CNI-DN-", "KUBE-", "CNI-HOSTPORT-SETMARK", "CNI-HOSTPORT-MASQ"]);
    }
    if target.starts_with("KUBE-SEP-") {
        return is(chain, &["KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-", "CNI-"]);
    }
    is(target, &["KUBE-EXT-", "KUBE-FW-"]) && is(chain, &["KUBE-SEP-", "KUBE-SVC-", "KUBE-SVL-", "CNI-"])
}

/// By the row alone.
fn by_name(entry: &Entry, said: &Said) -> Option<String> {
    let target = entry.target.as_str();
    let starts = |prefix: &str| target.starts_with(prefix);
    match target {
        "KUBE-SERVICES" | "CNI-HOSTPORT-DNAT" => return Some("PREROUTING".to_owned()),
        "KUBE-POSTROUTING" | "CNI-HOSTPORT-MASQ" => return Some("POSTROUTING".to_owned()),
        "KUBE-NODEPORTS" => return Some("KUBE-SERVICES".to_owned()),
        _ if starts("CNI-DN-") => return Some("CNI-HOSTPORT-DNAT".to_owned()),
        _ => {}
    }
    // The last rule of the chain for traffic from outside has no comment.
    if said.comment.is_empty() && said.ports.is_empty() && said.source.is_none() {
        let suffix = target.strip_prefix("KUBE-SVC-").or_else(|| target.strip_prefix("KUBE-SVL-"))?;
        return Some(format!("KUBE-EXT-{suffix}"));
    }
    let (service, rest) = said.comment.split_once(' ').unwrap_or((&said.comment, ""));
    if let Some(endpoint) = rest.strip_prefix("-> ").filter(|_| starts("KUBE-SEP-")) {
        let proto = protocols().find(|proto| target.ends_with(&endpoint_suffix(service, proto, endpoint)))?;
        return Some(format!("KUBE-SVC-{}", service_suffix(service, proto)));
    }
    let proto = said.proto.as_deref();
    if target == "DNAT" && service.contains('/') && rest.is_empty() {
        return Some(format!("KUBE-SEP-{}", endpoint_suffix(service, proto?, said.to.as_deref()?)));
    }
    if matches!(rest, "cluster IP" | "external IP" | "loadbalancer IP") {
        return match (target, rest) {
            ("KUBE-MARK-MASQ", "cluster IP") => Some(format!("KUBE-SVC-{}", service_suffix(service, proto?))),
            _ => (starts("KUBE-SVC-") || starts("KUBE-EXT-") || starts("KUBE-FW-")).then(|| "KUBE-SERVICES".to_owned()),
        };
    }
    (rest.is_empty() && (starts("KUBE-EXT-") || starts("KUBE-SVC-")) && !said.ports.is_empty())
        .then(|| "KUBE-NODEPORTS".to_owned())
}

/// By other rows that stand beside it.
fn by_neighbour(
    entry: &Entry,
    said: &Said,
    entries: &[&Entry],
    all: &[Said],
    found: &[Option<String>],
) -> Option<String> {
    // portmap: the port tells the chain, where one pod alone has it.
    if matches!(entry.target.as_str(), "DNAT" | "CNI-HOSTPORT-SETMARK") && said.comment.is_empty() {
        let has = |other: &Said| said.ports.iter().all(|port| other.ports.contains(port)) && other.proto == said.proto;
        let mut doors =
            entries.iter().zip(all).filter(|(door, other)| door.target.starts_with("CNI-DN-") && has(other));
        let (door, _) = doors.next().filter(|_| !said.ports.is_empty())?;
        return doors.all(|(other, _)| other.target == door.target).then(|| door.target.clone());
    }
    if entry.target != "KUBE-MARK-MASQ" && !entry.target.starts_with("KUBE-SVC-") {
        return None;
    }
    // kube-proxy: "masquerade traffic for SERVICE external destinations", "pod traffic for …".
    if let Some((_, rest)) = said.comment.split_once(" for ")
        && let Some(service) = rest.strip_suffix(" external destinations")
    {
        let names = protocols().map(|proto| format!("KUBE-EXT-{}", service_suffix(service, proto)));
        return names.into_iter().find(|name| entries.iter().any(|other| other.target == *name));
    }
    // An endpoint's own traffic: the DNAT of the same chain tells which.
    let source = said.source.as_deref()?.split('/').next()?;
    let twin = all.iter().zip(found).find(|(other, chain)| {
        chain.is_some()
            && other.comment == said.comment
            && other.to.as_deref().and_then(host).is_some_and(|host| host == source)
    });
    twin.and_then(|(_, chain)| chain.clone())
}

/// Jumps that grep leaves out because they name nobody, yet stand in every dump of kube-proxy and portmap: chain and rule.
/// `there` are the chains that rows were given to.
pub(super) fn ways_in(there: &[&str]) -> Vec<(String, String)> {
    let mut ways = Vec::new();
    let mut add = |chain: &str, rule: String| ways.push((chain.to_owned(), rule));
    let local = "-m addrtype --dst-type LOCAL";
    let service = there.iter().any(|chain| *chain == "KUBE-SERVICES" || *chain == "KUBE-NODEPORTS");
    for hook in ["PREROUTING", "OUTPUT"] {
        if service {
            add(hook, "-j KUBE-SERVICES".into());
        }
        if there.contains(&"CNI-HOSTPORT-DNAT") {
            add(hook, format!("{local} -j CNI-HOSTPORT-DNAT"));
        }
    }
    if there.contains(&"KUBE-NODEPORTS") {
        add("KUBE-SERVICES", format!("{local} -j KUBE-NODEPORTS"));
    }
    ways
}

fn protocols() -> impl Iterator<Item = &'static str> {
    ["tcp", "udp", "sctp"].into_iter()
}

/// The address of `10.0.0.1:80` or `[fd00::1]:80`.
fn host(endpoint: &str) -> Option<&str> {
    endpoint.rsplit_once(':').map(|(host, _)| host.trim_start_matches('[').trim_end_matches(']'))
}

impl Said {
    fn by(body: &str) -> Self {
        let mut said = Self::default();
        let mut words = Words::new(body);
        let mut negated = false;
        while let Some(word) = words.next() {
            let mut value = || words.next().map(|word| unquote(word).into_owned());
            match word {
                "--comment" => said.comment = value().unwrap_or_default(),
                "-p" => said.proto = value(),
                "-s" if !negated => said.source = value(),
                "--dport" | "--dports" if !negated => {
                    said.ports = value().unwrap_or_default().split(',').map(str::to_owned).collect();
                }
                "--to-destination" => said.to = value(),
                _ => {}
            }
            negated = word == "!";
        }
        said
    }
}
