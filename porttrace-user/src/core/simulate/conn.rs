//! Conntrack: which entry a packet belongs to, or which one it makes (net/netfilter/nf_conntrack_core.c).

use super::run::Run;
use super::walk::Walk;
use crate::core::model::flow::{Direction, Proto, Tuple};
use crate::core::model::rules::CtStates;
use crate::core::model::state::ConntrackEntry;
use crate::core::model::steps::Step;
use crate::core::model::trace::Decision;

/// A packet's view of conntrack (`skb->_nfct`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Conn {
    pub(super) state: CtInfo,
    pub(super) original: Tuple,
    pub(super) reply: Tuple,
    pub(super) direction: Direction,
    /// `IPS_SRC_NAT_DONE`, `IPS_DST_NAT_DONE`.
    pub(super) src_done: bool,
    pub(super) dst_done: bool,
    pub(super) mark: u32,
    /// `IPS_SEEN_REPLY`, `IPS_ASSURED`, `IPS_CONFIRMED`, as in `enum ip_conntrack_status`.
    pub(super) status: u32,
    pub(super) timeout: Option<u64>,
    /// It was there before this packet.
    pub(super) existed: bool,
    /// The kernel chose another source port than `reply` has.
    pub(super) sport_chosen: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CtInfo {
    /// Conntrack has not seen the packet yet.
    Unseen,
    Untracked,
    Invalid,
    New,
    Established,
}

pub(super) const SEEN_REPLY: u32 = 2;
const ASSURED: u32 = 4;
pub(super) const CONFIRMED: u32 = 8;

impl Conn {
    /// `nf_conntrack_confirm`, behind the last chain of POSTROUTING.
    pub(super) fn confirm(&mut self) {
        if self.tracked() {
            self.status |= CONFIRMED;
        }
    }
}

impl Conn {
    /// A connection that begins with this packet.
    pub(super) fn begins(tuple: Tuple) -> Self {
        Self {
            state: CtInfo::Unseen,
            original: tuple,
            reply: tuple.inverted(),
            direction: Direction::Original,
            src_done: false,
            dst_done: false,
            mark: 0,
            status: 0,
            timeout: None,
            existed: false,
            sport_chosen: false,
        }
    }

    /// There is an entry (`nf_ct_get` is not NULL).
    pub(super) const fn tracked(&self) -> bool {
        matches!(self.state, CtInfo::New | CtInfo::Established)
    }

    /// `IPS_DST_NAT`.
    pub(super) fn dst_nat(&self) -> bool {
        (self.reply.src, self.reply.sport) != (self.original.dst, self.original.dport)
    }

    /// `IPS_SRC_NAT`.
    pub(super) fn src_nat(&self) -> bool {
        self.sport_chosen || (self.reply.dst, self.reply.dport) != (self.original.src, self.original.sport)
    }

    /// What a packet of this direction looks like after both manips.
    pub(super) const fn translated(&self) -> Tuple {
        match self.direction {
            Direction::Original => self.reply.inverted(),
            Direction::Reply => self.original.inverted(),
        }
    }

    /// The bits that `--ctstate` compares with (`conntrack_mt`).
    pub(super) fn state_bits(&self) -> u8 {
        let state = match self.state {
            CtInfo::New => CtStates::NEW,
            CtInfo::Established => CtStates::ESTABLISHED,
            CtInfo::Untracked => CtStates::UNTRACKED,
            // Before conntrack (table raw) there is no entry, and that reads as INVALID.
            CtInfo::Invalid | CtInfo::Unseen => CtStates::INVALID,
        };
        let nat = |set: bool, bit: u8| if set && self.tracked() { bit } else { 0 };
        state | nat(self.src_nat(), CtStates::SNAT) | nat(self.dst_nat(), CtStates::DNAT)
    }

    const fn name(&self) -> &'static str {
        match self.state {
            CtInfo::New => "NEW",
            CtInfo::Established => "ESTABLISHED",
            CtInfo::Untracked => "UNTRACKED",
            CtInfo::Invalid | CtInfo::Unseen => "INVALID",
        }
    }
}

impl<'s> Run<'s> {
    /// `nf_conntrack_in`.
    pub(super) fn conntrack(&mut self, walk: &mut Walk<'s>) {
        let mut entry = None;
        match walk.conn.state {
            // An invalid packet carries nothing back through lo: conntrack looks at it again.
            CtInfo::Unseen | CtInfo::Invalid => entry = self.look_up(walk),
            CtInfo::Untracked if !walk.looped => {}
            // "Previously seen (loopback or untracked)? Ignore."
            _ => return,
        }
        walk.step(Step::Conntrack { state: walk.conn.name(), entry: entry.map(Into::into) });
    }

