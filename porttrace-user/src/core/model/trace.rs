//! What the simulator predicts: a trace of branches, each a list of hops that ends in a verdict.

use super::flow::{Proto, Tuple};
use super::hops::Hops;
use super::name::Name;
pub use super::place::{ChainRef, Chains, Place, RuleRef};
use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};
use smallvec::SmallVec;
use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

/// Version of the serialised form of [`Trace`].
pub const TRACE_SCHEMA: u32 = 1;

/// Netfilter's five hooks, in the kernel's numbering (`enum nf_inet_hooks`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

impl Hook {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prerouting => "PREROUTING",
            Self::Input => "INPUT",
            Self::Forward => "FORWARD",
            Self::Output => "OUTPUT",
            Self::Postrouting => "POSTROUTING",
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Which engine holds a rule: the two iptables flavours, or native nftables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flavour {
    IptablesNft,
    IptablesLegacy,
    Nftables,
}

/// What a matching rule did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum Action {
    /// A rule without a target, or with one that only counts, logs or traces.
    Continue,
    Jump {
        #[serde(serialize_with = "chain_name")]
        chain: Place,
    },
    Goto {
        #[serde(serialize_with = "chain_name")]
        chain: Place,
    },
    Accept,
    Drop,
    /// `with` as iptables writes it: `icmp-port-unreachable`, `tcp-reset`, …
    Reject {
        with: Name,
    },
    Return,
    /// `skb->mark` becomes `mark`.
    Mark {
        mark: u32,
    },
    ConnMark {
        mark: u32,
    },
    Dnat {
        to: Name,
    },
    Snat {
        to: Name,
    },
    Masquerade,
    Redirect {
        to: Name,
    },
    Netmap {
        to: Name,
    },
    /// Exempt from conntrack, and so from NAT.
    Notrack,
    /// LOG, NFLOG, TRACE, CT options, …: named, without effect on the path.
    Other {
        target: Name,
    },
}

fn chain_name<S: Serializer>(place: &Place, serializer: S) -> Result<S::Ok, S::Error> {
    place.chain.serialize(serializer)
}

/// One step of a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "hop")]
pub enum Hop {
    /// The packet enters by an interface.
    Receive { interface: Name, tuple: Tuple },
    /// A process of this node sends it.
    LocalSend { tuple: Tuple },
    /// Conntrack's view when the packet passes it (`NEW`, `ESTABLISHED`, `RELATED`, `INVALID`, `UNTRACKED`).
    Conntrack { state: &'static str, entry: Option<String> },
    /// A rule matched or a policy ended a base chain. Serialised with `because`, the matches that decided, and the `text`.
    #[serde(serialize_with = "rule_hop")]
    Rule { hook: Hook, rule: RuleRef, action: Action },
    /// The destination or source really changed. `by` is the rule, or `None` for a conntrack entry or null binding.
    Rewrite { hook: Hook, what: Manip, before: Tuple, after: Tuple, by: Option<RuleRef> },
    /// The routing decision.
    Route { decision: Route },
    /// The packet leaves by an interface.
    Transmit { interface: Name, gateway: Option<IpAddr>, tuple: Tuple },
    /// A socket of this node gets it.
    Deliver { tuple: Tuple, listener: Option<String> },
    /// The reply of the same connection, on its way back (filled by the simulator for NEW packets that arrive).
    ReplyRewrite { before: Tuple, after: Tuple },
    /// Something worth a line: rp_filter, route_localnet, bridge-nf, hairpin.
    Note { text: Cow<'static, str> },
}

fn rule_hop<S: Serializer>(hook: &Hook, rule: &RuleRef, action: &Action, serializer: S) -> Result<S::Ok, S::Error> {
    let mut hop = serializer.serialize_struct("Rule", 5)?;
    hop.serialize_field("hook", hook)?;
    hop.serialize_field("rule", rule)?;
    hop.serialize_field("action", action)?;
    hop.serialize_field("because", &rule.because())?;
    hop.serialize_field("text", &rule.text())?;
    hop.end()
}

/// Which half of a connection a rewrite changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Manip {
    Dnat,
    Snat,
}

/// One routing decision (`ip route get`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Route {
    pub dst: IpAddr,
    pub kind: RouteKind,
    pub interface: Option<Name>,
    pub gateway: Option<IpAddr>,
    pub table: Name,
    /// The matched route as `ip route` prints it; empty when none matched.
    pub route: Name,
}

