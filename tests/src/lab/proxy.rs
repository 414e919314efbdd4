//! What kube-proxy 1.36 (iptables mode) writes for Services of a test's choice, in the shapes of the recorded rules: a test holds
//! this writer's rules for the recorded Services against the recorded rules. IPv4 only.

use super::rules::{KUBE_PROXY_V4, Tools};
use super::topology::NodeName;
use crate::netns::Netns;
use anyhow::Result;
use porttrace_user::core::kube::hash::{endpoint_suffix, service_suffix};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddrV4};

/// The cluster's pods.
const CLUSTER_CIDR: &str = "10.244.0.0/16";
/// Chains whose rules are the same for whatever Services there are.
const STATIC: [(&str, &str); 4] =
    [("filter", "KUBE-FIREWALL"), ("filter", "KUBE-FORWARD"), ("nat", "KUBE-MARK-MASQ"), ("nat", "KUBE-POSTROUTING")];
const NODE_PORTS: &str =
    r#"-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain""#;

/// A Service with one port.
#[derive(Clone, Debug)]
pub struct Service {
    /// In namespace `default`.
    pub name: &'static str,
    pub port_name: &'static str,
    /// `tcp` or `udp`.
    pub proto: &'static str,
    pub cluster_ip: Ipv4Addr,
    pub port: u16,
    pub node_port: Option<u16>,
    pub external_ip: Option<Ipv4Addr>,
    pub load_balancer: Option<Ipv4Addr>,
    /// `loadBalancerSourceRanges`.
    pub source_ranges: Vec<&'static str>,
    pub external_local: bool,
    pub internal_local: bool,
    /// Ready endpoints, and the nodes that they are on (`None`: on none of the lab's).
    pub endpoints: Vec<(SocketAddrV4, Option<NodeName>)>,
}

impl Service {
    /// A TCP Service with port `http` and without endpoints.
    pub const fn new(name: &'static str, cluster_ip: Ipv4Addr, port: u16, node_port: Option<u16>) -> Self {
        Self {
            name,
            port_name: "http",
            proto: "tcp",
            cluster_ip,
            port,
            node_port,
            external_ip: None,
            load_balancer: None,
            source_ranges: Vec::new(),
            external_local: false,
            internal_local: false,
            endpoints: Vec::new(),
        }
    }

    /// With an endpoint more: the pod with this number on a node.
    pub fn endpoint(mut self, node: NodeName, number: u8, port: u16) -> Self {
        self.endpoints.push((SocketAddrV4::new(node.pod_v4(number), port), Some(node)));
        self
    }

    /// `default/frontend:http`.
    pub fn full_name(&self) -> String {
        format!("default/{}:{}", self.name, self.port_name)
    }

    fn chain(&self, kind: &str) -> String {
        format!("KUBE-{kind}-{}", service_suffix(&self.full_name(), self.proto))
    }

    fn local(&self, node: NodeName) -> Vec<SocketAddrV4> {
        self.endpoints.iter().filter(|(_, on)| *on == Some(node)).map(|(at, _)| *at).collect()
    }

    fn all(&self) -> Vec<SocketAddrV4> {
        self.endpoints.iter().map(|(at, _)| *at).collect()
    }
}

/// The Services of the recorded rules.
pub fn recorded() -> Vec<Service> {
    let pods = |mut service: Service, number, port| {
        for node in [NodeName::Worker3, NodeName::Worker, NodeName::Worker2] {
            service = service.endpoint(node, number, port);
        }
        service
    };
    let address = |last| Ipv4Addr::new(10, 96, 200, last);
    let frontend = Service::new("frontend", Ipv4Addr::new(10, 96, 48, 151), 8088, Some(30080));
    let external_ip = Some(Ipv4Addr::new(198, 51, 100, 20));
    let dual = Service { external_ip, ..Service::new("dual", address(27), 8088, Some(30120)) };
    let dns = Service { port_name: "dns", proto: "udp", ..Service::new("udp-np", address(26), 53, Some(30053)) };
    let none = Service { port_name: "p80", ..Service::new("noep", address(14), 80, Some(30104)) };
    let api = Service {
        port_name: "https",
        endpoints: vec![(SocketAddrV4::new(Ipv4Addr::new(172, 18, 0, 2), 6443), None)],
        ..Service::new("kubernetes", Ipv4Addr::new(10, 96, 0, 1), 443, None)
    };
    vec![pods(frontend, 9, 80), pods(dual, 9, 80), pods(dns, 11, 53), none, api]
}

