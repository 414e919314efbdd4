//! From the start of the process until it captures, and until it has also read the rules, and its memory then: with few rules and
//! with 100,000.

use crate::Arguments;
use crate::scene::{Scene, WAIT};
use crate::table::{self, Series};
use anyhow::{Context, Result};
use porttrace_tests::lab::nfacct;
use porttrace_tests::lab::rules::{IptablesFlavour, Tools};
use porttrace_tests::lab::topology::HOST_PORT;
use porttrace_tests::netns::{ChildGuard, Netns};
use std::path::Path;
use std::time::Instant;

#[path = "../../../../porttrace-user/examples/bench_sim/generator.rs"]
mod generator;

/// One namespace in which it is started.
struct Place<'a> {
    name: String,
    netns: &'a Netns,
    tools: &'a Tools,
    capturing: Series,
    ready: Series,
    memory: Series,
}

pub fn measure(scene: &Scene, arguments: &Arguments) -> Result<()> {
    let directory = scene.directory.path().join("legacy");
    std::fs::create_dir(&directory)?;
    let legacy = Tools::new(directory, IptablesFlavour::Legacy)?;
    let empty = Netns::new("empty")?;
    let (large, rules) = large_node(&legacy)?;
    let place = |name: String, netns, tools| Place {
        name,
        netns,
        tools,
        capturing: Series::default(),
        ready: Series::default(),
        memory: Series::default(),
    };
    let mut places = [
        place("without a rule".to_owned(), &empty, &legacy),
        place("lab node".to_owned(), scene.node(), &scene.lab.tools),
        place(format!("{rules} rules (legacy)"), &large, &legacy),
    ];
    let mut tcpdump = Series::default();
    for _ in 0..arguments.rounds {
        for place in &mut places {
            place.once(&scene.porttrace)?;
        }
        if let Some(time) = tcpdump_once(scene)? {
            tcpdump.push(time);
        }
    }
    let names: Vec<String> = places.iter().map(|place| format!("porttrace watch 9088, {}", place.name)).collect();
    let of = format!("median of {} (least to most)", arguments.rounds);
    let mut capturing = rows(&names, &places, |place| &place.capturing);
    capturing.push(("tcpdump -i any port 9088", &tcpdump));
    table::print(&format!("start to capturing in milliseconds, {of}"), &capturing);
    table::print(
        &format!("start to ready, the rules read too, in milliseconds, {of}"),
        &rows(&names, &places, |place| &place.ready),
    );
    println!("\nmost memory until then (VmHWM), MiB");
    for (name, place) in names.iter().zip(&places) {
        println!(
            "  {name:<50} {:>8.1}   ({:.1} to {:.1})",
            place.memory.median(),
            place.memory.least(),
            place.memory.most()
        );
    }
    Ok(())
}

/// A row for each place.
fn rows<'a>(names: &'a [String], places: &'a [Place], pick: fn(&'a Place) -> &'a Series) -> Vec<(&'a str, &'a Series)> {
    names.iter().map(String::as_str).zip(places.iter().map(pick)).collect()
}

impl Place<'_> {
    fn once(&mut self, porttrace: &Path) -> Result<()> {
        let mut command = self.netns.command(porttrace);
        command.args(["watch", &HOST_PORT.to_string()]).env("PATH", self.tools.path());
        let start = Instant::now();
        let watch = ChildGuard::spawn(command)?;
        for (said, series) in [("capturing after", &mut self.capturing), ("ready after", &mut self.ready)] {
            let time = watch.stdout.wait_for(WAIT, |line| line.contains(said).then(|| start.elapsed()));
            let time = time.with_context(|| format!("porttrace does not get ready: {:?}", watch.stderr.snapshot()))?;
            series.push(time.as_secs_f64() * 1e3);
        }
        self.memory.push(memory(watch.id(), "VmHWM:")? / 1024.0);
        Ok(())
    }
}

/// A field of `/proc/PID/status`, KiB.
pub fn memory(pid: u32, field: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = status.lines().find_map(|line| line.strip_prefix(field)?.split_whitespace().next()?.parse().ok());
    value.with_context(|| format!("no {field} of process {pid}"))
}

/// A namespace with the rules of 5,000 Services, and how many rules that are.
fn large_node(tools: &Tools) -> Result<(Netns, usize)> {
    let netns = Netns::new("large")?;
    nfacct::create(&netns)?;
    let dump = generator::dump(&generator::services(5_000, 4, 1_000));
    tools.restore(&netns, "iptables", &dump).context("loading the large dump")?;
    let rules = dump.lines().filter(|line| line.starts_with('[') || line.starts_with("-A")).count();
    Ok((netns, rules))
}

/// How long tcpdump takes until it listens, milliseconds; `None` when it is not there.
fn tcpdump_once(scene: &Scene) -> Result<Option<f64>> {
    let start = Instant::now();
    let port = HOST_PORT.to_string();
    let Ok(dump) = scene.node().spawn(["tcpdump", "-n", "-i", "any", "port", &port]) else { return Ok(None) };
    let ready = dump.stderr.wait_for(WAIT, |line| line.contains("listening on").then(|| start.elapsed()));
    Ok(ready.map(|time| time.as_secs_f64() * 1e3))
}
