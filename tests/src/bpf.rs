//! Which eBPF links and programs a process holds, whether they still exist, and how long the programs took.

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `BPF_MAP_CREATE`.
const MAP_CREATE: i64 = 0;
/// `BPF_PROG_LOAD`.
const PROGRAM_LOAD: i64 = 5;
/// `BPF_LINK_CREATE`.
const LINK_CREATE: i64 = 28;
/// `BPF_LINK_DETACH`.
const LINK_DETACH: i64 = 34;
/// `BPF_PROG_GET_FD_BY_ID`.
const PROGRAM_BY_ID: i64 = 13;
/// `BPF_LINK_GET_FD_BY_ID`.
const LINK_BY_ID: i64 = 30;

/// `BPF_OBJ_GET_INFO_BY_FD`.
const INFO_BY_FD: i64 = 15;
/// `BPF_ENABLE_STATS`.
const ENABLE_STATS: i64 = 32;

/// Offsets in `struct bpf_prog_info` (uapi/linux/bpf.h), and its size as far as it is read.
const JITED_LENGTH: usize = 16;
const XLATED_LENGTH: usize = 20;
const NAME: usize = 64;
const RUN_TIME: usize = 192;
const RUN_COUNT: usize = 200;
const LEFT_OUT: usize = 208;
const VERIFIED: usize = 216;
const INFO_SIZE: usize = 224;

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

/// What the kernel counted for a program.
#[derive(Clone, Debug)]
pub struct Usage {
    pub name: String,
    pub runs: u64,
    pub nanoseconds: u64,
    /// How often it was not run because it was running on that CPU already (`recursion_misses`).
    pub left_out: u64,
    /// Bytes of machine code.
    pub size: u32,
    /// Instructions as the kernel runs them, after its own rewriting.
    pub instructions: u32,
    /// Instructions that the verifier walked through to accept the program; 0 before Linux 5.16.
    pub verified: u32,
}

impl fmt::Display for Usage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = self.nanoseconds as f64 / self.runs.max(1) as f64;
        write!(out, "{:<16} {:>9} runs, {each:>5.0} ns each, ", self.name, self.runs)?;
        let Self { size, instructions, verified, .. } = self;
        write!(out, "{size:>6} bytes of code, {instructions:>5} instructions, {verified:>6} verified")
    }
}

/// Lets the kernel count its programs' runs and time while the descriptor is open; no sysctl is changed.
pub fn count_time() -> Result<OwnedFd> {
    // The type 0 is BPF_STATS_RUN_TIME.
    open(ENABLE_STATS, 0).context("letting the kernel count its programs' time")
}

/// What the programs of [`Held`] used, sorted by name; those that are gone are left out.
pub fn usage(held: &Held) -> Result<Vec<Usage>> {
    let programs = held.programs.iter().filter_map(|id| open(PROGRAM_BY_ID, *id).ok());
    let mut used = programs.map(|program| usage_of(&program)).collect::<Result<Vec<_>>>()?;
    used.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(used)
}

fn usage_of(program: &OwnedFd) -> Result<Usage> {
    let mut info = [0u8; INFO_SIZE];
    let mut attr = [0u8; 16];
    attr[..4].copy_from_slice(&program.as_raw_fd().to_ne_bytes());
    attr[4..8].copy_from_slice(&u32::try_from(INFO_SIZE)?.to_ne_bytes());
    attr[8..].copy_from_slice(&(info.as_mut_ptr() as u64).to_ne_bytes());
    // SAFETY: the kernel reads `attr`, which names `info` with its length, and writes there; both outlive the call.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, INFO_BY_FD, attr.as_mut_ptr(), size_of_val(&attr)) };
    if answer < 0 {
        return Err(nix::errno::Errno::last()).context("asking about a kernel program");
    }
    let name = info[NAME..NAME + 16].iter().copied().take_while(|byte| *byte != 0).collect();
    let number = |at: usize| info[at..at + 8].iter().rev().fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
    let small = |at: usize| (number(at) & u64::from(u32::MAX)) as u32;
    Ok(Usage {
        name: String::from_utf8(name).context("a program's name is not UTF-8")?,
        runs: number(RUN_COUNT),
        nanoseconds: number(RUN_TIME),
        left_out: number(LEFT_OUT),
        size: small(JITED_LENGTH),
        instructions: small(XLATED_LENGTH) / 8,
        verified: small(VERIFIED),
    })
}

/// Sides of an interface (`BPF_TCX_INGRESS`, `BPF_TCX_EGRESS`).
pub const TCX_INGRESS: u32 = 46;
pub const TCX_EGRESS: u32 = 47;

/// A program at one side of an interface, or at a netfilter hook; dropping it removes both.
pub struct Attachment {
    program: OwnedFd,
    link: OwnedFd,
}

impl Drop for Attachment {
    /// At once, although a process that another thread is just starting may hold copies of the descriptors a little longer.
    fn drop(&mut self) {
        let link = self.link.as_raw_fd().to_ne_bytes();
        // SAFETY: the kernel reads `link` alone.
        unsafe { libc::syscall(libc::SYS_bpf, LINK_DETACH, link.as_ptr(), size_of_val(&link)) };
    }
}

/// `BPF_PROG_TYPE_SCHED_CLS`, `BPF_PROG_TYPE_NETFILTER`, and the attach type that goes with the latter (`BPF_NETFILTER`).
const SCHED_CLS: u32 = 3;
const NETFILTER_PROGRAM: u32 = 32;
const NETFILTER: u32 = 45;

