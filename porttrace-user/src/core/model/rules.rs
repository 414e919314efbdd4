//! iptables rules as values: tables of chains of rules, each a list of matches and a target.

use super::dump::Text;
use super::flow::Family;
use super::name::Name;
use super::native::{Base, Set, Source};
use super::place::ChainRef;
pub use super::targets::{ConnMarkOp, MarkOp, NatRange, Target, Tproxy, TtlOp};
use super::trace::Flavour;
use smallvec::SmallVec;
use std::net::IpAddr;

/// What one `iptables-save` printed.
#[derive(Clone, Debug, PartialEq)]
pub struct Ruleset {
    pub flavour: Flavour,
    pub family: Family,
    pub tables: Vec<Table>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// `raw`, `mangle`, `nat`, `filter`, `security`; of native rules family and name: `ip kube-proxy`.
    pub name: Name,
    pub chains: Vec<Chain>,
    /// Of native rules.
    pub sets: Vec<Set>,
}

impl Table {
    pub fn chain(&self, name: &str) -> Option<&Chain> {
        self.chains.iter().find(|chain| chain.name() == name)
    }

    /// A set of its own, or one that stands in a rule.
    pub fn source<'t>(&'t self, source: &'t Source) -> Option<&'t Set> {
        match source {
            Source::Named(at) => self.sets.get(*at as usize),
            Source::Inline(set) => Some(set),
            Source::Missing(_) => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    pub id: ChainRef,
    /// Built-in chains only.
    pub policy: Option<Policy>,
    /// Of native rules: where the kernel calls it. Those of iptables follow from their tables and names.
    pub base: Option<Base>,
    pub rules: Vec<Rule>,
    /// The rules stand at their numbers; false where they were pasted without the rest of the chain.
    pub numbered: bool,
}

impl Chain {
    pub fn name(&self) -> &str {
        &self.id.chain
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    Accept,
    Drop,
}

/// One rule: all `matches` must hold, then `target` acts.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// 1-based line of the dump.
    pub line: u32,
    /// The line as it was read, from `-A` on.
    pub text: Text,
    pub matches: Matches,
    pub target: Target,
}

// A node may have 100,000 of them.
const _: () = assert!(size_of::<Rule>() == 80);

impl Rule {
    /// Packets and bytes, where the dump has them.
    pub fn counters(&self) -> Option<(u64, u64)> {
        crate::core::parse::iptables::counters(&self.text.before())?.0
    }

    /// The text of `-m comment --comment` (of native rules: `comment`), unquoted.
    pub fn comment(&self) -> Option<String> {
        let text = self.text.read();
        if matches!(self.target, Target::Native(_)) {
            let (_, comment) = text.rsplit_once("comment \"")?;
            return Some(comment.strip_suffix('"').unwrap_or(comment).to_owned());
        }
        let mut words = crate::core::parse::words::Words::new(&text);
        words.by_ref().find(|word| *word == "--comment")?;
        words.next().map(|word| crate::core::parse::words::unquote(word).into_owned())
    }
}

/// What a native rule's text asks, without what it does and its comment.
pub fn native_conditions(text: &str) -> String {
    const DOES: [&str; 14] = [
        "accept",
        "drop",
        "continue",
        "return",
        "jump",
        "goto",
        "dnat",
        "snat",
        "masquerade",
        "redirect",
        "reject",
        "notrack",
        "queue",
        "comment",
    ];
    let words = || text.split(' ').enumerate();
    // A look-up of a verdict is both.
    let end = words().find(|(_, word)| DOES.contains(word)).map(|(at, _)| at);
    let sets = words().find(|(_, word)| *word == "set").map(|(at, _)| at.saturating_sub(2));
    let looks_up = text.contains(" vmap ") || text.contains(" map ");
    let end = [sets, end.filter(|_| !looks_up)].into_iter().flatten().min();
    text.split(' ').take(end.unwrap_or(usize::MAX)).collect::<Vec<_>>().join(" ")
}

/// The matches of a rule's text, without chain, comment and target.
pub fn conditions(text: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut words = crate::core::parse::words::Words::new(text).peekable();
    while let Some(word) = words.next() {
        match word {
            "-A" => drop(words.next()),
            "-j" | "-g" => break,
            "-m" if words.peek() == Some(&"comment") => {
                words.next();
            }
            "--comment" => drop(words.next()),
            other => kept.push(other),
        }
    }
    kept.join(" ")
}

/// Most rules of kube-proxy have one, which then lies beside its target.
pub type Matches = SmallVec<[Match; 1]>;

/// One condition and whether it stands behind a `!`.
#[derive(Clone, Debug, PartialEq)]
pub struct Match {
    pub kind: MatchKind,
    pub negated: bool,
    /// Place of the option in the rule's text: start and length in bytes (0, 0 beyond 64 KiB).
    pub at: (u16, u16),
}

/// An address and a mask, as iptables has them: the mask need not be a prefix. IPv6 is boxed to keep rules small.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Net {
    V4 { addr: u32, mask: u32 },
    V6(Box<(u128, u128)>),
}

impl Net {
    /// The address, whatever the mask.
    pub fn address(&self) -> IpAddr {
        match self {
            Self::V4 { addr, .. } => IpAddr::V4((*addr).into()),
            Self::V6(both) => IpAddr::V6(both.0.into()),
        }
    }
}

/// What a rule asks of a packet. Port and number ranges are inclusive.
#[derive(Clone, Debug, PartialEq)]
pub enum MatchKind {
    Source(Net),
    Destination(Net),
    Protocol(u8),
    /// Name; a trailing `+` matches any continuation.
    Input(Box<str>),
    Output(Box<str>),
    SourcePort(u16, u16),
    DestinationPort(u16, u16),
    /// `--ports`, `--sports`, `--dports` of multiport.
    Multiport(PortSide, Box<[(u16, u16)]>),
    /// Of the flags in `mask` exactly those in `set` are set.
    TcpFlags {
        mask: u8,
        set: u8,
    },
    TcpOption(u8),
    IcmpType {
        icmp_type: u8,
        code: (u8, u8),
    },
    /// Bits by `RTN_*` number (bit 2: LOCAL).
    AddrType {
        source: bool,
        types: u16,
        limit: Option<IfaceLimit>,
    },
    CtState(CtStates),
    CtProto(u8),
    CtAddress(CtField, Net),
    CtPort(CtField, u16, u16),
    /// Bits of `IPS_*`; 0 is `NONE`.
    CtStatus(u32),
    CtExpire(u32, u32),
    /// `true`: ORIGINAL.
    CtDirection(bool),
    Mark {
        value: u32,
        mask: u32,
    },
    ConnMark {
        value: u32,
        mask: u32,
    },
    /// `statistic --mode random`: the probability in lowest terms.
    Random {
        num: u32,
        den: u32,
    },
    Nth {
        every: u32,
        packet: u32,
    },
    Recent(Box<Recent>),
    Set(Box<SetMatch>),
    /// First and last address.
    SourceRange(Box<(Net, Net)>),
    DestinationRange(Box<(Net, Net)>),
    PhysIn(Box<str>),
    PhysOut(Box<str>),
    PhysIsIn,
    PhysIsOut,
    PhysIsBridged,
    /// `--mac-source`.
    Mac([u8; 6]),
    Owner(Owner),
    /// `-m limit`, whatever its rate.
    Limit,
    Socket(SocketMatch),
    RpFilter(RpFilter),
    Length(u16, u16),
    Tos {
        value: u8,
        mask: u8,
    },
    /// `unicast`, `broadcast`, `multicast`.
    PktType(Box<str>),
    /// `--ttl-eq`, `--hl-gt`, …
    Ttl(std::cmp::Ordering, u8),
    /// `-f`: second and further fragments.
    Fragment,
    /// Always true (nfacct, empty multi-part options).
    Always,
    /// An option that the model does not decide: hashlimit, string, BPF, anything unheard of.
    Unknown(Box<str>),
}

/// `-m owner`; ranges are inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Uid(u32, u32),
    Gid(u32, u32),
    /// `--socket-exists`.
    Exists,
}

