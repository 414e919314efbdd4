//! What the CNI plugins answered for each sandbox: the results that libcni keeps, and the addresses that host-local gave away.

use super::host;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// libcni's cache (libcni/api.go, `CacheDir`) and host-local's store (plugins/ipam/host-local/backend/disk/backend.go).
const RESULTS: &str = "/var/lib/cni/results";
const NETWORKS: &str = "/var/lib/cni/networks";
/// Files read at most in one directory.
const MOST: usize = 10_000;

/// One file of the cache; the plugin's configuration and arguments stand in it too, and are passed over.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cached {
    container_id: String,
    result: CachedResult,
}

#[derive(Deserialize)]
struct CachedResult {
    #[serde(default)]
    ips: Vec<CachedIp>,
}

#[derive(Deserialize)]
struct CachedIp {
    address: String,
}

/// Sandbox IDs and their addresses, in the shape of CNI results: `{ID: {"ips": [{"address": "10.244.1.9/24"}]}}`.
pub fn results() -> BTreeMap<String, Value> {
    let place = |path: &str| host::file(path).unwrap_or_else(|| path.into());
    results_in(&place(RESULTS), &place(NETWORKS))
}

fn results_in(results: &Path, networks: &Path) -> BTreeMap<String, Value> {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in files(results) {
        if let Some(cached) = fs::read(file).ok().and_then(|text| serde_json::from_slice::<Cached>(&text).ok()) {
            let ips = cached.result.ips.into_iter().map(|ip| ip.address).filter(|ip| !is_loopback(ip));
            found.entry(cached.container_id).or_default().extend(ips);
        }
    }
    for (id, address) in files(networks).iter().flat_map(|network| files(network)).filter_map(|file| reservation(&file))
    {
        let known = found.entry(id).or_default();
        let is_it = |text: &String| text.split('/').next().and_then(|text| text.parse().ok()) == Some(address);
        if !known.iter().any(is_it) {
            known.push(format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 }));
        }
    }
    let ip = |address: String| json!({ "address": address });
    let result = |addresses: Vec<String>| json!({"ips": addresses.into_iter().map(ip).collect::<Vec<_>>()});
    found.into_iter().map(|(id, addresses)| (id, result(addresses))).collect()
}

/// Runtimes attach the loopback interface by a plugin of its own.
fn is_loopback(address: &str) -> bool {
    address.split('/').next().and_then(|text| text.parse::<IpAddr>().ok()).is_some_and(|address| address.is_loopback())
}

/// A file named after an address; its first line is the sandbox ID, its second the interface.
fn reservation(file: &Path) -> Option<(String, IpAddr)> {
    let address: IpAddr = file.file_name()?.to_str()?.replace('_', ":").parse().ok()?;
    let text = fs::read_to_string(file).ok()?;
    let id = text.lines().next()?.trim();
    (!id.is_empty()).then(|| (id.to_owned(), address))
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().take(MOST);
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_reservations_are_joined_and_secrets_stay_behind() {
        let folder = tempfile::tempdir().expect("a folder");
        let (results, networks) = (folder.path().join("results"), folder.path().join("networks"));
        let net = networks.join("kindnet");
        fs::create_dir_all(&results).expect("a folder");
        fs::create_dir_all(&net).expect("a folder");
        let cached = r#"{"kind":"cniCacheV1","containerId":"aa","config":"SECRET","ifName":"eth0","networkName":"kindnet",
            "cniArgs":[["K","SECRET"]],"result":{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.244.1.9/24"}]}}"#;
        fs::write(results.join("kindnet-aa-eth0"), cached).expect("a file");
        fs::write(results.join("kindnet-bb-eth0"), "not JSON").expect("a file");
        let loopback = r#"{"containerId":"aa","result":{"ips":[{"address":"127.0.0.1/8"},{"address":"::1/128"}]}}"#;
        fs::write(results.join("cni-loopback-aa-lo"), loopback).expect("a file");
        fs::write(net.join("10.244.1.9"), "aa\r\neth0").expect("a file");
        fs::write(net.join("10.244.1.10"), "bb\r\neth0").expect("a file");
        fs::write(net.join("fd00_10_244_1__a"), "bb\neth0").expect("a file");
        fs::write(net.join("last_reserved_ip.0"), "10.244.1.10").expect("a file");
        fs::write(net.join("lock"), "").expect("a file");
        let found = results_in(&results, &networks);
        let expected = json!({
            "aa": {"ips": [{"address": "10.244.1.9/24"}]},
            "bb": {"ips": [{"address": "10.244.1.10/32"}, {"address": "fd00:10:244:1::a/128"}]},
        });
        assert_eq!(serde_json::to_value(&found).expect("JSON"), expected);
        assert!(results_in(&folder.path().join("no"), &folder.path().join("such")).is_empty());
    }
}
