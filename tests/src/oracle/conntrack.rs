//! What `conntrack -E` reports in a namespace.

use crate::netns::{ChildGuard, Netns};
use anyhow::{Result, bail};
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Source address of the entry that tells whether the reader listens already; from a documentation range.
const MARKER: &str = "192.0.2.1";

/// What happened to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Happened {
    New,
    Update,
    Destroy,
}

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub happened: Happened,
    pub original: Tuple,
    pub reply: Tuple,
    /// `SYN_SENT`, …; empty for protocols without states.
    pub state: String,
    pub unreplied: bool,
    pub assured: bool,
    /// Seconds since 1970, when the reader got it.
    pub timestamp: f64,
    pub id: u32,
}

/// A running `conntrack -E`.
pub struct ConntrackEvents {
    process: ChildGuard,
}

impl ConntrackEvents {
    /// Starts the reader and waits until it really listens.
    pub fn start(netns: &Netns) -> Result<Self> {
        let events = Self { process: netns.spawn(["conntrack", "-E", "-o", "id,timestamp", "-b", "16777216"])? };
        let deadline = Instant::now() + Duration::from_secs(10);
        // The reader says nothing when it is ready: make entries until it reports one.
        for port in 1..=u16::MAX {
            let port = port.to_string();
            let tuple = ["-p", "udp", "-s", MARKER, "-d", "192.0.2.2", "--sport", &port, "--dport", "9"];
            netns.exec(["conntrack", "-I", "-t", "60"].iter().chain(&tuple))?;
            let heard =
                events.process.stdout.wait_for(Duration::from_millis(50), |line| line.contains(MARKER).then_some(()));
            netns.exec(["conntrack", "-D"].iter().chain(&tuple))?;
            if heard.is_some() {
                return Ok(events);
            }
            if Instant::now() > deadline || events.process.stdout.wait_closed(Duration::ZERO) {
                break;
            }
        }
        bail!("`conntrack -E` does not get ready in {}: {:?}", netns.name(), events.process.stderr.snapshot())
    }

    /// The first event that `pick` takes, from the start on, waited for.
    pub fn wait_for(&self, timeout: Duration, mut pick: impl FnMut(&Entry) -> bool) -> Option<Entry> {
        self.process.stdout.wait_for(timeout, |line| parse(line).filter(|entry| pick(entry)))
    }

    /// The NEW event of the connection with this original tuple, waited for.
    pub fn new_entry(&self, original: Tuple, timeout: Duration) -> Option<Entry> {
        self.wait_for(timeout, |entry| entry.happened == Happened::New && entry.original == original)
    }

    /// Whether the reader said that the kernel had to throw events away.
    pub fn overran(&self) -> bool {
        self.process.stderr.snapshot().iter().any(|line| line.contains("ENOBUFS"))
    }

    /// Every event up to now, without the markers of the start.
    pub fn snapshot(&self) -> Vec<Entry> {
        let lines = self.process.stdout.snapshot();
        lines.iter().filter(|line| !line.contains(MARKER)).filter_map(|line| parse(line)).collect()
    }
}

/// `[1764000000.123456] [NEW] tcp 6 120 SYN_SENT src=… dst=… sport=… dport=… [UNREPLIED] src=… … id=…`; `None` for
/// anything else, and for protocols whose tuples have no ports.
pub fn parse(line: &str) -> Option<Entry> {
    let mut words = line.split_whitespace().peekable();
    let timestamp = words.next()?.strip_prefix('[')?.strip_suffix(']')?.parse().ok()?;
    let happened = match words.next()? {
        "[NEW]" => Happened::New,
        "[UPDATE]" => Happened::Update,
        "[DESTROY]" => Happened::Destroy,
        _ => return None,
    };
    let proto = Proto::from_number({
        words.next()?;
        words.next()?.parse().ok()?
    });
    let mut entry = Entry {
        happened,
        original: words_to_tuple(line, proto, 0)?,
        reply: words_to_tuple(line, proto, 1)?,
        state: String::new(),
        unreplied: line.contains("[UNREPLIED]"),
        assured: line.contains("[ASSURED]"),
        timestamp,
        id: value(line, "id=", 0)?.parse().ok()?,
    };
    // NEW and UPDATE give the seconds left first.
    if words.peek().is_some_and(|word| word.bytes().all(|byte| byte.is_ascii_digit())) {
        words.next();
    }
    if let Some(state) = words.next().filter(|word| word.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'))
    {
        state.clone_into(&mut entry.state);
    }
    Some(entry)
}

fn words_to_tuple(line: &str, proto: Proto, index: usize) -> Option<Tuple> {
    let address = |key| -> Option<IpAddr> { value(line, key, index)?.parse().ok() };
    let port = |key| -> Option<u16> { value(line, key, index)?.parse().ok() };
    Some(Tuple { proto, src: address("src=")?, sport: port("sport=")?, dst: address("dst=")?, dport: port("dport=")? })
}

/// The value of the `index`-th word that starts with `key`.
fn value<'a>(line: &'a str, key: &str, index: usize) -> Option<&'a str> {
    line.split_whitespace().filter_map(|word| word.strip_prefix(key)).nth(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_entries() {
        let line = "[1764000000.123456]\t    [NEW] tcp      6 120 SYN_SENT src=172.18.0.4 dst=172.18.0.3 sport=60218 dport=9088 \
                    [UNREPLIED] src=10.244.1.9 dst=172.18.0.4 sport=8081 dport=60218 id=7";
        let entry = parse(line).unwrap();
        assert_eq!((entry.happened, entry.state.as_str(), entry.id), (Happened::New, "SYN_SENT", 7));
        assert_eq!(entry.original.to_string(), "172.18.0.4:60218 → 172.18.0.3:9088");
        assert_eq!(entry.reply.to_string(), "10.244.1.9:8081 → 172.18.0.4:60218");
        assert!(entry.unreplied && !entry.assured);
        let line = "[1.5]\t[DESTROY] udp      17 src=fd00::1 dst=fd00::2 sport=1 dport=2 src=fd00::3 dst=fd00::1 sport=4 dport=1 [ASSURED] id=9";
        let entry = parse(line).unwrap();
        assert_eq!((entry.happened, entry.state.as_str(), entry.original.proto), (Happened::Destroy, "", Proto::Udp));
        assert!(entry.assured && !entry.unreplied);
        assert_eq!(parse("conntrack v1.4.7 (conntrack-tools): 3 flow events have been shown."), None);
        assert_eq!(parse("[1.5]\t[NEW] icmp     1 30 src=10.0.0.1 dst=10.0.0.2 type=8 code=0 id=1 src="), None);
    }
}
