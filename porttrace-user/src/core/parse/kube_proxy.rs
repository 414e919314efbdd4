//! What kube-proxy was told: its configuration file or its arguments, as far as it decides where packets go.

use super::objects;
use crate::core::model::facts::ProxyConfig;
use ipnet::IpNet;
use serde_json::{Value, json};

/// Its mode without a word about it (cmd/kube-proxy/app/server_linux.go, `platformApplyDefaults`).
pub const DEFAULT_MODE: &str = "iptables";

/// A KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), YAML or JSON. Everything else in it is passed over.
///
/// # Errors
/// One sentence when it is neither.
pub fn config(text: &str) -> Result<ProxyConfig, String> {
    let documents = objects::documents(text)?;
    let is_it = |value: &&Value| value.get("kind").and_then(Value::as_str) == Some("KubeProxyConfiguration");
    let config = documents.iter().find(is_it).or_else(|| documents.first()).ok_or("it is empty")?;
    if !config.is_object() {
        return Err("it is no KubeProxyConfiguration".to_owned());
    }
    let text = |pointer: &str| config.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let addresses = config.get("nodePortAddresses").and_then(Value::as_array).into_iter().flatten();
    let addresses: Vec<&str> = addresses.filter_map(Value::as_str).collect();
    Ok(ProxyConfig {
        mode: text("/mode").to_owned(),
        node_port_addresses: nets(addresses.iter().copied()),
        node_port_primary: addresses.contains(&"primary"),
        cluster_cidrs: nets(text("/clusterCIDR").split(',')),
        localhost_node_ports: config.pointer("/iptables/localhostNodePorts").and_then(Value::as_bool),
        metrics: text("/metricsBindAddress").to_owned(),
    })
}

/// kube-proxy's flags (`--proxy-mode=ipvs`, `--proxy-mode ipvs`) in a command line; those that k3s and RKE2 hand on to the
/// kube-proxy in them (`--kube-proxy-arg=proxy-mode=ipvs`) as well.
pub fn flags(words: &[String]) -> ProxyConfig {
    let value = |name: &str| flag(words, name).unwrap_or_default();
    let addresses = value("nodeport-addresses");
    let addresses: Vec<&str> = addresses.split(',').map(str::trim).collect();
    ProxyConfig {
        mode: value("proxy-mode"),
        node_port_addresses: nets(addresses.iter().copied()),
        node_port_primary: addresses.contains(&"primary"),
        cluster_cidrs: nets(value("cluster-cidr").split(',')),
        localhost_node_ports: value("iptables-localhost-nodeports").parse().ok(),
        metrics: value("metrics-bind-address"),
    }
}

/// The value of a flag of kube-proxy's; an empty one is none.
pub fn flag(words: &[String], name: &str) -> Option<String> {
    const HANDED_ON: &str = "--kube-proxy-arg";
    let plain = format!("--{name}");
    let mut found = None;
    for (at, word) in words.iter().enumerate() {
        let next = words.get(at + 1).map(String::as_str);
        let (key, value) = word.split_once('=').map_or((word.as_str(), next), |(key, value)| (key, Some(value)));
        let value = match key {
            _ if key == plain => value,
            HANDED_ON => value.and_then(|word| word.trim_start_matches('-').strip_prefix(name)?.strip_prefix('=')),
            _ => continue,
        };
        // The last one counts.
        found = value.map(str::to_owned).or(found);
    }
    found.filter(|value| !value.is_empty())
}

/// The configuration in the shape of a KubeProxyConfiguration: nothing but what [`ProxyConfig`] has a field for.
pub fn write(config: &ProxyConfig) -> String {
    let primary = config.node_port_primary.then(|| "primary".to_owned());
    let addresses: Vec<String> =
        primary.into_iter().chain(config.node_port_addresses.iter().map(ToString::to_string)).collect();
    let cidrs: Vec<String> = config.cluster_cidrs.iter().map(ToString::to_string).collect();
    let mut written = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": config.mode,
        "clusterCIDR": cidrs.join(","),
        "nodePortAddresses": addresses,
        "metricsBindAddress": config.metrics,
    });
    if let Some(served) = config.localhost_node_ports {
        written["iptables"] = json!({ "localhostNodePorts": served });
    }
    format!("{written:#}\n")
}

fn nets<'t>(words: impl Iterator<Item = &'t str>) -> Vec<IpNet> {
    words.filter_map(|word| word.trim().parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_configuration_file_is_read_and_only_what_matters_is_written() {
        let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs # chosen\n\
            clientConnection:\n  kubeconfig: /SECRET\nnodePortAddresses: [\"172.18.0.0/16\", primary]\n\
            clusterCIDR: 10.244.0.0/16,fd00:10:244::/48\niptables:\n  localhostNodePorts: false\n";
        let read = config(text).expect("a configuration");
        assert_eq!(read.mode, "ipvs");
        assert_eq!(read.node_port_addresses, ["172.18.0.0/16".parse().expect("a net")]);
        assert!(read.node_port_primary);
        assert_eq!(read.cluster_cidrs.len(), 2);
        assert_eq!(read.localhost_node_ports, Some(false));
        let written = write(&read);
        assert!(!written.contains("SECRET"), "{written}");
        assert_eq!(config(&written), Ok(read));
        assert!(config("- a\n- b").is_err());
        assert!(config("").is_err());
    }

    #[test]
    fn flags_have_two_shapes_and_the_last_one_counts() {
        let line = words(
            "kube-proxy --proxy-mode=iptables --proxy-mode nftables --nodeport-addresses=10.0.0.0/8,primary -v 2",
        );
        let read = flags(&line);
        assert_eq!(read.mode, "nftables");
        assert_eq!(read.node_port_addresses.len(), 1);
        assert!(read.node_port_primary);
        assert_eq!(flag(&words("kube-proxy --config /a/b"), "config"), Some("/a/b".to_owned()));
        assert_eq!(flag(&words("kube-proxy --config"), "config"), None);
    }

    #[test]
    fn k3s_hands_flags_on() {
        let line =
            words("k3s server --kube-proxy-arg=proxy-mode=ipvs --kube-proxy-arg --nodeport-addresses=10.1.0.0/16 -d x");
        let read = flags(&line);
        assert_eq!(read.mode, "ipvs");
        assert_eq!(read.node_port_addresses, ["10.1.0.0/16".parse().expect("a net")]);
    }
}
