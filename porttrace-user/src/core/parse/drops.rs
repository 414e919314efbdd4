//! The kernel's own counts of dropped packets: `/proc/net/stat/nf_conntrack` and `/proc/net/netstat`.

use crate::core::model::state::DropCounts;

/// Reads what is there of both; `None` where neither has a count.
pub fn counts(conntrack: Option<&str>, netstat: Option<&str>) -> Option<DropCounts> {
    let entries = conntrack.and_then(conntrack_counts);
    let extended = |name| netstat.and_then(|text| extended(text, name));
    let (reverse_path, queue) = (extended("IPReversePathFilter"), extended("ListenDrops"));
    (entries.is_some() || reverse_path.is_some() || queue.is_some()).then(|| DropCounts {
        conntrack: entries.unwrap_or_default(),
        reverse_path: reverse_path.unwrap_or_default(),
        listen_queue: queue.unwrap_or_default(),
    })
}

/// `drop` of all CPUs: a line each, hexadecimal, below the names (`ct_cpu_seq_show`, net/netfilter/nf_conntrack_standalone.c).
fn conntrack_counts(text: &str) -> Option<u64> {
    let mut lines = text.lines();
    let at = lines.next()?.split_ascii_whitespace().position(|name| name == "drop")?;
    lines.map(|line| u64::from_str_radix(line.split_ascii_whitespace().nth(at)?, 16).ok()).sum()
}

/// A field of `TcpExt`: a line of names, then one of values (`netstat_seq_show`, net/ipv4/proc.c).
fn extended(text: &str, wanted: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let at = lines.next()?.split_ascii_whitespace().position(|name| name == wanted)?;
    lines.next()?.split_ascii_whitespace().nth(at)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONNTRACK: &str = "entries  clashres found insert insert_failed drop early_drop\n\
                             00000004  00000000 00000000 00000000 0000000a 00000001 00000000\n\
                             00000004  00000000 00000000 00000000 00000001 00000010 00000000\n";
    const NETSTAT: &str =
        "TcpExt: SyncookiesSent ListenDrops IPReversePathFilter\nTcpExt: 1 2 3\nIpExt: InNoRoutes\nIpExt: 9\n";

    #[test]
    fn all_cpus_are_summed_and_columns_are_found_by_name() {
        let counts = counts(Some(CONNTRACK), Some(NETSTAT)).unwrap();
        assert_eq!(counts, DropCounts { conntrack: 17, reverse_path: 3, listen_queue: 2 });
    }

    #[test]
    fn what_is_not_there_is_not_zero() {
        assert_eq!(counts(None, None), None);
        assert_eq!(counts(Some("another\nformat\n"), Some("of both")), None);
        assert_eq!(counts(None, Some(NETSTAT)).map(|counts| counts.reverse_path), Some(3));
        assert_eq!(counts(Some("insert_failed drop\n0 xyz\n"), None), None);
    }
}
