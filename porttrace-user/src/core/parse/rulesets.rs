//! Which of a node's files hold rules, and of which flavour and family.

use super::notes::Notes;
use super::{Files, iptables};
use crate::core::model::dump::BLOCK;
use crate::core::model::flow::Family;
use crate::core::model::rules::Ruleset;
use crate::core::model::state::Diagnostic;
use crate::core::model::trace::Flavour;
use memchr::{memchr_iter, memrchr};

/// The files of rules. A node that uses both flavours has the legacy one beside the other.
pub const RULES: [(&str, Family); 4] = [
    ("iptables-save.txt", Family::V4),
    ("iptables-legacy-save.txt", Family::V4),
    ("ip6tables-save.txt", Family::V6),
    ("ip6tables-legacy-save.txt", Family::V6),
];

/// In a rule that asks for an ipset, and in one of `-m recent`.
pub const OF_SETS: &str = "--match-set ";
pub const OF_RECENT: &str = "-m recent ";

/// Begins the diagnostic of a family whose rules are in none of the files.
const NOT_THERE: &str = "not there";

/// Whether this says that a family's rules are in none of the files, and of which.
pub fn unread_family(diagnostic: &Diagnostic) -> Option<Family> {
    let family = RULES.iter().find(|(name, _)| *name == diagnostic.source).map(|(_, family)| *family);
    family.filter(|_| diagnostic.line == 0 && diagnostic.message.starts_with(NOT_THERE))
}

/// Reads all rules. No more than one set comes out for a flavour and family; a family without a file is said.
pub fn rulesets(files: &Files) -> (Vec<Ruleset>, Vec<Diagnostic>) {
    let read = |name| {
        let mut reader = Reader::new(name);
        reader.feed(files.get(name)?);
        Some(reader.finish())
    };
    together(RULES.iter().filter_map(|(name, _)| read(name)).collect())
}

/// The rules of one file.
#[derive(Debug)]
pub struct FileRules {
    /// One of [`RULES`].
    name: &'static str,
    /// `None`: the file is empty.
    rules: Option<(Ruleset, Vec<Diagnostic>)>,
    notes: Notes,
    /// Rules ask for ipsets, or for lists of `-m recent`.
    pub wants_sets: bool,
    pub wants_recent: bool,
}

/// Reads a file of rules as it comes, so that it need not be held: rules keep their text packed.
pub struct Reader {
    name: &'static str,
    /// What came of a block that is not whole.
    rest: Vec<u8>,
    rules: Option<iptables::Reader>,
    notes: Notes,
    /// Lines so far.
    lines: usize,
    wants_sets: bool,
    wants_recent: bool,
}

impl Reader {
    /// Of the file of this name, one of [`RULES`].
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            rest: Vec::new(),
            rules: None,
            notes: Notes::new(name),
            lines: 0,
            wants_sets: false,
            wants_recent: false,
        }
    }

    /// The next bytes.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            // As many as make a block; a line that is longer than one goes on.
            let room = BLOCK.saturating_sub(self.rest.len()).max(BLOCK / 8).min(bytes.len());
            let looked_at = if self.rest.len() >= BLOCK { self.rest.len() } else { 0 };
            self.rest.extend_from_slice(&bytes[..room]);
            bytes = &bytes[room..];
            if self.rest.len() >= BLOCK
                && let Some(end) = memrchr(b'\n', &self.rest[looked_at..])
            {
                let behind = self.rest.split_off(looked_at + end + 1);
                let block = std::mem::replace(&mut self.rest, behind);
                self.block(&String::from_utf8_lossy(&block));
            }
        }
    }

    /// What was read.
    pub fn finish(mut self) -> FileRules {
        let last = std::mem::take(&mut self.rest);
        self.block(&String::from_utf8_lossy(&last));
        let Self { name, notes, wants_sets, wants_recent, .. } = self;
        FileRules { name, rules: self.rules.map(iptables::Reader::finish), notes, wants_sets, wants_recent }
    }

    fn block(&mut self, text: &str) {
        let before = self.lines;
        self.lines += memchr_iter(b'\n', text.as_bytes()).count();
        if self.rules.is_none() && text.trim().is_empty() {
            return;
        }
        self.wants_sets |= text.contains(OF_SETS);
        self.wants_recent |= text.contains(OF_RECENT);
        note_native_tables(text, before, &mut self.notes);
        // The header is the first line.
        let rules = self.rules.get_or_insert_with(|| {
            let of_name = RULES.iter().find(|(name, _)| *name == self.name).map_or(Family::V4, |(_, family)| *family);
            let family = header_family(text).unwrap_or(of_name);
            let flavour = flavour(text, self.name, &mut self.notes);
            if family != of_name {
                let (said, version) = if family == Family::V4 { ("iptables-save", 4) } else { ("ip6tables-save", 6) };
                self.notes.add(0, format!("its header says that {said} wrote it: taken as the rules of IPv{version}"));
            }
            iptables::Reader::new(self.name, before, flavour, family)
        });
        rules.block(text);
    }
}

