//! The TC programs on the interfaces: tcx links where the kernel has them, clsact filters otherwise.

use super::clsact::{self, Clsact};
use super::config::TcMode;
use super::sys::{self, Side};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// Index of `lo` in every network namespace.
const LOOPBACK: u32 = 1;

/// Both programs, ingress first.
pub type Programs<'fd> = [BorrowedFd<'fd>; 2];

/// The attached programs, by interface.
pub struct Attachments {
    kind: Kind,
    indices: BTreeSet<u32>,
}

enum Kind {
    Tcx(BTreeMap<u32, [OwnedFd; 2]>),
    Clsact(Box<Clsact>),
}

impl Attachments {
    /// Removes what dead probes left behind, and settles how to attach: as `wanted`, or tcx where attaching to `lo` shows that the kernel has it.
    pub fn new(wanted: Option<TcMode>, programs: Programs<'_>) -> io::Result<Self> {
        clsact::sweep()?;
        let kind = match wanted {
            Some(TcMode::Tcx) => Kind::Tcx(BTreeMap::new()),
            Some(TcMode::Clsact) => Kind::Clsact(Box::new(Clsact::new()?)),
            None => match link(LOOPBACK, programs) {
                // Kept: a descriptor that was just closed may live on in a child process, and the link with it.
                Ok(links) => Kind::Tcx(BTreeMap::from([(LOOPBACK, links)])),
                // An unknown attach type; whatever else went wrong will show again where it matters.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Kind::Clsact(Box::new(Clsact::new()?)),
                Err(_) => Kind::Tcx(BTreeMap::new()),
            },
        };
        Ok(Self { kind, indices: BTreeSet::new() })
    }

    pub const fn mode(&self) -> TcMode {
        match self.kind {
            Kind::Tcx(_) => TcMode::Tcx,
            Kind::Clsact(_) => TcMode::Clsact,
        }
    }

    /// Attaches both programs to one interface, before all others that are there.
    pub fn attach(&mut self, index: u32, programs: Programs<'_>) -> io::Result<()> {
        match &mut self.kind {
            Kind::Tcx(links) => {
                if let Entry::Vacant(place) = links.entry(index) {
                    place.insert(link(index, programs)?);
                }
            }
            Kind::Clsact(clsact) => clsact.attach(index, programs)?,
        }
        self.indices.insert(index);
        Ok(())
    }

    /// Detaches from an interface that went: with tcx also from one that only moved to another namespace.
    pub fn detach(&mut self, index: u32) {
        self.indices.remove(&index);
        match &mut self.kind {
            Kind::Tcx(links) => {
                links.remove(&index);
            }
            Kind::Clsact(clsact) => {
                // The interface went, and its filters with it.
                let _ = clsact.detach(index);
            }
        }
    }

    /// Number of interfaces with our programs.
    pub fn count(&self) -> usize {
        self.indices.len()
    }
}

fn link(index: u32, programs: Programs<'_>) -> io::Result<[OwnedFd; 2]> {
    Ok([sys::link_tcx(programs[0], index, Side::Ingress)?, sys::link_tcx(programs[1], index, Side::Egress)?])
}
