//! A node between a client and a pod: three namespaces, port 9088 rewritten to the pod's 8080, everything masqueraded.

use anyhow::{Context, Result, bail, ensure};
use porttrace_ebpf::Kind;
use porttrace_tests::netns::Netns;
use porttrace_tests::watch::backend;
use porttrace_user::collect::probe::{Probe, ProbeConfig};
use porttrace_user::core::model::event::Event;
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

pub const PORT: u16 = 9088;
pub const POD_PORT: u16 = 8080;
pub const DEADLINE: Duration = Duration::from_secs(10);

pub struct World {
    pub client: Netns,
    pub node: Netns,
    pub pod: Netns,
}

/// IPv4 or IPv6 addresses of the three.
pub struct Addresses {
    pub client: IpAddr,
    pub node: IpAddr,
    pub node_to_pod: IpAddr,
    pub pod: IpAddr,
}

pub fn v4() -> Addresses {
    Addresses { client: ip("10.50.1.2"), node: ip("10.50.1.1"), node_to_pod: ip("10.50.2.1"), pod: ip("10.50.2.2") }
}

pub fn v6() -> Addresses {
    Addresses { client: ip("fd50:1::2"), node: ip("fd50:1::1"), node_to_pod: ip("fd50:2::1"), pod: ip("fd50:2::2") }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

impl World {
    pub fn new(label: &str) -> Result<Self> {
        let world = Self {
            client: Netns::new(&format!("{label}-client"))?,
            node: Netns::new(&format!("{label}-node"))?,
            pod: Netns::new(&format!("{label}-pod"))?,
        };
        cable(&world.node, "eth0", 1, &world.client)?;
        cable(&world.node, "pod0", 2, &world.pod)?;
        world.node.exec(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])?;
        for (tool, own, target) in
            [("iptables", "10.50.1.1", "10.50.2.2:8080"), ("ip6tables", "fd50:1::1", "[fd50:2::2]:8080")]
        {
            for (chain, proto) in [("PREROUTING", "tcp"), ("PREROUTING", "udp"), ("OUTPUT", "tcp"), ("OUTPUT", "udp")] {
                let rule =
                    format!("-t nat -A {chain} -d {own} -p {proto} --dport 9088 -j DNAT --to-destination {target}");
                world.node.exec([tool].into_iter().chain(rule.split(' ')))?;
            }
            world.node.exec([tool].into_iter().chain("-t nat -A POSTROUTING -o pod0 -j MASQUERADE".split(' ')))?;
        }
        Ok(world)
    }

    /// Starts a probe in the node's namespace, lets `send` cause traffic, and reads until `enough` is content.
    pub fn watch<T: Send>(
        &self,
        config: &ProbeConfig,
        send: impl FnOnce() -> Result<T> + Send,
        enough: impl Fn(&[Event]) -> bool + Send,
    ) -> Result<(T, Vec<Event>)> {
        self.with_probe(config, async |probe| {
            let mut events = Vec::new();
            let sent = thread::scope(|scope| match scope.spawn(send).join() {
                Ok(sent) => sent,
                Err(panic) => std::panic::resume_unwind(panic),
            })?;
            read_until(probe, &mut events, enough).await?;
            Ok((sent, events))
        })
    }

    /// Runs `work` with a probe in the node's namespace, on a thread and a runtime of its own.
    pub fn with_probe<T: Send>(
        &self,
        config: &ProbeConfig,
        work: impl AsyncFnOnce(&mut Probe) -> Result<T> + Send,
    ) -> Result<T> {
        self.node.run_in(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let mut probe = Probe::start(config)?;
                println!("{:?}", probe.info());
                work(&mut probe).await
            })
        })?
    }

    /// Serves TCP and UDP on the pod's port: says hello, or echoes a datagram.
    pub fn serve(&self) -> Result<()> {
        let (listener, socket) = self.pod.run_in(|| -> Result<_> {
            Ok((TcpListener::bind(("::", POD_PORT))?, UdpSocket::bind(("::", POD_PORT))?))
        })??;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || answer(stream));
            }
        });
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                if socket.send_to(&buffer[..length], from).is_err() {
                    return;
                }
            }
        });
        Ok(())
    }
}

/// The probe's configuration for the world's port, with the backend that `PORTTRACE_BACKEND` names.
pub fn config() -> ProbeConfig {
    ProbeConfig { backend: backend(), ..ProbeConfig::new([PORT]) }
}

/// Final tuples of all entries, as the conntrack hooks reported them.
pub fn observed_entries(events: &[Event]) -> BTreeSet<(Tuple, Tuple)> {
    events
        .iter()
        .filter(|event| matches!(event.kind, Kind::AfterSnat | Kind::Confirmed))
        .filter_map(|event| event.conntrack)
        .map(|entry| (entry.original, entry.reply))
        .collect()
}

/// How many events of this kind show this packet.
pub fn seen(events: &[Event], kind: Kind, packet: Tuple, flags: u8) -> usize {
    events.iter().filter(|event| event.kind == kind && event.packet == Some(packet) && event.l4_flags == flags).count()
}

