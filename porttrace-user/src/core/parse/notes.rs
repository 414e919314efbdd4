//! Where parsers say what they could not use.

use crate::core::model::state::Diagnostic;

/// How many diagnostics one source may make before the rest is only counted: a file of another kind would make one a line.
const LIMIT: usize = 100;

/// The diagnostics of one source (a file, or a command's output).
#[derive(Debug)]
pub struct Notes {
    source: String,
    kept: Vec<Diagnostic>,
    more: usize,
}

impl Notes {
    pub fn new(source: &str) -> Self {
        Self { source: source.to_owned(), kept: Vec::new(), more: 0 }
    }

    /// Notes a problem at a 1-based line (0: the source as a whole).
    pub fn add(&mut self, line: usize, message: impl Into<String>) {
        if self.kept.len() < LIMIT {
            self.kept.push(Diagnostic { source: self.source.clone(), line, message: message.into() });
        } else {
            self.more += 1;
        }
    }

    /// All diagnostics, the last one saying how many more there were.
    pub fn finish(mut self) -> Vec<Diagnostic> {
        if self.more > 0 {
            let message = format!("{} more lines like these", self.more);
            self.kept.push(Diagnostic { source: self.source, line: 0, message });
        }
        self.kept
    }
}

/// The beginning of a piece of input, fit to be quoted in a message.
pub fn quote(text: &str) -> String {
    const LENGTH: usize = 60;
    let mut shown: String = text.chars().take(LENGTH).collect();
    if text.chars().nth(LENGTH).is_some() {
        shown.push('…');
    }
    format!("{shown:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_first_hundred_and_counts_the_rest() {
        let mut notes = Notes::new("x");
        for line in 1..=150 {
            notes.add(line, "bad");
        }
        let all = notes.finish();
        assert_eq!(all.len(), LIMIT + 1);
        assert_eq!(all[LIMIT].message, "50 more lines like these");
    }

    #[test]
    fn quotes_briefly() {
        assert_eq!(quote("a\"b"), r#""a\"b""#);
        assert_eq!(quote(&"ä".repeat(61)), format!("\"{}…\"", "ä".repeat(60)));
    }
}
