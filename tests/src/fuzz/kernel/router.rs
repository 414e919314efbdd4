//! Builds a scenario's router in a network namespace, and its neighbours in another.

use super::path::WATCH;
use crate::fuzz::scenario::{Link, NativeTable, Node, Tables};
use crate::netlink::{NLM_F_ACK, NLM_F_CREATE, NetfilterSocket, Request};
use crate::netns::Netns;
use anyhow::{Context, Result};
use porttrace_user::core::model::flow::Family;
use porttrace_user::core::parse::words;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::{IpAddr, UdpSocket};

/// Ids of the packets that mark the end of a batch.
pub const FENCES: [u16; 2] = [0xfffd, 0xfffe];

/// A router that stands, without rules so far.
pub struct Router {
    pub inside: Netns,
    pub outside: Netns,
    /// Interface index outside → the router's interface.
    pub peers: BTreeMap<u32, String>,
    /// Interface index inside → name.
    pub names: BTreeMap<u32, String>,
    /// MAC addresses of the hosts behind bridge ports.
    pub neighbours: BTreeMap<IpAddr, [u8; 6]>,
    links: Vec<Link>,
    /// Open for as long as the router stands.
    _sockets: Vec<UdpSocket>,
}

impl Router {
    pub fn build(node: &Node) -> Result<Self> {
        let router = Self {
            inside: Netns::new("router")?,
            outside: Netns::new("around")?,
            peers: BTreeMap::new(),
            names: BTreeMap::new(),
            neighbours: node.ip.iter().filter_map(|line| neighbour(line)).collect(),
            links: node.links.clone(),
            _sockets: Vec::new(),
        };
        router.outside.run_in(|| fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"))??;
        router.inside.run_in(prepare)??;
        router.inside.exec_with(["ip", "-batch", "-"], &links(&node.links, router.outside.name()))?;
        let up: String = (0..node.links.len()).map(|index| format!("link set p{index} up\n")).collect();
        router.outside.exec_with(["ip", "-batch", "-"], &up)?;
        // Before the addresses: some (forwarding) reset others, and routes react to them.
        router.inside.run_in(|| write_sysctls(&node.sysctls))??;
        let (six, four): (Vec<_>, Vec<_>) =
            node.ip.iter().map(String::as_str).partition(|line| line.starts_with("-6 "));
        router.inside.exec_with(["ip", "-batch", "-"], &four.join("\n"))?;
        if !six.is_empty() {
            router.inside.exec_with(["ip", "-6", "-batch", "-"], &six.join("\n").replace("-6 ", ""))?;
        }
        if !node.sets.is_empty() {
            router.inside.exec_with(["ipset", "restore"], &(node.sets.join("\n") + "\n"))?;
        }
        router.inside.run_in(|| accounting(&node.accounting))??;
        for (number, link) in node.links.iter().filter(|link| link.bridge.is_some()).enumerate() {
            // Known from the start, so that nothing is flooded.
            let address = format!("02:00:00:00:03:{:02x}", number + 1);
            router.inside.exec(["bridge", "fdb", "replace", &address, "dev", &link.name, "master", "static"])?;
        }
        router.inside.exec_with(["nft", "-f", "-"], &watch())?;
        let bind = |address: &String| UdpSocket::bind(address).with_context(|| format!("binding {address}"));
        let sockets: Result<Vec<_>> = router.inside.run_in(|| node.sockets.iter().map(bind).collect())?;
        let names = router.inside.run_in(interfaces)??;
        let peers = router.outside.run_in(interfaces)??;
        let peers = peers
            .into_iter()
            .filter_map(|(index, peer)| {
                let number: usize = peer.strip_prefix('p')?.parse().ok()?;
                Some((index, node.links.get(number)?.name.clone()))
            })
            .collect();
        Ok(Self { peers, names, _sockets: sockets?, ..router })
    }

    /// Replaces the rules of the families named. Rules that iptables refuses are left out and returned.
    pub fn load(&self, rules: &[Tables]) -> Result<Vec<String>> {
        let mut refused = Vec::new();
        for tables in rules {
            let program = match (tables.family, tables.legacy) {
                (Family::V4, false) => "iptables-nft-restore",
                (Family::V6, false) => "ip6tables-nft-restore",
                (Family::V4, true) => "iptables-legacy-restore",
                (Family::V6, true) => "ip6tables-legacy-restore",
            };
            let text = tables.text();
            let mut lines: Vec<&str> = text.lines().collect();
            while let Err(error) = self.inside.exec_with([program, "-w", "20"], &(lines.join("\n") + "\n")) {
                let at = line_of(&format!("{error:#}"));
                let rule = at.and_then(|at| lines.get(at)).filter(|line| line.starts_with("-A"));
                let (Some(at), Some(rule)) = (at, rule) else {
                    return Err(error.context(format!("loading\n{text}")));
                };
                refused.push(format!("{program}: {rule}"));
                lines.remove(at);
            }
        }
        Ok(refused)
    }

    /// Adds native tables. Lines of generated ones that nft refuses are left out and returned.
    pub fn load_native(&self, listing: &str, tables: &[NativeTable]) -> Result<Vec<String>> {
        let mut refused = Vec::new();
        if !listing.is_empty() {
            self.inside.exec_with(["nft", "-f", "-"], listing)?;
        }
        if tables.is_empty() {
            return Ok(refused);
        }
        let text: String = tables.iter().map(NativeTable::text).collect();
        let mut lines: Vec<&str> = text.lines().collect();
        while let Err(error) = self.inside.exec_with(["nft", "-f", "-"], &(lines.join("\n") + "\n")) {
            // `/dev/stdin:12:33-45: Error: …`
            let said = format!("{error:#}");
            let at = said.split("/dev/stdin:").nth(1).and_then(|rest| rest.split(':').next()?.parse::<usize>().ok());
            let at = at.and_then(|at| at.checked_sub(1)).filter(|at| *at < lines.len());
            let Some(at) = at.filter(|at| lines[*at].starts_with("add rule ")) else {
                return Err(error.context(format!("loading\n{text}")));
            };
            refused.push(format!("nft: {} ({})", lines[at], said.lines().next().unwrap_or_default()));
            lines.remove(at);
        }
        Ok(refused)
    }

    /// Number of a bridge port among the ports, from 1: the last byte of its neighbour's MAC address, 02:00:00:00:03:XX.
    pub fn port_of(&self, link: &str) -> Option<u8> {
        let mut ports = self.links.iter().filter(|one| one.bridge.is_some());
        ports.position(|one| one.name == link).map(|number| number as u8 + 1)
    }

    /// Position of a link in the scenario.
    pub fn number_of(&self, link: &str) -> usize {
        self.links.iter().position(|one| one.name == link).unwrap_or_default()
    }

    /// Index of the neighbours' interface behind a link.
    pub fn peer_of(&self, link: &str) -> Option<u32> {
        self.peers.iter().find(|(_, name)| *name == link).map(|(index, _)| *index)
    }
}

/// `neigh add ADDRESS lladdr MAC …`
fn neighbour(line: &str) -> Option<(IpAddr, [u8; 6])> {
    let words: Vec<&str> = line.split(' ').collect();
    let ["neigh", "add", address, "lladdr", mac, ..] = words.as_slice() else { return None };
    Some((address.parse().ok()?, words::mac(mac)?))
}

/// Index of the line that `iptables-restore` complains of.
fn line_of(error: &str) -> Option<usize> {
    let after = error.split("line ").nth(1).or_else(|| error.split("line: ").nth(1))?;
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    digits.parse::<usize>().ok()?.checked_sub(1)
}

/// The MAC address of the scenario's bridge.
pub const BRIDGE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xc0];

