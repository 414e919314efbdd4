//! Hops as aligned lines, branches under guides.

use super::Context;
use super::fold::{self, Shown};
use super::tree::{Child, End, Node};
use super::words::{self, clean};
use crate::core::model::flow::Tuple;
use crate::core::model::trace::{Action, Decision, Fraction, Hook, Hop, Manip, Route};
use crate::render::style::{Style, columns, wrap};
use crate::render::watch::words::{Mood, comment};
use std::fmt::Write;

/// Columns of the hook (or what stands in its place) and of the table.
const HOOK: usize = 12;
const TABLE: usize = 7;

/// Colours a text by its mood.
pub fn mooded(style: Style, mood: Mood, text: &str) -> String {
    match mood {
        Mood::Good => style.good(text),
        Mood::Bad => style.bad(text),
        Mood::Unsure => style.warn(text),
    }
}

/// Where a line starts, and what was printed last in the first two columns.
struct Printer<'p, 'c> {
    context: &'p Context<'c>,
    out: &'p mut String,
    guide: String,
    hook: Option<Hook>,
    /// Where the last line of a reply's way back ended.
    reply: Option<Tuple>,
}

/// Prints a tree.
pub fn tree(root: &Node<'_>, context: &Context<'_>, out: &mut String) {
    Printer { context, out, guide: "  ".to_owned(), hook: None, reply: None }.node(root);
}

impl Printer<'_, '_> {
    fn node(&mut self, node: &Node<'_>) {
        self.hops(&node.hops);
        match &node.end {
            End::Leaf(branch) => {
                let (mood, sentence) = words::verdict(branch, self.context);
                self.verdict(mood, &sentence);
            }
            End::Fork(children) => self.fork(children),
        }
    }

    fn hops(&mut self, hops: &[&Hop]) {
        for (i, hop) in hops.iter().enumerate() {
            if self.context.verbose == 0 && is_dull(hop) {
                continue;
            }
            let dead_end = self.context.verbose == 0 && leads_nowhere(hop, hops.get(i + 1).copied());
            self.hop(hop, dead_end);
        }
    }

