//! What is loaded and sent: a router, its rules, and packets.

use porttrace_user::core::model::flow::Family;
use porttrace_user::core::model::trace::Packet;
use std::fmt::Write;

/// A router with everything that decides where its packets go, and the packets.
#[derive(Clone, Debug, Default)]
pub struct Scenario {
    /// Names it in reports: a seed, or a recorded case.
    pub name: String,
    pub node: Node,
    pub rules: Vec<Tables>,
    /// Native nftables tables as `nft list ruleset` prints them, loaded after those.
    pub listing: String,
    /// Native nftables rules beside them, loaded last.
    pub native: Vec<NativeTable>,
    /// Rules that replace `rules` after a first round of packets, so that the second round meets conntrack entries made by
    /// other rules.
    pub later: Option<Vec<Tables>>,
    pub probes: Vec<Probe>,
}

/// Everything about the router but its rules.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// Interfaces with a neighbour on the other end, by name.
    pub links: Vec<Link>,
    /// `ip -batch` lines run inside, after the links are up.
    pub ip: Vec<String>,
    /// Key with slashes under `/proc/sys/net/`, and value.
    pub sysctls: Vec<(String, String)>,
    /// `ipset restore` lines.
    pub sets: Vec<String>,
    /// `nfacct` objects by name.
    pub accounting: Vec<String>,
    /// Addresses and ports that UDP sockets of the router are bound to.
    pub sockets: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct Link {
    pub name: String,
    /// A bridge of this name that it is a port of.
    pub bridge: Option<String>,
}

/// One family's rules of one flavour.
#[derive(Clone, Debug)]
pub struct Tables {
    pub family: Family,
    /// For iptables-legacy; otherwise for iptables-nft.
    pub legacy: bool,
    pub tables: Vec<Table>,
}

#[derive(Clone, Debug)]
pub struct Table {
    pub name: String,
    pub chains: Vec<Chain>,
}

#[derive(Clone, Debug)]
pub struct Chain {
    pub name: String,
    /// `ACCEPT` or `DROP` for a built-in chain.
    pub policy: Option<String>,
    pub rules: Vec<Rule>,
}

/// A rule in pieces that can be taken out one by one.
#[derive(Clone, Debug, Default)]
pub struct Rule {
    /// Each a whole match (`-p tcp -m tcp --dport 80` is two).
    pub matches: Vec<String>,
    /// `-j …`, `-g …`, or empty.
    pub target: String,
}

/// A table of native nftables rules.
#[derive(Clone, Debug)]
pub struct NativeTable {
    /// `ip`, `ip6`, `inet`.
    pub family: String,
    pub name: String,
    /// Sets and maps, a whole declaration each.
    pub sets: Vec<String>,
    pub chains: Vec<NativeChain>,
}

#[derive(Clone, Debug)]
pub struct NativeChain {
    pub name: String,
    /// What makes it a base chain: type, hook, priority, policy.
    pub base: Option<String>,
    pub rules: Vec<String>,
}

impl NativeTable {
    /// As `nft -f` reads it; what stands on a line of its own can be left out.
    pub fn text(&self) -> String {
        let mut text = format!("table {} {} {{\n", self.family, self.name);
        // Sets lead to chains, and chains ask sets: chains are named first.
        for chain in &self.chains {
            let _ = writeln!(text, "chain {} {{ {} }}", chain.name, chain.base.as_deref().unwrap_or_default());
        }
        for set in &self.sets {
            let _ = writeln!(text, "{set}");
        }
        text.push_str("}\n");
        for chain in &self.chains {
            for rule in &chain.rules {
                let _ = writeln!(text, "add rule {} {} {} {rule}", self.family, self.name, chain.name);
            }
        }
        text
    }
}

/// A packet to send, and what the simulator's [`Packet`] does not say of it.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Carried in the IPv4 identification or IPv6 flow label; unique in its scenario, from 1.
    pub id: u16,
    pub packet: Packet,
    /// Owner of the sending socket, for locally sent packets.
    pub uid: u32,
    /// Last byte of the sender's MAC address 02:00:00:00:01:XX.
    pub mac: u8,
}

impl Tables {
    /// As `iptables-restore` reads it.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for table in &self.tables {
            let _ = writeln!(text, "*{}", table.name);
            for chain in &table.chains {
                let _ = writeln!(text, ":{} {} [0:0]", chain.name, chain.policy.as_deref().unwrap_or("-"));
            }
            for chain in &table.chains {
                for rule in &chain.rules {
                    let _ = writeln!(text, "-A {}{}", chain.name, rule.text());
                }
            }
            text.push_str("COMMIT\n");
        }
        text
    }
}

impl Rule {
    /// From matches and a target.
    pub fn new(matches: &[&str], target: &str) -> Self {
        Self { matches: matches.iter().map(ToString::to_string).collect(), target: target.to_string() }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for part in self.matches.iter().chain(Some(&self.target)).filter(|part| !part.is_empty()) {
            text.push(' ');
            text.push_str(part);
        }
        text
    }
}
