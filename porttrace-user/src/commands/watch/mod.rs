//! `porttrace watch PORT…`: the live log.

mod alike;
pub mod args;
mod diagnosis;
mod inside;
mod intake;
mod note;
mod output;
mod pods;
mod probing;
mod reading;
mod rules;
mod session;
mod signals;

use crate::commands::Usage;
use anyhow::Context as _;
use porttrace_user::collect::memory::give_back_early;
use std::process::ExitCode;

/// Something was lost and `--strict` was given.
const EXIT_LOST: u8 = 4;

/// Watches until told to stop.
///
/// # Errors
/// The probe cannot start, or standard output cannot be written (a closed pipe ends the session quietly).
pub fn run(args: &args::Args) -> anyhow::Result<ExitCode> {
    if args.json && args.summary {
        return Err(Usage("--summary is a way of printing text: leave it out, or leave --json out".to_owned()).into());
    }
    unblock_signals()?;
    give_back_early();
    // One thread: with more of them, one waits for events and has to wake another for each.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the event loop")?;
    let lost = runtime.block_on(session::run(args))?;
    runtime.shutdown_background();
    Ok(if lost && args.strict { ExitCode::from(EXIT_LOST) } else { ExitCode::SUCCESS })
}

/// A parent may have left them blocked (signal masks are inherited), and then Ctrl-C would end nothing.
fn unblock_signals() -> anyhow::Result<()> {
    use nix::sys::signal::{SigSet, Signal};
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_unblock().context("cannot unblock signals")
}
