//! Colour and width, decided once from what the caller knows of its output.

use std::fmt::Display;

/// When to colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum When {
    /// On a terminal, unless `NO_COLOR` is set or `TERM` is `dumb`.
    #[default]
    Auto,
    Always,
    Never,
}

/// How to print: with or without colour, and how wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    pub colour: bool,
    /// Columns that lines should keep to.
    pub width: usize,
}

/// Narrower than this nothing can be aligned; wider than the other nobody can read.
const WIDTHS: std::ops::RangeInclusive<usize> = 60..=140;
const DEFAULT_WIDTH: usize = 100;

impl Style {
    /// `is_terminal` and `columns` of the output, `no_colour`: the environment asks for none (https://no-color.org).
    pub fn new(when: When, is_terminal: bool, no_colour: bool, columns: Option<usize>) -> Self {
        let colour = match when {
            When::Auto => is_terminal && !no_colour,
            When::Always => true,
            When::Never => false,
        };
        let width = columns.unwrap_or(DEFAULT_WIDTH).clamp(*WIDTHS.start(), *WIDTHS.end());
        Self { colour, width }
    }

    /// Without colour, 100 columns: for tests and files.
    pub const fn plain() -> Self {
        Self { colour: false, width: DEFAULT_WIDTH }
    }

    fn paint(self, code: &str, text: impl Display) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    pub fn bold(self, text: impl Display) -> String {
        self.paint("1", text)
    }

    pub fn dim(self, text: impl Display) -> String {
        self.paint("2", text)
    }

    pub fn good(self, text: impl Display) -> String {
        self.paint("32", text)
    }

    pub fn bad(self, text: impl Display) -> String {
        self.paint("1;31", text)
    }

    pub fn warn(self, text: impl Display) -> String {
        self.paint("33", text)
    }

    pub fn accent(self, text: impl Display) -> String {
        self.paint("36", text)
    }
}

/// Printed columns of a text without escape codes.
pub fn columns(text: &str) -> usize {
    text.chars().count()
}

/// Shortens to `max` columns by an ellipsis in the middle, keeping the ends (chain names differ at their ends).
pub fn shorten(text: &str, max: usize) -> String {
    let count = columns(text);
    if count <= max || max < 3 {
        return text.to_owned();
    }
    let head = (max - 1).div_ceil(2);
    let tail = max - 1 - head;
    let start: String = text.chars().take(head).collect();
    let end: String = text.chars().skip(count - tail).collect();
    format!("{start}…{end}")
}

/// Breaks at spaces so that no line is longer than `width`; a longer word stays whole.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if columns(line) + 1 + columns(word) <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
