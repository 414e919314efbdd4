//! Rulesets of the shapes that kube-proxy (iptables mode) and portmap write, with random Services, endpoints and hostPorts.

use super::node::{PORTS, World};
use crate::fuzz::rng::Rng;
use crate::fuzz::scenario::{Chain, Rule, Table, Tables};
use porttrace_user::core::model::flow::Family;

/// One port of a Service.
struct Service {
    name: String,
    proto: &'static str,
    cluster_ip: String,
    port: u16,
    node_port: Option<u16>,
    external_ip: Option<String>,
    endpoints: Vec<(String, u16)>,
    affinity: bool,
    /// externalTrafficPolicy: Local.
    local: bool,
}

/// Builds chains by name; order of creation does not matter to the kernel's rule numbers.
#[derive(Default)]
struct Draft {
    nat: Vec<Chain>,
    filter: Vec<Chain>,
}

/// The two tables of one family.
pub fn tables(rng: &mut Rng, world: &World, family: Family) -> Tables {
    let mut draft = Draft::default();
    let services: Vec<Service> = (0..rng.range(2, 6)).map(|number| service(rng, world, family, number)).collect();
    base(&mut draft, family);
    let localhost = if family == Family::V4 { "! -d 127.0.0.0/8" } else { "! -d ::1/128" };
    for service in &services {
        dispatch(&mut draft, service, localhost);
        if !service.endpoints.is_empty() {
            balance(&mut draft, service, family);
        }
    }
    draft.nat(
        "KUBE-SERVICES",
        &["-m comment --comment \"kubernetes service nodeports\"", "-m addrtype --dst-type LOCAL"],
        "-j KUBE-NODEPORTS",
    );
    host_ports(rng, &mut draft, world, family);
    let table = |name: &str, chains| Table { name: name.into(), chains };
    Tables { family, legacy: false, tables: vec![table("nat", draft.nat), table("filter", draft.filter)] }
}

impl Draft {
    fn nat(&mut self, chain: &str, matches: &[&str], target: &str) {
        add(&mut self.nat, chain, matches, target);
    }

    fn filter(&mut self, chain: &str, matches: &[&str], target: &str) {
        add(&mut self.filter, chain, matches, target);
    }
}

fn add(chains: &mut Vec<Chain>, name: &str, matches: &[&str], target: &str) {
    let rule = Rule::new(matches, target);
    match chains.iter_mut().find(|chain| chain.name == name) {
        Some(chain) => chain.rules.push(rule),
        None => chains.push(Chain { name: name.into(), policy: policy(name), rules: vec![rule] }),
    }
}

fn declare(chains: &mut Vec<Chain>, names: &[&str]) {
    chains.extend(names.iter().map(|name| Chain { name: name.to_string(), policy: policy(name), rules: Vec::new() }));
}

fn policy(name: &str) -> Option<String> {
    ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"].contains(&name).then(|| "ACCEPT".to_string())
}

fn service(rng: &mut Rng, world: &World, family: Family, number: u32) -> Service {
    let pool = world.pool(family);
    let v4 = family == Family::V4;
    let cluster = if v4 { ["10.96.0.1", "10.96.48.151"] } else { ["fd00:10:96::1", "fd00:10:96::abcd"] };
    let outside = if v4 { "192.0.2.77" } else { "2001:db8:77::1" };
    let endpoints = (0..rng.range(0, 3)).map(|_| (pool.host(rng), *rng.choose(&[80, 8081]))).collect();
    Service {
        name: format!("default/svc{number}:http"),
        proto: rng.pick(&["tcp", "tcp", "udp", "sctp"]),
        cluster_ip: rng.pick(&cluster).into(),
        port: *rng.choose(&PORTS),
        node_port: rng.percent(60).then(|| *rng.choose(&[30080, 31234])),
        external_ip: rng.percent(30).then(|| outside.to_string()),
        endpoints,
        affinity: rng.percent(25),
        local: rng.percent(25),
    }
}

