//! The sysctls that decide a packet's path, from `/proc/sys/net` of the calling thread's network namespace.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const ROOT: &str = "/proc/sys/net";
/// Directories whose files are all read.
const WHOLE: [&str; 2] = ["bridge", "netfilter"];
const IPV4: [&str; 11] = [
    "fib_multipath_hash_policy",
    "fib_multipath_use_neigh",
    "fwmark_reflect",
    "ip_default_ttl",
    "ip_forward",
    "ip_forward_update_priority",
    "ip_forward_use_pmtu",
    "ip_local_port_range",
    "ip_local_reserved_ports",
    "ip_nonlocal_bind",
    "tcp_fwmark_accept",
];
const IPV6: [&str; 4] = ["bindv6only", "fib_multipath_hash_policy", "fwmark_reflect", "ip_nonlocal_bind"];
/// Of each interface, and of `all` and `default`.
const IPV4_CONF: [&str; 10] = [
    "accept_local",
    "arp_announce",
    "arp_ignore",
    "forwarding",
    "ignore_routes_with_linkdown",
    "proxy_arp",
    "route_localnet",
    "rp_filter",
    "send_redirects",
    "src_valid_mark",
];
const IPV6_CONF: [&str; 4] = ["accept_redirects", "disable_ipv6", "forwarding", "ignore_routes_with_linkdown"];

/// Reads them; keys with dots (`net.ipv4.ip_forward`). What the kernel does not have is left out.
pub fn read() -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    for directory in WHOLE {
        for name in names(&Path::new(ROOT).join(directory)) {
            add(&mut values, &format!("{directory}/{name}"));
        }
    }
    for (family, keys, conf_keys) in [("ipv4", &IPV4[..], &IPV4_CONF[..]), ("ipv6", &IPV6, &IPV6_CONF)] {
        for key in keys {
            add(&mut values, &format!("{family}/{key}"));
        }
        for interface in names(&Path::new(ROOT).join(family).join("conf")) {
            for key in conf_keys {
                add(&mut values, &format!("{family}/conf/{interface}/{key}"));
            }
        }
    }
    values
}

/// How full conntrack's table is, and how full it may get: what changes by the moment.
pub fn conntrack_counts() -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    add(&mut values, "netfilter/nf_conntrack_count");
    add(&mut values, "netfilter/nf_conntrack_max");
    values
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn add(values: &mut BTreeMap<String, String>, path: &str) {
    if let Ok(bytes) = fs::read(Path::new(ROOT).join(path)) {
        let value = String::from_utf8_lossy(&bytes).trim().to_owned();
        values.insert(format!("net.{}", path.replace('/', ".")), value);
    }
}
