//! Targets that change marks or conntrack and let the packet go on.

use super::conn::CtInfo;
use super::run::Run;
use super::walk::Walk;
use crate::core::model::flow::{Direction, Tuple};
use crate::core::model::rules::{ConnMarkOp, MarkOp, Target, Tproxy, TtlOp};
use crate::core::model::steps::{Act, Step};
use crate::core::model::trace::Action;

impl<'s> Run<'s> {
    /// Applies the target.
    pub(super) fn adjust(walk: &mut Walk<'s>, target: &Target) -> Act {
        match target {
            Target::Mark(op) => {
                walk.mark = apply(*op, walk.mark);
                Act::Mark(walk.mark)
            }
            Target::ConnMark(op) => connmark(walk, *op),
            Target::Notrack => {
                // `notrack_tg`: "Previously seen (loopback)? Ignore."
                if matches!(walk.conn.state, CtInfo::Unseen | CtInfo::Invalid) {
                    walk.conn.state = CtInfo::Untracked;
                }
                Act::Target
            }
            // `ttl_tg` (net/netfilter/xt_HL.c) stays within 0 and 255.
            Target::Ttl(op) => {
                walk.ttl = match *op {
                    TtlOp::Set(value) => value,
                    TtlOp::Add(value) => walk.ttl.saturating_add(value),
                    TtlOp::Subtract(value) => walk.ttl.saturating_sub(value),
                };
                said(format!("TTL becomes {}", walk.ttl))
            }
            Target::Tos { value, mask } => {
                walk.tos = (walk.tos & !mask) ^ value;
                said(format!("TOS becomes {:#04x}", walk.tos))
            }
            _ => Act::Target,
        }
    }

    /// `tproxy_tg4` (net/netfilter/xt_TPROXY.c): the packet keeps its addresses, and the mark sends it to the local socket by a
    /// policy rule. `None`: no socket listens there, and the packet is dropped.
    pub(super) fn tproxy(&mut self, walk: &mut Walk<'s>, tproxy: &Tproxy) -> Option<Act> {
        let port = if tproxy.on_port == 0 { walk.tuple.dport } else { tproxy.on_port };
        // `nf_tproxy_laddr4`: the first address of the input interface, where the rule names none.
        let input = walk.input_name().unwrap_or("lo");
        let first = || self.sim.config.first_address(input, walk.tuple.dst).flatten();
        let address = tproxy.on_ip.or_else(first).unwrap_or(walk.tuple.dst);
        let there = Tuple { dst: address, dport: port, ..walk.tuple };
        if self.sim.config.listener(&there) == Some(None) {
            return None;
        }
        walk.mark = apply(tproxy.mark, walk.mark);
        self.assume(format!("a transparent socket listens on port {port}: without one TPROXY drops the packet"));
        Some(said(format!("TPROXY to port {port}, mark {:#x}", walk.mark)))
    }
}

fn said(what: String) -> Act {
    Act::Said(Box::new(Action::Other { target: what.into() }))
}

/// `mark_tg`: `(mark & !mask) ^ value`.
const fn apply(op: MarkOp, mark: u32) -> u32 {
    (mark & !op.mask) ^ op.value
}

/// `connmark_tg_shift` (net/netfilter/xt_connmark.c); without an entry it does nothing.
fn connmark(walk: &mut Walk<'_>, op: ConnMarkOp) -> Act {
    if !walk.conn.tracked() {
        return Act::Target;
    }
    match op {
        ConnMarkOp::Set(op) => {
            walk.conn.mark = apply(op, walk.conn.mark);
            Act::ConnMark(walk.conn.mark)
        }
        ConnMarkOp::Save { ct_mask, nf_mask } => {
            walk.conn.mark = (walk.conn.mark & !ct_mask) ^ (walk.mark & nf_mask);
            Act::ConnMark(walk.conn.mark)
        }
        ConnMarkOp::Restore { ct_mask, nf_mask } => {
            walk.mark = (walk.mark & !nf_mask) ^ (walk.conn.mark & ct_mask);
            Act::Mark(walk.mark)
        }
    }
}

impl<'s> Walk<'s> {
    /// What the reply of this packet looks like as it arrives, and as it leaves.
    pub(super) fn way_back(&mut self) {
        if !self.conn.tracked() {
            return;
        }
        let before = self.conn.translated().inverted();
        let end = match self.conn.direction {
            Direction::Original => self.conn.original.inverted(),
            Direction::Reply => self.conn.reply.inverted(),
        };
        if before == end {
            return;
        }
        let turned_round = before == self.tuple.inverted();
        self.step(if turned_round { Step::Reply(end) } else { Step::OtherReply(Box::new([before, end])) });
    }
}
