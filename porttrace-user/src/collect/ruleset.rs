//! iptables rules, legacy and nft, whichever holds any, through the tools that only print them.

use super::Timings;
use super::nftables;
use super::tool::{self, ToolError};
use crate::core::model::flow::Family;
use crate::core::model::rules::Ruleset;
use crate::core::model::state::Diagnostic;
use crate::core::model::trace::Flavour;
use crate::core::parse::Files;
use crate::core::parse::rulesets::{header_flavour, rulesets};
use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::thread;

/// One dump to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dump {
    flavour: Flavour,
    family: Family,
}

/// Rules as text, and what of them could not be had.
#[derive(Debug, Default)]
pub struct Rules {
    pub files: Files,
    pub missing: Vec<String>,
}

/// Reads and parses all rules of the calling thread's network namespace.
///
/// Never fails: what is missing is in the diagnostics.
pub fn read_all() -> (Vec<Ruleset>, Vec<Diagnostic>, Timings) {
    let mut timings = Timings::default();
    let rules = timings.measure("read rules", read);
    let (found, mut diagnostics) = timings.measure("parse rules", || rulesets(&rules.files));
    let missing = |message| Diagnostic { source: "rules".to_owned(), line: 0, message };
    diagnostics.extend(rules.missing.into_iter().map(missing));
    (found, diagnostics, timings)
}

/// Reads all rules as text, the dumps side by side.
pub fn read() -> Rules {
    let mut rules = Rules::default();
    let needed = needed(&mut rules.missing);
    // A family that nothing speaks for has no rules, which is known and not missing; unless somebody may not look.
    if needed.is_whole {
        for family in [Family::V4, Family::V6] {
            rules.files.insert(file_name(Dump { flavour: Flavour::IptablesNft, family }).to_owned(), Vec::new());
        }
    }
    let answers: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = needed.dumps.iter().map(|dump| (*dump, scope.spawn(|| save(*dump, true)))).collect();
        threads.into_iter().map(|(dump, thread)| (dump, thread.join())).collect()
    });
    for (dump, answer) in answers {
        match answer {
            Ok(Ok(text)) => drop(rules.files.insert(file_name(dump).to_owned(), text)),
            Ok(Err(error)) => {
                rules.files.remove(file_name(dump));
                // Whether the family has rules is no longer known.
                let nft = file_name(Dump { flavour: Flavour::IptablesNft, ..dump });
                if rules.files.get(nft).is_some_and(Vec::is_empty) {
                    rules.files.remove(nft);
                }
                rules.missing.push(format!("{} rules of {} are unknown: {error}", words(dump).0, words(dump).1));
            }
            Err(_) => rules.missing.push(format!("reading {} rules broke off", words(dump).0)),
        }
    }
    rules.missing.extend(needed.native.iter().map(|(family, name)| {
        format!("nftables table {family} {name} holds native rules, which are not followed yet")
    }));
    rules
}

/// Which dumps hold rules, and what is beside them.
#[derive(Default)]
struct Needed {
    dumps: Vec<Dump>,
    /// Tables of native nftables rules.
    native: BTreeSet<nftables::Table>,
    /// The kernel answered for both flavours: what is not in `dumps` does not exist.
    is_whole: bool,
}

