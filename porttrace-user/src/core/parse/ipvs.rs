//! Virtual servers of IPVS: `/proc/net/ip_vs`, `ipvsadm -Ln`, `ipvsadm -Sn`.

use super::notes::{Notes, quote};
use crate::core::model::flow::Proto;
use crate::core::model::state::{VirtualAddress, VirtualServer};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Reads a list of virtual servers; `None` when the text is no such list.
pub fn servers(text: &str, notes: &mut Notes) -> Option<Vec<VirtualServer>> {
    let lines = || text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let listed = text.contains("Prot LocalAddress:Port") || lines().any(|(_, line)| line.starts_with("-A "));
    if !listed {
        // ipvsadm -S prints nothing at all where there is nothing; a comment only is somebody's note on why there is none.
        return text.trim().is_empty().then(Vec::new);
    }
    let mut found: Vec<VirtualServer> = Vec::new();
    for (index, line) in lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words.as_slice() {
            ["IP", "Virtual", ..] | ["Prot", ..] | ["->", "RemoteAddress:Port", ..] => {}
            ["->" | "-a", ..] => {
                if let Some(last) = found.last_mut() {
                    last.real_servers += 1;
                }
            }
            words => match server(words) {
                Some(server) => found.push(server),
                None => notes.add(index + 1, format!("no virtual server: {}", quote(line))),
            },
        }
    }
    Some(found)
}

fn server(words: &[&str]) -> Option<VirtualServer> {
    let (address, scheduler) = match *words {
        ["-A", kind, address, "-s", scheduler, ..] => (saved(kind, address)?, scheduler),
        ["-A", kind, address, ..] => (saved(kind, address)?, "wlc"),
        ["FWM", mark, scheduler, ..] => (VirtualAddress::Mark(number(mark)?), scheduler),
        [proto, address, scheduler, ..] => {
            let (address, port) = endpoint(address)?;
            let proto = Proto::from_name(&proto.to_ascii_lowercase())?;
            (VirtualAddress::Endpoint { proto, address, port }, scheduler)
        }
        _ => return None,
    };
    Some(VirtualServer { address, scheduler: scheduler.to_owned(), real_servers: 0 })
}

/// `-t 10.96.0.1:443`, `-f 1`.
fn saved(kind: &str, text: &str) -> Option<VirtualAddress> {
    let proto = match kind {
        "-t" | "--tcp-service" => Proto::Tcp,
        "-u" | "--udp-service" => Proto::Udp,
        "--sctp-service" => Proto::Sctp,
        "-f" | "--fwmark-service" => return Some(VirtualAddress::Mark(text.parse().ok()?)),
        _ => return None,
    };
    let (address, port) = endpoint(text)?;
    Some(VirtualAddress::Endpoint { proto, address, port })
}

/// The kernel prints a mark as eight hexadecimal digits, ipvsadm in decimal (`ip_vs_info_seq_show`).
fn number(text: &str) -> Option<u32> {
    if text.len() == 8 { u32::from_str_radix(text, 16).ok() } else { text.parse().ok() }
}

/// `10.96.0.1:443`, `[fd00::1]:443`; the kernel writes `0A600001:01BB` and `[fd00:…]:01BB`.
fn endpoint(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.rsplit_once(':')?;
    if let ("", Some(hex)) =
        (address.trim_matches(|c: char| c.is_ascii_hexdigit()), (address.len() == 8).then_some(address))
    {
        let address = Ipv4Addr::from_bits(u32::from_str_radix(hex, 16).ok()?);
        return Some((address.into(), u16::from_str_radix(port, 16).ok()?));
    }
    if let Some(six) = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        // All eight groups with four digits each are the kernel's, and so is its port in hexadecimal.
        let radix = if six.len() == 39 && port.len() == 4 { 16 } else { 10 };
        return Some((six.parse::<Ipv6Addr>().ok()?.into(), u16::from_str_radix(port, radix).ok()?));
    }
    text.parse::<SocketAddr>().ok().map(|endpoint| (endpoint.ip(), endpoint.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Vec<String>> {
        let mut notes = Notes::new("ipvsadm.txt");
        let found = servers(text, &mut notes);
        assert_eq!(notes.finish(), []);
        found.map(|found| {
            found.iter().map(|one| format!("{} {} {}", one.address, one.scheduler, one.real_servers)).collect()
        })
    }

    #[test]
    fn the_kernels_list_and_the_tools_say_the_same() {
        let kernel = "\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr 
  -> AC120002:192B      Masq    1      0          0         
  -> AC120003:192B      Masq    1      0          0         
UDP  [fd00:0010:0096:0000:0000:0000:0000:000a]:0035 rr persistent 10800
FWM  00000010 wrr 
";
        let listed = "\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn
TCP  10.96.0.1:443 rr
  -> 172.18.0.2:6443              Masq    1      0          0
  -> 172.18.0.3:6443              Masq    1      0          0
UDP  [fd00:10:96::a]:53 rr persistent 10800
FWM  16 wrr
";
        let saved = "\
-A -t 10.96.0.1:443 -s rr
-a -t 10.96.0.1:443 -r 172.18.0.2:6443 -m -w 1
-a -t 10.96.0.1:443 -r 172.18.0.3:6443 -m -w 1
-A -u [fd00:10:96::a]:53 -s rr -p 10800
-A -f 16 -s wrr
";
        let expected = ["tcp 10.96.0.1:443 rr 2", "udp [fd00:10:96::a]:53 rr 0", "mark 0x10 wrr 0"].map(String::from);
        for text in [kernel, listed, saved] {
            assert_eq!(read(text), Some(expected.to_vec()));
        }
    }

    #[test]
    fn no_list_is_not_an_empty_list() {
        assert_eq!(read(""), Some(vec![]));
        assert_eq!(read("# rc=2 ipvsadm: command not found\n"), None);
        assert_eq!(read("Can't initialize ipvs: Protocol not available\n"), None);
        let mut notes = Notes::new("ipvsadm.txt");
        assert_eq!(servers("-A -t 10.96.0.1 -s rr\n", &mut notes), Some(vec![]));
        assert_eq!(notes.finish().len(), 1);
    }
}