fn base(draft: &mut Draft, family: Family) {
    declare(
        &mut draft.nat,
        &["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING", "KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-MARK-MASQ"],
    );
    declare(
        &mut draft.filter,
        &[
            "INPUT",
            "FORWARD",
            "OUTPUT",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-SERVICES",
            "KUBE-PROXY-FIREWALL",
        ],
    );
    let portals = "-m comment --comment \"kubernetes service portals\"";
    let new = "-m conntrack --ctstate NEW";
    draft.nat("PREROUTING", &[portals], "-j KUBE-SERVICES");
    draft.nat("OUTPUT", &[portals], "-j KUBE-SERVICES");
    draft.nat("POSTROUTING", &["-m comment --comment \"kubernetes postrouting rules\""], "-j KUBE-POSTROUTING");
    draft.nat("KUBE-POSTROUTING", &["-m mark ! --mark 0x4000/0x4000"], "-j RETURN");
    draft.nat("KUBE-POSTROUTING", &[], "-j MARK --set-xmark 0x4000/0x0");
    draft.nat(
        "KUBE-POSTROUTING",
        &["-m comment --comment \"kubernetes service traffic requiring SNAT\""],
        "-j MASQUERADE --random-fully",
    );
    draft.nat("KUBE-MARK-MASQ", &[], "-j MARK --set-xmark 0x4000/0x4000");
    draft.filter("INPUT", &[new], "-j KUBE-EXTERNAL-SERVICES");
    draft.filter("INPUT", &["-m comment --comment \"kubernetes health check service ports\""], "-j KUBE-NODEPORTS");
    draft.filter("INPUT", &[new], "-j KUBE-PROXY-FIREWALL");
    draft.filter("INPUT", &[], "-j KUBE-FIREWALL");
    draft.filter("FORWARD", &[new], "-j KUBE-PROXY-FIREWALL");
    draft.filter("FORWARD", &["-m comment --comment \"kubernetes forwarding rules\""], "-j KUBE-FORWARD");
    draft.filter("FORWARD", &[new, portals], "-j KUBE-SERVICES");
    draft.filter("FORWARD", &[new], "-j KUBE-EXTERNAL-SERVICES");
    draft.filter("OUTPUT", &[new, portals], "-j KUBE-SERVICES");
    draft.filter("OUTPUT", &[], "-j KUBE-FIREWALL");
    if family == Family::V4 {
        draft.filter(
            "KUBE-FIREWALL",
            &["! -s 127.0.0.0/8", "-d 127.0.0.0/8", "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT"],
            "-j DROP",
        );
    } else {
        declare(&mut draft.filter, &["KUBE-FIREWALL"]);
    }
    draft.filter("KUBE-FORWARD", &["-m conntrack --ctstate INVALID", "-m nfacct --nfacct-name seen"], "-j DROP");
    draft.filter("KUBE-FORWARD", &["-m mark --mark 0x4000/0x4000"], "-j ACCEPT");
    draft.filter("KUBE-FORWARD", &["-m conntrack --ctstate RELATED,ESTABLISHED"], "-j ACCEPT");
}

fn dispatch(draft: &mut Draft, service: &Service, localhost: &str) {
    let Service { name, proto, cluster_ip, port, .. } = service;
    let p = format!("-p {proto}");
    let to = format!("-m {proto} --dport {port}");
    let comment = format!("-m comment --comment \"{name} cluster IP\"");
    let d = format!("-d {cluster_ip}");
    let short = chain_of(name);
    let target = |prefix: &str| format!("-j KUBE-{prefix}-{short}");
    if service.endpoints.is_empty() {
        draft.filter("KUBE-SERVICES", &[&d, &p, &comment, &to], "-j REJECT");
        if let Some(node_port) = service.node_port {
            let to = format!("-m {proto} --dport {node_port}");
            draft.filter("KUBE-EXTERNAL-SERVICES", &[&p, "-m addrtype --dst-type LOCAL", &to], "-j REJECT");
        }
        return;
    }
    draft.nat("KUBE-SERVICES", &[&d, &p, &comment, &to], &target("SVC"));
    if let Some(ip) = &service.external_ip {
        draft.nat("KUBE-SERVICES", &[&format!("-d {ip}"), &p, &to], &target("EXT"));
    }
    if let Some(node_port) = service.node_port {
        let to = format!("-m {proto} --dport {node_port}");
        draft.nat("KUBE-NODEPORTS", &[localhost, &p, &to], &target("EXT"));
    }
}

/// SVC, EXT, SVL and SEP chains.
fn balance(draft: &mut Draft, service: &Service, family: Family) {
    let short = chain_of(&service.name);
    let pods = if family == Family::V4 { "10.244.0.0/16" } else { "fd00:10:244::/48" };
    let (svc, ext, svl) = (format!("KUBE-SVC-{short}"), format!("KUBE-EXT-{short}"), format!("KUBE-SVL-{short}"));
    let dst = format!("-d {}", service.cluster_ip);
    let p = format!("-p {}", service.proto);
    let to = format!("-m {} --dport {}", service.proto, service.port);
    draft.nat(&svc, &[&format!("! -s {pods}"), &dst, &p, &to], "-j KUBE-MARK-MASQ");
    if service.local {
        draft.nat(&ext, &[&format!("-s {pods}")], &format!("-j {svc}"));
        draft.nat(&ext, &["-m addrtype --src-type LOCAL"], "-j KUBE-MARK-MASQ");
        draft.nat(&ext, &["-m addrtype --src-type LOCAL"], &format!("-j {svc}"));
        draft.nat(&ext, &[], &format!("-j {svl}"));
        let local: Vec<usize> = (0..service.endpoints.len()).take(1).collect();
        endpoints(draft, service, &svl, &local);
        if local.is_empty() {
            draft.filter("KUBE-EXTERNAL-SERVICES", &[&p, "-m addrtype --dst-type LOCAL"], "-j DROP");
        }
    } else {
        draft.nat(&ext, &[], "-j KUBE-MARK-MASQ");
        draft.nat(&ext, &[], &format!("-j {svc}"));
    }
    endpoints(draft, service, &svc, &(0..service.endpoints.len()).collect::<Vec<_>>());
    for (index, (ip, port)) in service.endpoints.iter().enumerate() {
        let sep = format!("KUBE-SEP-{short}{index}");
        let to = if family == Family::V4 { format!("{ip}:{port}") } else { format!("[{ip}]:{port}") };
        draft.nat(&sep, &[&format!("-s {ip}")], "-j KUBE-MARK-MASQ");
        let m = format!("-m {}", service.proto);
        let recent = format!("-m recent --name {sep} --set");
        let mut matches: Vec<&str> = vec![&p];
        matches.extend(service.affinity.then_some(recent.as_str()));
        matches.push(&m);
        draft.nat(&sep, &matches, &format!("-j DNAT --to-destination {to}"));
    }
}