/// kube-proxy on one node.
#[derive(Debug)]
pub struct Proxy {
    node: NodeName,
    /// `--nodeport-addresses`; all local addresses when empty.
    pub node_port_addresses: Vec<Ipv4Addr>,
    /// Chains of the last sync, which the next one removes when it does not need them.
    written: BTreeSet<(String, String)>,
}

impl Proxy {
    /// On a node of a lab that was just raised.
    pub fn new(node: NodeName) -> Self {
        let written = chains(KUBE_PROXY_V4).into_keys().filter(|(_, chain)| chain.starts_with("KUBE-")).collect();
        Self { node, node_port_addresses: Vec::new(), written }
    }

    /// Writes its chains for these Services anew, as kube-proxy does (`iptables-restore --noflush`); its jumps from the
    /// kernel's chains and what others wrote stay as they are.
    pub fn sync(&mut self, netns: &Netns, tools: &Tools, services: &[Service]) -> Result<()> {
        let rules = rules(self.node, services, &self.node_port_addresses);
        let mut text = String::new();
        for table in ["filter", "nat"] {
            let _ = writeln!(text, "*{table}");
            let gone: Vec<&String> = self
                .written
                .iter()
                .filter(|key| key.0 == table && !is_fixed(&key.1) && !rules.contains_key(*key))
                .map(|(_, chain)| chain)
                .collect();
            let here = rules.iter().filter(|((of, _), _)| of == table);
            for chain in here.clone().map(|((_, chain), _)| chain).chain(gone.iter().copied()) {
                let _ = writeln!(text, ":{chain} - [0:0]");
            }
            for rule in here.flat_map(|((_, chain), rules)| rules.iter().map(move |rule| format!("-A {chain} {rule}")))
            {
                let _ = writeln!(text, "{rule}");
            }
            for chain in gone {
                let _ = writeln!(text, "-X {chain}");
            }
            let _ = writeln!(text, "COMMIT");
        }
        let restore = tools.tool("iptables-restore");
        let arguments = [restore.as_os_str(), "--noflush".as_ref(), "-w".as_ref(), "10".as_ref()];
        netns.exec_with(arguments, &text)?;
        self.written = rules.into_keys().collect();
        Ok(())
    }
}

/// Chains that kube-proxy keeps though they may be empty.
fn is_fixed(chain: &str) -> bool {
    !["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-"].iter().any(|prefix| chain.starts_with(prefix))
}

/// Rules by table and chain.
type Rules = BTreeMap<(String, String), Vec<String>>;

/// The rules of an `iptables-save`, by table and chain, without `-A CHAIN`.
fn chains(dump: &str) -> Rules {
    let (mut found, mut table) = (Rules::new(), "");
    for line in dump.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some((chain, _)) = line.strip_prefix(':').and_then(|rest| rest.split_once(' ')) {
            found.entry((table.to_owned(), chain.to_owned())).or_default();
        } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) {
            found.entry((table.to_owned(), chain.to_owned())).or_default().push(rule.to_owned());
        }
    }
    found
}

fn rules(node: NodeName, services: &[Service], node_port_addresses: &[Ipv4Addr]) -> Rules {
    let mut writer = Writer { node, rules: Rules::new() };
    let recorded = chains(KUBE_PROXY_V4);
    for (table, chain) in STATIC {
        let key = (table.to_owned(), chain.to_owned());
        writer.rules.insert(key.clone(), recorded.get(&key).cloned().unwrap_or_default());
    }
    for (table, chain) in [
        ("filter", "KUBE-EXTERNAL-SERVICES"),
        ("filter", "KUBE-NODEPORTS"),
        ("filter", "KUBE-PROXY-FIREWALL"),
        ("filter", "KUBE-SERVICES"),
        ("nat", "KUBE-NODEPORTS"),
        ("nat", "KUBE-SERVICES"),
    ] {
        writer.rules.entry((table.to_owned(), chain.to_owned())).or_default();
    }
    for service in services {
        writer.service(service);
    }
    if node_port_addresses.is_empty() {
        writer.nat("KUBE-SERVICES", format!("{NODE_PORTS} -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"));
    }
    for address in node_port_addresses {
        writer.nat("KUBE-SERVICES", format!("-d {address}/32 {NODE_PORTS} -j KUBE-NODEPORTS"));
    }
    writer.rules
}

