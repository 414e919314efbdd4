//! The state of a node: everything that decides where a packet goes. It can come live or from a snapshot; nothing that reads
//! it knows the difference. A part that could not be had is `None` (not empty), so that the simulator can say what that costs.

use super::flow::{Direction, Family, Proto, Tuple};
use super::rules::{Ruleset, Table};
use super::trace::{Flavour, Hook, RouteKind};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// One node (one network namespace) at one moment.
#[derive(Clone, Debug, Default)]
pub struct NodeState {
    /// The node's name, where known.
    pub name: Option<String>,
    /// iptables rules, at most one set per flavour and family, in no particular order.
    pub rulesets: Vec<Arc<Ruleset>>,
    pub links: Option<Vec<Link>>,
    pub addresses: Option<Vec<Address>>,
    /// All tables, both families, in the order in which the kernel lists them.
    pub routes: Option<Vec<RouteEntry>>,
    /// Policy routing rules, sorted by family, then priority.
    pub policy: Option<Vec<PolicyRule>>,
    /// `net.…` keys with dots, values as the kernel prints them.
    pub sysctls: Option<BTreeMap<String, String>>,
    pub conntrack: Option<Vec<ConntrackEntry>>,
    /// ipsets by name.
    pub sets: Option<BTreeMap<String, IpSet>>,
    /// `xt_recent` lists by name: the addresses in them, with the seconds since each was last seen (newest first).
    pub recent: Option<BTreeMap<String, Vec<RecentEntry>>>,
    /// Listening (TCP, SCTP) and bound (UDP) sockets of the node itself.
    pub sockets: Option<Vec<Socket>>,
    pub neighbours: Option<Vec<Neighbour>>,
    /// What IPVS takes for itself; empty where the kernel has no IPVS.
    pub ipvs: Option<Vec<VirtualServer>>,
    /// Whether anybody looked for native nftables rules.
    pub knows_native: bool,
    /// Where they have a say.
    pub native: Vec<NativeBase>,
    /// What they say, as far as it could be read: a ruleset for each family.
    pub native_rules: Vec<Arc<Ruleset>>,
    /// What packets put into sets of nftables is not read again when it changes: it is not known.
    pub sets_move: bool,
    /// Packets that the kernel dropped, by its own counts.
    pub drops: DropCounts,
    /// What could not be read or understood, each a sentence with its place.
    pub diagnostics: Vec<Diagnostic>,
}

impl NodeState {
    /// The virtual servers of IPVS with this port, in a row; `None` where there are none, or they are not known.
    pub fn virtual_servers(&self, port: u16) -> Option<String> {
        const MOST: usize = 3;
        let of_port =
            |server: &&VirtualServer| matches!(server.address, VirtualAddress::Endpoint { port: of, .. } if of == port);
        let mut found: Vec<String> =
            self.ipvs.iter().flatten().filter(of_port).map(|server| server.address.to_string()).collect();
        found.sort_unstable();
        let more = found.len().saturating_sub(MOST);
        found.truncate(MOST);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!found.is_empty()).then(|| format!("{}{more}", found.join(", ")))
    }

    /// All rules that could be read, those of iptables first.
    pub fn all_rules(&self) -> impl Iterator<Item = &Arc<Ruleset>> {
        self.rulesets.iter().chain(&self.native_rules)
    }

    /// How many rules there are of each flavour. A table of family inet, which is in the rulesets of both families, counts once.
    pub fn rule_counts(&self) -> BTreeMap<Flavour, usize> {
        let mut counts = BTreeMap::new();
        for ruleset in self.all_rules() {
            let is_counted = |table: &&Table| ruleset.family == Family::V6 && table.name.starts_with("inet ");
            let tables = ruleset.tables.iter().filter(|table| !is_counted(table));
            let rules: usize = tables.flat_map(|table| &table.chains).map(|chain| chain.rules.len()).sum();
            if rules > 0 {
                *counts.entry(ruleset.flavour).or_default() += rules;
            }
        }
        counts
    }

    /// Base chains of native rules that could not be read.
    pub fn unfollowed(&self) -> impl Iterator<Item = &NativeBase> {
        let is_read = |base: &&NativeBase| {
            let table = base.table();
            self.native_rules.iter().flat_map(|set| &set.tables).any(|read| *read.name == *table)
        };
        self.native.iter().filter(move |base| !is_read(base))
    }

    /// The tables of native nftables rules that may send connections elsewhere and could not be read, in a row; `None` where there
    /// are none.
    pub fn native_dnat(&self) -> Option<String> {
        let tables: BTreeSet<String> = self.unfollowed().filter(|base| base.is_dnat()).map(NativeBase::table).collect();
        (!tables.is_empty()).then(|| tables.into_iter().collect::<Vec<_>>().join(", "))
    }
}

