//! Conntrack entries as `conntrack -L -o extended` and `/proc/net/nf_conntrack` print them, IPv4 and IPv6.

use super::notes::{Notes, quote};
use crate::core::model::flow::{Proto, Tuple};
use crate::core::model::state::ConntrackEntry;
use std::fmt::Write as _;
use std::net::IpAddr;

/// Reads a listing, one entry a line.
pub fn entries(text: &str, notes: &mut Notes) -> Vec<ConntrackEntry> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        // The tool's own closing line, in case standard error was captured too.
        if line.is_empty() || line.starts_with('#') || line.starts_with("conntrack v") {
            continue;
        }
        match entry(line) {
            Ok(entry) => found.push(entry),
            Err(why) => notes.add(index + 1, format!("not a conntrack entry ({why}): {}", quote(line))),
        }
    }
    found
}

/// Writes an entry as `conntrack -L -o extended` does, so that [`entries`] reads back what was written.
pub fn write(entries: &[ConntrackEntry]) -> String {
    let mut text = String::new();
    for entry in entries {
        write_entry(&mut text, entry).unwrap_or_default();
    }
    text
}

fn write_entry(text: &mut String, entry: &ConntrackEntry) -> std::fmt::Result {
    let proto = entry.original.proto;
    let family = if entry.original.src.is_ipv4() { "ipv4     2" } else { "ipv6     10" };
    let name = match proto {
        Proto::Other(_) => "unknown".to_owned(),
        named => named.to_string(),
    };
    write!(text, "{family} {name:8} {}", proto.number())?;
    if let Some(timeout) = entry.timeout {
        write!(text, " {timeout}")?;
    }
    if !entry.state.is_empty() {
        write!(text, " {}", entry.state)?;
    }
    write_tuple(text, &entry.original)?;
    if entry.unreplied {
        write!(text, " [UNREPLIED]")?;
    }
    write_tuple(text, &entry.reply)?;
    if entry.assured {
        write!(text, " [ASSURED]")?;
    }
    write!(text, " mark={}", entry.mark)?;
    if entry.zone != 0 {
        write!(text, " zone={}", entry.zone)?;
    }
    writeln!(text)
}

fn write_tuple(text: &mut String, tuple: &Tuple) -> std::fmt::Result {
    write!(text, " src={} dst={}", tuple.src, tuple.dst)?;
    match tuple.proto {
        proto if proto.has_ports() => write!(text, " sport={} dport={}", tuple.sport, tuple.dport),
        Proto::Icmp | Proto::Icmpv6 => {
            write!(text, " type={} code={} id={}", tuple.dport >> 8, tuple.dport & 0xff, tuple.sport)
        }
        _ => Ok(()),
    }
}

/// One direction while it is read; ports as [`Tuple`] holds them (ICMP: identifier, then type and code).
#[derive(Default)]
struct Half {
    src: Option<IpAddr>,
    dst: Option<IpAddr>,
    sport: Option<u16>,
    dport: u16,
}

impl Half {
    fn tuple(self, proto: Proto) -> Result<Tuple, String> {
        let src = self.src.ok_or("no source address")?;
        let dst = self.dst.ok_or("no destination address")?;
        if src.is_ipv4() != dst.is_ipv4() {
            return Err("addresses of two families".to_owned());
        }
        Ok(Tuple { proto, src, sport: self.sport.unwrap_or(0), dst, dport: self.dport })
    }
}

fn entry(line: &str) -> Result<ConntrackEntry, String> {
    let mut words = line.split_ascii_whitespace().peekable();
    // `-o extended` puts the family and its number in front.
    if words.next_if(|word| matches!(*word, "ipv4" | "ipv6")).is_some() {
        words.next();
    }
    words.next().ok_or("no protocol")?;
    let number = words.next().and_then(|word| word.parse().ok()).ok_or("no protocol number")?;
    let proto = Proto::from_number(number);
    // Offloaded flows have neither timeout nor state.
    let timeout = words.next_if(|word| !word.contains('=')).map(number_of).transpose()?;
    let state = words.next_if(|word| !word.contains('=') && !word.starts_with('['));
    let mut rest = Rest::default();
    for word in words {
        rest.take(word, proto)?;
    }
    let [original, reply] = rest.halves;
    let (original, reply) = (original.tuple(proto)?, reply.tuple(proto)?);
    Ok(ConntrackEntry {
        original,
        reply,
        state: state.unwrap_or_default().to_owned(),
        assured: rest.assured,
        unreplied: rest.unreplied,
        mark: rest.mark,
        timeout,
        zone: rest.zone,
    })
}

/// All that follows the state.
#[derive(Default)]
struct Rest {
    halves: [Half; 2],
    /// Number of `src=` seen; the second one opens the reply direction.
    opened: usize,
    assured: bool,
    unreplied: bool,
    mark: u32,
    zone: u16,
}

impl Rest {
    fn take(&mut self, word: &str, proto: Proto) -> Result<(), String> {
        match word {
            "[ASSURED]" => self.assured = true,
            "[UNREPLIED]" => self.unreplied = true,
            _ => {
                if let Some((key, value)) = word.split_once('=') {
                    self.pair(key, value, proto)?;
                }
            }
        }
        Ok(())
    }