struct Writer {
    node: NodeName,
    rules: Rules,
}

/// `-m comment --comment "…"`.
fn remark(text: &str) -> String {
    format!("-m comment --comment \"{text}\"")
}

impl Writer {
    fn add(&mut self, table: &str, chain: &str, rule: String) {
        self.rules.entry((table.to_owned(), chain.to_owned())).or_default().push(rule);
    }

    fn nat(&mut self, chain: &str, rule: String) {
        self.add("nat", chain, rule);
    }

    fn service(&mut self, service: &Service) {
        let (all, local) = (service.all(), service.local(self.node));
        self.refusals(service, all.is_empty(), local.is_empty());
        if all.is_empty() {
            return;
        }
        let (svc, svl) = (service.chain("SVC"), service.chain("SVL"));
        let inner = if service.internal_local { &svl } else { &svc };
        let (proto, port, name) = (service.proto, service.port, service.full_name());
        if !(service.internal_local && local.is_empty()) {
            let at = format!(
                "-d {}/32 -p {proto} {} -m {proto} --dport {port}",
                service.cluster_ip,
                remark(&format!("{name} cluster IP"))
            );
            self.nat("KUBE-SERVICES", format!("{at} -j {inner}"));
            self.nat(inner, format!("! -s {CLUSTER_CIDR} {at} -j KUBE-MARK-MASQ"));
        }
        let outward = service.node_port.is_some() || service.external_ip.is_some() || service.load_balancer.is_some();
        if outward {
            self.outward(service, !local.is_empty());
        }
        if !service.internal_local || outward {
            self.endpoints(service, &svc, &all);
        }
        if (service.internal_local || service.external_local && outward) && !local.is_empty() {
            self.endpoints(service, &svl, &local);
        }
        for endpoint in all {
            self.endpoint(service, endpoint);
        }
    }

    /// filter: what is refused or dropped for want of endpoints.
    fn refusals(&mut self, service: &Service, none: bool, none_here: bool) {
        let (proto, port, name) = (service.proto, service.port, service.full_name());
        let refused = |local: bool| match (none, local && none_here) {
            (true, _) => Some(("has no endpoints", "REJECT --reject-with icmp-port-unreachable")),
            (false, true) => Some(("has no local endpoints", "DROP")),
            (false, false) => None,
        };
        if let Some((why, what)) = refused(service.internal_local) {
            let at = format!("-d {}/32 -p {proto} {}", service.cluster_ip, remark(&format!("{name} {why}")));
            self.add("filter", "KUBE-SERVICES", format!("{at} -m {proto} --dport {port} -j {what}"));
        }
        let Some((why, what)) = refused(service.external_local) else { return };
        let why = remark(&format!("{name} {why}"));
        for address in [service.external_ip, service.load_balancer].into_iter().flatten() {
            let rule = format!("-d {address}/32 -p {proto} {why} -m {proto} --dport {port} -j {what}");
            self.add("filter", "KUBE-EXTERNAL-SERVICES", rule);
        }
        if let Some(node_port) = service.node_port {
            let rule =
                format!("-p {proto} {why} -m addrtype --dst-type LOCAL -m {proto} --dport {node_port} -j {what}");
            self.add("filter", "KUBE-EXTERNAL-SERVICES", rule);
        }
    }

