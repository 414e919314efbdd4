//! What must not be seen.

use crate::world::{DEADLINE, POD_PORT, PORT, World, config, datagram, nothing_came, read_until, request, summary, v4};
use porttrace_tests::netns::Netns;
use porttrace_tests::privilege;
use porttrace_user::collect::probe::Probe;
use porttrace_user::core::model::event::Event;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, UdpSocket};

/// Sends a watched request last; all that came before it is then in `events` too.
async fn until_marker(probe: &mut Probe, world: &World) -> anyhow::Result<(SocketAddr, Vec<Event>)> {
    let own = request(&world.client, (v4().node, PORT).into())?;
    let mut events = Vec::new();
    read_until(probe, &mut events, |events| events.iter().filter(|event| event.l4_flags & 1 != 0).count() >= 4).await?;
    Ok((own, events))
}

fn is_of(event: &Event, client: SocketAddr) -> bool {
    let ports = event.packet.map(|packet| [packet.sport, packet.dport]).unwrap_or_default();
    ports.contains(&client.port()) || event.conntrack.is_some_and(|entry| entry.original.source() == client)
}

#[test]
fn other_ports_and_other_namespaces_emit_nothing() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("own").unwrap();
    let other = World::new("other").unwrap();
    world.serve().unwrap();
    other.serve().unwrap();
    let at = v4();
    let (own, events) = world
        .with_probe(&config(), async |probe| {
            // Unwatched ports of this node, forwarded and dropped; the watched port of a neighbour with the same addresses.
            request(&world.client, (at.pod, POD_PORT).into())?;
            datagram(&world.client, (at.pod, POD_PORT).into())?;
            request(&other.client, (at.node, PORT).into())?;
            datagram(&other.client, (at.node, PORT).into())?;
            other.node.exec("iptables -I FORWARD -p udp -j DROP".split(' '))?;
            send_only(&other.client, (at.node, PORT).into())?;
            nothing_came(probe)?;
            until_marker(probe, &world).await
        })
        .unwrap();
    let strangers: Vec<_> = events.iter().filter(|event| !is_of(event, own)).cloned().collect();
    assert!(strangers.is_empty(), "{:#?}", summary(&strangers));
}

#[test]
fn a_watched_port_as_source_port_is_not_watched() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("source").unwrap();
    world.serve().unwrap();
    let at = v4();
    let (own, events) = world
        .with_probe(&config(), async |probe| {
            // The node and a client behind it use the watched port as their own, ephemeral one.
            for from in [&world.node, &world.client] {
                from_port(from, PORT, (at.pod, POD_PORT).into())?;
            }
            nothing_came(probe)?;
            until_marker(probe, &world).await
        })
        .unwrap();
    let strangers: Vec<_> = events.iter().filter(|event| !is_of(event, own)).cloned().collect();
    assert!(strangers.is_empty(), "{:#?}", summary(&strangers));
}

fn send_only(from: &Netns, to: SocketAddr) -> anyhow::Result<()> {
    from.run_in(|| -> anyhow::Result<()> {
        UdpSocket::bind("0.0.0.0:0")?.send_to(b"lost", to)?;
        Ok(())
    })?
}

/// A datagram with its echo and a TCP request from a fixed source port.
fn from_port(from: &Netns, port: u16, to: SocketAddr) -> anyhow::Result<()> {
    from.run_in(|| -> anyhow::Result<()> {
        let socket = UdpSocket::bind(("0.0.0.0", port))?;
        socket.set_read_timeout(Some(DEADLINE))?;
        socket.send_to(b"ping", to)?;
        socket.recv(&mut [0; 16])?;
        let stream = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        stream.bind(&SocketAddr::from(([0, 0, 0, 0], port)).into())?;
        stream.connect(&to.into())?;
        let mut stream = std::net::TcpStream::from(stream);
        stream.write_all(b"hello")?;
        stream.shutdown(Shutdown::Write)?;
        stream.read_to_string(&mut String::new())?;
        Ok(())
    })?
}
