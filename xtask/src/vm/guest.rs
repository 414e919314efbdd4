//! What runs inside: first the initramfs' init, which puts the host's root file system below a writable layer, then the commands.
use super::image::Image;
use crate::system;
use anyhow::{Context, Result};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;

/// Printed once init runs: the machine boots.
pub const UP: &str = "xtask-vm: up";
/// Printed before the exit status of the commands, at the very end.
pub const EXIT: &str = "xtask-vm: exit ";

/// The scripts of one run.
pub struct Guest {
    /// `/init` of the initramfs; `@MODULES@` in it stands for the modules to load, in order.
    pub init: String,
    /// `kernel.modprobe` there. The kernel runs it below the initramfs' root, not below ours.
    pub modprobe: String,
    /// Removed with the run: the script with the commands, which the guest reads over 9p.
    pub script: PathBuf,
}

/// Writes the script with `commands` where the guest can read it.
pub fn prepare(image: &Image, commands: &[Command]) -> Result<Guest> {
    let directory = system::target().join("vm");
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let script = directory.join(format!("run-{}.sh", std::process::id()));
    std::fs::write(&script, script_text(commands)).with_context(|| format!("cannot write {}", script.display()))?;
    let init = INIT
        .replace("@UP@", UP)
        .replace("@LIB_MODULES@", &quote(image.modules.as_os_str()))
        .replace("@NODE_MODULES@", &NODE_MODULES.join(" "))
        .replace("@SCRIPT@", &quote(script.as_os_str()))
        .replace("@EXIT@", EXIT);
    Ok(Guest { init, modprobe: MODPROBE.to_owned(), script })
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It is only a file in the target directory.
        drop(std::fs::remove_file(&self.script));
    }
}

/// On every node that runs kube-proxy. Others are loaded when they are first asked for, but sysctls and BTF are there only then.
const NODE_MODULES: [&str; 2] = ["nf_conntrack", "nf_nat"];

/// Also found at the same path below the guest's root: legacy iptables runs what `kernel.modprobe` names by itself.
const MODPROBE: &str = "#!/bin/busybox sh\nexec /bin/busybox chroot /new /sbin/modprobe \"$@\"\n";

/// The root is entered by chroot, not by switch_root: helpers that the kernel starts keep the initramfs as their root.
const INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin
b=/bin/busybox
fail() { $b echo "xtask-vm: $1 failed"; $b echo "@EXIT@125"; $b poweroff -f; $b sleep 1000; }
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
$b echo "@UP@"
for module in @MODULES@; do $b insmod /modules/$module || fail "insmod $module"; done
$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=524288 host /host || fail "mounting the host's root"
$b mount -t tmpfs -o size=50% writable /writable
$b mkdir /writable/upper /writable/work
$b mount -t overlay -o lowerdir=/host,upperdir=/writable/upper,workdir=/writable/work root /new || fail "the overlay"
$b mount -t proc proc /new/proc
$b mount -t sysfs sys /new/sys
$b mount -t devtmpfs dev /new/dev
$b mkdir -p /new/dev/pts /new/dev/shm /new/run /new/tmp /new/usr/lib/modules
$b mount -t devpts devpts /new/dev/pts
for place in /new/dev/shm /new/run; do $b mount -t tmpfs tmpfs $place; done
$b mount -t bpf bpf /new/sys/fs/bpf
$b mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
$b mount -t tracefs tracefs /new/sys/kernel/tracing
$b mount -o bind /host/@LIB_MODULES@ /new/lib/modules || fail "mounting the modules"
$b echo /modprobe > /proc/sys/kernel/modprobe
$b ln -s /sbin/modprobe /new/modprobe
for module in @NODE_MODULES@; do $b chroot /new /sbin/modprobe $module || fail "modprobe $module"; done
$b ip link set lo up
$b chroot /new /bin/sh @SCRIPT@
$b echo "@EXIT@$?"
$b sync
$b poweroff -f
$b sleep 1000
"#;

fn script_text(commands: &[Command]) -> String {
    let mut text = String::from("export HOME=/root TERM=dumb\n");
    // As on a node: the kernel's own limits are small.
    for limit in ["-l unlimited", "-n 65536"] {
        text.push_str(&format!("ulimit {limit} 2>/dev/null || :\n"));
    }
    text.push_str("status=0\n");
    for name in ["PATH", "CI", "RUST_BACKTRACE"] {
        if let Some(value) = std::env::var_os(name) {
            text.push_str(&format!("export {name}={}\n", quote(&value)));
        }
    }
    for command in commands {
        text.push_str(&format!("( {} ) || status=$?\n", shell_line(command)));
    }
    text.push_str("exit $status\n");
    text
}

/// The command with its directory and environment, for a shell.
fn shell_line(command: &Command) -> String {
    let mut line = String::new();
    if let Some(directory) = command.get_current_dir() {
        line.push_str(&format!("cd {} && ", quote(directory.as_os_str())));
    }
    line.push_str("exec env");
    for (name, value) in command.get_envs() {
        let value = value.unwrap_or_default();
        line.push_str(&format!(" {}={}", name.to_string_lossy(), quote(value)));
    }
    for word in std::iter::once(command.get_program()).chain(command.get_args()) {
        line.push(' ');
        line.push_str(&quote(word));
    }
    line
}

/// One word for a shell, whatever is in it.
fn quote(word: &OsStr) -> String {
    format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_survive_the_shell() {
        let mut command = Command::new("printf");
        command.args(["%s|", "it's", "a b", "$HOME"]).env("X", "1 2").current_dir("/");
        let output = Command::new("sh").arg("-c").arg(shell_line(&command)).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "it's|a b|$HOME|");
    }

    #[test]
    fn script_carries_a_failure_out_and_goes_on() {
        let mut failing = Command::new("sh");
        failing.args(["-c", "exit 7"]);
        let text = script_text(&[failing, Command::new("true")]);
        let status = Command::new("sh").arg("-c").arg(text).status().unwrap();
        assert_eq!(status.code(), Some(7));
    }
}
