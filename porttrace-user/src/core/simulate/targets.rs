//! Targets that change marks or conntrack and let the packet go on.

use super::conn::CtInfo;
use super::run::Run;
use super::walk::Walk;
use crate::core::model::flow::Tuple;
use crate::core::model::rules::{ConnMarkOp, MarkOp, Target, Tproxy, TtlOp};
use crate::core::model::trace::{Action, Hop};

impl Run<'_> {
    /// Applies the target.
    pub(super) fn adjust(walk: &mut Walk, target: &Target) -> Action {
        match target {
            Target::Mark(op) => {
                walk.mark = apply(*op, walk.mark);
                Action::Mark { mark: walk.mark }
            }
            Target::ConnMark(op) => connmark(walk, *op),
            Target::Notrack => {
                // `notrack_tg`: "Previously seen (loopback)? Ignore."
                if matches!(walk.conn.state, CtInfo::Unseen | CtInfo::Invalid) {
                    walk.conn.state = CtInfo::Untracked;
                }
                Action::Notrack
            }
            // `ttl_tg` (net/netfilter/xt_HL.c) stays within 0 and 255.
            Target::Ttl(op) => {
                walk.ttl = match *op {
                    TtlOp::Set(value) => value,
                    TtlOp::Add(value) => walk.ttl.saturating_add(value),
                    TtlOp::Subtract(value) => walk.ttl.saturating_sub(value),
                };
                Action::Other { target: format!("TTL becomes {}", walk.ttl).into() }
            }
            Target::Tos { value, mask } => {
                walk.tos = (walk.tos & !mask) ^ value;
                Action::Other { target: format!("TOS becomes {:#04x}", walk.tos).into() }
            }
            Target::Other(text) => Action::Other { target: (&**text).into() },
            _ => Action::Continue,
        }
    }

    /// `tproxy_tg4` (net/netfilter/xt_TPROXY.c): the packet keeps its addresses, and the mark sends it to the local socket by a
    /// policy rule. `None`: no socket listens there, and the packet is dropped.
    pub(super) fn tproxy(&mut self, walk: &mut Walk, tproxy: &Tproxy) -> Option<Action> {
        let port = if tproxy.on_port == 0 { walk.tuple.dport } else { tproxy.on_port };
        // `nf_tproxy_laddr4`: the first address of the input interface, where the rule names none.
        let input = walk.input.as_deref().unwrap_or("lo");
        let first = || self.sim.config.first_address(input, walk.tuple.dst).flatten();
        let address = tproxy.on_ip.or_else(first).unwrap_or(walk.tuple.dst);
        let there = Tuple { dst: address, dport: port, ..walk.tuple };
        if self.sim.config.listener(&there) == Some(None) {
            return None;
        }
        walk.mark = apply(tproxy.mark, walk.mark);
        self.assume(format!("a transparent socket listens on port {port}: without one TPROXY drops the packet"));
        Some(Action::Other { target: format!("TPROXY to port {port}, mark {:#x}", walk.mark).into() })
    }
}

/// `mark_tg`: `(mark & !mask) ^ value`.
const fn apply(op: MarkOp, mark: u32) -> u32 {
    (mark & !op.mask) ^ op.value
}

/// `connmark_tg_shift` (net/netfilter/xt_connmark.c); without an entry it does nothing.
fn connmark(walk: &mut Walk, op: ConnMarkOp) -> Action {
    if !walk.conn.tracked() {
        return Action::Continue;
    }
    match op {
        ConnMarkOp::Set(op) => {
            walk.conn.mark = apply(op, walk.conn.mark);
            Action::ConnMark { mark: walk.conn.mark }
        }
        ConnMarkOp::Save { ct_mask, nf_mask } => {
            walk.conn.mark = (walk.conn.mark & !ct_mask) ^ (walk.mark & nf_mask);
            Action::ConnMark { mark: walk.conn.mark }
        }
        ConnMarkOp::Restore { ct_mask, nf_mask } => {
            walk.mark = (walk.mark & !nf_mask) ^ (walk.conn.mark & ct_mask);
            Action::Mark { mark: walk.mark }
        }
    }
}

impl Walk {
    /// What NAT does to the reply of this packet: source half first, on its way in, then the destination half.
    pub(super) fn way_back(&mut self) {
        if !self.conn.tracked() {
            return;
        }
        let before = self.conn.translated().inverted();
        let end = match self.conn.direction {
            crate::core::model::flow::Direction::Original => self.conn.original.inverted(),
            crate::core::model::flow::Direction::Reply => self.conn.reply.inverted(),
        };
        let mut middle = before;
        (middle.dst, middle.dport) = (end.dst, end.dport);
        for (before, after) in [(before, middle), (middle, end)] {
            if before != after {
                self.hop(Hop::ReplyRewrite { before, after });
            }
        }
    }
}
