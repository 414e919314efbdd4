//! Native nftables rules as libnftables prints them in JSON (`nft -j list ruleset`; libnftables-json(5)), as rulesets of which the
//! tables are called as nft calls them: `ip kube-proxy`, `inet filter`.
//!
//! A table of family inet is in the rulesets of both families. What is not understood becomes a statement that may match or not, and
//! a diagnostic; tables that belong to iptables-nft, and families that IP packets on their way through the node do not meet, are
//! left out.

mod constants;
mod expressions;
mod statements;
mod text;

use super::notes::{Notes, quote};
use crate::core::model::dump::{Writer, blocks};
use crate::core::model::flow::Family;
use crate::core::model::name::Name;
use crate::core::model::native::{Base, BaseKind, Datum, Set, Statement, Statements};
use crate::core::model::place::ChainRef;
use crate::core::model::rules::{Chain, Matches, Policy, Rule, Ruleset, Table, Target};
use crate::core::model::trace::Flavour;
use crate::core::parse::nftables::{hook, is_iptables};
use constants::Kind;
use expressions::Scope;
use foldhash::HashMap;
use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fmt;

/// The rulesets of a node, IPv4's and IPv6's, as far as there are any.
///
/// # Errors
/// When it is no JSON of nft.
pub fn rulesets(text: &str, notes: &mut Notes) -> Result<Vec<Ruleset>, serde_json::Error> {
    let Listing { nftables: Listed(tables) } = serde_json::from_str(text)?;
    let mut found = Vec::new();
    for family in [Family::V4, Family::V6] {
        let of_family = tables.iter().filter(|(id, _)| meets(&id.0, family) && !is_iptables(&id.0, &id.1));
        // What is not understood of an inet table is said once.
        let mut again = Notes::new("");
        let mut writer = TextWriter::default();
        let drafts: Vec<Draft> = of_family
            .map(|((kind, name), items)| {
                let is_repeated = family == Family::V6 && meets(kind, Family::V4);
                let notes = if is_repeated { &mut again } else { &mut *notes };
                draft(family, &format!("{kind} {name}"), items, &mut writer, notes)
            })
            .collect::<Result<_, _>>()?;
        if drafts.is_empty() {
            continue;
        }
        let texts = writer.finish();
        let tables = drafts.into_iter().map(|draft| draft.table(&texts)).collect();
        found.push(Ruleset { flavour: Flavour::Nftables, family, tables });
    }
    Ok(found)
}

fn meets(table: &str, family: Family) -> bool {
    match table {
        "ip" => family == Family::V4,
        "ip6" => family == Family::V6,
        "inet" => true,
        _ => false,
    }
}

/// What nft printed.
#[derive(Deserialize)]
struct Listing<'t> {
    #[serde(borrow)]
    nftables: Listed<'t>,
}

/// Tables in the order of the listing, with family and name.
type Tables<'t> = Vec<((String, String), Items<'t>)>;

/// What a table has, as it was listed. Most of a large listing is only taken apart when its turn comes: all of it at once would take
/// many times the memory of the text.
#[derive(Default)]
struct Items<'t> {
    chains: Vec<&'t RawValue>,
    sets: Vec<&'t RawValue>,
    rules: Vec<&'t RawValue>,
}

/// The list of everything, sorted while it is read.
struct Listed<'t>(Tables<'t>);

impl<'de: 't, 't> Deserialize<'de> for Listed<'t> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Listed<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of tables, chains, sets and rules")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Listed<'de>, A::Error> {
                let mut tables = Tables::new();
                while let Some(item) = list.next_element::<&RawValue>()? {
                    sort(item, &mut tables);
                }
                Ok(Listed(tables))
            }
        }
        deserializer.deserialize_seq(Reader)
    }
}

/// What everything in a table says of itself.
#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    family: String,
    #[serde(default)]
    table: String,
    #[serde(default)]
    name: String,
}

