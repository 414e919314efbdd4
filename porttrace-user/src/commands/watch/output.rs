//! Puts the live log on standard output: text or JSON lines, folded where connections are alike.

use super::probing::Loss;
use porttrace_user::core::correlate::flow::{End, Flow};
use porttrace_user::core::correlate::fold::{Bundle, Folder, Mode, Shape, Show};
use porttrace_user::core::model::flow::Tuple;
use porttrace_user::render::style::{Style, wrap};
use porttrace_user::render::watch::header::{self, Header, Opening, Summary};
use porttrace_user::render::watch::words::{self, Mood};
use porttrace_user::render::watch::{Context, Report, block, json};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufWriter, Stdout, Write};

/// Turns the probe's monotonic times into wall-clock times.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// CLOCK_REALTIME minus CLOCK_MONOTONIC, nanoseconds.
    pub offset_ns: i128,
}

impl Clock {
    /// Measures the offset now.
    pub fn measure() -> anyhow::Result<Self> {
        use nix::time::{ClockId, clock_gettime};
        let nanoseconds = |clock| -> anyhow::Result<i128> {
            let time = clock_gettime(clock)?;
            Ok(i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
        };
        Ok(Self { offset_ns: nanoseconds(ClockId::CLOCK_REALTIME)? - nanoseconds(ClockId::CLOCK_MONOTONIC)? })
    }

    /// Now, on CLOCK_MONOTONIC.
    pub fn now() -> u64 {
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
            u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
        })
    }

    fn timestamp(self, monotonic_ns: u64) -> jiff::Timestamp {
        jiff::Timestamp::from_nanosecond(self.offset_ns + i128::from(monotonic_ns))
            .unwrap_or(jiff::Timestamp::UNIX_EPOCH)
    }

    /// `12:04:05.123456` in the node's time zone.
    pub fn local(self, monotonic_ns: u64) -> String {
        let zoned = self.timestamp(monotonic_ns).to_zoned(jiff::tz::TimeZone::system());
        zoned.strftime("%H:%M:%S%.6f").to_string()
    }

    /// RFC 3339 in UTC.
    pub fn utc(self, monotonic_ns: u64) -> String {
        format!("{:.9}", self.timestamp(monotonic_ns))
    }
}

/// The events of a session: those that user space read, and those for which a buffer had no room. Together they are all that
/// the kernel had to tell.
#[derive(Clone, Copy, Debug)]
pub struct Events {
    pub received: u64,
    pub lost: u64,
    /// Read, and of no watched connection as far as conntrack told.
    pub unclaimed: u64,
}

/// Connections that were shown and whose end is still to be shown; older ones are forgotten.
const MAX_AWAITED: usize = 10_000;
/// Beyond this many kinds of connections, clients are no longer told apart.
const MAX_SHAPES: usize = 1_000;

/// A connection that was told without an answer.
struct Unanswered {
    shape: Shape,
    /// It had a line of its own.
    was_shown: bool,
}

pub struct Printer {
    out: BufWriter<Stdout>,
    json: bool,
    verbose: bool,
    style: Style,
    clock: Clock,
    folder: Folder,
    verdicts: BTreeMap<Shape, (Mood, String)>,
    awaited: BTreeSet<u64>,
    /// The last line of the log is an empty one: a whole story ends so.
    has_gap: bool,
    /// Connections without an answer that were told, and as what: a late answer amends that.
    unanswered: BTreeMap<u64, Unanswered>,
    pub connections: u64,
}

impl Printer {
    pub fn new(json: bool, mode: Mode, verbose: bool, style: Style, clock: Clock) -> Self {
        Self {
            out: BufWriter::with_capacity(1 << 16, io::stdout()),
            json,
            verbose,
            style,
            clock,
            folder: Folder::new(mode),
            verdicts: BTreeMap::new(),
            awaited: BTreeSet::new(),
            has_gap: false,
            unanswered: BTreeMap::new(),
            connections: 0,
        }
    }

    /// The first lines; `capturing`: since when nothing is missed, nanoseconds since the start.
    pub fn opening(&mut self, opening: &Opening<'_>, capturing: Option<u64>) -> io::Result<()> {
        if !self.json {
            self.out.write_all(header::opening(opening, self.style).as_bytes())?;
        } else if let Some(capturing_ns) = capturing {
            let status = json!({
                "state": "capturing",
                "ports": opening.ports,
                "node": opening.node,
                "kernel": opening.kernel,
                "probes": opening.probes,
                "capturing_ns": capturing_ns,
            });
            json::line(&mut self.out, "status", status)?;
        }
        self.out.flush()
    }

