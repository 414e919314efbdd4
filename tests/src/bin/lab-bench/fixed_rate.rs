//! A fixed rate of new connections: does everybody keep up, what is lost, and how much of a CPU it costs.

use crate::Arguments;
use crate::beside::{Beside, Tool};
use crate::scene::Scene;
use anyhow::{Context, Result};
use porttrace_tests::load::Pace;
use porttrace_user::core::model::flow::Proto;
use std::time::Duration;

/// New connections a second, where nothing else is asked for.
const RATE: f64 = 10_000.0;
/// Short enough that no source port is used twice.
const SECONDS: u64 = 4;

pub fn measure(scene: &Scene, arguments: &Arguments) -> Result<()> {
    let rate = arguments.rate.unwrap_or(RATE);
    println!(
        "\n{rate:.0} new connections a second to 9088 for {SECONDS} s: TCP (opened and reset), then UDP (one datagram each)"
    );
    println!("  {:<42} {:>9} {:>9} {:>9} {:>9}   missed", "", "proto", "made/s", "told", "its CPU");
    for tool in arguments.tools().into_iter().filter(|tool| !matches!(tool, Tool::EmptyPrograms | Tool::OtherPort)) {
        once(scene, tool, Proto::Tcp, rate)?;
        // The others are counted by what they tell of TCP.
        if tool == Tool::Nothing || tool.is_porttrace() {
            once(scene, tool, Proto::Udp, rate)?;
        }
    }
    Ok(())
}

fn once(scene: &Scene, tool: Tool, proto: Proto, rate: f64) -> Result<()> {
    let beside = Beside::start(tool, scene)?;
    let before = beside.id().map(cpu_seconds).transpose()?;
    let made = scene.connect(proto, Pace::Rate(rate), Duration::from_secs(SECONDS))?;
    let after = beside.id().map(cpu_seconds).transpose()?;
    let used = before.zip(after).map(|(before, after)| (after - before) / made.took.as_secs_f64() * 100.0);
    let seen = beside.finish()?;
    let told = seen
        .as_ref()
        .map_or("—".to_owned(), |seen| format!("{:.2} %", seen.connections as f64 / made.connections as f64 * 100.0));
    println!(
        "  {:<42} {:>9} {:>9.0} {told:>9} {:>9}   {}",
        tool.name(),
        proto.to_string(),
        made.rate(),
        used.map_or("—".to_owned(), |used| format!("{used:.0} %")),
        seen.map(|seen| seen.missed).unwrap_or_default()
    );
    Ok(())
}

/// CPU time of a process in user space and kernel.
fn cpu_seconds(pid: u32) -> Result<f64> {
    /// `USER_HZ`, the same on every architecture that runs this.
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold anything.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok());
    let used = ticks(11).zip(ticks(12)).map(|(user, system)| (user + system) / TICKS);
    used.with_context(|| format!("no CPU time in {stat:?}"))
}
