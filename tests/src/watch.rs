//! `porttrace watch --json` as the tests use it: started in a node's namespace, its lines put together by connection.

use crate::lab::rules::Tools;
use crate::netns::{ChildGuard, Netns};
use anyhow::{Context, Result, anyhow, bail};
use porttrace_user::collect::probe::Backend;
use porttrace_user::core::model::flow::Tuple;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long `watch` may take to get ready.
const READY: Duration = Duration::from_secs(20);

/// Names the conntrack backend that every watch must run with; unset or empty: the one that porttrace chooses.
pub const BACKEND: &str = "PORTTRACE_BACKEND";

/// The backend that [`BACKEND`] asks for: as the option names it, and as the header must.
fn wanted_backend() -> Result<Option<(&'static str, &'static str)>> {
    match std::env::var(BACKEND).as_deref() {
        Ok("fentry") => Ok(Some(("fentry", "conntrack by fentry programs"))),
        Ok("kprobe") => Ok(Some(("kprobe", "conntrack by kprobes"))),
        Ok("netfilter") => Ok(Some(("netfilter", "conntrack by NETFILTER programs"))),
        Ok("") | Err(_) => Ok(None),
        Ok(other) => bail!("{BACKEND} is fentry, kprobe or netfilter, not {other:?}"),
    }
}

/// The backend that [`BACKEND`] asks for, of a probe without `watch`.
///
/// # Panics
/// When it names none that there is.
pub fn backend() -> Backend {
    match std::env::var(BACKEND).as_deref() {
        Ok("fentry") => Backend::Fentry,
        Ok("kprobe") => Backend::Kprobe,
        Ok("netfilter") => Backend::Netfilter,
        Ok("") | Err(_) => Backend::Auto,
        Ok(other) => panic!("{BACKEND} is fentry, kprobe or netfilter, not {other:?}"),
    }
}

/// The porttrace binary: `$PORTTRACE`, or the one in the same target directory as the running test.
pub fn porttrace() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PORTTRACE") {
        return Ok(path.into());
    }
    let exe = std::env::current_exe()?;
    let beside =
        exe.ancestors().skip(1).take(2).map(|directory| directory.join("porttrace")).find(|path| path.is_file());
    beside.ok_or_else(|| {
        anyhow!(
            "porttrace is not beside {}: build it with `cargo build -p porttrace-user`, or set PORTTRACE",
            exe.display()
        )
    })
}

/// A running `porttrace watch --json`.
pub struct Watch {
    pub process: ChildGuard,
    /// Lines of its output that were read so far.
    read: usize,
    open: Vec<Connection>,
    told: Vec<Connection>,
    /// Lines of other types: `status`, `note`, `lost`, `flow-end`, and verdicts that amend earlier ones.
    pub others: Vec<Value>,
}

/// What `watch` told about one connection.
#[derive(Clone, Debug)]
pub struct Connection {
    pub original: Tuple,
    pub start: Value,
    pub hops: Vec<Value>,
    pub verdict: Value,
}

impl Watch {
    /// Starts it and waits until it is ready. `arguments`: the ports, and options.
    pub fn start(netns: &Netns, tools: &Tools, arguments: &[&str]) -> Result<Self> {
        let mut command = netns.command(porttrace()?);
        command.args(["watch", "--json"]).args(arguments).env("PATH", tools.path());
        let backend = wanted_backend()?;
        if let Some((name, _)) = backend {
            command.args(["--conntrack-backend", name]);
        }
        let (watch, ready) = Self::of(ChildGuard::spawn(command)?)?;
        let runs = ready["probes"].as_str().unwrap_or_default();
        if let Some((_, header)) = backend
            && !runs.contains(header)
        {
            bail!("{BACKEND} asks for {header}, and the header says: {runs}");
        }
        Ok(watch)
    }

    /// Takes over a process that somebody started, and waits until it is ready; also what it says then.
    pub fn of(process: ChildGuard) -> Result<(Self, Value)> {
        let mut watch = Self { process, read: 0, open: Vec::new(), told: Vec::new(), others: Vec::new() };
        let Some(ready) = watch.status("ready", READY)? else {
            watch.process.stderr.wait_closed(Duration::from_secs(1));
            bail!("porttrace does not get ready: {:?}", watch.process.stderr.snapshot());
        };
        Ok((watch, ready))
    }

