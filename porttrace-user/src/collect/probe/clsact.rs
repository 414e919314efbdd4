//! TC filters of a clsact queueing discipline, for kernels without tcx.
//!
//! Unlike links, filters outlive the process. So ours say who made them: their name is `porttrace:<token>`, with `:q` behind
//! it where porttrace also made the queueing discipline, and a probe that lives holds the abstract Unix socket of its token
//! in the same network namespace. A filter whose token nobody holds was left behind and is removed at the next start.

use crate::collect::netlink::socket::{Connection, NetlinkError};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;

const CLSACT_HANDLE: u32 = 0xffff_0000;
const CLSACT_PARENT: u32 = 0xffff_fff1;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)` and `…EGRESS`.
const SIDES: [u32; 2] = [0xffff_fff2, 0xffff_fff3];
/// `ETH_P_ALL` in network order, as the lower half of `tcm_info`.
const ALL_PROTOCOLS: u32 = 0x0003u16.to_be() as u32;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const DIRECT_ACTION: u32 = 1;

const PREFIX: &str = "porttrace:";
const OWNS_QDISC: &str = ":q";

/// The filters that this process hangs on interfaces.
pub struct Clsact {
    netlink: Connection,
    token: String,
    /// Held as long as the filters are wanted.
    _alive: UnixListener,
    /// Interfaces with filters of ours, and whether porttrace made their queueing discipline.
    attached: BTreeMap<u32, bool>,
}

/// One BPF filter of an interface.
struct Filter {
    parent: u32,
    handle: u32,
    info: u32,
    name: String,
}

impl Clsact {
    /// Takes a token of its own.
    pub fn new() -> Result<Self, io::Error> {
        let mut number = std::process::id();
        let (token, alive) = loop {
            let token = format!("{number:08x}");
            match UnixListener::bind_addr(&address(&token)?) {
                Ok(alive) => break (token, alive),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => number = number.wrapping_add(0x0100_0000),
                Err(error) => return Err(error),
            }
        };
        let netlink = Connection::open(NETLINK_ROUTE).map_err(plain)?;
        Ok(Self { netlink, token, _alive: alive, attached: BTreeMap::new() })
    }

    /// Attaches both programs before all filters that are there: a filter that lets a packet go ends the list.
    pub fn attach(&mut self, index: u32, programs: [BorrowedFd<'_>; 2]) -> io::Result<()> {
        if self.has_qdisc(index)? || !self.attach_with_qdisc(index, programs)? {
            self.attach_to_present(index, programs)?;
        }
        Ok(())
    }

    /// Whether the interface has a clsact (or ingress) queueing discipline.
    fn has_qdisc(&mut self, index: u32) -> io::Result<bool> {
        match self.netlink.get(RTM_GETQDISC, &message(index, 0, CLSACT_PARENT, 0), |_, _| Some(())) {
            Ok(found) => Ok(found.is_some()),
            Err(NetlinkError::Refused(error)) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(plain(error)),
        }
    }

    /// Makes the queueing discipline and both filters at once: without a filter nobody could tell later whose it was, and a
    /// process may be killed at any moment. `false`: somebody else made it just now, and ours is not there.
    fn attach_with_qdisc(&mut self, index: u32, programs: [BorrowedFd<'_>; 2]) -> io::Result<bool> {
        let name = format!("{PREFIX}{}{OWNS_QDISC}", self.token);
        let [ingress, egress] = [0, 1].map(|side| filter(index, SIDES[side], 0, programs[side], &name));
        let made = NLM_F_CREATE | NLM_F_EXCL;
        let changes = [
            (RTM_NEWQDISC, made, &qdisc(index)[..]),
            (RTM_NEWTFILTER, made, &ingress),
            (RTM_NEWTFILTER, made, &egress),
        ];
        let [qdisc, ingress, egress] = self.netlink.change_together(changes).map_err(plain)?;
        match qdisc {
            Ok(()) => {}
            Err(NetlinkError::Refused(error)) if error.raw_os_error() == Some(libc::EEXIST) => {
                for filter in filters(&mut self.netlink, index)?.iter().filter(|filter| filter.name == name) {
                    remove_filter(&mut self.netlink, index, filter)?;
                }
                return Ok(false);
            }
            Err(error) => return Err(plain(error)),
        }
        self.attached.insert(index, true);
        ingress.and(egress).map_err(plain)?;
        Ok(true)
    }

    fn attach_to_present(&mut self, index: u32, programs: [BorrowedFd<'_>; 2]) -> io::Result<()> {
        let present = filters(&mut self.netlink, index)?;
        // Another porttrace made it: whichever leaves last takes it away.
        let owns = present.iter().any(|filter| owner(&filter.name).is_some_and(|(_, owns)| owns));
        self.attached.insert(index, owns);
        let name = format!("{PREFIX}{}{}", self.token, if owns { OWNS_QDISC } else { "" });
        for (parent, program) in SIDES.into_iter().zip(programs) {
            let request = filter(index, parent, before_all(&present, parent), program, &name);
            self.netlink.change(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, &request).map_err(plain)?;
        }
        Ok(())
    }

    /// Removes our filters, and the queueing discipline where it is porttrace's and nothing else uses it.
    pub fn detach(&mut self, index: u32) -> io::Result<()> {
        if self.attached.remove(&index).is_none() {
            return Ok(());
        }
        let token = self.token.clone();
        remove(&mut self.netlink, index, |found| found == token)
    }
}

impl Drop for Clsact {
    fn drop(&mut self) {
        for index in self.attached.keys().copied().collect::<Vec<_>>() {
            // The interface may be gone, and the filters with it.
            let _ = self.detach(index);
        }
    }
}

/// Removes what dead probes left on the interfaces of this namespace; returns on how many interfaces there was something.
pub fn sweep() -> io::Result<usize> {
    let mut netlink = Connection::open(NETLINK_ROUTE).map_err(plain)?;
    let mut dead = Dead::default();
    let mut swept = 0;
    for index in clsact_interfaces(&mut netlink)? {
        let tokens = tokens_on(&mut netlink, index)?;
        if !tokens.iter().any(|token| dead.is(token)) {
            continue;
        }
        let removed = remove(&mut netlink, index, |token| dead.is(token));
        // The interface may have gone meanwhile.
        if removed.is_err() && tokens_on(&mut netlink, index)?.iter().any(|token| dead.is(token)) {
            removed?;
        }
        swept += 1;
    }
    Ok(swept)
}

/// Which tokens nobody holds. One that is found so is held here until the sweep is over: asked again, its socket may just be
/// in a child that this process has forked and that did not execute anything yet, and nobody else takes it meanwhile.
#[derive(Default)]
struct Dead(BTreeMap<String, Option<UnixListener>>);

impl Dead {
    /// When in doubt a token is held: removing a living probe's filters would be worse.
    fn is(&mut self, token: &str) -> bool {
        let take = || address(token).and_then(|address| UnixListener::bind_addr(&address)).ok();
        self.0.entry(token.to_owned()).or_insert_with(take).is_some()
    }
}

/// Tokens in the names of porttrace's filters of an interface.
fn tokens_on(netlink: &mut Connection, index: u32) -> io::Result<Vec<String>> {
    Ok(filters(netlink, index)?.iter().filter_map(|filter| Some(owner(&filter.name)?.0.to_owned())).collect())
}

/// Filters that are not porttrace's, by interface index: on which side, and their names.
pub fn others() -> io::Result<Vec<(u32, &'static str, String)>> {
    let mut netlink = Connection::open(NETLINK_ROUTE).map_err(plain)?;
    let mut found = Vec::new();
    for index in clsact_interfaces(&mut netlink)? {
        for Filter { parent, name, .. } in filters(&mut netlink, index)? {
            if owner(&name).is_none() {
                found.push((index, if parent == SIDES[0] { "tc ingress" } else { "tc egress" }, name));
            }
        }
    }
    Ok(found)
}

/// Removes the filters of tokens that are ours; where the queueing discipline is porttrace's and has no others, all of it with
/// one message, so that it never stays without a filter that says whose it is.
fn remove(netlink: &mut Connection, index: u32, mut is_ours: impl FnMut(&str) -> bool) -> io::Result<()> {
    let present = filters(netlink, index)?;
    let mut is_owned = |filter: &&Filter| owner(&filter.name).is_some_and(|(token, _)| is_ours(token));
    let (owned, others): (Vec<_>, Vec<_>) = present.iter().partition(|filter| is_owned(filter));
    let owns_qdisc = owned.iter().any(|filter| owner(&filter.name).is_some_and(|(_, owns)| owns));
    if owns_qdisc && others.is_empty() {
        return netlink.change(RTM_DELQDISC, 0, &qdisc(index)).map_err(plain);
    }
    owned.iter().try_for_each(|filter| remove_filter(netlink, index, filter))
}

fn remove_filter(netlink: &mut Connection, index: u32, filter: &Filter) -> io::Result<()> {
    let mut request = message(index, filter.handle, filter.parent, filter.info);
    attribute(&mut request, TCA_KIND, b"bpf\0");
    netlink.change(RTM_DELTFILTER, 0, &request).map_err(plain)
}

/// Interfaces with a clsact queueing discipline.
fn clsact_interfaces(netlink: &mut Connection) -> io::Result<Vec<u32>> {
    let take = |kind: u16, payload: &[u8]| {
        let name = find(payload.get(20..)?, TCA_KIND)?;
        (kind == RTM_NEWQDISC && name == b"clsact\0").then(|| word(payload, 4)).flatten()
    };
    netlink.dump(RTM_GETQDISC, &message(0, 0, 0, 0), take).map_err(plain)
}

/// All filters on both sides of an interface; those of other kinds than bpf have an empty name.
fn filters(netlink: &mut Connection, index: u32) -> io::Result<Vec<Filter>> {
    let mut all = Vec::new();
    for parent in SIDES {
        let take = |kind: u16, payload: &[u8]| {
            // A dump also lists the priority itself, with handle 0 and without options.
            let handle = word(payload, 8).filter(|handle| kind == RTM_NEWTFILTER && *handle != 0)?;
            let name = find(payload.get(20..)?, TCA_OPTIONS).and_then(|options| find(options, TCA_BPF_NAME));
            let name = String::from_utf8_lossy(name.unwrap_or_default()).trim_end_matches('\0').to_owned();
            Some(Filter { parent, handle, info: word(payload, 16)?, name })
        };
        all.extend(netlink.dump(RTM_GETTFILTER, &message(index, 0, parent, 0), take).map_err(plain)?);
    }
    Ok(all)
}

/// A priority (`pref`) before that of all filters of a side; 0 lets the kernel choose. At 1 ours shares the priority, and
/// `cls_bpf` puts a new filter first.
fn before_all(present: &[Filter], parent: u32) -> u32 {
    let first = present.iter().filter(|filter| filter.parent == parent).map(|filter| filter.info >> 16).min();
    first.map_or(0, |first| first.saturating_sub(1).max(1))
}

/// The token in a filter's name, and whether porttrace made the queueing discipline.
fn owner(name: &str) -> Option<(&str, bool)> {
    let rest = name.strip_prefix(PREFIX)?;
    Some(rest.strip_suffix(OWNS_QDISC).map_or((rest, false), |token| (token, true)))
}

/// Abstract sockets belong to the network namespace and vanish with their process.
fn address(token: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("{PREFIX}{token}"))
}

/// `struct tcmsg`.
fn message(index: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    for value in [index, handle, parent, info] {
        bytes.extend(value.to_ne_bytes());
    }
    bytes
}

fn qdisc(index: u32) -> Vec<u8> {
    let mut request = message(index, CLSACT_HANDLE, CLSACT_PARENT, 0);
    attribute(&mut request, TCA_KIND, b"clsact\0");
    request
}

/// A direct-action filter at priority `pref` (0: the kernel chooses).
fn filter(index: u32, parent: u32, pref: u32, program: BorrowedFd<'_>, name: &str) -> Vec<u8> {
    let mut request = message(index, 0, parent, pref << 16 | ALL_PROTOCOLS);
    attribute(&mut request, TCA_KIND, b"bpf\0");
    let mut options = Vec::new();
    attribute(&mut options, TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes());
    attribute(&mut options, TCA_BPF_NAME, &[name.as_bytes(), b"\0"].concat());
    attribute(&mut options, TCA_BPF_FLAGS, &DIRECT_ACTION.to_ne_bytes());
    attribute(&mut request, TCA_OPTIONS, &options);
    request
}

fn attribute(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = (4 + value.len()) as u16;
    to.extend(length.to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while attributes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([attributes[0], attributes[1]]));
        let kind = u16::from_ne_bytes([attributes[2], attributes[3]]) & 0x3fff;
        let value = attributes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn plain(error: NetlinkError) -> io::Error {
    match error {
        NetlinkError::Io(error) | NetlinkError::Refused(error) => error,
        other => io::Error::other(other),
    }
}
