//! iptables rules as values: tables of chains of rules, each a list of matches and a target.

use super::flow::Family;
use super::trace::Flavour;

/// What one `iptables-save` printed.
#[derive(Clone, Debug, PartialEq)]
pub struct Ruleset {
    pub flavour: Flavour,
    pub family: Family,
    pub tables: Vec<Table>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// `raw`, `mangle`, `nat`, `filter`, `security`.
    pub name: String,
    pub chains: Vec<Chain>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    pub name: String,
    /// Built-in chains only.
    pub policy: Option<Policy>,
    pub rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    Accept,
    Drop,
}

/// One rule. `matches` and `target` are filled in by the parser; `text` is the line as it was read, without counters.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// 1-based line of the dump.
    pub line: u32,
    /// Packets and bytes, where the dump has them.
    pub counters: Option<(u64, u64)>,
    pub text: Box<str>,
}
