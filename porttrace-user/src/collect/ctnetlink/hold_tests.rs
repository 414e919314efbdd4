use super::*;
use crate::collect::ctnetlink::{ACK, SYN};

const MS: u64 = 1_000_000;

fn tuple(text: &str) -> Tuple {
    let (from, to) = text.split_once(" > ").unwrap();
    Tuple::new(Proto::Tcp, from.parse().unwrap(), to.parse().unwrap())
}

const SENT: &str = "10.0.0.1:40000 > 10.0.0.2:9088";
const LEFT: &str = "10.0.0.2:1024 > 10.244.1.9:80";

fn new() -> Told {
    let entry = Conntrack {
        original: tuple(SENT),
        reply: tuple(LEFT).inverted(),
        id: 7,
        status: 0,
        mark: 0,
        is_new: false,
        is_reply: false,
    };
    Told { entry, gone: None }
}

fn packet(hold: &Hold, time_ns: u64, text: &str, flags: u8, is_reply: bool) -> Event {
    let kind = if is_reply { Kind::TcIngress } else { Kind::TcEgress };
    Event {
        packet: Some(tuple(text)),
        conntrack: None,
        l4_flags: flags,
        is_reply,
        ..of_entry(hold.netns, kind, new().entry, time_ns)
    }
}

fn told(released: &Released) -> Vec<String> {
    let words = |event: &Event| match event.packet {
        Some(packet) => format!("{} {packet}", event.time_ns / MS),
        None => format!("{} {:?}", event.time_ns / MS, event.kind),
    };
    released.events.iter().map(words).collect()
}

#[test]
fn an_entry_stands_between_the_packet_that_made_it_and_that_packet_rewritten() {
    let mut hold = Hold::new(&[9088], 1, Vec::new());
    hold.packet(packet(&hold, MS, SENT, SYN, false), false);
    hold.packet(packet(&hold, 2 * MS, LEFT, SYN, false), true);
    hold.entry(new(), 5 * MS);
    let released = hold.release(3 * MS, 5 * MS);
    assert_eq!(told(&released), ["1 10.0.0.1:40000 → 10.0.0.2:9088", "1 Confirmed", "2 10.0.0.2:1024 → 10.244.1.9:80"]);
    assert!(released.foreign.is_empty() && hold.is_empty());
    let entry = released.events[1].conntrack.unwrap();
    assert!(entry.is_new && entry.id == 7);
}

#[test]
fn of_a_local_client_the_entry_comes_first() {
    let mut hold = Hold::new(&[9088], 1, Vec::new());
    hold.packet(packet(&hold, 2 * MS, LEFT, SYN, false), true);
    hold.entry(new(), 5 * MS);
    let released = hold.release(3 * MS, 5 * MS);
    assert_eq!(told(&released), ["1 Confirmed", "2 10.0.0.2:1024 → 10.244.1.9:80"]);
}

#[test]
fn an_entry_waits_for_its_packet_but_not_for_ever() {
    let mut hold = Hold::new(&[9088], 1, Vec::new());
    hold.entry(new(), 5 * MS);
    assert_eq!(told(&hold.release(5 * MS, 6 * MS)), [""; 0]);
    hold.packet(packet(&hold, 4 * MS, SENT, SYN, false), false);
    assert_eq!(told(&hold.release(6 * MS, 7 * MS)), ["4 10.0.0.1:40000 → 10.0.0.2:9088", "4 Confirmed"]);
    hold.entry(new(), 50 * MS);
    assert_eq!(told(&hold.release(51 * MS, 51 * MS)), [""; 0]);
    assert_eq!(told(&hold.release(90 * MS, 90 * MS)), ["50 Confirmed"]);
    assert!(hold.is_empty());
}

/// Whoever is stopped between reading conntrack's way and that of packets has packets whose entries are still to be read.
#[test]
fn an_entry_finds_its_packet_however_long_the_reader_was_stopped() {
    let mut hold = Hold::new(&[9088], 1, Vec::new());
    hold.packet(packet(&hold, 3 * MS, SENT, SYN, false), false);
    hold.packet(packet(&hold, 4 * MS, LEFT, SYN, false), true);
    assert_eq!(told(&hold.release(MS, 400 * MS)), [""; 0]);
    hold.entry(new(), 401 * MS);
    let released = hold.release(400 * MS, 401 * MS);
    assert_eq!(told(&released), ["3 10.0.0.1:40000 → 10.0.0.2:9088", "3 Confirmed", "4 10.0.0.2:1024 → 10.244.1.9:80"]);
}

