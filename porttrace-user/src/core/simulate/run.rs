//! The machine: takes walks from a stack, drives each along the timeline, and forks them where two things can happen.

use super::Question;
use super::compiled::{BaseChain, Entry, Simulator, TableData};
use super::native::Within;
use super::path::dropped;
use super::source::{Reverse, WayBack};
use super::walk::{Again, Frame, Walk};
use crate::core::model::rules::{Policy, Rule, Target};
use crate::core::model::state::ConntrackEntry;
use crate::core::model::steps::{Act, RuleAt, Step};
use crate::core::model::trace::{Action, Branch, Decision, DropReason, Fraction, Hook, RuleRef, Verdict};
use std::borrow::Cow;
use std::collections::BTreeSet;

/// More outcomes than this are not followed; the trace says so.
const MAX_BRANCHES: usize = 4096;
/// Rules looked at in one trace; a ruleset whose chains jump to each other many times over could need forever.
const MAX_STEPS: u32 = 2_000_000;

/// One trace being made.
pub(super) struct Run<'s> {
    pub(super) sim: &'s Simulator,
    /// Walk every rule of a chain instead of asking its index.
    /// The conntrack entry of the packet, instead of those of the state.
    pub(super) entry: Option<&'s ConntrackEntry>,
    pub(super) linear: bool,
    /// The order of base chains with equal priority.
    pub(super) order: u8,
    #[expect(clippy::vec_box, reason = "a walk is large: only its place is moved about")]
    work: Vec<Box<Walk<'s>>>,
    pub(super) branches: Vec<Branch>,
    pub(super) assumptions: BTreeSet<Cow<'static, str>>,
    /// The way back to a source, as it was last found: branches of one packet mostly share their source.
    pub(super) way_back: Option<(WayBack<'s>, Reverse)>,
    steps: u32,
}

/// What a step led to.
pub(super) enum Next {
    Go,
    End(Box<Verdict>),
}

impl Next {
    pub(super) fn end(verdict: Verdict) -> Self {
        Self::End(Box::new(verdict))
    }
}

/// How a base chain ended without a final verdict is always "accept"; this is how a rule leaves its chain.
pub(super) enum Acted {
    /// Look at the next rule.
    On,
    /// Another chain comes next, or this one is over.
    Elsewhere,
    /// The base chain is over: the packet is accepted by it.
    Accepted,
    End(Box<Verdict>),
}

impl Acted {
    pub(super) fn end(verdict: Verdict) -> Self {
        Self::End(Box::new(verdict))
    }
}

impl<'s> Run<'s> {
    pub(super) fn new(sim: &'s Simulator, question: Question<'s>, order: u8) -> Self {
        let assumptions = sim.assumptions.iter().cloned().map(Cow::Owned).collect();
        let Question { entry, linear, .. } = question;
        Self {
            sim,
            entry,
            linear,
            order,
            work: Vec::new(),
            branches: Vec::new(),
            assumptions,
            way_back: None,
            steps: 0,
        }
    }

    pub(super) fn assume(&mut self, sentence: impl Into<Cow<'static, str>>) {
        self.assumptions.insert(sentence.into());
    }

    /// Puts a walk aside to be followed later.
    pub(super) fn later(&mut self, walk: Box<Walk<'s>>) {
        self.work.push(walk);
    }

    /// Follows a walk and all that fork off it to their ends.
    pub(super) fn follow(&mut self, first: Box<Walk<'s>>, start: Next) {
        self.drive(first, start);
        while let Some(walk) = self.work.pop() {
            if self.branches.len() >= MAX_BRANCHES {
                let left = self.work.len() + 1;
                self.assume(format!("stopped at {MAX_BRANCHES} branches; {left} more were not followed to their ends"));
                return;
            }
            self.drive(walk, Next::Go);
        }
    }

    fn drive(&mut self, mut walk: Box<Walk<'s>>, mut next: Next) {
        loop {
            match walk.again.take().map(|again| *again) {
                Some(Again::Route(then)) => {
                    next = self.route_output(&mut walk, then);
                    continue;
                }
                Some(Again::Drop(text)) => next = dropped(DropReason::Other { text }),
                None => {}
            }
            match next {
                Next::End(verdict) => return self.finish(walk, *verdict),
                Next::Go if walk.frames.is_empty() => next = self.entry(&mut walk),
                Next::Go => next = self.chain(&mut walk),
            }
        }
    }

    /// The next entry of the present hook.
    fn entry(&mut self, walk: &mut Walk<'s>) -> Next {
        let stage = walk.stage;
        let sim = self.sim;
        match sim.entry(self.order, walk.family(), stage.hook, stage.entry.into()) {
            None => self.leave(walk),
            Some(Entry::Conntrack) => {
                self.conntrack(walk);
                walk.stage.entry += 1;
                Next::Go
            }
            Some(Entry::Chain(base)) => {
                if base.reroutes {
                    walk.before_mangle = Some(Box::new(walk.mangled()));
                }
                walk.frames.push(Frame { table: base.table, chain: base.chain, next: 0 });
                Next::Go
            }
            Some(Entry::Nat(chains)) => self.nat(walk, chains),
            Some(Entry::Ipvs) => self.ipvs(walk),
            Some(Entry::Unfollowed(place)) => self.unfollowed(walk, *place),
        }
    }

