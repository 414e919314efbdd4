//! The paths that a Rust source file names, read without a parser: enough for `use` trees, inline paths and macro names.
use std::collections::BTreeMap;

/// A path with `crate`, `self`, `super` and the file's own `use` names resolved, and the line that names it.
#[derive(Clone, Debug, PartialEq)]
pub struct Import {
    /// From 1.
    pub line: usize,
    /// `std::fs::File`, `crate::core::model`, `std::net::*` for a glob, `println!` for a macro.
    pub path: String,
}

/// All paths in `source`, the file of `module`; comments, strings and `#[cfg(test)]` items are not read.
pub fn imports(module: &[&str], source: &str) -> Vec<Import> {
    let tokens = without_tests(&tokens(&blank(source)));
    let mut found = Vec::new();
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    let mut at = 0;
    while at < tokens.len() {
        if tokens[at].text == "use" {
            let line = tokens[at].line;
            at += 1;
            let mut leaves = Vec::new();
            use_tree(&tokens, &mut at, String::new(), &mut leaves);
            for (path, name) in leaves {
                let path = resolve(module, &path);
                names.insert(name, path.clone());
                found.push(Import { line, path });
            }
        } else if is_name(&tokens[at].text) {
            let line = tokens[at].line;
            let path = inline_path(&tokens, &mut at);
            let (first, rest) = path.split_once("::").map_or((path.as_str(), ""), |(first, rest)| (first, rest));
            let path = match names.get(first) {
                Some(full) if !rest.is_empty() => format!("{full}::{rest}"),
                _ => resolve(module, &path),
            };
            if path.contains("::") || path.ends_with('!') {
                found.push(Import { line, path });
            }
        } else {
            at += 1;
        }
    }
    found
}

struct Token {
    line: usize,
    text: String,
}

fn is_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

/// Leaves of a `use` tree as (path, local name).
fn use_tree(tokens: &[Token], at: &mut usize, prefix: String, leaves: &mut Vec<(String, String)>) {
    let mut path = prefix;
    while let Some(token) = tokens.get(*at) {
        match token.text.as_str() {
            "::" => *at += 1,
            "{" => {
                *at += 1;
                while tokens.get(*at).is_some_and(|token| token.text != "}") {
                    use_tree(tokens, at, path.clone(), leaves);
                    if tokens.get(*at).is_some_and(|token| token.text == ",") {
                        *at += 1;
                    }
                }
                *at += 1;
                return;
            }
            "as" => {
                let name = tokens.get(*at + 1).map(|token| token.text.clone()).unwrap_or_default();
                *at += 2;
                leaves.push((path, name));
                return;
            }
            "self" if !path.is_empty() => *at += 1,
            "*" => {
                *at += 1;
                path.push_str("::*");
            }
            name if is_name(name) => {
                let joint = if path.is_empty() { "" } else { "::" };
                path = format!("{path}{joint}{name}");
                *at += 1;
            }
            _ => break,
        }
    }
    if tokens.get(*at).is_none_or(|token| ![",", "}", ";"].contains(&token.text.as_str())) {
        *at += 1;
    }
    let name = path.rsplit("::").next().unwrap_or_default().to_owned();
    leaves.push((path, name));
}

/// `a::b::c` or `name!` from here on.
fn inline_path(tokens: &[Token], at: &mut usize) -> String {
    let mut path = tokens[*at].text.clone();
    *at += 1;
    let text = |at: usize| tokens.get(at).map_or("", |token| token.text.as_str());
    while text(*at) == "::" && is_name(text(*at + 1)) {
        path = format!("{path}::{}", text(*at + 1));
        *at += 2;
    }
    if text(*at) == "!" && text(*at + 1) != "=" {
        path.push('!');
    }
    path
}

