//! One line of an `iptables -L` table, cut into its columns (`print_firewall` in iptables/iptables.c and nft-shared.c).

use std::net::IpAddr;

/// A row of a listing. Columns that the listing does not have are `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row<'a> {
    pub number: Option<u32>,
    pub counters: Option<(u64, u64)>,
    pub target: Option<&'a str>,
    /// As printed: a name or a number, `!` in front when negated; `0` and `all` mean every protocol.
    pub proto: &'a str,
    pub fragment: Option<bool>,
    /// `None` without `-v`.
    pub interfaces: Option<(&'a str, &'a str)>,
    pub source: &'a str,
    pub destination: &'a str,
    /// What matches and target printed after the columns.
    pub rest: &'a str,
}

/// Cuts a line into columns; `None` when it is no row of a listing.
pub(super) fn parse(line: &str) -> Option<Row<'_>> {
    let tokens = tokens(line);
    let source = source_index(&tokens)?;
    let word = |i: usize| tokens.get(i).map(|(_, word)| *word);
    let opt = |i: Option<usize>| i.and_then(word).filter(|word| matches!(*word, "--" | "-f" | "!f"));
    let (proto, flag, wide) = if let Some(flag) = opt(source.checked_sub(1)) {
        (source.checked_sub(2)?, Some(flag), false)
    } else if let Some(flag) = opt(source.checked_sub(3)) {
        (source.checked_sub(4)?, Some(flag), true)
    } else if word(0).and_then(counter).is_some() && word(1).and_then(counter).is_some() {
        // ip6tables before 1.8.9 leaves the `opt` column empty.
        (source.checked_sub(3)?, None, true)
    } else {
        (source.checked_sub(1)?, None, false)
    };
    let head: Vec<&str> = tokens[..proto].iter().map(|(_, word)| *word).collect();
    let (number, counters, target) = head_columns(&head, wide)?;
    let (end, last) = tokens.get(source + 1)?;
    Some(Row {
        number,
        counters,
        target,
        proto: word(proto)?,
        fragment: match flag {
            Some("-f") => Some(true),
            Some("!f") => Some(false),
            _ => None,
        },
        interfaces: wide.then(|| Some((word(source - 2)?, word(source - 1)?))).flatten(),
        source: word(source)?,
        destination: last,
        rest: line[end + last.len()..].trim(),
    })
}

/// Words with their byte offsets.
fn tokens(line: &str) -> Vec<(usize, &str)> {
    line.split_ascii_whitespace().map(|word| (word.as_ptr() as usize - line.as_ptr() as usize, word)).take(16).collect()
}

/// Where the source address stands: the first of two neighbours that both look like addresses; for listings made without
/// `-n`, which print host names, two after the `opt` column (four with interfaces).
fn source_index(tokens: &[(usize, &str)]) -> Option<usize> {
    let pair = tokens.windows(2).position(|pair| is_address(pair[0].1) && is_address(pair[1].1));
    if pair.is_some() {
        return pair.filter(|index| *index > 0);
    }
    let opt = tokens.iter().position(|(_, word)| matches!(*word, "--" | "-f" | "!f"))?;
    let wide = tokens.iter().take(2).all(|(_, word)| counter(word).is_some());
    let index = opt + if wide { 3 } else { 1 };
    (index + 1 < tokens.len()).then_some(index)
}

pub(super) fn is_address(word: &str) -> bool {
    let word = word.strip_prefix('!').unwrap_or(word);
    let address = word.split_once('/').map_or(word, |(address, _)| address);
    matches!(address, "anywhere" | "localhost") || address.parse::<IpAddr>().is_ok()
}

type Head<'a> = (Option<u32>, Option<(u64, u64)>, Option<&'a str>);

/// `[num] [pkts bytes] [target]`: a rule without a target leaves that column empty.
fn head_columns<'a>(head: &[&'a str], wide: bool) -> Option<Head<'a>> {
    let number = |word: &str| word.parse::<u32>().ok();
    let counters = |pkts: &str, bytes: &str| Some((counter(pkts)?, counter(bytes)?));
    Some(match (wide, head) {
        (true, [pkts, bytes]) => (None, Some(counters(pkts, bytes)?), None),
        (true, [num, pkts, bytes]) if counter(bytes).is_some() => (Some(number(num)?), counters(pkts, bytes), None),
        (true, [pkts, bytes, target]) => (None, Some(counters(pkts, bytes)?), Some(target)),
        (true, [num, pkts, bytes, target]) => (Some(number(num)?), Some(counters(pkts, bytes)?), Some(target)),
        (false, []) => (None, None, None),
        (false, [only]) => number(only).map_or((None, None, Some(*only)), |number| (Some(number), None, None)),
        (false, [num, target]) => (Some(number(num)?), None, Some(target)),
        _ => return None,
    })
}

/// `18`, `12K`, `3M`: units of 1000 (`xtables_print_num`).
fn counter(word: &str) -> Option<u64> {
    let (digits, unit) = match word.as_bytes().last()? {
        b'K' => (&word[..word.len() - 1], 1_000),
        b'M' => (&word[..word.len() - 1], 1_000_000),
        b'G' => (&word[..word.len() - 1], 1_000_000_000),
        b'T' => (&word[..word.len() - 1], 1_000_000_000_000),
        _ => (word, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_without_a_target_or_opt_column() {
        let row = parse(
            "27       0     0            0    --  *      *       0.0.0.0/0            0.0.0.0/0            cpu 1",
        )
        .unwrap();
        assert_eq!((row.number, row.target, row.proto, row.rest), (Some(27), None, "0", "cpu 1"));
        let row = parse(" 120K   12M DROP       tcp      eth0   !lo     fd00::/8   !::/0").unwrap();
        assert_eq!(row.counters, Some((120_000, 12_000_000)));
        assert_eq!((row.proto, row.interfaces, row.destination), ("tcp", Some(("eth0", "!lo")), "!::/0"));
        let row =
            parse("DNAT       tcp  --  web.example          10.0.0.0/8          tcp dpt:http to:10.0.0.1:80").unwrap();
        assert_eq!((row.source, row.destination), ("web.example", "10.0.0.0/8"));
        assert_eq!(parse("target     prot opt source               destination"), None);
    }
}
