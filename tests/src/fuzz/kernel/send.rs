//! Sends probes into a router and collects what became of each.

use super::legacy::LegacyReader;
use super::live::{Lists, recent_lists};
use super::path::{Arrival, Path, paths};
use super::router::{BRIDGE_MAC, FENCES, Router, mac};
use super::trace::{Numbers, Reader, Report};
use super::wire::{craft, headers, headers_of};
use crate::fuzz::scenario::Probe;
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage, bind, recvfrom, sendto,
    setsockopt, sockopt,
};
use nix::unistd::Pid;
use porttrace_user::core::model::flow::Proto;
use porttrace_user::core::model::trace::{Packet, Sender};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long a batch's end may take to come through.
const DEADLINE: Duration = Duration::from_secs(20);

/// What became of a batch.
pub struct Sent {
    pub paths: BTreeMap<u16, Path>,
    /// The lists of `-m recent` before a probe, where they changed since the one before.
    pub recent: BTreeMap<u16, Lists>,
}

/// What else is read of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Watched {
    /// Rules keep lists of addresses, which are read before each probe.
    pub remembers: bool,
    /// There are rules of iptables-legacy.
    pub legacy: bool,
}

/// Why a batch gave no result.
#[derive(Debug, PartialEq, Eq)]
pub struct TraceLost;

impl Router {
    /// Sends all probes in order; `Err(TraceLost)` inside when the kernel dropped trace messages.
    pub fn send(&self, probes: &[Probe], numbers: &Numbers, how: Watched) -> Result<Result<Sent, TraceLost>> {
        let wire = self.outside.run_in(Wire::open)??;
        self.inside.run_in(|| self.batch(&wire, probes, numbers, how))?
    }

    fn batch(&self, wire: &Wire, probes: &[Probe], numbers: &Numbers, how: Watched) -> Result<Result<Sent, TraceLost>> {
        stay_here()?;
        let mut reader = Reader::open()?;
        let mut legacy = how.legacy.then(LegacyReader::open).transpose()?;
        let (mut reports, mut steps) = (Vec::new(), Vec::new());
        let (mut refused, mut recent, mut last) = (BTreeMap::new(), BTreeMap::new(), Lists::new());
        for probe in probes {
            if how.remembers {
                if !self.settle(wire, &mut reader, &mut reports)? {
                    return Ok(Err(TraceLost));
                }
                let lists = recent_lists()?;
                if lists != last {
                    recent.insert(probe.id, lists.clone());
                    last = lists;
                }
            }
            match &probe.packet.input {
                Some(input) => self.inject(wire, probe, input)?,
                None => {
                    if let Err(errno) = send_local(probe) {
                        refused.insert(probe.id, format!("{errno:?}"));
                    }
                }
            }
            let read = legacy.as_mut().map_or(Ok(true), |legacy| legacy.drain(&mut steps))?;
            if !reader.drain(&mut reports)? || !read {
                return Ok(Err(TraceLost));
            }
        }
        if !self.settle(wire, &mut reader, &mut reports)? {
            return Ok(Err(TraceLost));
        }
        if !legacy.as_mut().map_or(Ok(true), |legacy| legacy.drain(&mut steps))? {
            return Ok(Err(TraceLost));
        }
        let mut paths = paths(&reports, numbers);
        for step in steps {
            paths.entry(step.id).or_default().legacy.push(step);
        }
        paths.retain(|id, _| probes.iter().any(|probe| probe.id == *id));
        for probe in probes {
            paths.entry(probe.id).or_default();
        }
        for (id, errno) in refused {
            paths.entry(id).or_default().refused_send = Some(errno);
        }
        wire.arrivals(self, &mut paths)?;
        Ok(Ok(Sent { paths, recent }))
    }

