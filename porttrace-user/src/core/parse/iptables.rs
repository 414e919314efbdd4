//! `iptables-save` text to a [`Ruleset`]: with or without counters, from either flavour, whole or torn.

use super::iptables_matches::Conditions;
use super::iptables_targets;
use super::words::Words;
use crate::core::model::flow::Family;
use crate::core::model::name::{Name, Text};
use crate::core::model::rules::{Chain, Policy, Rule, Ruleset, Table, Target};
use crate::core::model::state::Diagnostic;
use crate::core::model::trace::Flavour;
use foldhash::HashMap;
use memchr::memchr_iter;

/// Diagnostics of one dump are listed up to this number; the rest is counted.
const MAX_DIAGNOSTICS: usize = 1000;

/// Reads a dump. `source` names it in diagnostics. Never fails: what is not understood is reported with its line, an option
/// that is not known stays in its rule as an unknown match, and the rest is kept.
pub fn parse(text: &str, source: &str, flavour: Flavour, family: Family) -> (Ruleset, Vec<Diagnostic>) {
    parse_whole(Name::from(text), source, flavour, family)
}

/// As [`parse`], of a text that the rules may keep: large dumps are not copied.
pub fn parse_whole(text: Name, source: &str, flavour: Flavour, family: Family) -> (Ruleset, Vec<Diagnostic>) {
    let mut problems = Problems { source, list: Vec::new(), more: 0 };
    let whole = if u32::try_from(text.len()).is_ok() {
        text
    } else {
        problems.add(0, "larger than 4 GiB: not read".into());
        Name::default()
    };
    let conditions = Conditions::new(family);
    let mut dump = Dump { text: &whole, conditions, problems: &mut problems, tables: Vec::new(), open: None };
    let mut start = 0;
    let ends = memchr_iter(b'\n', whole.as_bytes()).map(|end| end + 1).chain([whole.len()]);
    for (number, end) in ends.enumerate() {
        if let Some(line) = whole.get(start..end) {
            dump.line(number + 1, start, line);
        }
        start = end;
    }
    dump.close(false);
    let tables = dump.tables;
    (Ruleset { flavour, family, tables, text: whole.clone() }, problems.finish())
}

/// Diagnostics with a ceiling.
pub(super) struct Problems<'a> {
    source: &'a str,
    list: Vec<Diagnostic>,
    more: usize,
}

impl Problems<'_> {
    pub(super) fn add(&mut self, line: usize, message: String) {
        if self.list.len() < MAX_DIAGNOSTICS {
            self.list.push(Diagnostic { source: self.source.into(), line, message });
        } else {
            self.more += 1;
        }
    }

    fn finish(mut self) -> Vec<Diagnostic> {
        if self.more > 0 {
            let message = format!("{} more lines were not understood", self.more);
            self.list.push(Diagnostic { source: self.source.into(), line: 0, message });
        }
        self.list
    }
}

struct Dump<'t, 'p, 's> {
    text: &'t Name,
    conditions: Conditions<'t>,
    problems: &'p mut Problems<'s>,
    tables: Vec<Table>,
    open: Option<OpenTable<'t>>,
}

/// A table whose `COMMIT` was not seen yet.
struct OpenTable<'t> {
    table: Table,
    index: HashMap<&'t str, u32>,
    /// The chain of the last rule and its rules so far: rules of one chain stand together.
    last: Option<(&'t str, u32)>,
    pending: Vec<Rule>,
    /// Jumps to names that were not declared when they were read: chain, rule, line.
    dangling: Vec<(u32, u32, usize)>,
    implicit: bool,
}

