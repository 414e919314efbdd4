//! Words of a rule as iptables-save quotes them (`xtables_save_string`: double quotes, backslash before `"`, `\` and `'`).

use memchr::memchr2;
use std::borrow::Cow;

/// The words of a line, still quoted, in order.
pub struct Words<'a> {
    line: &'a str,
    at: usize,
    /// Start and end of the last word in the line.
    pub last: (usize, usize),
}

impl<'a> Words<'a> {
    pub const fn new(line: &'a str) -> Self {
        Self { line, at: 0, last: (0, 0) }
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let bytes = self.line.as_bytes();
        let space = bytes.get(self.at..)?.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        let start = self.at + space;
        let mut end = start;
        while let Some(rest) = bytes.get(end..) {
            end += rest.iter().position(|byte| ENDS[usize::from(*byte)]).unwrap_or(rest.len());
            if bytes.get(end) != Some(&b'"') {
                break;
            }
            end = quoted(bytes, end + 1);
        }
        self.at = end;
        self.last = (start, end);
        self.line.get(start..end).filter(|word| !word.is_empty())
    }
}

/// Whitespace and the double quote.
const ENDS: [bool; 256] = {
    let mut ends = [false; 256];
    let mut at = 0;
    while at < 256 {
        ends[at] = at == b'"' as usize || (at as u8).is_ascii_whitespace();
        at += 1;
    }
    ends
};

/// Behind the closing quote of what begins at `at`, or the end.
fn quoted(bytes: &[u8], mut at: usize) -> usize {
    while let Some(found) = bytes.get(at..).and_then(|rest| memchr2(b'"', b'\\', rest)) {
        at += found + 1;
        if bytes[at - 1] == b'"' {
            return at;
        }
        at += 1;
    }
    bytes.len()
}

/// A word without its quotes and backslashes.
pub fn unquote(word: &str) -> Cow<'_, str> {
    if !word.contains('"') {
        return Cow::Borrowed(word);
    }
    let mut plain = String::with_capacity(word.len());
    let mut quoted = false;
    let mut chars = word.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => quoted = !quoted,
            '\\' if quoted => plain.extend(chars.next()),
            other => plain.push(other),
        }
    }
    Cow::Owned(plain)
}

/// `00:11:22:aa:bb:cc`.
pub fn mac(text: &str) -> Option<[u8; 6]> {
    let byte = |text: &str| {
        let plain = text.len() <= 2 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        u8::from_str_radix(text, 16).ok().filter(|_| plain)
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    bytes?.try_into().ok()
}

/// As [`mac`] reads it.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_hold_words_together() {
        let line = r#"-A X  -m comment --comment "dnat name: \"kindnet\" id: \"ab\"" -j Y"#;
        let words: Vec<_> = Words::new(line).collect();
        assert_eq!(words.len(), 8);
        assert_eq!(unquote(words[5]), r#"dnat name: "kindnet" id: "ab""#);
        assert_eq!(Words::new(r#"--comment "open \"#).collect::<Vec<_>>(), ["--comment", r#""open \"#]);
        assert_eq!(Words::new("   ").next(), None);
    }
}
