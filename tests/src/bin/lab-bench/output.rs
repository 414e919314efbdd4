//! What a tool's output holds: how many of the clients' connections, and whether with both tuples of their rewrites.

use crate::scene::CLIENT_PORTS;
use anyhow::{Context, Result, ensure};
use porttrace_tests::lab::topology::HOST_PORT;
use serde_json::Value;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::process::Command;

/// Of a tool's output.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Connections of the clients that it holds.
    pub connections: u64,
    /// Of these, with the rewrite's both tuples; `None`: this tool does not tell them.
    pub rewrites: Option<u64>,
    /// What the tool itself says that it missed.
    pub missed: String,
}

/// Whether porttrace's header is there.
pub fn says_ready(printed: &Path) -> Result<bool> {
    let text = fs::read_to_string(printed)?;
    Ok(text.contains("ready after") || text.contains("\"state\":\"ready\""))
}

/// The sum at the end of the log. The few other connections of the session are among it.
pub fn watch_text(printed: &Path) -> Result<Seen> {
    let tail = tail(printed)?;
    let sum = tail.lines().rev().take(12).find_map(|line| {
        let (count, rest) = line.split_once(" connection")?;
        rest.trim_start_matches('s').starts_with(" in ").then(|| count.replace(',', "").parse().ok())?
    });
    let connections: u64 = sum.with_context(|| format!("no sum in {tail:?}"))?;
    let last = tail.lines().next_back().unwrap_or_default();
    let missed =
        if last.contains("nothing was lost") { String::new() } else { last.trim_start_matches("! ").to_owned() };
    // Connections that are alike are counted together, each kind with its rewrite.
    Ok(Seen { connections, rewrites: None, missed })
}

/// One verdict a connection.
pub fn watch_json(printed: &Path) -> Result<Seen> {
    let (mut connections, mut rewrites, mut missed) = (0, 0, String::new());
    each_line(printed, |line| {
        if line.contains("\"type\":\"verdict\"") && !line.contains("\"amends\":true") {
            let verdict: Value = serde_json::from_str(line)?;
            let original = &verdict["conntrack"]["original"];
            connections += 1;
            rewrites += u64::from(original["dport"] == HOST_PORT && verdict["dnat"]["observed"] == true);
        } else if line.contains("\"state\":\"ended\"") {
            let ended: Value = serde_json::from_str(line)?;
            let lost = ended["lost"].as_array().into_iter().flatten().filter_map(Value::as_str);
            missed = lost.collect::<Vec<_>>().join(", ");
        }
        Ok(())
    })?;
    Ok(Seen { connections, rewrites: Some(rewrites), missed })
}

/// `[NEW] tcp … dport=9088 … src=…`: both tuples on a line.
pub fn conntrack(printed: &Path, said: &[String]) -> Result<Seen> {
    let mut connections = 0;
    each_line(printed, |line| {
        let new = line.contains("[NEW] tcp") && first(line, "dport=") == Some(HOST_PORT);
        connections += u64::from(new && first(line, "sport=").is_some_and(is_client));
        Ok(())
    })?;
    Ok(Seen { connections, rewrites: Some(connections), missed: complaint(said) })
}

/// SYNs to the port in the capture; what they become has another port, and is not in it.
pub fn tcpdump(capture: &Path, said: &[String]) -> Result<Seen> {
    let filter = format!("tcp[tcpflags] == tcp-syn and dst port {HOST_PORT}");
    let output =
        Command::new("tcpdump").args(["-n", "-r"]).arg(capture).arg(filter).output().context("running tcpdump -r")?;
    ensure!(output.status.success(), "tcpdump -r: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    // `… IP 172.18.0.100.12000 > 172.18.0.3.9088: …`
    let port = |line: &str| line.split(" > ").next()?.rsplit('.').next()?.parse().ok();
    let connections = text.lines().filter_map(port).filter(|port| is_client(*port)).count() as u64;
    let dropped = said.iter().find(|line| line.contains("dropped by kernel") && !line.starts_with("0 "));
    Ok(Seen { connections, rewrites: None, missed: dropped.cloned().unwrap_or_default() })
}

/// ` PACKET: 2 0a1b2c3d IN=eth0 … SPORT=12000 DPORT=9088 … SYN …`, once a trace.
pub fn xtables_monitor(printed: &Path, said: &[String]) -> Result<Seen> {
    let mut traces = HashSet::new();
    each_line(printed, |line| {
        if line.contains("PACKET: ") && first(line, "SPORT=").is_some_and(is_client) {
            traces.extend(line.split_whitespace().nth(2).map(str::to_owned));
        }
        Ok(())
    })?;
    Ok(Seen { connections: traces.len() as u64, rewrites: None, missed: complaint(said) })
}

/// `trace id 0a1b2c3d ip bench pre packet: iif "eth0" … tcp sport 12000 tcp dport 9088 …`, once a trace.
pub fn nft_monitor(printed: &Path, said: &[String]) -> Result<Seen> {
    let mut traces = HashSet::new();
    each_line(printed, |line| {
        let port = line.split("sport ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
        if line.contains(" packet: ") && port.is_some_and(is_client) {
            traces.extend(line.split_whitespace().nth(2).map(str::to_owned));
        }
        Ok(())
    })?;
    Ok(Seen { connections: traces.len() as u64, rewrites: None, missed: complaint(said) })
}

fn is_client(port: u16) -> bool {
    CLIENT_PORTS.contains(&port)
}

/// The number behind the first `key`.
fn first(line: &str, key: &str) -> Option<u16> {
    line.split_whitespace().find_map(|word| word.strip_prefix(key))?.parse().ok()
}

/// What a tool says of its own losses, or of the end that they put to it.
fn complaint(said: &[String]) -> String {
    said.iter().find(|line| line.contains("ENOBUFS") || line.contains("No buffer")).cloned().unwrap_or_default()
}

fn each_line(path: &Path, mut take: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        take(&String::from_utf8_lossy(&line)).with_context(|| format!("in {}", path.display()))?;
        line.clear();
    }
    Ok(())
}

/// The last part of a file.
fn tail(path: &Path) -> Result<String> {
    const PART: u64 = 1 << 14;
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(PART)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