impl<'t> Dump<'t, '_, '_> {
    fn line(&mut self, number: usize, start: usize, line: &'t str) {
        let content = line.trim_ascii();
        let offset = start + line.len() - line.trim_ascii_start().len();
        match content.as_bytes().first() {
            None | Some(b'#') => {}
            Some(b'*') => self.open_table(number, content[1..].trim_ascii(), false),
            Some(b':') => self.declare(number, &content[1..]),
            Some(b'[' | b'-') => self.rule_line(number, offset, content),
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
        let table = Table { name: name.into(), chains: Vec::new() };
        self.open = Some(OpenTable {
            table,
            index: HashMap::default(),
            last: None,
            pending: Vec::new(),
            dangling: Vec::new(),
            implicit,
        });
    }

    fn declare(&mut self, number: usize, content: &'t str) {
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
    fn table_for(&mut self, number: usize) -> &mut OpenTable<'t> {
        if self.open.is_none() {
            self.problems.add(number, "no *table line before this: taken as table filter".into());
            self.open_table(number, "filter", true);
        }
        let filter = || Table { name: "filter".into(), chains: Vec::new() };
        self.open.get_or_insert_with(|| OpenTable {
            table: filter(),
            index: HashMap::default(),
            last: None,
            pending: Vec::new(),
            dangling: Vec::new(),
            implicit: true,
        })
    }

    fn rule_line(&mut self, number: usize, offset: usize, content: &'t str) {
        let (counters, skipped) = match counters(content) {
            Some(read) => read,
            None => return self.problems.add(number, format!("counters without an end: {:?}", clip(content))),
        };
        let rule = &content[skipped..];
        let mut words = Words::new(rule);
        match (words.next(), words.next().filter(|chain| may_be_chain(chain))) {
            (Some("-A" | "--append"), Some(chain)) => {
                let text = Text::of(self.text, offset + skipped, rule.len());
                self.rule(number, chain, words, rule, counters, text);
            }
            (Some("-N" | "--new-chain"), Some(chain)) => drop(self.table_for(number).chain(chain)),
            (Some("-P" | "--policy"), Some(chain)) => {
                let policy = if words.next() == Some("DROP") { Policy::Drop } else { Policy::Accept };
                self.table_for(number).chain(chain).1.policy = Some(policy);
            }
            _ => self.problems.add(number, format!("not a rule: {:?}", clip(content))),
        }
    }

    fn rule(
        &mut self,
        number: usize,
        chain: &'t str,
        words: Words<'t>,
        line: &'t str,
        counters: Option<(u64, u64)>,
        text: Text,
    ) {
        let rest = self.conditions.read(line, words);
        let target = match rest {
            Some(rest) => {
                let open = self.table_for(number);
                iptables_targets::read(rest, line, &open.index)
            }
            None => Ok(Target::None),
        };
        let (matches, complaints) = self.conditions.take();
        for complaint in complaints {
            self.problems.add(number, complaint);
        }
        let target = target.unwrap_or_else(|complaint| {
            self.problems.add(number, complaint);
            Target::Stop("a target that could not be read".into())
        });
        let rule = Rule { line: u32::try_from(number).unwrap_or(u32::MAX), counters, text, matches, target };
        let undeclared = self.table_for(number).push(number, chain, rule);
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
        for (chain, rule, line) in std::mem::take(&mut open.dangling) {
            if let Some(name) = open.settle(chain, rule) {
                let table = &open.table.name;
                let message =
                    format!("-j {name:?}: neither a chain of table {table} nor a target that porttrace knows");
                self.problems.add(line, message);
            }
        }
        open.table.chains.iter_mut().for_each(|chain| chain.rules.shrink_to_fit());
        self.tables.push(open.table);
    }
}

impl<'t> OpenTable<'t> {
    fn chain(&mut self, name: &'t str) -> (bool, &mut Chain) {
        self.flush();
        let next = self.table.chains.len() as u32;
        let (index, fresh) = match self.index.get(name) {
            Some(&index) => (index, false),
            None => {
                self.index.insert(name, next);
                self.table.chains.push(Chain { name: name.into(), policy: None, rules: Vec::new(), numbered: true });
                (next, true)
            }
        };
        self.last = Some((name, index));
        (fresh, &mut self.table.chains[index as usize])
    }

    /// Appends the rule; true when its chain was not declared.
    fn push(&mut self, number: usize, name: &'t str, rule: Rule) -> bool {
        let (index, fresh) = match self.last {
            Some((last, index)) if last == name => (index, false),
            _ => {
                let (fresh, _) = self.chain(name);
                (self.last.map_or(0, |(_, index)| index), fresh)
            }
        };
        if matches!(rule.target, Target::Missing(_)) {
            let before = self.table.chains.get(index as usize).map_or(0, |chain| chain.rules.len());
            self.dangling.push((index, (before + self.pending.len()) as u32, number));
        }
        self.pending.push(rule);
        fresh
    }

    /// Hands the pending rules to their chain, which then holds no more memory than they need.
    fn flush(&mut self) {
        let Some((_, index)) = self.last else { return };
        if let Some(chain) = self.table.chains.get_mut(index as usize) {
            if chain.rules.is_empty() {
                chain.rules.reserve_exact(self.pending.len());
            }
            chain.rules.append(&mut self.pending);
        }
    }

    /// A jump to a chain that was declared later finds it now; otherwise its name is returned.
    fn settle(&mut self, chain: u32, rule: u32) -> Option<String> {
        let rule = self.table.chains.get_mut(chain as usize)?.rules.get_mut(rule as usize)?;
        let Target::Missing(name) = &rule.target else { return None };
        let Some(&found) = self.index.get(&**name) else { return Some(clip(name).to_owned()) };
        let goes = Words::new(&rule.text).any(|word| matches!(word, "-g" | "--goto"));
        rule.target = if goes { Target::Goto(found) } else { Target::Jump(found) };
        None
    }
}

/// `[packets:bytes]` at the start of a line and how many bytes it takes; `None` when it is torn.
fn counters(content: &str) -> Option<(Option<(u64, u64)>, usize)> {
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
