//! The machine: takes walks from a stack, drives each along the timeline, and forks them where two things can happen.

use super::compiled::{BaseChain, Entry, Simulator, TableData};
use super::path::dropped;
use super::walk::{Again, Frame, Walk};
use crate::core::model::name::Name;
use crate::core::model::rules::{Policy, Rule, Target};
use crate::core::model::trace::{Action, Branch, Decision, DropReason, Hook, Hop, RuleRef, Verdict};
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
    pub(super) linear: bool,
    /// The order of base chains with equal priority.
    pub(super) order: u8,
    #[expect(clippy::vec_box, reason = "a walk is large: only its place is moved about")]
    work: Vec<Box<Walk>>,
    pub(super) branches: Vec<Branch>,
    pub(super) assumptions: BTreeSet<Cow<'static, str>>,
    steps: u32,
}

/// What a step led to.
pub(super) enum Next {
    Go,
    End(Verdict),
}

/// How a base chain ended without a final verdict is always "accept"; this is how a rule leaves its chain.
enum Acted {
    /// Look at the next rule.
    On,
    /// The base chain is over: the packet is accepted by it.
    Accepted,
    End(Verdict),
}

impl<'s> Run<'s> {
    pub(super) fn new(sim: &'s Simulator, linear: bool, order: u8) -> Self {
        let assumptions = sim.assumptions.iter().cloned().map(Cow::Owned).collect();
        Self { sim, linear, order, work: Vec::new(), branches: Vec::new(), assumptions, steps: 0 }
    }

    pub(super) fn assume(&mut self, sentence: impl Into<Cow<'static, str>>) {
        self.assumptions.insert(sentence.into());
    }

    /// Puts a walk aside to be followed later.
    pub(super) fn later(&mut self, walk: Walk) {
        self.work.push(Box::new(walk));
    }