fn endpoints(draft: &mut Draft, service: &Service, chain: &str, which: &[usize]) {
    let short = chain_of(&service.name);
    for index in which.iter().filter(|_| service.affinity) {
        let check = format!("-m recent --name KUBE-SEP-{short}{index} --rcheck --seconds 10800 --reap");
        draft.nat(chain, &[&check], &format!("-j KUBE-SEP-{short}{index}"));
    }
    for (position, index) in which.iter().enumerate() {
        let left = which.len() - position;
        let random = format!("-m statistic --mode random --probability {:.11}", 1.0 / left as f64);
        let matches: &[&str] = if left > 1 { &[&random] } else { &[] };
        draft.nat(chain, matches, &format!("-j KUBE-SEP-{short}{index}"));
    }
}

/// portmap's chains.
fn host_ports(rng: &mut Rng, draft: &mut Draft, world: &World, family: Family) {
    let (pods, localhost, own) = match family {
        Family::V4 => ("10.244.1.0/24", "127.0.0.1/32", "172.18.0.3"),
        Family::V6 => ("fd00:10:244:1::/64", "::1/128", "fc00:f853::3"),
    };
    for hook in ["PREROUTING", "OUTPUT"] {
        draft.nat(hook, &["-m addrtype --dst-type LOCAL"], "-j CNI-HOSTPORT-DNAT");
    }
    if let Some(chain) = draft.nat.iter_mut().find(|chain| chain.name == "POSTROUTING") {
        chain.rules.insert(
            0,
            Rule::new(&["-m comment --comment \"CNI portfwd requiring masquerade\""], "-j CNI-HOSTPORT-MASQ"),
        );
    }
    draft.nat(
        "CNI-HOSTPORT-SETMARK",
        &["-m comment --comment \"CNI portfwd masquerade mark\""],
        "-j MARK --set-xmark 0x2000/0x2000",
    );
    draft.nat("CNI-HOSTPORT-MASQ", &["-m mark --mark 0x2000/0x2000"], "-j MASQUERADE");
    declare(&mut draft.nat, &["CNI-HOSTPORT-DNAT"]);
    for number in 0..rng.range(1, 3) {
        let chain = format!("CNI-DN-{number:021x}");
        let proto = rng.pick(&["tcp", "udp", "sctp"]);
        let (port, to) = (*rng.choose(&[9088, 8081, 443, 30080]), *rng.choose(&[80, 8081]));
        let host = world.pool(family).host(rng);
        let p = format!("-p {proto}");
        let comment = format!("-m comment --comment \"dnat name: \\\"kindnet\\\" id: \\\"{number:064x}\\\"\"");
        draft.nat(
            "CNI-HOSTPORT-DNAT",
            &[&p, &comment, &format!("-m multiport --dports {port}")],
            &format!("-j {chain}"),
        );
        let dport = format!("-m {proto} --dport {port}");
        let address = rng.percent(30).then(|| format!("-d {own}"));
        let with = |source: Option<&str>| -> Vec<String> {
            let source = source.map(|source| format!("-s {source}"));
            source.into_iter().chain(address.clone()).chain([p.clone(), dport.clone()]).collect()
        };
        let destination = if family == Family::V4 { format!("{host}:{to}") } else { format!("[{host}]:{to}") };
        for (source, target) in [
            (Some(pods), "-j CNI-HOSTPORT-SETMARK".to_string()),
            (Some(localhost), "-j CNI-HOSTPORT-SETMARK".to_string()),
            (None, format!("-j DNAT --to-destination {destination}")),
        ] {
            let matches = with(source);
            draft.nat(&chain, &matches.iter().map(String::as_str).collect::<Vec<_>>(), &target);
        }
    }
}

/// `default/svc3:http` → `SVC3`.
fn chain_of(name: &str) -> String {
    name.trim_start_matches("default/").trim_end_matches(":http").to_uppercase()
}
