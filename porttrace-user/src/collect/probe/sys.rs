//! The bpf() system call where aya has no words for what is needed: programs by type number, `tp_btf` by id, tcx by index.

use aya_obj::generated::{bpf_insn, bpf_prog_info};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const MAP_UPDATE_ELEM: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const BTF_GET_FD_BY_ID: libc::c_long = 19;
const MAP_FREEZE: libc::c_long = 22;
const BTF_GET_NEXT_ID: libc::c_long = 23;
const LINK_CREATE: libc::c_long = 28;

/// `BPF_F_BEFORE` without a reference: first in line.
const BEFORE_ALL: u32 = 1 << 3;
const LOG_BYTES: usize = 1 << 16;
/// How often a program is loaded whose verifying a signal cut short.
const LOADS: u32 = 10;

/// Program and attach type, as in `enum bpf_prog_type` and `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug)]
pub enum ProgramType {
    Netfilter,
    /// TC.
    Classifier,
    Kprobe,
    /// `tp_btf`: the tracepoint's `attach_btf_id`.
    RawTracepoint {
        attach_btf_id: u32,
    },
    /// `fentry`: called where the kernel function begins.
    Fentry(Function),
}

/// A kernel function in the kernel's own types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    pub btf_id: u32,
    /// The module whose types these are; `None`: vmlinux's.
    pub module: Option<&'static str>,
}

/// Which side of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Ingress,
    Egress,
}

/// Where a NETFILTER program runs.
#[derive(Clone, Copy, Debug)]
pub struct NetfilterHook {
    /// `NFPROTO_IPV4` 2 or `NFPROTO_IPV6` 10.
    pub pf: u32,
    pub hook: u32,
    pub priority: i32,
}

#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
    attach_btf_obj_fd: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    /// NETFILTER: pf, hook, priority, flags; tcx: relative fd, padding, expected revision.
    extra: [u32; 4],
}

