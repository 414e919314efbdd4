//! Where a rule stands: enough to find it again with `iptables -t TABLE -L CHAIN --line-numbers`, and to read it.

use super::flow::Family;
use super::name::{Name, name};
use super::rules::{Chain, Rule, Ruleset, Table, conditions, native_conditions};
use super::trace::Flavour;
use serde::ser::{Serialize, SerializeStruct, Serializer};
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::num::NonZeroU32;
use std::ops::Deref;
use std::sync::Arc;

/// Which chain, by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChainRef {
    pub flavour: Flavour,
    pub family: Family,
    pub table: Name,
    pub chain: Name,
}

/// Stands for a chain that is not there, of which nobody can make a [`Place`].
static NOWHERE: ChainRef =
    ChainRef { flavour: Flavour::IptablesNft, family: Family::V4, table: name!(""), chain: name!("") };

/// The chains of one table. Whatever points to one of them or to its rules shares this and counts nothing else, so that a path
/// through a thousand chains touches none of their names.
#[derive(Debug)]
pub enum Chains {
    /// Table number so many of a ruleset.
    Of(Arc<Ruleset>, usize),
    /// One chain, of which only the name is known.
    Named(ChainRef),
}

impl Chains {
    /// The chain at index `at` of the table; `None` where only a name is known, or no such chain is.
    pub fn chain(&self, at: u32) -> Option<&Chain> {
        self.table()?.chains.get(at as usize)
    }

    /// The table; `None` where only a name is known.
    pub fn table(&self) -> Option<&Table> {
        match self {
            Self::Of(ruleset, table) => ruleset.tables.get(*table),
            Self::Named(_) => None,
        }
    }

    fn id(&self, at: u32) -> Option<&ChainRef> {
        match self {
            Self::Of(..) => self.chain(at).map(|chain| &chain.id),
            Self::Named(id) => Some(id),
        }
    }
}

/// A chain. The fields of its [`ChainRef`] are read as if they were its own.
#[derive(Clone)]
pub struct Place {
    chains: Arc<Chains>,
    at: u32,
}

impl Place {
    /// The chain at index `at` of its table; `None` where the table has no such chain.
    pub fn new(chains: &Arc<Chains>, at: u32) -> Option<Self> {
        chains.id(at).map(|_| Self { chains: Arc::clone(chains), at })
    }
}

impl From<ChainRef> for Place {
    /// A chain of which only the name is known.
    fn from(name: ChainRef) -> Self {
        Self { chains: Arc::new(Chains::Named(name)), at: 0 }
    }
}

impl Deref for Place {
    type Target = ChainRef;

    fn deref(&self) -> &ChainRef {
        self.chains.id(self.at).unwrap_or(&NOWHERE)
    }
}

/// A rule, or the policy of a base chain. The fields of its chain are read as if they were its own.
#[derive(Clone)]
pub struct RuleRef {
    chains: Arc<Chains>,
    at: u32,
    number: Option<NonZeroU32>,
}

impl RuleRef {
    /// `number`: the 1-based position in the chain, as iptables counts; `None` (or 0) for the chain's policy.
    pub fn new(place: impl Into<Place>, number: Option<u32>) -> Self {
        let Place { chains, at } = place.into();
        Self { chains, at, number: number.and_then(NonZeroU32::new) }
    }

    /// The 1-based position in the chain, as iptables counts; `None` for the chain's policy.
    pub fn number(&self) -> Option<u32> {
        self.number.map(NonZeroU32::get)
    }

    /// The chain that it stands in.
    pub fn place(&self) -> Place {
        Place { chains: Arc::clone(&self.chains), at: self.at }
    }

    /// The same chain, whichever rules.
    pub fn same_chain(&self, other: &Self) -> bool {
        same(&self.chains, &other.chains, self.at, other.at)
    }

    /// Whether its table has this name.
    pub fn in_table(&self, name: &str) -> bool {
        *self.table == *name
    }

    /// The chain's rules; `None` where only its name is known.
    pub fn chain(&self) -> Option<&Chain> {
        self.chains.chain(self.at)
    }

    /// The rule itself; `None` for a policy, and where only its place is known.
    pub fn rule(&self) -> Option<&Rule> {
        self.chain()?.rules.get(self.number()? as usize - 1)
    }

    /// The rule as its dump has it, from `-A` on; empty where there is none.
    pub fn text(&self) -> Name {
        self.rule().map(|rule| rule.text.read()).unwrap_or_default()
    }

    /// The matches that decided, as iptables (or nft) writes them, without the comment.
    pub fn because(&self) -> String {
        match self.flavour {
            Flavour::Nftables => native_conditions(&self.text()),
            _ => conditions(&self.text()),
        }
    }

    /// Tells rules apart that live at the same time, cheaper than their names do.
    pub fn identity(&self) -> (usize, u32, Option<u32>) {
        (Arc::as_ptr(&self.chains).addr(), self.at, self.number())
    }
}

impl Deref for RuleRef {
    type Target = ChainRef;

    fn deref(&self) -> &ChainRef {
        self.chains.id(self.at).unwrap_or(&NOWHERE)
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        same(&self.chains, &other.chains, self.at, other.at)
    }
}

impl PartialEq for RuleRef {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number && self.same_chain(other)
    }
}

impl Eq for Place {}
impl Eq for RuleRef {}

impl Ord for Place {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

impl Ord for RuleRef {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other).then(self.number.cmp(&other.number))
    }
}

impl PartialOrd for Place {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialOrd for RuleRef {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Hash for RuleRef {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
        self.number.hash(state);
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl fmt::Debug for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} {}", self.flavour, self.table, self.chain)?;
        self.number.map_or(Ok(()), |number| write!(f, " #{number}"))
    }
}

/// Chains are the same where their names are; mostly both point into the same list.
fn same(one: &Arc<Chains>, other: &Arc<Chains>, at: u32, other_at: u32) -> bool {
    match (&**one, &**other) {
        (Chains::Of(ruleset, table), Chains::Of(other, other_table)) if Arc::ptr_eq(ruleset, other) => {
            (table, at) == (other_table, other_at)
        }
        _ => one.id(at) == other.id(other_at),
    }
}

impl Serialize for RuleRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut rule = serializer.serialize_struct("RuleRef", 5)?;
        rule.serialize_field("flavour", &self.flavour)?;
        rule.serialize_field("family", &self.family)?;
        rule.serialize_field("table", &self.table)?;
        rule.serialize_field("chain", &self.chain)?;
        rule.serialize_field("number", &self.number())?;
        rule.end()
    }
}
