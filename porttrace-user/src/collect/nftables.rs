//! The little that is asked of nf_tables itself: the generation of its rules, which tables there are, and portmap's own.

use super::attributes::{attributes, be32};
use super::netlink::socket::{Connection, NetlinkError};
use super::tool;
use crate::core::model::cluster::Part;
use crate::core::model::facts::NativeTable;
use crate::core::parse;
use std::collections::BTreeSet;

/// `NFNL_SUBSYS_NFTABLES << 8` with `NFT_MSG_GETTABLE` and `NFT_MSG_GETGEN` (include/uapi/linux/netfilter/nf_tables.h).
const GET_TABLE: u16 = 0x0a01;
const GET_GENERATION: u16 = 0x0a10;

/// A table's family (`ip`, `ip6`, `inet`, `bridge`, `arp`, `netdev`) and name.
pub type Table = (&'static str, String);

/// A number that changes with every change of the network namespace's nftables rules, iptables-nft included.
///
/// # Errors
/// When the kernel has no nf_tables, or CAP_NET_ADMIN is missing.
pub fn generation() -> Result<u32, NetlinkError> {
    let mut connection = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)?;
    let answer = connection.get(GET_GENERATION, &[0; 4], |_, payload| {
        // NFTA_GEN_ID
        attributes(payload.get(4..)?).find(|(kind, _)| *kind == 1).and_then(|(_, value)| be32(value))
    })?;
    answer.ok_or(NetlinkError::Malformed)
}

/// All tables, sorted.
///
/// # Errors
/// As [`generation`].
pub fn tables() -> Result<BTreeSet<Table>, NetlinkError> {
    let mut connection = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)?;
    let tables = connection.dump(GET_TABLE, &[0; 4], |_, payload| {
        let family = family(*payload.first()?);
        // NFTA_TABLE_NAME
        let (_, name) = attributes(payload.get(4..)?).find(|(kind, _)| *kind == 1)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Some((family, String::from_utf8_lossy(name).into_owned()))
    })?;
    Ok(tables.into_iter().collect())
}

/// portmap's tables of native rules; `nft` is run only where there are any.
pub fn portmap() -> Part<Vec<NativeTable>> {
    let tables = match tables() {
        Ok(tables) => tables,
        Err(error) => return Part::Missing(format!("native nftables rules are not known: {error}")),
    };
    let mut found = Vec::new();
    for (family, name) in tables.iter().filter(|(_, name)| name == "cni_hostport") {
        match tool::run("nft", &["-j", "list", "table", family, name]) {
            Ok(text) => found.extend(parse::native_tables(&String::from_utf8_lossy(&text)).unwrap_or_default()),
            Err(error) => return Part::Missing(format!("portmap's nftables rules are not known: {error}")),
        }
    }
    Part::Known(found)
}

/// Whether iptables-nft keeps its rules in a table of this name.
pub fn is_iptables((family, name): &Table) -> bool {
    matches!(*family, "ip" | "ip6") && matches!(name.as_str(), "raw" | "mangle" | "nat" | "filter" | "security")
}

/// `NFPROTO_*`.
fn family(number: u8) -> &'static str {
    match number {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => "unknown",
    }
}
