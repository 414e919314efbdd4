//! `/proc/net/xt_recent/NAME`.

use super::notes::{Notes, quote};
use crate::core::model::state::RecentEntry;

/// The kernel's clock at the moment a list was read, which turns its jiffies into seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    pub jiffies: u64,
    /// `CONFIG_HZ`.
    pub hz: u64,
}

impl Clock {
    /// Reads `jiffies=N hz=N`, in any order and on any lines.
    pub fn parse(text: &str) -> Option<Self> {
        let value = |key: &str| -> Option<u64> {
            text.split_ascii_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
        };
        let hz = value("hz").filter(|hz| *hz > 0)?;
        Some(Self { jiffies: value("jiffies")?, hz })
    }
}

/// Reads one list, newest entry first where the clock is known; in the file's order otherwise.
///
/// A line is `src=ADDR ttl: N last_seen: JIFFIES oldest_pkt: INDEX JIFFIES, JIFFIES, …` (net/netfilter/xt_recent.c,
/// `recent_seq_show`; it says `src=` also for `--rdest`).
pub fn entries(text: &str, clock: Option<Clock>, notes: &mut Notes) -> Vec<RecentEntry> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        match entry(line, clock) {
            Some(entry) => found.push(entry),
            None => notes.add(index + 1, format!("not an xt_recent entry: {}", quote(line))),
        }
    }
    found.sort_by_key(|entry| entry.age);
    found
}

fn entry(line: &str, clock: Option<Clock>) -> Option<RecentEntry> {
    let address = line.split_ascii_whitespace().next()?.strip_prefix("src=")?.parse().ok()?;
    let (_, after) = line.split_once("last_seen: ")?;
    let last_seen: u64 = after.split_ascii_whitespace().next()?.parse().ok()?;
    let (_, stamps) = line.split_once("oldest_pkt: ")?;
    let hits = stamps.split_ascii_whitespace().skip(1).count();
    let age = clock.map(|clock| clock.jiffies.saturating_sub(last_seen) / clock.hz);
    Some(RecentEntry { address, age, hits: u32::try_from(hits).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
src=127.0.0.1 ttl: 64 last_seen: 4295507261 oldest_pkt: 3 4295507000, 4295507100, 4295507261
src=0000:0000:0000:0000:0000:0000:0000:0001 ttl: 64 last_seen: 4295508261 oldest_pkt: 1 4295508261
src=nobody
";

    #[test]
    fn reads_ages_with_a_clock_and_none_without() {
        let clock = Clock::parse("jiffies=4295510261\nhz=250\n").unwrap();
        let mut notes = Notes::new("xt_recent/X");
        let found = entries(LIST, Some(clock), &mut notes);
        assert_eq!(found.iter().map(|e| (e.age, e.hits)).collect::<Vec<_>>(), [(Some(8), 1), (Some(12), 3)]);
        assert_eq!(notes.finish().len(), 1);
        let mut notes = Notes::new("xt_recent/X");
        assert_eq!(entries(LIST, None, &mut notes)[0].age, None);
        assert_eq!(Clock::parse("jiffies=1 hz=0"), None);
    }
}
