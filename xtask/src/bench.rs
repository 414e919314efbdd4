//! `cargo xtask bench`: what porttrace costs, each figure beside what it is to be compared with, in one run.
use crate::{build, setup, shell, system};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

/// Measure the optimised build: the start, the load through the lab with each tool beside, kernel programs, the simulator.
#[derive(clap::Args)]
pub struct Args {
    /// Measure this only.
    #[arg(long, value_enum, value_name = "WHAT")]
    only: Option<What>,
    /// What follows goes to the measurement in the lab (`--only`, `--beside`, `--rounds`, `--seconds`, `--clients`,
    /// `--rate`, `--minutes`).
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// What is measured, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// The probe, in the lab.
    Lab,
    /// The simulator, beside iptables' own tools.
    Simulator,
    /// Ten minutes under load while interfaces and rules change; only when asked for.
    Soak,
}

/// Builds once, then measures one thing after the other: nothing else should run meanwhile.
pub fn main(args: &Args) -> Result<()> {
    setup::ensure(setup::Needs { lab: true, bench: true, ..setup::Needs::default() })?;
    build::packages(&["porttrace-user", "porttrace-tests"], true)?;
    println!("· {}", machine());
    let binaries = build::directory(true);
    let wanted = |what| args.only.is_none_or(|only| only == what);
    let in_the_lab = |title, own: &[&str]| {
        let mut lab = system::as_root(&binaries.join("lab-bench"));
        lab.arg("--porttrace").arg(binaries.join("porttrace")).args(own).args(&args.arguments);
        shell::step(title, || shell::run(&mut lab))
    };
    if wanted(What::Lab) {
        in_the_lab("in the lab", &[])?;
    }
    if args.only == Some(What::Soak) {
        in_the_lab("soak", &["--only", "soak"])?;
    }
    if wanted(What::Simulator) {
        shell::step("the simulator, beside iptables' own tools", || simulator(&binaries))?;
    }
    Ok(())
}

const ROUNDS: usize = 5;

fn simulator(binaries: &Path) -> Result<()> {
    let mut cargo = shell::cargo();
    cargo.current_dir(system::root()).args(["build", "--release", "--package", "porttrace-user"]);
    shell::run(cargo.args(["--example", "bench_sim"]))?;
    let example = binaries.join("examples/bench_sim");
    shell::run(Command::new(&example).arg("--command").arg(binaries.join("porttrace")))?;
    let dump = system::target().join("bench.rules");
    shell::run(Command::new(&example).arg("--write").arg(&dump))?;
    compare(&example, &binaries.join("tools-bench"), &dump)
}

/// Our parser and iptables' tools take turns on one dump. That the kernel takes the dump and prints it again unchanged is
/// checked on the way.
fn compare(example: &Path, tools: &Path, dump: &Path) -> Result<()> {
    let rows = [
        ("porttrace: parse", "parse"),
        ("iptables-save", "save"),
        ("iptables-restore --test", "check"),
        ("iptables-restore", "load"),
    ];
    let mut times = rows.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        let mut printed = shell::output(Command::new(example).arg("--parse").arg(dump))?;
        printed.push_str(&shell::output(system::as_root(tools).arg(dump))?);
        for ((_, name), times) in rows.iter().zip(&mut times) {
            times.push(figure(&printed, name).with_context(|| format!("no time for {name} was printed"))?);
        }
    }
    println!("the same dump, milliseconds, median of {ROUNDS} (least to most), and our parse as a part of it");
    let ours = median(&mut times[0]);
    for ((name, _), times) in rows.iter().zip(&mut times) {
        let middle = median(times);
        let (least, most) = (times[0], times[times.len() - 1]);
        println!("  {name:<38} {middle:>8.0}  {:>5.2} ×  ({least:.0} to {most:.0})", ours / middle);
    }
    Ok(())
}

/// The value on the line `name value unit`.
fn figure(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.split(' ').next()?.parse().ok())
}

/// Sorts, and takes the middle one; there is at least one.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A figure without the machine says little.
fn machine() -> String {
    let kernel = shell::probe(Command::new("uname").arg("-sr")).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("unknown").to_owned();
    format!("{kernel}, {cores} cores, load before the start {load}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_by_their_whole_name() {
        let text = "parse_memory 9.5 MiB\nparse 81.250 ms\n";
        assert_eq!(figure(text, "parse"), Some(81.25));
        assert_eq!(figure(text, "pars"), None);
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
    }
}
