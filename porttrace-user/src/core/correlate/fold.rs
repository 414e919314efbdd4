//! Folding: connections of the same shape are told once and then counted.

use std::collections::BTreeMap;

/// What makes two connections the same to a reader: everything but ports of the client, times and numbers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape(pub String);

/// What to print for a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Show {
    /// Its whole story.
    Whole,
    /// One line that refers to the connection with this id, whose story was told.
    Line { like: u64 },
    /// Nothing now: it is counted, and a line for the whole bundle follows.
    Counted,
}

/// Many connections of one shape, as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    pub shape: Shape,
    /// The connection whose story was told.
    pub like: u64,
    pub count: u64,
    pub first_id: u64,
    pub last_id: u64,
}

#[derive(Clone, Debug, Default)]
struct Seen {
    told: u64,
    window_start: u64,
    in_window: u64,
    bundled: u64,
    first: u64,
    last: u64,
    total: u64,
}

/// How connections are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Every story whole.
    All,
    /// A shape's first story whole, later ones a line, fast ones bundled.
    Auto,
    /// A shape's first story whole, all others bundled.
    Summary,
}

/// The bookkeeper of shapes.
#[derive(Debug)]
pub struct Folder {
    mode: Mode,
    shapes: BTreeMap<Shape, Seen>,
}

/// More connections of a shape than this within a second are bundled.
const LINES_PER_SECOND: u64 = 5;
const SECOND: u64 = 1_000_000_000;

impl Folder {
    pub const fn new(mode: Mode) -> Self {
        Self { mode, shapes: BTreeMap::new() }
    }

    /// Decides how connection `id` is shown at `now_ns`, and counts it.
    pub fn show(&mut self, shape: &Shape, id: u64, now_ns: u64) -> Show {
        let mode = self.mode;
        let seen = self.shapes.entry(shape.clone()).or_default();
        seen.total += 1;
        if seen.told == 0 {
            seen.told = id;
            seen.window_start = now_ns;
            return Show::Whole;
        }
        if mode == Mode::All {
            return Show::Whole;
        }
        if now_ns.saturating_sub(seen.window_start) >= SECOND {
            seen.window_start = now_ns;
            seen.in_window = 0;
        }
        seen.in_window += 1;
        if mode == Mode::Auto && seen.in_window <= LINES_PER_SECOND && seen.bundled == 0 {
            return Show::Line { like: seen.told };
        }
        if seen.bundled == 0 {
            seen.first = id;
        }
        seen.bundled += 1;
        seen.last = id;
        Show::Counted
    }

    /// Counts connection `id`, which was counted as `before`, as `after`.
    pub fn amend(&mut self, before: &Shape, after: &Shape, id: u64) {
        if let Some(seen) = self.shapes.get_mut(before) {
            seen.total = seen.total.saturating_sub(1);
        }
        let seen = self.shapes.entry(after.clone()).or_default();
        seen.total += 1;
        if seen.told == 0 {
            seen.told = id;
        }
    }

    /// The bundles that have gathered; call about once a second.
    pub fn take_bundles(&mut self) -> Vec<Bundle> {
        let mut bundles = Vec::new();
        for (shape, seen) in &mut self.shapes {
            if seen.bundled > 0 {
                bundles.push(Bundle {
                    shape: shape.clone(),
                    like: seen.told,
                    count: seen.bundled,
                    first_id: seen.first,
                    last_id: seen.last,
                });
                seen.bundled = 0;
            }
        }
        bundles.sort_by_key(|bundle| bundle.first_id);
        bundles
    }

    /// All shapes with the connection that was told and how many there were, most first.
    pub fn totals(&self) -> Vec<(&Shape, u64, u64)> {
        let counted = self.shapes.iter().filter(|(_, seen)| seen.total > 0);
        let mut totals: Vec<_> = counted.map(|(shape, seen)| (shape, seen.told, seen.total)).collect();
        totals.sort_by(|a, b| b.2.cmp(&a.2).then(a.1.cmp(&b.1)));
        totals
    }
}
