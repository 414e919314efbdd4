//! `porttrace doctor`.

use super::output::Colour;
use porttrace_user::collect::doctor;
use porttrace_user::core::doctor::examine;
use porttrace_user::render::doctor as render;
use std::io::Write;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    colour: Colour,
}

/// Looks at this node and says how well `watch` can run here: exit code 0 when it can, 1 when it cannot.
///
/// # Errors
/// Only when standard output cannot be written.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let facts = doctor::facts();
    let report = examine(&facts);
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{:#}", render::json(&facts, &report))?;
    } else {
        write!(out, "{}", render::text(&facts, &report, args.colour.style()))?;
    }
    Ok(if report.can_watch { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