    /// What else stands above the log; also says that the session is ready.
    pub fn header(&mut self, opening: &Opening<'_>, header: &Header<'_>) -> io::Result<()> {
        if self.json {
            let status = json!({
                "state": "ready",
                "ports": opening.ports,
                "node": opening.node,
                "kernel": opening.kernel,
                "probes": opening.probes,
                "rules": header.rules,
                "inside": header.inside,
                "warnings": header.warnings,
                "ready_ns": header.ready_ns,
            });
            json::line(&mut self.out, "status", status)?;
        } else {
            let text = header::header(header, self.style);
            self.out.write_all(text.as_bytes())?;
        }
        self.out.flush()
    }

    /// Counts a connection of a shape that [`Self::report`] returned, if such are only counted now; false when it is to be reported.
    pub fn count(&mut self, shape: &Shape, flow: &Flow, now_ns: u64) -> bool {
        if self.json || !self.folder.count(shape, flow.id, now_ns) {
            return false;
        }
        self.connections += 1;
        self.await_answer(flow, shape, false);
        true
    }

    /// A connection whose outcome is known; returns what it is counted as.
    pub fn report(&mut self, report: &Report, context: &Context<'_>, now_ns: u64) -> io::Result<Shape> {
        self.connections += 1;
        let (mood, verdict) = words::verdict(report, context, false);
        let shape = self.shape(report, &verdict);
        let id = report.flow.id;
        self.verdicts.entry(shape.clone()).or_insert((mood, verdict));
        let show = self.folder.show(&shape, id, now_ns);
        self.await_answer(&report.flow, &shape, show != Show::Counted);
        if self.json {
            json::flow(&mut self.out, report, context, &self.clock.utc(report.flow.start_ns))?;
            return Ok(shape);
        }
        match show {
            Show::Whole => {
                let time = self.clock.local(report.flow.start_ns);
                let text = block::block(report, context, self.style, &time, self.verbose);
                writeln!(self.out, "{text}")?;
                self.has_gap = true;
            }
            Show::Line { like } => {
                let (mood, verdict) = words::verdict(report, context, true);
                let flow = &report.flow;
                let lead = format!("#{id} {} {}  as #{like}: ", flow.original.proto, flow.original);
                let verdict = block::paint(mood, self.style, &format!("{} {verdict}", mood.mark()));
                self.wrapped(&lead, &verdict)?;
            }
            Show::Counted => return Ok(shape),
        }
        if report.flow.end.is_none() && mood == Mood::Good {
            self.await_end(id);
        }
        Ok(shape)
    }

    /// A connection that was told as unanswered got its answer after all: one line, and the sum counts it as what it is now.
    pub fn amend(&mut self, report: &Report, context: &Context<'_>) -> io::Result<()> {
        let (mood, verdict) = words::verdict(report, context, false);
        let verdict = words::late(&verdict);
        let shape = self.shape(report, &verdict);
        let id = report.flow.id;
        self.verdicts.entry(shape.clone()).or_insert((mood, verdict));
        let before = self.unanswered.remove(&id);
        if let Some(before) = &before {
            self.folder.amend(&before.shape, &shape, id);
        }
        if self.json {
            return json::amendment(&mut self.out, report, context);
        }
        if !before.is_some_and(|before| before.was_shown) {
            return Ok(());
        }
        let (mood, verdict) = words::verdict(report, context, true);
        let flow = &report.flow;
        let lead = format!("#{id} {} {}  ", flow.original.proto, flow.original);
        let verdict = block::paint(mood, self.style, &format!("{} {}", mood.mark(), words::late(&verdict)));
        self.wrapped(&lead, &verdict)?;
        if flow.end.is_none() && mood == Mood::Good {
            self.await_end(id);
        }
        Ok(())
    }

    /// Remembers what a connection was told as, should an answer come late.
    fn await_answer(&mut self, flow: &Flow, shape: &Shape, was_shown: bool) {
        if flow.answered {
            return;
        }
        self.unanswered.insert(flow.id, Unanswered { shape: shape.clone(), was_shown });
        if self.unanswered.len() > MAX_AWAITED {
            self.unanswered.pop_first();
        }
    }

    fn await_end(&mut self, id: u64) {
        self.awaited.insert(id);
        if self.awaited.len() > MAX_AWAITED {
            self.awaited.pop_first();
        }
    }

    /// A connection that was reported has ended.
    pub fn ended(&mut self, id: u64, original: Tuple, start_ns: u64, end: &End) -> io::Result<()> {
        if self.json {
            return json::flow_end(&mut self.out, id, start_ns, end);
        }
        if !self.awaited.remove(&id) {
            return Ok(());
        }
        let text = format!("#{id} {} {}  {}", original.proto, original, block::ended(end, start_ns));
        self.line(&self.style.dim(text))
    }

