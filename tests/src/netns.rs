//! A network namespace as a guard: made with a unique name, gone with everything in it when the guard is dropped.

use crate::lines::Lines;
use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Output, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Where iproute2 keeps named namespaces.
const HOME: &str = "/run/netns";
/// Every namespace of the lab starts like this, then `<pid>-<counter>-<label>`.
const PREFIX: &str = "ptl-";

/// A network namespace of our own. Dropping it kills the processes inside and removes it, also while panicking.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
    file: File,
}

impl Netns {
    /// Makes a namespace named after `label` (letters, digits, dashes), with `lo` up. The first call of a process sweeps
    /// away what dead processes left behind.
    pub fn new(label: &str) -> Result<Self> {
        static SWEEP: Once = Once::new();
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        SWEEP.call_once(sweep);
        let name = format!("{PREFIX}{}-{}-{label}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        run(Command::new("ip").args(["netns", "add", &name]), None)?;
        let path = Path::new(HOME).join(&name);
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let netns = Self { name, path, file };
        netns.exec(["ip", "link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// The name under which `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds it (`CNI_NETNS`, `nsenter --net=`).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The namespace's inode number, as kernel events carry it (`net.ns.inum`).
    pub fn inode(&self) -> Result<u32> {
        let number = self.file.metadata().with_context(|| format!("reading {}", self.path.display()))?.ino();
        u32::try_from(number).with_context(|| format!("inode of {}", self.name))
    }

    /// A command that will run inside (network namespace only; the mounts stay the caller's).
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let fd = self.file.as_raw_fd();
        // SAFETY: between fork and exec only the `setns` system call is made, which is async-signal-safe; the descriptor
        // is the child's copy of one that was open at the fork. `Netns` outlives the commands made from it in this crate;
        // a closed descriptor would make `setns` fail, and with it the spawn.
        unsafe {
            command.pre_exec(move || {
                setns(BorrowedFd::borrow_raw(fd), CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)
            });
        }
        command
    }

    /// Names of the interfaces inside, in the order of their indices.
    pub fn links(&self) -> Result<Vec<String>> {
        let links = self.exec(["ip", "-o", "link"])?;
        Ok(links.lines().filter_map(|line| Some(line.split(": ").nth(1)?.split('@').next()?.to_owned())).collect())
    }

    /// Runs a command inside to its end and returns its standard output; a failure carries its standard error.
    pub fn exec<S: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = S>) -> Result<String> {
        run(&mut self.argv(argv)?, None).with_context(|| format!("in namespace {}", self.name))
    }

    /// As [`Netns::exec`], with standard input.
    pub fn exec_with<S: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = S>, input: &str) -> Result<String> {
        run(&mut self.argv(argv)?, Some(input)).with_context(|| format!("in namespace {}", self.name))
    }

    /// Starts a command inside; its output is collected line by line.
    pub fn spawn<S: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = S>) -> Result<ChildGuard> {
        ChildGuard::spawn(self.argv(argv)?).with_context(|| format!("in namespace {}", self.name))
    }

    /// Runs a closure on a fresh thread that has entered the namespace; a panic inside goes on in the caller.
    pub fn run_in<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("entering namespace {}", self.name))?;
                Ok(work())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Ids of the processes whose main thread is inside.
    pub fn processes(&self) -> BTreeSet<i32> {
        self.inode().map(|inode| processes_in(u64::from(inode))).unwrap_or_default()
    }

    fn argv<S: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = S>) -> Result<Command> {
        let mut argv = argv.into_iter();
        let program = argv.next().ok_or_else(|| anyhow!("an empty command"))?;
        let mut command = self.command(program);
        command.args(argv);
        Ok(command)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        remove(&self.path, &self.name);
    }
}

/// A process that is killed and reaped when the guard is dropped, and what it printed so far.
pub struct ChildGuard {
    child: Child,
    name: String,
    pub stdout: Lines,
    pub stderr: Lines,
}