    /// NodePort, externalIP and load balancer.
    fn outward(&mut self, service: &Service, has_local: bool) {
        let (ext, svc, svl) = (service.chain("EXT"), service.chain("SVC"), service.chain("SVL"));
        let (proto, port, name) = (service.proto, service.port, service.full_name());
        if let Some(address) = service.external_ip {
            let why = remark(&format!("{name} external IP"));
            self.nat("KUBE-SERVICES", format!("-d {address}/32 -p {proto} {why} -m {proto} --dport {port} -j {ext}"));
        }
        if let Some(address) = service.load_balancer {
            self.load_balancer(service, address);
        }
        if let Some(node_port) = service.node_port {
            let at = format!("-p {proto} {} -m {proto} --dport {node_port}", remark(&name));
            let counted = "-m nfacct --nfacct-name  localhost_nps_accepted_pkts";
            self.nat("KUBE-NODEPORTS", format!("-d 127.0.0.0/8 {at} {counted} -j {ext}"));
            self.nat("KUBE-NODEPORTS", format!("{at} -j {ext}"));
        }
        if !service.external_local {
            let why = remark(&format!("masquerade traffic for {name} external destinations"));
            self.nat(&ext, format!("{why} -j KUBE-MARK-MASQ"));
            self.nat(&ext, format!("-j {svc}"));
            return;
        }
        let why = |what: &str| remark(&format!("{what} traffic for {name} external destinations"));
        self.nat(&ext, format!("-s {CLUSTER_CIDR} {} -j {svc}", why("pod")));
        self.nat(&ext, format!("{} -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ", why("masquerade LOCAL")));
        self.nat(&ext, format!("{} -m addrtype --src-type LOCAL -j {svc}", why("route LOCAL")));
        if has_local {
            self.nat(&ext, format!("-j {svl}"));
        }
    }

    fn load_balancer(&mut self, service: &Service, address: Ipv4Addr) {
        let (ext, fw) = (service.chain("EXT"), service.chain("FW"));
        let (proto, port, name) = (service.proto, service.port, service.full_name());
        let why = remark(&format!("{name} loadbalancer IP"));
        let to = if service.source_ranges.is_empty() { &ext } else { &fw };
        self.nat("KUBE-SERVICES", format!("-d {address}/32 -p {proto} {why} -m {proto} --dport {port} -j {to}"));
        if service.source_ranges.is_empty() {
            return;
        }
        for range in &service.source_ranges {
            self.nat(&fw, format!("-s {range} {why} -j {ext}"));
        }
        self.nat(&fw, remark(&format!("other traffic to {name} will be dropped by KUBE-PROXY-FIREWALL")));
        let why = remark(&format!("{name} traffic not accepted by {fw}"));
        let rule = format!("-d {address}/32 -p {proto} {why} -m {proto} --dport {port} -j DROP");
        self.add("filter", "KUBE-PROXY-FIREWALL", rule);
    }

    fn endpoints(&mut self, service: &Service, chain: &str, endpoints: &[SocketAddrV4]) {
        let name = service.full_name();
        for (i, at) in endpoints.iter().enumerate() {
            let left = endpoints.len() - i;
            // As the kernel keeps a probability: 31 bits (xt_statistic.c), printed with 11 digits.
            let kept = (0x8000_0000_u32 as f64 / left as f64).round() / 0x8000_0000_u32 as f64;
            let chance = match left {
                1 => String::new(),
                _ => format!(" -m statistic --mode random --probability {kept:.11}"),
            };
            let to = format!("KUBE-SEP-{}", endpoint_suffix(&name, service.proto, &at.to_string()));
            self.nat(chain, format!("{}{chance} -j {to}", remark(&format!("{name} -> {at}"))));
        }
    }

    fn endpoint(&mut self, service: &Service, at: SocketAddrV4) {
        let (name, proto) = (service.full_name(), service.proto);
        let chain = format!("KUBE-SEP-{}", endpoint_suffix(&name, proto, &at.to_string()));
        self.nat(&chain, format!("-s {}/32 {} -j KUBE-MARK-MASQ", at.ip(), remark(&name)));
        self.nat(&chain, format!("-p {proto} {} -m {proto} -j DNAT --to-destination {at}", remark(&name)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recorded_services_have_the_recorded_rules() {
        let mut written = rules(NodeName::Worker3, &recorded(), &[]);
        let mut expected = chains(KUBE_PROXY_V4);
        // The kernel's own chains, other writers, and canaries.
        let ours = |(_, chain): &(String, String)| chain.starts_with("KUBE-") && !chain.ends_with("-CANARY");
        expected.retain(|key, _| ours(key));
        // kube-proxy goes through Services and endpoints in an order of its own.
        for rules in written.values_mut().chain(expected.values_mut()) {
            rules.sort();
        }
        for key in written.keys().chain(expected.keys()) {
            assert_eq!(written.get(key), expected.get(key), "{key:?}");
        }
    }
}
