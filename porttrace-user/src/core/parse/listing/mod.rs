//! `iptables -L` listings, whole or grepped, and `iptables -S` output, as people paste them: rewritten as the text that
//! `iptables-save` would have printed, so that one parser reads all. What a listing cannot tell is said in sentences.
//!
//! A listing does not name its table: the built-in chains do (`nat` alone has PREROUTING and POSTROUTING but no FORWARD),
//! or a command line that was pasted along, or else the targets.

mod draft;
mod emit;
mod matches;
mod phrase;
mod place;
mod row;
mod target;

use crate::core::model::flow::Family;
use crate::core::model::state::Diagnostic;
use std::collections::BTreeSet;

/// The chain that holds rows pasted without their `Chain …` line, before routing (or in all filter hooks).
pub const LOOSE: &str = "?";
/// The same for SNAT and MASQUERADE rows.
pub const LOOSE_POST: &str = "?post";

/// What a pasted text looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `iptables-save` output, with `*table` lines.
    Save,
    /// `iptables -L` or `-S` output, or lines grepped from either.
    Listing,
    Neither,
}

/// The rules of one family, as `iptables-save` text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translated {
    pub family: Family,
    pub save: String,
    /// For each line of `save` the 1-based line of the listing that it comes from; 0: made up.
    pub lines: Vec<u32>,
    /// Chains of table nat that got back rules without their numbers.
    pub unnumbered: BTreeSet<String>,
    /// What the listing cannot tell and what was assumed instead, in sentences.
    pub missing: Vec<String>,
}

/// Decides by the first line that settles it.
pub fn kind(text: &str) -> Kind {
    for line in text.lines() {
        let line = line.trim();
        if line
            .strip_prefix('*')
            .is_some_and(|table| !table.is_empty() && table.bytes().all(|b| b.is_ascii_lowercase()))
        {
            return Kind::Save;
        }
    }
    if text.lines().any(|line| draft::Line::read(line).is_some_and(|line| line.is_rule_or_chain())) {
        Kind::Listing
    } else {
        Kind::Neither
    }
}

/// Rewrites a listing, one text for each family in it, IPv4 first. `source` names it in diagnostics.
pub fn translate(text: &str, source: &str) -> (Vec<Translated>, Vec<Diagnostic>) {
    let mut reader = draft::Reader::default();
    for (index, line) in text.lines().enumerate() {
        reader.line(line, index as u32 + 1, source);
    }
    let (tables, diagnostics) = reader.finish(source);
    let families = [Family::V4, Family::V6];
    let translated = families.into_iter().filter_map(|family| emit::family(&tables, family)).collect();
    (translated, diagnostics)
}

#[cfg(test)]
mod tests;
