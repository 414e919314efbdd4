//! Where native nftables rules have a say: their base chains. What the rules say is not followed.

use super::notes::Notes;
use crate::core::model::state::NativeBase;
use crate::core::model::trace::Hook;
use serde_json::Value;
use std::collections::BTreeSet;

const DNAT: &str = "dnat";
const NO_DNAT: &str = "no-dnat";

/// Base chains as [`write`] has them, one a line.
pub fn bases(text: &str, notes: &mut Notes) -> Vec<NativeBase> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            [family, table, chain, kind, hook, priority, nat @ (DNAT | NO_DNAT)] => {
                let base = base([family, table, chain, kind, hook], priority.parse().ok());
                found.extend(base.map(|base| NativeBase { has_dnat: *nat == DNAT, ..base }));
            }
            _ => notes.add(
                number,
                "not a base chain: family, table, chain, type, hook, priority and whether the table has DNAT are expected",
            ),
        }
    }
    found
}

/// The inverse of [`bases`]; names hold no blanks.
pub fn write(bases: &[NativeBase]) -> String {
    let line = |base: &NativeBase| {
        let NativeBase { family, table, chain, kind, hook, priority, has_dnat } = base;
        let nat = if *has_dnat { DNAT } else { NO_DNAT };
        format!("{family} {table} {chain} {kind} {} {priority} {nat}\n", hook.name().to_lowercase())
    };
    bases.iter().map(line).collect()
}

/// Base chains of native rules in `nft -j list ruleset` (libnftables-json).
///
/// # Errors
/// When it is no JSON.
pub fn bases_of_ruleset(text: &str) -> Result<Vec<NativeBase>, serde_json::Error> {
    let ruleset: Value = serde_json::from_str(text)?;
    let items = || ruleset.get("nftables").and_then(Value::as_array).into_iter().flatten();
    let table = |of: &Value| Some((of.get("family")?.as_str()?.to_owned(), of.get("table")?.as_str()?.to_owned()));
    let sends = |rule: &Value| {
        let mut expressions = rule.get("expr").and_then(Value::as_array).into_iter().flatten();
        expressions.any(|expression| expression.get("dnat").is_some() || expression.get("redirect").is_some())
    };
    let rules = items().filter_map(|item| item.get("rule")).filter(|rule| sends(rule));
    let with_dnat: BTreeSet<(String, String)> = rules.filter_map(table).collect();
    let chains = items().filter_map(|item| item.get("chain")).filter_map(|chain| {
        let text = |key: &str| chain.get(key).and_then(Value::as_str);
        let priority = chain.get("prio").and_then(Value::as_i64).and_then(|priority| i32::try_from(priority).ok());
        let base = base([text("family")?, text("table")?, text("name")?, text("type")?, text("hook")?], priority)?;
        Some(NativeBase { has_dnat: with_dnat.contains(&table(chain)?), ..base })
    });
    Ok(chains.filter(|base| !is_iptables(&base.family, &base.table)).collect())
}

/// Whether iptables-nft keeps its rules in a table of this name.
pub fn is_iptables(family: &str, table: &str) -> bool {
    matches!(family, "ip" | "ip6") && matches!(table, "raw" | "mangle" | "nat" | "filter" | "security")
}

/// Family, table, chain, type and hook, of a table without DNAT; `None` for those that IP packets on their way through the node do
/// not meet.
pub fn base([family, table, chain, kind, hook]: [&str; 5], priority: Option<i32>) -> Option<NativeBase> {
    let hook = self::hook(hook)?;
    let is_ip = matches!(family, "ip" | "ip6" | "inet");
    let [family, table, chain, kind] = [family, table, chain, kind].map(str::to_owned);
    is_ip.then_some(NativeBase { family, table, chain, kind, hook, priority: priority?, has_dnat: false })
}

/// One of the hooks that IP packets on their way through the node meet.
pub fn hook(name: &str) -> Option<Hook> {
    Some(match name {
        "prerouting" => Hook::Prerouting,
        "input" => Hook::Input,
        "forward" => Hook::Forward,
        "output" => Hook::Output,
        "postrouting" => Hook::Postrouting,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULESET: &str = r#"{"nftables": [{"metainfo": {"json_schema_version": 1}},
        {"table": {"family": "ip", "name": "kube-proxy", "handle": 1}},
        {"chain": {"family": "ip", "table": "kube-proxy", "name": "services", "handle": 2}},
        {"chain": {"family": "ip", "table": "kube-proxy", "name": "nat-prerouting", "handle": 3, "type": "nat",
                   "hook": "prerouting", "prio": -100, "policy": "accept"}},
        {"rule": {"family": "ip", "table": "kube-proxy", "chain": "services", "handle": 6,
                  "expr": [{"dnat": {"addr": "10.244.1.9", "port": 80}}]}},
        {"chain": {"family": "bridge", "table": "b", "name": "in", "handle": 4, "type": "filter", "hook": "input", "prio": 0}},
        {"chain": {"family": "ip", "table": "nat", "name": "PREROUTING", "handle": 5, "type": "nat", "hook": "prerouting",
                   "prio": -100}}]}"#;

    #[test]
    fn base_chains_are_read_from_what_nft_prints_and_written_so_that_they_are_read_again() {
        let found = bases_of_ruleset(RULESET).expect("JSON");
        let [base] = found.as_slice() else { panic!("{found:?}") };
        assert!(base.is_dnat() && base.meets(crate::core::model::flow::Family::V4) && base.priority == -100);
        let text = write(&found);
        assert_eq!(text, "ip kube-proxy nat-prerouting nat prerouting -100 dnat\n");
        let mut notes = Notes::new("nft-hooks.txt");
        assert_eq!(bases(&text, &mut notes), found);
        assert!(bases("ip kube-proxy", &mut notes).is_empty());
        assert_eq!(notes.finish().len(), 1, "what is not understood is said");
    }
}