    /// Waits until it has told the connection with this original tuple, and hands it out (the oldest that is left).
    pub fn connection(&mut self, original: Tuple, timeout: Duration) -> Result<Connection> {
        let is_it = move |connection: &Connection| connection.original == original;
        if !self.read_until(timeout, move |watch| watch.told.iter().any(is_it))? {
            let told: Vec<String> = self.told.iter().map(|connection| connection.original.to_string()).collect();
            bail!("nothing was told about {} {original} within {timeout:?}, but about {told:?}", original.proto);
        }
        let index = self.told.iter().position(is_it).context("it was there a moment ago")?;
        Ok(self.told.remove(index))
    }

    /// Waits for a `status` line with this state.
    pub fn status(&mut self, state: &str, timeout: Duration) -> Result<Option<Value>> {
        let wanted = |line: &&Value| line["type"] == "status" && line["state"] == state;
        // Each line is looked at once, however many come meanwhile.
        let (mut seen, mut found) = (0, None);
        self.read_until(timeout, |watch| {
            let new = watch.others.get(seen..).unwrap_or_default();
            found = new.iter().find(wanted).cloned();
            seen = watch.others.len();
            found.is_some()
        })?;
        Ok(found)
    }

    /// Original tuples of what was told and not handed out.
    pub fn left_over(&self) -> Vec<Tuple> {
        self.told.iter().chain(&self.open).map(|connection| connection.original).collect()
    }

    /// Reads lines until `done`; whether that came about before the deadline and the end of the output.
    pub fn read_until(&mut self, timeout: Duration, mut done: impl FnMut(&Self) -> bool) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        while !done(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(line) = self.process.stdout.wait_from(self.read, left, |line| Some(line.to_owned())) else {
                return Ok(false);
            };
            self.read += 1;
            self.take(&line)?;
        }
        Ok(true)
    }

    fn take(&mut self, line: &str) -> Result<()> {
        let value: Value = serde_json::from_str(line).with_context(|| format!("watch printed {line:?}"))?;
        if value["v"] != 1 {
            bail!("not schema version 1: {line}");
        }
        let same = |connection: &Connection| connection.start["id"] == value["id"];
        match value["type"].as_str() {
            Some("flow-start") => {
                let original = field(&value)?;
                self.open.push(Connection { original, start: value, hops: Vec::new(), verdict: Value::Null });
            }
            Some("hop") => {
                let connection = self.open.iter_mut().find(|connection| same(connection));
                connection.with_context(|| format!("a hop without its flow-start: {line}"))?.hops.push(value);
            }
            Some("verdict") if value["amends"] == true => self.others.push(value),
            Some("verdict") => {
                let index = self.open.iter().position(same);
                let mut connection =
                    self.open.remove(index.with_context(|| format!("a verdict without its flow-start: {line}"))?);
                connection.verdict = value;
                self.told.push(connection);
            }
            Some(_) => self.others.push(value),
            None => bail!("a line without a type: {line}"),
        }
        Ok(())
    }
}

/// A rule that `watch` predicted: table, chain, and number (`None`: the policy).
pub type PredictedRule = (String, String, Option<u32>);

impl Connection {
    /// Every rule of every `rules` hop, in order.
    pub fn rules(&self) -> Vec<PredictedRule> {
        let mut rules = Vec::new();
        for hop in self.hops.iter().filter(|hop| hop["kind"] == "rules") {
            for rule in hop["rules"].as_array().into_iter().flatten() {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let number = rule["number"].as_u64().and_then(|number| u32::try_from(number).ok());
                rules.push((text(&hop["table"]), text(&rule["chain"]), number));
            }
        }
        rules
    }

    /// The conntrack tuples that it observed.
    pub fn conntrack(&self) -> Option<(Tuple, Tuple)> {
        let conntrack = &self.verdict["conntrack"];
        Some((field(&conntrack["original"]).ok()?, field(&conntrack["reply"]).ok()?))
    }

    /// All of it as indented JSON, for a failing test's message.
    pub fn report(&self) -> String {
        let lines: Vec<String> = self.hops.iter().map(Value::to_string).collect();
        format!("{}\n  {}\n{}", self.start, lines.join("\n  "), self.verdict)
    }
}

fn field<T: DeserializeOwned>(value: &Value) -> Result<T> {
    T::deserialize(value).with_context(|| format!("in {value}"))
}
