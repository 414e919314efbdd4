//! `cargo xtask test`: everything, from a machine that has only cargo.
use crate::binaries::{self, TestBinary};
use crate::{setup, shell, system, vm};
use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// Set up what is missing, then run every check and test.
#[derive(clap::Args)]
pub struct Args {
    /// Run these stages only (the build is done when one needs it).
    #[arg(long, value_enum, value_name = "STAGE")]
    only: Vec<Stage>,
    /// Leave out the tests in the virtual machine.
    #[arg(long)]
    no_vm: bool,
    /// Kernels to boot in the virtual machine.
    #[arg(long, value_enum, value_name = "SERIES", default_values = ["6.1", "6.12"])]
    kernel: Vec<vm::Kernel>,
}

/// What is run, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Stage {
    /// rustfmt agrees.
    Format,
    /// clippy has no warning.
    Clippy,
    /// Tests without privileges, the import directions among them.
    Unit,
    /// Tests in network namespaces, with real kernel programs.
    Lab,
    /// The probe's and `watch`'s tests on Debian's kernels in a virtual machine, with kprobes and NETFILTER programs.
    Vm,
}

/// How long the virtual machine may take; emulated, on two busy cores, its tests need a few minutes.
const VM_DEADLINE: Duration = Duration::from_secs(900);

const ALL: [Stage; 5] = [Stage::Format, Stage::Clippy, Stage::Unit, Stage::Lab, Stage::Vm];

/// The package whose tests need root and namespaces.
const LAB_PACKAGE: &str = "porttrace-tests";

/// What became of a stage: `None` when it could not run because the build failed.
struct Outcome {
    stage: String,
    took: Duration,
    result: Option<Result<()>>,
}

/// Runs the stages, each to its end even when an earlier one failed, and prints a summary.
///
/// # Errors
/// Names the first stage that failed.
pub fn main(args: &Args) -> Result<()> {
    let wants =
        |stage: Stage| (args.only.is_empty() || args.only.contains(&stage)) && !(args.no_vm && stage == Stage::Vm);
    let stages: Vec<Stage> = ALL.into_iter().filter(|stage| wants(*stage)).collect();
    let needs_build = stages.iter().any(|stage| *stage != Stage::Format);
    let mut outcomes = Vec::new();
    let vm = stages.contains(&Stage::Vm);
    let needs = setup::Needs { lab: vm || stages.contains(&Stage::Lab), vm, ..setup::Needs::default() };
    if needs_build {
        timed(&mut outcomes, "setup", || setup::ensure(needs));
    }
    let mut tests = None;
    if stages.iter().any(|stage| matches!(stage, Stage::Unit | Stage::Lab | Stage::Vm)) {
        timed(&mut outcomes, "build", || binaries::build_all().map(|built| tests = Some(built)));
    }
    for stage in stages {
        run(stage, &args.kernel, tests.as_deref(), &mut outcomes);
    }
    summary(&outcomes)
}

fn run(stage: Stage, kernels: &[vm::Kernel], tests: Option<&[TestBinary]>, outcomes: &mut Vec<Outcome>) {
    let name = format!("{stage:?}").to_lowercase();
    let only_lab = |wanted: bool| move |test: &&TestBinary| (test.package == LAB_PACKAGE) == wanted;
    match (stage, tests) {
        (Stage::Format, _) => timed(outcomes, &name, || cargo(&["fmt", "--all", "--check"])),
        (Stage::Clippy, _) => timed(outcomes, &name, clippy),
        (_, None) => outcomes.push(Outcome { stage: name, took: Duration::ZERO, result: None }),
        (Stage::Unit, Some(tests)) => {
            timed(outcomes, &name, || run_tests(tests.iter().filter(only_lab(false)), &[]).and_then(|()| doc_tests()));
        }
        // Two at a time: more namespaces than cores only wait for each other, and their deadlines run.
        (Stage::Lab, Some(tests)) => {
            timed(outcomes, &name, || run_tests(tests.iter().filter(only_lab(true)), &["--test-threads=2"]));
        }
        (Stage::Vm, Some(tests)) => {
            for kernel in kernels {
                let name = format!("{name} {}", kernel.series());
                timed(outcomes, &name, || vm::test(*kernel, vm::Extent::Short, tests, VM_DEADLINE));
            }
        }
    }
}

fn timed(outcomes: &mut Vec<Outcome>, name: &str, work: impl FnOnce() -> Result<()>) {
    println!("\n━━ {name}");
    let start = Instant::now();
    let result = work();
    if let Err(error) = &result {
        println!("✗ {name}: {error:#}");
    }
    outcomes.push(Outcome { stage: name.to_owned(), took: start.elapsed(), result: Some(result) });
}

fn clippy() -> Result<()> {
    let mut cargo = shell::cargo();
    cargo.current_dir(system::root()).arg("clippy").args(binaries::SELECTION);
    shell::run(cargo.args(["--all-targets", "--", "-D", "warnings"]))
}

fn doc_tests() -> Result<()> {
    let mut cargo = shell::cargo();
    cargo.current_dir(system::root()).arg("test").args(binaries::SELECTION);
    shell::run(cargo.args(["--doc", "--quiet"]))
}

fn cargo(arguments: &[&str]) -> Result<()> {
    shell::run(shell::cargo().current_dir(system::root()).args(arguments))
}

/// Runs every binary to its end and then says which of them failed.
fn run_tests<'a>(tests: impl Iterator<Item = &'a TestBinary>, arguments: &[&str]) -> Result<()> {
    let mut failed = Vec::new();
    let mut count = 0;
    for test in tests {
        count += 1;
        println!("→ {}", test.name());
        if shell::run(test.command().args(arguments)).is_err() {
            failed.push(test.name());
        }
    }
    if count == 0 {
        bail!("there is no test to run");
    }
    if !failed.is_empty() {
        bail!("tests failed in {}", failed.join(", "));
    }
    Ok(())
}

fn summary(outcomes: &[Outcome]) -> Result<()> {
    println!("\n━━ summary");
    let mut first_failure = None;
    for Outcome { stage, took, result } in outcomes {
        let word = match result {
            Some(Ok(())) => "ok",
            Some(Err(_)) => "FAILED",
            None => "not run",
        };
        println!("{stage:<8} {word:<8} {:>8}", shell::seconds(*took));
        if first_failure.is_none() && word != "ok" {
            first_failure = Some(stage.as_str());
        }
    }
    let total: Duration = outcomes.iter().map(|outcome| outcome.took).sum();
    println!("{:<8} {:<8} {:>8}", "all", "", shell::seconds(total));
    match first_failure {
        Some(stage) => bail!("stage {stage} did not pass"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(result: Option<Result<()>>) -> Outcome {
        Outcome { stage: "lab".into(), took: Duration::from_secs(1), result }
    }

    #[test]
    fn a_stage_that_failed_or_did_not_run_fails_the_whole() {
        assert!(summary(&[outcome(Some(Ok(())))]).is_ok());
        assert!(summary(&[outcome(Some(Err(anyhow::anyhow!("broken"))))]).is_err());
        assert!(summary(&[outcome(None)]).is_err());
    }

    #[test]
    fn no_test_is_a_failure() {
        assert!(run_tests(std::iter::empty(), &[]).is_err());
    }
}
