//! `cargo xtask run -- watch 9088`: build, then run with the privileges that it needs.
use crate::{build, system};
use anyhow::Result;
use std::ffi::OsString;

/// Build porttrace and run it as root.
#[derive(clap::Args)]
pub struct Args {
    /// Run the unoptimised build.
    #[arg(long)]
    debug: bool,
    /// What follows is porttrace's own command line.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Does not return when porttrace could be started.
pub fn main(args: &Args) -> Result<()> {
    let binary = build::porttrace(!args.debug)?;
    system::become_(system::as_root(&binary).args(&args.arguments))
}
