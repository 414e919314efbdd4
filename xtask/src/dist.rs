//! `cargo xtask dist`: a tarball with the optimised binary, completions, manual pages and the documents.
use crate::{build, shell, system};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Build the release tarball in the target directory.
#[derive(clap::Args)]
pub struct Args {}

const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];
const DOCUMENTS: [&str; 5] =
    ["README.md", "LICENSE-APACHE", "LICENSE-MIT", "deploy/daemonset.yaml", "deploy/rbac.yaml"];
/// Schemas and the list of findings: the README and `--help` name them.
const DOCS: &str = "docs";

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
    let packed = tree.join("porttrace");
    fs::copy(binary, &packed)?;
    // Line numbers are most of it; names stay, for who profiles it.
    shell::step("strip", || shell::quietly(Command::new("strip").arg("--strip-debug").arg(&packed)))?;
    let completions = tree.join("completions");
    fs::create_dir(&completions)?;
    for name in SHELLS {
        let script = shell::output(Command::new(binary).args(["completions", name]))?;
        fs::write(completions.join(format!("porttrace.{name}")), script)?;
    }
    shell::output(Command::new(binary).arg("manual").arg(tree.join("man/man1")))?;
    let docs = tree.join(DOCS);
    fs::create_dir(&docs)?;
    for entry in fs::read_dir(system::root().join(DOCS))? {
        let path = entry?.path();
        fs::copy(&path, docs.join(path.file_name().unwrap_or_default()))?;
    }
    for document in DOCUMENTS.map(|name| system::root().join(name)).iter().filter(|path| path.exists()) {
        fs::copy(document, tree.join(document.file_name().unwrap_or_default()))?;
    }
    Ok(())
}
