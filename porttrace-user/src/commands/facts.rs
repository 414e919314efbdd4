//! Where facts come from: this node, or a snapshot; and Kubernetes objects from files beside them.

use super::Usage;
use super::sources::Sources;
use anyhow::{Context, bail};
use porttrace_user::collect::{facts, live, snapshot};
use porttrace_user::core::kube::ebpf;
use porttrace_user::core::model::cluster::ObjectName;
use porttrace_user::core::model::facts::Facts;
use porttrace_user::core::parse::{self, Files};
use porttrace_user::core::simulate::ipvs_in_use;
use std::fs::File;
use std::io::{Read, stdin};
use std::path::{Path, PathBuf};

/// Objects from files may be this large together with the rest; those of a large cluster take some ten MB.
const LARGEST: u64 = 256 << 20;

/// `--snapshot`, `--objects`, and whom to ask on a live node.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Facts")]
pub struct Source {
    /// A snapshot: a tar (.tar, .tar.zst, .tar.gz) or a directory; no root and no node needed
    #[arg(long, value_name = "PATH")]
    snapshot: Option<PathBuf>,

    /// Kubernetes objects, as `kubectl get svc,endpointslices,pods,nodes -A -o json` (or yaml) prints them; - for standard
    /// input
    #[arg(long, value_name = "FILE", num_args = 1..)]
    objects: Vec<PathBuf>,

    #[command(flatten)]
    sources: Sources,
}

impl Source {
    /// Loads the facts.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn load(&self) -> anyhow::Result<Facts> {
        let mut files = match &self.snapshot {
            Some(path) => snapshot::read_files(path)?,
            None => {
                let node = live::Options { processes: true, conntrack: true, report: true };
                // Objects from files stand for what the API would say.
                let without_api = !self.objects.is_empty();
                facts::collect(&facts::Options { without_api, ..self.sources.options(node) }).files
            }
        };
        self.add_objects(&mut files)?;
        let mut facts = parse::facts(&files);
        facts.name_node();
        Ok(facts)
    }

    fn add_objects(&self, files: &mut Files) -> anyhow::Result<()> {
        if !self.objects.is_empty() {
            // What is named on the command line is what counts.
            files.retain(|name, _| name != "cluster.json" && !name.starts_with("objects/"));
        }
        for (index, path) in self.objects.iter().enumerate() {
            let bytes = read(path)?;
            let name = path.file_name().map_or_else(|| "stdin".to_owned(), |name| name.to_string_lossy().into_owned());
            files.insert(format!("objects/{index:03}-{name}"), bytes);
        }
        Ok(())
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let (name, reader): (String, Box<dyn Read>) = if path == Path::new("-") {
        ("standard input".to_owned(), Box::new(stdin().lock()))
    } else {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
        (name, Box::new(file))
    };
    let mut bytes = Vec::new();
    let size = reader.take(LARGEST + 1).read_to_end(&mut bytes).with_context(|| format!("cannot read {name}"))?;
    if size as u64 > LARGEST {
        bail!("{name} is larger than {} MiB; give fewer objects", LARGEST >> 20);
    }
    Ok(bytes)
}

/// Parts of the facts that are missing, a sentence each.
pub fn missing(facts: &Facts) -> Vec<String> {
    let cluster = &facts.cluster;
    let parts = [
        cluster.services.get().err(),
        cluster.slices.get().err(),
        cluster.pods.get().err(),
        cluster.nodes.get().err(),
        facts.listeners.get().err(),
        facts.sandboxes.get().err(),
    ];
    let mut sentences: Vec<String> = parts.into_iter().flatten().map(str::to_owned).collect();
    if facts.state.rulesets.is_empty() {
        sentences.push("no iptables rules: nothing that kube-proxy or portmap claims is known".to_owned());
    }
    if let Some(network) = ebpf::serving(&facts.state) {
        sentences.push(format!("{}; NodePorts that it serves are not listed", network.sentence()));
    }
    if let Some(sentence) = ipvs_in_use(&facts.state) {
        sentences.push(format!("{sentence}; what it serves is not listed"));
    }
    if let Some(tables) = facts.state.native_dnat() {
        sentences.push(format!(
            "native nftables rules (table {tables}) could not be read: what they serve is not listed, and what they send \
             elsewhere is not foreseen"
        ));
    }
    if facts.state.sockets.is_none() {
        sentences.push("the node's own sockets are not known".to_owned());
    }
    sentences.dedup();
    sentences
}

/// What is asked about: `9088`, `9088/udp`, `svc/NAME`, `pod/NAME`.
///
/// # Errors
/// A [`Usage`] that says what can be asked.
pub fn subject(text: &str, namespace: &str) -> Result<porttrace_user::core::explain::Subject, Usage> {
    use porttrace_user::core::explain::Subject;
    use porttrace_user::core::model::flow::Proto;
    let object = |name: &str| match name.split_once('/') {
        Some((namespace, name)) => ObjectName { namespace: namespace.to_owned(), name: name.to_owned() },
        None => ObjectName { namespace: namespace.to_owned(), name: name.to_owned() },
    };
    let asked = |rest: &str| Some(object(rest)).filter(|name| !name.name.is_empty() && !name.name.contains('/'));
    let (kind, rest) = text.split_once('/').unwrap_or((text, ""));
    let wrong = || wrong(text, kind, rest);
    match kind {
        "svc" | "service" | "services" => asked(rest).map(Subject::Service).ok_or_else(wrong),
        "po" | "pod" | "pods" => asked(rest).map(Subject::Pod).ok_or_else(wrong),
        number => {
            let port: u16 = number.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
            let proto = match rest {
                "" => None,
                name => Some(
                    Proto::from_name(&name.to_ascii_lowercase()).filter(|proto| proto.has_ports()).ok_or_else(wrong)?,
                ),
            };
            Ok(Subject::Port { port, proto })
        }
    }
}

/// Kinds of objects that have pods, and no ports of their own.
const CONTROLLERS: [&str; 12] = [
    "deploy",
    "deployment",
    "deployments",
    "rs",
    "replicaset",
    "replicasets",
    "sts",
    "statefulset",
    "statefulsets",
    "ds",
    "daemonset",
    "daemonsets",
];

/// What to ask instead.
fn wrong(text: &str, kind: &str, rest: &str) -> Usage {
    let plain = |name: &str| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.'))
    };
    Usage(if CONTROLLERS.contains(&kind) && rest.split('/').all(plain) {
        let name = rest.rsplit('/').next().unwrap_or_default();
        format!(
            "{text} has no ports of its own: ask for its Service (svc/{name}), or for one of its pods (pod/{name}: the beginning of its name will do)"
        )
    } else if plain(kind) && plain(rest) && kind.parse::<u64>().is_err() {
        format!("{text} may be of any kind: say svc/{text} or pod/{text}")
    } else if plain(text) && text.parse::<u64>().is_err() {
        format!(
            "{text:?} is neither a port (9088, 53/udp) nor an object: say svc/{text} or pod/{text}, with -n NAMESPACE"
        )
    } else {
        format!(
            "{text:?} is neither a port (9088, 53/udp) nor an object (svc/NAME, pod/NAME, with -n NAMESPACE): say one of them"
        )
    })
}
