//! Connections as the probe reports them, and what becomes of them.

use super::flow::{ACK, FIN, RST, SYN};
use super::judge::{Outcome, Reached, Refuser, judge};
use super::story::{Certainty, What, tell};
use super::*;
use crate::core::model::event::{Conntrack, RouteTaken};
use crate::core::model::interfaces::Interfaces;
use crate::core::model::name::{Name, name};
use crate::core::model::trace::{Branch, Decisions, Fraction, Hop, Packet, Route, RouteKind, Trace, Verdict};

pub(super) const ETH0: u32 = 2;
const VETH: u32 = 7;
pub(super) const MS: u64 = 1_000_000;

pub(super) fn tuple(text: &str) -> Tuple {
    let (src, dst) = text.split_once(" → ").expect("a tuple has an arrow");
    Tuple::new(Proto::Tcp, src.parse().expect("source"), dst.parse().expect("destination"))
}

pub(super) fn event(time_ns: u64, kind: Kind, ifindex: u32, packet: &str, l4_flags: u8) -> Event {
    Event {
        time_ns,
        kind,
        packet: Some(tuple(packet)),
        conntrack: None,
        is_reply: false,
        icmp_sender: None,
        netns: 1,
        ifindex,
        out_ifindex: 0,
        route: None,
        hook: 0,
        mark: 0,
        reason: 0,
        length: 60,
        payload: 0,
        l4_flags,
        tcp_seq: 100,
        tcp_ack: 0,
        ttl: 64,
        icmp_type: 0,
        icmp_code: 0,
        orig_bytes: 0,
        reply_bytes: 0,
    }
}

pub(super) fn with_conntrack(mut event: Event, original: &str, reply: &str) -> Event {
    event.conntrack = Some(Conntrack {
        original: tuple(original),
        reply: tuple(reply),
        id: 1,
        status: 0,
        mark: 0,
        is_new: true,
        is_reply: false,
    });
    event
}

pub(super) fn interfaces() -> Interfaces {
    let mut interfaces = Interfaces::default();
    interfaces.insert(1, "lo", true);
    interfaces.insert(ETH0, "eth0", false);
    interfaces.insert(VETH, "veth1", false);
    interfaces
}

pub(super) const CLIENT: &str = "172.18.0.4:60218 → 172.18.0.3:9088";
pub(super) const TO_POD: &str = "172.18.0.4:60218 → 10.244.1.9:8081";
pub(super) const FROM_POD: &str = "10.244.1.9:8081 → 172.18.0.4:60218";
pub(super) const TO_CLIENT: &str = "172.18.0.3:9088 → 172.18.0.4:60218";

/// The founding story: a SYN to hostPort 9088 that the pod refuses.
pub(super) fn refused() -> Vec<Event> {
    vec![
        event(1000, Kind::TcIngress, ETH0, CLIENT, SYN),
        with_conntrack(event(2000, Kind::AfterConntrack, ETH0, CLIENT, SYN), CLIENT, TO_CLIENT),
        with_conntrack(event(3000, Kind::AfterDnat, ETH0, TO_POD, SYN), CLIENT, FROM_POD),
        event(5000, Kind::TcEgress, VETH, TO_POD, SYN),
        event(31_000, Kind::TcIngress, VETH, FROM_POD, RST | ACK),
        event(36_000, Kind::TcEgress, ETH0, TO_CLIENT, RST | ACK),
    ]
}

pub(super) fn reported(events: Vec<Event>, until: u64) -> Flow {
    let mut correlator = Correlator::new([9088], Limits::default());
    for event in events {
        correlator.push(event);
    }
    let mut flows: Vec<Flow> = correlator
        .tick(until)
        .into_iter()
        .filter_map(|update| match update {
            Update::Reported(flow) => Some(*flow),
            Update::Amended(_) | Update::Ended { .. } => None,
        })
        .collect();
    assert_eq!(flows.len(), 1, "one connection, one report");
    flows.remove(0)
}

