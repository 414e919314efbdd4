//! Real CNI plugins, run as a container runtime runs them: one configuration each, `CNI_*` variables, the node's namespace.

use super::rules::Tools;
use super::topology::NodeName;
use crate::netns::{Netns, run};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::net::IpAddr;
use std::path::Path;

/// Where Debian's containernetworking-plugins puts the plugins.
pub const PLUGINS: &str = "/usr/lib/cni";

/// Which plugin makes a pod's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Interface {
    /// A veth pair with a host route, as kind's kindnet does.
    #[default]
    Ptp,
    /// A veth pair on a bridge `cni0`.
    Bridge,
}

/// One of a pod's hostPorts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortMapping {
    pub host_port: u16,
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: &'static str,
    /// `hostIP`; any address when `None`.
    pub host_ip: Option<IpAddr>,
}

/// A sandbox that is to be, or was, attached.
pub struct Attachment<'a> {
    pub node: &'a Netns,
    pub node_name: NodeName,
    pub pod: &'a Netns,
    pub container_id: &'a str,
    /// host-local's data directory of the node.
    pub data: &'a Path,
    pub tools: &'a Tools,
    pub interface: Interface,
    pub addresses: [IpAddr; 2],
    pub mappings: &'a [PortMapping],
    /// Bytes.
    pub mtu: u32,
}

impl Attachment<'_> {
    /// CNI ADD: the interface plugin, then portmap. Returns the last result.
    pub fn add(&self) -> Result<Value> {
        let mut result = self.call("ADD", self.interface_conf())?;
        if !self.mappings.is_empty() {
            let mut conf = self.portmap_conf();
            conf["prevResult"] = result;
            result = self.call("ADD", conf)?;
        }
        Ok(result)
    }

    /// CNI DEL, in the opposite order.
    pub fn del(&self) -> Result<()> {
        if !self.mappings.is_empty() {
            self.call("DEL", self.portmap_conf())?;
        }
        self.call("DEL", self.interface_conf()).map(drop)
    }

    /// kind's `10-kindnet.conflist`, first plugin, with the addresses that are asked for.
    fn interface_conf(&self) -> Value {
        let subnet = self.node_name.subnet();
        let mut conf = json!({
            "cniVersion": "0.4.0", "name": "kindnet", "mtu": self.mtu,
            "ipam": {
                "type": "host-local", "dataDir": self.data,
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                "ranges": [[{"subnet": format!("10.244.{subnet}.0/24")}], [{"subnet": format!("fd00:10:244:{subnet}::/64")}]],
            },
            "runtimeConfig": {"ips": self.addresses.map(|address| address.to_string())},
        });
        match self.interface {
            Interface::Ptp => {
                conf["type"] = json!("ptp");
                conf["ipMasq"] = json!(false);
            }
            Interface::Bridge => {
                conf["type"] = json!("bridge");
                conf["bridge"] = json!("cni0");
                conf["isGateway"] = json!(true);
                conf["hairpinMode"] = json!(true);
            }
        }
        conf
    }

    /// The second plugin, with the runtime's port mappings.
    fn portmap_conf(&self) -> Value {
        let mapping = |mapping: &PortMapping| {
            let mut value = json!({
                "hostPort": mapping.host_port, "containerPort": mapping.container_port, "protocol": mapping.protocol,
            });
            if let Some(address) = mapping.host_ip {
                value["hostIP"] = json!(address.to_string());
            }
            value
        };
        json!({
            "cniVersion": "0.4.0", "name": "kindnet", "type": "portmap",
            "runtimeConfig": {"portMappings": self.mappings.iter().map(mapping).collect::<Vec<_>>()},
        })
    }

    fn call(&self, verb: &str, conf: Value) -> Result<Value> {
        let plugin = conf["type"].as_str().unwrap_or_default().to_owned();
        let mut command = self.node.command(Path::new(PLUGINS).join(&plugin));
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", self.container_id)
            .env("CNI_NETNS", self.pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", PLUGINS)
            .env("PATH", self.tools.path());
        let answer = run(&mut command, Some(&conf.to_string())).with_context(|| format!("CNI {verb} of {plugin}"))?;
        if answer.trim().is_empty() {
            if verb == "ADD" {
                bail!("CNI ADD of {plugin} answered nothing");
            }
            return Ok(Value::Null);
        }
        serde_json::from_str(&answer).with_context(|| format!("CNI {verb} of {plugin} answered {answer:?}"))
    }
}
