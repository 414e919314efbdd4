//! The reader's end of the BPF ring buffer (kernel/bpf/ringbuf.c).
//!
//! aya's reader maps all of the buffer, twice, and all of that counts as memory of this process. This one maps a window, moves it
//! along, and says only once for some records that their room is free again.

use super::ProbeError;
use super::mapping::{Mapping, page};
use aya::maps::MapData;
use nix::sys::mman::ProtFlags;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::slice;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Bytes of the window, most of the time. A record that begins in it ends at most a page behind it.
const WINDOW: usize = 256 << 10;
/// Records after which the kernel is told that their room is free.
const FREED_AT_ONCE: usize = 64;

/// `BPF_RINGBUF_BUSY_BIT`, `BPF_RINGBUF_DISCARD_BIT`, `BPF_RINGBUF_HDR_SZ`.
const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
const HEADER: usize = 8;

/// A ring buffer whose records, header included, are no longer than a page.
pub struct Ring {
    map: MapData,
    /// A page that begins with the position up to which everything was read, and one with that up to which there is something.
    consumer: Mapping,
    producer: Mapping,
    window: Window,
    /// A power of two.
    bytes: usize,
    page: usize,
    /// All before it was read. It only grows: where it is in the buffer is its remainder.
    position: usize,
}

/// A record in the window.
struct Record {
    start: *const u8,
    bytes: usize,
    /// The kernel side gave it up.
    is_discarded: bool,
    /// The position behind it.
    end: usize,
}

/// A part of the data.
struct Window {
    mapping: Mapping,
    /// Where it begins in the buffer, and how many bytes from there on a record may begin.
    at: usize,
    begins: usize,
}

impl Ring {
    /// `bytes`: the size of the buffer, as the map was made.
    pub fn of(map: MapData, bytes: u32) -> Result<Self, ProbeError> {
        let failed = |error| ProbeError::Io { what: "mapping the ring buffer", error };
        let (bytes, page) = (bytes as usize, page());
        let read = ProtFlags::PROT_READ;
        let consumer = Mapping::of(&map, page, 0, read | ProtFlags::PROT_WRITE).map_err(failed)?;
        let producer = Mapping::of(&map, page, page, read).map_err(failed)?;
        let position = position_at(&consumer).load(Ordering::Acquire);
        let window = Window::of(&map, position & (bytes - 1), bytes, page).map_err(failed)?;
        Ok(Self { map, consumer, producer, window, bytes, page, position })
    }

    /// Hands over at most so many records, oldest first; `true`: there are no more. After an error the record that caused it is gone.
    pub fn read<E: From<ProbeError>>(
        &mut self,
        most: usize,
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<bool, E> {
        let mut done = Ok(false);
        for number in 1..=most {
            match self.next() {
                Ok(Some(Record { start, bytes, is_discarded, end })) => {
                    self.position = end;
                    if !is_discarded {
                        // SAFETY: the record lies in the window and is written; its room is not free before `free` is called.
                        done = take(unsafe { slice::from_raw_parts(start, bytes) }).map(|()| false);
                    }
                }
                Ok(None) => done = Ok(true),
                Err(error) => done = Err(ProbeError::Io { what: "mapping the ring buffer", error }.into()),
            }
            if !matches!(done, Ok(false)) {
                break;
            }
            if number % FREED_AT_ONCE == 0 {
                self.free();
            }
        }
        self.free();
        done
    }

    /// The next record, if it is written.
    fn next(&mut self) -> io::Result<Option<Record>> {
        if self.position >= position_at(&self.producer).load(Ordering::Acquire) {
            return Ok(None);
        }
        let at = self.position & (self.bytes - 1);
        if !self.window.has(at) {
            self.window = Window::of(&self.map, at, self.bytes, self.page)?;
        }
        // SAFETY: the window has the place and a page more.
        let header = unsafe { self.window.mapping.start::<u8>().add(at - self.window.at) };
        // SAFETY: headers begin with their length, aligned to 8.
        let length = unsafe { header.cast::<AtomicU32>().as_ref() }.load(Ordering::Acquire);
        if length & BUSY != 0 {
            return Ok(None);
        }
        let bytes = (length & !DISCARDED) as usize;
        Ok(Some(Record {
            // SAFETY: the data follows its header.
            start: unsafe { header.add(HEADER) }.as_ptr(),
            bytes,
            is_discarded: length & DISCARDED != 0,
            end: self.position + (HEADER + bytes).next_multiple_of(HEADER),
        }))
    }

    /// Tells the kernel that the room of all that was read is free.
    fn free(&self) {
        let told = position_at(&self.consumer);
        if told.load(Ordering::Relaxed) != self.position {
            told.store(self.position, Ordering::Release);
        }
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        use std::os::fd::AsFd as _;
        self.map.fd().as_fd().as_raw_fd()
    }
}

impl Window {
    /// That in which a record may begin `at` this place of the buffer. The data is mapped after both pages with positions, and once
    /// more behind its end, so that what goes on at the beginning can be read in one piece.
    fn of(map: &MapData, at: usize, bytes: usize, page: usize) -> io::Result<Self> {
        let start = at & !(page - 1);
        let begins = WINDOW.min(bytes).min(bytes - start);
        let mapping = Mapping::of(map, begins + page, 2 * page + start, ProtFlags::PROT_READ)?;
        Ok(Self { mapping, at: start, begins })
    }

    const fn has(&self, at: usize) -> bool {
        at >= self.at && at - self.at < self.begins
    }
}

/// The position that the page begins with.
fn position_at(page: &Mapping) -> &AtomicUsize {
    // SAFETY: the page begins with an aligned word, and lives as long as the mapping is borrowed.
    unsafe { page.start::<AtomicUsize>().as_ref() }
}