    fn fork(&mut self, children: &[Child<'_>]) {
        let shown = fold::fold(children, self.context.all);
        let guide = self.guide.clone();
        let last = shown.len() - 1;
        for (i, shown) in shown.iter().enumerate() {
            self.hook = None;
            let (tee, bar) = if i == last { ("└─", "  ") } else { ("├─", "│ ") };
            match shown {
                Shown::Whole(child) => {
                    self.heading(&guide, tee, bar, child);
                    self.guide = format!("{guide}{} ", self.context.style.dim(bar));
                    self.node(&child.node);
                }
                Shown::Alike { child, like } => {
                    self.heading(&guide, tee, bar, child);
                    self.guide = format!("{guide}{} ", self.context.style.dim(bar));
                    self.alike(&child.node, &like.node);
                }
                Shown::Brief(child) => self.brief(&guide, tee, bar, child),
                Shown::More { count, together } => {
                    let style = self.context.style;
                    let text = format!(
                        "… and {count} more like these, {} together (--all shows each)",
                        words::fraction(*together)
                    );
                    let _ = writeln!(self.out, "{guide}{} {}", style.dim(tee), style.bold(text));
                }
            }
        }
        self.guide = guide;
    }

    /// A leaf, without the steps that an older sibling has too.
    fn alike(&mut self, node: &Node<'_>, like: &Node<'_>) {
        let style = self.context.style;
        let (mut same, mut last) = (0, None);
        for (i, hop) in node.hops.iter().enumerate() {
            if like.hops.get(i) == Some(hop) {
                same += usize::from(!is_dull(hop));
                continue;
            }
            if let Hop::Rewrite { by: Some(by), .. } = hop
                && last != Some(by)
            {
                // The rewriting rule itself was the same.
                self.hook = None;
            }
            if let Hop::Rule { rule, .. } = hop {
                last = Some(rule);
            }
            self.hop(hop, false);
        }
        if same > 0 {
            self.plain("", &style.dim(format!("({same} more steps as in the first branch)")));
        }
        if let End::Leaf(branch) = &node.end {
            let (mood, sentence) = words::verdict(branch, self.context);
            self.verdict(mood, &sentence);
        }
    }

    /// `├─ 1/3  random, by nat KUBE-SVC-… #2`
    fn heading(&mut self, guide: &str, tee: &str, bar: &str, child: &Child<'_>) {
        let style = self.context.style;
        let probability = chance(child);
        let why = if child.decisions.is_empty() { "otherwise".to_owned() } else { words::decisions(child.decisions) };
        let indent = columns(&strip(guide)) + 3 + columns(&probability) + 2;
        let lines = wrap(&why, style.width.saturating_sub(indent).max(20));
        for (i, line) in lines.iter().enumerate() {
            let _ = if i == 0 {
                writeln!(self.out, "{guide}{} {}  {}", style.dim(tee), style.bold(&probability), style.dim(line))
            } else {
                let pad = " ".repeat(columns(&probability));
                writeln!(self.out, "{guide}{} {pad}  {}", style.dim(bar), style.dim(line))
            };
        }
    }

    /// A branch like its older sibling, in one line.
    fn brief(&mut self, guide: &str, tee: &str, bar: &str, child: &Child<'_>) {
        let style = self.context.style;
        let probability = chance(child);
        let (mood, sentence) = words::summary(&child.node.leaves(), self.context);
        let why = child
            .decisions
            .iter()
            .rfind(|decision| !matches!(decision, Decision::Random { .. } | Decision::Drawn { .. }));
        let sentence = why.map_or_else(|| sentence.clone(), |why| format!("{}: {sentence}", words::decision(why)));
        let indent = columns(&strip(guide)) + 3 + columns(&probability) + 2;
        for (i, line) in wrap(&sentence, style.width.saturating_sub(indent + 2).max(20)).iter().enumerate() {
            let _ = if i == 0 {
                let mark = mooded(style, mood, mood.mark());
                writeln!(self.out, "{guide}{} {}  {mark} {line}", style.dim(tee), style.bold(&probability))
            } else {
                writeln!(self.out, "{guide}{} {}    {line}", style.dim(bar), " ".repeat(columns(&probability)))
            };
        }
    }

    fn verdict(&mut self, mood: Mood, sentence: &str) {
        let style = self.context.style;
        let room = style.width.saturating_sub(columns(&strip(&self.guide)) + 2).max(20);
        for (i, line) in wrap(sentence, room).iter().enumerate() {
            let mark = if i == 0 { mood.mark() } else { " " };
            let _ = writeln!(self.out, "{}{} {}", self.guide, mooded(style, mood, mark), mooded(style, mood, line));
        }
    }

    fn hop(&mut self, hop: &Hop, dead_end: bool) {
        let style = self.context.style;
        match hop {
            Hop::Receive { interface, tuple } => {
                self.plain("arrives by", &format!("{}  {tuple}", style.bold(clean(interface))))
            }
            Hop::LocalSend { tuple } => self.plain("sent here", &tuple.to_string()),
            Hop::Conntrack { state, entry } => {
                let entry = entry.as_ref().map_or_else(String::new, |entry| format!("  {}", clean(entry)));
                self.plain("conntrack", &format!("{state}{entry}"));
            }
            Hop::Rule { .. } => self.rule_hop(hop, dead_end),
            Hop::Rewrite { hook, what, before, after, .. } => {
                let label = self.enter(*hook);
                let line = match what {
                    Manip::Dnat => {
                        format!("{} → {}", before.destination(), style.bold(style.accent(after.destination())))
                    }
                    Manip::Snat => format!("{} → {}", before.source(), style.bold(style.accent(after.source()))),
                };
                let what = match what {
                    Manip::Dnat => "destination",
                    Manip::Snat => "source",
                };
                self.row(label, "", &format!("{what} {line}"));
            }
            Hop::Route { decision } => self.route(decision),
            Hop::Transmit { interface, gateway, tuple } => {
                let gateway = gateway.map_or_else(String::new, |gateway| format!("  via {gateway}"));
                self.plain("leaves by", &format!("{}{gateway}  {tuple}", style.bold(clean(interface))));
            }
            Hop::Deliver { tuple, listener } => {
                let listener = listener.as_ref().map_or_else(String::new, |name| format!("  {}", clean(name)));
                self.plain("delivered", &format!("{tuple}{listener}"));
            }
            Hop::ReplyRewrite { before, after } => self.reply(before, after),
            Hop::Note { text } => self.note(text),
        }
    }

    fn rule_hop(&mut self, hop: &Hop, dead_end: bool) {
        let Hop::Rule { hook, rule, action: done } = hop else { return };
        let done = words::done(done);
        let place = match (rule.chain.strip_prefix('?'), rule.number()) {
            // Nobody pasted this jump.
            _ if done == words::PASTED => rule.chain.to_string(),
            (Some(_), number) => format!("(pasted) {}", number.map_or_else(String::new, |n| format!("#{n}"))),
            (None, Some(number)) => match Context::whence(rule) {
                Some(whence) => format!("{} ({whence})", rule.chain),
                None => format!("{} #{number}", rule.chain),
            },
            (None, None) => format!("{} policy", rule.chain),
        };
        let text = rule.text();
        let line = RuleLine { hook: *hook, table: &rule.table, place: clean(&place), done, text: &text };
        if dead_end {
            self.passed(&line);
        } else {
            self.rule(&line, &words::conditions(&rule.because()));
        }
    }

    fn route(&mut self, decision: &Route) {
        let style = self.context.style;
        let (way, by) = words::route(decision);
        let room = style.width.saturating_sub(columns(&strip(&self.guide)) + HOOK);
        if columns(&way) + 2 + columns(&by) <= room {
            return self.plain("routing", format!("{way}  {}", style.dim(by)).trim_end());
        }
        self.plain("routing", &way);
        self.plain("", &format!("  {}", style.dim(by)));
    }

    fn reply(&mut self, before: &Tuple, after: &Tuple) {
        let style = self.context.style;
        if self.reply != Some(*before) {
            self.plain("reply", &before.to_string());
        }
        if before != after {
            self.plain("", &format!("becomes {}", style.accent(after)));
        }
        self.reply = Some(*after);
    }

    fn note(&mut self, text: &str) {
        self.hook = None;
        let style = self.context.style;
        let room = style.width.saturating_sub(columns(&strip(&self.guide)) + HOOK).max(20);
        for (i, line) in wrap(&clean(text), room).iter().enumerate() {
            self.row_in(if i == 0 { "note" } else { "" }, "", &style.warn(line));
        }
    }

    /// The hook is named when it changes.
    fn enter(&mut self, hook: Hook) -> &'static str {
        if self.hook == Some(hook) {
            return "";
        }
        self.hook = Some(hook);
        hook.name()
    }

