//! `cargo xtask vm`: other kernels in a virtual machine — Debian's own, with modules and kprobes.
mod guest;
pub mod image;
mod initramfs;
mod machine;

use crate::binaries::{self, TestBinary};
use crate::{setup, system};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::process::Command;
use std::time::Duration;

/// Boot Debian's kernel in a virtual machine over this root file system, and run the tests of the probe and of `watch` (or a command) there.
#[derive(clap::Args)]
pub struct Args {
    /// Which of Debian's kernels.
    #[arg(long, value_enum, default_value = "6.1")]
    kernel: Kernel,
    /// Seconds until the machine is ended, whatever it does.
    #[arg(long, default_value_t = 3600)]
    deadline: u64,
    /// Run the whole matrix with every backend that the kernel has, not only what is run on every change.
    #[arg(long, conflicts_with = "command")]
    whole: bool,
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

/// Tests of one target, with one conntrack backend.
struct Suite {
    target: &'static str,
    /// `PORTTRACE_BACKEND`, which the tests hold the header against: no other backend can stand in silently.
    backend: &'static str,
    /// What the names contain, after options of the test runner.
    tests: &'static [&'static str],
}

/// What runs on every change. Emulation is ten times slower: the whole matrix of `watch` runs with fentry programs only and in one
/// lab, and of the probe's tests those in which the backends differ.
const SHORT_6_1: [Suite; 5] = [
    Suite { target: "probe", backend: "fentry", tests: &["path::", "routes::", "refusal::a_dropped", "programs::"] },
    Suite { target: "watch_e2e", backend: "fentry", tests: &["--ignored", "one_lab_for_all"] },
    Suite { target: "ctnetlink", backend: "fentry", tests: &["joined_by_hooks"] },
    Suite { target: "completeness", backend: "fentry", tests: &["--include-ignored", "by_hooks", "interrupt"] },
    Suite { target: "probe", backend: "kprobe", tests: &["path::a_forwarded", "refusal::a_dropped", "programs::"] },
];
const SHORT_6_12: [Suite; 3] = [
    Suite { target: "probe", backend: "netfilter", tests: &["path::a_forwarded", "routes::", "programs::"] },
    Suite { target: "completeness", backend: "fentry", tests: &["--include-ignored", "by_hooks", "interrupt"] },
    Suite { target: "probe", backend: "kprobe", tests: &["path::a_forwarded", "refusal::a_dropped"] },
];
/// All that can be asked of a backend; `loss::` and `lifecycle::` are about the ring buffer and about time.
const WHOLE_PROBE: &[&str] = &["path::", "routes::", "refusal::", "filter::", "frames::", "programs::"];
const WHOLE_FENTRY: [Suite; 3] = [
    Suite { target: "probe", backend: "fentry", tests: WHOLE_PROBE },
    Suite { target: "watch_e2e", backend: "fentry", tests: &[] },
    Suite { target: "completeness", backend: "fentry", tests: &["--include-ignored", "by_hooks", "interrupt"] },
];
const WHOLE_KPROBE: [Suite; 2] = [
    Suite { target: "probe", backend: "kprobe", tests: WHOLE_PROBE },
    Suite { target: "watch_e2e", backend: "kprobe", tests: &[] },
];
const WHOLE_NETFILTER: [Suite; 2] = [
    Suite { target: "probe", backend: "netfilter", tests: WHOLE_PROBE },
    Suite { target: "watch_e2e", backend: "netfilter", tests: &[] },
];

/// How much is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Two minutes' worth for each kernel.
    Short,
    /// The whole matrix, with every backend that the kernel has.
    Whole,
}

fn suites(kernel: Kernel, extent: Extent) -> Vec<&'static Suite> {
    match (kernel, extent) {
        (Kernel::V6_1, Extent::Short) => SHORT_6_1.iter().collect(),
        (Kernel::V6_12, Extent::Short) => SHORT_6_12.iter().collect(),
        (Kernel::V6_1, Extent::Whole) => WHOLE_FENTRY.iter().chain(&WHOLE_KPROBE).collect(),
        (Kernel::V6_12, Extent::Whole) => WHOLE_NETFILTER.iter().chain(&WHOLE_FENTRY).chain(&WHOLE_KPROBE).collect(),
    }
}

/// Builds what the guest runs, boots, and carries the guest's exit status out.
pub fn main(args: &Args) -> Result<()> {
    setup::ensure(setup::Needs { lab: true, vm: true, ..setup::Needs::default() })?;
    if args.command.is_empty() {
        let extent = if args.whole { Extent::Whole } else { Extent::Short };
        return test(args.kernel, extent, &binaries::build_all()?, Duration::from_secs(args.deadline));
    }
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]).current_dir(system::root());
    run(args.kernel, &[command], Duration::from_secs(args.deadline))
}

/// Runs those of `tests` that hold the probe and `watch` against a kernel.
pub fn test(kernel: Kernel, extent: Extent, tests: &[TestBinary], deadline: Duration) -> Result<()> {
    let commands = suites(kernel, extent).into_iter().map(|suite| command(suite, tests)).collect::<Result<Vec<_>>>()?;
    run(kernel, &commands, deadline)
}

/// One test at a time: the guest is emulated, and deadlines run in its time.
fn command(suite: &Suite, tests: &[TestBinary]) -> Result<Command> {
    let test = tests.iter().find(|test| test.target == suite.target);
    let test = test.with_context(|| format!("there is no test {} to run in the virtual machine", suite.target))?;
    let mut command = test.command();
    command.env("PORTTRACE_BACKEND", suite.backend).arg("--test-threads=1").args(suite.tests);
    Ok(command)
}

fn run(kernel: Kernel, commands: &[Command], deadline: Duration) -> Result<()> {
    let image = image::fetch(kernel)?;
    let files = guest::prepare(&image, commands)?;
    let initramfs = initramfs::write(&image, &files)?;
    let done = machine::boot(&image, &initramfs, deadline);
    initramfs::remove(&initramfs);
    done
}
