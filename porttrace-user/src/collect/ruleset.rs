//! iptables rules, legacy and nft, whichever holds any, through the tools that only print them.

use super::netlink::socket::NetlinkError;
use super::nftables;
use super::tool::{self, ToolError};
use crate::core::model::flow::Family;
use crate::core::model::rules::Ruleset;
use crate::core::model::state::Diagnostic;
use crate::core::model::trace::Flavour;
use crate::core::parse::Files;
use crate::core::parse::rulesets::{FileRules, Reader, header_flavour, together};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher};
use std::io;
use std::thread;

/// One dump to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Dump {
    family: Family,
    flavour: Flavour,
}

/// Rules as text, and what of them could not be had.
#[derive(Debug, Default)]
pub struct Texts {
    pub files: Files,
    pub missing: Vec<String>,
}

/// Rules as they were read, and what of them could not be had.
#[derive(Debug)]
pub struct Rules {
    pub files: Vec<FileRules>,
    pub missing: Vec<String>,
    pub legacy: LegacyHash,
}

/// Hash of the legacy rules without counters; `None` where there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LegacyHash(Option<u64>);

/// Reads all rules of the calling thread's network namespace.
///
/// Never fails: what is missing is in the diagnostics.
pub fn read_all() -> (Vec<Ruleset>, Vec<Diagnostic>) {
    let Rules { files, missing, .. } = read();
    let (found, mut diagnostics) = together(files);
    let missing = missing.into_iter().map(|message| Diagnostic { source: "rules".to_owned(), line: 0, message });
    diagnostics.extend(missing);
    (found, diagnostics)
}

/// Reads all rules, the dumps side by side, each while it is printed.
pub fn read() -> Rules {
    let (read, missing) = gather::<Reading>();
    let mut files = Vec::new();
    let mut legacy = Vec::new();
    for Reading { reader, hash } in read.into_values() {
        files.push(reader.finish());
        legacy.extend(hash.map(Hash::finish));
    }
    Rules { files, missing, legacy: LegacyHash::of(&legacy) }
}

/// Reads all rules as text, the dumps side by side.
pub fn texts() -> Texts {
    let (read, missing) = gather::<Vec<u8>>();
    Texts { files: read.into_iter().map(|(dump, text)| (file_name(dump).to_owned(), text)).collect(), missing }
}

/// What a dump becomes as it is printed.
trait Sink: Send {
    fn of(dump: Dump) -> Self;
    fn feed(&mut self, bytes: &[u8]);
}

