//! What is known of the pods that connections fail at: what listens in them, who they are, what their images expose; and of
//! who makes the rules that lead there.

use porttrace_user::collect::kubernetes::{ApiError, Watch};
use porttrace_user::collect::{facts, kube_proxy, pods};
use porttrace_user::core::model::cluster::{Cluster, Part, Sandbox};
use porttrace_user::core::model::facts::ProxyConfig;
use porttrace_user::core::model::pods::PodSockets;
use porttrace_user::core::model::state::Socket;
use porttrace_user::core::model::workloads::Workloads;
use std::net::IpAddr;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::Instant;

/// Read when a connection that failed asks for it, and kept for a moment.
pub struct Pods {
    pub listeners: Part<PodSockets>,
    pub workloads: Workloads,
    pub cluster: Cluster,
    pub sandboxes: Part<Vec<Sandbox>>,
    pub makers: Makers,
    /// Rises whenever any of them changes.
    pub generation: u64,
    options: facts::Options,
    nothing: PodSockets,
    read_at: Option<Instant>,
    /// How long that took.
    took: Duration,
    asked_at: Option<Instant>,
    makers_at: Option<Instant>,
    api: Following,
    /// The API's changes that the cluster holds.
    changes: u64,
}

/// Who makes rules, beyond what the rules say.
#[derive(Clone, Default, PartialEq)]
pub struct Makers {
    pub proxy: Part<ProxyConfig>,
}

impl Makers {
    fn read() -> Self {
        Self { proxy: kube_proxy::read() }
    }
}

/// The local copy of what the Kubernetes API says.
enum Following {
    Starting(JoinHandle<Result<Watch, ApiError>>),
    Running(Box<Watch>),
    Nothing,
}

impl Pods {
    /// Sockets are read again when they are older than this, and than this many times what reading them took.
    const FRESH: Duration = Duration::from_secs(2);
    const SHARE: u32 = 20;
    /// A container runtime that did not answer is left alone for this long: a refusal waits for the answer.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Starts following the Kubernetes API, where there is one; nothing waits for it.
    pub fn follow(options: facts::Options) -> Self {
        let asked = options.clone();
        // Credentials may come from a program, which nobody here may wait for.
        let starting =
            spawn_blocking(move || Handle::current().block_on(Watch::start(facts::kubernetes_options(&asked))));
        Self {
            listeners: Part::default(),
            workloads: Workloads::default(),
            cluster: Cluster::default(),
            sandboxes: Part::default(),
            makers: Makers::default(),
            generation: 0,
            options,
            nothing: PodSockets::default(),
            read_at: None,
            took: Duration::ZERO,
            asked_at: None,
            makers_at: None,
            api: Following::Starting(starting),
            changes: 0,
        }
    }

    /// Pods may have come or gone: what was read is old.
    pub fn expect_changes(&mut self) {
        self.read_at = None;
        self.makers_at = None;
    }

    /// What listens in the pods; nothing where nobody could look.
    pub fn sockets(&self) -> &PodSockets {
        self.listeners.known().unwrap_or(&self.nothing)
    }

    /// Takes over what a pod's own network namespace says of it; that counts, whatever else has its addresses.
    pub fn hear(&mut self, addresses: impl IntoIterator<Item = IpAddr>, sockets: &[Socket]) {
        let mut listeners = self.sockets().clone();
        listeners.insert(addresses, sockets);
        if self.listeners.known() != Some(&listeners) {
            self.listeners = Part::Known(listeners);
            self.generation += 1;
        }
    }

    /// Brings up to date what is known of the pod with this address.
    pub async fn refresh(&mut self, address: IpAddr) {
        let is_fresh = |at: Option<Instant>, age| at.is_some_and(|at| at.elapsed() < age);
        if is_fresh(self.read_at, Self::FRESH.max(self.took * Self::SHARE)) {
            return;
        }
        let begun = Instant::now();
        let known = self.sandboxes.known().map(Vec::as_slice).unwrap_or_default();
        let knows = known.iter().any(|sandbox| sandbox.ready && sandbox.ips.contains(&address));
        let age = if self.sandboxes.known().is_some() { Self::FRESH } else { Self::PATIENCE };
        let asks = !knows && !is_fresh(self.asked_at, age);
        let asks_makers = !is_fresh(self.makers_at, Self::PATIENCE);
        let (options, known, makers) = (self.options.clone(), self.sandboxes.clone(), self.makers.clone());
        let reading = spawn_blocking(move || {
            let sandboxes = if asks { facts::sandboxes(&options) } else { known };
            let namespaces = pods::namespaces(sandboxes.known().map(Vec::as_slice).unwrap_or_default());
            (sandboxes, namespaces, if asks_makers { Makers::read() } else { makers })
        });
        if let Ok((sandboxes, namespaces, makers)) = reading.await {
            let listeners = match &namespaces {
                Part::Known(_) => Part::Known(pods::sockets(&namespaces)),
                Part::Missing(why) => Part::Missing(why.clone()),
            };
            self.take(listeners, sandboxes, makers).await;
        }
        let now = Instant::now();
        self.read_at = Some(now);
        self.took = now - begun;
        if asks {
            self.asked_at = Some(now);
        }
        if asks_makers {
            self.makers_at = Some(now);
        }
    }

    /// Takes over what was read, and what the API says by now.
    async fn take(&mut self, listeners: Part<PodSockets>, sandboxes: Part<Vec<Sandbox>>, makers: Makers) {
        let cluster = self.changed_cluster().await;
        let names_change = cluster.is_some() || sandboxes != self.sandboxes;
        self.cluster = cluster.unwrap_or_else(|| std::mem::take(&mut self.cluster));
        if names_change {
            self.workloads = Workloads::new(&self.cluster, &sandboxes);
        }
        if names_change || listeners != self.listeners || makers != self.makers {
            self.generation += 1;
        }
        (self.sandboxes, self.listeners, self.makers) = (sandboxes, listeners, makers);
    }

    /// What the API says, if that is not what is known already.
    async fn changed_cluster(&mut self) -> Option<Cluster> {
        if let Following::Starting(starting) = &mut self.api {
            if !starting.is_finished() {
                return None;
            }
            self.api = match starting.await {
                Ok(Ok(watch)) => Following::Running(Box::new(watch)),
                _ => Following::Nothing,
            };
        }
        match &self.api {
            Following::Running(watch) => {
                let changes = watch.changes();
                let changed = changes != self.changes;
                self.changes = changes;
                changed.then(|| watch.cluster())
            }
            _ => None,
        }
    }
}
