//! Rules whose answer is open: the path forks, and both ways are followed.

use super::compiled::TableData;
use super::matches::{Open, Verdict as Match};
use super::run::Run;
use super::walk::Walk;
use crate::core::model::rules::{Rule, Target};
use crate::core::model::steps::RuleAt;
use crate::core::model::trace::{Decision, Flavour, Fraction};

impl<'s> Run<'s> {
    /// Whether this walk takes the rule. Where that is open, the other possibility is put aside.
    pub(super) fn decide(
        &mut self,
        walk: &mut Walk<'s>,
        table: &TableData,
        (chain, at): (u32, u32),
        rule: &Rule,
    ) -> bool {
        let open = self.matches(walk, rule);
        if !matches!(open, Match::Yes | Match::No)
            && let Some(last) = walk.frames.last_mut()
        {
            // Where the path forks, the other branch goes on behind this rule.
            last.next = at + 1;
        }
        let Open { chance, unknown, affinity, sure } = match open {
            Match::No => return false,
            Match::Yes => return true,
            Match::Remembers(open) => {
                self.remembers(walk, &open, table.at(chain, Some(at)));
                return false;
            }
            Match::Open(open) => *open,
        };
        let Some(place) = self.sim.rule(table.at(chain, Some(at))) else { return false };
        if !unknown.is_empty() {
            let text = unknown.join("; ");
            let idle = matches!(rule.target, Target::None | Target::Other(_)) && walk.remembered.len() == sure;
            if idle {
                let whose = if place.flavour == Flavour::IptablesLegacy { "iptables-legacy " } else { "" };
                let (table, chain, number) = (&place.table, &place.chain, at + 1);
                walk.note(format!(
                    "{whose}{table} {chain} {number}: not known whether it matches ({text}); it has no effect"
                ));
                return false;
            }
            let decision = |taken| match affinity {
                true => Decision::Affinity { rule: place.clone(), taken },
                false => Decision::Assumed { rule: Some(place.clone()), text: text.clone(), taken },
            };
            let mut other = walk.fork();
            other.remembered.truncate(sure);
            other.decide(decision(false));
            self.later(other);
            walk.decide(decision(true));
        }
        let Some(chance) = chance.filter(|chance| *chance != Fraction::ONE) else { return true };
        if chance.num == 0 {
            return false;
        }
        let mut other = walk.fork();
        other.remembered.truncate(sure);
        other.by_chance(chance.rest());
        other.decide(Decision::Random { rule: place.clone(), taken: false });
        self.later(other);
        walk.by_chance(chance);
        walk.decide(Decision::Random { rule: place, taken: true });
        true
    }

    /// A rule that does not match, whose matches of `recent` stand behind a random or unknown one: either they were asked, and
    /// changed their lists, or they were not.
    fn remembers(&mut self, walk: &mut Walk<'s>, open: &Open, at: RuleAt) {
        let Some(rule) = self.sim.rule(at) else { return };
        let chance = open.chance.unwrap_or(Fraction::ONE);
        if chance.num == 0 {
            return walk.remembered.truncate(open.sure);
        }
        if chance == Fraction::ONE && open.unknown.is_empty() {
            return;
        }
        let unknown = if open.unknown.is_empty() { String::new() } else { format!(" ({})", open.unknown.join("; ")) };
        let text = format!("the rule does not match, but its change of a list (recent) was reached{unknown}");
        let decision = |taken| Decision::Assumed { rule: Some(rule.clone()), text: text.clone(), taken };
        let mut other = walk.fork();
        other.remembered.truncate(open.sure);
        if open.unknown.is_empty() {
            other.by_chance(chance.rest());
        }
        other.decide(decision(false));
        self.later(other);
        walk.by_chance(chance);
        walk.decide(decision(true));
    }
}
