//! `porttrace simulate DESTINATION`: where a packet would go, by the rules and routes of a node, live or from a file.

mod batch;
mod expect;
mod packet;
mod pod;
mod source;

use super::Usage;
use super::output::Colour;
use expect::Expectation;
use porttrace_user::core::kube::owners::Owners;
use porttrace_user::core::model::trace::Trace;
use porttrace_user::core::near_miss::{NearMiss, near_misses};
use porttrace_user::core::simulate::Simulator;
use porttrace_user::render::trace::{self, Context, json};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Exit code when `--expect` does not hold.
const UNEXPECTED: u8 = 3;
/// `--why` looks at so many branches.
const BRANCHES: usize = 16;

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  porttrace simulate 172.18.0.3:30080 --from 172.18.0.4
  porttrace simulate 10.96.0.10:53 --proto udp --pod default/web-0 --snapshot node.tar.zst
  porttrace simulate 172.18.0.3:9088 --from 172.18.0.4 --rules listing.txt
  porttrace simulate --batch packets.jsonl --json --snapshot node.tar.zst

Without --in, --local or --pod the packet is taken to be sent by this node when its source is an address of this node, and
otherwise to arrive by the interface to which the route back to its source points.

A batch has one JSON object a line: {\"src\",\"sport\",\"dst\",\"dport\",\"proto\",\"in\"}; without \"in\" this node sends it.

--expect OUTCOME holds when all branches end so; --expect any:OUTCOME when at least one does. Outcomes: delivered (a socket of
this node gets it), forwarded (it leaves by an interface), accepted (either), rejected (REJECT, no route, or nothing listens),
dropped, unknown. Exit codes: 0 done, 1 failed (or a bad line in a batch), 2 wrong usage, 3 not as expected.")]
pub struct Args {
    /// Where the packet goes: ADDRESS:PORT, [IPV6]:PORT
    #[arg(value_name = "DESTINATION", required_unless_present = "batch", conflicts_with = "batch")]
    destination: Option<String>,

    #[command(flatten)]
    origin: packet::Origin,

    #[command(flatten)]
    state: source::Source,

    /// Simulate many packets: a file with one JSON object a line, or - for standard input
    #[arg(long, value_name = "FILE", help_heading = "Many packets", conflicts_with_all = ["from", "sport", "input", "local", "pod", "mark", "proto", "mac", "uid", "gid"])]
    batch: Option<PathBuf>,

    /// Print JSON (schema in docs/simulate-json.md)
    #[arg(long, help_heading = "Output")]
    json: bool,

    /// Leave the hops out of the JSON: a tenth of it is left
    #[arg(long, help_heading = "Output", requires = "json")]
    no_hops: bool,

    /// Also print the rules that nearly matched, and what kept them from it
    #[arg(long, help_heading = "Output", conflicts_with_all = ["json", "batch"])]
    why: bool,

    /// Print every branch, also those that are like others
    #[arg(long, help_heading = "Output")]
    all: bool,

    /// Print rules in full
    #[arg(short, long, action = clap::ArgAction::Count, help_heading = "Output")]
    verbose: u8,

    /// Exit with 3 unless every branch ends so (any:OUTCOME: unless one does)
    #[arg(long, value_name = "OUTCOME", help_heading = "Output")]
    expect: Option<Expectation>,

    #[command(flatten)]
    colour: Colour,
}

/// Runs it.
///
/// # Errors
/// A [`Usage`] for a request that contradicts itself or the state; otherwise what could not be read.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (mut loaded, facts) = args.state.load(args.origin.names_a_pod())?;
    if let Some(path) = &args.batch {
        let owners = Owners::of(&loaded.state);
        let options = batch::Options { json: args.json, brief: args.no_hops, expect: args.expect };
        return batch::run(path, &loaded, &args.context(&loaded, &owners), options);
    }
    let destination = args.destination.as_deref().unwrap_or_default();
    let (packet, entry) = args.origin.packet(destination, &loaded.state, &facts).map_err(Usage)?;
    let mut assumptions: Vec<String> = entry.into_iter().chain(loaded.assume_addresses(&packet)).collect();
    assumptions.extend(loaded.missing_for(packet.tuple.family()));
    let mut trace = Simulator::new(&loaded.state).trace(&packet);
    assumptions.append(&mut trace.assumptions);
    trace.assumptions = assumptions;
    let owners = Owners::of(&loaded.state);
    print(args, &trace, &args.context(&loaded, &owners))?;
    loaded.complain(args.verbose);
    Ok(verdict(args.expect, &trace))
}

impl Args {
    fn context<'a>(&self, loaded: &'a source::Loaded, owners: &'a Owners) -> Context<'a> {
        Context { style: self.colour.style(), owners, state: &loaded.state, verbose: self.verbose, all: self.all }
    }
}

fn print(args: &Args, trace: &Trace, context: &Context<'_>) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut answer = Vec::new();
        let mut printer = json::Printer::new(args.no_hops);
        printer.answer(trace, None, &mut answer)?;
        out.write_all(&answer)?;
    } else {
        out.write_all(trace::text(trace, context).as_bytes())?;
        if args.why {
            out.write_all(trace::near_misses(&misses(trace), context).as_bytes())?;
        }
    }
    Ok(out.flush()?)
}

/// Near misses of all branches, each once; branches that are many are alike in what they passed.
fn misses(trace: &Trace) -> Vec<NearMiss> {
    let mut all: Vec<NearMiss> = Vec::new();
    for branch in trace.branches.iter().take(BRANCHES) {
        for miss in near_misses(branch) {
            if !all.contains(&miss) {
                all.push(miss);
            }
        }
    }
    all
}

fn verdict(expected: Option<Expectation>, trace: &Trace) -> ExitCode {
    match expected {
        Some(expected) if !expected.holds(trace) => {
            eprintln!("porttrace: expected {expected}, but it is {}", json::overall(&trace.branches));
            ExitCode::from(UNEXPECTED)
        }
        _ => ExitCode::SUCCESS,
    }
}
