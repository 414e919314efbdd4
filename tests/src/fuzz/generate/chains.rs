//! Random tables: base chains with policies, and user chains that are only called from hooks where all their rules are allowed.

use super::node::World;
use super::{matches, targets};
use crate::fuzz::rng::Rng;
use crate::fuzz::scenario::{Chain, Rule, Table, Tables};
use porttrace_user::core::model::flow::Family;

/// Where a rule stands.
pub struct Place<'a> {
    pub world: &'a World,
    pub family: Family,
    pub table: &'a str,
    /// Hooks from which the chain can be reached.
    pub hooks: Vec<&'static str>,
}

impl Place<'_> {
    /// Whether every hook of the place is one of these.
    pub fn only(&self, hooks: &[&str]) -> bool {
        self.hooks.iter().all(|hook| hooks.contains(hook))
    }
}

/// Tables and their base chains.
pub const TABLES: [(&str, &[&str]); 5] = [
    ("raw", &["PREROUTING", "OUTPUT"]),
    ("mangle", &["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"]),
    ("nat", &["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"]),
    ("filter", &["INPUT", "FORWARD", "OUTPUT"]),
    ("security", &["INPUT", "FORWARD", "OUTPUT"]),
];

/// Random tables of one family.
pub fn tables(rng: &mut Rng, world: &World, family: Family) -> Tables {
    let mut tables = Vec::new();
    for (name, hooks) in TABLES {
        let likely = match name {
            "nat" => 95,
            "filter" => 90,
            "mangle" => 70,
            "raw" => 60,
            _ => 25,
        };
        if rng.percent(likely) {
            tables.push(table(rng, world, family, name, hooks));
        }
    }
    Tables { family, legacy: false, tables }
}

fn table(rng: &mut Rng, world: &World, family: Family, name: &'static str, base: &[&'static str]) -> Table {
    let groups: &[&[&'static str]] = match name {
        "nat" => &[&["PREROUTING", "OUTPUT"], &["POSTROUTING", "INPUT"], &["POSTROUTING"], &["PREROUTING", "OUTPUT"]],
        "raw" => &[&["PREROUTING", "OUTPUT"], &["PREROUTING"]],
        "mangle" => &[
            &["PREROUTING"],
            &["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"],
            &["FORWARD", "POSTROUTING"],
        ],
        _ => &[&["INPUT", "FORWARD", "OUTPUT"], &["FORWARD"], &["INPUT", "FORWARD", "OUTPUT"]],
    };
    let users: Vec<(String, Vec<&'static str>)> = (0..rng.range(0, 5))
        .map(|number| (format!("{}-{number}", rng.pick(&["KUBE-X", "CNI-Y", "U"])), rng.choose(groups).to_vec()))
        .collect();
    let mut chains = Vec::new();
    for hook in base {
        let policy = if name != "nat" && rng.percent(4) { "DROP" } else { "ACCEPT" };
        let place = Place { world, family, table: name, hooks: vec![hook] };
        let count = rng.range(0, if name == "filter" || name == "nat" { 6 } else { 4 });
        let rules = rules(rng, &place, &users, count);
        chains.push(Chain { name: hook.to_string(), policy: Some(policy.into()), rules });
    }
    for (index, (user, hooks)) in users.iter().enumerate() {
        let place = Place { world, family, table: name, hooks: hooks.clone() };
        let count = rng.range(0, 4);
        let rules = rules(rng, &place, &users[index + 1..], count);
        chains.push(Chain { name: user.clone(), policy: None, rules });
    }
    Table { name: name.into(), chains }
}

fn rules(rng: &mut Rng, place: &Place, users: &[(String, Vec<&'static str>)], count: u32) -> Vec<Rule> {
    let callable: Vec<&str> = users
        .iter()
        .filter(|(_, hooks)| place.hooks.iter().all(|hook| hooks.contains(hook)))
        .map(|(name, _)| name.as_str())
        .collect();
    (0..count).map(|_| rule(rng, place, &callable)).collect()
}

fn rule(rng: &mut Rng, place: &Place, callable: &[&str]) -> Rule {
    let mut proto = None;
    let mut rule = Rule::default();
    let count = match rng.below(10) {
        0..=1 => 0,
        2..=6 => 1,
        7..=8 => 2,
        _ => 3,
    };
    for _ in 0..count {
        matches::add(rng, place, &mut proto, &mut rule.matches);
    }
    rule.target = if !callable.is_empty() && rng.percent(35) {
        format!("{} {}", if rng.percent(25) { "-g" } else { "-j" }, rng.pick(callable))
    } else {
        targets::target(rng, place, &mut proto, &mut rule.matches, count > 0)
    };
    if let Some(proto) = proto {
        rule.matches.insert(0, proto);
    }
    rule
}
