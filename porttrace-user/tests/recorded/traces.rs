//! The kernel's own rule traces, and the same lines made from a branch.

use porttrace_user::core::model::rules::conditions;
use porttrace_user::core::model::trace::{Action, Branch, Flavour, Hop, RuleRef};
use serde::Deserialize;

/// One line of TRACE as the kernel's log prints it: `table:chain:rule|policy|return:number`.
#[derive(Deserialize)]
pub struct LegacyStep {
    pub rule: String,
}

/// `nft monitor trace` without its packet lines, as `table chain verdict`. The tables raw and rigtrace held only the rule that
/// traces.
pub fn nft_steps(lines: &[String]) -> Vec<String> {
    let step = |line: &String| {
        let mut words = line.split_whitespace();
        let (_, table, chain, kind) = (words.next()?, words.next()?, words.next()?, words.next()?);
        let verdict = match kind {
            "policy" => "policy accept".to_owned(),
            "rule" => line.rsplit_once("(verdict ")?.1.trim_end_matches(')').to_owned(),
            _ => return None,
        };
        (!matches!(table, "raw" | "rigtrace")).then(|| format!("{table} {} {}", pod(chain), pod(&verdict)))
    };
    lines.iter().filter_map(step).collect()
}

/// A branch in the words of [`nft_steps`]. An empty base chain of iptables-nft leaves no line in the trace; a packet that comes
/// back by lo gets another trace ID there (`nft_trace_init` hashes `skb_iif`), so that the recorded trace ends where it left.
pub fn branch_steps(branch: &Branch, empty: &dyn Fn(&RuleRef) -> bool) -> Vec<String> {
    let first_way = branch.hops.iter().take_while(|hop| !matches!(hop, Hop::Transmit { .. }));
    let mut steps: Vec<(&RuleRef, String)> = Vec::new();
    for (rule, step) in first_way.filter_map(|hop| step(hop, empty)) {
        // A native rule may do several things, of which the kernel tells the last.
        match steps.last_mut() {
            Some((last, of_last)) if *last == rule && rule.flavour == Flavour::Nftables => *of_last = step,
            _ => steps.push((rule, step)),
        }
    }
    steps.into_iter().map(|(_, step)| step).collect()
}

/// A rule, and the line that the kernel would trace it by.
fn step<'h>(hop: &'h Hop, empty: &dyn Fn(&RuleRef) -> bool) -> Option<(&'h RuleRef, String)> {
    let Hop::Rule { rule, action, .. } = hop else { return None };
    if rule.number().is_none() && empty(rule) {
        return None;
    }
    let verdict = match action {
        _ if rule.number().is_none() => "policy accept".to_owned(),
        Action::Jump { chain } => format!("jump {}", chain.chain),
        Action::Goto { chain } => format!("goto {}", chain.chain),
        Action::Return => "return".into(),
        Action::Drop | Action::Reject { .. } => "drop".into(),
        Action::Accept | Action::Dnat { .. } | Action::Snat { .. } | Action::Masquerade => "accept".into(),
        _ => "continue".into(),
    };
    // Without the family.
    let table = rule.table.rsplit(' ').next().unwrap_or_default();
    Some((rule, format!("{table} {} {}", pod(&rule.chain), pod(&verdict))))
}

/// Texts of the rules that `xtables-monitor --trace` printed, comments apart (they carry container IDs).
pub fn xt_texts(lines: &[String]) -> Vec<String> {
    let rules = lines.iter().filter(|line| line.contains(":rule:") && !line.contains(" raw:"));
    rules.filter_map(|line| line.find("-A ").map(|at| plain(&line[at..]))).collect()
}

/// Texts of the rules of a branch.
pub fn branch_texts(branch: &Branch) -> Vec<String> {
    let text = |hop: &Hop| match hop {
        Hop::Rule { rule, .. } if rule.number().is_some() => Some(plain(&rule.text())),
        _ => None,
    };
    branch.hops.iter().filter_map(text).collect()
}

/// Rules by number as the legacy trace prints them; ends of user chains are not rules.
pub fn legacy_steps(lines: &[LegacyStep]) -> Vec<String> {
    let kept = lines.iter().filter(|step| !step.rule.starts_with("raw:") && !step.rule.contains(":return:"));
    kept.map(|step| match step.rule.split_once(":policy:") {
        Some((base, _)) => format!("{base}:policy"),
        None => service(&pod(&step.rule)),
    })
    .collect()
}

/// A branch in the words of [`legacy_steps`]. A RETURN without conditions looks like the end of its chain there.
pub fn branch_numbers(branch: &Branch) -> Vec<String> {
    let step = |hop: &Hop| {
        let Hop::Rule { rule, action, .. } = hop else { return None };
        match rule.number() {
            _ if *action == Action::Return && conditions(&rule.text()).is_empty() => None,
            Some(number) => Some(service(&format!("{}:{}:rule:{number}", rule.table, pod(&rule.chain)))),
            None => Some(format!("{}:{}:policy", rule.table, rule.chain)),
        }
    };
    branch.hops.iter().filter_map(step).collect()
}

/// portmap's chains are named after containers, which were others when the traces were taken.
fn pod(text: &str) -> String {
    match text.find("CNI-DN-") {
        Some(at) => {
            let rest = text[at + 7..].trim_start_matches(|c: char| c.is_ascii_hexdigit());
            format!("{}CNI-DN-*{rest}", &text[..at])
        }
        None => text.into(),
    }
}

/// kube-proxy writes its Services in another order each time it starts, and it had been started anew for the traces: in the
/// chains that list Services only the chain counts, and the next step shows which Service it was.
fn service(step: &str) -> String {
    match step.strip_prefix("nat:KUBE-SERVICES:rule:").or(step.strip_prefix("nat:KUBE-NODEPORTS:rule:")) {
        Some(number) => step.replace(number, "*"),
        None => step.into(),
    }
}

/// A rule's text without its comment and with one space between words.
fn plain(text: &str) -> String {
    let mut kept = Vec::new();
    let mut quoted = false;
    for word in text.split_whitespace() {
        let opens = word.starts_with('"');
        if opens || quoted {
            quoted = !(word.ends_with('"') && !word.ends_with("\\\"") && (quoted || word.len() > 1));
        } else if !matches!(word, "-m" | "--comment" | "comment") {
            kept.push(pod(word));
        }
    }
    kept.join(" ")
}