    /// Fills in the walk's connection; the text tells an existing entry.
    fn look_up(&mut self, walk: &mut Walk<'s>) -> Option<String> {
        walk.conn = Conn::begins(walk.tuple);
        let found = match self.entry {
            Some(entry) => Some(entry.direction_of(&walk.tuple).map(|direction| (entry, direction))),
            None => self.sim.config.entry(&walk.tuple),
        };
        if found.is_none() {
            self.assume(
                "conntrack entries are not part of the state: the packet is taken as the first of a connection",
            );
        }
        if let Some((entry, direction)) = found.flatten() {
            match reopens(walk, &entry.state, direction) {
                Reopens::No => return Some(walk.belongs_to(entry, direction)),
                Reopens::Yes => {}
                Reopens::Unknown => self.goes_on_as_it_was(walk, entry, direction),
            }
            walk.note("the old conntrack entry of this connection is closed: a SYN replaces it");
            walk.replaced = Some(Box::new(entry.reply));
        }
        walk.conn.state = if self.starts(walk) { CtInfo::New } else { CtInfo::Invalid };
        None
    }

    /// A SYN meets an entry that was reset, and the entry does not say by whom: besides the walk on which it is replaced, one
    /// on which the SYN is ignored and belongs to it (`TCP_CONNTRACK_IGNORE`).
    fn goes_on_as_it_was(&mut self, walk: &mut Walk<'s>, entry: &ConntrackEntry, direction: Direction) {
        let text = "the old conntrack entry of this connection was reset by its client, or after a FIN";
        let decision = |taken| Decision::Assumed { rule: None, text: text.into(), taken };
        let mut other = walk.fork();
        other.decide(decision(false));
        other.note("a SYN does not replace a conntrack entry that the server reset: the packet belongs to it");
        let known = other.belongs_to(entry, direction);
        other.step(Step::Conntrack { state: other.conn.name(), entry: Some(known.into()) });
        self.later(other);
        walk.decide(decision(true));
    }

    /// Whether a packet without an entry makes one (`nf_conntrack_tcp_packet` → `tcp_new`; UDP and the rest always do).
    fn starts(&mut self, walk: &Walk<'_>) -> bool {
        const FIN: u8 = 1;
        const SYN: u8 = 2;
        const RST: u8 = 4;
        const ACK: u8 = 16;
        let flags = walk.packet.tcp_flags;
        match walk.tuple.proto {
            Proto::Tcp if flags & RST != 0 => false,
            Proto::Tcp if flags & SYN != 0 => flags & (ACK | FIN) == 0,
            Proto::Tcp if flags & FIN != 0 => false,
            Proto::Tcp if flags & ACK != 0 => self.sim.config.tcp_loose.unwrap_or(1) != 0,
            Proto::Tcp => false,
            _ => true,
        }
    }
}

impl<'s> Walk<'s> {
    /// Makes the packet one of an existing entry; the text tells which.
    fn belongs_to(&mut self, entry: &ConntrackEntry, direction: Direction) -> String {
        // A reply is seen as soon as it is looked up, before any rule (`nf_conntrack_in`).
        let seen = if entry.unreplied && direction == Direction::Original { 0 } else { SEEN_REPLY };
        let status = CONFIRMED | seen | if entry.assured { ASSURED } else { 0 };
        let established = direction == Direction::Reply || !entry.unreplied;
        self.conn = Conn {
            state: if established { CtInfo::Established } else { CtInfo::New },
            original: entry.original,
            reply: entry.reply,
            direction,
            src_done: true,
            dst_done: true,
            mark: entry.mark,
            status,
            timeout: entry.timeout,
            existed: true,
            sport_chosen: false,
        };
        format!("{} / {}", entry.original, entry.reply)
    }
}

/// Whether a packet deletes the entry that it finds and starts anew.
enum Reopens {
    No,
    Yes,
    Unknown,
}

/// `nf_conntrack_tcp_packet`, "Attempt to reopen a closed/aborted connection": a SYN in the original direction does so where a FIN
/// has been seen, which TIME_WAIT cannot do without, or where the last packet was the client's own reset. Neither is part of
/// what an entry in CLOSE shows.
fn reopens(walk: &Walk<'_>, state: &str, direction: Direction) -> Reopens {
    let syn = walk.tuple.proto == Proto::Tcp && walk.packet.tcp_flags & 0x17 == 2;
    match state {
        "TIME_WAIT" if syn && direction == Direction::Original => Reopens::Yes,
        "CLOSE" if syn && direction == Direction::Original => Reopens::Unknown,
        _ => Reopens::No,
    }
}
