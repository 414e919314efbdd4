//! Makes a failing scenario small: as long as the disagreement persists, packets, rules, matches, sysctls and routes go.

use super::scenario::{Scenario, Tables};

/// How many times the kernel is asked at most.
const TRIES: usize = 220;

/// The smallest scenario found for which `fails` still holds. `probe` is the id that disagreed.
pub fn shrink(scenario: &Scenario, probe: u16, mut fails: impl FnMut(&Scenario) -> bool) -> Scenario {
    let mut best = scenario.clone();
    let mut tries = 0;
    let mut attempt = |best: &mut Scenario, change: &dyn Fn(&mut Scenario)| {
        let mut smaller = best.clone();
        change(&mut smaller);
        tries += 1;
        let better = tries <= TRIES && fails(&smaller);
        if better {
            *best = smaller;
        }
        better
    };
    attempt(&mut best, &|smaller| smaller.probes.retain(|one| one.id == probe));
    attempt(&mut best, &|smaller| smaller.later = None);
    for family in [0, 1] {
        attempt(&mut best, &|smaller| {
            for tables in sets(smaller).filter(|tables| tables.family as usize == family) {
                tables.tables.clear();
            }
        });
    }
    let mut chunk = rules(&mut best.clone()).max(1);
    while chunk > 0 {
        let mut start = 0;
        while start < rules(&mut best.clone()) {
            if !attempt(&mut best, &|smaller| remove_rules(smaller, start, chunk)) {
                start += chunk;
            }
        }
        chunk /= 2;
    }
    attempt(&mut best, &remove_idle_chains);
    attempt(&mut best, &|smaller| smaller.native.clear());
    for table in (0..best.native.len()).rev() {
        attempt(&mut best, &|smaller| drop(smaller.native.remove(table)));
    }
    for index in (0..native_rules(&mut best).len()).rev() {
        attempt(&mut best, &|smaller| drop(remove_native_rule(smaller, index)));
    }
    for index in (0..matches(&mut best.clone())).rev() {
        attempt(&mut best, &|smaller| remove_match(smaller, index));
    }
    for index in (0..best.node.sysctls.len()).rev() {
        attempt(&mut best, &|smaller| drop(smaller.node.sysctls.remove(index)));
    }
    for index in (0..best.node.ip.len()).rev() {
        attempt(&mut best, &|smaller| drop(smaller.node.ip.remove(index)));
    }
    best
}

fn sets(scenario: &mut Scenario) -> impl Iterator<Item = &mut Tables> {
    scenario.rules.iter_mut().chain(scenario.later.iter_mut().flatten())
}

fn each_rule(scenario: &mut Scenario) -> impl Iterator<Item = &mut super::scenario::Rule> {
    sets(scenario)
        .flat_map(|tables| &mut tables.tables)
        .flat_map(|table| &mut table.chains)
        .flat_map(|chain| &mut chain.rules)
}

/// The rules of each native chain.
fn native_rules(scenario: &mut Scenario) -> Vec<(usize, usize, usize)> {
    let chains =
        scenario.native.iter().enumerate().flat_map(|(table, of)| (0..of.chains.len()).map(move |at| (table, at)));
    let count = |(table, chain): (usize, usize)| scenario.native[table].chains[chain].rules.len();
    chains.flat_map(|(table, chain)| (0..count((table, chain))).map(move |rule| (table, chain, rule))).collect()
}

fn remove_native_rule(scenario: &mut Scenario, index: usize) -> Option<String> {
    let (table, chain, rule) = *native_rules(scenario).get(index)?;
    Some(scenario.native[table].chains[chain].rules.remove(rule))
}

fn rules(scenario: &mut Scenario) -> usize {
    each_rule(scenario).count()
}

fn remove_rules(scenario: &mut Scenario, start: usize, count: usize) {
    let mut at = 0;
    for chain in sets(scenario).flat_map(|tables| &mut tables.tables).flat_map(|table| &mut table.chains) {
        chain.rules.retain(|_| {
            at += 1;
            at <= start || at > start + count
        });
    }
}

/// User chains without rules that nobody calls, and tables that do nothing.
fn remove_idle_chains(scenario: &mut Scenario) {
    for tables in sets(scenario) {
        for table in &mut tables.tables {
            let called: Vec<String> =
                table.chains.iter().flat_map(|chain| &chain.rules).map(|rule| format!("{} ", rule.target)).collect();
            table.chains.retain(|chain| {
                chain.policy.is_some() || called.iter().any(|target| target.contains(&format!(" {} ", chain.name)))
            });
        }
        tables.tables.retain(|table| {
            table.chains.iter().any(|chain| !chain.rules.is_empty() || chain.policy.as_deref() == Some("DROP"))
        });
    }
}

fn matches(scenario: &mut Scenario) -> usize {
    each_rule(scenario).map(|rule| rule.matches.len()).sum()
}

fn remove_match(scenario: &mut Scenario, index: usize) {
    let mut at = 0;
    for rule in each_rule(scenario) {
        rule.matches.retain(|_| {
            at += 1;
            at != index + 1
        });
    }
}