fn sort<'t>(item: &'t RawValue, tables: &mut Tables<'t>) {
    let Ok(item) = serde_json::from_str::<BTreeMap<String, &RawValue>>(item.get()) else { return };
    let Some((what, body)) = item.into_iter().next() else { return };
    // What is of no table has no name.
    if !matches!(what.as_str(), "table" | "chain" | "set" | "map" | "rule") {
        return;
    }
    let Ok(Head { family, table, name }) = serde_json::from_str(body.get()) else { return };
    let id = (family, if what == "table" { name } else { table });
    let at = tables.iter().position(|(known, _)| *known == id).unwrap_or_else(|| {
        tables.push((id, Items::default()));
        tables.len() - 1
    });
    let (_, table) = &mut tables[at];
    match what.as_str() {
        "chain" => table.chains.push(body),
        "set" | "map" => table.sets.push(body),
        "rule" => table.rules.push(body),
        _ => {}
    }
}

fn read(body: &RawValue) -> Result<Value, serde_json::Error> {
    serde_json::from_str(body.get())
}

/// The rules' texts, one a line.
#[derive(Default)]
struct TextWriter(String);

/// The same, packed.
struct Texts(Writer);

impl TextWriter {
    /// Where the line stands.
    fn push(&mut self, line: &str) -> (u32, usize) {
        let start = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0.push_str(line);
        self.0.push('\n');
        (start, line.len())
    }

    fn finish(self) -> Texts {
        let mut writer = Writer::default();
        for block in blocks(&self.0) {
            writer.push(block);
        }
        Texts(writer)
    }
}

/// A table whose rules' texts are not packed yet.
struct Draft {
    name: Name,
    chains: Vec<(ChainRef, Option<Policy>, Option<Base>)>,
    sets: Vec<Set>,
    /// By chain.
    rules: Vec<Vec<DraftRule>>,
}

struct DraftRule {
    handle: u32,
    text: (u32, usize),
    statements: Statements,
}

impl Draft {
    fn table(self, texts: &Texts) -> Table {
        let chain = |((id, policy, base), rules): ((ChainRef, _, _), Vec<DraftRule>)| {
            let rule = |DraftRule { handle, text: (start, len), statements }| Rule {
                line: handle,
                text: texts.0.text(start, len),
                matches: Matches::new(),
                target: Target::Native(Box::new(statements)),
            };
            Chain { id, policy, base, rules: rules.into_iter().map(rule).collect(), numbered: true }
        };
        let chains = self.chains.into_iter().zip(self.rules).map(chain).collect();
        Table { name: self.name, chains, sets: self.sets }
    }
}

impl Drop for Texts {
    /// Lines can be read when all tables have theirs.
    fn drop(&mut self) {
        std::mem::take(&mut self.0).finish();
    }
}

fn draft(
    family: Family,
    name: &str,
    items: &Items<'_>,
    writer: &mut TextWriter,
    notes: &mut Notes,
) -> Result<Draft, serde_json::Error> {
    let name = Name::from(name);
    let text = |of: &Value, key: &str| Name::from(of.get(key).and_then(Value::as_str).unwrap_or_default());
    let id = |chain: &Value| ChainRef {
        flavour: Flavour::Nftables,
        family,
        table: name.clone(),
        chain: text(chain, "name"),
    };
    let chain = |body: &&RawValue| read(body).map(|chain| (id(&chain), policy(&chain), base(&chain)));
    let chains: Vec<_> = items.chains.iter().map(chain).collect::<Result<_, _>>()?;
    let mut scope = Scope {
        family,
        chains: (0..).zip(&chains).map(|(at, (id, ..))| (id.chain.clone(), at)).collect(),
        sets: HashMap::default(),
    };
    let mut sets: Vec<Set> = Vec::with_capacity(items.sets.len());
    for item in &items.sets {
        let (set, kinds) = set(&read(item)?, &scope, notes);
        scope.sets.insert(set.name.clone(), (sets.len() as u32, kinds));
        sets.push(set);
    }
    let mut rules: Vec<Vec<DraftRule>> = chains.iter().map(|_| Vec::new()).collect();
    for item in &items.rules {
        let item = &read(item)?;
        let chain = text(item, "chain");
        let Some(of_chain) = scope.chains.get(&chain).and_then(|at| rules.get_mut(*at as usize)) else {
            notes.add(0, format!("a rule of chain {} of table {name}, which is not listed", quote(&chain)));
            continue;
        };
        let said = text::rule(item);
        let statements = statements::read_rule(item, &scope);
        for statement in &statements.0 {
            if let Some(problem) = problem(statement) {
                notes.add(0, format!("table {name}, chain {chain}: {problem} is not understood in {}", quote(&said)));
            }
            if let Statement::Update { set, .. } = statement
                && let Some(set) = sets.get_mut(*set as usize)
            {
                set.dynamic = true;
            }
        }
        let handle = item.get("handle").and_then(Value::as_u64).and_then(|handle| u32::try_from(handle).ok());
        of_chain.push(DraftRule { handle: handle.unwrap_or(0), text: writer.push(&said), statements });
    }
    Ok(Draft { name, chains, sets, rules })
}