    fn plain(&mut self, label: &str, text: &str) {
        self.hook = None;
        self.row_in(label, "", text);
    }

    fn row(&mut self, label: &str, table: &str, text: &str) {
        // `security` alone is longer than its column.
        let table = if table.len() < TABLE { table.to_owned() } else { format!("{table} ") };
        let _ = writeln!(self.out, "{}{label:HOOK$}{table:TABLE$}{text}", self.guide);
    }

    fn row_in(&mut self, label: &str, table: &str, text: &str) {
        let _ = writeln!(self.out, "{}{label:HOOK$}{table}{text}", self.guide);
    }

    fn rule(&mut self, line: &RuleLine<'_>, because: &str) {
        let style = self.context.style;
        let label = self.enter(line.hook);
        let decisive = !line.done.starts_with('→');
        let start = columns(&strip(&self.guide)) + HOOK + TABLE;
        let room = style.width.saturating_sub(start);
        let width = columns(&line.place) + 1 + columns(&line.done);
        let done = if decisive { style.bold(&line.done) } else { line.done.clone() };
        // Too long for a narrow terminal: what it did goes to a line of its own.
        let broken = format!("{}\n{}{}{done}", line.place, self.guide, " ".repeat(HOOK + TABLE + 2));
        let main = if width > room { broken } else { format!("{} {done}", line.place) };
        if self.context.verbose > 0 {
            self.row(label, line.table, &main);
            return self.full(line.text, room);
        }
        let said = comment(line.text).map(|comment| format!("\"{}\"", words::said(&clean(comment))));
        let reason = [Some(because.to_owned()).filter(|text| !text.is_empty()), said];
        let reason = reason.into_iter().flatten().collect::<Vec<_>>().join("  ");
        // Beside the rule where it fits, at a column that does not jump about; else below.
        let column = if width <= 44 { 46 } else { 64 };
        if reason.is_empty() {
            self.row(label, line.table, &main);
        } else if room > column && columns(&reason) <= room - column && width < column {
            let pad = " ".repeat(column - width);
            self.row(label, line.table, &format!("{main}{pad}{}", style.dim(reason)));
        } else {
            self.row(label, line.table, &main);
            self.row("", "", &format!("  {}", style.dim(cut(&reason, room.saturating_sub(2)))));
        }
    }

