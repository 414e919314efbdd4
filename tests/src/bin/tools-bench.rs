//! How long iptables' own tools (legacy) take for a dump: checking, loading, printing, once each, in milliseconds.

use anyhow::Result;
use clap::Parser;
use porttrace_tests::lab::rules::IptablesFlavour;
use porttrace_tests::reload::reload;
use std::path::PathBuf;

#[derive(Parser)]
struct Arguments {
    /// What `iptables-save -c` printed
    dump: PathBuf,
}

fn main() -> Result<()> {
    let times = reload(&Arguments::parse().dump, IptablesFlavour::Legacy)?;
    for (name, time) in [("check", times.check), ("load", times.load), ("save", times.save)] {
        println!("{name} {:.3} ms", time.as_secs_f64() * 1e3);
    }
    Ok(())
}
