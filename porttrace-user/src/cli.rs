//! The command line.

use crate::commands::completions;
use clap::{Parser, Subcommand};

/// Why a packet to a Kubernetes port does or does not arrive.
#[derive(Debug, Parser)]
#[command(name = "porttrace", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print a completion script for your shell
    Completions(completions::Args),
}
