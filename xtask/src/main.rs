//! `cargo xtask …`: set up, build, demonstrate, test and measure porttrace. One file a subcommand.
mod bench;
mod binaries;
mod build;
mod demo;
mod dist;
mod image;
mod oracle;
mod run;
mod setup;
mod shell;
mod system;
mod test;
mod vm;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Set up, build, demonstrate, test and measure porttrace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    Setup(setup::Args),
    Build(build::Args),
    Run(run::Args),
    Demo(demo::Args),
    Test(test::Args),
    Vm(vm::Args),
    Bench(bench::Args),
    Oracle(oracle::Args),
    Image(image::Args),
    Dist(dist::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Task::Setup(args) => setup::main(&args),
        Task::Build(args) => build::main(&args),
        Task::Run(args) => run::main(&args),
        Task::Demo(args) => demo::main(&args),
        Task::Test(args) => test::main(&args),
        Task::Vm(args) => vm::main(&args),
        Task::Bench(args) => bench::main(&args),
        Task::Oracle(args) => oracle::main(&args),
        Task::Image(args) => image::main(&args),
        Task::Dist(args) => dist::main(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
