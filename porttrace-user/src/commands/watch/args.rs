//! The arguments of `porttrace watch`.

use crate::commands::output::Colour;
use crate::commands::sources::Sources;
use clap::ValueEnum;
use std::time::Duration;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Ports as clients use them: hostPort, nodePort, Service port, or any other
    #[arg(required = true, value_name = "PORT", value_parser = port)]
    pub ports: Vec<u16>,

    /// Which transport to watch
    #[arg(long, value_enum, default_value_t = ProtoChoice::All)]
    pub proto: ProtoChoice,

    /// Print one JSON object per line instead of text
    #[arg(long)]
    pub json: bool,

    /// Tell each kind of connection once and count the rest
    #[arg(long, conflicts_with = "all")]
    pub summary: bool,

    /// Tell every connection whole, however many are alike
    #[arg(long)]
    pub all: bool,

    /// End after this many connections
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,

    /// End after this time (10s, 5m, 500ms)
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub duration: Option<Duration>,

    /// Call a connection silent after this time
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub timeout: Duration,

    /// How to observe NAT
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    pub conntrack_backend: BackendChoice,

    /// Follow connections inside the pods of this node that the rules lead to, with the pods' own rules
    #[arg(long)]
    pub into_pods: bool,

    /// How to attach to interfaces
    #[arg(long, value_enum, default_value_t = TcChoice::Auto)]
    pub tc: TcChoice,

    /// Room for events that are not read yet (64K, 8M); on a busy node more bears longer stalls
    #[arg(long, value_name = "SIZE", default_value = "8M", value_parser = size)]
    pub buffer: u32,

    /// Exit with code 4 when any event was lost
    #[arg(long)]
    pub strict: bool,

    /// Show the rules' text; twice: the probe's own log too
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,

    #[command(flatten)]
    pub colour: Colour,

    #[command(flatten)]
    pub sources: Sources,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ProtoChoice {
    All,
    Tcp,
    Udp,
    Sctp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendChoice {
    /// NETFILTER programs, else fentry programs, else kprobes, else conntrack's events, else none
    Auto,
    /// NETFILTER programs (kernel 6.4 or later)
    Netfilter,
    /// fentry programs at conntrack's functions
    Fentry,
    /// kprobes on conntrack's functions
    Kprobe,
    /// conntrack's own events (any kernel): a little late
    Ctnetlink,
    /// None: NAT is predicted from the rules
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TcChoice {
    /// tcx links where the kernel has them (6.6 or later), else clsact
    Auto,
    /// tcx links: gone with the process
    Tcx,
    /// Filters of a clsact queueing discipline: what a killed porttrace leaves, the next one removes
    Clsact,
}

fn port(text: &str) -> Result<u16, String> {
    match text.parse::<u64>() {
        Ok(number @ 1..=65_535) => u16::try_from(number).map_err(|error| error.to_string()),
        Ok(_) => Err("a port is a number from 1 to 65535".to_owned()),
        Err(_) => Err("a port is a number from 1 to 65535; a name has none by itself".to_owned()),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text.get(digits.len()..).unwrap_or_default();
    let scale = match unit {
        "ms" => 1e-3,
        "s" | "" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("{unit:?} is no unit of time: use ms, s, m or h")),
    };
    let number: f64 = digits.parse().map_err(|_| "write a number and a unit, as in 10s".to_owned())?;
    if !(number > 0.0 && number * scale <= 31_536_000.0) {
        return Err("a time is more than 0 and at most a year".to_owned());
    }
    Ok(Duration::from_secs_f64(number * scale))
}

/// The least and the most that the ring buffer may take, bytes.
const SIZES: std::ops::RangeInclusive<u64> = 4 << 10..=1 << 30;

fn size(text: &str) -> Result<u32, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match text.get(digits.len()..).unwrap_or_default() {
        "" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        unit => return Err(format!("{unit:?} is no unit of size: use K, M or G")),
    };
    let number: u64 = digits.parse().map_err(|_| "write a number and a unit, as in 8M".to_owned())?;
    let bytes = number.saturating_mul(scale);
    match u32::try_from(bytes) {
        Ok(size) if SIZES.contains(&bytes) => Ok(size),
        _ => Err("the buffer is from 4K to 1G".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_numbers_in_range() {
        assert_eq!(port("9088"), Ok(9088));
        assert_eq!(port("65535"), Ok(65535));
        for bad in ["0", "65536", "http", "-1", "", "99999999999999999999999"] {
            assert!(port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("64K"), Ok(64 << 10));
        assert_eq!(size("8m"), Ok(8 << 20));
        assert_eq!(size("1G"), Ok(1 << 30));
        assert_eq!(size("4096"), Ok(4096));
        for bad in ["0", "1K", "2G", "8MB", "M", "-8M", "99999999999999999999G"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_have_units() {
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        for bad in ["0s", "s", "10 s", "-1s", "1d", "nan", "1e99h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
