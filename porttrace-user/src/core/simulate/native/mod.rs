//! Native nftables rules (net/netfilter/nf_tables_core.c, `nft_do_chain`): statements in a row, one that does not match ends the
//! rule. A number that is drawn, and what cannot be known, fork the path inside the rule.

mod effects;
mod evaluate;

use super::compiled::TableData;
use super::conn::CtInfo;
use super::run::{Acted, Next, Run, record};
use super::walk::{Frame, Walk};
use crate::core::model::name::Name;
use crate::core::model::native::{NatKind, Statement, Verdict as Goes};
use crate::core::model::rules::{NatRange, Target};
use crate::core::model::steps::{Act, RuleAt};
use crate::core::model::trace::{Action, Decision, DropReason, Place, Verdict};
use effects::{Effect, Outcome, Why};

/// A rule that is being walked.
#[derive(Clone, Copy)]
pub(super) struct Within<'s> {
    pub(super) table: &'s TableData,
    pub(super) frame: Frame,
    pub(super) at: RuleAt,
}

/// How a rule goes on behind a statement.
enum Then {
    /// The next statement.
    On,
    /// The rule does not match.
    Break,
    Acted(Acted),
}

impl<'s> Run<'s> {
    /// Evaluates a rule. `told`: something that it did is part of the path already.
    pub(super) fn statements(
        &mut self,
        walk: &mut Walk<'s>,
        within: Within<'s>,
        all: &'s [Statement],
        mut told: bool,
    ) -> Acted {
        for (number, statement) in all.iter().enumerate() {
            let mut outcomes = self.outcomes(walk, within.table, statement).into_iter();
            let Some(first) = outcomes.next() else { return Acted::On };
            // The last one put aside is the first to be followed.
            for other in outcomes.rev() {
                let mut aside = walk.fork();
                self.settle(&mut aside, within, &other);
                let acted = match self.apply(&mut aside, within, other.effect, &mut told.clone()) {
                    Then::On => self.statements(&mut aside, within, &all[number + 1..], told),
                    Then::Break => Acted::On,
                    Then::Acted(acted) => acted,
                };
                self.put_aside(aside, acted);
            }
            self.settle(walk, within, &first);
            match self.apply(walk, within, first.effect, &mut told) {
                Then::On => {}
                Then::Break => return Acted::On,
                Then::Acted(acted) => return acted,
            }
        }
        if !told {
            record(walk, within.at, Act::Said(Box::new(Action::Continue)));
        }
        Acted::On
    }

    /// Writes down what decided for an outcome.
    fn settle(&mut self, walk: &mut Walk<'s>, within: Within<'s>, outcome: &Outcome<'s>) {
        let Some(rule) = self.sim.rule(within.at) else { return };
        match &outcome.why {
            Why::Sure => {}
            Why::Random { chance, taken } => {
                walk.by_chance(*chance);
                walk.decide(Decision::Random { rule, taken: *taken });
            }
            Why::Drawn { chance, number } => {
                walk.by_chance(*chance);
                walk.decide(Decision::Drawn { rule, number: *number });
            }
            Why::Affinity { taken } => walk.decide(Decision::Affinity { rule, taken: *taken }),
            Why::Assumed { text, taken } => {
                walk.decide(Decision::Assumed { rule: Some(rule), text: text.clone(), taken: *taken });
            }
        }
    }

    /// A fork whose rule is done.
    fn put_aside(&mut self, mut walk: Box<Walk<'s>>, acted: Acted) {
        match acted {
            Acted::On | Acted::Elsewhere => self.later(walk),
            Acted::Accepted => match self.base_done(&mut walk) {
                Next::Go => self.later(walk),
                Next::End(verdict) => self.finish(walk, *verdict),
            },
            Acted::End(verdict) => self.finish(walk, *verdict),
        }
    }