impl ChildGuard {
    /// Starts `command` with standard input closed and both outputs collected.
    pub fn spawn(command: Command) -> Result<Self> {
        Self::start(command, Lines::of, Lines::of)
    }

    /// As [`ChildGuard::spawn`]; what it prints also goes to our own outputs.
    pub fn spawn_shown(command: Command) -> Result<Self> {
        Self::start(
            command,
            |stream| Lines::of_shown(stream, std::io::stdout()),
            |stream| Lines::of_shown(stream, std::io::stderr()),
        )
    }

    /// As [`ChildGuard::spawn`]; standard output goes to a file, so that a program that prints much costs us nothing.
    pub fn spawn_to(mut command: Command, output: File) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(output).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let stderr = child.stderr.take().map(Lines::of).unwrap_or_default();
        Ok(Self { child, name, stdout: Lines::closed(), stderr })
    }

    fn start(
        mut command: Command,
        out: impl FnOnce(ChildStdout) -> Lines,
        err: impl FnOnce(ChildStderr) -> Lines,
    ) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let stdout = child.stdout.take().map(out).unwrap_or_default();
        let stderr = child.stderr.take().map(err).unwrap_or_default();
        Ok(Self { child, name, stdout, stderr })
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)
            .with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Waits for the process to end by itself; its exit code (`None` when a signal ended it). Its outputs are then complete.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<i32>> {
        let deadline = Instant::now() + timeout;
        let all_closed = self.stdout.wait_closed(timeout)
            && self.stderr.wait_closed(deadline.saturating_duration_since(Instant::now()));
        if !all_closed && matches!(self.child.try_wait(), Ok(None)) {
            bail!("{} still runs after {timeout:?}; it said {:?}", self.name, self.stderr.snapshot());
        }
        Ok(self.child.wait().with_context(|| format!("waiting for {}", self.name))?.code())
    }
}

impl Drop for ChildGuard {
    fn drop(&mut self) {
        // Both only fail when the process is already gone and reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end; standard output, or an error with what it printed on standard error.
pub fn run(command: &mut Command, input: Option<&str>) -> Result<String> {
    let output = output_of(command, input)?;
    if !output.status.success() {
        let program = command.get_program().to_string_lossy().into_owned();
        let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
        bail!(
            "`{program} {}`: {}: {}{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim(),
            String::from_utf8_lossy(&output.stdout).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Names of the lab's namespaces that the process `pid` made and that are still there.
pub fn namespaces_of(pid: u32) -> BTreeSet<String> {
    let prefix = format!("{PREFIX}{pid}-");
    names().filter(|name| name.starts_with(&prefix)).collect()
}

fn output_of(command: &mut Command, input: Option<&str>) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {program}"))?;
    let stdin = child.stdin.take();
    thread::scope(|scope| {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // A command that stops reading early shows in its exit status.
            scope.spawn(move || stdin.write_all(input.as_bytes()));
        }
        child.wait_with_output().with_context(|| format!("running {program}"))
    })
}

fn names() -> impl Iterator<Item = String> {
    fs::read_dir(HOME)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(PREFIX))
}

/// Removes the namespaces of processes that no longer live (killed before their guards could run).
fn sweep() {
    for name in names() {
        let owner = name[PREFIX.len()..].split('-').next().and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            remove(&Path::new(HOME).join(&name), &name);
        }
    }
}

fn remove(path: &Path, name: &str) {
    if let Ok(metadata) = fs::metadata(path) {
        for pid in processes_in(metadata.ino()) {
            // It may be gone already.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    if let Err(error) = run(Command::new("ip").args(["netns", "del", name]), None) {
        eprintln!("namespace {name} stays behind: {error:#}");
    }
}

fn processes_in(inode: u64) -> BTreeSet<i32> {
    let own = std::process::id().cast_signed();
    let inside = |pid: &i32| {
        fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|metadata| metadata.ino() == inode) && *pid != own
    };
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(inside)
        .collect()
}
