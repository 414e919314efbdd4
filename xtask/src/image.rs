//! `cargo xtask image`: the container image, or what another machine needs to build it.
use crate::{shell, system};
use anyhow::{Result, bail};
use std::path::PathBuf;
use std::process::Command;

/// Build the container image (deploy/Dockerfile) with docker or podman.
#[derive(clap::Args)]
pub struct Args {
    /// The image's name and tag.
    #[arg(long, default_value = "porttrace:latest")]
    tag: String,
    /// Write the build context as a tar file instead, for a machine that has docker (the last commit, not the work tree).
    #[arg(long, value_name = "FILE")]
    context: Option<PathBuf>,
}

/// Builds the image, or writes its context.
///
/// # Errors
/// When no engine answers here; the sentence says what to do instead.
pub fn main(args: &Args) -> Result<()> {
    let dockerfile = "deploy/Dockerfile";
    if let Some(file) = &args.context {
        let file = std::path::absolute(file)?;
        let mut git = Command::new("git");
        git.current_dir(system::root()).args(["archive", "--format=tar", "--output"]).arg(&file).arg("HEAD");
        shell::step("write the build context", || shell::quietly(&mut git))?;
        println!("docker build -f {dockerfile} -t {} - < {}", args.tag, file.display());
        return Ok(());
    }
    // The client alone builds nothing: ask whether an engine answers.
    let Some(engine) = ["docker", "podman"].into_iter().find(|engine| answers(engine)) else {
        bail!(
            "neither docker nor podman answers here: start one, or write the context for a machine that has one \
             (`cargo xtask image --context context.tar`)"
        );
    };
    let mut build = Command::new(engine);
    build.current_dir(system::root()).args(["build", "-f", dockerfile, "-t", &args.tag, "."]);
    shell::step(&format!("build image {} with {engine}", args.tag), || shell::run(&mut build))
}

fn answers(engine: &str) -> bool {
    shell::probe(Command::new(engine).arg("info")).is_some()
}
