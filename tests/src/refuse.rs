//! A process to whom the kernel refuses some kinds of kernel programs, as an old kernel or a strict policy would: its `bpf()`
//! calls are looked at from outside (seccomp's user notification) and refused or let through.

use crate::netns::ChildGuard;
use anyhow::{Context, Result};
use nix::errno::Errno;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;

/// `enum bpf_prog_type`.
pub const KPROBE: u32 = 2;
pub const SCHED_CLS: u32 = 3;
pub const TRACING: u32 = 26;
pub const NETFILTER: u32 = 32;

/// `BPF_PROG_LOAD`.
const PROG_LOAD: u64 = 5;
/// Under this number the child holds the notifications' descriptor until we have fetched it.
const LISTENER: i32 = 199;
/// include/uapi/linux/seccomp.h
const SET_MODE_FILTER: libc::c_long = 1;
const NEW_LISTENER: libc::c_long = 1 << 3;
const USER_NOTIFICATION: u32 = 0x7fc0_0000;
const ALLOW: u32 = 0x7fff_0000;
const RECEIVE: libc::c_ulong = 0xc050_2100;
const SEND: libc::c_ulong = 0xc018_2101;
const CONTINUE: u32 = 1;

/// `struct seccomp_notif`.
#[repr(C)]
#[derive(Default)]
struct Notification {
    id: u64,
    pid: u32,
    flags: u32,
    number: i32,
    arch: u32,
    instruction: u64,
    arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

const _: () = assert!(size_of::<Notification>() == 80 && size_of::<Response>() == 24);

/// Starts a command that cannot load programs of these types: `BPF_PROG_LOAD` ends with `error`.
pub fn spawn(mut command: Command, types: &'static [u32], error: Errno) -> Result<ChildGuard> {
    // SAFETY: between fork and exec only system calls are made.
    unsafe { command.pre_exec(install) };
    let child = ChildGuard::spawn(command)?;
    let listener = fetch(child.id()).context("fetching the descriptor of the notifications")?;
    thread::spawn(move || supervise(&listener, types, error));
    Ok(child)
}

/// Sends every `bpf()` call of this process to whoever reads [`LISTENER`].
fn install() -> std::io::Result<()> {
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    // BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K; `nr` is the first word of `struct seccomp_data`.
    let mut filter = [
        statement(0x20, 0),
        libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: libc::SYS_bpf as u32 },
        statement(0x06, USER_NOTIFICATION),
        statement(0x06, ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which outlives the call; the descriptors are this process' own.
    let answer = unsafe {
        let fd = libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, NEW_LISTENER, &raw const program);
        if fd < 0 { -1 } else { libc::dup2(fd as i32, LISTENER) }
    };
    if answer < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

fn fetch(pid: u32) -> Result<OwnedFd> {
    // SAFETY: both calls make a descriptor of our own, or fail.
    unsafe {
        let process = checked(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        checked(libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), LISTENER, 0))
    }
}

/// # Safety
/// `answer` is a descriptor that nobody else has, or negative.
unsafe fn checked(answer: libc::c_long) -> Result<OwnedFd> {
    if answer < 0 {
        return Err(Errno::last().into());
    }
    // SAFETY: see above.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(answer)?) })
}

/// Answers until the last process with the filter is gone.
fn supervise(listener: &OwnedFd, types: &[u32], error: Errno) {
    loop {
        let mut notification = Notification::default();
        // SAFETY: the kernel writes one notification.
        if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut notification) } < 0 {
            match Errno::last() {
                // The caller was killed before it could be heard, or we were interrupted.
                Errno::EINTR => continue,
                Errno::ENOENT if !is_over(listener) => continue,
                _ => return,
            }
        }
        let refused = loads(&notification).is_some_and(|kind| types.contains(&kind));
        let (error, flags) = if refused { (-(error as i32), 0) } else { (0, CONTINUE) };
        let response = Response { id: notification.id, value: 0, error, flags };
        // SAFETY: the kernel reads one response. It fails when the caller is gone.
        unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw const response) };
    }
}

/// Nobody is left who could call.
fn is_over(listener: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    poll.revents & libc::POLLHUP != 0
}

/// The type of the program that the call wants to load: `union bpf_attr` begins with it.
fn loads(notification: &Notification) -> Option<u32> {
    let [command, attributes, ..] = notification.arguments;
    if command != PROG_LOAD {
        return None;
    }
    let mut kind = [0; 4];
    File::open(format!("/proc/{}/mem", notification.pid)).ok()?.read_exact_at(&mut kind, attributes).ok()?;
    Some(u32::from_ne_bytes(kind))
}
