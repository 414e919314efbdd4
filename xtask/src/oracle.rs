//! `cargo xtask oracle`: random packets through the kernel and through the simulator, compared.
use crate::{setup, shell, system};
use anyhow::{Context, Result};
use std::time::{SystemTime, UNIX_EPOCH};

/// Hold the simulator against the kernel's own rule trace on random packets.
#[derive(clap::Args)]
pub struct Args {
    /// How many packets.
    #[arg(long, default_value_t = 1000)]
    packets: u32,
    /// Where the random choices start; the time when not given. It is printed, so that a run can be repeated.
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs the oracle test of the tests crate with these numbers.
pub fn main(args: &Args) -> Result<()> {
    setup::ensure(setup::Needs { lab: true, ..setup::Needs::default() })?;
    let seed = match args.seed {
        Some(seed) => seed,
        None => SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs(),
    };
    println!("· {} packets, seed {seed}", args.packets);
    let mut cargo = shell::cargo();
    cargo.current_dir(system::root());
    cargo.args(["test", "--package", "porttrace-tests", "--test", "oracle", "--", "--nocapture", "--test-threads=1"]);
    cargo.env("ORACLE_PACKETS", args.packets.to_string()).env("ORACLE_SEED", seed.to_string());
    shell::step("oracle", || shell::run(&mut cargo))
}