pub(super) fn trace(final_tuple: &str) -> Trace {
    let branch = Branch {
        probability: Fraction::ONE,
        final_tuple: tuple(final_tuple),
        reply_tuple: tuple(final_tuple).inverted(),
        verdict: Verdict::Delivered { to: tuple(final_tuple), listening: None },
        decisions: Decisions::new(),
        hops: Default::default(),
        masquerade: false,
        sport_chosen: false,
        out_interface: None,
    };
    Trace {
        packet: Packet::first_of(tuple(CLIENT), None),
        branches: vec![branch],
        assumptions: Vec::new(),
        unfollowed: Default::default(),
    }
}

#[test]
fn the_refused_connection_is_one_flow_with_its_nat() {
    let flow = reported(refused(), 200 * MS);
    assert_eq!(flow.original, tuple(CLIENT));
    assert_eq!(flow.dnat(), Some(Some(tuple(TO_POD))));
    assert_eq!(flow.snat(), Some(None));
    assert_eq!(flow.sightings.len(), 6);
    assert_eq!(flow.input_ifindex(), Some(ETH0));
    let outcome = judge(&flow, &interfaces());
    let Outcome::Refused { by, from, after_ns, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!((by, from.to_string().as_str()), (Refuser::Behind { ifindex: VETH }, "10.244.1.9:8081"));
    assert_eq!(after_ns, 30_000);
}

#[test]
fn a_local_client_is_known_by_kprobes_too() {
    const OWN: &str = "172.18.0.3:40000 → 172.18.0.3:9088";
    const LEFT: &str = "172.18.0.3:40000 → 10.244.1.9:8081";
    const BACK: &str = "10.244.1.9:8081 → 172.18.0.3:40000";
    let setup = Event { packet: None, ..with_conntrack(event(1000, Kind::NatSetup, 0, OWN, 0), OWN, BACK) };
    let confirmed = with_conntrack(event(2000, Kind::Confirmed, 0, LEFT, SYN), OWN, BACK);
    let flow = reported(
        vec![
            setup,
            confirmed,
            event(3000, Kind::TcEgress, VETH, LEFT, SYN),
            event(31_000, Kind::TcIngress, VETH, BACK, RST | ACK),
        ],
        200 * MS,
    );
    assert!(flow.is_local_client());
    assert_eq!(flow.input_ifindex(), None);
}

#[test]
fn a_report_comes_after_the_grace_and_not_before() {
    let mut correlator = Correlator::new([9088], Limits::default());
    for event in refused() {
        correlator.push(event);
    }
    assert!(correlator.tick(59 * MS).is_empty());
    assert_eq!(correlator.tick(70 * MS).len(), 1);
    assert!(correlator.tick(10_000 * MS).is_empty(), "it is reported once");
}

#[test]
fn rules_that_lead_elsewhere_are_a_disagreement() {
    let flow = reported(refused(), 200 * MS);
    assert!(!tell(&flow, Some(&trace(TO_POD)), &interfaces(), false).disagrees);
    let story = tell(&flow, Some(&trace("172.18.0.4:60218 → 10.244.1.10:80")), &interfaces(), false);
    assert!(story.disagrees && story.branch.is_none());
    let said = story.lines.iter().find(|line| matches!(line.what, What::Disagreement { .. })).expect("it says so");
    assert_eq!(said.certainty, Certainty::Differs);
}

/// The founding story with the route that its SYN carried, told against branches with these gateways: the route's lines.
fn routes_told(taken: Option<&str>, predicted: &[Option<&str>]) -> Vec<(Certainty, Option<String>)> {
    let address = |text: &&str| text.parse().expect("an address");
    let mut events = refused();
    let mut left = with_conntrack(event(4000, Kind::AfterSnat, 0, TO_POD, SYN), CLIENT, FROM_POD);
    left.out_ifindex = VETH;
    left.route = Some(RouteTaken { kind: RouteKind::Unicast, gateway: taken.as_ref().map(address) });
    events.insert(3, left);
    let mut all = trace(TO_POD);
    let branch = all.branches.remove(0);
    all.branches.extend(predicted.iter().map(|gateway| {
        let decision = Route {
            dst: "10.244.1.9".parse().expect("an address"),
            kind: RouteKind::Unicast,
            interface: Some(Name::from("veth1")),
            gateway: gateway.as_ref().map(address),
            table: name!("main"),
            route: name!("10.244.1.9 dev veth1"),
        };
        Branch { hops: vec![Hop::Route { decision }].into(), ..branch.clone() }
    }));
    let trace = (!predicted.is_empty()).then_some(&all);
    let story = tell(&reported(events, 200 * MS), trace, &interfaces(), false);
    let lines = story.lines.into_iter();
    lines
        .filter_map(|line| match line.what {
            What::Route { taken: Some(taken), .. } => {
                assert_eq!((line.offset_ns, taken.interface.as_deref()), (Some(3000), Some("veth1")));
                Some((line.certainty, taken.gateway.map(|gateway| gateway.to_string())))
            }
            _ => None,
        })
        .collect()
}

#[test]
fn the_route_taken_confirms_the_predicted_one_or_contradicts_it_or_stands_alone() {
    const VIA: Option<&str> = Some("172.18.0.2");
    let owned = || VIA.map(str::to_owned);
    assert_eq!(routes_told(None, &[None]), [(Certainty::Both, None)]);
    assert_eq!(routes_told(VIA, &[VIA]), [(Certainty::Both, owned())]);
    assert_eq!(routes_told(VIA, &[None]), [(Certainty::Differs, owned())]);
    assert_eq!(routes_told(VIA, &[]), [(Certainty::Observed, owned())]);
    // Of several next hops the one that was taken is told.
    assert_eq!(routes_told(VIA, &[Some("172.18.0.4"), VIA, None]), [(Certainty::Both, owned())]);
}

#[test]
fn a_masquerade_to_another_port_is_no_disagreement() {
    let mut events = refused();
    let snat = "10.244.1.9:8081 → 10.244.1.1:40000";
    events[2] = with_conntrack(event(3000, Kind::AfterDnat, ETH0, TO_POD, SYN), CLIENT, snat);
    let flow = reported(events, 200 * MS);
    let story = tell(&flow, Some(&trace("10.244.1.1:60218 → 10.244.1.9:8081")), &interfaces(), false);
    assert!(!story.disagrees);
    assert_eq!(flow.snat(), Some(Some(tuple("10.244.1.1:40000 → 10.244.1.9:8081"))));
}

#[test]
fn a_silent_connection_is_reported_at_its_deadline_with_its_tries() {
    let mut events: Vec<Event> = refused().into_iter().take(4).collect();
    events.push(event(500 * MS, Kind::TcIngress, ETH0, CLIENT, SYN));
    events.push(event(500 * MS + 1000, Kind::TcEgress, VETH, TO_POD, SYN));
    let flow = reported(events, 1_100 * MS);
    assert_eq!(judge(&flow, &interfaces()), Outcome::Silent { reached: Reached::Left { ifindex: VETH }, tries: 2 });
    assert_eq!(flow.sightings.iter().filter(|seen| seen.again).count(), 2);
}

/// By ctnetlink, right after the rules changed: what is sent to where they lead now is not seen yet.
#[test]
fn a_refusal_is_this_nodes_own_only_where_something_shows_it() {
    const BACK: &str = "172.18.0.3:9088 → 172.18.0.4:60218";
    let asked = event(1000, Kind::TcIngress, ETH0, CLIENT, SYN);
    let confirmed =
        Event { packet: None, ..with_conntrack(event(2000, Kind::Confirmed, 0, CLIENT, 0), CLIENT, FROM_POD) };
    let reset = event(31_000, Kind::TcEgress, ETH0, BACK, RST | ACK);
    let judged = |events: &[&Event]| {
        let events = events.iter().copied().cloned().collect();
        judge(&reported(events, 1_100 * MS), &interfaces())
    };
    let refuser = |outcome: Outcome| match outcome {
        Outcome::Refused { by, from, .. } => (by, from.to_string()),
        other => panic!("{other:?}"),
    };
    let pod = "10.244.1.9:8081".to_owned();
    assert_eq!(refuser(judged(&[&asked, &confirmed, &reset])), (Refuser::Unseen, pod.clone()));
    // The sender of an ICMP error is translated back as well.
    let icmp = Event {
        icmp_type: 3,
        icmp_code: 3,
        icmp_sender: Some("172.18.0.3".parse().unwrap()),
        out_ifindex: ETH0,
        ..event(31_000, Kind::IcmpError, 0, CLIENT, 0)
    };
    assert_eq!(refuser(judged(&[&asked, &confirmed, &icmp])), (Refuser::Unseen, pod));
    let dropped = event(30_000, Kind::Dropped, ETH0, CLIENT, SYN);
    let sent = event(30_000, Kind::ResetSent, 0, BACK, RST | ACK);
    for shown in [dropped, sent] {
        assert_eq!(refuser(judged(&[&asked, &shown, &reset])).0, Refuser::ThisNode);
    }
    assert_eq!(judged(&[&asked, &confirmed]), Outcome::Silent { reached: Reached::Confirmed, tries: 1 });
    assert_eq!(judged(&[&asked]), Outcome::Silent { reached: Reached::Entered { ifindex: ETH0 }, tries: 1 });
}

/// A neighbour is given up after seconds, and where the client's own is asked for then, its error leaves after the drop.
#[test]
fn a_drop_before_a_late_error_is_kept_for_it() {
    let mut correlator = Correlator::new([9088], Limits::default());
    refused().into_iter().take(3).for_each(|event| correlator.push(event));
    assert!(matches!(correlator.tick(1_100 * MS).as_slice(), [Update::Reported(_)]));
    for at in [2_000 * MS, 3_000 * MS] {
        correlator.push(Event { reason: 46, ..event(at, Kind::Dropped, VETH, TO_POD, SYN) });
    }
    correlator.push(event(3_000 * MS + 50_000, Kind::IcmpError, 0, CLIENT, 0));
    let updates = correlator.tick(4_000 * MS);
    let [Update::Amended(flow)] = updates.as_slice() else { panic!("{updates:?}") };
    assert!(matches!(judge(flow, &interfaces()), Outcome::Refused { by: Refuser::ThisNode, .. }), "{flow:?}");
    let drops: Vec<u64> =
        flow.sightings.iter().filter(|seen| seen.event.kind == Kind::Dropped).map(|seen| seen.event.time_ns).collect();
    assert_eq!(drops, [3_000 * MS]);
}

#[test]
fn an_answer_that_does_not_leave_is_lost() {
    let mut events: Vec<Event> = refused().into_iter().take(4).collect();
    events.push(event(31_000, Kind::TcIngress, VETH, FROM_POD, SYN | ACK));
    let outcome = judge(&reported(events, 200 * MS), &interfaces());
    assert!(matches!(outcome, Outcome::AnswerLost { entered: Some(VETH), .. }), "{outcome:?}");
}

/// Where nothing else tells of NAT, the drop of an answer is the first to.
#[test]
fn a_drop_that_brings_the_rewritten_tuple_goes_the_way_that_conntrack_says() {
    let asked = event(1000, Kind::TcIngress, ETH0, CLIENT, SYN);
    let mut dropped = with_conntrack(event(31_000, Kind::Dropped, VETH, FROM_POD, SYN | ACK), CLIENT, FROM_POD);
    dropped.is_reply = true;
    if let Some(entry) = &mut dropped.conntrack {
        entry.is_reply = true;
    }
    let outcome = judge(&reported(vec![asked, dropped], 1_100 * MS), &interfaces());
    assert!(matches!(outcome, Outcome::AnswerLost { entered: None, .. }), "{outcome:?}");
}

#[test]
fn an_answer_of_this_node_that_is_dropped_at_once_is_lost() {
    let mut dropped = event(31_000, Kind::Dropped, 0, "172.18.0.3:9088 → 172.18.0.4:60218", SYN | ACK);
    let seen = [
        event(1000, Kind::TcIngress, ETH0, "172.18.0.4:60218 → 172.18.0.3:9088", SYN),
        event(2000, Kind::LocalIn, ETH0, "172.18.0.4:60218 → 172.18.0.3:9088", SYN),
    ];
    let judged =
        |last: &Event| judge(&reported([&seen[..], std::slice::from_ref(last)].concat(), 1_100 * MS), &interfaces());
    let by = "172.18.0.3:9088".parse().unwrap();
    assert_eq!(judged(&dropped), Outcome::AnswerLost { by, entered: None, after_ns: 30_000 });
    // Not what answers a SYN.
    dropped.l4_flags = ACK;
    assert_eq!(judged(&dropped), Outcome::Silent { reached: Reached::LocalIn, tries: 1 });
}

#[test]
fn a_closed_connection_tells_its_bytes() {
    let mut events: Vec<Event> = refused().into_iter().take(4).collect();
    events.push(event(31_000, Kind::TcIngress, VETH, FROM_POD, SYN | ACK));
    events.push(event(36_000, Kind::TcEgress, ETH0, TO_CLIENT, SYN | ACK));
    let mut fin = event(50_000, Kind::TcIngress, VETH, FROM_POD, FIN | ACK);
    (fin.orig_bytes, fin.reply_bytes) = (120, 310);
    events.push(fin);
    let flow = reported(events, 200 * MS);
    assert!(matches!(judge(&flow, &interfaces()), Outcome::Answered { after_ns: 35_000, .. }));
    let end = flow.end.expect("it ended");
    assert_eq!((end.bytes, end.reset), (Some((120, 310)), false));
}

/// What there is to say at `at`: the report of the silence at 1.1 s is taken first.
fn after_silence(late: Vec<Event>, at: u64) -> Vec<Update> {
    let mut correlator = Correlator::new([9088], Limits::default());
    for event in refused().into_iter().take(4) {
        correlator.push(event);
    }
    let reports = correlator.tick(1_100 * MS);
    let [Update::Reported(flow)] = reports.as_slice() else { panic!("{reports:?}") };
    assert!(matches!(judge(flow, &interfaces()), Outcome::Silent { .. }));
    for event in late {
        correlator.push(event);
    }
    correlator.tick(at)
}

#[test]
fn an_answer_after_the_deadline_amends_the_report() {
    let answer = || {
        vec![
            event(1_500 * MS, Kind::TcIngress, VETH, FROM_POD, SYN | ACK),
            event(1_501 * MS, Kind::TcEgress, ETH0, TO_CLIENT, SYN | ACK),
        ]
    };
    assert!(after_silence(answer(), 1_550 * MS).is_empty(), "its way back is waited for");
    let updates = after_silence(answer(), 1_600 * MS);
    let [Update::Amended(flow)] = updates.as_slice() else { panic!("{updates:?}") };
    assert_eq!(flow.id, 1);
    let Outcome::Answered { by, after_ns } = judge(flow, &interfaces()) else { panic!("{flow:?}") };
    assert_eq!((by.to_string().as_str(), after_ns), ("10.244.1.9:8081", 1_501 * MS - 1000));
    assert!(!flow.is_local_client() && flow.input_ifindex() == Some(ETH0), "where it came from is not forgotten");
}

#[test]
fn a_refusal_after_the_deadline_amends_the_report_and_ends_it() {
    let updates = after_silence(vec![event(3_000 * MS, Kind::TcIngress, VETH, FROM_POD, RST | ACK)], 3_100 * MS);
    let [Update::Amended(flow)] = updates.as_slice() else { panic!("{updates:?}") };
    assert!(matches!(judge(flow, &interfaces()), Outcome::Refused { .. }));
    assert!(flow.end.is_some_and(|end| end.reset));
}

#[test]
fn a_late_answer_is_told_once_and_its_end_follows() {
    let mut correlator = Correlator::new([9088], Limits::default());
    for event in refused().into_iter().take(4) {
        correlator.push(event);
    }
    assert_eq!(correlator.tick(1_100 * MS).len(), 1);
    for event in [
        event(1_500 * MS, Kind::TcIngress, VETH, FROM_POD, SYN | ACK),
        event(1_700 * MS, Kind::TcIngress, VETH, FROM_POD, SYN | ACK),
    ] {
        let at = event.time_ns;
        correlator.push(event);
        correlator.tick(at);
    }
    correlator.push(event(2_000 * MS, Kind::TcIngress, VETH, FROM_POD, FIN | ACK));
    let updates = correlator.tick(3_000 * MS);
    assert!(matches!(updates.as_slice(), [Update::Ended { id: 1, .. }]), "{updates:?}");
    correlator.tick(1_000_000 * MS);
    assert!(correlator.is_empty() && correlator.held.is_clean());
}

#[test]
fn retransmissions_amend_nothing() {
    let again = event(2_000 * MS, Kind::TcIngress, ETH0, CLIENT, SYN);
    assert!(after_silence(vec![again], 5_000 * MS).is_empty());
}

#[test]
fn an_end_after_the_report_is_told_once() {
    let mut correlator = Correlator::new([9088], Limits::default());
    for event in refused().into_iter().take(4) {
        correlator.push(event);
    }
    correlator.push(event(36_000, Kind::TcEgress, ETH0, TO_CLIENT, SYN | ACK));
    assert_eq!(correlator.tick(500 * MS).len(), 1);
    correlator.push(event(900 * MS, Kind::TcEgress, ETH0, TO_CLIENT, FIN | ACK));
    correlator.push(event(901 * MS, Kind::TcIngress, VETH, FROM_POD, FIN | ACK));
    let ended = correlator.tick(950 * MS);
    assert!(matches!(ended.as_slice(), [Update::Ended { id: 1, .. }]), "{ended:?}");
}

#[test]
fn a_reused_source_port_is_a_new_connection() {
    let mut correlator = Correlator::new([9088], Limits::default());
    for event in refused() {
        correlator.push(event);
    }
    assert_eq!(correlator.tick(200 * MS).len(), 1);
    let mut again = event(300 * MS, Kind::TcIngress, ETH0, CLIENT, SYN);
    again.tcp_seq = 777;
    correlator.push(again);
    let reports = correlator.tick(2_000 * MS);
    let [Update::Reported(flow)] = reports.as_slice() else { panic!("{reports:?}") };
    assert_eq!(flow.id, 2);
}

#[test]
fn a_retransmission_after_the_report_is_no_new_connection() {
    let mut correlator = Correlator::new([9088], Limits::default());
    correlator.push(event(1000, Kind::TcIngress, ETH0, CLIENT, SYN));
    assert_eq!(correlator.tick(1_100 * MS).len(), 1);
    correlator.push(event(1_200 * MS, Kind::TcIngress, ETH0, CLIENT, SYN));
    assert!(correlator.tick(5_000 * MS).is_empty());
}

#[test]
fn memory_is_bounded_and_what_it_costs_is_counted() {
    let limits = Limits { max_flows: 10, ..Limits::default() };
    let mut correlator = Correlator::new([9088], limits);
    for port in 1000..1100u16 {
        let packet = format!("172.18.0.4:{port} → 172.18.0.3:9088");
        correlator.push(event(u64::from(port), Kind::TcIngress, ETH0, &packet, SYN));
    }
    assert_eq!(correlator.len(), 10);
    assert_eq!(correlator.counts().evicted, 90);
    assert_eq!(correlator.tick(2000).len(), 90, "those that had to go were reported");
    assert_eq!(correlator.tick(2_000 * MS).len(), 10);
    correlator.tick(1_000_000 * MS);
    assert!(correlator.is_empty() && correlator.held.is_clean());
}

#[test]
fn traffic_that_was_there_before_is_not_a_verdict() {
    let flow = reported(vec![event(1000, Kind::TcIngress, ETH0, CLIENT, ACK)], 2_000 * MS);
    assert!(flow.joined_late);
    assert_eq!(judge(&flow, &interfaces()), Outcome::JoinedLate);
}

#[test]
fn too_many_open_connections_are_told_early_and_amended() {
    let limits = Limits { max_open: 32, ..Limits::default() };
    let mut correlator = Correlator::new([9088], limits);
    let ends = |port: u16| (format!("172.18.0.100:{port}"), "172.18.0.3:9088");
    for port in 1..=100 {
        let (client, server) = ends(port);
        correlator.push(event(port.into(), Kind::TcIngress, ETH0, &format!("{client} → {server}"), SYN));
    }
    let told = correlator.tick(100).len();
    assert_eq!((told as u64, correlator.counts().evicted, correlator.len()), (68, 68, 100));
    for port in 1..=100 {
        let (client, server) = ends(port);
        correlator.push(event(200, Kind::TcEgress, ETH0, &format!("{server} → {client}"), SYN | ACK));
    }
    let later = correlator.tick(500 * MS);
    let amended = later.iter().filter(|update| matches!(update, Update::Amended(_))).count();
    assert_eq!((later.len(), amended), (100, 68), "each is told once, and nothing is a connection of its own");
}
