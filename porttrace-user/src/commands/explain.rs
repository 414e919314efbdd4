//! `porttrace explain PORT | svc/NAME | pod/NAME`: which port is which, what is wrong, what to change.

use super::facts::{self, Source};
use super::output::Colour;
use anyhow::anyhow;
use porttrace_user::core::diagnose::Severity;
use porttrace_user::core::explain;
use porttrace_user::core::world::World;
use porttrace_user::render::explain::{self as printed, Answer};
use porttrace_user::render::ports::SCHEMA;
use porttrace_user::render::trace::Context;
use std::io::Write;
use std::net::IpAddr;
use std::process::ExitCode;

/// Exit code of `--check` when something is wrong.
const WRONG: u8 = 3;

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  sudo porttrace explain 9088
  porttrace explain svc/frontend -n default --snapshot node.tar.zst
  porttrace explain pod/frontend-a --snapshot node.tar.zst --objects objects.yaml

All facts are optional; what is missing is named, and checks that need it say so. docs/findings.md lists the findings.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 with --check when a finding is an error.")]
pub struct Args {
    /// A port (9088, 53/udp), or an object (svc/NAME, pod/NAME)
    #[arg(value_name = "WHAT")]
    what: String,

    /// Namespace of the object
    #[arg(short, long, default_value = "default", value_name = "NAMESPACE")]
    namespace: String,

    /// The client that the question is about
    #[arg(long, value_name = "ADDRESS")]
    from: Option<IpAddr>,

    #[command(flatten)]
    source: Source,

    /// Print JSON (schema in docs/explain-json.md)
    #[arg(long, help_heading = "Output")]
    json: bool,

    /// Exit with 3 when a finding is an error
    #[arg(long, help_heading = "Output")]
    check: bool,

    /// Print rules in full, all paths and all evidence
    #[arg(short, long, action = clap::ArgAction::Count, help_heading = "Output")]
    verbose: u8,

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
    let explanation = explain::explain(&world, subject, args.from).map_err(|why| anyhow!(why))?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &Answer { schema: SCHEMA, kind: "explanation", explanation: &explanation })?;
        out.write_all(b"\n")?;
    } else {
        let style = args.colour.style();
        let context = Context { style, owners: &world.owners, state: &facts.state, verbose: args.verbose, all: false };
        out.write_all(printed::text(&explanation, &context).as_bytes())?;
    }
    out.flush()?;
    let wrong = explanation.report.findings.iter().any(|finding| finding.severity == Severity::Error);
    Ok(if args.check && wrong { ExitCode::from(WRONG) } else { ExitCode::SUCCESS })
}
