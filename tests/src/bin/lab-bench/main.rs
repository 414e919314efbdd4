//! What watching costs and what it sees, beside other tools, in one run and taking turns: the load through the lab with and
//! without each of them, the start, the kernel programs, a fixed rate of new connections; and a soak.

mod beside;
mod fixed_rate;
mod harm;
mod output;
mod programs;
mod ready;
mod scene;
mod soak;
mod table;

use anyhow::{Result, ensure};
use beside::Tool;
use clap::{Parser, ValueEnum};
use scene::Scene;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
struct Arguments {
    /// The porttrace binary
    #[arg(long, value_name = "PATH")]
    porttrace: PathBuf,
    /// Measure these only
    #[arg(long, value_enum, value_name = "WHAT", value_delimiter = ',', default_values = ["ready", "harm", "rate", "programs"])]
    only: Vec<What>,
    /// With these beside the load only, and with nothing
    #[arg(long, value_enum, value_name = "TOOL", value_delimiter = ',')]
    beside: Vec<Tool>,
    /// How often each case is measured; the cases take turns
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each kind of load in each case
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Clients at once
    #[arg(long, default_value_t = 2)]
    clients: u16,
    /// New connections a second, where the rate is fixed (rate: 10000, soak: 5000)
    #[arg(long)]
    rate: Option<f64>,
    /// Minutes of the soak
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// From the start to ready, with few rules and with 100,000.
    Ready,
    /// New connections, datagrams and bulk bytes with each tool beside, and what the tool saw.
    Harm,
    /// A fixed rate of new connections: what is lost, and what it costs.
    Rate,
    /// How long each kernel program runs, and its size.
    Programs,
    /// Minutes under load while interfaces and rules change: memory, losses.
    Soak,
}

impl Arguments {
    /// What to run beside the load: all that is wanted and here, nothing first. What is not here is said.
    fn tools(&self) -> Vec<Tool> {
        let is_wanted = |tool: &Tool| *tool == Tool::Nothing || self.beside.is_empty() || self.beside.contains(tool);
        let (here, absent): (Vec<_>, Vec<_>) = Tool::ALL.into_iter().filter(is_wanted).partition(|tool| tool.is_here());
        for absent in absent {
            println!("not measured, because it is not to be had here: {}", absent.name());
        }
        here
    }
}

fn main() -> ExitCode {
    match measure(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "the lab needs root (network namespaces): run it with sudo");
    let scene = Scene::new(arguments)?;
    for what in &arguments.only {
        match what {
            What::Ready => ready::measure(&scene, arguments)?,
            What::Harm => harm::measure(&scene, arguments)?,
            What::Rate => fixed_rate::measure(&scene, arguments)?,
            What::Programs => programs::measure(&scene, arguments)?,
            What::Soak => soak::run(&scene, arguments)?,
        }
    }
    Ok(())
}
