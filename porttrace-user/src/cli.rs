//! The command line.

use crate::commands::{completions, doctor, explain, manual, matrix, ports, simulate, snapshot, watch};
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
    /// Log the connections to a port, live and hop by hop
    Watch(watch::args::Args),
    /// Say where a packet would go, by the rules and routes of a node
    Simulate(Box<simulate::Args>),
    /// Say what this node offers for watching, what each lack costs, and what to do about it
    Doctor(doctor::Args),
    /// Say what a port, a Service or a pod is on this node, what is wrong with it, and what to change
    Explain(explain::Args),
    /// List every claim to a port of this node, and who wins
    Ports(ports::Args),
    /// Show who can reach a port, a Service or a pod, by which of the ways
    Matrix(matrix::Args),
    /// Print a completion script for your shell
    Completions(completions::Args),
    /// Write the manual pages into a directory
    Manual(manual::Args),
    /// Write all that decides a packet's path on this node into one file, to look at elsewhere
    Snapshot(snapshot::SnapshotArgs),
}
