//! `cargo xtask demo`: the founding story in a lab of network namespaces, on a fresh machine.
use crate::{build, setup, system};
use anyhow::Result;
use std::ffi::OsString;

/// Raise a cluster of network namespaces with a broken hostPort, watch it, repair it, watch it again.
#[derive(clap::Args)]
pub struct Args {
    /// What follows goes to the demonstration itself.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Does not return when the demonstration could be started.
pub fn main(args: &Args) -> Result<()> {
    setup::ensure(setup::Needs { lab: true, ..setup::Needs::default() })?;
    build::packages(&["porttrace-user", "porttrace-tests"], true)?;
    let binaries = build::directory(true);
    let demo = binaries.join("lab-demo");
    system::become_(system::as_root(&demo).arg("--porttrace").arg(binaries.join("porttrace")).args(&args.arguments))
}
