//! `iptables-save` of a node, in the shapes that kube-proxy writes (pkg/proxy/iptables/proxier.go).

use std::fmt::Write;

/// A Service of the generated dump.
pub struct Service {
    pub cluster_ip: [u8; 4],
    pub node_port: u16,
    pub endpoints: usize,
}

/// The Services that a dump has: `count` with `endpoints` each, and a last one with `big` endpoints.
pub fn services(count: usize, endpoints: usize, big: usize) -> Vec<Service> {
    let service = |number: usize, endpoints| Service {
        cluster_ip: [10, 96, (number >> 8) as u8, number as u8],
        node_port: 30_000 + number as u16,
        endpoints,
    };
    (0..count).map(|number| service(number, endpoints)).chain([service(count, big)]).collect()
}

/// Every Service has a ClusterIP, a NodePort and a load balancer address; every fourth has session affinity.
pub fn dump(services: &[Service]) -> String {
    let mut chains = String::new();
    let mut rules = [String::new(), String::new(), String::new()];
    let mut endpoint = 0;
    for (number, service) in services.iter().enumerate() {
        let affinity = number % 4 == 3 && service.endpoints < 100;
        endpoint = write_service(&mut chains, &mut rules, (number, endpoint), service, affinity);
    }
    let [list, ports, per_service] = rules;
    let mut text = filter(services.len());
    text.push_str(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n",
    );
    for chain in ["KUBE-MARK-MASQ", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-SERVICES"] {
        let _ = writeln!(text, ":{chain} - [0:0]");
    }
    text.push_str(&chains);
    text.push_str(
        "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n\
         -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully\n",
    );
    text.push_str(&ports);
    text.push_str(&list);
    text.push_str(
        "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this \
         chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n",
    );
    text.push_str(&per_service);
    text.push_str("COMMIT\n");
    text
}

fn write_service(
    chains: &mut String,
    [list, ports, rules]: &mut [String; 3],
    (number, first): (usize, usize),
    service: &Service,
    affinity: bool,
) -> usize {
    let [a, b, c, d] = service.cluster_ip;
    let (name, hash) = (format!("bench/svc-{number}:p80"), hash(number));
    let node_port = service.node_port;
    let _ = writeln!(chains, ":KUBE-EXT-{hash} - [0:0]\n:KUBE-SVC-{hash} - [0:0]");
    let _ = writeln!(
        list,
        "-A KUBE-SERVICES -d {a}.{b}.{c}.{d}/32 -p tcp -m comment --comment \"{name} cluster IP\" -m tcp --dport 80 -j KUBE-SVC-{hash}\n\
         -A KUBE-SERVICES -d 203.0.{c}.{d}/32 -p tcp -m comment --comment \"{name} loadbalancer IP\" -m tcp --dport 80 -j KUBE-EXT-{hash}"
    );
    let _ = writeln!(
        ports,
        "-A KUBE-NODEPORTS -d 127.0.0.0/8 -p tcp -m comment --comment \"{name}\" -m tcp --dport {node_port} -m nfacct --nfacct-name  localhost_nps_accepted_pkts -j KUBE-EXT-{hash}\n\
         -A KUBE-NODEPORTS -p tcp -m comment --comment \"{name}\" -m tcp --dport {node_port} -j KUBE-EXT-{hash}"
    );
    let _ = writeln!(
        rules,
        "-A KUBE-EXT-{hash} -m comment --comment \"masquerade traffic for {name} external destinations\" -j KUBE-MARK-MASQ\n\
         -A KUBE-EXT-{hash} -j KUBE-SVC-{hash}\n\
         -A KUBE-SVC-{hash} ! -s 10.244.0.0/16 -d {a}.{b}.{c}.{d}/32 -p tcp -m comment --comment \"{name} cluster IP\" -m tcp --dport 80 -j KUBE-MARK-MASQ"
    );
    for at in 0..service.endpoints {
        let (sep, ip) = (self::hash(1_000_000 + first + at), pod(first + at));
        let _ = writeln!(chains, ":KUBE-SEP-{sep} - [0:0]");
        if affinity {
            let _ = writeln!(
                rules,
                "-A KUBE-SVC-{hash} -m comment --comment \"{name} -> {ip}:80\" -m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-{sep} --mask 255.255.255.255 --rsource -j KUBE-SEP-{sep}"
            );
        }
        let left = service.endpoints - at;
        let random = if left > 1 { probability(left) } else { String::new() };
        let _ =
            writeln!(rules, "-A KUBE-SVC-{hash} -m comment --comment \"{name} -> {ip}:80\"{random} -j KUBE-SEP-{sep}");
    }
    for at in 0..service.endpoints {
        let (sep, ip) = (self::hash(1_000_000 + first + at), pod(first + at));
        let set = if affinity {
            format!(" -m recent --set --name KUBE-SEP-{sep} --mask 255.255.255.255 --rsource")
        } else {
            String::new()
        };
        let _ = writeln!(
            rules,
            "-A KUBE-SEP-{sep} -s {ip}/32 -m comment --comment \"{name}\" -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{sep} -p tcp -m comment --comment \"{name}\"{set} -m tcp -j DNAT --to-destination {ip}:80"
        );
    }
    first + service.endpoints
}

fn filter(services: usize) -> String {
    let mut text = String::from(
        "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:KUBE-EXTERNAL-SERVICES - [0:0]\n\
         :KUBE-FIREWALL - [0:0]\n:KUBE-FORWARD - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n:KUBE-SERVICES - [0:0]\n\
         -A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL\n\
         -A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS\n\
         -A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES\n\
         -A INPUT -j KUBE-FIREWALL\n\
         -A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL\n\
         -A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD\n\
         -A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES\n\
         -A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -j KUBE-FIREWALL\n",
    );
    // One Service in twenty has no endpoints.
    for number in (0..services).step_by(20) {
        let _ = writeln!(
            text,
            "-A KUBE-SERVICES -d 10.97.{}.{}/32 -p tcp -m comment --comment \"bench/none-{number}:p80 has no endpoints\" -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable",
            number >> 8 & 0xff,
            number & 0xff
        );
    }
    text.push_str(
        "-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -m nfacct --nfacct-name  ct_state_invalid_dropped_pkts -j DROP\n\
         -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         COMMIT\n",
    );
    text
}

fn pod(number: usize) -> String {
    format!("10.{}.{}.{}", 128 + (number >> 16), number >> 8 & 0xff, number & 0xff)
}

/// As iptables-save prints what kube-proxy's `%0.10f` of 1/n becomes.
fn probability(left: usize) -> String {
    let k = (1.0 / left as f64 * 1e10).round() / 1e10 * 2_147_483_648.0;
    format!(" -m statistic --mode random --probability {:.11}", k.round() / 2_147_483_648.0)
}

/// Sixteen characters of base32, as a hash of a Service's name has.
fn hash(number: usize) -> String {
    let mut state = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d;
    let mut letter = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[(state >> 59) as usize])
    };
    (0..16).map(|_| letter()).collect()
}