    fn inject(&self, wire: &Wire, probe: &Probe, link: &str) -> Result<()> {
        let peer = self.peer_of(link).with_context(|| format!("no neighbour behind {link}"))?;
        let index = self.number_of(link);
        let destination = match probe.packet.tuple.dst {
            IpAddr::V4(dst) if dst.octets()[2..] == [255, 255] => [0xff; 6],
            IpAddr::V4(dst) if dst.is_multicast() => {
                [1, 0, 0x5e, dst.octets()[1] & 0x7f, dst.octets()[2], dst.octets()[3]]
            }
            IpAddr::V6(dst) if dst.is_multicast() => {
                let [a, b, c, d] = *dst.octets().last_chunk::<4>().context("an address has four last bytes")?;
                [0x33, 0x33, a, b, c, d]
            }
            dst if self.port_of(link).is_some() => {
                // A host on the bridge sends to another one directly.
                let other = self.neighbours.get(&dst).filter(|mac| **mac != self.source(probe, link));
                other.copied().unwrap_or(BRIDGE_MAC)
            }
            _ => mac(index),
        };
        wire.transmit(peer, destination, self.source(probe, link), &craft(probe))
    }

    /// The probe with what its sender is: the frame's address, or the socket's owner.
    pub fn known(&self, probe: &Probe) -> Probe {
        let mut probe = probe.clone();
        probe.packet.sender = match &probe.packet.input {
            Some(link) => Sender { mac: Some(self.source(&probe, link)), ..Sender::default() },
            None => Sender { uid: Some(probe.uid), gid: Some(0), ..Sender::default() },
        };
        probe
    }

    fn source(&self, probe: &Probe, link: &str) -> [u8; 6] {
        match self.port_of(link) {
            Some(port) => [2, 0, 0, 0, 3, port],
            None => [2, 0, 0, 0, 1, probe.mac],
        }
    }

    /// Waits until everything sent so far has gone its way, also what came back by lo. `false`: trace messages were lost.
    fn settle(&self, wire: &Wire, reader: &mut Reader, reports: &mut Vec<Report>) -> Result<bool> {
        for fence in FENCES {
            if !self.fence(wire, reader, reports, fence)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Sends a packet that the watching table drops, and reads until its trace comes: per-CPU queues keep their order.
    fn fence(&self, wire: &Wire, reader: &mut Reader, reports: &mut Vec<Report>, id: u16) -> Result<bool> {
        let tuple = porttrace_user::core::model::flow::Tuple::new(
            Proto::Udp,
            SocketAddr::from(([192, 0, 2, 1], 1)),
            SocketAddr::from(([192, 0, 2, 2], 1)),
        );
        let (_, link) = self.peers.first_key_value().context("a router needs a link")?;
        let packet = Packet::first_of(tuple, Some(link.as_str().into()));
        let before = reports.len();
        self.inject(wire, &Probe { id, packet, uid: 0, mac: 1 }, link)?;
        let start = Instant::now();
        let mut looked = before;
        loop {
            if !reader.drain(reports)? {
                return Ok(false);
            }
            let is_fence =
                |report: &Report| headers(&report.network, &report.transport).is_some_and(|headers| headers.id == id);
            if reports[looked..].iter().any(is_fence) {
                return Ok(true);
            }
            looked = reports.len();
            if start.elapsed() > DEADLINE {
                bail!("the end of the batch did not show in the kernel's trace within {DEADLINE:?}");
            }
            std::thread::yield_now();
        }
    }
}

/// A packet socket on all of the neighbours' interfaces.
struct Wire(OwnedFd);

impl Wire {
    fn open() -> Result<Self> {
        let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
        // SAFETY: a plain system call; the descriptor is owned from here on.
        let fd = unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, protocol)
        };
        Errno::result(fd).context("opening a packet socket")?;
        // SAFETY: `fd` was just returned by `socket` and is owned by nothing else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        setsockopt(&fd, sockopt::RcvBufForce, &(64 << 20)).context("setting the packet socket's buffer")?;
        let on: libc::c_int = 1;
        // SAFETY: the option value is an int that lives during the call. 23 is PACKET_IGNORE_OUTGOING.
        let result = unsafe {
            libc::setsockopt(fd.as_raw_fd(), libc::SOL_PACKET, 23, (&raw const on).cast(), size_of_val(&on) as u32)
        };
        Errno::result(result).context("leaving out own packets")?;
        Ok(Self(fd))
    }

