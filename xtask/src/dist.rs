//! `cargo xtask dist`: a tarball with the optimised binary, completions and the documents.
use crate::{build, shell, system};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Build the release tarball in the target directory.
#[derive(clap::Args)]
pub struct Args {}

const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];
const DOCUMENTS: [&str; 2] = ["README.md", "deploy/daemonset.yaml"];

/// Builds, packs and prints the tarball's path.
pub fn main(_: &Args) -> Result<()> {
    let binary = build::porttrace(true)?;
    let version = shell::output(Command::new(&binary).arg("--version"))?;
    let version = version.split_whitespace().last().context("porttrace --version prints nothing")?;
    let name = format!("porttrace-{version}-{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    let home = system::target().join("dist");
    let tree = home.join(&name);
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    }
    fs::create_dir_all(&tree).with_context(|| format!("cannot create {}", tree.display()))?;
    fill(&tree, &binary)?;
    let archive = home.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    // The same inputs give the same tarball.
    tar.args(["--create", "--gzip", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0"]);
    tar.arg("--file").arg(&archive).arg("--directory").arg(&home).arg(&name);
    shell::step("pack", || shell::quietly(&mut tar))?;
    println!("{}", archive.display());
    Ok(())
}

fn fill(tree: &Path, binary: &Path) -> Result<()> {
    fs::copy(binary, tree.join("porttrace"))?;
    let completions = tree.join("completions");
    fs::create_dir(&completions)?;
    for name in SHELLS {
        let script = shell::output(Command::new(binary).args(["completions", name]))?;
        fs::write(completions.join(format!("porttrace.{name}")), script)?;
    }
    for document in DOCUMENTS.map(|name| system::root().join(name)).iter().filter(|path| path.exists()) {
        fs::copy(document, tree.join(document.file_name().unwrap_or_default()))?;
    }
    Ok(())
}
