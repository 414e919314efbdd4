//! The matches of one rule: general options (`-s`, `-p`, …) and `-m NAME …` blocks.

use super::iptables::clip;
use super::iptables_blocks as blocks;
use super::iptables_modules::{self as modules, Parsed};
use super::iptables_options::{Options, Word, net};
use super::words::Words;
use crate::core::model::flow::{Family, Proto};
use crate::core::model::rules::{Match, MatchKind, Matches};

/// Collects the matches of one rule after the other.
pub(super) struct Conditions<'a> {
    pub(super) family: Family,
    line: &'a str,
    matches: Vec<Match>,
    complaints: Vec<String>,
    protocol: &'a str,
    /// Words of the present block.
    block: Vec<Word<'a>>,
}

impl<'a> Conditions<'a> {
    pub(super) const fn new(family: Family) -> Self {
        Self { family, line: "", matches: Vec::new(), complaints: Vec::new(), protocol: "", block: Vec::new() }
    }

    /// The matches read so far, and what there is to say about them.
    pub(super) fn take(&mut self) -> (Matches, Vec<String>) {
        let mut matches = Matches::with_capacity(self.matches.len());
        matches.extend(self.matches.drain(..));
        (matches, std::mem::take(&mut self.complaints))
    }

    /// Reads the words of a rule up to the target; what is left stands behind the returned `-j` or `-g`.
    pub(super) fn read(&mut self, line: &'a str, words: Words<'a>) -> Option<(&'a str, Words<'a>)> {
        (self.line, self.protocol) = (line, "");
        let mut block = std::mem::take(&mut self.block);
        let rest = self.read_into(&mut block, words);
        block.clear();
        self.block = block;
        rest
    }

    fn read_into(&mut self, block: &mut Vec<Word<'a>>, mut words: Words<'a>) -> Option<(&'a str, Words<'a>)> {
        let mut module = "";
        while let Some(text) = words.next() {
            let word = Word { text, start: words.last.0, end: words.last.1 };
            match text {
                _ if !text.starts_with('-') => block.push(word),
                "-j" | "-g" | "--jump" | "--goto" => {
                    self.block(module, block);
                    return Some((text, words));
                }
                "-m" | "--match" => {
                    self.block(module, block);
                    block.clear();
                    module = words.next().unwrap_or("");
                }
                "-4" | "-6" => {}
                "-t" | "--table" => drop(words.next()),
                "-c" | "--set-counters" => drop((words.next(), words.next())),
                "-s" | "-d" | "-p" | "-i" | "-o" | "-f" | "--source" | "--destination" | "--protocol"
                | "--in-interface" | "--out-interface" | "--fragment" => {
                    let bang = block.pop_if(|word| word.text == "!");
                    self.block(module, block);
                    block.clear();
                    module = "";
                    self.general(word, bang, &mut words);
                }
                _ => block.push(word),
            }
        }
        self.block(module, block);
        None
    }

    fn general(&mut self, word: Word<'a>, bang: Option<Word<'a>>, words: &mut Words<'a>) {
        let mut negated = bang.is_some();
        let mut value = if matches!(word.text, "-f" | "--fragment") { "" } else { words.next().unwrap_or("") };
        if value == "!" {
            negated = true;
            value = words.next().unwrap_or("");
        }
        let kind = match word.text {
            "-s" | "--source" => net(value, self.family).map(MatchKind::Source),
            "-d" | "--destination" => net(value, self.family).map(MatchKind::Destination),
            "-i" | "--in-interface" => Some(MatchKind::Input(value.into())),
            "-o" | "--out-interface" => Some(MatchKind::Output(value.into())),
            "-f" | "--fragment" => Some(MatchKind::Fragment),
            _ => {
                self.protocol = value;
                protocol(value).map(MatchKind::Protocol)
            }
        };
        let start = bang.map_or(word.start, |bang| bang.start);
        let end = words.last.1;
        match kind {
            Some(MatchKind::Protocol(0)) => {}
            Some(kind) => self.push(kind, negated, start, end),
            None => self.unknown(start, end),
        }
    }

    fn block(&mut self, module: &str, words: &[Word<'a>]) {
        let module = if module.is_empty() { self.protocol } else { module };
        let Some(first) = words.first() else {
            // `-m socket` alone asks something, `-m tcp` alone does not.
            if let Some(kind) = blocks::bare(module) {
                self.push(kind, false, 0, 0);
            } else if modules::bare_is_a_question(module) {
                self.push(MatchKind::Unknown(format!("-m {module}").into()), false, 0, 0);
            }
            return;
        };
        let (start, end) = (first.start, words.last().map_or(first.end, |word| word.end));
        if module == "comment" && words.len() == 2 {
            return;
        }
        if blocks::is_whole(module) {
            match blocks::whole(module, words, self.family) {
                Some(parsed) => self.add(parsed, start, end),
                None => self.unknown(start, end),
            }
            return;
        }
        let mut options = Options::new(words);
        while let Some(mut option) = options.option() {
            let parsed = modules::option(module, &mut option, &mut options, self.family);
            match parsed {
                Some(parsed) => self.add(parsed.negated_if(option.negated), option.start, options.end()),
                None => {
                    options.skip_values();
                    self.unknown(option.start, options.end());
                }
            }
        }
    }

    fn add(&mut self, parsed: Parsed, start: usize, end: usize) {
        for (kind, negated) in parsed.into_iter() {
            self.push(kind, negated, start, end);
        }
    }

    fn push(&mut self, kind: MatchKind, negated: bool, start: usize, end: usize) {
        let at = u16::try_from(start).ok().zip(u16::try_from(end.saturating_sub(start)).ok()).unwrap_or((0, 0));
        self.matches.push(Match { kind, negated, at });
    }

    /// Keeps an option that is not understood as a match that nobody can decide.
    fn unknown(&mut self, start: usize, end: usize) {
        let text = self.line.get(start..end).unwrap_or("");
        self.complaints.push(format!("match {:?} is not understood: kept as unknown", clip(text)));
        self.push(MatchKind::Unknown(text.into()), false, start, end);
    }
}

/// `-p all` is 0. Names beyond [`Proto`]'s come from /etc/protocols.
pub(super) fn protocol(name: &str) -> Option<u8> {
    Some(match name {
        "all" | "ip" | "ipv6" => 0,
        "igmp" => 2,
        "ipencap" | "ipip" => 4,
        "dccp" => 33,
        "gre" => 47,
        "esp" | "ipv6-esp" => 50,
        "ah" | "ipv6-ah" => 51,
        "icmp6" => 58,
        "ospf" => 89,
        "pim" => 103,
        "vrrp" => 112,
        "l2tp" => 115,
        "udplite" => 136,
        "mh" => 135,
        other => Proto::from_name(other)?.number(),
    })
}