impl Sink for Vec<u8> {
    fn of(_: Dump) -> Self {
        Self::new()
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

struct Reading {
    reader: Reader,
    /// Of legacy rules: of changes of the others the kernel tells.
    hash: Option<Hash>,
}

impl Sink for Reading {
    fn of(dump: Dump) -> Self {
        let hash = (dump.flavour == Flavour::IptablesLegacy).then(Hash::default);
        Self { reader: Reader::new(file_name(dump)), hash }
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.reader.feed(bytes);
        if let Some(hash) = &mut self.hash {
            hash.feed(bytes);
        }
    }
}

/// All dumps, and what could not be had. A family without rules has an empty one of nft's flavour.
fn gather<S: Sink>() -> (BTreeMap<Dump, S>, Vec<String>) {
    let mut missing = Vec::new();
    let needed = needed(&mut missing);
    let answers: Vec<_> = thread::scope(|scope| {
        let save = |dump| {
            let mut sink = S::of(dump);
            save(dump, true, |bytes| sink.feed(bytes)).map(|()| sink)
        };
        let threads: Vec<_> = needed.dumps.iter().map(|dump| (*dump, scope.spawn(move || save(*dump)))).collect();
        threads.into_iter().map(|(dump, thread)| (dump, thread.join())).collect()
    });
    let mut read = BTreeMap::new();
    // A family that nothing speaks for has no rules, which is known and not missing; unless somebody may not look.
    let mut known = if needed.is_whole { BTreeSet::from([Family::V4, Family::V6]) } else { BTreeSet::new() };
    for (dump, answer) in answers {
        match answer {
            Ok(Ok(sink)) => drop(read.insert(dump, sink)),
            Ok(Err(error)) => {
                known.remove(&dump.family);
                missing.push(format!("{} rules of {} are unknown: {error}", words(dump).0, words(dump).1));
            }
            Err(_) => {
                known.remove(&dump.family);
                missing.push(format!("reading {} rules broke off", words(dump).0));
            }
        }
    }
    for family in known {
        let dump = Dump { flavour: Flavour::IptablesNft, family };
        read.entry(dump).or_insert_with(|| S::of(dump));
    }
    (read, missing)
}

/// Which dumps hold rules.
#[derive(Default)]
struct Needed {
    dumps: Vec<Dump>,
    /// The kernel answered for both flavours: what is not in `dumps` does not exist.
    is_whole: bool,
}

/// Finds out without touching anything: the save tools of iptables-legacy register their tables when they look.
fn needed(missing: &mut Vec<String>) -> Needed {
    let mut needed = Needed { is_whole: true, ..Needed::default() };
    let mut tables = Vec::new();
    match nftables::tables() {
        Ok(found) => tables = found,
        // A kernel without nf_tables has no such rules. Anything else hides them.
        Err(error) if nf_tables_is_absent(&error) => {}
        Err(error) => {
            missing.push(format!("whether there are nftables rules is unknown: {error}"));
            needed.is_whole = false;
        }
    }
    for (family, name) in [(Family::V4, "ip"), (Family::V6, "ip6")] {
        if tables.iter().any(|table| table.0 == name && nftables::is_iptables(table)) {
            needed.dumps.push(Dump { flavour: Flavour::IptablesNft, family });
        }
        match legacy_tables(family) {
            Ok(tables) if tables.is_empty() => {}
            Ok(_) => needed.dumps.push(Dump { flavour: Flavour::IptablesLegacy, family }),
            Err(error) => {
                missing.push(format!("whether there are legacy {name} rules is unknown: {error}"));
                needed.is_whole = false;
            }
        }
    }
    needed
}

/// Whether this is the answer of a kernel that has no nf_tables. Only a root whose request reached the kernel can tell "absent" from
/// "not for you".
fn nf_tables_is_absent(error: &NetlinkError) -> bool {
    let answered = match error {
        NetlinkError::Refused(_) => true,
        NetlinkError::Io(error) => error.raw_os_error() == Some(libc::EPROTONOSUPPORT),
        _ => false,
    };
    answered && nix::unistd::geteuid().is_root() && !fs::exists("/sys/module/nf_tables").unwrap_or(false)
}

/// The tables that iptables-legacy has in use, from `/proc/net/ip_tables_names`; the file is there only once one is.
fn legacy_tables(family: Family) -> io::Result<Vec<String>> {
    let file = if family == Family::V4 { "ip_tables_names" } else { "ip6_tables_names" };
    match fs::read_to_string(format!("/proc/thread-self/net/{file}")) {
        Ok(names) => Ok(names.lines().map(str::to_owned).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Runs the save tool of a flavour: the one named after it, or the plain one if its header says that it is that one.
fn save(dump: Dump, counters: bool, mut take: impl FnMut(&[u8])) -> Result<(), ToolError> {
    let (flavour, _) = words(dump);
    let family = if dump.family == Family::V4 { "iptables" } else { "ip6tables" };
    let arguments: &[&str] = if counters { &["-c"] } else { &[] };
    let named = format!("{family}-{flavour}-save");
    match tool::stream(&named, arguments, &mut take) {
        Err(ToolError::Missing(_)) => {}
        answer => return answer,
    }
    let plain = format!("{family}-save");
    let text = match tool::run(&plain, arguments) {
        Err(ToolError::Missing(_)) => return Err(ToolError::Missing(format!("neither {named} nor {plain}"))),
        answer => answer?,
    };
    match header_flavour(&String::from_utf8_lossy(&text)) {
        Some(found) if found != dump.flavour => Err(ToolError::Missing(named)),
        _ => {
            take(&text);
            Ok(())
        }
    }
}

fn file_name(dump: Dump) -> &'static str {
    match (dump.flavour, dump.family) {
        (Flavour::IptablesLegacy, Family::V4) => "iptables-legacy-save.txt",
        (Flavour::IptablesLegacy, Family::V6) => "ip6tables-legacy-save.txt",
        (_, Family::V4) => "iptables-save.txt",
        (_, Family::V6) => "ip6tables-save.txt",
    }
}

fn words(dump: Dump) -> (&'static str, &'static str) {
    let flavour = if dump.flavour == Flavour::IptablesLegacy { "legacy" } else { "nft" };
    (flavour, if dump.family == Family::V4 { "IPv4" } else { "IPv6" })
}

/// A mark of the rules at one moment: two that differ mean that rules changed in between.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint {
    /// nftables' generation, 0 where the kernel has no nftables; `None` where it would not say.
    nft: Option<u32>,
    legacy: LegacyHash,
}

impl Fingerprint {
    /// Takes one: a netlink round trip (tens of microseconds), and a dump of the legacy rules where there are any, which
    /// costs as much as `iptables-legacy-save` does; so better not more than every few seconds.
    pub fn take() -> Self {
        let in_use = |family: &Family| legacy_tables(*family).is_ok_and(|tables| !tables.is_empty());
        let hash = |family| {
            let mut hash = Hash::default();
            // One that fails is left out, as where rules are read: what always fails is no change.
            let saved = save(Dump { flavour: Flavour::IptablesLegacy, family }, false, |bytes| hash.feed(bytes));
            saved.is_ok().then(|| hash.finish())
        };
        let hashes: Vec<u64> = [Family::V4, Family::V6].into_iter().filter(in_use).filter_map(hash).collect();
        Self { legacy: LegacyHash::of(&hashes), ..Self::take_cheap(&Self::default()) }
    }

    /// Takes one with the legacy half of an earlier one: cheap enough for every tick of a clock.
    pub fn take_cheap(earlier: &Self) -> Self {
        let nft = match nftables::generation() {
            Ok(generation) => Some(generation),
            Err(error) => nf_tables_is_absent(&error).then_some(0),
        };
        Self { nft, legacy: earlier.legacy }
    }

    /// Whether the kernel said all that there is to it: one that does not (no descriptor is free, say) tells nothing of changes.
    pub const fn is_known(&self) -> bool {
        self.nft.is_some()
    }

    /// With the legacy half of what was read: it need not be dumped again.
    pub const fn with_legacy(self, legacy: LegacyHash) -> Self {
        Self { legacy, ..self }
    }

    /// Whether legacy rules exist, so that [`Fingerprint::take_cheap`] alone is not enough.
    pub const fn has_legacy(&self) -> bool {
        self.legacy.0.is_some()
    }
}

impl LegacyHash {
    /// Of those of all dumps.
    fn of(dumps: &[u64]) -> Self {
        let mut hasher = DefaultHasher::new();
        dumps.hash(&mut hasher);
        Self((!dumps.is_empty()).then(|| hasher.finish()))
    }
}

/// Of a dump as it comes, without comments and counters, which chains (`:INPUT ACCEPT [12:3456]`) carry always and rules
/// (`[12:3456] -A …`) by `-c`.
#[derive(Default)]
struct Hash {
    hasher: DefaultHasher,
    /// What came of a line that is not whole.
    rest: Vec<u8>,
}

impl Hash {
    fn feed(&mut self, bytes: &[u8]) {
        let mut lines = bytes.split(|byte| *byte == b'\n');
        // Behind the last line break.
        let last = lines.next_back().unwrap_or_default();
        for line in lines {
            self.rest.extend_from_slice(line);
            self.line();
        }
        self.rest.extend_from_slice(last);
    }

    fn line(&mut self) {
        let line = &self.rest[..];
        let told = match line.first() {
            Some(b'#') => None,
            Some(b':') => line.rsplitn(2, |byte| *byte == b'[').last(),
            Some(b'[') => line.splitn(2, |byte| *byte == b']').last().map(<[u8]>::trim_ascii_start),
            _ => Some(line),
        };
        if let Some(told) = told {
            told.hash(&mut self.hasher);
        }
        self.rest.clear();
    }

    fn finish(mut self) -> u64 {
        self.line();
        self.hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "# by iptables-save\n*nat\n:A - [0:0]\n-A A -s 10.0.0.1/32 -j RETURN\nCOMMIT\n";

    fn hash(text: &str) -> u64 {
        let mut hash = Hash::default();
        hash.feed(text.as_bytes());
        hash.finish()
    }

    #[test]
    fn counters_and_comments_are_no_change() {
        let counted = "# at another time\n*nat\n:A - [7:420]\n[3:180] -A A -s 10.0.0.1/32 -j RETURN\nCOMMIT\n";
        assert_eq!(hash(PLAIN), hash(counted));
    }

    #[test]
    fn nor_is_where_it_breaks_while_it_comes() {
        for at in 0..PLAIN.len() {
            let mut pieces = Hash::default();
            pieces.feed(&PLAIN.as_bytes()[..at]);
            pieces.feed(&PLAIN.as_bytes()[at..]);
            assert_eq!(pieces.finish(), hash(PLAIN), "at {at}");
        }
    }

    #[test]
    fn a_policy_a_rule_and_an_order_are() {
        let with = |from: &str, to: &str| hash(&PLAIN.replace(from, to));
        assert_ne!(hash(PLAIN), with(":A -", ":A DROP"));
        assert_ne!(hash(PLAIN), with("10.0.0.1", "10.0.0.2"));
        assert_ne!(hash(PLAIN), with("COMMIT", "-A A -j DROP\nCOMMIT"));
        assert_ne!(LegacyHash::of(&[1, 2]), LegacyHash::of(&[2, 1]));
        assert_eq!(LegacyHash::of(&[]), LegacyHash(None), "no dump is not an empty one");
    }
}