/// The router's MAC address on its `index`-th link.
pub fn mac(index: usize) -> [u8; 6] {
    [2, 0, 0, 0, 0, index as u8 + 1]
}

/// New links must not speak by themselves: no link-local addresses, no duplicate address detection, no router discovery.
fn prepare() -> Result<()> {
    for (key, value) in [
        ("ipv6/conf/default/addr_gen_mode", "1"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv6/conf/default/router_solicitations", "0"),
        // A second round asks for the entries of the first, however long that took.
        ("netfilter/nf_conntrack_sctp_timeout_cookie_wait", "600"),
        ("netfilter/nf_conntrack_sctp_timeout_closed", "600"),
        ("netfilter/nf_conntrack_udp_timeout", "600"),
        // The refusals of a batch come at once; their limits would hide some of them.
        ("ipv4/icmp_ratemask", "0"),
        ("ipv6/icmp/ratelimit", "0"),
        ("ipv4/icmp_msgs_per_sec", "1000000"),
        ("ipv4/icmp_msgs_burst", "1000000"),
    ] {
        let path = format!("/proc/sys/net/{key}");
        match fs::write(&path, value) {
            // Not every kernel has the message limits per namespace.
            Err(_) if key.contains("msgs") => {}
            result => result.with_context(|| format!("writing {path}"))?,
        }
    }
    Ok(())
}

/// ARP is off on every link, so that a neighbour needs no answer of its own: packets leave at once.
fn links(links: &[Link], outside: &str) -> String {
    let mut batch = String::new();
    for bridge in links.iter().filter_map(|link| link.bridge.as_ref()).collect::<std::collections::BTreeSet<_>>() {
        let _ = writeln!(
            batch,
            "link add {bridge} address 02:00:00:00:00:c0 type bridge forward_delay 0 mcast_snooping 0\nlink set {bridge} up"
        );
    }
    for (index, link) in links.iter().enumerate() {
        let [a, b, c, d, e, f] = mac(index);
        let _ = writeln!(
            batch,
            "link add {} address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} type veth peer name p{index} netns {outside}",
            link.name
        );
        if let Some(bridge) = &link.bridge {
            let _ = writeln!(batch, "link set {} master {bridge}", link.name);
        }
        let _ = writeln!(batch, "link set {} arp off up", link.name);
    }
    batch
}

fn write_sysctls(sysctls: &[(String, String)]) -> Result<()> {
    for (key, value) in sysctls {
        fs::write(format!("/proc/sys/net/{key}"), value).with_context(|| format!("setting net/{key} to {value}"))?;
    }
    Ok(())
}

fn accounting(names: &[String]) -> Result<()> {
    for name in names {
        let name = format!("{name}\0");
        // NFNL_SUBSYS_ACCT, NFNL_MSG_ACCT_NEW; NFACCT_NAME.
        let attributes = [(1, name.as_bytes())];
        let flags = NLM_F_ACK | NLM_F_CREATE;
        let request = Request { kind: 7 << 8, flags, family: 0, res_id: 0, attributes: &attributes };
        NetfilterSocket::open(0)?.request(&request).with_context(|| format!("making the nfacct object {name}"))?;
    }
    Ok(())
}

fn interfaces() -> Result<BTreeMap<u32, String>> {
    let interfaces = nix::net::if_::if_nameindex().context("listing interfaces")?;
    Ok(interfaces.iter().map(|one| (one.index(), one.name().to_string_lossy().into_owned())).collect())
}

/// Chains before and after all others at every hook. They trace every probe, stop the fences, and stop what the router says by
/// itself (refusals, replies), which would otherwise move counters and conntrack between the probes.
fn watch() -> String {
    let [first, second] = FENCES;
    let mut text = format!("table inet {WATCH} {{\n");
    let mut chain = |name: &str, hook: &str, priority: i64, rules: &str| {
        let _ =
            writeln!(text, "chain {name} {{ type filter hook {hook} priority {priority}; policy accept; {rules} }}");
    };
    chain("prerouting-first", "prerouting", -500, &format!("meta nftrace set 1; ip id {{ {first}, {second} }} drop;"));
    let own = "meta skuid 0-4294967294 meta nftrace set 1 accept;";
    let refusals = "tcp flags & rst == rst meta nftrace set 1; \
        icmp type { destination-unreachable, time-exceeded } meta nftrace set 1; \
        icmpv6 type { destination-unreachable, time-exceeded } meta nftrace set 1; drop;";
    chain("output-first", "output", -500, &format!("{own} {refusals}"));
    for hook in ["input", "forward", "postrouting"] {
        chain(&format!("{hook}-first"), hook, -500, "");
    }
    for hook in ["prerouting", "input", "forward", "output", "postrouting"] {
        chain(&format!("{hook}-last"), hook, 2_000_000_000, "");
    }
    text + "}\n"
}