/// All rules of a node. No more than one set comes out for a flavour and family; a family without a file is said.
pub fn together(files: Vec<FileRules>) -> (Vec<Ruleset>, Vec<Diagnostic>) {
    let there: Vec<&str> = files.iter().map(|file| file.name).collect();
    let mut found = Vec::<Ruleset>::new();
    let mut diagnostics = Vec::new();
    for mut file in files {
        let Some((ruleset, problems)) = file.rules else { continue };
        if found.iter().any(|set| set.flavour == ruleset.flavour && set.family == ruleset.family) {
            file.notes.add(0, "holds rules of the same flavour as the file before it; left out");
        } else {
            diagnostics.extend(problems);
            found.push(ruleset);
        }
        diagnostics.extend(file.notes.finish());
    }
    for (version, family) in [("4", Family::V4), ("6", Family::V6)] {
        let mut of_family = RULES.iter().filter(|(_, of)| *of == family).map(|(name, _)| *name);
        if let (None, Some(first)) = (of_family.clone().find(|name| there.contains(name)), of_family.next()) {
            let message = format!("{NOT_THERE}: IPv{version} packets are followed as if no rule existed");
            diagnostics.push(Diagnostic { source: first.to_owned(), line: 0, message });
        }
    }
    (found, diagnostics)
}

/// `iptables-save v1.8.9 (nf_tables)` and `… (legacy)` say it; up to 1.8.9 the legacy tool names no flavour.
pub fn header_flavour(text: &str) -> Option<Flavour> {
    let header = text.lines().find(|line| line.starts_with("# Generated by ") && line.contains("tables-"))?;
    Some(if header.contains("(nf_tables)") { Flavour::IptablesNft } else { Flavour::IptablesLegacy })
}

/// The family by the same header, whatever the file is called.
fn header_family(text: &str) -> Option<Family> {
    let header = text.lines().find_map(|line| line.strip_prefix("# Generated by "))?;
    [("iptables-", Family::V4), ("ip6tables-", Family::V6)]
        .into_iter()
        .find(|(tool, _)| header.starts_with(tool))
        .map(|(_, family)| family)
}

fn flavour(text: &str, name: &str, notes: &mut Notes) -> Flavour {
    header_flavour(text).unwrap_or_else(|| {
        let (flavour, word) = match name.contains("-legacy-") {
            true => (Flavour::IptablesLegacy, "legacy"),
            false => (Flavour::IptablesNft, "nf_tables"),
        };
        notes.add(0, format!("no header tells the flavour of these rules; taken as {word}"));
        flavour
    })
}

