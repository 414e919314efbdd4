//! From what was asked to a packet that can be: its tuple, and how it enters the node.

use super::pod;
use porttrace_user::core::model::facts::Facts;
use porttrace_user::core::model::flow::{Family, Proto, Tuple};
use porttrace_user::core::model::state::NodeState;
use porttrace_user::core::model::trace::{Packet, RouteKind, Sender};
use porttrace_user::core::parse::words;
use std::net::{IpAddr, SocketAddr};

/// A client's port where none is asked for.
const SOURCE_PORT: u16 = 40_000;

/// Who sends the packet, and by which door it comes.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Packet")]
pub struct Origin {
    /// Who sends it: ADDRESS, or ADDRESS:PORT
    #[arg(long, value_name = "ADDRESS")]
    from: Option<String>,

    /// The client's port [default: 40000]
    #[arg(long, value_name = "PORT")]
    sport: Option<u16>,

    /// tcp, udp, sctp, icmp, or a number
    #[arg(long, default_value = "tcp", value_parser = protocol)]
    proto: Proto,

    /// It arrives by this interface
    #[arg(long = "in", value_name = "INTERFACE", group = "door")]
    input: Option<String>,

    /// A process of this node sends it
    #[arg(long, group = "door")]
    local: bool,

    /// A pod of this node sends it: its address, or NAMESPACE/NAME or NAME as the container runtime, the Kubernetes API or the snapshot has it
    #[arg(long, value_name = "POD", group = "door")]
    pod: Option<String>,

    /// Its packet mark, as 0x4000 or 16384
    #[arg(long, value_name = "MARK", default_value = "0", value_parser = number, hide_default_value = true)]
    mark: u32,

    /// Source MAC address of its frame, as 02:00:00:00:00:01, for rules that ask (-m mac)
    #[arg(long, value_name = "MAC", value_parser = mac_address)]
    mac: Option<[u8; 6]>,

    /// User ID of the process that sends it, for rules that ask (-m owner)
    #[arg(long, value_name = "UID")]
    uid: Option<u32>,

    /// Group ID of the process that sends it
    #[arg(long, value_name = "GID")]
    gid: Option<u32>,
}

impl Origin {
    /// The packet, and the assumption by which it enters, if there was a choice.
    ///
    /// # Errors
    /// One sentence on what is impossible or missing.
    pub fn packet(
        &self,
        destination: &str,
        state: &NodeState,
        facts: &Facts,
    ) -> Result<(Packet, Option<String>), String> {
        let (dst, dport) = endpoint(destination, "destination")?;
        let (from, fport) = match &self.from {
            Some(from) => endpoint(from, "--from").map(|(address, port)| (Some(address), port))?,
            None => (None, None),
        };
        let pod = self.pod.as_deref().map(|pod| pod::address(pod, Family::of(dst), facts)).transpose()?;
        let src = match (from, pod) {
            (Some(from), Some(pod)) if from != pod => {
                return Err(format!("--from {from} is not the address of the pod ({pod}): leave one of them out"));
            }
            (Some(from), _) => from,
            (None, Some(pod)) => pod,
            (None, None) if self.local => own_address(dst, state)?,
            (None, None) => return Err("say who sends the packet: --from ADDRESS, --local or --pod ADDRESS".to_owned()),
        };
        let sport = match (self.sport, fport) {
            (Some(sport), Some(fport)) if sport != fport => {
                return Err(format!("--sport {sport} and --from …:{fport} disagree"));
            }
            (sport, fport) => sport.or(fport),
        };
        let tuple = self.tuple(src, sport, dst, dport)?;
        let (input, assumption) = self.door(&tuple, state)?;
        check(&tuple, input.as_deref(), state)?;
        let mut packet = Packet::first_of(tuple, input.map(Into::into));
        packet.mark = self.mark;
        packet.sender = sender(self.mac, self.uid, self.gid, &packet)?;
        Ok((packet, assumption))
    }

    /// A pod is given by its name.
    pub fn names_a_pod(&self) -> bool {
        self.pod.as_ref().is_some_and(|pod| pod.parse::<IpAddr>().is_err())
    }

    fn tuple(&self, src: IpAddr, sport: Option<u16>, dst: IpAddr, dport: Option<u16>) -> Result<Tuple, String> {
        let proto = match (self.proto, dst) {
            (Proto::Icmp, IpAddr::V6(_)) => Proto::Icmpv6,
            (proto, _) => proto,
        };
        let (sport, dport) = match (proto.has_ports(), dport) {
            (true, Some(dport)) => (sport.unwrap_or(SOURCE_PORT), dport),
            (true, None) => return Err(format!("the destination needs a port: {}", SocketAddr::new(dst, 80))),
            (false, None) if sport.is_none() => (0, 0),
            (false, _) => return Err(format!("{proto} has no ports: leave them out")),
        };
        Ok(Tuple { proto, src, sport, dst, dport })
    }

