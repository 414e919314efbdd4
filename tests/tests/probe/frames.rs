//! Crafted frames: VLAN tags, IPv4 options, fragments, IPv6 extension headers.

use crate::world::{PORT, World, config, read_until, summary, v4, v6};
use anyhow::{Context, Result};
use pnet::datalink::{self, Channel, Config};
use porttrace_ebpf::Kind;
use porttrace_tests::netns::Netns;
use porttrace_tests::privilege;
use porttrace_user::core::model::event::Event;
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::net::{IpAddr, SocketAddr};

/// EtherTypes with the tags before them.
const IPV4: &[u8] = &[0x08, 0x00];
const IPV6: &[u8] = &[0x86, 0xdd];
const TAGGED: &[u8] = &[0x81, 0x00, 0x00, 0x07, 0x08, 0x00];
const TWICE_TAGGED: &[u8] = &[0x88, 0xa8, 0x40, 0x07, 0x81, 0x00, 0x60, 0x08, 0x08, 0x00];

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// A datagram's header and 4 bytes; checksum 0.
fn udp(sport: u16) -> Vec<u8> {
    [&sport.to_be_bytes()[..], &PORT.to_be_bytes(), &[0, 12, 0, 0], b"ping"].concat()
}

fn ipv4(options: &[u8], fragment: u16, payload: &[u8]) -> Vec<u8> {
    let header = 20 + options.len();
    let mut bytes = vec![0x40 | (header / 4) as u8, 0];
    bytes.extend(((header + payload.len()) as u16).to_be_bytes());
    bytes.extend([0, 1]);
    bytes.extend(fragment.to_be_bytes());
    bytes.extend([64, 17, 0, 0]);
    bytes.extend(octets(v4().client));
    bytes.extend(octets(v4().node));
    bytes.extend(options);
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// `first` is the protocol of the first header in `rest`.
fn ipv6(first: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x60, 0, 0, 0];
    bytes.extend((rest.len() as u16).to_be_bytes());
    bytes.extend([first, 64]);
    bytes.extend(octets(v6().client));
    bytes.extend(octets(v6().node));
    bytes.extend(rest);
    bytes
}

/// Sends frames from the client's eth0 to the node.
fn send(world: &World, frames: &[(&[u8], Vec<u8>)]) -> Result<()> {
    let target = mac(&world.node, "eth0")?;
    let source = mac(&world.client, "eth0")?;
    world.client.run_in(|| -> Result<()> {
        let eth0 = datalink::interfaces().into_iter().find(|found| found.name == "eth0").context("no eth0")?;
        let Channel::Ethernet(mut sender, _) = datalink::channel(&eth0, Config::default())? else {
            anyhow::bail!("no Ethernet channel");
        };
        for (ethertype, packet) in frames {
            let frame = [&target[..], &source, ethertype, packet].concat();
            sender.send_to(&frame, None).context("nothing sent")??;
        }
        Ok(())
    })?
}

fn mac(netns: &Netns, name: &str) -> Result<Vec<u8>> {
    let json: serde_json::Value = serde_json::from_str(&netns.exec(["ip", "-j", "link", "show", name])?)?;
    let text = json[0]["address"].as_str().context("no address")?;
    text.split(':').map(|byte| Ok(u8::from_str_radix(byte, 16)?)).collect()
}

fn sports(events: &[Event]) -> Vec<u16> {
    let ingress = events.iter().filter(|event| event.kind == Kind::TcIngress && !event.is_reply);
    ingress.filter_map(|event| event.packet.map(|packet| packet.sport)).collect()
}

#[test]
fn headers_of_all_shapes_are_read() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("frames").unwrap();
    // Router alert; hop-by-hop with padding, destination options, fragment header of the first and only fragment.
    let options = [0x94, 4, 0, 0];
    let hop_by_hop = [60, 0, 1, 4, 0, 0, 0, 0];
    let destination = [44, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let whole_fragment = [17, 0, 0, 0, 0, 0, 0, 9];
    let later_fragment = [17, 0, 0, 0x40, 0, 0, 0, 10];
    let chain = [&hop_by_hop[..], &destination, &whole_fragment, &udp(5005)].concat();
    let frames = [
        (IPV4, ipv4(&[], 0, &udp(5001))),
        (TAGGED, ipv4(&[], 0, &udp(5002))),
        (TWICE_TAGGED, ipv4(&[], 0, &udp(5003))),
        (IPV4, ipv4(&options, 0, &udp(5004))),
        (IPV6, ipv6(0, &chain)),
        // Not seen: what looks like ports there is payload.
        (IPV4, ipv4(&[], 100, &udp(5006))),
        (IPV6, ipv6(44, &[&later_fragment[..], &udp(5007)].concat())),
        (IPV6, ipv6(0, &hop_by_hop[..4])),
        // Seen: a first fragment, of which more follow.
        (IPV4, ipv4(&[], 0x2000, &udp(5008))),
        (IPV6, ipv6(17, &udp(5009))),
    ];
    let (_, events) =
        world.watch(&config(), || send(&world, &frames), |events| sports(events).contains(&5009)).unwrap();
    let text = summary(&events).join("\n");
    assert_eq!(sports(&events), [5001, 5002, 5003, 5004, 5005, 5008, 5009], "{text}");
    let with_options = events.iter().find(|event| event.packet.is_some_and(|packet| packet.sport == 5004)).unwrap();
    assert_eq!((with_options.length, with_options.payload, with_options.ttl), (36, 4, 64));
    let extended = events.iter().find(|event| event.packet.is_some_and(|packet| packet.sport == 5005)).unwrap();
    assert_eq!((extended.length, extended.payload), (40 + 32 + 12, 4));
}

#[test]
fn a_device_without_ethernet_header_is_read_too() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("tun").unwrap();
    let Ok(tun) = world.node.run_in(tun).unwrap() else {
        println!("skipped: this kernel has no tun devices");
        return;
    };
    world.node.exec("ip link set tun0 up".split(' ')).unwrap();
    let events = world
        .with_probe(&config(), async |probe| {
            nix::unistd::write(&tun, &ipv4(&[], 0, &udp(6001)))?;
            let mut events = Vec::new();
            read_until(probe, &mut events, |events| !sports(events).is_empty()).await?;
            let index = probe.interface_names().iter().find(|(_, name)| *name == "tun0").map(|(index, _)| *index);
            assert_eq!(events.first().map(|event| event.ifindex), index);
            Ok(events)
        })
        .unwrap();
    let expected = Tuple::new(Proto::Udp, SocketAddr::from((v4().client, 6001)), SocketAddr::from((v4().node, PORT)));
    assert_eq!(events[0].packet, Some(expected));
}

/// Opens a tun device named tun0, without packet information before the IP header.
fn tun() -> std::io::Result<std::fs::File> {
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
    const TUN_WITHOUT_HEADER: u16 = 0x1001;
    let file = std::fs::File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tun0");
    request[16..18].copy_from_slice(&TUN_WITHOUT_HEADER.to_ne_bytes());
    // SAFETY: `struct ifreq` is 40 bytes, of which the kernel reads name and flags.
    let done = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&file), TUNSETIFF, request.as_mut_ptr()) };
    if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(file) }
}
