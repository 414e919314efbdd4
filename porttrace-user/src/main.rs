//! The `porttrace` command: parse, dispatch, exit code.

mod cli;
mod commands;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match commands::run(cli.command) {
        Ok(code) => code,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("porttrace: {error:#}");
            ExitCode::from(if error.is::<commands::Usage>() { 2 } else { 1 })
        }
    }
}

/// Whoever read our output has seen enough (`porttrace … | head`): nothing to complain about.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}
