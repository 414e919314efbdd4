//! `cargo xtask build`: the porttrace command, its kernel object included.
use crate::{shell, system};
use anyhow::Result;
use std::path::PathBuf;

/// Build porttrace (its build script compiles the kernel object).
#[derive(clap::Args)]
pub struct Args {
    /// Optimised, as it is installed.
    #[arg(long)]
    release: bool,
}

/// Builds and says where the binary is.
pub fn main(args: &Args) -> Result<()> {
    let binary = porttrace(args.release)?;
    println!("{}", binary.display());
    Ok(())
}

/// Builds porttrace and returns its path.
pub fn porttrace(release: bool) -> Result<PathBuf> {
    packages(&["porttrace-user"], release)?;
    Ok(directory(release).join("porttrace"))
}

/// Builds the binaries of these workspace packages.
pub fn packages(names: &[&str], release: bool) -> Result<()> {
    let mut cargo = shell::cargo();
    cargo.current_dir(system::root()).args(["build", "--bins"]);
    for name in names {
        cargo.args(["--package", name]);
    }
    if release {
        cargo.arg("--release");
    }
    shell::step(&format!("build {}", names.join(" and ")), || shell::run(&mut cargo))
}

/// Where the binaries of a profile are.
pub fn directory(release: bool) -> PathBuf {
    system::target().join(if release { "release" } else { "debug" })
}
