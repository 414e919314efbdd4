//! Tables of a paste as `iptables-save` text.

use super::draft::{BUILTIN, Chain, Entry, Table};
use super::row::Row;
use super::{LOOSE, LOOSE_POST, Translated};
use super::{phrase, place};
use crate::core::model::flow::{Family, Proto};
use std::collections::{BTreeMap, BTreeSet};

/// Rows that were grepped away are replaced by rules that match nothing, so that numbers stay right; at most this many.
const MAX_FILLERS: usize = 200_000;

/// A row as `iptables-save` writes it, without `-A CHAIN`; and the stretches that could not be read, which become
/// a match of the module `listed`, unknown to every parser.
pub(super) fn rule_body(row: &Row<'_>, v6: bool) -> (String, Vec<String>) {
    let mut words: Vec<String> = Vec::new();
    let mut option = |name: &str, value: &str, any: &[&str]| {
        let (not, value) = value.strip_prefix('!').map_or(("", value), |value| ("! ", value));
        if not == "! " || !any.contains(&value) {
            words.push(format!("{not}{name} {value}"));
        }
    };
    option("-s", &address(row.source, v6), &["0.0.0.0/0", "::/0"]);
    option("-d", &address(row.destination, v6), &["0.0.0.0/0", "::/0"]);
    if let Some((input, output)) = row.interfaces {
        option("-i", input, &["*", "any"]);
        option("-o", output, &["*", "any"]);
    }
    option("-p", &proto(row.proto), &["all", "0"]);
    words.extend(row.fragment.map(|yes| if yes { "-f".to_owned() } else { "! -f".to_owned() }));
    let phrases = phrase::parse(row.rest, row.target, v6);
    words.extend(phrases.matches);
    words.extend(phrases.unknown.iter().map(|text| format!("-m listed --listed {}", phrase::quote(text))));
    if let Some(target) = row.target {
        words.push(format!("{} {target}", if phrases.goto { "-g" } else { "-j" }));
    }
    words.extend(phrases.target.into_iter().filter(|options| !options.is_empty()));
    (words.join(" "), phrases.unknown)
}

/// `iptables-save` always writes the prefix length; `-L` leaves out a full one.
fn address(text: &str, v6: bool) -> String {
    let (not, address) = text.strip_prefix('!').map_or(("", text), |address| ("!", address));
    let full = if v6 { 128 } else { 32 };
    match address {
        "anywhere" => format!("{not}{}", if v6 { "::/0" } else { "0.0.0.0/0" }),
        "localhost" => format!("{not}{}/{full}", if v6 { "::1" } else { "127.0.0.1" }),
        address if address.contains('/') => format!("{not}{address}"),
        address => format!("{not}{address}/{full}"),
    }
}

/// iptables 1.8.9 prints protocol numbers with `-n`, others print names.
fn proto(text: &str) -> String {
    let (not, name) = text.strip_prefix('!').map_or(("", text), |name| ("!", name));
    let name = match name.parse::<u8>().map(Proto::from_number) {
        Ok(Proto::Icmpv6) => "ipv6-icmp".to_owned(),
        Ok(Proto::Other(_)) | Err(_) => name.to_owned(),
        Ok(known) => known.to_string(),
    };
    format!("{not}{name}")
}

/// All tables of one family as one dump; `None` when there is none.
pub(super) fn family(tables: &[Table], family: Family) -> Option<Translated> {
    let mut mine: Vec<(String, &Table)> = Vec::new();
    let mut out = Writer::new(family);
    let mut last = false;
    for table in tables {
        last = table.v6.unwrap_or(last);
        if last != (family == Family::V6) {
            continue;
        }
        let (name, sure) = table_name(table);
        if !sure {
            out.missing.push(format!(
                "the paste does not say which table it is from; taken for {name} by its chains and targets"
            ));
        }
        mine.push((name, table));
    }
    if mine.is_empty() {
        return None;
    }
    for name in ["raw", "mangle", "nat", "filter", "security"] {
        let tables: Vec<&Table> = mine.iter().filter(|(table, _)| table == name).map(|(_, table)| *table).collect();
        if !tables.is_empty() {
            out.table(name, &tables);
        }
    }
    Some(out.finish())
}