#[repr(C)]
#[derive(Default)]
struct RawTracepointOpen {
    name: u64,
    prog_fd: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct MapUpdate {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ObjectInfo {
    fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct NextId {
    start: u32,
    next: u32,
    flags: u32,
}

/// `struct bpf_btf_info`.
#[repr(C)]
#[derive(Default)]
struct BtfInfo {
    btf: u64,
    btf_size: u32,
    id: u32,
    name: u64,
    name_len: u32,
    kernel_btf: u32,
}

/// Sets the one element of a map that holds a section of data.
pub fn fill(map: BorrowedFd<'_>, data: &[u8]) -> io::Result<()> {
    let key = 0u32;
    let (key, value) = ((&raw const key) as u64, data.as_ptr() as u64);
    bpf(MAP_UPDATE_ELEM, &MapUpdate { map_fd: raw(map), key, value, ..MapUpdate::default() }).map(drop)
}

/// From now on only the kernel side may write to the map, and the verifier takes its elements for constants where that may not either.
pub fn freeze(map: BorrowedFd<'_>) -> io::Result<()> {
    bpf(MAP_FREEZE, &raw(map)).map(drop)
}

/// The kernel's number of a program.
pub fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    // `struct bpf_prog_info` begins with type and id.
    let mut info = [0u32; 2];
    let info_len = size_of_val(&info) as u32;
    bpf(OBJ_GET_INFO_BY_FD, &ObjectInfo { fd: raw(program), info_len, info: (&raw mut info) as u64 })?;
    Ok(info[1])
}

/// How often the kernel left a tracing program out, in all, as it was already running on that CPU (`recursion_misses`; of kprobes
/// it counts that since Linux 6.7 only).
pub fn left_out(program: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: all-zero is a value of every field.
    let mut info: bpf_prog_info = unsafe { std::mem::zeroed() };
    let info_len = size_of_val(&info) as u32;
    bpf(OBJ_GET_INFO_BY_FD, &ObjectInfo { fd: raw(program), info_len, info: (&raw mut info) as u64 })?;
    Ok(info.recursion_misses)
}

/// A descriptor of a module's types.
fn types_of(module: &str) -> io::Result<OwnedFd> {
    let mut next = NextId::default();
    loop {
        // Ends with ENOENT.
        next = NextId { start: next.next, ..NextId::default() };
        bpf_mut(BTF_GET_NEXT_ID, &mut next)?;
        let types = match fd(bpf(BTF_GET_FD_BY_ID, &next.next)) {
            Ok(types) => types,
            // It went meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(error) => return Err(error),
        };
        let mut name = [0u8; 64];
        let mut info = BtfInfo { name: name.as_mut_ptr() as u64, name_len: name.len() as u32, ..BtfInfo::default() };
        let info_len = size_of_val(&info) as u32;
        bpf(OBJ_GET_INFO_BY_FD, &ObjectInfo { fd: raw(types.as_fd()), info_len, info: (&raw mut info) as u64 })?;
        if name.split(|byte| *byte == 0).next() == Some(module.as_bytes()) {
            return Ok(types);
        }
    }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Loads a program; an error carries the end of the verifier's log.
pub fn load(
    name: &str,
    kind: ProgramType,
    instructions: &[bpf_insn],
    license: &CString,
) -> Result<OwnedFd, (io::Error, String)> {
    let mut attr = ProgLoad {
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..ProgLoad::default()
    };
    (attr.prog_type, attr.expected_attach_type) = match kind {
        ProgramType::Netfilter => (32, 45),
        ProgramType::Classifier => (3, 0),
        ProgramType::Kprobe => (2, 0),
        ProgramType::RawTracepoint { attach_btf_id } => {
            attr.attach_btf_id = attach_btf_id;
            (26, 23)
        }
        ProgramType::Fentry(function) => {
            attr.attach_btf_id = function.btf_id;
            (26, 24)
        }
    };
    // Held until the program is loaded.
    let module = match kind {
        ProgramType::Fentry(Function { module: Some(name), .. }) => {
            Some(types_of(name).map_err(|error| (error, String::new()))?)
        }
        _ => None,
    };
    attr.attach_btf_obj_fd = module.as_ref().map_or(0, |types| raw(types.as_fd()));
    for (to, from) in attr.prog_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let error = match fd(load_unless_cut_short(&attr)) {
        Ok(loaded) => return Ok(loaded),
        Err(error) => error,
    };
    let mut log = vec![0u8; LOG_BYTES];
    (attr.log_level, attr.log_size, attr.log_buf) = (1, LOG_BYTES as u32, log.as_mut_ptr() as u64);
    match fd(load_unless_cut_short(&attr)) {
        Ok(loaded) => Ok(loaded),
        Err(_) => {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(0);
            let text = String::from_utf8_lossy(&log[..end]).into_owned();
            Err((error, tail(&text, 6)))
        }
    }
}

/// The verifier gives up where a signal waits for the thread (`do_check` in kernel/bpf/verifier.c), as it may at any time.
fn load_unless_cut_short(attr: &ProgLoad) -> io::Result<libc::c_long> {
    let mut left = LOADS;
    loop {
        left -= 1;
        match bpf(PROG_LOAD, attr) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && left > 0 => {}
            answer => return answer,
        }
    }
}

/// Links a NETFILTER program to a hook of the calling thread's network namespace.
pub fn link_netfilter(program: BorrowedFd<'_>, at: NetfilterHook) -> io::Result<OwnedFd> {
    link(program, 0, 45, 0, [at.pf, at.hook, at.priority.cast_unsigned(), 0])
}

/// Links a TC program to an interface of the calling thread's network namespace, first in line: a program before ours that
/// lets a packet go (`TCX_PASS`) would hide it.
pub fn link_tcx(program: BorrowedFd<'_>, ifindex: u32, side: Side) -> io::Result<OwnedFd> {
    let attach_type = match side {
        Side::Ingress => 46,
        Side::Egress => 47,
    };
    link(program, ifindex, attach_type, BEFORE_ALL, [0; 4])
}

/// Attaches a `tp_btf` program to the tracepoint that it was loaded for.
pub fn open_raw_tracepoint(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attr = RawTracepointOpen { name: 0, prog_fd: raw(program), pad: 0 };
    fd(bpf(RAW_TRACEPOINT_OPEN, &attr))
}

fn link(program: BorrowedFd<'_>, target: u32, attach_type: u32, flags: u32, extra: [u32; 4]) -> io::Result<OwnedFd> {
    let attr = LinkCreate { prog_fd: raw(program), target, attach_type, flags, extra };
    fd(bpf(LINK_CREATE, &attr))
}

fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<libc::c_long> {
    call(command, std::ptr::from_ref(attr))
}

/// As [`bpf`], where the kernel answers in `attr`.
fn bpf_mut<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    call(command, std::ptr::from_mut(attr))
}

fn call<T>(command: libc::c_long, attr: *const T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is `repr(C)`, zero where unused, and its pointers outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn fd(result: io::Result<libc::c_long>) -> io::Result<OwnedFd> {
    let raw = i32::try_from(result?).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
