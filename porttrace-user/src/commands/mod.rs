//! One file a subcommand: arguments, and what they do.

pub mod completions;
pub mod doctor;
pub mod explain;
pub mod facts;
pub mod manual;
pub mod matrix;
pub mod output;
pub mod ports;
pub mod simulate;
pub mod snapshot;
pub mod sources;
pub mod watch;

use crate::cli::Command;
use std::process::ExitCode;
use thiserror::Error;

/// A request that makes no sense as given: printed like any error, but with exit code 2.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Runs a subcommand to its end.
///
/// # Errors
/// Whatever stopped it, as one sentence with its causes; a [`Usage`] means exit code 2.
pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Watch(args) => watch::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Manual(args) => manual::run(&args),
        Command::Snapshot(args) => snapshot::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Ports(args) => ports::run(&args),
        Command::Matrix(args) => matrix::run(&args),
        Command::Simulate(args) => simulate::run(&args),
    }
}