    /// A base chain accepted the packet.
    pub(super) fn base_done(&mut self, walk: &mut Walk<'s>) -> Next {
        walk.frames.clear();
        let stage = walk.stage;
        match self.sim.entry(self.order, walk.family(), stage.hook, stage.entry.into()) {
            Some(Entry::Nat(_)) => walk.stage.nat += 1,
            Some(Entry::Chain(BaseChain { reroutes: true, .. }))
                if walk.before_mangle.take().is_some_and(|before| *before != walk.mangled()) =>
            {
                walk.stage.entry += 1;
                return self.reroute(walk);
            }
            _ => walk.stage.entry += 1,
        }
        Next::Go
    }

    /// Walks the innermost chain, and those that it leads to, until the base chain is over.
    fn chain(&mut self, walk: &mut Walk<'s>) -> Next {
        let sim = self.sim;
        loop {
            let Some(&frame) = walk.frames.last() else { return self.base_done(walk) };
            let Some(table) = sim.tables.get(usize::from(frame.table)) else { return self.base_done(walk) };
            let rules = table.chain(frame.chain).map_or(&[][..], |chain| &chain.rules);
            let index = table.index(frame.chain).filter(|_| !self.linear);
            let mut from = frame.next;
            let acted = loop {
                let found = match index {
                    _ if from == Frame::END => None,
                    Some(index) => index.next(&walk.tuple, from),
                    None => Some(from),
                };
                let Some((at, rule)) = found.and_then(|at| Some((at, rules.get(at as usize)?))) else {
                    break self.chain_over(walk, table, frame);
                };
                self.steps += 1;
                if self.steps > MAX_STEPS {
                    return self.gave_up(table.at(frame.chain, Some(at)));
                }
                from = at + 1;
                if self.decide(walk, table, (frame.chain, at), rule) {
                    match self.act(walk, table, (frame, at), rule) {
                        Acted::On => {}
                        elsewhere => break elsewhere,
                    }
                }
            };
            match acted {
                Acted::On | Acted::Elsewhere => {}
                Acted::Accepted => return self.base_done(walk),
                Acted::End(verdict) => return Next::End(verdict),
            }
        }
    }

    fn gave_up(&self, at: RuleAt) -> Next {
        let because = format!("gave up after {MAX_STEPS} rules: the chains jump to each other too often");
        Next::end(Verdict::Unknown { because, by: self.sim.rule(at) })
    }

    /// End of a chain: back to the caller, or the base chain's policy.
    fn chain_over(&mut self, walk: &mut Walk<'s>, table: &TableData, frame: Frame) -> Acted {
        walk.frames.pop();
        if !walk.frames.is_empty() {
            return Acted::Elsewhere;
        }
        let at = table.at(frame.chain, None);
        record(walk, at, Act::Target);
        match table.chain(frame.chain).and_then(|chain| chain.policy) {
            Some(Policy::Drop) => Acted::end(Verdict::Dropped { reason: DropReason::Rule, by: self.sim.rule(at) }),
            Some(Policy::Accept) | None => Acted::Accepted,
        }
    }

    fn act(&mut self, walk: &mut Walk<'s>, table: &'s TableData, (frame, at): (Frame, u32), rule: &'s Rule) -> Acted {
        let at = table.at(frame.chain, Some(at));
        match &rule.target {
            Target::Jump(to) => self.jump(walk, (frame, *to, false), at, Act::Target),
            Target::Goto(to) => self.jump(walk, (frame, *to, true), at, Act::Target),
            Target::Native(all) => {
                // Where the path forks inside the rule, the other branches go on behind it.
                if let Some(last) = walk.frames.last_mut() {
                    last.next = at.number;
                }
                self.statements(walk, Within { table, frame, at }, &all.0, false)
            }
            Target::Return => {
                record(walk, at, Act::Target);
                if let Some(last) = walk.frames.last_mut() {
                    last.next = Frame::END;
                }
                Acted::Elsewhere
            }
            Target::Accept => {
                record(walk, at, Act::Target);
                Acted::Accepted
            }
            Target::Drop | Target::Reject(_) | Target::Stop(_) | Target::Missing(_) => {
                record(walk, at, Act::Target);
                Acted::end(last_word(&rule.target, self.sim.rule(at)))
            }
            Target::Dnat(_) | Target::Snat(_) | Target::Masquerade(_) | Target::Redirect(_) | Target::Netmap(_) => {
                self.nat_target(walk, at, rule)
            }
            Target::Tproxy(tproxy) => {
                let Some(act) = self.tproxy(walk, tproxy) else {
                    record(walk, at, Act::Said(Box::new(Action::Drop)));
                    walk.note("TPROXY drops it: nothing listens where it would be handed to");
                    return Acted::end(Verdict::Dropped { reason: DropReason::Rule, by: self.sim.rule(at) });
                };
                record(walk, at, act);
                Acted::Accepted
            }
            other => {
                let act = Self::adjust(walk, other);
                record(walk, at, act);
                Acted::On
            }
        }
    }

