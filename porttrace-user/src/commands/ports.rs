//! `porttrace ports`: every claim to a port of this node.

use super::facts::{self, Source};
use super::output::Colour;
use porttrace_user::core::ports;
use porttrace_user::core::world::World;
use porttrace_user::render::ports::{self as printed, Answer, SCHEMA};
use std::io::Write;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  sudo porttrace ports
  porttrace ports --snapshot node.tar.zst --objects objects.yaml

Listed are NodePorts, hostPorts, externalIPs, LoadBalancer addresses and processes of the node that listen beyond 127.0.0.1.
The mark is what a client from outside would meet by the node's rules and by what is known to listen.")]
pub struct Args {
    #[command(flatten)]
    source: Source,

    /// Print JSON (schema in docs/explain-json.md)
    #[arg(long, help_heading = "Output")]
    json: bool,

    #[command(flatten)]
    colour: Colour,
}

/// Runs it.
///
/// # Errors
/// What could not be read.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let facts = args.source.load()?;
    let world = World::new(&facts);
    let ports = ports::ports(&world);
    let missing = facts::missing(&facts);
    let node = facts.state.name.as_deref();
    let mut out = std::io::stdout().lock();
    if args.json {
        let answer = Answer { schema: SCHEMA, kind: "ports", node, ports: &ports, missing: &missing };
        serde_json::to_writer(&mut out, &answer)?;
        out.write_all(b"\n")?;
    } else {
        out.write_all(printed::text(node, &ports, &missing, args.colour.style()).as_bytes())?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}
