//! `cargo xtask vm`: a second kernel in a virtual machine — Debian's own, with modules and kprobes — for the kprobe backend.
mod guest;
pub mod image;
mod initramfs;
mod machine;

use crate::binaries::{self, TestBinary};
use crate::{setup, system};
use anyhow::{Result, bail};
use std::ffi::OsString;
use std::process::Command;
use std::time::Duration;

/// Boot Debian's kernel in a virtual machine over this root file system, and run the kprobe tests (or a command) there.
#[derive(clap::Args)]
pub struct Args {
    /// Which of Debian's kernels.
    #[arg(long, value_enum, default_value = "6.1")]
    kernel: Kernel,
    /// Seconds until the machine is ended, whatever it does.
    #[arg(long, default_value_t = 900)]
    deadline: u64,
    /// Run this command instead of the tests; it sees this machine's files, and what it writes is lost.
    #[arg(last = true)]
    command: Vec<OsString>,
}

/// A kernel series that Debian ships for its release 12.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum Kernel {
    /// The release's own kernel: older than the NETFILTER program type (6.4).
    #[default]
    #[value(name = "6.1")]
    V6_1,
    /// The backport in the security suite.
    #[value(name = "6.12")]
    V6_12,
}

impl Kernel {
    /// As people name it, and its directory.
    pub fn series(self) -> &'static str {
        match self {
            Kernel::V6_1 => "6.1",
            Kernel::V6_12 => "6.12",
        }
    }

    /// The meta-package that follows the series.
    pub fn package(self) -> &'static str {
        match self {
            Kernel::V6_1 => "linux-image-amd64",
            Kernel::V6_12 => "linux-image-6.12-amd64",
        }
    }
}

/// The test targets that hold the probe against a kernel; the others need nothing that this kernel lacks.
const TESTS: [&str; 1] = ["probe"];
/// Their modules that say what the conntrack backend must see. The others ask how fast something is, or are about TC and
/// the ring buffer: an emulated machine answers the first wrongly, and the lab has answered the second.
const MODULES: [&str; 1] = ["path::"];

/// Builds what the guest runs, boots, and carries the guest's exit status out.
pub fn main(args: &Args) -> Result<()> {
    setup::ensure(setup::Needs { lab: true, vm: true })?;
    if args.command.is_empty() {
        return test(args.kernel, &binaries::build_all()?, Duration::from_secs(args.deadline));
    }
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]).current_dir(system::root());
    run(args.kernel, &[command], Duration::from_secs(args.deadline))
}

/// Runs those of `tests` that hold the probe against a kernel, with the kprobe backend.
pub fn test(kernel: Kernel, tests: &[TestBinary], deadline: Duration) -> Result<()> {
    let wanted = tests.iter().filter(|test| TESTS.contains(&test.target.as_str()));
    let commands: Vec<Command> = wanted.map(kprobe_test).collect();
    if commands.is_empty() {
        bail!("there is no test named {} to run in the virtual machine", TESTS.join(" or "));
    }
    run(kernel, &commands, deadline)
}

/// One test at a time: the guest is emulated, and deadlines run in its time.
fn kprobe_test(test: &TestBinary) -> Command {
    let mut command = test.command();
    command.env("PORTTRACE_BACKEND", "kprobe").env("RUST_BACKTRACE", "1").arg("--test-threads=1").args(MODULES);
    command
}

fn run(kernel: Kernel, commands: &[Command], deadline: Duration) -> Result<()> {
    let image = image::fetch(kernel)?;
    let files = guest::prepare(&image, commands)?;
    let initramfs = initramfs::write(&image, &files)?;
    let done = machine::boot(&image, &initramfs, deadline);
    initramfs::remove(&initramfs);
    done
}
