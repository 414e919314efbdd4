//! The TC programs on the interfaces: tcx links, which vanish with the process.

use super::sys::{self, Side};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// How the TC programs hang on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcMode {
    /// BPF links (Linux 6.6 and later).
    Tcx,
    /// Filters of a clsact queueing discipline.
    Clsact,
}

/// The attached programs, by interface.
pub struct Attachments {
    links: BTreeMap<u32, [OwnedFd; 2]>,
}

impl Attachments {
    pub const fn new() -> Self {
        Self { links: BTreeMap::new() }
    }

    /// Attaches both programs to one interface. Attaching twice replaces.
    pub fn attach(&mut self, index: u32, programs: [BorrowedFd<'_>; 2]) -> io::Result<()> {
        self.links.remove(&index);
        let ingress = sys::link_tcx(programs[0], index, Side::Ingress)?;
        let egress = sys::link_tcx(programs[1], index, Side::Egress)?;
        self.links.insert(index, [ingress, egress]);
        Ok(())
    }

    /// Detaches from an interface, also from one that has moved to another namespace with our programs on it.
    pub fn detach(&mut self, index: u32) {
        self.links.remove(&index);
    }

    pub fn indices(&self) -> impl Iterator<Item = u32> {
        self.links.keys().copied()
    }
}
