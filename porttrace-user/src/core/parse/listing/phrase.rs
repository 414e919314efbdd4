//! The text after the columns of a listing: phrase by phrase what matches and the target printed.

use super::matches::{protocol, simple, worded};
use super::target;

/// The end of a row, read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Phrases {
    /// Options of the matches, as `iptables-save` writes them.
    pub matches: Vec<String>,
    /// Options of the target.
    pub target: Vec<String>,
    pub goto: bool,
    /// Stretches that no phrase explains.
    pub unknown: Vec<String>,
}

/// Reads the text after the columns. `v6` chooses between icmp and icmp6.
pub(super) fn parse(rest: &str, target: Option<&str>, v6: bool) -> Phrases {
    let mut phrases = Phrases::default();
    let mut text = rest.trim();
    if let Some(after) = text.strip_prefix("[goto]") {
        phrases.goto = true;
        text = after.trim();
    }
    let mut unknown = String::new();
    while !text.is_empty() {
        if let Some((found, after)) = one(text, target, v6) {
            flush(&mut unknown, &mut phrases);
            match found {
                Found::Match(options) => add_match(&mut phrases.matches, options),
                Found::Target(options) => phrases.target.push(options),
            }
            text = after.trim_start();
        } else {
            let (word, after) = split_word(text);
            if !unknown.is_empty() {
                unknown.push(' ');
            }
            unknown.push_str(word);
            text = after;
        }
    }
    flush(&mut unknown, &mut phrases);
    phrases
}

fn flush(unknown: &mut String, phrases: &mut Phrases) {
    if !unknown.is_empty() {
        // The bpf match prints a NUL.
        phrases.unknown.push(std::mem::take(unknown).replace(char::is_control, ""));
    }
}

/// conntrack prints one phrase for each of its options; they belong to one match.
fn add_match(matches: &mut Vec<String>, options: String) {
    if let Some(option) = options.strip_prefix("-m conntrack ")
        && let Some(last) = matches.last_mut().filter(|last| last.starts_with("-m conntrack "))
    {
        last.push(' ');
        last.push_str(option);
    } else {
        matches.push(options);
    }
}

enum Found {
    Match(String),
    Target(String),
}

/// One phrase at the start of `text`, and what follows it.
fn one<'a>(text: &'a str, target: Option<&str>, v6: bool) -> Option<(Found, &'a str)> {
    if let Some(found) = target.and_then(|target| target::options(text, target)) {
        return Some((Found::Target(found.0), found.1));
    }
    if let Some(after) = text.strip_prefix("/*") {
        let (comment, after) = comment(after, target, v6);
        return Some((Found::Match(format!("-m comment --comment {}", quote(comment))), after));
    }
    let (not, body) = text.strip_prefix("! ").map_or((false, text), |body| (true, body));
    let (options, after) = protocol(body, v6).or_else(|| simple(body)).or_else(|| worded(body))?;
    // `! ` stands in front of the whole phrase and negates its first option.
    let options = if not { negate(&options)? } else { options };
    Some((Found::Match(options), after))
}

/// Puts `!` before the first option of `-m NAME --option …`.
pub(super) fn negate(options: &str) -> Option<String> {
    let at = options.find(" --")?;
    Some(format!("{} !{}", &options[..at], &options[at..]))
}

pub(super) fn split_word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.find(' ').map_or((text, ""), |at| (&text[..at], text[at..].trim_start()))
}

/// Quotes like `xtables_save_string`: only where needed.
pub(super) fn quote(text: &str) -> String {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    if plain { text.to_owned() } else { format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")) }
}

/// A comment may hold `*/` itself: it ends at the first one after which everything reads as phrases, else at the last.
fn comment<'a>(text: &'a str, target: Option<&str>, v6: bool) -> (&'a str, &'a str) {
    let ends: Vec<usize> = text.match_indices("*/").map(|(at, _)| at).take(8).collect();
    let clear = ends.iter().find(|at| {
        let after = text[**at + 2..].trim_start();
        after.is_empty() || one(after, target, v6).is_some()
    });
    match clear.or(ends.last()) {
        Some(at) => (text[..*at].trim(), &text[*at + 2..]),
        None => (text.trim(), ""),
    }
}