/// `crate`, `self` and `super` made absolute; the library's own name is `crate` to its binary.
fn resolve(module: &[&str], path: &str) -> String {
    let mut here: Vec<&str> = module.to_vec();
    let mut parts = path.split("::").peekable();
    match parts.peek().copied() {
        Some("porttrace_user") => {
            let rest: Vec<&str> = parts.skip(1).collect();
            return std::iter::once("crate").chain(rest).collect::<Vec<_>>().join("::");
        }
        Some("self" | "super") => {}
        _ => return path.to_owned(),
    }
    while let Some(up) = parts.next_if(|part| matches!(*part, "self" | "super")) {
        if up == "super" {
            here.pop();
        }
    }
    std::iter::once("crate").chain(here).chain(parts).collect::<Vec<_>>().join("::")
}

/// Names, `::`, and single other characters.
fn tokens(source: &str) -> Vec<Token> {
    let mut found: Vec<Token> = Vec::new();
    for (number, text) in source.lines().enumerate() {
        let line = number + 1;
        let mut rest = text.trim_start();
        while let Some(first) = rest.chars().next() {
            let word = rest.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(rest.len());
            let length = if word > 0 {
                word
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            found.push(Token { line, text: rest[..length].to_owned() });
            rest = rest[length..].trim_start();
        }
    }
    found
}

/// Leaves out every item under `#[cfg(test)]`: up to its `;`, or to the end of its braces.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let marker = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let marked = tokens[at..].iter().map(|token| token.text.as_str()).take(marker.len()).eq(marker);
        if !marked {
            kept.push(Token { line: tokens[at].line, text: tokens[at].text.clone() });
            at += 1;
            continue;
        }
        let mut depth = 0;
        while let Some(token) = tokens.get(at) {
            at += 1;
            match token.text.as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                ";" if depth == 0 => break,
                _ => continue,
            }
            if depth == 0 {
                break;
            }
        }
    }
    kept
}

/// The source with comments, strings and character literals made blank; lines stay where they are.
fn blank(source: &str) -> String {
    let letters: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while at < letters.len() {
        let length = opaque(&letters[at..], at.checked_sub(1).map(|before| letters[before]));
        if length == 0 {
            out.push(letters[at]);
            at += 1;
        } else {
            let end = (at + length).min(letters.len());
            out.extend(letters[at..end].iter().map(|letter| if *letter == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

/// How many characters the comment, string or character literal that starts here has; 0 when none does.
fn opaque(rest: &[char], before: Option<char>) -> usize {
    let starts = |text: &str| text.chars().eq(rest.iter().copied().take(text.len()));
    if starts("//") {
        return rest.iter().position(|letter| *letter == '\n').unwrap_or(rest.len());
    }
    if starts("/*") {
        return block_comment(rest);
    }
    let in_word = before.is_some_and(|letter| letter.is_alphanumeric() || letter == '_');
    match rest[0] {
        '"' => quoted(rest, 1, '"'),
        'r' if !in_word => raw_string(rest),
        '\'' if rest.get(1) == Some(&'\\') => quoted(rest, 1, '\''),
        '\'' if rest.get(2) == Some(&'\'') => 3,
        _ => 0,
    }
}

fn block_comment(rest: &[char]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at + 1 < rest.len() {
        match (rest[at], rest[at + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

fn quoted(rest: &[char], from: usize, end: char) -> usize {
    let mut at = from;
    while at < rest.len() {
        match rest[at] {
            '\\' => at += 2,
            letter if letter == end => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

fn raw_string(rest: &[char]) -> usize {
    let hashes = rest[1..].iter().take_while(|letter| **letter == '#').count();
    if rest.get(1 + hashes) != Some(&'"') {
        return 0;
    }
    let mut at = hashes + 2;
    while at < rest.len() {
        if rest[at] == '"' && rest[at + 1..].iter().take(hashes).filter(|letter| **letter == '#').count() == hashes {
            return at + 1 + hashes;
        }
        at += 1;
    }
    rest.len()
}
