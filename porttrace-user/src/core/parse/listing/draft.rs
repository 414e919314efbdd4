//! Lines of a paste, gathered into tables of chains.

use super::row::{self, Row};
use crate::core::model::state::Diagnostic;

/// One line, recognised.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// `$ sudo iptables -t nat -nvL`
    Command {
        table: &'a str,
        v6: bool,
    },
    /// `Chain X (policy …)` or `(n references)`
    Header {
        chain: &'a str,
        policy: Option<&'a str>,
    },
    Row(Row<'a>),
    /// `-A X …` of `-S` or of a grepped `iptables-save`
    Append {
        chain: &'a str,
        body: &'a str,
        counters: Option<(u64, u64)>,
    },
    /// `-P X ACCEPT`, `-N X`
    Declare {
        chain: &'a str,
        policy: Option<&'a str>,
    },
    /// Column titles, fences, blank lines, comments
    Nothing,
}

impl<'a> Line<'a> {
    pub fn read(line: &'a str) -> Option<Self> {
        let line = strip_quoting(line.trim_end());
        let start = line.trim_start();
        let titles = start.contains("target") && start.contains("prot") && start.contains("opt");
        if start.is_empty() || start.starts_with("```") || start == "--" || start == "COMMIT" || titles {
            return Some(Self::Nothing);
        }
        if let Some(command) = command(start) {
            return Some(command);
        }
        if let Some(rest) = start.strip_prefix("Chain ") {
            return header(rest);
        }
        if start.starts_with('#') {
            return Some(Self::Nothing);
        }
        saved(start).or_else(|| row::parse(line).map(Self::Row))
    }

    pub fn is_rule_or_chain(&self) -> bool {
        !matches!(self, Self::Nothing | Self::Command { .. })
    }
}

/// Mail quoting (`> `) and `grep -n` numbers (`76:`).
fn strip_quoting(line: &str) -> &str {
    let line = line.strip_prefix("> ").unwrap_or(line);
    match line.split_once(':') {
        Some((number, rest)) if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => rest,
        _ => line,
    }
}

/// A pasted command line names table and family for what follows.
fn command(line: &str) -> Option<Line<'_>> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let at = words.iter().take(8).position(|word| {
        let name = word.rsplit('/').next().unwrap_or(word);
        matches!(
            name,
            "iptables" | "ip6tables" | "iptables-nft" | "ip6tables-nft" | "iptables-legacy" | "ip6tables-legacy"
        )
    })?;
    let rest = &words[at + 1..];
    let lists = rest.iter().any(|word| word.starts_with('-') && word.contains(['L', 'S']));
    if !lists {
        return None;
    }
    let table = rest.iter().enumerate().find_map(|(i, word)| match *word {
        "-t" | "--table" => rest.get(i + 1).copied(),
        word => word.strip_prefix("--table=").or_else(|| word.strip_prefix("-t").filter(|table| !table.is_empty())),
    });
    Some(Line::Command { table: table.unwrap_or("filter"), v6: words[at].contains("ip6") })
}

/// `X (policy ACCEPT 0 packets, 0 bytes)`, `X (2 references)`, or just `X`.
fn header(rest: &str) -> Option<Line<'_>> {
    let (chain, detail) = rest.split_once(' ').unwrap_or((rest, ""));
    let policy = detail.trim().strip_prefix("(policy ").and_then(|policy| policy.split([' ', ')']).next());
    (!chain.is_empty()).then_some(Line::Header { chain, policy })
}

/// `-A`, `-P`, `-N`, and `-A` with counters in front or (from `-vS`) behind.
fn saved(line: &str) -> Option<Line<'_>> {
    let (counters, line) = match line.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((numbers, rest)) => {
            let (packets, bytes) = numbers.split_once(':')?;
            (Some((packets.parse().ok()?, bytes.parse().ok()?)), rest.trim_start())
        }
        None => (None, line),
    };
    let (verb, rest) = line.split_once(' ')?;
    let rest = rest.trim_start();
    let (chain, body) = rest.split_once(' ').unwrap_or((rest, ""));
    if chain.is_empty() {
        return None;
    }
    Some(match verb {
        "-A" => Line::Append { chain, body, counters },
        "-P" => Line::Declare { chain, policy: Some(body.split(' ').next()?) },
        "-N" => Line::Declare { chain, policy: None },
        _ => return None,
    })
}

/// A rule on its way to a chain.
#[derive(Debug)]
pub(super) struct Entry {
    pub line: u32,
    /// Its number in the chain, where the listing says so.
    pub number: Option<u32>,
    pub counters: Option<(u64, u64)>,
    /// The rule as `iptables-save` writes it, without `-A CHAIN`.
    pub body: String,
    pub target: String,
}

#[derive(Debug, Default)]
pub(super) struct Chain {
    pub name: String,
    pub policy: Option<String>,
    pub entries: Vec<Entry>,
}

/// One table of one family; rows without a chain are `loose`.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub named: Option<String>,
    /// By a command line or by its addresses.
    pub v6: Option<bool>,
    pub chains: Vec<Chain>,
    pub loose: Vec<Entry>,
    /// Some rows had no interface columns.
    pub narrow: bool,
}

pub(super) const BUILTIN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

