//! The load with each tool beside, taking turns: what it costs, and what the tool's output holds of it.

use crate::Arguments;
use crate::beside::{Beside, Tool};
use crate::scene::Scene;
use crate::table::{self, Series};
use anyhow::Result;
use porttrace_tests::load::{Pace, flood, stream};
use porttrace_user::core::model::flow::Proto;
use std::time::Duration;

/// What was measured with one tool beside.
#[derive(Default)]
struct Row {
    connections: Series,
    datagrams: Series,
    bulk: Series,
    /// Percent of the connections that were made.
    seen: Series,
    rewrites: Series,
    missed: String,
}

pub fn measure(scene: &Scene, arguments: &Arguments) -> Result<()> {
    let tools = arguments.tools();
    let duration = Duration::from_secs_f64(arguments.seconds);
    // Neighbours, caches, conntrack's table.
    scene.connect(Proto::Tcp, Pace::AsFastAsPossible, duration)?;
    let mut rows: Vec<Row> = tools.iter().map(|_| Row::default()).collect();
    for round in 0..arguments.rounds {
        // Another order each round: what grows in the meantime shall not favour one of them.
        for step in 0..tools.len() {
            let index = (step + round) % tools.len();
            rows[index].once(scene, tools[index], duration)?;
        }
    }
    print(&tools, &rows, arguments);
    Ok(())
}

impl Row {
    fn once(&mut self, scene: &Scene, tool: Tool, duration: Duration) -> Result<()> {
        let beside = Beside::start(tool, scene)?;
        let made = scene.connect(Proto::Tcp, Pace::AsFastAsPossible, duration)?;
        self.connections.push(made.rate());

        let before = scene.servers.datagrams();
        let sent = scene.lab.outside.run_in(|| flood(scene.target(), duration))??;
        let arrived = settled(|| scene.servers.datagrams()) - before;
        self.datagrams.push(arrived.min(sent) as f64 / duration.as_secs_f64());

        scene.servers.read_connections(true);
        let bytes = stream(&scene.lab.outside, scene.target().into(), duration, &scene.servers);
        scene.servers.read_connections(false);
        self.bulk.push(bytes? * 8.0 / 1e9);

        if let Some(seen) = beside.finish()? {
            // The marker, the flood and the stream are connections too, where everything is counted.
            let part = |count: u64| (count as f64 / made.connections as f64 * 100.0).min(100.0);
            self.seen.push(part(seen.connections));
            if let Some(rewrites) = seen.rewrites {
                self.rewrites.push(part(rewrites));
            }
            if !seen.missed.is_empty() {
                self.missed = seen.missed;
            }
        }
        Ok(())
    }
}

/// The count once it stands still.
fn settled(count: impl Fn() -> u64) -> u64 {
    let mut before = count();
    loop {
        std::thread::sleep(Duration::from_millis(20));
        let now = count();
        if now == before {
            return now;
        }
        before = now;
    }
}

fn print(tools: &[Tool], rows: &[Row], arguments: &Arguments) {
    let Arguments { rounds, seconds, clients, .. } = arguments;
    let with = format!("median of {rounds} rounds of {seconds} s, part of nothing (least to most)");
    let column = |pick: fn(&Row) -> &Series| -> Vec<(&str, &Series)> {
        tools.iter().zip(rows).map(|(tool, row)| (tool.name(), pick(row))).collect()
    };
    table::print(
        &format!("new TCP connections a second to 9088, opened and reset, {clients} clients; {with}"),
        &column(|row| &row.connections),
    );
    table::print(&format!("small datagrams a second to 9088, one flow; {with}"), &column(|row| &row.datagrams));
    table::print(&format!("bulk TCP to 9088, one connection, Gbit/s; {with}"), &column(|row| &row.bulk));
    println!(
        "\nof the connections made meanwhile, the output holds (median, least), and with both tuples of the rewrite"
    );
    for (tool, row) in tools.iter().zip(rows).filter(|(_, row)| !row.seen.is_empty()) {
        let percent = |series: &Series| match series.is_empty() {
            true => "—".to_owned(),
            false => format!("{:.1} % ({:.1})", series.median(), series.least()),
        };
        println!("  {:<42} {:>16} {:>16}   {}", tool.name(), percent(&row.seen), percent(&row.rewrites), row.missed);
    }
}