/// iptables-nft-save says of a table with native rules that it is incompatible, and leaves it out. `before`: lines before the text.
fn note_native_tables(text: &str, before: usize, notes: &mut Notes) {
    // Rarely so, and lines are looked at only then.
    if !text.contains("is incompatible") {
        return;
    }
    for (index, line) in text.lines().enumerate() {
        if line.starts_with("# Table ") && line.contains("is incompatible") {
            notes.add(before + index + 1, format!("{}; its rules are not followed", line.trim_start_matches("# ")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NFT: &str = "# Generated by iptables-save v1.8.9 (nf_tables) on Mon Nov 23 08:35:00 2026\n*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j ACCEPT\nCOMMIT\n# Table `filter' is incompatible, use 'nft' tool.\n";
    const LEGACY: &str =
        "# Generated by iptables-save v1.8.9 on Mon Nov 23 08:35:00 2026\n*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n";

    fn files(files: &[(&str, &str)]) -> Files {
        files.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect()
    }

    #[test]
    fn the_header_tells_the_flavour() {
        let (found, notes) = rulesets(&files(&[("iptables-save.txt", NFT), ("iptables-legacy-save.txt", LEGACY)]));
        let shown: Vec<_> = found.iter().map(|set| (set.flavour, set.family)).collect();
        assert_eq!(shown, [(Flavour::IptablesNft, Family::V4), (Flavour::IptablesLegacy, Family::V4)]);
        let notes: Vec<_> = notes.iter().map(|note| (note.source.as_str(), note.line)).collect();
        assert_eq!(notes, [("iptables-save.txt", 6), ("ip6tables-save.txt", 0)]);
        let (found, _) = rulesets(&files(&[("iptables-save.txt", LEGACY), ("ip6tables-save.txt", "")]));
        assert_eq!(found.iter().map(|set| set.flavour).collect::<Vec<_>>(), [Flavour::IptablesLegacy]);
    }

    #[test]
    fn swapped_files_are_taken_by_their_headers() {
        let six = NFT.replace("iptables-save", "ip6tables-save");
        let (found, notes) = rulesets(&files(&[("iptables-save.txt", &six), ("ip6tables-save.txt", NFT)]));
        assert_eq!(found.iter().map(|set| set.family).collect::<Vec<_>>(), [Family::V6, Family::V4]);
        let said = notes.iter().filter(|note| note.message.starts_with("its header says")).count();
        assert_eq!(said, 2, "{notes:?}");
    }

    #[test]
    fn doubles_and_headless_files_are_said() {
        let bare = LEGACY.split_once('\n').map(|(_, rest)| rest).unwrap_or_default();
        let all =
            files(&[("iptables-save.txt", LEGACY), ("iptables-legacy-save.txt", bare), ("ip6tables-save.txt", "")]);
        let (found, notes) = rulesets(&all);
        assert_eq!(found.len(), 1);
        assert!(notes[0].message.contains("taken as legacy") && notes[1].message.contains("left out"), "{notes:?}");
    }

    /// Several blocks of rules, one line that is longer than a block, one that is nonsense, and one about native rules.
    fn long() -> String {
        let rules: String =
            (0..1500).map(|at| format!("[{at}:9] -A PREROUTING -p tcp -m tcp --dport {at} -j C-{at}\n")).collect();
        let chains: String = (0..1500).map(|at| format!(":C-{at} - [0:0]\n")).collect();
        let comment = format!("-A PREROUTING -m comment --comment \"{}\" -j ACCEPT\n", "ä".repeat(BLOCK));
        let (head, tail) = NFT.split_once("-A ").expect("a rule");
        format!("{head}{chains}{rules}{comment}nonsense\n-A {tail}")
    }

    #[test]
    fn in_whatever_pieces_it_comes_it_reads_the_same() {
        let text = long();
        let read = |piece: usize| {
            let mut reader = Reader::new("iptables-save.txt");
            text.as_bytes().chunks(piece).for_each(|piece| reader.feed(piece));
            together(vec![reader.finish()])
        };
        let (whole, notes) = read(text.len());
        let lines: Vec<_> = notes.iter().map(|note| note.line).collect();
        assert_eq!(lines, [3005, 3008, 0], "{notes:?}");
        let chain = whole[0].tables[0].chain("PREROUTING").expect("it is declared");
        assert_eq!((chain.rules.len(), chain.rules[7].counters()), (1502, Some((7, 9))));
        assert_eq!(chain.rules[1500].comment().map(|comment| comment.len()), Some(2 * BLOCK));
        assert_eq!(chain.rules[1501].text.read(), "-A PREROUTING -j ACCEPT");
        for piece in [1, 4099, BLOCK - 1, BLOCK, 3 * BLOCK + 7] {
            assert!(read(piece) == (whole.clone(), notes.clone()), "in pieces of {piece}");
        }
    }
}