    fn nat_target(&mut self, walk: &mut Walk<'s>, at: RuleAt, rule: &Rule) -> Acted {
        match self.translate_by(walk, &rule.target, at) {
            Ok(act) => {
                // The rewrite itself follows when the NAT step applies the manip (`nf_nat_packet`).
                record(walk, at, act);
                walk.nat_by = Some(at);
                Acted::Accepted
            }
            Err(instead) => {
                let (act, verdict) = *instead;
                record(walk, at, act);
                Acted::end(verdict)
            }
        }
    }

    /// Goes into another chain; a goto leaves nothing of this one, so that the end of the other returns to the caller's caller.
    pub(super) fn jump(
        &mut self,
        walk: &mut Walk<'s>,
        (frame, to, goes): (Frame, u32, bool),
        at: RuleAt,
        act: Act,
    ) -> Acted {
        if walk.frames.iter().any(|frame| frame.chain == to) {
            let table = self.sim.tables.get(usize::from(frame.table));
            let name = table.map_or("", |table| table.chain_name(to));
            let because = format!("chain {name} leads back to itself");
            return Acted::end(Verdict::Unknown { because, by: self.sim.rule(at) });
        }
        record(walk, at, act);
        if let Some(last) = walk.frames.last_mut() {
            last.next = if goes { Frame::END } else { at.number };
        }
        walk.frames.push(Frame { table: frame.table, chain: to, next: 0 });
        Acted::Elsewhere
    }

    /// Ends a walk.
    pub(super) fn finish(&mut self, mut walk: Box<Walk<'s>>, verdict: Verdict) {
        let arrived = matches!(verdict, Verdict::Delivered { .. } | Verdict::Forwarded { .. });
        if arrived {
            walk.way_back();
        }
        if let Some(original) = walk.copied.take() {
            self.later(after_copy(original, &walk));
        }
        let conn = &walk.conn;
        let reply_tuple = if conn.tracked() { conn.translated().inverted() } else { walk.tuple.inverted() };
        let new_source = walk.conn.reply.dst;
        let masquerade =
            conn.tracked() && conn.original.src != new_source && self.sim.routing.is_local(new_source).unwrap_or(true);
        let out_interface = match &verdict {
            Verdict::Forwarded { interface, .. } => Some(interface.clone()),
            _ => None,
        };
        self.branches.push(Branch {
            probability: Fraction::new(walk.probability.num, walk.probability.den),
            decisions: walk.decisions,
            hops: walk.path.into(),
            verdict,
            final_tuple: walk.tuple,
            reply_tuple,
            masquerade,
            sport_chosen: walk.conn.sport_chosen,
            out_interface,
        });
    }

    /// The last entry of a hook is done.
    fn leave(&mut self, walk: &mut Walk<'s>) -> Next {
        match walk.stage.hook {
            Hook::Prerouting => self.after_prerouting(walk),
            Hook::Output => {
                self.send_off(walk);
                Next::Go
            }
            Hook::Forward => {
                walk.enter(Hook::Postrouting);
                Next::Go
            }
            Hook::Input => self.deliver(walk),
            Hook::Postrouting => self.transmit(walk),
        }
    }
}

/// A broadcast goes on when its copy has gone its way: both belong to one connection, and rules may have written lists.
fn after_copy<'s>(mut original: Box<Walk<'s>>, copy: &Walk<'_>) -> Box<Walk<'s>> {
    if original.conn.tracked() {
        original.conn = copy.conn;
    }
    original.remembered.clone_from(&copy.remembered);
    original.probability = copy.probability;
    let kept = copy.decisions.iter().filter(|decision| !matches!(decision, Decision::Copy { .. }));
    original.decisions = kept.cloned().collect();
    original
}

/// Writes down that a rule matched and what it did.
pub(super) fn record(walk: &mut Walk<'_>, at: RuleAt, act: Act) {
    walk.step(Step::Rule { hook: walk.stage.hook, at, act });
}

/// Targets after which nothing more happens to the packet in this model.
fn last_word(target: &Target, by: Option<RuleRef>) -> Verdict {
    match target {
        Target::Reject(with) => Verdict::Rejected { with: with.clone(), by },
        Target::Stop(text) => {
            Verdict::Unknown { because: format!("{text} hands the packet to something outside the rules"), by }
        }
        Target::Missing(name) => Verdict::Unknown {
            because: format!("{name} is neither a chain of the dump nor a target that the model knows"),
            by,
        },
        _ => Verdict::Dropped { reason: DropReason::Rule, by },
    }
}
