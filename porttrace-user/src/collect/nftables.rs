//! What is asked of nf_tables itself: the generation of its rules, which tables there are, and what native ones say.

use super::attributes::{attributes, be32};
use super::netlink::socket::{Connection, NetlinkError};
use super::tool::{self, ToolError};
use crate::core::model::state::NativeBase;
use crate::core::parse;
use std::collections::BTreeSet;

/// `NFNL_SUBSYS_NFTABLES << 8` with `NFT_MSG_GETTABLE`, `NFT_MSG_GETCHAIN`, `NFT_MSG_GETRULE` and `NFT_MSG_GETGEN`
/// (include/uapi/linux/netfilter/nf_tables.h).
const GET_TABLE: u16 = 0x0a01;
const GET_CHAIN: u16 = 0x0a04;
const GET_RULE: u16 = 0x0a07;
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

/// All tables, in the order in which they were made.
///
/// # Errors
/// As [`generation`].
pub fn tables() -> Result<Vec<Table>, NetlinkError> {
    let mut connection = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)?;
    connection.dump(GET_TABLE, &[0; 4], |_, payload| {
        let family = family(*payload.first()?);
        // NFTA_TABLE_NAME
        let (_, name) = attributes(payload.get(4..)?).find(|(kind, _)| *kind == 1)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Some((family, String::from_utf8_lossy(name).into_owned()))
    })
}

/// What the native rules say that IP packets meet, as `nft -j` prints them; `nft` is run only where there are any.
///
/// # Errors
/// When `nft` is missing or fails.
pub fn rules() -> Result<Option<String>, ToolError> {
    let tables = tables().unwrap_or_default();
    let native = tables.iter().filter(|table| matches!(table.0, "ip" | "ip6" | "inet") && !is_iptables(table));
    let mut items = String::new();
    // One table after the other: those of iptables-nft, which may be large, are left out.
    for (family, name) in native {
        let listing = tool::run("nft", &["-j", "list", "table", family, name])?;
        let listing = String::from_utf8_lossy(&listing);
        let list = listing.split_once('[').and_then(|(_, rest)| rest.rsplit_once(']')).map_or("", |(list, _)| list);
        if !(items.is_empty() || list.is_empty()) {
            items.push_str(", ");
        }
        items.push_str(list);
    }
    Ok((!items.is_empty()).then(|| format!("{{\"nftables\": [{items}]}}\n")))
}

/// Base chains of native rules that IP packets meet, but for empty ones.
///
/// # Errors
/// As [`generation`].
pub fn bases() -> Result<Vec<NativeBase>, NetlinkError> {
    let mut connection = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)?;
    let mut found = connection.dump(GET_CHAIN, &[0; 4], |_, payload| base(payload))?;
    found.retain(|base| !parse::nftables::is_iptables(&base.family, &base.table));
    let tables: BTreeSet<(String, String)> = found
        .iter()
        .filter(|base| base.is_nat_of_destinations())
        .map(|base| (base.family.clone(), base.table.clone()))
        .collect();
    for (family, table) in tables {
        // What cannot be listed may be there.
        if has_dnat(&mut connection, &family, &table).unwrap_or(true) {
            let of_table = |base: &&mut NativeBase| base.family == family && base.table == table;
            found.iter_mut().filter(of_table).for_each(|base| base.has_dnat = true);
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a rule of the table sends connections elsewhere.
fn has_dnat(connection: &mut Connection, family: &str, table: &str) -> Result<bool, NetlinkError> {
    // Theirs do, and there can be very many.
    if matches!(table, "kube-proxy" | "cni_hostport") {
        return Ok(true);
    }
    let number = FAMILIES.iter().find(|(_, name)| *name == family).map_or(0, |(number, _)| *number);
    let mut request = vec![number, 0, 0, 0];
    // NFTA_RULE_TABLE
    let length = u16::try_from(4 + table.len() + 1).unwrap_or(u16::MAX);
    request.extend(length.to_ne_bytes().into_iter().chain(1u16.to_ne_bytes()).chain(table.bytes()).chain([0]));
    request.resize(request.len().next_multiple_of(4), 0);
    let found = connection.dump(GET_RULE, &request, |_, payload| {
        // NFTA_RULE_EXPRESSIONS
        let (_, expressions) = attributes(payload.get(4..)?).find(|(kind, _)| *kind == 4)?;
        attributes(expressions).any(|(_, expression)| is_dnat(expression)).then_some(())
    })?;
    Ok(!found.is_empty())
}

/// Whether this is `dnat` or `redirect` (net/netfilter/nft_nat.c, nft_redir.c).
fn is_dnat(expression: &[u8]) -> bool {
    /// `NFT_NAT_DNAT`.
    const DNAT: u32 = 1;
    // NFTA_EXPR_NAME, NFTA_EXPR_DATA
    let part = |wanted| attributes(expression).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    match part(1) {
        Some(b"redir\0") => true,
        // NFTA_NAT_TYPE
        Some(b"nat\0") => part(2).is_some_and(|data| {
            attributes(data).find(|(kind, _)| *kind == 1).and_then(|(_, value)| be32(value)) == Some(DNAT)
        }),
        _ => false,
    }
}

/// One of an answer to `NFT_MSG_GETCHAIN`.
fn base(payload: &[u8]) -> Option<NativeBase> {
    /// `NF_ACCEPT`.
    const ACCEPT: u32 = 1;
    /// As libnftables calls the hooks of these families (`enum nf_inet_hooks`).
    const HOOKS: [&str; 5] = ["prerouting", "input", "forward", "output", "postrouting"];
    let family = family(*payload.first()?);
    let chain = |wanted: u16| attributes(payload.get(4..)?).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let text = |value: &[u8]| {
        let name = value.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    };
    // NFTA_CHAIN_TABLE, _NAME, _HOOK, _POLICY, _USE, _TYPE
    let (table, name, hook, kind) = (text(chain(1)?), text(chain(3)?), chain(4)?, text(chain(7)?));
    let does_nothing = chain(6).and_then(be32) == Some(0) && chain(5).and_then(be32) == Some(ACCEPT);
    // NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY
    let of_hook = |wanted| attributes(hook).find(|(kind, _)| *kind == wanted).and_then(|(_, value)| be32(value));
    let at = HOOKS.get(usize::try_from(of_hook(1)?).ok()?)?;
    let priority = of_hook(2).map(u32::cast_signed);
    if does_nothing { None } else { parse::nftables::base([family, &table, &name, &kind, at], priority) }
}

/// Whether iptables-nft keeps its rules in a table of this name.
pub fn is_iptables((family, name): &Table) -> bool {
    parse::nftables::is_iptables(family, name)
}

/// `NFPROTO_*`.
const FAMILIES: [(u8, &str); 6] = [(1, "inet"), (2, "ip"), (3, "arp"), (5, "netdev"), (7, "bridge"), (10, "ip6")];

fn family(number: u8) -> &'static str {
    FAMILIES.iter().find(|(known, _)| *known == number).map_or("unknown", |(_, name)| *name)
}