/// The table's name, and whether it is certain.
fn table_name(table: &Table) -> (String, bool) {
    if let Some(name) = &table.named {
        return (name.clone(), true);
    }
    let has = |name: &str| table.chains.iter().any(|chain| chain.name == name);
    let builtin = BUILTIN.map(has);
    let by_targets = by_targets(table);
    match builtin {
        [true, true, true, true, true] => ("mangle".to_owned(), true),
        [true, _, false, true, true] => ("nat".to_owned(), true),
        [false, true, true, true, false] if by_targets != Some("security") => ("filter".to_owned(), true),
        [true, false, false, true, false] if by_targets.is_none_or(|table| table == "raw") => ("raw".to_owned(), true),
        _ => match by_targets {
            Some(name) => (name.to_owned(), true),
            None => (if builtin[0] || builtin[4] { "nat" } else { "filter" }.to_owned(), false),
        },
    }
}

/// Targets and chain names that occur in one table only.
fn by_targets(table: &Table) -> Option<&'static str> {
    let entries = || table.chains.iter().flat_map(|chain| &chain.entries).chain(&table.loose);
    let names =
        entries().map(|entry| entry.target.as_str()).chain(table.chains.iter().map(|chain| chain.name.as_str()));
    names.into_iter().find_map(|name| match name {
        "DNAT" | "SNAT" | "MASQUERADE" | "REDIRECT" | "NETMAP" | "KUBE-MARK-MASQ" | "KUBE-POSTROUTING" => Some("nat"),
        "REJECT" | "KUBE-FORWARD" | "KUBE-FIREWALL" | "DOCKER-USER" => Some("filter"),
        "NOTRACK" | "CT" => Some("raw"),
        "TPROXY" | "TTL" | "HL" | "TOS" | "DSCP" | "TCPMSS" => Some("mangle"),
        "SECMARK" | "CONNSECMARK" => Some("security"),
        name if ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-SEP-", "KUBE-FW-", "CNI-DN-", "CNI-HOSTPORT-"]
            .iter()
            .any(|prefix| name.starts_with(prefix)) =>
        {
            Some("nat")
        }
        _ => None,
    })
}

struct Writer {
    family: Family,
    save: String,
    lines: Vec<u32>,
    missing: Vec<String>,
    unnumbered: BTreeSet<String>,
    fillers: usize,
}

impl Writer {
    fn new(family: Family) -> Self {
        let (save, lines, missing) = (String::new(), Vec::new(), Vec::new());
        Self { family, save, lines, missing, unnumbered: BTreeSet::new(), fillers: 0 }
    }

    fn line(&mut self, text: &str, from: u32) {
        self.save.push_str(text);
        self.save.push('\n');
        self.lines.push(from);
    }

    /// Writes one table; a chain that was pasted twice is taken from its first paste.
    fn table(&mut self, name: &str, tables: &[&Table]) {
        let mut seen = BTreeSet::new();
        let chains: Vec<&Chain> =
            tables.iter().flat_map(|table| &table.chains).filter(|chain| seen.insert(chain.name.as_str())).collect();
        let astray = chains.iter().flat_map(|chain| chain.entries.iter().filter(|entry| is_astray(name, chain, entry)));
        let mut loose: Vec<&Entry> = tables.iter().flat_map(|table| &table.loose).chain(astray).collect();
        loose.sort_by_key(|entry| entry.line);
        let mut homes: BTreeMap<String, Vec<&Entry>> = BTreeMap::new();
        if name == "nat" {
            loose = self.place(&loose, &mut homes);
        }
        self.line(&format!("*{name}"), 0);
        for chain in &chains {
            let policy =
                chain.policy.as_deref().unwrap_or(if BUILTIN.contains(&chain.name.as_str()) { "ACCEPT" } else { "-" });
            self.line(&format!(":{} {policy} [0:0]", chain.name), 0);
        }
        let ways = self.declare_homes(&homes, &mut seen);
        if !loose.is_empty() {
            self.declare_loose(name, &loose, &seen);
        }
        for chain in &chains {
            self.chain(name, chain);
        }
        for (chain, entries) in &homes {
            entries.iter().for_each(|entry| self.entry(chain, entry));
        }
        ways.iter().for_each(|(chain, rule)| self.line(&format!("-A {chain} {rule}"), 0));
        self.loose(name, &loose);
        self.line("COMMIT", 0);
        self.say_undefined(name, &chains, &homes, &loose);
        if tables.iter().any(|table| table.narrow) {
            self.missing.push(format!(
                "the {name} listing was made without -v, so it has no interfaces: a rule for one interface looks like one for all"
            ));
        }
    }