    /// A jump from which nothing came.
    fn passed(&mut self, line: &RuleLine<'_>) {
        let style = self.context.style;
        let label = self.enter(line.hook);
        let (place, done) = (&line.place, format!("{}, nothing there matches", line.done));
        let room = style.width.saturating_sub(columns(&strip(&self.guide)) + HOOK + TABLE);
        if columns(place) + 1 + columns(&done) <= room {
            return self.row(label, line.table, &style.dim(format!("{place} {done}")));
        }
        self.row(label, line.table, &style.dim(place));
        self.row("", "", &format!("  {}", style.dim(done)));
    }

    fn full(&mut self, text: &str, room: usize) {
        let style = self.context.style;
        for line in wrap(&clean(text), room.saturating_sub(2).max(20)) {
            self.row("", "", &format!("  {}", style.dim(line)));
        }
    }
}

/// `1/3`; `if` where an assumption leads here, with what chance comes on top.
fn chance(child: &Child<'_>) -> String {
    match (child.by_chance(), child.probability) {
        (true, probability) => words::fraction(probability),
        (false, Fraction::ONE) => "if".to_owned(),
        (false, probability) => format!("if, {}", words::fraction(probability)),
    }
}

/// One rule that matched, ready to be printed.
struct RuleLine<'a> {
    hook: Hook,
    table: &'a str,
    place: String,
    done: String,
    text: &'a str,
}

/// Built-in chains that let everything through by their policy; those of filter are worth a line.
fn is_dull(hop: &Hop) -> bool {
    matches!(hop, Hop::Rule { rule, action: Action::Accept, .. } if rule.number().is_none() && rule.table != "filter")
}

/// A jump after which the path goes on in the chain that it left, or in another base chain.
fn leads_nowhere(hop: &Hop, next: Option<&Hop>) -> bool {
    let Hop::Rule { action: Action::Jump { chain } | Action::Goto { chain }, .. } = hop else { return false };
    match next {
        Some(Hop::Rule { rule, .. }) => rule.chain != chain.chain,
        // What comes next hangs below a fork: it may well be in that chain.
        None => false,
        Some(Hop::Rewrite { .. } | Hop::Note { .. }) => false,
        Some(_) => true,
    }
}

/// Shortens at the end.
fn cut(text: &str, max: usize) -> String {
    if columns(text) <= max {
        return text.to_owned();
    }
    text.chars().take(max.saturating_sub(1)).chain(['…']).collect()
}

/// Columns count without escape codes.
fn strip(text: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for c in text.chars() {
        match (inside, c) {
            (false, '\x1b') => inside = true,
            (true, 'm') => inside = false,
            (false, c) => out.push(c),
            _ => {}
        }
    }
    out
}
