//! `iptables-save` text to a [`Ruleset`]: with or without counters, from either flavour, whole or torn.

use super::iptables_matches::Conditions;
use super::iptables_targets;
use super::words::Words;
use crate::core::model::dump::{self, Text};
use crate::core::model::flow::Family;
use crate::core::model::name::{Name, name};
use crate::core::model::rules::{Chain, Policy, Rule, Ruleset, Table, Target};
use crate::core::model::state::Diagnostic;
use crate::core::model::trace::{ChainRef, Flavour};
use foldhash::HashMap;

/// Diagnostics of one dump are listed up to this number; the rest is counted.
const MAX_DIAGNOSTICS: usize = 1000;

/// Reads a dump. `source` names it in diagnostics. Never fails: what is not understood is reported with its line, an option
/// that is not known stays in its rule as an unknown match, and the rest is kept.
pub fn parse(text: &str, source: &str, flavour: Flavour, family: Family) -> (Ruleset, Vec<Diagnostic>) {
    let mut reader = Reader::new(source, 0, flavour, family);
    dump::blocks(text).for_each(|block| reader.block(block));
    reader.finish()
}

/// Reads a dump as it comes, block by block.
pub struct Reader {
    flavour: Flavour,
    family: Family,
    /// Lines so far.
    lines: usize,
    text: dump::Writer,
    problems: Problems,
    tables: Vec<Table>,
    open: Option<OpenTable>,
    is_too_large: bool,
}

/// Diagnostics with a ceiling.
pub(super) struct Problems {
    source: String,
    list: Vec<Diagnostic>,
    more: usize,
}

impl Problems {
    pub(super) fn add(&mut self, line: usize, message: String) {
        if self.list.len() < MAX_DIAGNOSTICS {
            self.list.push(Diagnostic { source: self.source.clone(), line, message });
        } else {
            self.more += 1;
        }
    }

    fn finish(mut self) -> Vec<Diagnostic> {
        if self.more > 0 {
            let message = format!("{} more lines were not understood", self.more);
            self.list.push(Diagnostic { source: self.source.clone(), line: 0, message });
        }
        self.list
    }
}

/// A table whose `COMMIT` was not seen yet.
struct OpenTable {
    table: Table,
    /// What its chains' places have in common.
    id: ChainRef,
    index: HashMap<Name, u32>,
    /// The chain of the last rule; rules of one chain stand together.
    last: Option<(Name, u32)>,
    /// The rules of that chain so far.
    pending: Vec<Rule>,
    /// Jumps to names that were not declared when they were read.
    dangling: Vec<Dangling>,
    implicit: bool,
}

struct Dangling {
    chain: u32,
    rule: u32,
    line: usize,
    /// By `-g`.
    goes: bool,
}

impl Reader {
    /// `source` names the dump in diagnostics, in which so many lines come `before`.
    pub fn new(source: &str, before: usize, flavour: Flavour, family: Family) -> Self {
        Self {
            flavour,
            family,
            lines: before,
            text: dump::Writer::default(),
            problems: Problems { source: source.to_owned(), list: Vec::new(), more: 0 },
            tables: Vec::new(),
            open: None,
            is_too_large: false,
        }
    }

    /// The next block of whole lines.
    pub fn block(&mut self, block: &str) {
        if self.is_too_large {
            return;
        }
        let Some(mut start) = self.text.push(block) else {
            self.is_too_large = true;
            return self.problems.add(self.lines, "larger than 4 GiB: what follows is not read".into());
        };
        let mut conditions = Conditions::new(self.family);
        for line in block.split_inclusive('\n') {
            self.lines += 1;
            self.line(&mut conditions, start, line);
            start += line.len() as u32;
        }
    }

    /// What was read.
    pub fn finish(mut self) -> (Ruleset, Vec<Diagnostic>) {
        self.close(false);
        self.text.finish();
        (Ruleset { flavour: self.flavour, family: self.family, tables: self.tables }, self.problems.finish())
    }