    /// Follows a walk and all that fork off it to their ends.
    pub(super) fn follow(&mut self, first: Box<Walk>, start: Next) {
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

    fn drive(&mut self, mut walk: Box<Walk>, mut next: Next) {
        loop {
            match walk.again.take() {
                Some(Again::Route(then)) => {
                    next = self.route_output(&mut walk, then);
                    continue;
                }
                Some(Again::Drop(text)) => next = dropped(DropReason::Other { text }),
                None => {}
            }
            match next {
                Next::End(verdict) => return self.finish(walk, verdict),
                Next::Go if walk.frames.is_empty() => next = self.entry(&mut walk),
                Next::Go => next = self.chain(&mut walk),
            }
        }
    }

    /// The next entry of the present hook.
    fn entry(&mut self, walk: &mut Walk) -> Next {
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
                walk.before_mangle = walk.mangled();
                walk.frames.push(Frame { table: base.table, chain: base.chain, next: 0 });
                Next::Go
            }
            Some(Entry::Nat(chains)) => self.nat(walk, chains),
            Some(Entry::Ipvs) => self.ipvs(walk),
        }
    }

    /// A base chain accepted the packet.
    fn base_done(&mut self, walk: &mut Walk) -> Next {
        walk.frames.clear();
        let stage = walk.stage;
        match self.sim.entry(self.order, walk.family(), stage.hook, stage.entry.into()) {
            Some(Entry::Nat(_)) => walk.stage.nat += 1,
            Some(Entry::Chain(BaseChain { reroutes: true, .. })) if walk.before_mangle != walk.mangled() => {
                walk.stage.entry += 1;
                return self.reroute(walk);
            }
            _ => walk.stage.entry += 1,
        }
        Next::Go
    }

    /// Walks the innermost chain until it is left or the path forks.
    fn chain(&mut self, walk: &mut Walk) -> Next {
        let sim = self.sim;
        loop {
            let Some(&frame) = walk.frames.last() else { return self.base_done(walk) };
            let Some(table) = sim.tables.get(usize::from(frame.table)) else { return self.base_done(walk) };
            let rules = table.chain(frame.chain).map_or(&[][..], |chain| &chain.rules);
            let at = match table.index(frame.chain) {
                _ if frame.next == Frame::END => None,
                Some(index) if !self.linear => index.next(&walk.tuple, frame.next),
                _ => Some(frame.next),
            };
            let Some((at, rule)) = at.and_then(|at| Some((at, rules.get(at as usize)?))) else {
                match self.chain_over(walk, table, frame) {
                    Acted::On => continue,
                    Acted::Accepted => return self.base_done(walk),
                    Acted::End(verdict) => return Next::End(verdict),
                }
            };
            self.steps += 1;
            if self.steps > MAX_STEPS {
                let because = format!("gave up after {MAX_STEPS} rules: the chains jump to each other too often");
                return Next::End(Verdict::Unknown { because, by: Some(table.reference(frame.chain, Some(at))) });
            }
            if let Some(last) = walk.frames.last_mut() {
                last.next = at + 1;
            }
            if !self.decide(walk, table, (frame.chain, at), rule) {
                continue;
            }
            match self.act(walk, table, (frame, at), rule) {
                Acted::On => {}
                Acted::Accepted => return self.base_done(walk),
                Acted::End(verdict) => return Next::End(verdict),
            }
        }
    }

    /// End of a chain: back to the caller, or the base chain's policy.
    fn chain_over(&mut self, walk: &mut Walk, table: &TableData, frame: Frame) -> Acted {
        walk.frames.pop();
        if !walk.frames.is_empty() {
            return Acted::On;
        }
        let policy = table.chain(frame.chain).and_then(|chain| chain.policy).unwrap_or(Policy::Accept);
        let action = if policy == Policy::Drop { Action::Drop } else { Action::Accept };
        let rule = table.reference(frame.chain, None);
        let hop = Hop::Rule { hook: walk.stage.hook, rule: rule.clone(), action, text: Default::default() };
        walk.hop(hop);
        match policy {
            Policy::Accept => Acted::Accepted,
            Policy::Drop => Acted::End(Verdict::Dropped { reason: DropReason::Rule, by: Some(rule) }),
        }
    }

    fn act(&mut self, walk: &mut Walk, table: &TableData, (frame, at): (Frame, u32), rule: &Rule) -> Acted {
        let place = table.reference(frame.chain, Some(at));
        match &rule.target {
            Target::Jump(to) => jump(walk, table, (frame, *to, false), place, rule),
            Target::Goto(to) => jump(walk, table, (frame, *to, true), place, rule),
            Target::Return => {
                record(walk, table, rule, place, Action::Return);
                if let Some(last) = walk.frames.last_mut() {
                    last.next = Frame::END;
                }
                Acted::On
            }
            Target::Accept => {
                record(walk, table, rule, place, Action::Accept);
                Acted::Accepted
            }
            Target::Drop | Target::Reject(_) | Target::Stop(_) | Target::Missing(_) => {
                let (action, verdict) = last_word(&rule.target, &place);
                record(walk, table, rule, place, action);
                Acted::End(verdict)
            }
            Target::Dnat(_) | Target::Snat(_) | Target::Masquerade(_) | Target::Redirect(_) | Target::Netmap(_) => {
                self.nat_target(walk, table, place, rule)
            }
            Target::Tproxy(tproxy) => {
                let Some(action) = self.tproxy(walk, tproxy) else {
                    record(walk, table, rule, place.clone(), Action::Drop);
                    walk.note("TPROXY drops it: nothing listens where it would be handed to");
                    return Acted::End(Verdict::Dropped { reason: DropReason::Rule, by: Some(place) });
                };
                record(walk, table, rule, place, action);
                Acted::Accepted
            }
            other => {
                let action = Self::adjust(walk, other);
                record(walk, table, rule, place, action);
                Acted::On
            }
        }
    }

    fn nat_target(&mut self, walk: &mut Walk, table: &TableData, place: RuleRef, rule: &Rule) -> Acted {
        match self.translate_by(walk, &rule.target, &place) {
            Ok(action) => {
                // The rewrite itself follows when the NAT step applies the manip (`nf_nat_packet`).
                record(walk, table, rule, place.clone(), action);
                walk.nat_by = Some(place);
                Acted::Accepted
            }
            Err(instead) => {
                let (action, verdict) = *instead;
                record(walk, table, rule, place, action);
                Acted::End(verdict)
            }
        }
    }

    /// Ends a walk.
    fn finish(&mut self, mut walk: Box<Walk>, verdict: Verdict) {
        let arrived = matches!(verdict, Verdict::Delivered { .. } | Verdict::Forwarded { .. });
        if arrived {
            walk.way_back();
        }
        if let Some(original) = walk.copied.take() {
            self.later(after_copy(*original, &walk));
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
            probability: walk.probability,
            decisions: walk.decisions,
            hops: walk.hops,
            verdict,
            final_tuple: walk.tuple,
            reply_tuple,
            masquerade,
            sport_chosen: walk.conn.sport_chosen,
            out_interface,
        });
    }

    /// The last entry of a hook is done.
    fn leave(&mut self, walk: &mut Walk) -> Next {
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
fn after_copy(mut original: Walk, copy: &Walk) -> Walk {
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
fn record(walk: &mut Walk, table: &TableData, rule: &Rule, place: RuleRef, action: Action) {
    let text = table.text(rule);
    let hook = walk.stage.hook;
    walk.hop(Hop::Rule { hook, rule: place, action, text });
}

/// Goes into another chain; a goto leaves nothing of this one, so that the end of the other returns to the caller's caller.
fn jump(
    walk: &mut Walk,
    table: &TableData,
    (frame, to, goes): (Frame, u32, bool),
    place: RuleRef,
    rule: &Rule,
) -> Acted {
    let chain = table.chain_name(to);
    if walk.frames.iter().any(|frame| frame.chain == to) {
        let because = format!("chain {chain} leads back to itself");
        return Acted::End(Verdict::Unknown { because, by: Some(place) });
    }
    record(walk, table, rule, place, if goes { Action::Goto { chain } } else { Action::Jump { chain } });
    if let Some(last) = walk.frames.last_mut().filter(|_| goes) {
        last.next = Frame::END;
    }
    walk.frames.push(Frame { table: frame.table, chain: to, next: 0 });
    Acted::On
}

/// Targets after which nothing more happens to the packet in this model.
fn last_word(target: &Target, place: &RuleRef) -> (Action, Verdict) {
    let by = Some(place.clone());
    let unknown = |name: &str, because: String| {
        (Action::Other { target: name.into() }, Verdict::Unknown { because, by: by.clone() })
    };
    match target {
        Target::Reject(with) => {
            let with = Name::from(&**with);
            (Action::Reject { with: with.clone() }, Verdict::Rejected { with, by })
        }
        Target::Stop(text) => unknown(text, format!("{text} hands the packet to something outside the rules")),
        Target::Missing(name) => {
            unknown(name, format!("{name} is neither a chain of the dump nor a target that the model knows"))
        }
        _ => (Action::Drop, Verdict::Dropped { reason: DropReason::Rule, by }),
    }
}