    /// By which interface the packet arrives (`None`: this node sends it), and in what sentence that was assumed.
    fn door(&self, tuple: &Tuple, state: &NodeState) -> Result<(Option<String>, Option<String>), String> {
        if self.local {
            return Ok((None, None));
        }
        if let Some(input) = &self.input {
            return Ok((Some(input.clone()), None));
        }
        if self.pod.is_some() {
            return pod_interface(tuple.src, state).map(|interface| (Some(interface), None));
        }
        let src = tuple.src;
        if is_own(src, state) == Some(true) {
            return Ok((
                None,
                Some(format!("sent by this node: {src} is its own address (--in INTERFACE says otherwise)")),
            ));
        }
        if state.routes.is_none() {
            let interface = uplink(state);
            let why = "routes are not known, so neither is the interface by which it arrives";
            let assumption = format!("{why}: taken as {interface} (--in says which)");
            return Ok((Some(interface), Some(assumption)));
        }
        match route(src, state) {
            Some(Way { interface: Some(interface), .. }) => {
                let assumption =
                    format!("arrives by {interface}, where the route back to {src} points (--in says otherwise)");
                Ok((Some(interface), Some(assumption)))
            }
            _ => Err(format!("this node has no route back to {src}: say by which interface the packet arrives (--in)")),
        }
    }
}

/// What no packet can be, in one sentence.
///
/// # Errors
/// The sentence.
pub fn check(tuple: &Tuple, input: Option<&str>, state: &NodeState) -> Result<(), String> {
    let Tuple { proto, src, dst, .. } = *tuple;
    if Family::of(src) != Family::of(dst) {
        return Err(format!("{src} and {dst} are not of the same family: a packet is either IPv4 or IPv6"));
    }
    if matches!((proto, Family::of(dst)), (Proto::Icmp, Family::V6) | (Proto::Icmpv6, Family::V4)) {
        return Err(format!("{proto} does not go with {dst}"));
    }
    if proto.has_ports() && (tuple.sport == 0 || tuple.dport == 0) {
        return Err("port 0 is no port: ports go from 1 to 65535".to_owned());
    }
    if dst.is_unspecified() || src.is_unspecified() {
        return Err(format!("{} is no address of a host", if dst.is_unspecified() { dst } else { src }));
    }
    match input {
        Some(interface) => arrives(src, interface, state),
        None if is_own(src, state) == Some(false) => Err(format!(
            "{src} is no address of this node, so that it cannot be the sender: say how the packet arrives (--in INTERFACE)"
        )),
        None => Ok(()),
    }
}

fn arrives(src: IpAddr, interface: &str, state: &NodeState) -> Result<(), String> {
    if let Some(links) = &state.links
        && links.iter().all(|link| link.name != interface)
    {
        let names: Vec<&str> = links.iter().map(|link| link.name.as_str()).take(12).collect();
        let more = if links.len() > names.len() { ", …" } else { "" };
        return Err(format!("{interface} is no interface of this node; it has {}{more}", names.join(", ")));
    }
    let loopback =
        state.links.iter().flatten().any(|link| link.name == interface && link.loopback) || interface == "lo";
    if is_own(src, state) == Some(true) && !loopback {
        return Err(format!(
            "{src} is an address of this node, so that its packets do not arrive by {interface}: give another source, or --local"
        ));
    }
    Ok(())
}

/// Whether an address is the node's own; `None` when its addresses are not known.
fn is_own(address: IpAddr, state: &NodeState) -> Option<bool> {
    if address.is_loopback() {
        return Some(true);
    }
    let own = state.addresses.as_ref()?;
    Some(own.iter().any(|own| own.address == address))
}

struct Way {
    interface: Option<String>,
    gateway: Option<IpAddr>,
    prefsrc: Option<IpAddr>,
}

/// The route to an address by the longest prefix in the tables local and main: enough to guess a door; policy rules are for
/// the simulator.
fn route(address: IpAddr, state: &NodeState) -> Option<Way> {
    let routes = state.routes.iter().flatten();
    let usable = routes.filter(|route| matches!(route.table.as_str(), "main" | "local" | "254" | "255"));
    let matching = usable.filter(|route| route.dst.contains(&address) && route.kind != RouteKind::Broadcast);
    let best = matching
        .min_by_key(|route| (std::cmp::Reverse(route.dst.prefix_len()), route.table != "local", route.metric))?;
    let hop = best.nexthops.iter().find(|hop| !hop.dead)?;
    Some(Way { interface: hop.interface.clone(), gateway: hop.gateway, prefsrc: best.prefsrc })
}