    fn transmit(&self, interface: u32, destination: [u8; 6], source: [u8; 6], packet: &[u8]) -> Result<()> {
        let kind: u16 = if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd };
        let mut frame = destination.to_vec();
        frame.extend(source);
        frame.extend(kind.to_be_bytes());
        frame.extend_from_slice(packet);
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = interface.cast_signed();
        // SAFETY: pointers and lengths describe `frame` and `address`, which live during the call.
        let sent = unsafe {
            libc::sendto(
                self.0.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            )
        };
        Errno::result(sent).context("sending a frame")?;
        Ok(())
    }

    /// Notes where probes came out of the router.
    fn arrivals(&self, router: &Router, paths: &mut BTreeMap<u16, Path>) -> Result<()> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            match recvfrom::<SockaddrStorage>(self.0.as_raw_fd(), &mut buffer) {
                Ok((length, from)) => {
                    let index = from.as_ref().and_then(|from| from.as_link_addr()).map(|link| link.ifindex());
                    let link = index.and_then(|index| router.peers.get(&(index as u32)));
                    let found = buffer[..length].get(14..).and_then(headers_of);
                    if let (Some(link), Some(headers)) = (link, found)
                        && let Some(path) = paths.get_mut(&headers.id)
                        && headers.refuses.is_none()
                    {
                        path.arrivals.push(Arrival { link: link.clone(), tuple: headers.tuple });
                    }
                }
                Err(Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error).context("reading the packet socket"),
            }
        }
    }
}

/// All of a batch passes through one CPU's queue, so that order is kept.
fn stay_here() -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(sched_getcpu().context("asking for the CPU")?)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).context("staying on one CPU")
}

/// Sends through a raw socket of the probe's owner, bound to its source, with its mark.
fn send_local(probe: &Probe) -> nix::Result<()> {
    // SAFETY: sets the calling thread's file system user only (the kernel records it as the socket's owner); cannot fail memory.
    unsafe { libc::setfsuid(probe.uid) };
    let result = raw_send(probe);
    // SAFETY: as above.
    unsafe { libc::setfsuid(0) };
    result
}

fn raw_send(probe: &Probe) -> nix::Result<()> {
    let tuple = probe.packet.tuple;
    let v4 = tuple.dst.is_ipv4();
    let family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    // SAFETY: a plain system call; the descriptor is owned from here on.
    let fd = unsafe { libc::socket(family as i32, SockType::Raw as i32 | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
    Errno::result(fd)?;
    // SAFETY: `fd` was just returned by `socket` and is owned by nothing else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    setsockopt(&fd, sockopt::Mark, &probe.packet.mark)?;
    setsockopt(&fd, sockopt::Broadcast, &true)?;
    // What the way out is looked up with; the header alone would come too late.
    if v4 {
        setsockopt(&fd, sockopt::Ipv4Tos, &probe.packet.tos.into())?;
    } else {
        setsockopt(&fd, sockopt::Ipv6TClass, &probe.packet.tos.into())?;
    }
    let packet = craft(probe);
    if v4 {
        setsockopt(&fd, sockopt::IpFreebind, &true)?;
    }
    let at = |address: IpAddr| -> Box<dyn SockaddrLike> {
        match SocketAddr::new(address, 0) {
            SocketAddr::V4(address) => Box::new(SockaddrIn::from(address)),
            SocketAddr::V6(address) => Box::new(SockaddrIn6::from(address)),
        }
    };
    bind(fd.as_raw_fd(), &*at(tuple.src))?;
    match SocketAddr::new(tuple.dst, 0) {
        SocketAddr::V4(to) => sendto(fd.as_raw_fd(), &packet, &SockaddrIn::from(to), MsgFlags::empty()),
        SocketAddr::V6(to) => sendto(fd.as_raw_fd(), &packet, &SockaddrIn6::from(to), MsgFlags::empty()),
    }
    .map(|_| ())
}
