//! The readers of the kernel's own words: complete, in order, with the right rule numbers, in both flavours.

use porttrace_tests::lab::rules::IptablesFlavour;
use porttrace_tests::lab::topology::{HOST_PORT, NodeName, OUTSIDE_V4};
use porttrace_tests::lab::{Lab, LabOptions, Origin, Phase};
use porttrace_tests::oracle::conntrack::{ConntrackEvents, Happened};
use porttrace_tests::oracle::trace::{Decided, Place, RuleTrace, Step, TraceFilter};
use porttrace_tests::peer::{Connect, Outcome, Transport};
use porttrace_tests::privilege::may_run;
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(5);

/// Chains of a save file and their rules.
fn rules_of(save: &str) -> BTreeMap<(String, String), Vec<String>> {
    let (mut table, mut rules) = (String::new(), BTreeMap::<_, Vec<_>>::new());
    for line in save.lines() {
        if let Some(name) = line.strip_prefix('*') {
            name.clone_into(&mut table);
        } else if let Some(chain) = line.strip_prefix("-A ").and_then(|rest| rest.split(' ').next()) {
            rules.entry((table.clone(), chain.to_owned())).or_default().push(line.to_owned());
        }
    }
    rules
}

/// The text of the rule that a step names.
fn text_of(rules: &BTreeMap<(String, String), Vec<String>>, step: &Step) -> String {
    let Place::Rule(number) = step.place else { panic!("{step} is not a rule") };
    rules[&(step.table.clone(), step.chain.clone())][number as usize - 1].clone()
}

fn trace_names_the_dnat(flavour: IptablesFlavour) {
    let lab = Lab::up(LabOptions { flavour, ..LabOptions::default() }).unwrap();
    let node = lab.node(NodeName::Worker3);
    for (proto, transport) in [(Proto::Tcp, Transport::Tcp), (Proto::Udp, Transport::Udp)] {
        let mut trace = RuleTrace::start(node, &lab.tools, flavour, TraceFilter::first_to(proto, HOST_PORT)).unwrap();
        for (v6, tool) in [(false, "iptables"), (true, "ip6tables")] {
            let rules = rules_of(&lab.tools.save(node, tool).unwrap());
            for origin in [Origin::OtherNode, Origin::Node, Origin::Pod] {
                let answer = lab.connect_to_node(origin, transport, v6, HOST_PORT).unwrap();
                let steps = trace.steps_from(proto, answer.local).unwrap();
                let listing: Vec<String> = steps.iter().map(Step::to_string).collect();
                let in_nat: Vec<&Step> =
                    steps.iter().filter(|step| step.table == "nat" && matches!(step.place, Place::Rule(_))).collect();
                let lost = steps.iter().filter(|step| matches!(step.place, Place::Handle(_)));
                assert_eq!(lost.count(), 0, "every step is a known rule, policy or chain end: {listing:#?}");
                let first = text_of(&rules, in_nat[0]);
                assert!(first.ends_with("-j KUBE-SERVICES"), "{first} {listing:#?}");
                let dnat = in_nat.iter().find(|step| {
                    step.chain.starts_with("CNI-DN-") && {
                        let text = text_of(&rules, step);
                        text.contains("-j DNAT") && text.contains(&format!("-p {proto}"))
                    }
                });
                let dnat = dnat.unwrap_or_else(|| panic!("no DNAT in {listing:#?}"));
                assert_eq!(dnat.tuple.destination(), SocketAddr::new(origin.target(v6), HOST_PORT));
                if flavour == IptablesFlavour::Nft {
                    assert_eq!(dnat.decided, Some(Decided::Accept));
                }
                let last = steps.last().unwrap();
                // MASQUERADE ends the hook; without it the policy does.
                let end = if origin == Origin::Pod {
                    ("CNI-HOSTPORT-MASQ", Place::Rule(1))
                } else {
                    ("POSTROUTING", Place::Policy)
                };
                assert_eq!((last.chain.as_str(), last.place), end, "{listing:#?}");
                let pod: IpAddr =
                    if v6 { NodeName::Worker3.pod_v6(9).into() } else { NodeName::Worker3.pod_v4(9).into() };
                assert_eq!(last.tuple.destination(), SocketAddr::new(pod, Phase::Broken.container_port()));
                let masked = in_nat.iter().any(|step| step.chain == "CNI-HOSTPORT-SETMARK");
                assert_eq!(masked, origin == Origin::Pod, "{listing:#?}");
            }
        }
    }
}