/// `RTN_*`, as far as it decides a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteKind {
    Local,
    Unicast,
    Broadcast,
    /// An IPv6 subnet-router anycast address: delivered here, but not `--dst-type LOCAL`.
    Anycast,
    Multicast,
    Unreachable,
    Prohibit,
    Blackhole,
    Throw,
    /// No route matched.
    None,
}

/// How a branch ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Verdict {
    /// Handed to this node's sockets. `listening` is `None` where sockets are not part of the state.
    Delivered {
        to: Tuple,
        listening: Option<bool>,
    },
    /// Left by an interface towards `next_hop` (the destination itself when it is on-link).
    Forwarded {
        interface: Name,
        next_hop: IpAddr,
        to: Tuple,
    },
    Dropped {
        reason: DropReason,
        by: Option<RuleRef>,
    },
    /// REJECT, or the kernel's own refusal (no route).
    Rejected {
        with: Name,
        by: Option<RuleRef>,
    },
    /// The model ends here, because of this.
    Unknown {
        because: String,
        by: Option<RuleRef>,
    },
}

/// Why a packet was dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "reason")]
pub enum DropReason {
    /// A DROP rule or policy.
    Rule,
    NoRoute,
    Blackhole,
    RpFilter,
    /// A martian: 127/8 on the wire without route_localnet, and relatives.
    Martian,
    ForwardingDisabled,
    /// MASQUERADE found no address on the output interface.
    NoAddress,
    /// TTL or hop limit used up.
    Ttl,
    TooBig,
    Other {
        text: String,
    },
}

/// A fraction in lowest terms, for exact branch probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fraction {
    pub num: u64,
    pub den: u64,
}

impl Fraction {
    pub const ONE: Self = Self { num: 1, den: 1 };

    /// `num / den` in lowest terms; a zero denominator counts as 1.
    pub fn new(num: u64, den: u64) -> Self {
        let common = gcd(num, den).max(1);
        Self { num: num / common, den: (den / common).max(1) }
    }

    /// The product, in lowest terms. Exact while it fits in 64 bits; beyond that both halves lose their lowest bits together.
    pub fn times(self, other: Self) -> Self {
        let (left, right) = (Self::new(self.num, other.den), Self::new(other.num, self.den));
        let mut num = u128::from(left.num) * u128::from(right.num);
        let mut den = u128::from(left.den) * u128::from(right.den);
        while num.max(den) > u128::from(u64::MAX) {
            num >>= 1;
            den >>= 1;
        }
        Self { num: num as u64, den: (den as u64).max(1) }
    }

    /// The product with only equal halves cancelled, to be put in lowest terms by [`Fraction::new`] at the end: of a long row of
    /// random choices nearly all cancels, and divisions are dear. `None` where it does not fit in 64 bits.
    pub fn chained(self, next: Self) -> Option<Self> {
        let (left, below) = if self.num == next.den { (1, 1) } else { (self.num, next.den) };
        let (right, above) = if next.num == self.den { (1, 1) } else { (next.num, self.den) };
        Some(Self { num: left.checked_mul(right)?, den: below.checked_mul(above)? })
    }

    /// `1 - self`.
    pub const fn rest(self) -> Self {
        Self { num: self.den.saturating_sub(self.num), den: self.den }
    }

    pub fn as_f64(self) -> f64 {
        self.num as f64 / self.den as f64
    }
}

const fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// `1/3`, or `1`.
impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.den == 1 { write!(f, "{}", self.num) } else { write!(f, "{}/{}", self.num, self.den) }
    }
}

