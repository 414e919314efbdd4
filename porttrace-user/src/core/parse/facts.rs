//! The files of a snapshot that speak of Kubernetes, the container runtime and the pods, turned into [`Facts`].

use super::notes::Notes;
use super::objects::Objects;
use super::{Files, iproute, kube_proxy, sockets, state};
use crate::core::model::cluster::{Cluster, Part};
use crate::core::model::facts::{Facts, ProxyConfig};
use crate::core::model::pods::PodSockets;
use crate::core::model::state::{Diagnostic, Socket};
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Turns a snapshot's files into facts. Beside the node's own files (see [`state`]) it knows
///
/// - `objects/*.json`, `objects/*.yaml`: Kubernetes objects as `kubectl get … -o json|yaml` prints them;
/// - `cluster.json`: the same, as porttrace keeps them;
/// - `cri.json`: the container runtime's sandboxes, as porttrace keeps them;
/// - `netns/NAME/state.json`: addresses (`addr`, as `ip -j addr`) and listening sockets (`listen`, the columns of `ss`) of a pod;
///   `netns.json`: whether they could be looked into;
/// - `cni-results.json`: what CNI ADD returned for each pod;
/// - `kube-proxy-config.json`: its KubeProxyConfiguration; `proxy-mode.txt`: the mode that it says that it runs in.
pub fn facts(files: &Files) -> Facts {
    let mut facts = Facts { state: state(files), ..Facts::default() };
    let mut reader = Reader { files, diagnostics: Vec::new() };
    facts.cluster = reader.cluster();
    facts.sandboxes = reader.own("cri.json", "the container runtime was not asked");
    (facts.listeners, facts.namespaces) = reader.namespaces();
    facts.cni = reader.cni();
    facts.proxy = reader.proxy();
    facts.forget_balancers();
    facts.state.diagnostics.append(&mut reader.diagnostics);
    facts
}

struct Reader<'a> {
    files: &'a Files,
    diagnostics: Vec<Diagnostic>,
}

impl<'a> Reader<'a> {
    fn text(&self, name: &str) -> Option<Cow<'a, str>> {
        self.files.get(name).map(|bytes| String::from_utf8_lossy(bytes))
    }

    fn note(&mut self, source: &str, message: String) {
        self.diagnostics.push(Diagnostic { source: source.to_owned(), line: 0, message });
    }

    /// A file in porttrace's own JSON.
    fn own<T: for<'de> Deserialize<'de>>(&mut self, name: &str, absent: &str) -> Part<T> {
        let Some(text) = self.text(name) else { return Part::Missing(absent.to_owned()) };
        // Facts that were missing when the snapshot was taken are written as such.
        match serde_json::from_str::<Part<T>>(&text) {
            Ok(part) => part,
            Err(error) => {
                self.note(name, format!("not understood: {error}"));
                Part::Missing(format!("{name} was not understood"))
            }
        }
    }

    fn cluster(&mut self) -> Cluster {
        if self.files.contains_key("cluster.json") {
            return match self.own::<Cluster>("cluster.json", "") {
                Part::Known(cluster) => cluster,
                Part::Missing(why) => Cluster::missing(&why),
            };
        }
        let mut objects = Objects::default();
        let mut any = false;
        for name in self.files.keys().filter(|name| name.starts_with("objects/")) {
            any = true;
            let mut notes = Notes::new(name);
            objects.read(&self.text(name).unwrap_or_default(), &mut notes);
            self.diagnostics.extend(notes.finish());
        }
        objects.cluster(if any { "not among the objects that were given" } else { "no Kubernetes objects were given" })
    }

    /// What listens in network namespaces, and their names.
    fn namespaces(&mut self) -> (Part<PodSockets>, BTreeMap<String, Vec<IpAddr>>) {
        let mut pods = PodSockets::default();
        let mut names = BTreeMap::new();
        for file in self.files.keys() {
            let Some(below) = file.strip_prefix("netns/") else { continue };
            let mut notes = Notes::new(file);
            if let Some((addresses, sockets)) = namespace(&self.text(file).unwrap_or_default(), &mut notes) {
                let name = below.split('/').next().unwrap_or(below).to_owned();
                pods.insert(addresses.iter().copied(), &sockets);
                names.insert(name, addresses);
            }
            self.diagnostics.extend(notes.finish());
        }
        if !names.is_empty() {
            return (Part::Known(pods), names);
        }
        let listeners = match self.own::<()>("netns.json", "nobody looked into the pods' network namespaces") {
            Part::Known(()) => Part::Known(pods),
            Part::Missing(why) => Part::Missing(why),
        };
        (listeners, names)
    }

    fn cni(&mut self) -> BTreeMap<String, Vec<IpAddr>> {
        let Some(text) = self.text("cni-results.json") else { return BTreeMap::new() };
        match serde_json::from_str::<BTreeMap<String, Value>>(&text) {
            Ok(results) => results.into_iter().map(|(name, result)| (name, result_addresses(&result))).collect(),
            Err(error) => {
                self.note("cni-results.json", format!("not understood: {error}"));
                BTreeMap::new()
            }
        }
    }

    /// What kube-proxy was told; the mode that it says that it runs in counts before the one that it was told.
    fn proxy(&mut self) -> Part<ProxyConfig> {
        const NAME: &str = "kube-proxy-config.json";
        let said = self.text("proxy-mode.txt").map(|text| text.trim().to_owned()).filter(|mode| !mode.is_empty());
        let told = match self.text(NAME).map(|text| kube_proxy::config(&text)) {
            Some(Ok(config)) => Ok(config),
            Some(Err(why)) => {
                self.note(NAME, format!("not understood: {why}"));
                Err("kube-proxy's configuration was not understood")
            }
            None => Err("kube-proxy's configuration is not known"),
        };
        match (told, said) {
            (Ok(config), None) => Part::Known(config),
            (Ok(config), Some(mode)) => Part::Known(ProxyConfig { mode, ..config }),
            (Err(_), Some(mode)) => Part::Known(ProxyConfig { mode, ..ProxyConfig::default() }),
            (Err(why), None) => Part::Missing(why.to_owned()),
        }
    }
}

/// The addresses of a CNI result (`ips[].address`, with a prefix).
fn result_addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result.get("ips").and_then(Value::as_array).into_iter().flatten();
    ips.filter_map(|ip| ip.get("address")?.as_str()?.parse::<IpNet>().ok()).map(|net| net.addr()).collect()
}

#[derive(Deserialize)]
struct Namespace {
    #[serde(default)]
    addr: Value,
    #[serde(default)]
    listen: Vec<Vec<String>>,
}

fn namespace(text: &str, notes: &mut Notes) -> Option<(Vec<IpAddr>, Vec<Socket>)> {
    let namespace: Namespace = match serde_json::from_str(text) {
        Ok(namespace) => namespace,
        Err(error) => {
            notes.add(0, format!("not understood: {error}"));
            return None;
        }
    };
    let addresses = iproute::addresses(&namespace.addr.to_string(), notes)?;
    let listing: String = namespace.listen.iter().map(|columns| columns.join(" ") + "\n").collect();
    let sockets = sockets::sockets(&listing, notes);
    Some((addresses.into_iter().map(|address| address.address).collect(), sockets))
}
