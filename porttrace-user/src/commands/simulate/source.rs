//! Where the state comes from: this node, a snapshot, pasted rules.

use super::super::Usage;
use super::super::sources::Sources;
use anyhow::{Context, bail};
use porttrace_user::collect::{facts, live, snapshot};
use porttrace_user::core::kube::owners::{Claim, ClaimKind, Owners};
use porttrace_user::core::model::cluster::Part;
use porttrace_user::core::model::facts::Facts;
use porttrace_user::core::model::flow::{Family, Tuple};
use porttrace_user::core::model::rules::{MatchKind, Net};
use porttrace_user::core::model::state::{Address, Diagnostic, NodeState};
use porttrace_user::core::model::trace::Packet;
use porttrace_user::core::parse;
use porttrace_user::core::parse::paste::{self, Paste};
use std::fs::File;
use std::io::{Read, stdin};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pasted rules may be this large; the rules of 5,000 Services take 15 MB.
const LARGEST: u64 = 256 << 20;
/// So many diagnostics are printed without `-v`.
const SHOWN: usize = 5;

/// `--snapshot`, `--rules`.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "State")]
pub struct Source {
    /// A snapshot: a tar (.tar, .tar.zst, .tar.gz) or a directory; no root and no node needed
    #[arg(long, value_name = "PATH")]
    snapshot: Option<PathBuf>,

    /// Pasted rules instead of the snapshot's (or alone): iptables-save, iptables -S, iptables -nvL or nft -j text; - for standard
    /// input
    #[arg(long, value_name = "FILE")]
    rules: Vec<PathBuf>,

    #[command(flatten)]
    sources: Sources,
}

/// A state, and what is known to be missing from it.
pub struct Loaded {
    pub state: NodeState,
    pasted: bool,
    missing: Vec<String>,
    /// Families whose rules are a paste of some tables only, with the tables that are there.
    partial: Vec<(Family, Vec<String>)>,
}

impl Source {
    /// Loads the state, and where `pods` are asked for by name what is known of them.
    ///
    /// # Errors
    /// When a file cannot be read or holds no rules.
    pub fn load(&self, pods: bool) -> anyhow::Result<(Loaded, Facts)> {
        let mut facts = match &self.snapshot {
            Some(path) if pods => parse::facts(&snapshot::read_files(path)?),
            Some(path) => Facts { state: snapshot::read(path)?, ..Facts::default() },
            None if !self.rules.is_empty() => nothing(),
            None if pods => facts::read(&self.sources.options(LIVE)).0,
            None => Facts { state: live::node(LIVE).state, ..Facts::default() },
        };
        let name = facts.state.name.clone();
        let state = std::mem::replace(&mut facts.state, NodeState { name, ..NodeState::default() });
        let mut loaded = Loaded { state, pasted: !self.rules.is_empty(), missing: Vec::new(), partial: Vec::new() };
        if !self.rules.is_empty() {
            loaded.paste(self.pasted()?);
        }
        Ok((loaded, facts))
    }

    fn pasted(&self) -> anyhow::Result<Paste> {
        let mut all = Paste::default();
        for path in &self.rules {
            let (text, name) = read(path)?;
            match paste::read(&text, &name) {
                Some(paste) => paste::merge(&mut all, paste),
                None => bail!(Usage(format!(
                    "{name} has no line that looks like a rule: it must be what iptables-save, iptables -S, iptables -nvL or nft -j list ruleset print"
                ))),
            }
        }
        Ok(all)
    }
}

impl Loaded {
    fn paste(&mut self, paste: Paste) {
        let state = &mut self.state;
        state.rulesets.retain(|old| paste.rulesets.iter().all(|new| new.family != old.family));
        for ruleset in paste.rulesets {
            if paste.partial {
                let tables = ruleset.tables.iter().map(|table| table.name.to_string()).collect();
                self.partial.push((ruleset.family, tables));
            }
            state.rulesets.push(ruleset.into());
        }
        state.native_rules.retain(|old| paste.native.iter().all(|new| new.family != old.family));
        state.native_rules.extend(paste.native.into_iter().map(Arc::new));
        state.diagnostics.extend(paste.diagnostics);
        self.missing = paste.missing;
    }

