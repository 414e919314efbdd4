//! What a container runtime adds to its answers when asked to be verbose: JSON that CRI does not define, in which containerd
//! (pkg/cri/sbserver/sandbox_status.go, image_status.go) and CRI-O (server/sandbox_status.go, image_status.go) agree on the
//! parts that are read here. Environment, arguments and labels stand in it too, and are passed over.

use crate::core::model::cluster::ExposedPort;
use crate::core::model::flow::Proto;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::collections::BTreeMap;

/// Where a sandbox's network namespace is, from the `info` of PodSandboxStatus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// A file that holds it.
    Path(String),
    /// The one of this process.
    Process(u32),
}

impl Namespace {
    /// The file to open.
    pub fn path(&self) -> String {
        match self {
            Self::Path(path) => path.clone(),
            Self::Process(pid) => format!("/proc/{pid}/ns/net"),
        }
    }
}

#[derive(Deserialize)]
struct SandboxInfo {
    #[serde(default)]
    pid: u32,
    #[serde(default, rename = "runtimeSpec")]
    spec: Option<RuntimeSpec>,
}

#[derive(Deserialize)]
struct RuntimeSpec {
    linux: Option<Linux>,
}

#[derive(Deserialize)]
struct Linux {
    #[serde(default)]
    namespaces: Vec<SpecNamespace>,
}

/// One of `linux.namespaces` of the OCI runtime specification.
#[derive(Deserialize)]
struct SpecNamespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

/// The network namespace of a sandbox that has one of its own; `None` when the text does not tell.
pub fn namespace(info: &str) -> Option<Namespace> {
    let info: SandboxInfo = serde_json::from_str(info).ok()?;
    let listed = info.spec.and_then(|spec| spec.linux).map(|linux| linux.namespaces).unwrap_or_default();
    let path = listed.into_iter().find(|namespace| namespace.kind == "network").map(|namespace| namespace.path);
    match path {
        Some(path) if !path.is_empty() => Some(Namespace::Path(path)),
        _ => (info.pid != 0).then_some(Namespace::Process(info.pid)),
    }
}

#[derive(Deserialize)]
struct ImageInfo {
    #[serde(rename = "imageSpec")]
    spec: Option<ImageSpec>,
}

#[derive(Deserialize)]
struct ImageSpec {
    config: Option<ImageConfig>,
}

#[derive(Deserialize)]
struct ImageConfig {
    #[serde(default, rename = "ExposedPorts")]
    exposed: Option<BTreeMap<String, IgnoredAny>>,
}

/// The ExposedPorts of an image, sorted, from the `info` of ImageStatus; `None` when the text has no image configuration.
pub fn exposed(info: &str) -> Option<Vec<ExposedPort>> {
    let config = serde_json::from_str::<ImageInfo>(info).ok()?.spec?.config?;
    let mut ports: Vec<ExposedPort> =
        config.exposed.unwrap_or_default().keys().filter_map(|text| exposed_port(text)).collect();
    ports.sort_unstable();
    ports.dedup();
    Some(ports)
}

/// `80/tcp`, `53/udp`, or `80` (OCI image specification, config.md, ExposedPorts).
fn exposed_port(text: &str) -> Option<ExposedPort> {
    let (port, proto) = text.split_once('/').unwrap_or((text, "tcp"));
    let proto = Proto::from_name(&proto.to_ascii_lowercase()).filter(|proto| proto.has_ports())?;
    Some(ExposedPort { port: port.parse().ok().filter(|port| *port != 0)?, proto })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(ports: Option<Vec<ExposedPort>>) -> Option<Vec<String>> {
        ports.map(|ports| ports.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn exposed_ports_are_sorted_and_nonsense_is_passed_over() {
        let info = r#"{"chainID":"sha256:1","imageSpec":{"config":{"Env":["A=b"],"ExposedPorts":
            {"8080/tcp":{},"80":{},"53/UDP":{},"0/tcp":{},"x/tcp":{},"90/icmp":{},"80/tcp":{}}}}}"#;
        assert_eq!(texts(exposed(info)), Some(vec!["53/udp".into(), "80/tcp".into(), "8080/tcp".into()]));
        assert_eq!(texts(exposed(r#"{"imageSpec":{"config":{"Cmd":["sh"]}}}"#)), Some(Vec::new()));
        assert_eq!(texts(exposed(r#"{"imageSpec":{"config":{"ExposedPorts":null}}}"#)), Some(Vec::new()));
        for nothing in ["", "{}", "[]", r#"{"imageSpec":{}}"#, r#"{"imageSpec":{"config":{"ExposedPorts":7}}}"#] {
            assert_eq!(exposed(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn a_namespace_is_a_path_or_else_a_process() {
        let spec = |namespace: &str| {
            format!(r#"{{"pid":41,"runtimeSpec":{{"linux":{{"namespaces":[{{"type":"pid"}},{namespace}]}}}}}}"#)
        };
        let path = "/var/run/netns/cni-1";
        let held = namespace(&spec(&format!(r#"{{"type":"network","path":"{path}"}}"#)));
        assert_eq!(held, Some(Namespace::Path(path.to_owned())));
        assert_eq!(namespace(&spec(r#"{"type":"network"}"#)), Some(Namespace::Process(41)));
        assert_eq!(namespace(r#"{"pid":41}"#).map(|at| at.path()), Some("/proc/41/ns/net".to_owned()));
        for nothing in ["", "{}", r#"{"pid":0}"#, r#"{"pid":"x"}"#] {
            assert_eq!(namespace(nothing), None, "{nothing}");
        }
    }
}