/// What of a statement the model knows nothing of but the name.
fn problem(statement: &Statement) -> Option<Name> {
    if let Statement::Unknown(what) = statement {
        return Some(what.clone());
    }
    let mut found = None;
    statement.walk(&mut |part| {
        if let crate::core::model::native::Expr::Unknown(what) = part {
            found = Some(what.clone());
        }
    });
    found
}

fn policy(chain: &Value) -> Option<Policy> {
    match chain.get("policy")?.as_str()? {
        "accept" => Some(Policy::Accept),
        "drop" => Some(Policy::Drop),
        _ => None,
    }
}

/// Where a base chain stands; `None` for a chain that is called, and for hooks that IP packets do not meet in a namespace's IP layer.
fn base(chain: &Value) -> Option<Base> {
    let kind = match chain.get("type")?.as_str()? {
        "nat" => BaseKind::Nat,
        "route" => BaseKind::Route,
        _ => BaseKind::Filter,
    };
    let hook = hook(chain.get("hook")?.as_str()?)?;
    let priority = i32::try_from(chain.get("prio")?.as_i64()?).ok()?;
    Some(Base { kind, hook, priority })
}

/// What the elements of a set are, and what those of a map lead to.
#[derive(Clone, Debug)]
struct Kinds {
    key: Vec<Kind>,
    data: Option<Vec<Kind>>,
}

fn set(item: &Value, scope: &Scope, notes: &mut Notes) -> (Set, Kinds) {
    let name = Name::from(item.get("name").and_then(Value::as_str).unwrap_or_default());
    let kinds = Kinds {
        key: item.get("type").map(constants::kinds).unwrap_or_default(),
        data: item.get("map").map(constants::kinds),
    };
    let is =
        |flag: &str| item.get("flags").and_then(Value::as_array).is_some_and(|all| all.iter().any(|one| one == flag));
    let mut set = Set::new(name, is("dynamic"));
    for element in item.get("elem").and_then(Value::as_array).into_iter().flatten() {
        if let Err(what) = insert(&mut set, element, &kinds, scope) {
            set.has_unknown = true;
            notes.add(0, format!("an element of set {} is not understood: {}", set.name, quote(&what.to_string())));
        }
    }
    (set, kinds)
}

/// Adds an element as it is listed: of a map, with what it leads to. The error is what was not understood.
fn insert<'v>(set: &mut Set, element: &'v Value, kinds: &Kinds, scope: &Scope) -> Result<(), &'v Value> {
    let (key, datum) = match (element, &kinds.data) {
        (Value::Array(pair), Some(data)) if pair.len() == 2 => {
            let datum = match expressions::verdict(&pair[1], scope) {
                Some(verdict) => Datum::Verdict(verdict),
                None => Datum::Parts(constants::parts(&pair[1], data).ok_or(&pair[1])?.into()),
            };
            (&pair[0], Some(datum))
        }
        (key, None) => (key, None),
        _ => return Err(element),
    };
    let plain = key.get("elem").and_then(|elem| elem.get("val")).unwrap_or(key);
    let comment = key.get("elem").and_then(|elem| elem.get("comment")?.as_str()).map(Name::from);
    let key = if plain == "*" { None } else { Some(constants::parts(plain, &kinds.key).ok_or(plain)?) };
    set.insert(key, datum, comment);
    Ok(())
}

#[cfg(test)]
mod tests;