/// `-m socket`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketMatch {
    pub transparent: bool,
    /// Sockets that are bound to no address count too.
    pub nowildcard: bool,
    /// The packet gets the socket's mark.
    pub restore_mark: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortSide {
    Source,
    Destination,
    Either,
}

/// `--limit-iface-in`, `--limit-iface-out`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfaceLimit {
    In,
    Out,
}

/// A set of conntrack states, as `--ctstate` takes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CtStates(pub u8);

impl CtStates {
    pub const INVALID: u8 = 1;
    pub const ESTABLISHED: u8 = 2;
    pub const RELATED: u8 = 4;
    pub const NEW: u8 = 8;
    pub const UNTRACKED: u8 = 16;
    pub const SNAT: u8 = 32;
    pub const DNAT: u8 = 64;
}

/// Which part of a conntrack entry an option names (`--ctorigdst`, `--ctreplsrcport`, …).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CtField {
    OriginalSource,
    OriginalDestination,
    ReplySource,
    ReplyDestination,
}

/// `-m recent`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recent {
    pub op: RecentOp,
    pub name: Box<str>,
    pub seconds: Option<u32>,
    pub hits: Option<u32>,
    /// `--rdest`: the list is about destinations.
    pub by_destination: bool,
    /// Address bits that count.
    pub mask: Net,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecentOp {
    Set,
    Check,
    Update,
    Remove,
}

/// `-m set --match-set NAME FLAGS`: one flag (`true`: src) for each dimension of the set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetMatch {
    pub name: Box<str>,
    pub source: Box<[bool]>,
    /// Options that the model does not decide (`--packets-gt`, …).
    pub more: Option<Box<str>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RpFilter {
    pub loose: bool,
    pub valid_mark: bool,
    pub accept_local: bool,
    pub invert: bool,
}
