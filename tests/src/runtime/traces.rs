//! What pods leave on a machine, found and removed: processes in cgroups, mounts, the cgroups themselves.

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Kills every process in a cgroup (`/name`) and those below it, of every hierarchy.
pub fn kill_cgroup(name: &str) {
    for folder in cgroups(name) {
        for pid in fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default().lines() {
            if let Ok(pid) = pid.parse() {
                // It may be gone already.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

/// Kills every process that was started with this folder in its arguments, and waits a little until they are gone.
pub fn kill_users(folder: &Path) {
    let wanted = folder.as_os_str().as_encoded_bytes();
    let users = || {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let uses = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            *pid != std::process::id().cast_signed() && line.windows(wanted.len()).any(|part| part == wanted)
        };
        pids.filter(uses).collect::<Vec<i32>>()
    };
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let users = users();
        if users.is_empty() || Instant::now() > deadline {
            return;
        }
        for pid in users {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Removes a cgroup and those below it, as far as no process is in them any more.
pub fn remove_cgroup(name: &str) {
    for folder in cgroups(name) {
        let _ = fs::remove_dir(folder);
    }
}

/// Unmounts everything below a folder.
pub fn unmount_below(folder: &Path) {
    // The fifth field of a line is the mount point (proc_pid_mountinfo(5)); what was mounted last goes first.
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    for point in points.filter(|point| point.starts_with(folder)) {
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
}

/// The folders of a cgroup in every hierarchy, the innermost first.
fn cgroups(name: &str) -> Vec<PathBuf> {
    let name = name.trim_start_matches('/');
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found = Vec::new();
    for top in std::iter::once(PathBuf::from("/sys/fs/cgroup")).chain(hierarchies) {
        collect(&top.join(name), &mut found);
    }
    found
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
    if !folder.is_dir() {
        return;
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        collect(&entry.path(), found);
    }
    found.push(folder.to_owned());
}
