//! Which eBPF links and programs a process holds, and whether they still exist.

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};

/// `BPF_PROG_GET_FD_BY_ID`.
const PROGRAM_BY_ID: i64 = 13;
/// `BPF_LINK_GET_FD_BY_ID`.
const LINK_BY_ID: i64 = 30;

/// Kernel objects by ID.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub links: BTreeSet<u32>,
    pub programs: BTreeSet<u32>,
}

/// What a process holds open, from its `/proc/PID/fdinfo`.
pub fn held_by(pid: u32) -> Result<Held> {
    let directory = format!("/proc/{pid}/fdinfo");
    let mut held = Held::default();
    for entry in fs::read_dir(&directory).with_context(|| format!("listing {directory}"))? {
        // A descriptor may be closed meanwhile.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        for line in text.lines() {
            let (key, value) = line.split_once(':').unwrap_or_default();
            match (key, value.trim().parse::<u32>()) {
                ("link_id", Ok(id)) => held.links.extend([id]),
                ("prog_id", Ok(id)) => held.programs.extend([id]),
                _ => {}
            }
        }
    }
    Ok(held)
}

impl Held {
    /// Those that still exist.
    pub fn alive(&self) -> Self {
        let alive = |ids: &BTreeSet<u32>, command| ids.iter().copied().filter(|id| exists(command, *id)).collect();
        Self { links: alive(&self.links, LINK_BY_ID), programs: alive(&self.programs, PROGRAM_BY_ID) }
    }
}

/// Whether the kernel opens the object with this ID; anything but "no such object" counts as yes.
fn exists(command: i64, id: u32) -> bool {
    // `union bpf_attr` begins with the ID; `next_id` and `open_flags` stay 0.
    let mut attr = [0u32; 32];
    attr[0] = id;
    // SAFETY: the kernel reads `size_of_val(&attr)` bytes of `attr` and checks that those it does not know are 0.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(&attr)) };
    match i32::try_from(answer) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: the call made this descriptor for us; nobody else has it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            true
        }
        _ => nix::errno::Errno::last() != nix::errno::Errno::ENOENT,
    }
}
