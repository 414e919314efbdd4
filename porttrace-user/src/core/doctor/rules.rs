//! The rules: which flavours hold any, and whether the tools to read them are there.

use super::facts::{Facts, RuleSet, Rules};
use super::{Check, Group, Status};
use crate::core::quantity::count;

pub fn checks(facts: &Facts) -> Vec<Check> {
    let rules = &facts.rules;
    let mut checks = vec![iptables(rules, facts.rights.missing.is_empty())];
    checks.extend(mixed(rules));
    if facts.rights.missing.is_empty() {
        checks.extend(unread(rules));
    }
    checks.push(tools(rules));
    checks.extend(native(rules));
    checks
}

fn iptables(rules: &Rules, may_look: bool) -> Check {
    let check = |status, text| Check::new(Group::Rules, "iptables", status, text);
    if rules.sets.is_empty() {
        let unread = rules.unread.iter().any(|line| !is_about_native(line));
        return match (may_look, !unread) {
            (true, true) => check(Status::Note, "no iptables rules on this node".to_owned())
                .costs("nothing is predicted; what is seen holds all the same"),
            (false, _) => check(Status::Unknown, "rules stay hidden from who lacks CAP_NET_ADMIN".to_owned()),
            (true, false) => check(Status::Unknown, "no iptables rules could be read".to_owned()),
        };
    }
    let sets: Vec<String> = rules.sets.iter().map(words).collect();
    check(Status::Good, sets.join("; "))
}

/// Native tables are a check of their own.
fn is_about_native(line: &str) -> bool {
    line.contains("native rules")
}

fn words(set: &RuleSet) -> String {
    let mut text = format!("iptables-{} IPv{}: {} rules", set.flavour, set.family, set.rules);
    if set.services > 0 {
        text += &format!(", chains of {}", count(set.services, "Service"));
    }
    if set.host_ports > 0 {
        text += &format!(", of {}", count(set.host_ports, "hostPort"));
    }
    text
}

/// Both flavours act, each at its own priority; that is confusing, and followed.
fn mixed(rules: &Rules) -> Option<Check> {
    let has = |flavour: &str| rules.sets.iter().any(|set| set.flavour == flavour);
    (has("nft") && has("legacy")).then(|| {
        Check::new(
            Group::Rules,
            "mixed",
            Status::Note,
            "both iptables flavours hold rules, and both act: iptables -L shows only one of them",
        )
    })
}

fn unread(rules: &Rules) -> Vec<Check> {
    let lines = rules.unread.iter().filter(|line| !is_about_native(line));
    lines
        .map(|line| {
            Check::new(Group::Rules, "unread", Status::Warning, line.clone())
                .costs("packets are followed as if these rules did not exist")
                .advice(if line.contains("not installed") || line.contains("neither ") {
                    "install the iptables package of that flavour (iptables-save and ip6tables-save are used)"
                } else {
                    "run it with sudo on the node itself"
                })
        })
        .collect()
}

fn tools(rules: &Rules) -> Check {
    let check = |status, text| Check::new(Group::Rules, "tools", status, text);
    let families = ["iptables", "ip6tables"];
    let can_save = |family: &str, flavour: &str| {
        rules.tools.contains_key(&format!("{family}-{flavour}-save"))
            || rules
                .tools
                .get(&format!("{family}-save"))
                .and_then(Option::as_deref)
                .is_some_and(|version| version.contains("nf_tables") == (flavour == "nft"))
    };
    let missing: Vec<String> = families
        .iter()
        .flat_map(|family| ["nft", "legacy"].map(|flavour| (family, flavour)))
        .filter(|(family, flavour)| !can_save(family, flavour))
        .map(|(family, flavour)| format!("{family}-{flavour}-save"))
        .collect();
    let version = ["iptables-save", "iptables-nft-save", "iptables-legacy-save"].iter();
    let version = version.filter_map(|name| rules.tools.get(*name)).flatten().next().cloned();
    let present = match version {
        Some(version) if missing.is_empty() => format!("all save tools are there ({version})"),
        Some(version) => version,
        None => "none of the iptables-save tools is there".to_owned(),
    };
    if missing.is_empty() {
        return check(Status::Good, present);
    }
    let all = missing.len() == 4;
    let text = if all { present } else { format!("{present}; not there: {}", missing.join(", ")) };
    // What is needed and missing is told by `unread`; this is for the day when rules of that flavour appear.
    check(if all { Status::Warning } else { Status::Note }, text)
        .costs("rules of these flavours could not be read, should there be any")
        .advice("install the iptables package")
}

fn native(rules: &Rules) -> Option<Check> {
    if rules.native.is_empty() {
        return None;
    }
    let text = format!("native nftables tables: {}", rules.native.join(", "));
    let check = |status| Check::new(Group::Rules, "nftables", status, text);
    Some(if rules.tools.contains_key("nft") {
        check(Status::Good)
    } else {
        check(Status::Warning)
            .costs("they cannot be read: what they rewrite or drop is seen, but not predicted")
            .advice("install nft; observed NAT and verdicts still hold")
    })
}