    fn line<'b>(&mut self, conditions: &mut Conditions<'b>, start: u32, line: &'b str) {
        let number = self.lines;
        let content = line.trim_ascii();
        let offset = start + (line.len() - line.trim_ascii_start().len()) as u32;
        match content.as_bytes().first() {
            None | Some(b'#') => {}
            Some(b'*') => self.open_table(number, content[1..].trim_ascii(), false),
            Some(b':') => self.declare(number, &content[1..]),
            Some(b'[' | b'-') => self.rule_line(conditions, offset, content),
            _ if content == "COMMIT" => self.close(true),
            _ => self.problems.add(number, format!("not a line of iptables-save: {:?}", clip(content))),
        }
    }

    fn open_table(&mut self, number: usize, name: &str, implicit: bool) {
        self.close(false);
        if !matches!(name, "raw" | "mangle" | "nat" | "filter" | "security") {
            self.problems.add(
                number,
                format!("table {:?} is not one of iptables: its rules are kept but never used", clip(name)),
            );
        } else if self.tables.iter().any(|table| table.name == name) {
            self.problems
                .add(number, format!("table {name} appears a second time: both are kept, the first runs first"));
        }
        self.open = Some(OpenTable::new(name, self.flavour, self.family, implicit));
    }

    fn declare(&mut self, number: usize, content: &str) {
        let mut words = content.split_ascii_whitespace();
        let (Some(name), policy) = (words.next(), words.next().unwrap_or("-")) else {
            return self.problems.add(number, "a chain without a name".into());
        };
        if !may_be_chain(name) {
            return self.problems.add(number, format!("{:?} is a target and cannot be a chain: left out", clip(name)));
        }
        let policy = match policy {
            "ACCEPT" => Some(Policy::Accept),
            "DROP" => Some(Policy::Drop),
            "-" => None,
            other => {
                self.problems.add(number, format!("policy {:?} is not ACCEPT, DROP or -", clip(other)));
                None
            }
        };
        let open = self.table_for(number);
        let (_, chain) = open.chain(name);
        chain.policy = policy;
    }

    /// The open table; a rule or chain before any `*table` line opens `filter`, as iptables does without `-t`.
    fn table_for(&mut self, number: usize) -> &mut OpenTable {
        if self.open.is_none() {
            self.problems.add(number, "no *table line before this: taken as table filter".into());
            self.open_table(number, "filter", true);
        }
        self.open.get_or_insert_with(|| OpenTable::new("filter", self.flavour, self.family, true))
    }

    fn rule_line<'b>(&mut self, conditions: &mut Conditions<'b>, offset: u32, content: &'b str) {
        let number = self.lines;
        let skipped = match counters(content) {
            Some((_, skipped)) => skipped,
            None => return self.problems.add(number, format!("counters without an end: {:?}", clip(content))),
        };
        let rule = &content[skipped..];
        let mut words = Words::new(rule);
        match (words.next(), words.next().filter(|chain| may_be_chain(chain))) {
            (Some("-A" | "--append"), Some(chain)) => {
                let text = self.text.text(offset + skipped as u32, rule.len());
                self.rule(conditions, chain, words, rule, text);
            }
            (Some("-N" | "--new-chain"), Some(chain)) => drop(self.table_for(number).chain(chain)),
            (Some("-P" | "--policy"), Some(chain)) => {
                let policy = if words.next() == Some("DROP") { Policy::Drop } else { Policy::Accept };
                self.table_for(number).chain(chain).1.policy = Some(policy);
            }
            _ => self.problems.add(number, format!("not a rule: {:?}", clip(content))),
        }
    }

    fn rule<'b>(&mut self, conditions: &mut Conditions<'b>, chain: &str, words: Words<'b>, line: &'b str, text: Text) {
        let number = self.lines;
        let rest = conditions.read(line, words);
        let goes = matches!(rest, Some(("-g" | "--goto", _)));
        let target = match rest {
            Some(rest) => {
                let open = self.table_for(number);
                iptables_targets::read(rest, line, &open.index)
            }
            None => Ok(Target::None),
        };
        let (matches, complaints) = conditions.take();
        for complaint in complaints {
            self.problems.add(number, complaint);
        }
        let target = target.unwrap_or_else(|complaint| {
            self.problems.add(number, complaint);
            Target::Stop("a target that could not be read".into())
        });
        let rule = Rule { line: u32::try_from(number).unwrap_or(u32::MAX), text, matches, target };
        let undeclared = self.table_for(number).push(number, chain, rule, goes);
        if undeclared {
            self.problems.add(number, format!("rule of chain {:?}, which is not declared", clip(chain)));
        }
    }

    fn close(&mut self, committed: bool) {
        let Some(mut open) = self.open.take() else { return };
        open.flush();
        if !committed && !open.implicit {
            let message =
                format!("table {} has no COMMIT: the dump is torn or mixed, what was read is kept", open.table.name);
            self.problems.add(0, message);
        }
        for dangling in std::mem::take(&mut open.dangling) {
            if let Some(name) = open.settle(&dangling) {
                let table = &open.table.name;
                let message =
                    format!("-j {name:?}: neither a chain of table {table} nor a target that porttrace knows");
                self.problems.add(dangling.line, message);
            }
        }
        open.table.chains.iter_mut().for_each(|chain| chain.rules.shrink_to_fit());
        open.table.chains.shrink_to_fit();
        self.tables.push(open.table);
    }
}

