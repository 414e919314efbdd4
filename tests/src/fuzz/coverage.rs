//! Which matches and targets the kernel really hit, counted from its own trace and the rules as `iptables-save` prints them.

use super::generate::{matches, native, targets};
use super::kernel::path::{Place, WATCH};
use super::run::Round;
use porttrace_user::core::model::flow::Family;
use porttrace_user::core::model::rules::Rule;
use porttrace_user::core::model::trace::Flavour;
use porttrace_user::core::parse::words::Words;
use std::collections::{BTreeMap, BTreeSet};

/// Hits by name.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// Matches in rules that the kernel matched; `!` counts negated ones.
    pub matches: BTreeMap<String, usize>,
    pub targets: BTreeMap<String, usize>,
    /// Parts of native rules.
    pub native: BTreeMap<String, usize>,
    /// `ipv4 nat PREROUTING` → packets that passed it.
    pub chains: BTreeMap<String, usize>,
}

impl Coverage {
    /// Counts a round's hits.
    pub fn add(&mut self, round: &Round) {
        for (probe, path) in round.probes.iter().filter_map(|probe| Some((probe, round.paths.get(&probe.id)?))) {
            let family = probe.packet.tuple.family();
            for segment in path.segments.iter().filter(|segment| segment.table != WATCH) {
                let name = if family == Family::V4 { "ipv4" } else { "ipv6" };
                *self.chains.entry(format!("{name} {} {}", segment.table, segment.chain)).or_default() += 1;
                for step in &segment.steps {
                    if let Place::Rule(number) = step.place
                        && let Some(rule) =
                            rule(round, (family, Flavour::Nftables), &segment.table, &step.chain, number)
                    {
                        let text = rule.text.read();
                        for name in native::NAMES.iter().filter(|name| text.contains(**name)) {
                            *self.native.entry((*name).to_owned()).or_default() += 1;
                        }
                    }
                    if let Place::Rule(number) = step.place
                        && let Some(rule) =
                            rule(round, (family, Flavour::IptablesNft), &segment.table, &step.chain, number)
                    {
                        self.hit(&rule.text.read());
                    }
                }
            }
            for step in &path.legacy {
                let flavour = (family, Flavour::IptablesLegacy);
                if let Some(rule) = rule(round, flavour, &step.table, &step.chain, step.number) {
                    self.hit(&rule.text.read());
                    *self.chains.entry(format!("rules of legacy {}", step.table)).or_default() += 1;
                }
            }
        }
    }

    /// Adds another run's counts.
    pub fn merge(&mut self, other: &Self) {
        for (into, from) in [
            (&mut self.matches, &other.matches),
            (&mut self.targets, &other.targets),
            (&mut self.native, &other.native),
            (&mut self.chains, &other.chains),
        ] {
            for (name, count) in from {
                *into.entry(name.clone()).or_default() += count;
            }
        }
    }

    /// Names of the lists that never occurred.
    pub fn missing(&self) -> Vec<String> {
        let matches = matches::NAMES.iter().filter(|name| !self.matches.contains_key(**name));
        let targets = targets::NAMES.iter().filter(|name| !self.targets.contains_key(**name));
        let native = native::NAMES.iter().filter(|name| !self.native.contains_key(**name));
        let iptables = matches.map(|name| format!("match {name}")).chain(targets.map(|name| format!("target {name}")));
        iptables.chain(native.map(|name| format!("native {name}"))).collect()
    }

    fn hit(&mut self, text: &str) {
        let mut seen = BTreeSet::new();
        let mut target = "none".to_string();
        let mut words = Words::new(text);
        while let Some(word) = words.next() {
            match word {
                "-s" | "-d" | "-i" | "-o" | "-p" | "!" => {
                    seen.insert(word.to_string());
                }
                "-m" => seen.extend(words.next().map(String::from)),
                "-g" => target = "goto".into(),
                "-j" => target = words.next().map_or("none", name_of).into(),
                _ => {}
            }
        }
        for name in seen {
            *self.matches.entry(name).or_default() += 1;
        }
        *self.targets.entry(target).or_default() += 1;
    }
}

fn name_of(target: &str) -> &str {
    match target {
        "NOTRACK" => "CT",
        known if targets::NAMES.contains(&known) => known,
        _ => "jump",
    }
}

/// A rule of the round's state by its place.
pub fn rule<'a>(
    round: &'a Round,
    (family, flavour): (Family, Flavour),
    table: &str,
    chain: &str,
    number: u32,
) -> Option<&'a Rule> {
    let mut rulesets = round.state.all_rules();
    let ruleset = rulesets.find(|ruleset| ruleset.family == family && ruleset.flavour == flavour)?;
    // Of native tables the kernel's traces have the name without the family.
    let is_it = |name: &str| name == table || flavour == Flavour::Nftables && name.rsplit(' ').next() == Some(table);
    let chain = ruleset.tables.iter().find(|one| is_it(&one.name))?.chain(chain)?;
    chain.rules.get(number.checked_sub(1)? as usize)
}