#[test]
fn nft_traces_name_the_rules() {
    if may_run("the rule trace") {
        trace_names_the_dnat(IptablesFlavour::Nft);
    }
}

#[test]
fn legacy_traces_name_the_rules() {
    if may_run("the rule trace") {
        trace_names_the_dnat(IptablesFlavour::Legacy);
    }
}

#[test]
fn traces_are_complete_under_load() {
    if !may_run("the rule trace") {
        return;
    }
    let lab = Lab::up(LabOptions { phase: Phase::Fixed, ..LabOptions::default() }).unwrap();
    let node = lab.node(NodeName::Worker3);
    let filter = TraceFilter::first_to(Proto::Udp, HOST_PORT);
    let mut trace = RuleTrace::start(node, &lab.tools, IptablesFlavour::Nft, filter).unwrap();
    let to = SocketAddr::new(Origin::Outside.target(false), HOST_PORT);
    for number in 0..500 {
        // A port of its own each: a datagram of a known connection does not consult the nat table.
        let bind = Some(SocketAddr::new(OUTSIDE_V4.into(), 20_000 + number));
        let answer = lab.connect(Origin::Outside, &Connect { bind, ..Connect::new(Transport::Udp, to) }).unwrap();
        assert_eq!(answer.result, Outcome::Ok);
    }
    let ends = |step: &&Step| step.chain == "POSTROUTING" && step.place == Place::Policy && step.table == "nat";
    assert_eq!(trace.steps().unwrap().iter().filter(ends).count(), 500);
    trace.clear().unwrap();
    assert!(trace.steps().unwrap().is_empty());
}

#[test]
fn conntrack_tells_both_tuples() {
    if !may_run("the conntrack reader") {
        return;
    }
    let lab = Lab::up(LabOptions::default()).unwrap();
    let events = ConntrackEvents::start(lab.node(NodeName::Worker3)).unwrap();
    for (proto, transport) in [(Proto::Tcp, Transport::Tcp), (Proto::Udp, Transport::Udp)] {
        for v6 in [false, true] {
            let answer = lab.connect_to_node(Origin::Pod, transport, v6, HOST_PORT).unwrap();
            let entry = events.new_entry(Tuple::new(proto, answer.local, answer.to), WAIT).unwrap();
            let (pod, gateway): (IpAddr, IpAddr) = if v6 {
                (NodeName::Worker3.pod_v6(9).into(), NodeName::Worker3.pod_v6(1).into())
            } else {
                (NodeName::Worker3.pod_v4(9).into(), NodeName::Worker3.pod_v4(1).into())
            };
            assert_eq!(entry.reply.source(), SocketAddr::new(pod, 8081));
            assert_eq!(entry.reply.dst, gateway, "masqueraded");
            assert!(entry.unreplied && !entry.assured);
            assert_eq!(entry.state, if proto == Proto::Tcp { "SYN_SENT" } else { "" });
            if proto == Proto::Tcp {
                let gone = |gone: &_| matches!(gone, porttrace_tests::oracle::conntrack::Entry { happened: Happened::Destroy, id, .. } if *id == entry.id);
                assert!(events.wait_for(WAIT, gone).is_some(), "the kernel deletes an entry on RST");
            }
        }
    }
    assert!(events.snapshot().len() >= 6);
}