    fn chain(&mut self, table: &str, chain: &Chain) {
        let mut position = 0;
        let mut gaps = 0;
        for entry in chain.entries.iter().filter(|entry| !is_astray(table, chain, entry)) {
            position += 1;
            while entry.number.is_some_and(|number| position < number) && self.fillers < MAX_FILLERS {
                let nothing = if self.family == Family::V4 { "! -s 0.0.0.0/0" } else { "! -s ::/0" };
                self.line(&format!("-A {} {nothing}", chain.name), 0);
                (position, gaps, self.fillers) = (position + 1, gaps + 1, self.fillers + 1);
            }
            self.entry(&chain.name, entry);
        }
        if gaps > 0 {
            self.missing.push(format!(
                "{gaps} of the first {position} rules of {table} {} were not pasted: taken as not matching",
                chain.name
            ));
        }
    }

    fn entry(&mut self, chain: &str, entry: &Entry) {
        let counters = entry.counters.map_or_else(String::new, |(packets, bytes)| format!("[{packets}:{bytes}] "));
        self.line(format!("{counters}-A {chain} {}", entry.body).trim_end(), entry.line);
    }

    /// Finds the chains of rows that stand without them; what is left over is returned.
    fn place<'e>(&mut self, loose: &[&'e Entry], homes: &mut BTreeMap<String, Vec<&'e Entry>>) -> Vec<&'e Entry> {
        let mut left = Vec::new();
        for (entry, chain) in loose.iter().zip(place::chains(loose)) {
            match chain {
                Some(chain) => homes.entry(chain).or_default().push(entry),
                None => left.push(*entry),
            }
        }
        let placed: usize = homes.values().map(Vec::len).sum();
        if placed > 0 {
            self.missing.push(format!(
                "{placed} nat rules stand without their `Chain …` line: put into the chains that kube-proxy and portmap keep such \
                 rules in (names and comments agree), in the order pasted; other rules of these chains, and the numbers, are not \
                 known"
            ));
        }
        left
    }

    /// Chains that got rows back, what they jump to, and the jumps that lead to them and are not among the rows.
    fn declare_homes<'e>(
        &mut self,
        homes: &'e BTreeMap<String, Vec<&Entry>>,
        seen: &mut BTreeSet<&'e str>,
    ) -> Vec<(String, String)> {
        let names: Vec<&str> = homes.keys().map(String::as_str).collect();
        let jumped = |chain: &str, to: &str| {
            homes.get(chain).is_some_and(|entries| entries.iter().any(|entry| entry.target == to))
        };
        let mut ways = place::ways_in(&names);
        // proxier.go: the chain for traffic from outside ends with a jump to the Service's own, which has no comment.
        for name in &names {
            if let Some(suffix) = name.strip_prefix("KUBE-EXT-") {
                let to = ["KUBE-SVL-", "KUBE-SVC-"].map(|start| format!("{start}{suffix}"));
                let to = to.into_iter().find(|to| homes.contains_key(to));
                ways.extend(to.map(|to| ((*name).to_owned(), format!("-j {to}"))));
            }
        }
        ways.retain(|(chain, rule)| {
            let to = rule.rsplit(' ').next().unwrap_or_default();
            !jumped(chain, to) && !seen.contains(chain.as_str())
        });
        if !ways.is_empty() {
            let list: Vec<String> = ways
                .iter()
                .map(|(chain, rule)| format!("{chain} → {}", rule.rsplit(' ').next().unwrap_or_default()))
                .collect();
            self.missing.push(format!("jumps that were not pasted are taken to be there: {}", self::list(&list)));
        }
        let goals = homes.values().flatten().map(|entry| entry.target.as_str()).filter(|target| is_user_chain(target));
        let ends = ways.iter().map(|(chain, _)| chain.as_str());
        let mut all: BTreeSet<&str> = names.iter().copied().chain(goals).collect();
        let more: Vec<String> = ends.filter(|end| !all.contains(end)).map(str::to_owned).collect();
        all.retain(|name| !seen.contains(name));
        for name in all.iter().copied().chain(more.iter().map(String::as_str)).collect::<BTreeSet<_>>() {
            let policy = if BUILTIN.contains(&name) { "ACCEPT" } else { "-" };
            self.line(&format!(":{name} {policy} [0:0]"), 0);
        }
        seen.extend(all);
        self.unnumbered.extend(homes.keys().chain(ways.iter().map(|(chain, _)| chain)).cloned());
        ways
    }

    /// Rows without a chain: one list that every packet walks, in the order of the paste.
    fn loose(&mut self, table: &str, loose: &[&Entry]) {
        if loose.is_empty() {
            return;
        }
        for entry in loose {
            self.entry(if table == "nat" && is_source_nat(entry) { LOOSE_POST } else { LOOSE }, entry);
        }
        self.missing.push(format!(
            "{} {table} rules stand without their `Chain …` line: which chain they are in, their numbers and what leads there \
             are not known; taken as one list, in the order pasted, that every packet walks",
            loose.len()
        ));
    }

    fn declare_loose(&mut self, table: &str, loose: &[&Entry], defined: &BTreeSet<&str>) {
        let hooks: &[&str] = match table {
            "nat" | "raw" => &["PREROUTING", "OUTPUT"],
            "filter" | "security" => &["INPUT", "FORWARD", "OUTPUT"],
            _ => &["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"],
        };
        let post = table == "nat" && loose.iter().any(|entry| is_source_nat(entry));
        let builtin = |hook: &&&str| !defined.contains(**hook);
        for hook in hooks.iter().chain(post.then_some(&"POSTROUTING")).filter(builtin) {
            self.line(&format!(":{hook} ACCEPT [0:0]"), 0);
        }
        self.line(&format!(":{LOOSE} - [0:0]"), 0);
        let jumps: BTreeSet<&str> =
            loose.iter().map(|entry| entry.target.as_str()).filter(|t| is_user_chain(t)).collect();
        for chain in jumps.iter().filter(|chain| !defined.contains(**chain)) {
            self.line(&format!(":{chain} - [0:0]"), 0);
        }
        if post {
            self.line(&format!(":{LOOSE_POST} - [0:0]"), 0);
            self.line(&format!("-A POSTROUTING -j {LOOSE_POST}"), 0);
        }
        for hook in hooks {
            self.line(&format!("-A {hook} -j {LOOSE}"), 0);
        }
    }

    fn say_undefined(
        &mut self,
        table: &str,
        chains: &[&Chain],
        homes: &BTreeMap<String, Vec<&Entry>>,
        loose: &[&Entry],
    ) {
        let named = chains.iter().map(|chain| chain.name.as_str());
        let defined: BTreeSet<&str> = named.chain(homes.keys().map(String::as_str)).collect();
        let jumps = |entries: &mut dyn Iterator<Item = &Entry>| -> Vec<String> {
            let names: BTreeSet<&str> = entries.map(|entry| entry.target.as_str()).collect();
            names.into_iter().filter(|t| is_user_chain(t) && !defined.contains(t)).map(str::to_owned).collect()
        };
        let placed = homes.values().flatten().copied();
        let open = jumps(&mut chains.iter().flat_map(|chain| &chain.entries).chain(placed));
        if !open.is_empty() {
            self.missing.push(format!("the rules of {table} {} were not pasted", list(&open)));
        }
        let empty = jumps(&mut loose.iter().copied());
        if !empty.is_empty() {
            self.missing.push(format!(
                "which of the {table} rules belong to {} cannot be seen; a jump there is walked as if it came straight back",
                list(&empty)
            ));
        }
    }

    fn finish(self) -> Translated {
        let Self { family, save, lines, missing, unnumbered, .. } = self;
        Translated { family, save, lines, unnumbered, missing }
    }
}

