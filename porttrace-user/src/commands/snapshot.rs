//! `porttrace snapshot -o node.tar.zst`.

use super::sources::Sources;
use clap::Args;
use porttrace_user::collect::{facts, live, snapshot};
use porttrace_user::core::parse;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The file to write (a .tar.zst); it holds the node's rules, addresses, connections, sockets and pods, no secrets
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Leave out existing connections (they name the node's clients)
    #[arg(long)]
    no_conntrack: bool,
    #[command(flatten)]
    sources: Sources,
}

/// Writes a snapshot of this node, and says what is in it and what is not.
///
/// # Errors
/// When the file cannot be written. What could not be collected is no error: it is said, here and in the snapshot.
pub fn run(args: &SnapshotArgs) -> anyhow::Result<ExitCode> {
    let options = live::Options { processes: true, conntrack: !args.no_conntrack, report: true };
    let collected = facts::collect(&args.sources.options(options));
    let size = snapshot::write(&collected.files, &args.output)?;
    let facts = parse::facts(&collected.files);
    let state = &facts.state;
    let mut out = std::io::stdout().lock();
    let rules: usize = state.rule_counts().values().sum();
    writeln!(
        out,
        "{}: {} KiB, {} files; {rules} rules, {} routes, {} addresses, {} connections, \
         {} pods; collected in {} ms",
        args.output.display(),
        size.div_ceil(1024),
        collected.files.len(),
        state.routes.as_ref().map_or(0, Vec::len),
        state.addresses.as_ref().map_or(0, Vec::len),
        state.conntrack.as_ref().map_or(0, Vec::len),
        facts.sandboxes.iter().filter(|sandbox| sandbox.ready).count(),
        collected.timings.total.as_millis(),
    )?;
    if !nix::unistd::geteuid().is_root() {
        writeln!(
            out,
            "  not root: rules and connections stay hidden (CAP_NET_ADMIN); run it with sudo for a whole one"
        )?;
    }
    for note in &state.diagnostics {
        if args.no_conntrack && note.source == "conntrack.txt" {
            continue;
        }
        let place = if note.line == 0 { String::new() } else { format!(":{}", note.line) };
        writeln!(out, "  {}{place}: {}", note.source, note.message)?;
    }
    for why in facts.missing() {
        writeln!(out, "  {why}")?;
    }
    Ok(ExitCode::SUCCESS)
}
