//! `porttrace matrix PORT | svc/NAME | pod/NAME`: who can reach it, by which of the ways.

use super::facts::{self, Source};
use super::output::Colour;
use anyhow::{Context as _, anyhow};
use porttrace_user::collect::attempt::attempt;
use porttrace_user::core::explain;
use porttrace_user::core::matrix::{self, Matrix};
use porttrace_user::core::world::World;
use porttrace_user::render::matrix::{self as printed, Answer};
use porttrace_user::render::ports::SCHEMA;
use std::io::Write;
use std::net::IpAddr;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  sudo porttrace matrix 9088
  porttrace matrix svc/frontend --snapshot node.tar.zst

Clients are examples of their kind: another node, a pod of this node, a pod elsewhere, a client outside (--from names it).
What the client's own node decides first is marked ?, unless that is this node.

--probe tries the rows of this node itself, and only what ends on this node; what was tried stands beside the prediction.")]
pub struct Args {
    /// A port (9088, 53/udp), or an object (svc/NAME, pod/NAME)
    #[arg(value_name = "WHAT")]
    what: String,

    /// Namespace of the object
    #[arg(short, long, default_value = "default", value_name = "NAMESPACE")]
    namespace: String,

    /// The client outside [default: an address for documentation, 192.0.2.1 or 2001:db8::1]
    #[arg(long, value_name = "ADDRESS")]
    from: Option<IpAddr>,

    /// Really try what this node can originate: TCP connects or single UDP datagrams to its own workload
    #[arg(long, conflicts_with = "snapshot")]
    probe: bool,

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
/// A [`super::Usage`] for something that cannot be asked; otherwise what could not be read or is not known.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let subject = facts::subject(&args.what, &args.namespace)?;
    let mut facts = args.source.load()?;
    explain::derive(&mut facts);
    let world = World::new(&facts);
    let mut matrix = matrix::matrix(&world, subject, args.from).map_err(|why| anyhow!(why))?;
    if args.probe {
        probe(&world, &mut matrix)?;
        if !matrix.rows.iter().flat_map(|row| row.cells.iter().flatten()).any(|cell| cell.tried.is_some()) {
            eprintln!("porttrace: nothing was tried: every way from this node may lead to a workload elsewhere");
        }
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &Answer { schema: SCHEMA, kind: "matrix", matrix: &matrix })?;
        out.write_all(b"\n")?;
    } else {
        out.write_all(printed::text(&matrix, args.colour.style()).as_bytes())?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Tries the cells of the rows that this node can originate, one after another.
fn probe(world: &World<'_>, matrix: &mut Matrix) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the event loop")?;
    let Matrix { ways, rows, .. } = matrix;
    for row in rows {
        for (way, cell) in ways.iter().zip(&mut row.cells) {
            let Some(cell) = cell else { continue };
            if let Some(source) = matrix::probe_source(world, &row.client, way, &cell.reach) {
                cell.tried = runtime.block_on(attempt(way.proto, source, way.to));
            }
        }
    }
    Ok(())
}