/// An error when there was an event so far, or one that was lost.
pub fn nothing_came(probe: &mut Probe) -> Result<()> {
    let mut events = Vec::new();
    probe.read_now(&mut events)?;
    let lost = probe.lost()?;
    ensure!(events.is_empty() && lost.total() == 0, "{lost:?} {:#?}", summary(&events));
    Ok(())
}

/// Reads events until `enough` says so; an error tells what was there when the deadline passed.
pub async fn read_until(probe: &mut Probe, events: &mut Vec<Event>, enough: impl Fn(&[Event]) -> bool) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    while !enough(events) {
        let left = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, probe.read(events)).await {
            Ok(outcome) => {
                outcome?;
            }
            Err(_) => bail!("not enough after {DEADLINE:?}: {:#?}", summary(events)),
        };
    }
    Ok(())
}

/// One line an event, for messages.
pub fn summary(events: &[Event]) -> Vec<String> {
    events
        .iter()
        .map(|event| {
            let packet = event.packet.map_or_else(String::new, |packet| format!("{} {packet}", packet.proto));
            let entry = event.conntrack.map_or_else(String::new, |ct| format!("[{} | {}]", ct.original, ct.reply));
            format!(
                "{:?} if {}/{} {packet} flags {:#x} reply {} reason {} {entry}",
                event.kind, event.ifindex, event.out_ifindex, event.l4_flags, event.is_reply, event.reason
            )
        })
        .collect()
}

/// One request and its answer over TCP; returns the client's own address.
pub fn request(from: &Netns, to: SocketAddr) -> Result<SocketAddr> {
    from.run_in(|| -> Result<SocketAddr> {
        let mut stream = TcpStream::connect_timeout(&to, DEADLINE)?;
        let own = stream.local_addr()?;
        stream.write_all(b"hello")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        anyhow::ensure!(answer == "hello", "the server answered {answer:?}");
        Ok(own)
    })?
}

/// One datagram and its echo; returns the client's own address.
pub fn datagram(from: &Netns, to: SocketAddr) -> Result<SocketAddr> {
    from.run_in(|| -> Result<SocketAddr> {
        let any: IpAddr = if to.is_ipv4() { ip("0.0.0.0") } else { ip("::") };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(DEADLINE))?;
        socket.send(b"ping")?;
        let mut buffer = [0; 16];
        let length = socket.recv(&mut buffer)?;
        anyhow::ensure!(&buffer[..length] == b"ping", "the server echoed {:?}", &buffer[..length]);
        Ok(socket.local_addr()?)
    })?
}

/// The original and reply tuples that `conntrack -L` lists for connections to `port`.
pub fn conntrack_entries(node: &Netns, family: &str, proto: Proto, port: u16) -> Result<BTreeSet<(Tuple, Tuple)>> {
    let listing = node.exec(["conntrack", "-L", "-f", family, "-p", &proto.to_string()])?;
    listing.lines().filter(|line| line.contains(&format!("dport={port} "))).map(|line| entry(line, proto)).collect()
}

fn entry(line: &str, proto: Proto) -> Result<(Tuple, Tuple)> {
    let fields: Vec<&str> =
        line.split_whitespace().filter_map(|word| word.split_once('=').map(|(_, value)| value)).collect();
    let tuple = |at: usize| -> Result<Tuple> {
        let field = |index: usize| fields.get(at + index).with_context(|| format!("in {line:?}"));
        Ok(Tuple {
            proto,
            src: field(0)?.parse()?,
            dst: field(1)?.parse()?,
            sport: field(2)?.parse()?,
            dport: field(3)?.parse()?,
        })
    };
    Ok((tuple(0)?, tuple(4)?))
}

fn answer(mut stream: TcpStream) {
    let mut text = String::new();
    if stream.read_to_string(&mut text).is_ok() {
        // A client that has gone away is its own matter.
        let _ = stream.write_all(text.as_bytes());
    }
}

/// A veth pair: `name` in `node` (addresses .1), `eth0` in `other` (addresses .2, default routes to .1).
fn cable(node: &Netns, name: &str, number: u8, other: &Netns) -> Result<()> {
    let peer = format!("eth0-{number}");
    node.exec(["ip", "link", "add", name, "type", "veth", "peer", "name", &peer, "netns", other.name()])?;
    other.exec(["ip", "link", "set", &peer, "name", "eth0"])?;
    for (netns, device, host) in [(node, name, 1), (other, "eth0", 2)] {
        netns.exec(["ip", "addr", "add", &format!("10.50.{number}.{host}/24"), "dev", device])?;
        netns.exec(["ip", "addr", "add", &format!("fd50:{number}::{host}/64"), "dev", device, "nodad"])?;
        netns.exec(["ip", "link", "set", device, "up"])?;
    }
    other.exec(["ip", "route", "add", "default", "via", &format!("10.50.{number}.1")])?;
    other.exec(["ip", "-6", "route", "add", "default", "via", &format!("fd50:{number}::1")])?;
    Ok(())
}