impl OpenTable {
    fn new(name: &str, flavour: Flavour, family: Family, implicit: bool) -> Self {
        let name = table_name(name);
        Self {
            table: Table { name: name.clone(), chains: Vec::new(), sets: Vec::new() },
            id: ChainRef { flavour, family, table: name, chain: Name::default() },
            index: HashMap::default(),
            last: None,
            pending: Vec::new(),
            dangling: Vec::new(),
            implicit,
        }
    }

    /// The chain, and whether it is new.
    fn chain(&mut self, name: &str) -> (bool, &mut Chain) {
        self.flush();
        let next = self.table.chains.len() as u32;
        let (name, index, fresh) = match self.index.get_key_value(name) {
            Some((name, &index)) => (name.clone(), index, false),
            None => {
                let name = Name::from(name);
                self.index.insert(name.clone(), next);
                let id = ChainRef { chain: name.clone(), ..self.id.clone() };
                self.table.chains.push(Chain { id, policy: None, base: None, rules: Vec::new(), numbered: true });
                (name, next, true)
            }
        };
        self.last = Some((name, index));
        (fresh, &mut self.table.chains[index as usize])
    }

    /// Appends the rule; true when its chain was not declared.
    fn push(&mut self, line: usize, name: &str, rule: Rule, goes: bool) -> bool {
        let (index, fresh) = match &self.last {
            Some((last, index)) if *last == name => (*index, false),
            _ => {
                let (fresh, _) = self.chain(name);
                (self.last.as_ref().map_or(0, |(_, index)| *index), fresh)
            }
        };
        if matches!(rule.target, Target::Missing(_)) {
            let before = self.table.chains.get(index as usize).map_or(0, |chain| chain.rules.len());
            let rule = (before + self.pending.len()) as u32;
            self.dangling.push(Dangling { chain: index, rule, line, goes });
        }
        self.pending.push(rule);
        fresh
    }

    /// Hands the pending rules to their chain, which then holds no more memory than they need.
    fn flush(&mut self) {
        let Some((_, index)) = &self.last else { return };
        if let Some(chain) = self.table.chains.get_mut(*index as usize) {
            if chain.rules.is_empty() {
                chain.rules.reserve_exact(self.pending.len());
            }
            chain.rules.append(&mut self.pending);
        }
    }

    /// A jump to a chain that was declared later finds it now; otherwise its name is returned.
    fn settle(&mut self, at: &Dangling) -> Option<String> {
        let rule = self.table.chains.get_mut(at.chain as usize)?.rules.get_mut(at.rule as usize)?;
        let Target::Missing(name) = &rule.target else { return None };
        let Some(&found) = self.index.get(&**name) else { return Some(clip(name).to_owned()) };
        rule.target = if at.goes { Target::Goto(found) } else { Target::Jump(found) };
        None
    }
}

/// The names that all nodes have are not counted.
fn table_name(name: &str) -> Name {
    match name {
        "raw" => name!("raw"),
        "mangle" => name!("mangle"),
        "nat" => name!("nat"),
        "filter" => name!("filter"),
        "security" => name!("security"),
        other => Name::from(other),
    }
}

/// `[packets:bytes]` at the start of a line and how many bytes it takes; `None` when it is torn.
pub(in crate::core) fn counters(content: &str) -> Option<(Option<(u64, u64)>, usize)> {
    if content.starts_with("[0:0] -") {
        return Some((Some((0, 0)), 6));
    }
    let Some(inner) = content.strip_prefix('[') else { return Some((None, 0)) };
    let end = inner.find(']')?;
    let (packets, bytes) = inner[..end].split_once(':')?;
    let counters = packets.parse().ok().zip(bytes.parse().ok());
    let after = &inner[end + 1..];
    Some((counters, content.len() - after.trim_ascii_start().len()))
}

/// No chain has the name of a target or a blank in it (`assert_valid_chain_name` in iptables' xshared.c). Torn dumps have both:
/// a torn quote makes several words look like one.
fn may_be_chain(name: &str) -> bool {
    let blank = name.contains('"') && name.contains(|c: char| c.is_ascii_whitespace());
    !blank && !iptables_targets::is_target(name)
}

/// Enough of a text to recognise it in a message.
pub(super) fn clip(text: &str) -> &str {
    match text.char_indices().nth(80) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

#[cfg(test)]
#[path = "iptables_tests.rs"]
mod tests;
