//! Links, addresses, routes, policy rules and neighbours, through route netlink: no tool needs to be installed.

mod link;
mod route;
mod rule;
pub mod socket;

use crate::core::model::flow::Family;
use crate::core::model::state::{Address, Diagnostic, Link, Neighbour, PolicyRule, RouteEntry};
use crate::core::parse::notes::Notes;
use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use socket::{Connection, NetlinkError};
use std::collections::BTreeMap;

/// `RTEXT_FILTER_SKIP_STATS` (include/uapi/linux/rtnetlink.h): counters are not wanted.
const SKIP_STATS: u32 = 8;

/// What route netlink tells of the calling thread's network namespace; `None` is what it would not tell.
#[derive(Debug, Default, PartialEq)]
pub struct Network {
    pub links: Option<Vec<Link>>,
    pub addresses: Option<Vec<Address>>,
    /// IPv4, then IPv6.
    pub routes: Option<Vec<RouteEntry>>,
    /// IPv4, then IPv6, by priority.
    pub policy: Option<Vec<PolicyRule>>,
    pub neighbours: Option<Vec<Neighbour>>,
    pub diagnostics: Vec<Diagnostic>,
}

/// Interface names by index.
type Names = BTreeMap<u32, String>;

/// Reads everything. Never fails: what could not be had is `None`, with a diagnostic.
pub fn read() -> Network {
    let mut notes = Notes::new("netlink");
    let mut network = match Connection::open(netlink_sys::protocols::NETLINK_ROUTE) {
        Ok(connection) => read_all(&mut Reader { connection, notes: &mut notes }),
        Err(error) => {
            notes.add(0, format!("links, addresses and routes are unknown: {error}"));
            Network::default()
        }
    };
    network.diagnostics = notes.finish();
    network
}

/// Reads links and addresses alone; the rest stays `None`.
pub fn read_interfaces() -> Network {
    let mut notes = Notes::new("netlink");
    match Connection::open(netlink_sys::protocols::NETLINK_ROUTE) {
        Ok(connection) => interfaces(&mut Reader { connection, notes: &mut notes }).1,
        Err(_) => Network::default(),
    }
}

fn interfaces(reader: &mut Reader) -> (Names, Network) {
    let mut links = reader.list("links", links_request(), link::link);
    let names: Names = links.iter().flatten().map(|link| (link.index, link.name.clone())).collect();
    link::name_masters(links.as_deref_mut().unwrap_or_default(), &names);
    let mut addresses = reader.list("addresses", RouteNetlinkMessage::GetAddress(Default::default()), |message| {
        link::address(message, &names)
    });
    // The kernel lists family by family; `ip addr` shows link by link, and a link's own order decides what is primary.
    let order: BTreeMap<&String, u32> = names.iter().map(|(index, name)| (name, *index)).collect();
    addresses.iter_mut().for_each(|list| list.sort_by_key(|address| order.get(&address.interface).copied()));
    (names, Network { links, addresses, ..Network::default() })
}

fn read_all(reader: &mut Reader) -> Network {
    let (names, interfaces) = interfaces(reader);
    let neighbours = reader.list("neighbours", RouteNetlinkMessage::GetNeighbour(Default::default()), |message| {
        link::neighbour(message, &names)
    });
    let mut routes = None;
    let mut policy = None;
    // A kernel without IPv6 answers such a request with all that it has (net/core/rtnetlink.c, rtnl_dump_all).
    for (family, ours) in [(AddressFamily::Inet, Family::V4), (AddressFamily::Inet6, Family::V6)] {
        let found = reader.list("routes", routes_request(family), |message| {
            Ok(route::route(message, &names)?.filter(|route| Family::of(route.dst.addr()) == ours))
        });
        merge(&mut routes, found);
        let found = reader.list("policy rules", rules_request(family), |message| {
            Ok(rule::rule(message)?.filter(|rule| rule.family == ours))
        });
        merge(&mut policy, found);
    }
    Network { routes, policy, neighbours, ..interfaces }
}

fn merge<T>(all: &mut Option<Vec<T>>, found: Option<Vec<T>>) {
    if let Some(found) = found {
        all.get_or_insert_default().extend(found);
    }
}

/// What one message became: a value, nothing of interest, or a reason why it cannot be used.
type Taken<T> = Result<Option<T>, String>;

struct Reader<'a> {
    connection: Connection,
    notes: &'a mut Notes,
}

impl Reader<'_> {
    fn list<T>(
        &mut self,
        what: &str,
        request: RouteNetlinkMessage,
        take: impl Fn(RouteNetlinkMessage) -> Taken<T>,
    ) -> Option<Vec<T>> {
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        let answers = self.connection.dump(request.message_type(), &bytes, |kind, payload| {
            let mut header = NetlinkHeader::default();
            header.message_type = kind;
            let message = RouteNetlinkMessage::deserialize(&header, payload).map_err(|error| error.to_string());
            message.and_then(&take).transpose()
        });
        match answers {
            Ok(answers) => {
                let (good, bad): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
                for why in bad.into_iter().filter_map(Result::err) {
                    self.notes.add(0, format!("one of the {what} left out: {why}"));
                }
                Some(good.into_iter().filter_map(Result::ok).collect())
            }
            Err(error) if is_absent(&error) => Some(Vec::new()),
            Err(error) => {
                self.notes.add(0, format!("{what} are unknown: {error}"));
                None
            }
        }
    }
}

/// A kernel without IPv6 answers so: it has no such routes or rules, which is an answer.
fn is_absent(error: &NetlinkError) -> bool {
    let NetlinkError::Refused(error) = error else { return false };
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT))
}

fn links_request() -> RouteNetlinkMessage {
    use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::Other(SKIP_STATS)]));
    RouteNetlinkMessage::GetLink(message)
}

fn routes_request(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = netlink_packet_route::route::RouteMessage::default();
    message.header.address_family = family;
    RouteNetlinkMessage::GetRoute(message)
}

fn rules_request(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = netlink_packet_route::rule::RuleMessage::default();
    message.header.family = family;
    RouteNetlinkMessage::GetRule(message)
}