    fn pair(&mut self, key: &str, value: &str, proto: Proto) -> Result<(), String> {
        match key {
            "mark" => self.mark = number_of(value)?,
            "zone" | "zone-orig" => self.zone = number_of(value)?,
            "src" => {
                self.opened += 1;
                self.half()?.src = Some(address_of(value)?);
            }
            "dst" => self.half()?.dst = Some(address_of(value)?),
            // Nothing that the kernel prints of a protocol without ports.
            "sport" | "dport" if !proto.has_ports() => {}
            "sport" => self.half()?.sport = Some(number_of(value)?),
            "dport" => self.half()?.dport = number_of(value)?,
            _ if matches!(proto, Proto::Icmp | Proto::Icmpv6) => return self.icmp(key, value),
            // packets=, bytes=, use=, id=, secctx=, delta-time=, labels=, …: nothing that decides a path.
            _ => {}
        }
        Ok(())
    }

    /// `type=8 code=0 id=5` in each direction. `-o id` appends another `id=`, the entry's own.
    fn icmp(&mut self, key: &str, value: &str) -> Result<(), String> {
        let half = self.half()?;
        match key {
            "type" => half.dport = (half.dport & 0xff) | (u16::from(number_of::<u8>(value)?) << 8),
            "code" => half.dport = (half.dport & 0xff00) | u16::from(number_of::<u8>(value)?),
            "id" if half.sport.is_none() => half.sport = Some(number_of(value)?),
            _ => {}
        }
        Ok(())
    }

    fn half(&mut self) -> Result<&mut Half, String> {
        let index = self.opened.checked_sub(1).ok_or("does not begin with src=")?;
        self.halves.get_mut(index).ok_or_else(|| "more than two directions".to_owned())
    }
}

fn number_of<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{} is not a number in range", quote(text)))
}

fn address_of(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("{} is not an address", quote(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "\
ipv4     2 tcp      6 118 TIME_WAIT src=172.18.0.4 dst=172.18.0.3 sport=35722 dport=30080 src=10.244.3.9 dst=172.18.0.3 sport=80 dport=53264 [ASSURED] mark=0 use=1
ipv6     10 udp      17 29 src=0000:0000:0000:0000:0000:0000:0000:0001 dst=::1 sport=39067 dport=97 [UNREPLIED] src=::1 dst=::1 sport=97 dport=39067 mark=16384 zone=0 use=2
udp      17 29 src=127.0.0.1 dst=127.0.0.1 sport=51272 dport=98 zone-orig=6 [UNREPLIED] src=127.0.0.1 dst=127.0.0.1 sport=98 dport=51272 mark=0 use=1
ipv4     2 icmp     1 29 src=10.0.0.1 dst=10.0.0.2 type=8 code=0 id=77 packets=1 bytes=84 src=10.0.0.2 dst=10.0.0.1 type=0 code=0 id=77 packets=1 bytes=84 mark=0 use=1 id=2089234200
ipv4     2 tcp      6 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1 [OFFLOAD] mark=0 use=2
ipv4     2 unknown  47 599 src=10.0.0.1 dst=10.0.0.2 src=10.0.0.2 dst=10.0.0.1 mark=0 use=1
conntrack v1.4.7 (conntrack-tools): 6 flow entries have been shown.
ipv4     2 tcp      6 118 TIME_WAIT src=172.18.0.4 dst=172.18.0.3 sport=99999 dport=30080
";

    #[test]
    fn reads_both_tools_and_keeps_what_is_good() {
        let mut notes = Notes::new("conntrack.txt");
        let found = entries(LISTING, &mut notes);
        let diagnostics = notes.finish();
        assert_eq!(found.len(), 6);
        assert_eq!(diagnostics.len(), 1);
        assert_eq!(diagnostics[0].line, 8);
        assert!(diagnostics[0].message.contains("\"99999\" is not a number in range"), "{diagnostics:?}");
        assert_eq!(found[0].reply.to_string(), "10.244.3.9:80 → 172.18.0.3:53264");
        assert_eq!((found[0].state.as_str(), found[0].assured, found[0].timeout), ("TIME_WAIT", true, Some(118)));
        assert_eq!(found[1].original.to_string(), "[::1]:39067 → [::1]:97");
        assert_eq!((found[1].mark, found[1].unreplied), (16384, true));
        assert_eq!(found[2].zone, 6);
        assert_eq!((found[3].original.sport, found[3].original.dport, found[3].reply.dport), (77, 0x800, 0));
        assert_eq!((found[4].timeout, found[4].state.as_str()), (None, ""));
        assert_eq!(found[5].original.proto, Proto::Other(47));
    }

    #[test]
    fn writes_what_it_reads() {
        let mut notes = Notes::new("conntrack.txt");
        let odd = "ipv4 2 unknown 0 118 src=10.0.0.1 dst=10.0.0.2 sport=35722 dport=80 src=10.0.0.2 dst=10.0.0.1 sport=80 dport=1\n";
        let found = entries(&format!("{LISTING}{odd}"), &mut notes);
        assert_eq!((found.len(), found[6].original.dport), (7, 0), "a protocol without ports has none");
        let mut notes = Notes::new("again");
        assert_eq!(entries(&write(&found), &mut notes), found);
        assert_eq!(notes.finish(), []);
    }
}
