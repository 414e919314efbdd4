//! A part of a map's memory, in this process.

use aya::maps::MapData;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};
use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd as _;
use std::ptr::NonNull;

/// Memory that the kernel and this process share, until it is dropped.
pub struct Mapping {
    start: NonNull<c_void>,
    bytes: usize,
}

/// The kernel's page, in bytes.
pub fn page() -> usize {
    sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|size| usize::try_from(size).ok()).unwrap_or(4096)
}

// SAFETY: a mapping belongs to the process, whichever thread uses it.
unsafe impl Send for Mapping {}

impl Mapping {
    /// `bytes` from `offset` on, both in whole pages but for the last; of what else the map allows the kernel says EPERM or EINVAL.
    pub fn of(map: &MapData, bytes: usize, offset: usize, protection: ProtFlags) -> io::Result<Self> {
        let length = NonZeroUsize::new(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping, at a place of the kernel's choice.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, map.fd().as_fd(), offset) }?;
        Ok(Self { start, bytes })
    }

    pub const fn start<T>(&self) -> NonNull<T> {
        self.start.cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, and whoever used it borrowed this. It cannot fail for a mapping that is there.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}
