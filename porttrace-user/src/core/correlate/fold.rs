//! Folding: connections of the same shape are told once and then counted.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What makes two connections the same to a reader: everything but ports of the client, times and numbers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape(pub Arc<str>);

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

impl Seen {
    /// Whether one more has a line, or a story, of its own.
    const fn has_line(&self, mode: Mode, now_ns: u64) -> bool {
        let is_early = now_ns.saturating_sub(self.window_start) >= SECOND || self.in_window < LINES_PER_SECOND;
        match mode {
            Mode::All => true,
            Mode::Auto => is_early && self.bundled == 0,
            Mode::Summary => false,
        }
    }

    /// One more in this second.
    const fn next(&mut self, now_ns: u64) {
        if now_ns.saturating_sub(self.window_start) >= SECOND {
            self.window_start = now_ns;
            self.in_window = 0;
        }
        self.in_window += 1;
    }

    const fn bundle(&mut self, id: u64, now_ns: u64) {
        self.next(now_ns);
        if self.bundled == 0 {
            self.first = id;
        }
        self.bundled += 1;
        self.last = id;
    }
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

    /// Counts connection `id` if those of its shape are only counted at `now_ns`; false when [`Self::show`] has to decide.
    pub fn count(&mut self, shape: &Shape, id: u64, now_ns: u64) -> bool {
        let mode = self.mode;
        let Some(seen) = self.shapes.get_mut(shape).filter(|seen| seen.told != 0 && !seen.has_line(mode, now_ns))
        else {
            return false;
        };
        seen.total += 1;
        seen.bundle(id, now_ns);
        true
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
        if seen.has_line(mode, now_ns) {
            seen.next(now_ns);
            return Show::Line { like: seen.told };
        }
        seen.bundle(id, now_ns);
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