    /// Something that happened to the node or to us, with its time.
    pub fn note(&mut self, text: &str, now_ns: u64, warning: bool) -> io::Result<()> {
        if self.json {
            let fields = json!({"time": self.clock.utc(now_ns), "text": text, "warning": warning});
            json::line(&mut self.out, "note", fields)?;
        } else {
            let time = self.clock.local(now_ns);
            let line = format!("! {time}  {text}");
            self.line(&if warning { self.style.bad(line) } else { self.style.warn(line) })?;
        }
        self.out.flush()
    }

    /// What was lost, as totals of the session; `received` are events that were read.
    pub fn lost(&mut self, losses: &[Loss], received: u64, now_ns: u64) -> io::Result<()> {
        if self.json {
            let counts: serde_json::Map<String, serde_json::Value> =
                losses.iter().map(|loss| (loss.name.to_owned(), json!(loss.count))).collect();
            let fields = json!({"time": self.clock.utc(now_ns), "total": counts, "received": received});
            json::line(&mut self.out, "lost", fields)?;
            return self.out.flush();
        }
        losses.iter().try_for_each(|loss| self.note(&loss.so_far(), now_ns, true))
    }

    /// Lines for what was only counted since the last call; call about once a second.
    pub fn bundles(&mut self) -> io::Result<()> {
        let bundles = self.folder.take_bundles();
        if self.json || bundles.is_empty() {
            return Ok(());
        }
        for Bundle { shape, like, count, first_id, last_id } in bundles {
            let Some((mood, verdict)) = self.verdicts.get(&shape).cloned() else { continue };
            let lead = format!("#{first_id}–#{last_id}  {count} more as #{like}: ");
            let verdict = block::paint(mood, self.style, &format!("{} {verdict}", mood.mark()));
            self.wrapped(&lead, &verdict)?;
        }
        self.out.flush()
    }

    /// The sum of the session. `lost` are sentences.
    pub fn summary(&mut self, duration_ns: u64, events: Events, lost: &[String]) -> io::Result<()> {
        let shapes = self.totals();
        if self.json {
            let verdicts: Vec<_> = shapes
                .iter()
                .map(|(verdict, like, total, _)| json!({"text": verdict, "like": like, "connections": total}))
                .collect();
            let fields = json!({
                "state": "ended", "connections": self.connections, "duration_ns": duration_ns,
                "verdicts": verdicts, "lost": lost,
                "events": {"received": events.received, "lost": events.lost, "unclaimed": events.unclaimed},
            });
            json::line(&mut self.out, "status", fields)?;
        } else {
            let summary = Summary { connections: self.connections, duration_ns, shapes, lost };
            let text = header::summary(&summary, self.style);
            if !self.has_gap {
                self.line("")?;
            }
            write!(self.out, "{text}")?;
        }
        self.out.flush()
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// (verdict, first connection with it, how many, mood), clients told together, most first.
    fn totals(&self) -> Vec<(String, u64, u64, Mood)> {
        let mut totals: Vec<(String, u64, u64, Mood)> = Vec::new();
        for (shape, like, count) in self.folder.totals() {
            let Some((mood, verdict)) = self.verdicts.get(shape) else { continue };
            match totals.iter_mut().find(|(text, ..)| text == verdict) {
                Some((_, first, total, _)) => {
                    *first = like.min(*first);
                    *total += count;
                }
                None => totals.push((verdict.clone(), like, count, *mood)),
            }
        }
        totals.sort_by(|a, b| b.2.cmp(&a.2).then(a.1.cmp(&b.1)));
        totals
    }

    fn shape(&self, report: &Report, verdict: &str) -> Shape {
        let flow = &report.flow;
        let client = if self.verdicts.len() < MAX_SHAPES { flow.original.src.to_string() } else { "any".to_owned() };
        let end = flow.destination();
        // An answer goes back to whom the server saw.
        let seen_as = flow.snat().flatten().map_or_else(String::new, |tuple| format!(" as {}", tuple.src));
        let agrees = if report.story.contradicts() { " against the rules" } else { "" };
        let proto = flow.original.proto;
        Shape(format!("{proto} {client}{seen_as} {} {end} {verdict}{agrees}", flow.original.destination()).into())
    }

    /// `lead` and `text` on one line where they fit, else `text` indented below.
    fn wrapped(&mut self, lead: &str, text: &str) -> io::Result<()> {
        let plain = lead.chars().count() + text.chars().count();
        if plain <= self.style.width {
            return self.line(&format!("{lead}{text}"));
        }
        self.line(lead.trim_end())?;
        wrap(text, self.style.width.saturating_sub(4)).iter().try_for_each(|line| self.line(&format!("    {line}")))
    }

    fn line(&mut self, text: &str) -> io::Result<()> {
        self.has_gap = false;
        writeln!(self.out, "{text}")
    }
}
