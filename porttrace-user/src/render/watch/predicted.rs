//! What the rules say of a connection's end, in words.

use super::Report;
use super::words::{comment_of, rule_name};
use crate::core::model::trace::{DropReason, Verdict};

/// Its finding says that not the rules decide here.
pub fn is_beyond_rules(report: &Report) -> bool {
    report.finding.as_ref().is_some_and(|finding| finding.id == "kube-proxy-replaced")
}

/// How a connection ends by the rules.
pub fn ends(predicted: &Verdict) -> String {
    match predicted {
        Verdict::Dropped { by: Some(rule), .. } => format!("{} drops it", rule_name(rule)),
        Verdict::Dropped { reason, by: None } => format!("it is dropped ({})", drop_words(reason)),
        Verdict::Rejected { by: Some(rule), .. } => format!("{} rejects it", rule_name(rule)),
        Verdict::Rejected { with, by: None } => format!("this node refuses it ({})", refusal_words(with)),
        Verdict::Delivered { to, .. } => {
            format!("nothing rewrites it and nothing on this node listens on {}", to.destination())
        }
        Verdict::Forwarded { interface, .. } => format!("it leaves by {interface}"),
        Verdict::Unknown { because, .. } => format!("nothing can be said ({because})"),
    }
}

/// What the rules say about a packet that vanished.
pub fn expectation(report: &Report) -> String {
    match predicted_end(report) {
        Some(Verdict::Dropped { by: Some(rule), .. }) => {
            format!("; {}{} drops it", rule_name(rule), comment_of(report, rule))
        }
        Some(Verdict::Rejected { by: Some(rule), .. }) => {
            format!("; {}{} rejects it", rule_name(rule), comment_of(report, rule))
        }
        Some(end @ (Verdict::Dropped { by: None, .. } | Verdict::Rejected { by: None, .. })) => refused_by_kernel(end),
        Some(Verdict::Delivered { listening: Some(false), to }) => {
            format!("; no rule rewrites it and nothing listens on {}", to.destination())
        }
        Some(Verdict::Unknown { because, .. }) => format!("; the rules leave it open: {because}"),
        _ => String::new(),
    }
}

/// Why the kernel itself lets a packet go no further, without any rule; nothing for other ends.
pub fn refused_by_kernel(end: &Verdict) -> String {
    match end {
        Verdict::Dropped { reason, by: None } => format!("; predicted: {}", drop_words(reason)),
        Verdict::Rejected { with, by: None } => format!("; predicted: {}", refusal_words(with)),
        _ => String::new(),
    }
}

/// A reason for a predicted drop, in words.
pub fn drop_words(reason: &DropReason) -> String {
    use DropReason as R;
    match reason {
        R::Rule => "a rule drops it".to_owned(),
        R::NoRoute => "no route to its destination".to_owned(),
        R::Blackhole => "a blackhole route".to_owned(),
        R::RpFilter => "rp_filter drops it: the way back leads elsewhere".to_owned(),
        R::Martian => "a martian address (127/8 needs route_localnet)".to_owned(),
        R::ForwardingDisabled => "this node does not forward (ip_forward is 0)".to_owned(),
        R::NoAddress => "MASQUERADE finds no address on the output interface".to_owned(),
        R::Ttl => "its TTL is used up".to_owned(),
        R::TooBig => "it is too big for the next link".to_owned(),
        R::Other { text } => text.clone(),
    }
}

/// Why the kernel itself is predicted to refuse a packet with this message, in words.
fn refusal_words(with: &str) -> &str {
    match with {
        "icmp-net-unreachable" | "icmp6-no-route" => "no route to its destination",
        "icmp-host-unreachable" => "an unreachable route",
        "icmp-admin-prohibited" | "icmp6-adm-prohibited" => "a prohibit route",
        _ => with,
    }
}

/// How it ends in the branch that fits what was seen.
pub fn predicted_end(report: &Report) -> Option<&Verdict> {
    report.story.branch.as_ref().map(|branch| &branch.verdict)
}
