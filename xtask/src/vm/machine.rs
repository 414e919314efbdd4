//! qemu: booted with KVM where a guest really starts under it, emulated otherwise; the console streamed; a deadline kept.
use super::guest::{EXIT, UP};
use super::image::Image;
use crate::{shell, system};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long a guest under KVM may take to reach init: it takes a second or two where KVM works, and hangs where it does not.
const KVM_TRIAL: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, PartialEq)]
enum Accelerator {
    Kvm,
    Emulation,
}

/// How a boot ended.
enum End {
    /// Init was not reached in time.
    NeverUp,
    /// The commands' exit status.
    Exit(i32),
}

/// Boots, streams the console, and returns when the guest has powered off with status 0.
///
/// # Errors
/// When qemu cannot start, the guest dies, the deadline passes, or a command in the guest failed.
pub fn boot(image: &Image, initramfs: &Path, deadline: Duration) -> Result<()> {
    let until = Instant::now() + deadline;
    if kvm_may_work() {
        if let End::Exit(status) = attempt(Accelerator::Kvm, image, initramfs, until)? {
            return judge(status);
        }
        println!("· a guest does not start under KVM here: emulating");
        // A hint for the next run; without it the trial is made again.
        drop(std::fs::write(no_kvm_file(), "a guest did not start under KVM\n"));
    }
    match attempt(Accelerator::Emulation, image, initramfs, until)? {
        End::Exit(status) => judge(status),
        End::NeverUp => bail!("the virtual machine did not reach init"),
    }
}

fn judge(status: i32) -> Result<()> {
    match status {
        0 => Ok(()),
        status => bail!("a command in the virtual machine exited with {status}"),
    }
}

fn kvm_may_work() -> bool {
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    device.is_ok() && !no_kvm_file().exists()
}

fn no_kvm_file() -> PathBuf {
    system::target().join("vm/no-kvm")
}

fn attempt(accelerator: Accelerator, image: &Image, initramfs: &Path, until: Instant) -> Result<End> {
    let mut command = qemu(accelerator, image, initramfs);
    let start = Instant::now();
    println!("→ boot {} ({})", image.release, if accelerator == Accelerator::Kvm { "KVM" } else { "emulated" });
    let mut child = command.spawn().with_context(|| format!("cannot start `{}`", shell::describe(&command)))?;
    let lines = lines_of(&mut child)?;
    let end = follow(&lines, accelerator, start, until);
    // The guest may have powered off already; what counts was read from the console.
    drop(child.kill());
    child.wait()?;
    println!("· the virtual machine ran {}", shell::seconds(start.elapsed()));
    end
}

fn qemu(accelerator: Accelerator, image: &Image, initramfs: &Path) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    match accelerator {
        // A trial: what qemu says when KVM does not work is no error of ours.
        Accelerator::Kvm => qemu.args(["-accel", "kvm", "-cpu", "host"]).stderr(Stdio::null()),
        Accelerator::Emulation => qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max"]),
    };
    qemu.args(["-smp", "2", "-m", "2048", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    // The host's root, read-only; several file systems may be mounted below it.
    let share = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap";
    qemu.args(["-virtfs", share]);
    qemu.arg("-kernel").arg(&image.vmlinuz).arg("-initrd").arg(initramfs);
    qemu.args(["-append", "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off rdinit=/init"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped());
    qemu
}

/// The console's lines; the channel closes when qemu ends.
fn lines_of(child: &mut Child) -> Result<Receiver<String>> {
    let console = child.stdout.take().context("qemu has no console")?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        while console.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

fn follow(lines: &Receiver<String>, accelerator: Accelerator, start: Instant, until: Instant) -> Result<End> {
    let mut up = false;
    loop {
        let wait = match (up, accelerator) {
            (false, Accelerator::Kvm) => until.min(start + KVM_TRIAL),
            _ => until,
        };
        match lines.recv_timeout(wait.saturating_duration_since(Instant::now())) {
            Ok(line) if line.ends_with(UP) => {
                up = true;
                println!("· init runs after {}", shell::seconds(start.elapsed()));
            }
            Ok(line) => match exit_status(&line) {
                Some(status) => return Ok(End::Exit(status)),
                None if up || accelerator == Accelerator::Emulation => println!("  │ {line}"),
                None => {}
            },
            Err(_) if !up && accelerator == Accelerator::Kvm => return Ok(End::NeverUp),
            Err(RecvTimeoutError::Timeout) => bail!("the virtual machine was still running at its deadline"),
            Err(RecvTimeoutError::Disconnected) => bail!("the virtual machine ended before its commands did"),
        }
    }
}

fn exit_status(line: &str) -> Option<i32> {
    line.split_once(EXIT)?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(lines: &[&str], accelerator: Accelerator) -> Result<End> {
        let (sender, receiver) = channel();
        for line in lines {
            sender.send((*line).to_owned()).unwrap();
        }
        drop(sender);
        let now = Instant::now();
        follow(&receiver, accelerator, now, now + Duration::from_secs(5))
    }

    #[test]
    fn exit_status_is_carried_out() {
        let lines = ["[0.1] booting", "xtask-vm: up", "test", "xtask-vm: exit 3"];
        assert!(matches!(after(&lines, Accelerator::Emulation), Ok(End::Exit(3))));
        assert!(judge(3).is_err());
    }

    #[test]
    fn a_guest_that_dies_is_an_error() {
        assert!(after(&["xtask-vm: up", "Kernel panic"], Accelerator::Emulation).is_err());
        assert!(after(&["xtask-vm: up", "Kernel panic"], Accelerator::Kvm).is_err());
    }

    #[test]
    fn kvm_that_never_starts_is_not_an_error_yet() {
        assert!(matches!(after(&[], Accelerator::Kvm), Ok(End::NeverUp)));
    }
}
