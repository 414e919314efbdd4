//! The kernel side's first filter, written to from here: bits for each port.

use super::config::ProbeConfig;
use super::mapping::Mapping;
use super::{Kernel, ProbeError, missing_map};
use aya::maps::Map;
use nix::sys::mman::ProtFlags;
use porttrace_ebpf::{PORT_TRACKED, PORTS_ARE_KNOWN};
use std::sync::atomic::{AtomicU8, Ordering};

/// A byte for each port.
const BYTES: usize = 1 << 16;

/// Map `PORTS`.
pub struct Ports(Mapping);

impl Ports {
    pub fn of(kernel: &mut Kernel) -> Result<Self, ProbeError> {
        let Map::Array(map) = kernel.map_mut("PORTS")? else { return Err(missing_map("PORTS")) };
        let mapping = Mapping::of(map, BYTES, 0, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
        mapping.map(Self).map_err(|error| ProbeError::Io { what: "mapping the port filter", error })
    }

    /// From now on the programs watch.
    pub fn watch(&self, config: &ProbeConfig) {
        for port in &config.ports {
            self.set(*port, config.protos.bits());
        }
        self.set(0, PORTS_ARE_KNOWN);
    }

    /// Has packets of the server's port of some tracked connection looked up.
    pub fn track(&self, port: u16) {
        self.set(port, PORT_TRACKED);
    }

    /// The kernel side sets bits in other bytes meanwhile, or the same one in this.
    fn set(&self, port: u16, bits: u8) {
        // SAFETY: the byte is one of those that are mapped, and stays so while this is borrowed.
        let byte = unsafe { AtomicU8::from_ptr(self.0.start::<u8>().as_ptr().add(usize::from(port))) };
        byte.fetch_or(bits, Ordering::Relaxed);
    }
}