impl Serialize for Fraction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What sent a trace into this branch rather than its siblings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "decider")]
pub enum Decision {
    /// `statistic --mode random`, or a match of nftables' `numgen random`.
    Random { rule: RuleRef, taken: bool },
    /// One of several things that a rule draws among (nftables' maps by `numgen random`), counted from 0.
    Drawn { rule: RuleRef, number: u32 },
    /// Session affinity: `recent --rcheck` or a set's element.
    Affinity { rule: RuleRef, taken: bool },
    /// A match that the model cannot decide was assumed to be true or false.
    Assumed { rule: Option<RuleRef>, text: String, taken: bool },
    /// The order of equal base chains cannot be known.
    Order { text: String },
    /// Not a choice: the kernel makes a copy of the packet, and this branch is the copy's way. The packet's own way is another
    /// branch; both happen.
    Copy { text: String },
}

/// Most branches have one.
pub type Decisions = SmallVec<[Decision; 1]>;

/// One possible outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Branch {
    /// Product of the random choices; branches that differ only by assumptions each keep their siblings' full probability.
    pub probability: Fraction,
    /// A random choice that was not taken is left out when a later rule of the same chain was taken.
    pub decisions: Decisions,
    pub hops: Hops,
    pub verdict: Verdict,
    /// The packet's tuple when it left the model.
    pub final_tuple: Tuple,
    /// The tuple that replies carry (conntrack's reply tuple); equals `final_tuple` inverted.
    pub reply_tuple: Tuple,
    /// The source was rewritten to an address of this node.
    pub masquerade: bool,
    /// The kernel chooses the source port (`--random-fully`, a range, a clash): `final_tuple` then shows the old one.
    pub sport_chosen: bool,
    pub out_interface: Option<Name>,
}

/// A packet to simulate, as it enters the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Packet {
    pub tuple: Tuple,
    /// Interface by which it arrives; `None`: a process of this node sends it.
    pub input: Option<Name>,
    pub mark: u32,
    /// TCP flags byte (SYN = 2), or 0.
    pub tcp_flags: u8,
    pub ttl: u8,
    /// TOS byte or traffic class.
    pub tos: u8,
    /// Bytes from the network header on.
    pub length: u32,
    /// What rules may ask of the sender.
    pub sender: Sender,
}

/// Who sends a packet, beyond its addresses; `None`: not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sender {
    /// Source address of the frame, for a packet that arrives.
    pub mac: Option<[u8; 6]>,
    /// Owner of the sending socket (`f_cred->fsuid`), for a packet that this node sends.
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

impl Packet {
    /// The first packet of a connection: SYN for TCP, one small datagram otherwise.
    pub fn first_of(tuple: Tuple, input: Option<Name>) -> Self {
        let tcp_flags = if tuple.proto == Proto::Tcp { 2 } else { 0 };
        Self { tuple, input, mark: 0, tcp_flags, ttl: 64, tos: 0, length: 60, sender: Sender::default() }
    }
}

/// All that can happen to one packet in one state of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trace {
    pub packet: Packet,
    pub branches: Vec<Branch>,
    /// What the model had to take for granted, in sentences (parts of the state that were missing, …).
    pub assumptions: Vec<String>,
    /// What the packet may meet that is not followed; said in words among the assumptions and branches.
    #[serde(skip)]
    pub unfollowed: Unfollowed,
}

/// Native nftables rules that a packet may meet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unfollowed {
    /// Family and name of each: `ip kube-proxy`.
    pub tables: Vec<String>,
    /// They may give the connection another source.
    pub may_snat: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_choices_multiplies_to_the_same_with_and_without_reducing() {
        for count in [1u64, 2, 3, 7, 60, 1_000] {
            let mut left = Fraction::ONE;
            for behind in (1..=count).rev() {
                let chance = Fraction::new(1, behind);
                let taken = left.chained(chance).expect("it fits");
                assert_eq!(Fraction::new(taken.num, taken.den), Fraction::new(1, count));
                assert_eq!(Fraction::new(left.num, left.den).times(chance), Fraction::new(1, count));
                left = left.chained(chance.rest()).expect("it fits");
            }
        }
        let large = Fraction { num: u64::MAX, den: 3 };
        assert_eq!(large.chained(large), None);
    }
}
