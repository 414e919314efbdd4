//! `-m NAME` blocks whose options only make sense together.

use super::iptables_modules::{Parsed, one};
use super::iptables_options::{Options, Word, net};
use super::words::unquote;
use crate::core::model::flow::Family;
use crate::core::model::rules::{IfaceLimit, MatchKind, Recent, RecentOp, RpFilter, SetMatch, SocketMatch};
use crate::core::model::trace::Fraction;

/// Whether the options of a block belong together.
pub(super) fn is_whole(module: &str) -> bool {
    matches!(module, "addrtype" | "recent" | "statistic" | "set" | "rpfilter" | "limit" | "socket")
}

/// A block whose options belong together.
pub(super) fn whole(module: &str, words: &[Word<'_>], family: Family) -> Option<Parsed> {
    let options = Options::new(words);
    match module {
        "addrtype" => addrtype(options),
        "recent" => recent(options, family),
        "statistic" => statistic(options),
        "set" => set(options),
        "limit" => limit(options),
        "socket" => socket(options),
        _ => rpfilter(options),
    }
}

/// What a module asks that stands without options.
pub(super) fn bare(module: &str) -> Option<MatchKind> {
    Some(match module {
        "rpfilter" => MatchKind::RpFilter(RpFilter::default()),
        "limit" => MatchKind::Limit,
        "socket" => MatchKind::Socket(SocketMatch::default()),
        _ => return None,
    })
}

fn limit(mut options: Options<'_, '_>) -> Option<Parsed> {
    while let Some(mut option) = options.option() {
        let known = matches!(option.name, "--limit" | "--limit-burst") && !option.negated;
        options.value(&mut option);
        if !known {
            return None;
        }
    }
    one(MatchKind::Limit)
}

fn socket(mut options: Options<'_, '_>) -> Option<Parsed> {
    let mut asked = SocketMatch::default();
    while let Some(option) = options.option() {
        match option.name {
            "--transparent" => asked.transparent = true,
            "--nowildcard" => asked.nowildcard = true,
            "--restore-skmark" => asked.restore_mark = true,
            _ => return None,
        }
    }
    one(MatchKind::Socket(asked))
}

fn addrtype(mut options: Options<'_, '_>) -> Option<Parsed> {
    let mut parsed = Parsed::default();
    let mut limit = None;
    while let Some(mut option) = options.option() {
        match option.name {
            "--src-type" | "--dst-type" => {
                let source = option.name == "--src-type";
                let types = options.value(&mut option).split(',').try_fold(0, |bits, name| Some(bits | rtn(name)?))?;
                let asked = Some((MatchKind::AddrType { source, types, limit: None }, option.negated));
                if parsed.first.is_none() { parsed.first = asked } else { parsed.second = asked }
            }
            "--limit-iface-in" => limit = Some(IfaceLimit::In),
            "--limit-iface-out" => limit = Some(IfaceLimit::Out),
            _ => return None,
        }
    }
    for asked in [&mut parsed.first, &mut parsed.second] {
        if let Some((MatchKind::AddrType { limit: of, .. }, _)) = asked {
            *of = limit;
        }
    }
    Some(parsed)
}

/// `RTN_*` by name (linux/rtnetlink.h).
fn rtn(name: &str) -> Option<u16> {
    let names = [
        "UNSPEC",
        "UNICAST",
        "LOCAL",
        "BROADCAST",
        "ANYCAST",
        "MULTICAST",
        "BLACKHOLE",
        "UNREACHABLE",
        "PROHIBIT",
        "THROW",
        "NAT",
        "XRESOLVE",
    ];
    names.iter().position(|known| *known == name).map(|bit| 1 << bit)
}

fn statistic(mut options: Options<'_, '_>) -> Option<Parsed> {
    let (mut random, mut every, mut packet, mut probability, mut negated) = (true, None, 0, None, false);
    while let Some(mut option) = options.option() {
        let name = option.name;
        let value = options.value(&mut option);
        negated |= option.negated;
        match name {
            "--mode" => random = value == "random",
            "--probability" => probability = Some(value.parse::<f64>().ok().filter(|p| (0.0..=1.0).contains(p))?),
            "--every" => every = Some(value.parse().ok()?),
            "--packet" => packet = value.parse().ok()?,
            _ => return None,
        }
    }
    let kind = if random {
        // iptables-save prints k / 2³¹ with eleven digits, which is enough to find k again.
        let Fraction { num, den } = unquantised((probability? * f64::from(1u32 << 31)).round() as u32);
        MatchKind::Random { num: num as u32, den: den as u32 }
    } else {
        MatchKind::Nth { every: every?, packet }
    };
    Some(Parsed { first: Some((kind, negated)), second: None })
}

/// kube-proxy writes 1/n with ten digits, iptables rounds it to k / 2³¹ (net/netfilter/xt_statistic.c): where k is what 1/n
/// becomes, 1/n was meant.
pub(super) fn unquantised(k: u32) -> Fraction {
    const ONE: u64 = 1 << 31;
    let k = u64::from(k);
    if let Some(n) = (ONE + k / 2).checked_div(k) {
        let written = (1e10 / n as f64).round() / 1e10 * ONE as f64;
        if n < 46_341 && (written.round() as u64 == k || (ONE + n / 2) / n == k) {
            return Fraction::new(1, n);
        }
    }
    Fraction::new(k, ONE)
}

fn recent(mut options: Options<'_, '_>, family: Family) -> Option<Parsed> {
    let all = if family == Family::V4 { "255.255.255.255" } else { "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff" };
    let (mut op, mut negated, mut name, mut mask) = (None, false, "DEFAULT".into(), net(all, family)?);
    let (mut seconds, mut hits, mut by_destination) = (None, None, false);
    while let Some(mut option) = options.option() {
        negated |= option.negated;
        match option.name {
            "--set" => op = Some(RecentOp::Set),
            "--rcheck" => op = Some(RecentOp::Check),
            "--update" => op = Some(RecentOp::Update),
            "--remove" => op = Some(RecentOp::Remove),
            "--name" => name = unquote(options.value(&mut option)).into(),
            "--seconds" => seconds = Some(options.value(&mut option).parse().ok()?),
            "--hitcount" => hits = Some(options.value(&mut option).parse().ok()?),
            "--mask" => mask = net(options.value(&mut option), family)?,
            "--rsource" | "--reap" => {}
            "--rdest" => by_destination = true,
            // `--rttl` compares with a TTL that the list does not show.
            _ => return None,
        }
    }
    let recent = Recent { op: op?, name, seconds, hits, by_destination, mask };
    Some(Parsed { first: Some((MatchKind::Recent(Box::new(recent)), negated)), second: None })
}

fn set(mut options: Options<'_, '_>) -> Option<Parsed> {
    let mut asked = None;
    let mut more: Option<String> = None;
    while let Some(mut option) = options.option() {
        if matches!(option.name, "--match-set" | "--set") {
            let name: Box<str> = unquote(options.value(&mut option)).into();
            let flags = options.value(&mut option).split(',');
            let source: Option<Vec<bool>> = flags
                .map(|flag| match flag {
                    "src" => Some(true),
                    "dst" => Some(false),
                    _ => None,
                })
                .collect();
            asked = Some((name, source?, option.negated));
        } else if option.name != "--return-nomatch" {
            let text = format!("{} {}", option.name, options.peek().unwrap_or(""));
            options.skip_values();
            more = Some(text);
        }
    }
    let (name, source, negated) = asked?;
    let kind = MatchKind::Set(Box::new(SetMatch { name, source: source.into(), more: more.map(Into::into) }));
    Some(Parsed { first: Some((kind, negated)), second: None })
}

fn rpfilter(mut options: Options<'_, '_>) -> Option<Parsed> {
    let mut asked = RpFilter::default();
    while let Some(option) = options.option() {
        match option.name {
            "--loose" => asked.loose = true,
            "--validmark" => asked.valid_mark = true,
            "--accept-local" => asked.accept_local = true,
            "--invert" => asked.invert = true,
            _ => return None,
        }
    }
    one(MatchKind::RpFilter(asked))
}