/// The source that the node itself would use towards `dst`.
fn own_address(dst: IpAddr, state: &NodeState) -> Result<IpAddr, String> {
    if is_own(dst, state) == Some(true) {
        return Ok(dst);
    }
    let unknown = || format!("this node's source towards {dst} cannot be told from the state: give it with --from");
    let way = route(dst, state).ok_or_else(unknown)?;
    if let Some(prefsrc) = way.prefsrc {
        return Ok(prefsrc);
    }
    let addresses = state.addresses.iter().flatten();
    let candidates = addresses.filter(|own| Some(&own.interface) == way.interface.as_ref() && own.scope == "global");
    let mut usable = candidates.filter(|own| Family::of(own.address) == Family::of(dst) && !own.secondary);
    usable.next().map(|own| own.address).ok_or_else(unknown)
}

/// The interface behind which a pod of this node is.
fn pod_interface(pod: IpAddr, state: &NodeState) -> Result<String, String> {
    if state.routes.is_none() {
        return Err(
            "the state has no routes, so that the pod's interface cannot be found: give it with --in".to_owned()
        );
    }
    match route(pod, state) {
        Some(Way { interface: Some(interface), gateway: None, .. }) if is_own(pod, state) != Some(true) => {
            Ok(interface)
        }
        Some(Way { gateway: Some(gateway), interface, .. }) => Err(format!(
            "{pod} is no pod of this node: its route leads to {gateway}{}",
            interface.map_or_else(String::new, |interface| format!(" by {interface}"))
        )),
        Some(_) if is_own(pod, state) == Some(true) => {
            Err(format!("{pod} is an address of this node itself (host network): use --local --from {pod}"))
        }
        _ => Err(format!("this node has no route to the pod {pod}")),
    }
}

/// The interface that a packet from outside arrives by, as far as links tell.
fn uplink(state: &NodeState) -> String {
    let mut links = state.links.iter().flatten().filter(|link| !link.loopback && link.master.is_none());
    links.find(|link| link.kind.is_empty()).map_or_else(|| "eth0".to_owned(), |link| link.name.clone())
}

/// `ADDRESS`, `ADDRESS:PORT`, `[IPV6]:PORT`.
fn endpoint(text: &str, what: &str) -> Result<(IpAddr, Option<u16>), String> {
    if let Ok(address) = text.trim_start_matches('[').trim_end_matches(']').parse() {
        return Ok((address, None));
    }
    if let Ok(endpoint) = text.parse::<SocketAddr>() {
        return Ok((endpoint.ip(), Some(endpoint.port())));
    }
    let port = text.rsplit_once(':').map(|(_, port)| port);
    match port {
        Some(port) if port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_err() => {
            Err(format!("{what} {text:?}: {port:?} is no port, ports go from 1 to 65535"))
        }
        _ => {
            Err(format!("{what} {text:?} is no ADDRESS:PORT (names are not resolved; IPv6 is written [address]:port)"))
        }
    }
}

/// What is said of the sender, where it can be.
///
/// # Errors
/// One sentence on what such a packet has not.
pub fn sender(mac: Option<[u8; 6]>, uid: Option<u32>, gid: Option<u32>, packet: &Packet) -> Result<Sender, String> {
    match &packet.input {
        None if mac.is_some() => {
            Err("a packet that this node sends comes in no frame: leave the MAC address out".to_owned())
        }
        Some(input) if uid.or(gid).is_some() => Err(format!(
            "a packet that arrives by {input} has no user or group on this node: only packets that it sends itself have"
        )),
        _ => Ok(Sender { mac, uid, gid }),
    }
}

fn mac_address(text: &str) -> Result<[u8; 6], String> {
    words::mac(text).ok_or_else(|| "a MAC address is six bytes in hexadecimal: 02:00:00:00:00:01".to_owned())
}

fn protocol(text: &str) -> Result<Proto, String> {
    let lower = text.to_ascii_lowercase();
    Proto::from_name(&lower).ok_or_else(|| "say tcp, udp, sctp, icmp, or a protocol number".to_owned())
}

fn number(text: &str) -> Result<u32, String> {
    let number = text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| u32::from_str_radix(hex, 16).ok());
    number.ok_or_else(|| "a mark is a number of 32 bits: 0x4000 or 16384".to_owned())
}