/// A base chain of native nftables rules, in a table of IPv4, IPv6 or both.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NativeBase {
    /// `ip`, `ip6`, `inet`.
    pub family: String,
    pub table: String,
    pub chain: String,
    /// `filter`, `nat`, `route`.
    pub kind: String,
    pub hook: Hook,
    pub priority: i32,
    /// Rules of its table send connections elsewhere (`dnat`, `redirect`), as far as is known.
    pub has_dnat: bool,
}

impl NativeBase {
    /// Whether packets of the family meet it.
    pub fn meets(&self, family: Family) -> bool {
        match self.family.as_str() {
            "ip" => family == Family::V4,
            "ip6" => family == Family::V6,
            _ => true,
        }
    }

    /// Whether it may send connections elsewhere.
    pub fn is_dnat(&self) -> bool {
        self.is_nat_of_destinations() && self.has_dnat
    }

    /// Whether that is what it is for.
    pub fn is_nat_of_destinations(&self) -> bool {
        self.kind == "nat" && matches!(self.hook, Hook::Prerouting | Hook::Output)
    }

    /// Whether it may give connections another source.
    pub fn is_snat(&self) -> bool {
        self.kind == "nat" && !self.is_nat_of_destinations()
    }

    /// `ip kube-proxy`.
    pub fn table(&self) -> String {
        format!("{} {}", self.family, self.table)
    }
}

/// Packets of all ports that were dropped in this network namespace since it was made; `None`: not counted, or not told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DropCounts {
    /// Conntrack could make no entry as its table is full, or another packet made the same one at that moment.
    pub conntrack: Option<u64>,
    /// `rp_filter`.
    pub reverse_path: Option<u64>,
    /// New TCP connections, as a process did not accept those before.
    pub listen_queue: Option<u64>,
}

/// Something in the input that porttrace could not use, and where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Diagnostic {
    /// File or command that it comes from.
    pub source: String,
    /// 1-based line, 0 when the source has no lines.
    pub line: usize,
    pub message: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// `veth`, `bridge`, `vxlan`, `loopback`, `dummy`, …; empty for a plain device.
    pub kind: String,
    pub up: bool,
    pub mtu: u32,
    /// Name of the bridge (or bond) that it is a port of.
    pub master: Option<String>,
    /// The peer's index, where the kernel gives it (`IFLA_LINK`), and the peer's netns id (`IFLA_LINK_NETNSID`).
    pub peer_index: Option<u32>,
    pub peer_netns: Option<i32>,
    pub loopback: bool,
    /// Hairpin mode of a bridge port; `None` where unknown or not a port.
    pub hairpin: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub interface: String,
    pub address: IpAddr,
    pub prefix: u8,
    /// `global`, `link`, `host`, …
    pub scope: String,
    pub secondary: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteEntry {
    pub kind: RouteKind,
    pub dst: IpNet,
    /// `main`, `local`, or a number in decimal.
    pub table: String,
    pub nexthops: Vec<NextHop>,
    pub prefsrc: Option<IpAddr>,
    pub metric: u32,
    /// Only for packets with this TOS; 0: for all. IPv4.
    pub tos: u8,
    /// Only for packets from here (source-specific routing). IPv6.
    pub src: Option<IpNet>,
    /// `link`, `host`, `global`.
    pub scope: String,
    pub mtu: Option<u32>,
}

/// One way out; several in one route share the load by weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    pub interface: Option<String>,
    pub gateway: Option<IpAddr>,
    pub weight: u32,
    /// `RTNH_F_DEAD`: its device is down, and the kernel skips it. (One without carrier it still uses.)
    pub dead: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRule {
    pub family: Family,
    pub priority: u32,
    pub not: bool,
    pub src: Option<IpNet>,
    pub dst: Option<IpNet>,
    pub input: Option<String>,
    pub output: Option<String>,
    /// Value and mask.
    pub fwmark: Option<(u32, u32)>,
    pub tos: Option<u8>,
    pub proto: Option<Proto>,
    pub sport: Option<(u16, u16)>,
    pub dport: Option<(u16, u16)>,
    pub action: PolicyAction,
    /// `suppress_prefixlength`.
    pub suppress_prefix: Option<u8>,
    /// Selectors that the model does not know, as text; the rule's match is then unknown.
    pub unknown: Vec<String>,
}

