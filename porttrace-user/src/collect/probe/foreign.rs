//! Programs of others on the interfaces of the calling thread's network namespace.

use super::clsact;
use crate::collect::attributes::attributes;
use crate::collect::netlink::socket::{Connection, NetlinkError};
use crate::core::doctor::facts::Program;
use aya::programs::tc::TcAttachType;
use aya::programs::{SchedClassifier, loaded_programs};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::collections::BTreeMap;

const GET_LINK: u16 = 18;
/// `IFLA_XDP`, and inside it `IFLA_XDP_ATTACHED` and `IFLA_XDP_PROG_ID`.
const XDP: u16 = 43;
const XDP_ATTACHED: u16 = 2;
const XDP_PROGRAM: u16 = 4;

/// TC programs (tcx, clsact) and XDP programs that are not porttrace's, sorted. What cannot be listed is left out.
pub fn programs(interfaces: &BTreeMap<u32, String>) -> Vec<Program> {
    let name_of = |index: u32| interfaces.get(&index).cloned().unwrap_or_else(|| format!("if{index}"));
    let mut found = Vec::new();
    for (index, place, name) in clsact::others().unwrap_or_default() {
        found.push(Program { interface: name_of(index), place: place.to_owned(), name });
    }
    for interface in interfaces.values() {
        for (place, side) in [("tcx ingress", TcAttachType::Ingress), ("tcx egress", TcAttachType::Egress)] {
            let programs = SchedClassifier::query_tcx(interface, side).map(|(_, programs)| programs);
            for program in programs.unwrap_or_default() {
                let name = program.name_as_str().unwrap_or_default().to_owned();
                found.push(Program { interface: interface.clone(), place: place.to_owned(), name });
            }
        }
    }
    for (index, id) in xdp().unwrap_or_default() {
        let program = loaded_programs().flatten().find(|program| program.id() == id);
        let name = program.and_then(|program| program.name_as_str().map(str::to_owned)).unwrap_or_default();
        found.push(Program { interface: name_of(index), place: "xdp".to_owned(), name });
    }
    // Those of another porttrace that watches.
    found.retain(|program| !matches!(program.name.as_str(), "tc_ingress" | "tc_egress"));
    found.sort();
    found
}

/// Interfaces with an XDP program: index and the program's ID.
fn xdp() -> Result<Vec<(u32, u32)>, NetlinkError> {
    let number = |bytes: &[u8]| bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
    // struct ifinfomsg: 16 bytes, the index at 4.
    Connection::open(NETLINK_ROUTE)?.dump(GET_LINK, &[0; 16], |_, payload| {
        let index = number(payload.get(4..)?)?;
        let (_, xdp) = attributes(payload.get(16..)?).find(|(kind, _)| *kind == XDP)?;
        let of = |wanted| attributes(xdp).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        of(XDP_ATTACHED).filter(|value| value.first().is_some_and(|mode| *mode != 0))?;
        Some((index, number(of(XDP_PROGRAM)?)?))
    })
}
