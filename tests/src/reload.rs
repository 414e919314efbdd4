//! A dump through iptables' own tools: checked, loaded into an empty namespace, and printed again.

use crate::lab::nfacct;
use crate::lab::rules::IptablesFlavour;
use crate::netns::{self, Netns};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// How long each tool took.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// `iptables-restore --test`.
    pub check: Duration,
    /// `iptables-restore`.
    pub load: Duration,
    /// `iptables-save -c`.
    pub save: Duration,
}

/// Loads `dump` (what `iptables-save -c` printed) and saves it again.
///
/// # Errors
/// When a tool refuses the dump, or the kernel prints other chains and rules than it was given.
pub fn reload(dump: &Path, flavour: IptablesFlavour) -> Result<Times> {
    let netns = Netns::new("reload")?;
    nfacct::create(&netns)?;
    let tool = |name: &str| -> Command {
        let mut command = netns.command(Path::new("/usr/sbin").join(flavour.binary()));
        command.arg(name);
        command
    };
    let restore = |arguments: &[&str]| timed(tool("iptables-restore").args(arguments).arg(dump));
    let (_, check) = restore(&["--test"])?;
    let (_, load) = restore(&[])?;
    let (saved, save) = timed(tool("iptables-save").arg("-c"))?;
    let given = std::fs::read_to_string(dump).with_context(|| format!("reading {}", dump.display()))?;
    same(&given, &saved)?;
    Ok(Times { check, load, save })
}

fn timed(command: &mut Command) -> Result<(String, Duration)> {
    let start = Instant::now();
    let output = netns::run(command, None)?;
    Ok((output, start.elapsed()))
}

/// Remarks and counters aside, every chain must have the same policy and rules: a shape that iptables prints in another way is
/// no real one. The order of tables and chains is the kernel's.
fn same(given: &str, saved: &str) -> Result<()> {
    let (given, saved) = (chains(given), chains(saved));
    for (chain, lines) in &given {
        let kept = saved.get(chain).with_context(|| format!("{chain:?} is not there"))?;
        let other = lines.iter().zip(kept).find(|(one, two)| one != two);
        ensure!(other.is_none(), "{chain:?}: iptables-save prints the second of these for the first: {other:?}");
        ensure!(lines.len() == kept.len(), "{chain:?}: {} of {} lines are there", kept.len(), lines.len());
    }
    Ok(())
}

/// Lines by table and chain, without counters.
fn chains(dump: &str) -> BTreeMap<(&str, &str), Vec<String>> {
    let (mut chains, mut table) = (BTreeMap::<_, Vec<String>>::new(), "");
    for line in dump.lines().filter(|line| !line.starts_with('#') && *line != "COMMIT") {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
            continue;
        }
        let plain = match (line.split_once(" ["), line.split_once("] ")) {
            (_, Some((counters, rule))) if counters.starts_with('[') => rule,
            (Some((chain, _)), _) => chain,
            _ => line,
        };
        let mut words = plain.split(' ');
        let first = words.next().unwrap_or("");
        let chain = first.strip_prefix(':').or_else(|| words.next()).unwrap_or("");
        chains.entry((table, chain)).or_default().push(plain.to_owned());
    }
    chains
}