impl PolicyRule {
    /// A rule that selects every packet.
    pub const fn for_all(family: Family, priority: u32, action: PolicyAction) -> Self {
        Self {
            family,
            priority,
            not: false,
            src: None,
            dst: None,
            input: None,
            output: None,
            fwmark: None,
            tos: None,
            proto: None,
            sport: None,
            dport: None,
            action,
            suppress_prefix: None,
            unknown: Vec::new(),
        }
    }

    /// The rules that every network namespace begins with (net/ipv4/fib_rules.c `fib_default_rules_init`, net/ipv6/fib6_rules.c
    /// `fib6_rules_net_init`).
    pub fn defaults(family: Family) -> Vec<Self> {
        let rule = |priority, table: &str| Self::for_all(family, priority, PolicyAction::Table(table.to_owned()));
        let mut rules = vec![rule(0, "local"), rule(32766, "main")];
        if family == Family::V4 {
            rules.push(rule(32767, "default"));
        }
        rules
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyAction {
    Table(String),
    Unreachable,
    Prohibit,
    Blackhole,
    Goto(u32),
    Nop,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConntrackEntry {
    pub original: Tuple,
    pub reply: Tuple,
    /// `ESTABLISHED`, `TIME_WAIT`, …; empty for UDP.
    pub state: String,
    pub assured: bool,
    /// No packet was seen in the reply direction yet.
    pub unreplied: bool,
    pub mark: u32,
    /// Seconds until it expires.
    pub timeout: Option<u64>,
    pub zone: u16,
}

impl ConntrackEntry {
    /// One of which no more than its tuples is known; it was answered.
    pub const fn of(original: Tuple, reply: Tuple) -> Self {
        Self {
            original,
            reply,
            state: String::new(),
            assured: false,
            unreplied: false,
            mark: 0,
            timeout: None,
            zone: 0,
        }
    }

    /// Which way a packet with this tuple travels; `None`: it is not of this entry.
    pub fn direction_of(&self, tuple: &Tuple) -> Option<Direction> {
        if *tuple == self.original {
            Some(Direction::Original)
        } else {
            (*tuple == self.reply).then_some(Direction::Reply)
        }
    }
}

/// An ipset. A member is its element as `ipset save` writes it, followed by ` nomatch` where it is an exception and by
/// ` wildcard` where its interface stands for all that begin so; timeouts, counters and comments are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IpSet {
    /// `hash:ip,port`, …
    pub kind: String,
    pub family: Option<Family>,
    /// The rest of its `create` line (`netmask 24 …`).
    pub options: String,
    pub members: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecentEntry {
    pub address: IpAddr,
    /// Seconds since last seen; `None` when only the kernel's jiffies are known.
    pub age: Option<u64>,
    /// How many hits the list remembers for it.
    pub hits: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Socket {
    pub proto: Proto,
    pub address: IpAddr,
    pub port: u16,
    /// An IPv6 wildcard socket that takes no IPv4 (`IPV6_V6ONLY`).
    pub v6only: bool,
    /// `name/pid`, where known.
    pub process: Option<String>,
}

/// A virtual server of IPVS: packets to it go to one of its real servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualServer {
    pub address: VirtualAddress,
    /// `rr`, `wlc`, …
    pub scheduler: String,
    pub real_servers: usize,
}

/// What makes a packet one for a virtual server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VirtualAddress {
    /// Port 0: every port.
    Endpoint { proto: Proto, address: IpAddr, port: u16 },
    /// The packet's mark.
    Mark(u32),
}

impl fmt::Display for VirtualAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endpoint { proto, address, port } => write!(f, "{proto} {}", SocketAddr::new(*address, *port)),
            Self::Mark(mark) => write!(f, "mark {mark:#x}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub address: IpAddr,
    pub interface: String,
    /// `REACHABLE`, `STALE`, `FAILED`, `PERMANENT`, …
    pub state: String,
    /// Its Ethernet address, where known.
    pub mac: Option<[u8; 6]>,
}
