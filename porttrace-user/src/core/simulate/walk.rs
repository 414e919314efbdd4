//! One branch under way: the packet as it looks now, its conntrack entry, and where on the timeline it stands.

use super::conn::Conn;
use crate::core::model::flow::{Family, Tuple};
use crate::core::model::hops::Hops;
use crate::core::model::name::Name;
use crate::core::model::trace::{Decision, Decisions, Fraction, Hook, Hop, RouteKind, RuleRef, Sender};
use smallvec::SmallVec;
use std::borrow::Cow;
use std::net::IpAddr;

/// A packet on its way. Cloned where the path forks.
#[derive(Clone, Debug)]
pub(super) struct Walk {
    pub(super) tuple: Tuple,
    /// Input interface; `None` for what the node sends itself.
    pub(super) input: Option<Name>,
    /// The bridge port behind a bridge that is the input.
    pub(super) phys_in: Option<Name>,
    /// Output interface as the routing decision has it (`skb_dst(skb)->dev`).
    pub(super) output: Option<Name>,
    /// Output interface as the present hook sees it (`nf_hook_state.out`).
    pub(super) hook_output: Option<Name>,
    /// Nothing is known about the output: routes are not part of the state.
    pub(super) output_unknown: bool,
    pub(super) gateway: Option<IpAddr>,
    /// The last routing decision delivers locally.
    pub(super) to_self: bool,
    pub(super) mark: u32,
    pub(super) tcp_flags: u8,
    pub(super) ttl: u8,
    pub(super) length: u32,
    pub(super) tos: u8,
    pub(super) sender: Sender,
    /// A process of this node sent it.
    pub(super) local: bool,
    /// As a unicast, broadcast or multicast of the link (`skb->pkt_type`).
    pub(super) arrived_as: RouteKind,
    /// It left by lo and came back.
    pub(super) looped: bool,
    /// The bridge hands it on without routing (bridge-nf-call-iptables).
    pub(super) bridged: bool,
    /// A broadcast of which the bridge has made its copies.
    pub(super) flooded: bool,
    /// As it came.
    pub(super) received: Tuple,
    pub(super) conn: Conn,
    /// Reply tuple of an old entry that this packet made the kernel delete.
    pub(super) replaced: Option<Tuple>,
    /// Kind of the route by which it leaves.
    pub(super) leaves_as: RouteKind,
    /// This is the kernel's copy of a broadcast; the broadcast itself waits here until the copy has gone its way.
    pub(super) copied: Option<Box<Walk>>,
    /// The rule whose NAT target set up the present manip.
    pub(super) nat_by: Option<RuleRef>,
    /// What this packet changed in lists of `-m recent`: whether the address is there since, the latest last.
    pub(super) remembered: Vec<(Box<str>, IpAddr, bool)>,
    pub(super) probability: Fraction,
    pub(super) decisions: Decisions,
    pub(super) hops: Hops,
    pub(super) stage: Stage,
    /// Chains that are being walked, the base chain first.
    pub(super) frames: Frames,
    /// Which of several next hops the coming routing decision takes.
    pub(super) way: Option<usize>,
    /// What the walk goes on with, where it is not the present chain.
    pub(super) again: Option<Again>,
    /// The packet when the mangle table of OUTPUT began.
    pub(super) before_mangle: Mangled,
}

/// What the mangle table of OUTPUT may not change without a new look at the routes: mark, addresses, TOS (`ipt_mangle_out`), of
/// an IPv6 packet also the hop limit (`ip6t_mangle_out`).
pub(super) type Mangled = (u32, IpAddr, IpAddr, u8, u8);

/// How a walk that was put aside goes on.
#[derive(Clone, Debug)]
pub(super) enum Again {
    /// A way out is looked up: the hook to enter afterwards, `None` to stay in the present one.
    Route(Option<Hook>),
    /// The kernel drops it, for this reason.
    Drop(String),
}

/// Place on the timeline: the entry of a hook, and in a NAT step the chain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stage {
    pub(super) hook: Hook,
    pub(super) entry: u16,
    pub(super) nat: u16,
}

/// Innermost last; kube-proxy nests five deep.
pub(super) type Frames = SmallVec<[Frame; 8]>;

/// One chain being walked and the rule to look at next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) table: u16,
    pub(super) chain: u32,
    pub(super) next: u32,
}

impl Frame {
    /// `next` beyond every rule: the chain is over.
    pub(super) const END: u32 = u32::MAX;
}

impl Walk {
    pub(super) fn family(&self) -> Family {
        self.tuple.family()
    }

    /// A copy that shares all hops so far.
    pub(super) fn fork(&mut self) -> Self {
        let hops = self.hops.fork();
        let mine = std::mem::take(&mut self.hops);
        let mut other = self.clone();
        self.hops = mine;
        other.hops = hops;
        other
    }

    pub(super) fn mangled(&self) -> Mangled {
        let hop_limit = if self.family() == Family::V6 { self.ttl } else { 0 };
        (self.mark, self.tuple.src, self.tuple.dst, self.tos, hop_limit)
    }

    pub(super) fn hop(&mut self, hop: Hop) {
        self.hops.push(hop);
    }

    pub(super) fn note(&mut self, text: impl Into<Cow<'static, str>>) {
        self.hop(Hop::Note { text: text.into() });
    }

    pub(super) fn enter(&mut self, hook: Hook) {
        self.stage = Stage { hook, entry: 0, nat: 0 };
        self.hook_output = match hook {
            Hook::Prerouting | Hook::Input => None,
            Hook::Forward | Hook::Output | Hook::Postrouting => self.output.clone(),
        };
    }

    /// Records a decision. A random choice that was not taken makes room for the next one of the same chain.
    pub(super) fn decide(&mut self, decision: Decision) {
        if let Decision::Random { rule: next, .. } = &decision
            && let Some(Decision::Random { rule: last, taken: false }) = self.decisions.last()
            && last.chain == next.chain
            && last.table == next.table
        {
            self.decisions.pop();
        }
        self.decisions.push(decision);
    }
}