impl Table {
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.loose.is_empty()
    }

    fn chain(&mut self, name: &str) -> &mut Chain {
        let index = self.chains.iter().rposition(|chain| chain.name == name).unwrap_or_else(|| {
            self.chains.push(Chain { name: name.to_owned(), ..Chain::default() });
            self.chains.len() - 1
        });
        &mut self.chains[index]
    }

    /// Whether a header for the built-in chain `name` must belong to another table: built-in chains are listed first and in
    /// hook order (very old kernels list nat's POSTROUTING before OUTPUT).
    fn ends_before(&self, name: &str) -> bool {
        let place = |name: &str| BUILTIN.iter().position(|builtin| *builtin == name);
        let Some(new) = place(name) else { return false };
        let Some(last) = self.chains.last() else { return false };
        let Some(old) = place(&last.name) else { return true };
        let old_nat = last.name == "POSTROUTING" && name == "OUTPUT" && self.chains.len() == 2;
        (old >= new && !old_nat) || self.chains.iter().any(|chain| chain.name == name)
    }
}

/// Reads a paste line by line.
#[derive(Debug, Default)]
pub(super) struct Reader {
    tables: Vec<Table>,
    table: Table,
    /// The chain whose header came last.
    chain: Option<String>,
    diagnostics: Vec<Diagnostic>,
}

impl Reader {
    pub fn line(&mut self, text: &str, number: u32, source: &str) {
        let Some(line) = Line::read(text) else {
            self.say(source, number, format!("not understood, left out: {}", shorten(text.trim())));
            return;
        };
        match line {
            Line::Nothing => {}
            Line::Command { table, v6 } => {
                self.close();
                (self.table.named, self.table.v6) = (Some(table.to_owned()), Some(v6));
            }
            Line::Header { chain, policy } => {
                self.begin(chain, policy);
                self.chain = Some(chain.to_owned());
            }
            Line::Declare { chain, policy } => self.begin(chain, policy),
            Line::Append { chain, body, counters } => self.append(chain, body, counters, number),
            Line::Row(row) => self.row(&row, number, source),
        }
    }

    pub fn finish(mut self, source: &str) -> (Vec<Table>, Vec<Diagnostic>) {
        self.close();
        if self.tables.is_empty() {
            self.say(source, 0, "no rule and no chain found".to_owned());
        }
        (self.tables, self.diagnostics)
    }

    fn say(&mut self, source: &str, line: u32, message: String) {
        self.diagnostics.push(Diagnostic { source: source.to_owned(), line: line as usize, message });
    }

    fn close(&mut self) {
        let table = std::mem::take(&mut self.table);
        self.chain = None;
        if !table.is_empty() {
            self.tables.push(table);
        }
    }

    fn begin(&mut self, chain: &str, policy: Option<&str>) {
        if self.table.ends_before(chain) {
            let (named, v6) = (self.table.named.take(), self.table.v6);
            self.close();
            // A command's listing is one table: a second one came from somewhere else, most likely of the same family.
            self.table.v6 = v6.filter(|_| named.is_some());
        }
        let chain = self.table.chain(chain);
        chain.policy = policy.filter(|policy| *policy != "-").map(str::to_owned).or(chain.policy.take());
    }

    fn append(&mut self, chain: &str, body: &str, counters: Option<(u64, u64)>, line: u32) {
        let (body, behind) = split_counters(body);
        let target = body.rfind("-j ").or_else(|| body.rfind("-g ")).map_or("", |at| &body[at + 3..]);
        let target = target.split(' ').next().unwrap_or_default().to_owned();
        let v6 = body.split(' ').any(|word| row::is_address(word) && word.contains(':'));
        if v6 {
            self.table.v6 = Some(true);
        }
        let entry = Entry { line, number: None, counters: counters.or(behind), body, target };
        self.table.chain(chain).entries.push(entry);
    }

    fn row(&mut self, row: &Row<'_>, line: u32, source: &str) {
        let v6 = row.source.contains(':') || row.destination.contains(':');
        let known = v6 || row.source.contains('.') || row.destination.contains('.');
        match self.table.v6 {
            Some(table) if known && table != v6 => {
                let message = "an IPv6 and an IPv4 rule in one table: this one is left out".to_owned();
                return self.say(source, line, message);
            }
            None if known => self.table.v6 = Some(v6),
            _ => {}
        }
        self.table.narrow |= row.interfaces.is_none();
        let (body, unknown) = super::emit::rule_body(row, self.table.v6 == Some(true));
        for text in unknown {
            self.say(source, line, format!("a match that is not understood: {}", shorten(&text)));
        }
        let target = row.target.unwrap_or_default().to_owned();
        let entry = Entry { line, number: row.number, counters: row.counters, body, target };
        match &self.chain {
            Some(chain) => self.table.chain(&chain.clone()).entries.push(entry),
            None => self.table.loose.push(entry),
        }
    }
}

/// `-vS` prints `-c PACKETS BYTES` before the target.
fn split_counters(body: &str) -> (String, Option<(u64, u64)>) {
    let Some(at) = body.find("-c ").filter(|at| *at == 0 || body.as_bytes()[at - 1] == b' ') else {
        return (body.to_owned(), None);
    };
    let mut words = body[at + 3..].splitn(3, ' ');
    let number = |word: Option<&str>| word.and_then(|word| word.parse::<u64>().ok());
    match (number(words.next()), number(words.next())) {
        (Some(packets), Some(bytes)) => {
            let rest = words.next().unwrap_or_default();
            (format!("{}{rest}", &body[..at]).trim_end().to_owned(), Some((packets, bytes)))
        }
        _ => (body.to_owned(), None),
    }
}

fn shorten(text: &str) -> String {
    if text.chars().count() <= 80 { text.to_owned() } else { text.chars().take(79).chain(['…']).collect() }
}
