//! One branch under way: the packet as it looks now, its conntrack entry, and where on the timeline it stands.

use super::conn::Conn;
use crate::core::model::flow::{Family, Tuple};
use crate::core::model::hops::Path;
use crate::core::model::name::Name;
use crate::core::model::steps::{RuleAt, Step};
use crate::core::model::trace::{Decision, Decisions, Fraction, Hook, Packet, RouteKind};
use smallvec::SmallVec;
use std::borrow::Cow;
use std::net::IpAddr;
use std::ops::{Deref, DerefMut};

/// A packet on its way. Cloned where the path forks.
#[derive(Clone, Debug)]
pub(super) struct Walk<'s> {
    /// As it came.
    pub(super) packet: &'s Packet,
    /// As it looks now.
    pub(super) tuple: Tuple,
    /// Input interface; `None` for what the node sends itself.
    pub(super) input: Option<&'s Name>,
    /// The bridge port behind a bridge that is the input.
    pub(super) phys_in: Option<&'s Name>,
    /// Output interface as the routing decision has it (`skb_dst(skb)->dev`).
    pub(super) output: Option<&'s Name>,
    /// Output interface as the present hook sees it (`nf_hook_state.out`).
    pub(super) hook_output: Option<&'s Name>,
    /// Nothing is known about the output: routes are not part of the state.
    pub(super) output_unknown: bool,
    pub(super) gateway: Option<IpAddr>,
    /// The last routing decision delivers locally.
    pub(super) to_self: bool,
    pub(super) mark: u32,
    pub(super) ttl: u8,
    pub(super) tos: u8,
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
    pub(super) conn: Conn,
    /// Reply tuple of an old entry that this packet made the kernel delete.
    pub(super) replaced: Option<Box<Tuple>>,
    /// Kind of the route by which it leaves.
    pub(super) leaves_as: RouteKind,
    /// This is the kernel's copy of a broadcast; the broadcast itself waits here until the copy has gone its way.
    pub(super) copied: Option<Box<Walk<'s>>>,
    /// The rule whose NAT target set up the present manip.
    pub(super) nat_by: Option<RuleAt>,
    /// What this packet changed in lists of `-m recent`: whether the address is there since, the latest last.
    pub(super) remembered: Vec<(Box<str>, IpAddr, bool)>,
    /// Not in lowest terms ([`Fraction::chained`]).
    pub(super) probability: Fraction,
    pub(super) decisions: Decisions,
    pub(super) path: Path,
    pub(super) stage: Stage,
    /// Chains that are being walked, the base chain first.
    pub(super) frames: Frames,
    /// Which of several next hops the coming routing decision takes.
    pub(super) way: Option<usize>,
    /// What the walk goes on with, where it is not the present chain.
    pub(super) again: Option<Box<Again>>,
    /// The packet when the mangle table of OUTPUT began.
    pub(super) before_mangle: Option<Box<Mangled>>,
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
#[derive(Debug)]
pub(super) struct Frames(SmallVec<[Frame; 8]>);

impl Frames {
    pub(super) fn new() -> Self {
        Self(SmallVec::new())
    }
}

impl Clone for Frames {
    /// All at once, which the list's own `clone` does frame by frame.
    fn clone(&self) -> Self {
        Self(SmallVec::from_slice(&self.0))
    }
}

impl Deref for Frames {
    type Target = SmallVec<[Frame; 8]>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Frames {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

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

impl<'s> Walk<'s> {
    pub(super) fn family(&self) -> Family {
        self.tuple.family()
    }

    /// A copy that shares all steps so far.
    pub(super) fn fork(&mut self) -> Box<Self> {
        self.path.share();
        // Straight to its place, without a copy on the stack.
        Box::write(Box::new_uninit(), self.clone())
    }

    pub(super) fn mangled(&self) -> Mangled {
        let hop_limit = if self.family() == Family::V6 { self.ttl } else { 0 };
        (self.mark, self.tuple.src, self.tuple.dst, self.tos, hop_limit)
    }

    pub(super) fn step(&mut self, step: Step) {
        self.path.push(step);
    }

    /// The names of the interfaces; see the fields.
    pub(super) fn input_name(&self) -> Option<&'s str> {
        self.input.map(Name::as_str)
    }

    /// Input interface as the present hook sees it (`nf_hook_state.in`): none behind the bridge's own POSTROUTING
    /// (`br_nf_post_routing`).
    pub(super) fn hook_input(&self) -> Option<&'s Name> {
        let past_bridge = self.bridged && self.stage.hook == Hook::Postrouting;
        self.input.filter(|_| !past_bridge)
    }

    pub(super) fn hook_input_name(&self) -> Option<&'s str> {
        self.hook_input().map(Name::as_str)
    }

    pub(super) fn output_name(&self) -> Option<&'s str> {
        self.output.map(Name::as_str)
    }

    pub(super) fn hook_output_name(&self) -> Option<&'s str> {
        self.hook_output.map(Name::as_str)
    }

    pub(super) fn note(&mut self, text: impl Into<Cow<'static, str>>) {
        self.step(Step::Note(text.into()));
    }

    pub(super) fn enter(&mut self, hook: Hook) {
        self.stage = Stage { hook, entry: 0, nat: 0 };
        self.hook_output = match hook {
            Hook::Prerouting | Hook::Input => None,
            Hook::Forward | Hook::Output | Hook::Postrouting => self.output,
        };
    }

    /// It goes on like this only by chance.
    pub(super) fn by_chance(&mut self, chance: Fraction) {
        let sofar = self.probability;
        self.probability = sofar.chained(chance).unwrap_or_else(|| sofar.times(chance));
    }

    /// Records a decision. A random choice that was not taken makes room for the next one of the same chain.
    pub(super) fn decide(&mut self, decision: Decision) {
        if let Decision::Random { rule: next, .. } = &decision
            && let Some(last) = self.decisions.last_mut()
            && matches!(last, Decision::Random { rule, taken: false } if rule.same_chain(next))
        {
            *last = decision;
            return;
        }
        self.decisions.push(decision);
    }
}
