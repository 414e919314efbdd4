//! The route that a packet carries: by a gateway, on the link, to the node itself.

use crate::world::{PORT, World, config, observed_entries, request, summary, v4, v6};
use anyhow::Result;
use porttrace_ebpf::Kind;
use porttrace_tests::privilege;
use porttrace_user::core::model::event::{Event, RouteTaken};
use porttrace_user::core::model::trace::RouteKind;
use std::net::{IpAddr, TcpListener};

/// Events that tell a route: of a packet that is delivered to the node, or leaves it.
fn routes(events: &[Event]) -> Vec<(RouteTaken, u32)> {
    events.iter().filter_map(|event| Some((event.route?, event.out_ifindex))).collect()
}

/// The one route of one connection from the client to `to`.
fn route_to(world: &World, to: IpAddr) -> (RouteTaken, u32) {
    let enough = |events: &[Event]| !observed_entries(events).is_empty();
    let (_, events) = world.watch(&config(), || request(&world.client, (to, PORT).into()), enough).unwrap();
    let text = summary(&events).join("\n");
    let mut routes = routes(&events);
    routes.dedup();
    let [only] = routes.as_slice() else { panic!("one route: {routes:?}\n{text}") };
    // What happens before the last routing decision does not tell one.
    let early =
        events.iter().filter(|event| matches!(event.kind, Kind::AfterConntrack | Kind::AfterDnat | Kind::NatSetup));
    assert!(early.into_iter().all(|event| event.route.is_none()), "{text}");
    *only
}

fn index(world: &World, interface: &str) -> u32 {
    world.node.run_in(|| nix::net::if_::if_nametoindex(interface)).unwrap().unwrap()
}

fn unicast(gateway: Option<&str>) -> RouteTaken {
    RouteTaken { kind: RouteKind::Unicast, gateway: gateway.map(|gateway| gateway.parse().unwrap()) }
}

/// Lets DNAT lead to `host` of the networks 10.50.3.0/24 and fd50:3::/64, which the pod has too.
fn lead_to(world: &World, host: &str) -> Result<()> {
    for (tool, own, target) in [
        ("iptables", "10.50.1.1", format!("10.50.3.{host}:8080")),
        ("ip6tables", "fd50:1::1", format!("[fd50:3::{host}]:8080")),
    ] {
        let rule = format!("-t nat -I PREROUTING -d {own} -p tcp --dport 9088 -j DNAT --to-destination {target}");
        world.node.exec([tool].into_iter().chain(rule.split(' ')))?;
    }
    world.pod.exec(["ip", "addr", "add", &format!("10.50.3.{host}/32"), "dev", "lo"])?;
    world.pod.exec(["ip", "addr", "add", &format!("fd50:3::{host}/128"), "dev", "lo"]).map(drop)
}

#[test]
fn the_next_hop_is_the_gateway_that_was_taken_or_none_on_the_link() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("hops").unwrap();
    world.serve().unwrap();
    let pod0 = index(&world, "pod0");
    for at in [v4(), v6()] {
        assert_eq!(route_to(&world, at.node), (unicast(None), pod0));
    }
    lead_to(&world, "7").unwrap();
    world.node.exec(["ip", "route", "add", "10.50.3.0/24", "via", "10.50.2.2"]).unwrap();
    world.node.exec(["ip", "route", "add", "fd50:3::/64", "via", "fd50:2::2"]).unwrap();
    assert_eq!(route_to(&world, v4().node), (unicast(Some("10.50.2.2")), pod0));
    assert_eq!(route_to(&world, v6().node), (unicast(Some("fd50:2::2")), pod0));
    // A gateway of the other family (RFC 5549).
    lead_to(&world, "8").unwrap();
    world.node.exec(["ip", "route", "add", "10.50.3.8/32", "via", "inet6", "fd50:2::2", "dev", "pod0"]).unwrap();
    assert_eq!(route_to(&world, v4().node), (unicast(Some("fd50:2::2")), pod0));
}

#[test]
fn what_is_routed_to_the_node_itself_says_so() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("own").unwrap();
    world.node.exec(["ip", "addr", "add", "10.50.1.9/24", "dev", "eth0"]).unwrap();
    world.node.exec(["ip", "addr", "add", "fd50:1::9/64", "dev", "eth0", "nodad"]).unwrap();
    let listener = world.node.run_in(|| TcpListener::bind(("::", PORT))).unwrap().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // A client that has gone away is its own matter.
            let _ = std::io::copy(&mut stream.try_clone().unwrap(), &mut stream);
        }
    });
    let local = RouteTaken { kind: RouteKind::Local, gateway: None };
    for to in ["10.50.1.9", "fd50:1::9"] {
        assert_eq!(route_to(&world, to.parse().unwrap()), (local, 0));
    }
}