    /// Where no address of the node is known, a packet that arrives is taken to be for the node itself, unless kube-proxy's
    /// rules say that its destination is a Service's; one that is sent here comes from an address of the node.
    pub fn assume_addresses(&mut self, packet: &Packet) -> Option<String> {
        let unknown = self.state.addresses.is_none() && self.state.routes.is_none();
        if !unknown || self.state.all_rules().next().is_none() {
            return None;
        }
        let Tuple { src, dst, .. } = packet.tuple;
        let (own, interface) = match &packet.input {
            Some(_) if self.is_service(dst) => (None, ""),
            Some(input) => (Some(dst), &**input),
            None => (Some(src), "eth0"),
        };
        let address = |address: IpAddr, interface: &str| Address {
            interface: interface.to_owned(),
            address,
            prefix: if address.is_ipv4() { 32 } else { 128 },
            scope: "global".to_owned(),
            secondary: false,
        };
        // Every node has these.
        let mut addresses = vec![address(Ipv4Addr::LOCALHOST.into(), "lo"), address(Ipv6Addr::LOCALHOST.into(), "lo")];
        addresses.extend(own.filter(|own| !own.is_loopback()).map(|own| address(own, interface)));
        self.state.addresses = Some(addresses);
        Some(match own {
            Some(own) => format!("this node's addresses are not known: {own} is taken as its own, all others as not"),
            None => format!(
                "this node's addresses are not known: {dst} is a Service's, by the rules, and taken as not its own"
            ),
        })
    }

    fn is_service(&self, address: IpAddr) -> bool {
        let claims = |claim: &Claim| matches!(claim.kind, ClaimKind::ServicePort { address: of, .. } if of == address);
        if !self.state.native_rules.is_empty() && Owners::of(&self.state).all().any(claims) {
            return true;
        }
        let tables = self.state.rulesets.iter().flat_map(|ruleset| &ruleset.tables).filter(|table| table.name == "nat");
        let mut rules = tables.filter_map(|table| table.chain("KUBE-SERVICES")).flat_map(|chain| &chain.rules);
        rules.any(|rule| {
            rule.matches.iter().any(|part| match (&part.kind, address) {
                (MatchKind::Destination(Net::V4 { addr, mask: u32::MAX }), IpAddr::V4(four)) => {
                    *addr == u32::from(four)
                }
                (MatchKind::Destination(Net::V6(net)), IpAddr::V6(six)) => **net == (u128::from(six), u128::MAX),
                _ => false,
            })
        })
    }

    /// What the pasted rules leave open for a packet of this family.
    pub fn missing_for(&self, family: Family) -> impl Iterator<Item = String> {
        let tables = self.partial.iter().find(|(of, _)| *of == family).and_then(|(_, tables)| {
            let absent: Vec<&str> = ["raw", "mangle", "nat", "filter"]
                .into_iter()
                .filter(|name| tables.iter().all(|t| t != name))
                .collect();
            (!absent.is_empty())
                .then(|| format!("tables that were not pasted are taken as empty: {}", absent.join(", ")))
        });
        let none = self.pasted && self.state.all_rules().all(|ruleset| ruleset.family != family);
        let name = if family == Family::V4 { "IPv4" } else { "IPv6" };
        let none = none.then(|| format!("no {name} rules were pasted: the packet meets none"));
        self.missing.iter().cloned().chain(tables).chain(none)
    }

    /// Says on standard error what could not be read, a few lines of it unless all are wanted.
    pub fn complain(&self, verbose: u8) {
        let diagnostics = &self.state.diagnostics;
        let shown = if verbose > 0 { diagnostics.len() } else { SHOWN };
        for diagnostic in diagnostics.iter().take(shown) {
            eprintln!("porttrace: {}", sentence(diagnostic));
        }
        if diagnostics.len() > shown {
            eprintln!("porttrace: and {} more remarks on the state (-v shows them)", diagnostics.len() - shown);
        }
    }
}

fn sentence(diagnostic: &Diagnostic) -> String {
    let Diagnostic { source, line, message } = diagnostic;
    let text = if *line == 0 { format!("{source}: {message}") } else { format!("{source}:{line}: {message}") };
    text.replace(char::is_control, "�")
}

/// What is asked of the node that this runs on.
const LIVE: live::Options = live::Options { processes: true, conntrack: true, report: false };

/// What pasted rules alone tell of a node.
fn nothing() -> Facts {
    let mut facts = Facts::default();
    let why = || "only a snapshot, or a live node, brings pods".to_owned();
    (facts.cluster.pods, facts.sandboxes) = (Part::Missing(why()), Part::Missing(why()));
    facts
}

/// A text file of bounded size, and its name; bytes that are no UTF-8 become replacement characters.
fn read(path: &Path) -> anyhow::Result<(String, String)> {
    let name = if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() };
    let mut bytes = Vec::new();
    let size = if path == Path::new("-") {
        stdin().lock().take(LARGEST + 1).read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|file| file.take(LARGEST + 1).read_to_end(&mut bytes))
    };
    let size = size.with_context(|| format!("cannot read {name}"))?;
    if size as u64 > LARGEST {
        bail!("{name} is larger than {} MiB, the limit for pasted rules; give the part that matters", LARGEST >> 20);
    }
    Ok((String::from_utf8_lossy(&bytes).into_owned(), name))
}