/// Finds out without touching anything: the save tools of iptables-legacy register their tables when they look.
fn needed(missing: &mut Vec<String>) -> Needed {
    let mut needed = Needed { is_whole: true, ..Needed::default() };
    match nftables::tables() {
        Ok(found) => needed.native = found,
        // A kernel without nf_tables has no such rules. Anything else hides them.
        Err(_) if nf_tables_is_absent() => {}
        Err(error) => {
            missing.push(format!("whether there are nftables rules is unknown: {error}"));
            needed.is_whole = false;
        }
    }
    for (family, name) in [(Family::V4, "ip"), (Family::V6, "ip6")] {
        if needed.native.iter().any(|table| table.0 == name && nftables::is_iptables(table)) {
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
    needed.native.retain(|table| !nftables::is_iptables(table));
    needed
}

fn nf_tables_is_absent() -> bool {
    // Only a root whose request reached the kernel can tell "absent" from "not for you".
    nix::unistd::geteuid().is_root() && !fs::exists("/sys/module/nf_tables").unwrap_or(false)
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
fn save(dump: Dump, counters: bool) -> Result<Vec<u8>, ToolError> {
    let (flavour, _) = words(dump);
    let family = if dump.family == Family::V4 { "iptables" } else { "ip6tables" };
    let arguments: &[&str] = if counters { &["-c"] } else { &[] };
    let named = format!("{family}-{flavour}-save");
    match tool::run(&named, arguments) {
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
        _ => Ok(text),
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
    /// nftables' generation; `None` where the kernel would not say.
    nft: Option<u32>,
    /// Hash of the legacy rules without counters; `None` where there are none.
    legacy: Option<u64>,
}

impl Fingerprint {
    /// Takes one: a netlink round trip (tens of microseconds), and a dump of the legacy rules where there are any, which
    /// costs as much as `iptables-legacy-save` does; so better not more than every few seconds.
    pub fn take() -> Self {
        let dump = |family| save(Dump { flavour: Flavour::IptablesLegacy, family }, false).unwrap_or_default();
        Self { legacy: legacy_hash(dump), ..Self::take_cheap(&Self::default()) }
    }

    /// Takes one with the legacy half of an earlier one: cheap enough for every tick of a clock.
    pub fn take_cheap(earlier: &Self) -> Self {
        Self { nft: nftables::generation().ok(), legacy: earlier.legacy }
    }

    /// With the legacy half of the rules as these files hold them: what was read need not be dumped again.
    pub fn with_legacy_of(self, files: &Files) -> Self {
        let dump = |family| {
            let name = file_name(Dump { flavour: Flavour::IptablesLegacy, family });
            files.get(name).map_or(&[][..], Vec::as_slice)
        };
        Self { legacy: legacy_hash(dump), ..self }
    }

    /// Whether legacy rules exist, so that [`Fingerprint::take_cheap`] alone is not enough.
    pub fn has_legacy(&self) -> bool {
        self.legacy.is_some()
    }
}

/// `None`: there are no legacy rules. A dump that failed is empty.
fn legacy_hash<T: AsRef<[u8]>>(dump: impl Fn(Family) -> T) -> Option<u64> {
    let in_use = |family: &Family| legacy_tables(*family).is_ok_and(|tables| !tables.is_empty());
    hash_of([Family::V4, Family::V6].into_iter().filter(in_use).map(dump))
}

/// Hash of dumps without comments and counters, which chains (`:INPUT ACCEPT [12:3456]`) carry always and rules
/// (`[12:3456] -A …`) by `-c`; `None` for none.
fn hash_of<T: AsRef<[u8]>>(dumps: impl Iterator<Item = T>) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    let mut any = false;
    for text in dumps {
        any = true;
        for line in text.as_ref().split(|byte| *byte == b'\n') {
            let told = match line.first() {
                Some(b'#') => continue,
                Some(b':') => line.rsplitn(2, |byte| *byte == b'[').last().unwrap_or(line),
                Some(b'[') => line.splitn(2, |byte| *byte == b']').last().unwrap_or(line).trim_ascii_start(),
                _ => line,
            };
            told.hash(&mut hasher);
        }
    }
    any.then(|| hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "# by iptables-save\n*nat\n:A - [0:0]\n-A A -s 10.0.0.1/32 -j RETURN\nCOMMIT\n";

    fn hash(text: &str) -> u64 {
        hash_of([text].into_iter()).expect("there is one")
    }

    #[test]
    fn counters_and_comments_are_no_change() {
        let counted = "# at another time\n*nat\n:A - [7:420]\n[3:180] -A A -s 10.0.0.1/32 -j RETURN\nCOMMIT\n";
        assert_eq!(hash(PLAIN), hash(counted));
    }

    #[test]
    fn a_policy_a_rule_and_an_order_are() {
        let with = |from: &str, to: &str| hash(&PLAIN.replace(from, to));
        assert_ne!(hash(PLAIN), with(":A -", ":A DROP"));
        assert_ne!(hash(PLAIN), with("10.0.0.1", "10.0.0.2"));
        assert_ne!(hash(PLAIN), with("COMMIT", "-A A -j DROP\nCOMMIT"));
        assert_eq!(hash_of(std::iter::empty::<&str>()), None, "no dump is not an empty one");
    }
}
