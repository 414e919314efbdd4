//! The kernel's own counts of dropped packets: `/proc/net/stat/nf_conntrack` and `/proc/net/netstat`.

use crate::core::model::state::DropCounts;

/// Reads what is there of both.
pub fn counts(conntrack: Option<&str>, netstat: Option<&str>) -> DropCounts {
    let extended = |name| netstat.and_then(|text| extended(text, name));
    DropCounts {
        conntrack: conntrack.and_then(conntrack_counts),
        reverse_path: extended("IPReversePathFilter"),
        listen_queue: extended("ListenDrops"),
    }
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
        let counts = counts(Some(CONNTRACK), Some(NETSTAT));
        assert_eq!(counts, DropCounts { conntrack: Some(17), reverse_path: Some(3), listen_queue: Some(2) });
    }

    #[test]
    fn what_is_not_there_is_not_zero() {
        assert_eq!(counts(None, None), DropCounts::default());
        assert_eq!(counts(Some("another\nformat\n"), Some("of both")), DropCounts::default());
        let half = counts(None, Some(NETSTAT));
        assert_eq!((half.conntrack, half.reverse_path), (None, Some(3)));
        assert_eq!(counts(Some("insert_failed drop\n0 xyz\n"), None).conntrack, None);
    }
}