    fn apply(&mut self, walk: &mut Walk<'s>, within: Within<'s>, effect: Effect<'s>, told: &mut bool) -> Then {
        let at = within.at;
        let mut say = |walk: &mut Walk<'s>, act: Act| {
            *told = true;
            record(walk, at, act);
        };
        let said = |action: Action| Act::Said(Box::new(action));
        let by = || self.sim.rule(at);
        match effect {
            Effect::Go => Then::On,
            Effect::Break => Then::Break,
            Effect::Verdict(verdict) => self.verdict(walk, within, verdict, told),
            Effect::Mark(mark) => {
                walk.mark = mark;
                say(walk, Act::Mark(mark));
                Then::On
            }
            Effect::CtMark(mark) => {
                if walk.conn.tracked() {
                    walk.conn.mark = mark;
                    say(walk, Act::ConnMark(mark));
                }
                Then::On
            }
            Effect::Nat(kind, range) => {
                let (target, action) = translation(kind, range);
                match self.translate_by(walk, &target, at) {
                    Ok(_) => {
                        say(walk, said(action));
                        walk.nat_by = Some(at);
                        Then::Acted(Acted::Accepted)
                    }
                    Err(instead) => {
                        say(walk, said(action));
                        Then::Acted(Acted::end(instead.1))
                    }
                }
            }
            Effect::Reject(with) => {
                say(walk, said(Action::Reject { with: with.clone() }));
                Then::Acted(Acted::end(Verdict::Rejected { with: with.clone(), by: by() }))
            }
            Effect::Notrack => {
                // `nft_notrack_eval`: "Previously seen (loopback or untracked)? Ignore."
                if matches!(walk.conn.state, CtInfo::Unseen | CtInfo::Invalid) {
                    walk.conn.state = CtInfo::Untracked;
                }
                say(walk, said(Action::Notrack));
                Then::On
            }
            Effect::Remember { set, address, there } => {
                walk.remembered.push((set.as_str().into(), address, there));
                Then::On
            }
            Effect::Stop(what) => {
                say(walk, said(Action::Other { target: what.clone() }));
                let because = format!("{what} hands the packet to something outside the rules");
                Then::Acted(Acted::end(Verdict::Unknown { because, by: by() }))
            }
            Effect::Unknown(because) => Then::Acted(Acted::end(Verdict::Unknown { because, by: by() })),
        }
    }

    fn verdict(&mut self, walk: &mut Walk<'s>, within: Within<'s>, verdict: &'s Goes, told: &mut bool) -> Then {
        let Within { at, frame, .. } = within;
        let said = |action: Action| Act::Said(Box::new(action));
        let mut say = |walk: &mut Walk<'s>, action: Action| {
            *told = true;
            record(walk, at, said(action));
        };
        let acted = match verdict {
            // What every rule does that says nothing else.
            Goes::Continue => return Then::On,
            Goes::Accept => {
                say(walk, Action::Accept);
                Acted::Accepted
            }
            Goes::Drop => {
                say(walk, Action::Drop);
                Acted::end(Verdict::Dropped { reason: DropReason::Rule, by: self.sim.rule(at) })
            }
            Goes::Return => {
                say(walk, Action::Return);
                if let Some(last) = walk.frames.last_mut() {
                    last.next = Frame::END;
                }
                Acted::Elsewhere
            }
            Goes::Jump(to) | Goes::Goto(to) => {
                let goes = matches!(verdict, Goes::Goto(_));
                let chains = self.sim.lists.tables.get(usize::from(at.table));
                let action = match chains.and_then(|chains| Place::new(chains, *to)) {
                    Some(chain) if goes => Action::Goto { chain },
                    Some(chain) => Action::Jump { chain },
                    None => Action::Continue,
                };
                self.jump(walk, (frame, *to, goes), at, said(action))
            }
            Goes::Missing(name) => {
                let because = format!("{name} is no chain of the table");
                Acted::end(Verdict::Unknown { because, by: self.sim.rule(at) })
            }
        };
        Then::Acted(acted)
    }
}

/// What NAT of iptables would be told, and how it is called.
fn translation(kind: NatKind, range: NatRange) -> (Target, Action) {
    let to = || Name::from(range.to_string());
    match kind {
        NatKind::Dnat => {
            let action = Action::Dnat { to: to() };
            (Target::Dnat(Box::new(range)), action)
        }
        NatKind::Snat => {
            let action = Action::Snat { to: to() };
            (Target::Snat(Box::new(range)), action)
        }
        NatKind::Masquerade => (Target::Masquerade(Box::new(range)), Action::Masquerade),
        NatKind::Redirect => {
            let range = NatRange { of_ports: true, ..range };
            let action = Action::Redirect { to: Name::from(range.to_string()) };
            (Target::Redirect(Box::new(range)), action)
        }
    }
}