/// The rule stands below the `Chain …` line of another chain, because its own was left out.
fn is_astray(table: &str, chain: &Chain, entry: &Entry) -> bool {
    table == "nat" && entry.number.is_none() && place::is_astray(&chain.name, &entry.target)
}

fn is_source_nat(entry: &Entry) -> bool {
    matches!(
        entry.target.as_str(),
        "SNAT" | "MASQUERADE" | "KUBE-POSTROUTING" | "CNI-HOSTPORT-MASQ" | "KIND-MASQ-AGENT"
    )
}

/// The extensions of iptables; `""` is a rule without a target.
const TARGETS: &str = " ACCEPT AUDIT CHECKSUM CLASSIFY CLUSTERIP CONNMARK CONNSECMARK CT DNAT DNPT DROP DSCP ECN HL HMARK \
    IDLETIMER LED LOG MARK MASQUERADE NETMAP NFLOG NFQUEUE NOTRACK QUEUE RATEEST REDIRECT REJECT RETURN SECMARK SET SNAT SNPT \
    SYNPROXY TCPMSS TCPOPTSTRIP TEE TOS TPROXY TRACE TTL ULOG [unsupported";

/// Whether a target is a chain rather than an extension: extensions are a known list, chains are anything else.
fn is_user_chain(target: &str) -> bool {
    !TARGETS.split(' ').any(|known| known == target)
}

/// `a, b and c`, at most four names.
fn list(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] if names.len() <= 4 => format!("{} and {last}", most.join(", ")),
        names => format!("{} and {} more", names[..3].join(", "), names.len() - 3),
    }
}
