//! A reader that does not read: what is lost is counted, to the last event.

use crate::world::{PORT, World, config, v4};
use porttrace_tests::privilege;
use std::net::{SocketAddr, UdpSocket};

const FLOWS: u16 = 1000;
/// One datagram: into eth0, three looks at its conntrack entry, out of pod0.
const EVENTS_PER_FLOW: u64 = 5;

#[test]
fn received_and_lost_make_all_that_was_sent() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("loss").unwrap();
    world.pod.exec("iptables -I INPUT -p udp -j DROP".split(' ')).unwrap();
    let to = SocketAddr::from((v4().node, PORT));
    // Each flow from a port of its own: a port used twice finds the older flow's conntrack entry, and makes fewer events.
    let send = |first: u16, flows: u16| {
        world.client.run_in(|| {
            let sockets: Vec<_> =
                (0..flows).map(|number| UdpSocket::bind(("0.0.0.0", first + number)).unwrap()).collect();
            sockets.iter().for_each(|socket| assert_eq!(socket.send_to(b"ping", to).unwrap(), 4));
        })
    };
    let mut config = config();
    config.ring_bytes = 64 << 10;
    world
        .with_probe(&config, async |probe| {
            send(20_000, FLOWS)?;
            let mut events = Vec::new();
            probe.read_now(&mut events)?;
            let lost = probe.lost()?;
            assert!(lost.ring_full > 0, "64 KiB cannot hold {FLOWS} flows");
            assert_eq!(events.len() as u64 + lost.ring_full, u64::from(FLOWS) * EVENTS_PER_FLOW);
            // It goes on where there is room again.
            send(30_000, 10)?;
            events.clear();
            probe.read_now(&mut events)?;
            assert_eq!(events.len() as u64, 10 * EVENTS_PER_FLOW);
            assert_eq!(probe.lost()?, lost);
            Ok(())
        })
        .unwrap();
}