#[test]
fn packets_at_predicted_addresses_that_nobody_claims_are_foreign() {
    let mut hold = Hold::new(&[9088], 1, Vec::new());
    hold.packet(packet(&hold, MS, LEFT, SYN, false), true);
    assert_eq!(told(&hold.release(2 * MS, 2 * MS)), [""; 0]);
    assert!(!hold.is_empty());
    let released = hold.release(60 * MS, 60 * MS);
    assert_eq!((told(&released), released.foreign), (vec![], vec![tuple(LEFT)]));
    // With a watched port they are told even so.
    let mut hold = Hold::new(&[80], 1, Vec::new());
    hold.packet(packet(&hold, MS, LEFT, SYN, false), true);
    assert_eq!(told(&hold.release(60 * MS, 60 * MS)), ["1 10.0.0.2:1024 → 10.244.1.9:80"]);
}

#[test]
fn a_claim_holds_for_the_answer_and_ends_with_time() {
    let mut hold = Hold::new(&[9088], 1, Vec::new());
    hold.entry(new(), MS);
    let back = "10.244.1.9:80 > 10.0.0.2:1024";
    hold.packet(packet(&hold, 3 * MS, back, SYN | ACK, true), true);
    assert_eq!(told(&hold.release(4 * MS, 4 * MS)), ["3 10.244.1.9:80 → 10.0.0.2:1024"]);
    hold.release(3000 * MS, 3000 * MS);
    hold.packet(packet(&hold, 3001 * MS, back, SYN | ACK, true), true);
    assert_eq!(told(&hold.release(3002 * MS, 3002 * MS)), [""; 0]);
}

#[test]
fn each_entry_finds_its_own_packet_when_a_port_is_used_again() {
    let mut hold = Hold::new(&[9088], 1, Vec::new());
    hold.packet(packet(&hold, MS, SENT, SYN, false), false);
    hold.packet(packet(&hold, 2 * MS, SENT, SYN, false), false);
    let gone = Told { gone: Some((100, 200)), ..new() };
    for told in [new(), gone, new()] {
        hold.entry(told, 3 * MS);
    }
    let released = hold.release(3 * MS, 3 * MS);
    let sent = "10.0.0.1:40000 → 10.0.0.2:9088";
    let first = [format!("1 {sent}"), "1 Confirmed".to_owned(), "1 Destroyed".to_owned()];
    let second = [format!("2 {sent}"), "2 Confirmed".to_owned()];
    assert_eq!(told(&released), [&first[..], &second[..]].concat());
    assert_eq!((released.events[2].orig_bytes, released.events[2].reply_bytes), (100, 200));
}

#[test]
fn an_older_entry_is_told_with_its_first_packet_and_once() {
    let older = vec![new().entry];
    let mut hold = Hold::new(&[9088], 1, older);
    hold.packet(packet(&hold, MS, "10.244.1.9:80 > 10.0.0.2:1024", ACK, true), false);
    hold.packet(packet(&hold, 2 * MS, SENT, ACK, false), false);
    let released = hold.release(3 * MS, 3 * MS);
    let lines = ["1 Confirmed", "1 10.244.1.9:80 → 10.0.0.2:1024", "2 10.0.0.1:40000 → 10.0.0.2:9088"];
    assert_eq!(told(&released), lines);
    assert!(!released.events[0].conntrack.unwrap().is_new);
}

#[test]
fn an_older_entry_is_not_that_of_a_connection_that_begins() {
    let older = vec![new().entry];
    let mut hold = Hold::new(&[9088], 1, older);
    hold.packet(packet(&hold, MS, SENT, SYN, false), false);
    hold.packet(packet(&hold, 2 * MS, LEFT, SYN, false), false);
    let first = hold.release(3 * MS, 3 * MS);
    assert_eq!(told(&first), ["1 10.0.0.1:40000 → 10.0.0.2:9088"]);
    // Its own entry is heard of later than its packet was handed out.
    hold.entry(new(), 4 * MS);
    hold.packet(packet(&hold, 5 * MS, "10.244.1.9:80 > 10.0.0.2:1024", SYN | ACK, true), false);
    let rest = hold.release(6 * MS, 6 * MS);
    let lines = ["1 Confirmed", "2 10.0.0.2:1024 → 10.244.1.9:80", "5 10.244.1.9:80 → 10.0.0.2:1024"];
    assert_eq!(told(&rest), lines);
    assert!(rest.events[0].conntrack.unwrap().is_new);
}

#[test]
fn a_syn_that_is_sent_again_is_of_its_older_entry() {
    let older = vec![new().entry];
    let mut hold = Hold::new(&[9088], 1, older);
    hold.packet(packet(&hold, MS, LEFT, SYN, false), false);
    assert!(told(&hold.release(2 * MS, 2 * MS)).is_empty());
    let late = hold.release(99 * MS, 99 * MS);
    assert_eq!(told(&late), ["1 Confirmed", "1 10.0.0.2:1024 → 10.244.1.9:80"]);
    assert!(!late.events[0].conntrack.unwrap().is_new && hold.is_empty());
}
