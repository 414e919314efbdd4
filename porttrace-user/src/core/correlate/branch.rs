//! Which of the ways that the rules allow was taken, and what they leave open.

use super::flow::{Flow, Way};
use super::route::Taken;
use crate::core::model::trace::{Branch, Trace, Verdict};
use porttrace_ebpf::Kind;

/// The branch that did what conntrack says was done (where several did, the one whose route was taken); without conntrack the
/// only branch, or the one that fits a sighting.
pub(super) fn choose<'t>(flow: &Flow, trace: &'t Trace, taken: Option<&Taken>) -> Option<&'t Branch> {
    let is_known = |branch: &Branch| !matches!(branch.verdict, Verdict::Unknown { .. });
    let routed = |branch: &Branch| taken.is_some_and(|taken| taken.ends(branch));
    let by_probability = |a: &&Branch, b: &&Branch| {
        let places = (is_known(a), routed(a)).cmp(&(is_known(b), routed(b)));
        places.then(a.probability.as_f64().total_cmp(&b.probability.as_f64()))
    };
    if let Some(reply) = flow.reply {
        let led = || trace.branches.iter().filter(move |branch| branch.reply_tuple.source() == reply.source());
        // MASQUERADE may take another source port (nf_nat_core.c, get_unique_tuple), so ports decide only for DNAT.
        let fits = led().filter(|branch| branch.reply_tuple.dst == reply.dst).max_by(by_probability);
        // Rules that are not followed gave it another source than none.
        let keeps_source = |branch: &&Branch| branch.reply_tuple.dst == flow.original.src && is_known(branch);
        let but_for_source = || led().filter(keeps_source).filter(|_| trace.unfollowed.may_snat).max_by(by_probability);
        return fits.or_else(but_for_source);
    }
    if let [only] = trace.branches.as_slice() {
        return Some(only);
    }
    let left = flow.seen(Way::Request).filter(|seen| seen.event.kind == Kind::TcEgress).last()?.event.packet?;
    trace.branches.iter().filter(|branch| branch.final_tuple.destination() == left.destination()).max_by(by_probability)
}

/// Why something may be done to the packet that no branch has.
pub(super) fn left_open(trace: &Trace) -> Option<String> {
    trace.branches.iter().find_map(|branch| match &branch.verdict {
        Verdict::Unknown { because, .. } => Some(because.clone()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::story::{Certainty, Line, Story, What, tell};
    use super::super::tests::{CLIENT, FROM_POD, MS, TO_POD, interfaces, refused, reported, trace, tuple};
    use super::*;
    use crate::core::model::trace::Unfollowed;

    /// What is told of the refused connection to the pod where native nftables rules are not followed.
    fn told_beside_native(final_tuple: &str, given: &str, (may_dnat, may_snat): (bool, bool)) -> Story {
        let mut events = refused();
        for entry in events.iter_mut().filter_map(|event| event.conntrack.as_mut()) {
            entry.reply = if entry.reply == tuple(FROM_POD) { tuple(given) } else { entry.reply };
        }
        let mut trace = trace(final_tuple);
        if may_dnat {
            let verdict = Verdict::Unknown { because: "ip kube-proxy may send it elsewhere".into(), by: None };
            trace.branches.push(Branch { verdict, ..trace.branches[0].clone() });
        }
        trace.unfollowed = Unfollowed { tables: vec!["ip kube-proxy".into()], may_snat };
        tell(&reported(events, 200 * MS), Some(&trace), &interfaces(), false)
    }

    #[test]
    fn what_rules_did_that_are_not_followed_contradicts_nothing() {
        let seen = |story: &Story| -> Vec<Certainty> {
            let rewrites = story.lines.iter().filter(|line| matches!(line.what, What::Rewrite { .. }));
            rewrites.map(|line| line.certainty).collect()
        };
        let noted = |line: &Line| matches!(&line.what, What::Note { text } if text.contains("ip kube-proxy"));
        let elsewhere = told_beside_native(CLIENT, FROM_POD, (true, false));
        assert_eq!((elsewhere.left_open, elsewhere.disagrees, elsewhere.branch.is_none()), (true, false, true));
        assert!(elsewhere.lines.iter().any(noted), "{:?}", elsewhere.lines);
        assert_eq!(seen(&elsewhere), [Certainty::Observed], "the rewrite was seen, whoever made it");
        // The same destination as foreseen, and another source.
        const AS_NODE: &str = "10.244.1.9:8081 → 172.18.0.3:60218";
        let masqueraded = told_beside_native(TO_POD, AS_NODE, (true, true));
        assert_eq!((masqueraded.left_open, masqueraded.disagrees, masqueraded.branch.is_some()), (true, false, true));
        assert_eq!(seen(&masqueraded).last(), Some(&Certainty::Observed), "{:?}", masqueraded.lines);
        // As foreseen: the other way is not meant.
        let plain = told_beside_native(TO_POD, FROM_POD, (true, true));
        let verdict = plain.branch.as_ref().map(|branch| &branch.verdict);
        assert!(!plain.left_open && matches!(verdict, Some(Verdict::Delivered { .. })), "{verdict:?}");
        // Nothing that could do so is there.
        for (to, given) in [(CLIENT, FROM_POD), (TO_POD, AS_NODE)] {
            let story = told_beside_native(to, given, (false, false));
            assert!(story.disagrees && !story.left_open, "{to} {given}");
        }
    }
}