/// `r0 = TCX_NEXT (-1); exit`.
const NEXT: [u64; 2] = [u64::from_le_bytes([0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]), 0x95];
/// `r0 = NF_ACCEPT (1); exit`.
const ACCEPT: [u64; 2] = [u64::from_le_bytes([0xb7, 0, 0, 0, 1, 0, 0, 0]), 0x95];

impl Attachment {
    /// Loads a TC program of these instructions (`struct bpf_insn`) and links it (tcx) to an interface of the calling thread's
    /// network namespace, behind the programs that are there. A name has at most 15 bytes.
    pub fn new(name: &str, code: &[u64], interface: &str, side: u32) -> Result<Self> {
        let program = load(name, code, SCHED_CLS, 0)?;
        let index = nix::net::if_::if_nametoindex(interface).with_context(|| format!("looking for {interface}"))?;
        Self::link(program, &[index, side, 0]).with_context(|| format!("attaching {name} to {interface}"))
    }

    /// One that does nothing with packets that enter: what the kernel counts for it is what counting costs.
    pub fn of_nothing(interface: &str) -> Result<Self> {
        Self::new("nothing", &NEXT, interface, TCX_INGRESS)
    }

    /// As [`Attachment::of_nothing`], on both sides.
    pub fn of_nothing_on_both_sides(interface: &str) -> Result<[Self; 2]> {
        let on = |side| Self::new("nothing", &NEXT, interface, side);
        Ok([on(TCX_INGRESS)?, on(TCX_EGRESS)?])
    }

    /// One that accepts all packets at a hook (`NF_INET_*`) of a family (`NFPROTO_*`) of the calling thread's network namespace;
    /// since Linux 6.4.
    pub fn of_nothing_at_hook(family: u32, hook: u32, priority: i32) -> Result<Self> {
        let program = load("nothing", &ACCEPT, NETFILTER_PROGRAM, NETFILTER)?;
        let target = [0, NETFILTER, 0, family, hook, priority.cast_unsigned(), 0];
        Self::link(program, &target).with_context(|| format!("attaching to hook {hook} at priority {priority}"))
    }

    /// `target`: `target_fd` and what follows it for `BPF_LINK_CREATE`.
    fn link(program: OwnedFd, target: &[u32]) -> nix::Result<Self> {
        let program_fd = program.as_raw_fd().cast_unsigned();
        let attr: Vec<u8> = [&[program_fd], target].concat().into_iter().flat_map(u32::to_ne_bytes).collect();
        // SAFETY: the kernel reads `attr` alone.
        let link = unsafe { made(LINK_CREATE, &attr) }?;
        Ok(Self { program, link })
    }

    pub fn usage(&self) -> Result<Usage> {
        usage_of(&self.program)
    }
}

fn load(name: &str, code: &[u64], kind: u32, attach_type: u32) -> Result<OwnedFd> {
    /// Where `prog_name` and, behind `prog_ifindex`, `expected_attach_type` stand in `union bpf_attr`.
    const NAME_AT: usize = 48;
    const NAME_LENGTH: usize = 16;
    let license = c"GPL";
    let mut attr = Vec::new();
    attr.extend([kind, u32::try_from(code.len())?].map(u32::to_ne_bytes).concat());
    attr.extend([code.as_ptr() as u64, license.as_ptr() as u64].map(u64::to_ne_bytes).concat());
    // log_level to prog_flags stay 0.
    attr.resize(NAME_AT, 0);
    attr.extend(name.bytes().take(NAME_LENGTH - 1));
    attr.resize(NAME_AT + NAME_LENGTH, 0);
    attr.extend([0, attach_type].map(u32::to_ne_bytes).concat());
    // SAFETY: the kernel reads `attr`, which names the code and the licence; all outlive the call.
    unsafe { made(PROGRAM_LOAD, &attr) }.with_context(|| format!("loading {name}"))
}

/// A map (`BPF_MAP_TYPE_LRU_HASH`) for some thousand keys; sizes in bytes.
pub fn hash_map(key: usize, value: usize) -> Result<OwnedFd> {
    const LRU_HASH: u32 = 9;
    const ENTRIES: u32 = 4096;
    let attr = [LRU_HASH, u32::try_from(key)?, u32::try_from(value)?, ENTRIES].map(u32::to_ne_bytes).concat();
    // SAFETY: the kernel reads `attr` alone.
    unsafe { made(MAP_CREATE, &attr) }.context("making a map")
}

/// What a command with these bytes of `union bpf_attr` makes.
///
/// # Safety
/// Pointers in `attr` must be valid for the command.
unsafe fn made(command: i64, attr: &[u8]) -> nix::Result<OwnedFd> {
    // SAFETY: as the caller says; the length is that of `attr`.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), attr.len()) };
    match i32::try_from(answer) {
        // SAFETY: the call made this descriptor for us; nobody else has it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(nix::errno::Errno::last()),
    }
}

/// Whether the kernel opens the object with this ID; anything but "no such object" counts as yes.
fn exists(command: i64, id: u32) -> bool {
    !matches!(open(command, id), Err(nix::errno::Errno::ENOENT))
}

/// A command that takes one number and makes a descriptor.
fn open(command: i64, number: u32) -> nix::Result<OwnedFd> {
    // `union bpf_attr` begins with the number; `next_id` and `open_flags` stay 0.
    let mut attr = [0u32; 32];
    attr[0] = number;
    // SAFETY: numbers only; the kernel checks that what it does not know is 0.
    unsafe { made(command, &attr.map(u32::to_ne_bytes).concat()) }
}
