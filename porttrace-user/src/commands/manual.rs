//! `porttrace manual DIRECTORY`: the manual pages.

use crate::cli::Cli;
use anyhow::Context as _;
use clap::CommandFactory;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to write porttrace.1, porttrace-watch.1, …; it is made if it is not there
    directory: PathBuf,
}

/// Runs it.
///
/// # Errors
/// When the pages cannot be written.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let failed = || format!("cannot write manual pages to {}", args.directory.display());
    std::fs::create_dir_all(&args.directory).with_context(failed)?;
    clap_mangen::generate_to(Cli::command(), &args.directory).with_context(failed)?;
    Ok(ExitCode::SUCCESS)
}
