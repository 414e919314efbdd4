//! The lab as the measurements use it: bare pods with the load's servers, clients outside of the cluster.

use crate::Arguments;
use anyhow::{Context, Result};
use porttrace_tests::lab::topology::{HOST_PORT, NodeName, OUTSIDE_V4};
use porttrace_tests::lab::{Lab, LabOptions, Phase};
use porttrace_tests::load::{Batch, Made, Mode, Pace, Servers, Until, make};
use porttrace_tests::netns::{ChildGuard, Netns};
use porttrace_user::core::model::flow::Proto;
use std::net::SocketAddrV4;
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A port that nobody connects to.
pub const OTHER_PORT: u16 = 9099;
/// The source ports of the clients' connections; everything else that connects has another one.
pub const CLIENT_PORTS: Range<u16> = 12_000..64_000;
/// How long a program may take to get ready or to end.
pub const WAIT: Duration = Duration::from_secs(60);

pub struct Scene {
    pub servers: Servers,
    pub lab: Lab,
    pub porttrace: PathBuf,
    /// For what the tools print.
    pub directory: tempfile::TempDir,
    clients: u16,
}

impl Scene {
    pub fn new(arguments: &Arguments) -> Result<Self> {
        let lab = Lab::up(LabOptions { phase: Phase::Fixed, bare: true, ..LabOptions::default() })?;
        // A port is used again within some seconds, and shall then be a new connection.
        for kind in ["udp_timeout", "tcp_timeout_close"] {
            lab.node(NodeName::Worker3).exec(["sysctl", "-qw", &format!("net.netfilter.nf_conntrack_{kind}=1")])?;
        }
        // Whoever else connects from outside takes none of the clients' ports.
        lab.outside.exec(["sysctl", "-qw", "net.ipv4.ip_local_port_range=2000 9999"])?;
        Ok(Self {
            servers: Servers::in_pods(&lab, Mode::Count)?,
            lab,
            porttrace: arguments.porttrace.clone(),
            directory: tempfile::tempdir().context("making a directory for what the tools print")?,
            clients: arguments.clients,
        })
    }

    /// The node that is looked at.
    pub fn node(&self) -> &Netns {
        self.lab.node(NodeName::Worker3)
    }

    /// Where the clients connect to.
    pub fn target(&self) -> SocketAddrV4 {
        SocketAddrV4::new(NodeName::Worker3.v4(), HOST_PORT)
    }

    /// Opens new connections from outside for some time.
    pub fn connect(&self, proto: Proto, pace: Pace, duration: Duration) -> Result<Made> {
        self.connect_from(CLIENT_PORTS, proto, pace, Until::Time(Instant::now() + duration))
    }

    /// As [`Scene::connect`], from given ports.
    pub fn connect_from(&self, ports: Range<u16>, proto: Proto, pace: Pace, until: Until) -> Result<Made> {
        let batch = Batch { proto, from: OUTSIDE_V4, ports, to: self.target() };
        make(&self.lab.outside, &batch.split(self.clients), until, pace, &self.servers)
    }

    /// `porttrace watch` of a port on the node, ready; its log as text is collected.
    pub fn watch(&self, port: u16, options: &[&str]) -> Result<ChildGuard> {
        let mut command = self.node().command(&self.porttrace);
        command.args(["watch", &port.to_string()]).args(options).env("PATH", self.lab.tools.path());
        let watch = ChildGuard::spawn(command)?;
        let is_ready =
            |line: &str| (line.contains("ready after") || line.contains("\"state\":\"ready\"")).then_some(());
        watch
            .stdout
            .wait_for(WAIT, is_ready)
            .with_context(|| format!("porttrace does not get ready: {:?}", watch.stderr.snapshot()))?;
        Ok(watch)
    }
}
