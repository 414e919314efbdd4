//! `cargo xtask bench`: what porttrace costs, each figure beside what it is to be compared with, in one run.
use crate::{build, setup, shell, system};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::process::Command;

/// Measure the optimised build: start, connections a second while watching, kernel programs, the simulator.
#[derive(clap::Args)]
pub struct Args {
    /// Leave out the simulator's figures.
    #[arg(long)]
    no_simulator: bool,
    /// What follows goes to the measurement in the lab (`--rounds`, `--seconds`, `--clients`).
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// Builds once, then measures one thing after the other: nothing else should run meanwhile.
pub fn main(args: &Args) -> Result<()> {
    setup::ensure(setup::Needs { lab: true, ..setup::Needs::default() })?;
    build::packages(&["porttrace-user", "porttrace-tests"], true)?;
    println!("· {}", machine());
    let binaries = build::directory(true);
    let mut lab = system::as_root(&binaries.join("lab-bench"));
    lab.arg("--porttrace").arg(binaries.join("porttrace")).args(&args.arguments);
    shell::step("in the lab", || shell::run(&mut lab))?;
    if args.no_simulator {
        return Ok(());
    }
    shell::step("the simulator, beside iptables' own tools", simulator)
}

const ROUNDS: usize = 5;

/// The tools take turns on one dump, each in an empty network namespace; prints nanoseconds for check, load and save.
const TOOLS: &str = "a=$(date +%s%N); iptables-legacy-restore --test \"$0\" && b=$(date +%s%N) && \
    iptables-legacy-restore \"$0\" && c=$(date +%s%N) && iptables-legacy-save > /dev/null && d=$(date +%s%N) && \
    echo $((b - a)) $((c - b)) $((d - c))";

fn simulator() -> Result<()> {
    let mut cargo = shell::cargo();
    cargo.current_dir(system::root()).args(["build", "--release", "--package", "porttrace-user"]);
    shell::run(cargo.args(["--example", "bench_sim"]))?;
    let example = build::directory(true).join("examples/bench_sim");
    let dump = system::target().join("bench.rules");
    shell::run(Command::new(&example).arg("--write").arg(&dump))?;
    shell::run(&mut Command::new(&example))?;
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        let parsed = shell::output(Command::new(&example).arg("--parse").arg(&dump))?;
        times[0].push(figure(&parsed, "parse").context("bench_sim printed no time for parsing")?);
        let mut tools = system::as_root("unshare".as_ref());
        let printed = shell::output(tools.args(["--net", "sh", "-c", TOOLS]).arg(&dump))?;
        for (time, word) in times[1..].iter_mut().zip(printed.split_whitespace()) {
            time.push(word.parse::<f64>().context("the shell printed no number")? / 1e6);
        }
    }
    println!("the same dump, milliseconds, median of {ROUNDS} (least to most), and how many times our parse that is");
    let names = ["porttrace: parse", "iptables-restore --test", "iptables-restore", "iptables-save"];
    let ours = median(&mut times[0]);
    for (name, times) in names.iter().zip(&mut times) {
        let middle = median(times);
        let (least, most) = (times[0], times[times.len() - 1]);
        println!("  {name:<38} {middle:>8.0}  {:>5.1} ×  ({least:.0} to {most:.0})", middle / ours);
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
