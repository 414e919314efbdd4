//! What the node's own netfilter counted, told by the system's tools and not by ours.

use crate::lab::rules::Tools;
use crate::netns::Netns;
use anyhow::{Context, Result};
use porttrace_user::core::model::flow::{Proto, Tuple};
use std::collections::BTreeMap;
use std::str::FromStr;

/// Counts the packets to some ports that conntrack calls new, by rules without a target at the top of mangle PREROUTING.
pub struct NewConnections<'a> {
    netns: &'a Netns,
    tools: &'a Tools,
}

impl<'a> NewConnections<'a> {
    /// Starts at 0. The rules stay as long as the namespace.
    pub fn count(netns: &'a Netns, tools: &'a Tools, ports: &[u16]) -> Result<Self> {
        let list = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
        for proto in ["udp", "tcp"] {
            let rule = format!("-t mangle -I PREROUTING -p {proto} -m multiport --dports {list}");
            let state = ["-m", "conntrack", "--ctstate", "NEW"];
            let tool = tools.tool("iptables").display().to_string();
            netns.exec([tool.as_str()].into_iter().chain(rule.split(' ')).chain(state))?;
        }
        Ok(Self { netns, tools })
    }

    /// Packets so far, TCP and UDP.
    pub fn read(&self) -> Result<[u64; 2]> {
        let tool = self.tools.tool("iptables").display().to_string();
        let listing = self.netns.exec([tool.as_str(), "-t", "mangle", "-nvxL", "PREROUTING"])?;
        let packets = |proto: [&str; 2]| -> Result<u64> {
            let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            let mut rows = listing.lines().filter(|line| line.contains("ctstate NEW")).map(words);
            // Without a target the protocol (a name or a number) is the third word.
            let row = rows.find(|row| row.get(2).is_some_and(|word| proto.contains(&word.as_str())));
            row.and_then(|row| row.first()?.parse().ok()).with_context(|| format!("no counter in {listing}"))
        };
        Ok([packets(["tcp", "6"])?, packets(["udp", "17"])?])
    }
}

/// Entries to a port as `conntrack -L` lists them: original and reply tuple.
pub fn entries(netns: &Netns, proto: Proto, port: u16) -> Result<BTreeMap<Tuple, Tuple>> {
    let listing = netns.exec(["conntrack", "-L", "-p", &proto.to_string(), "--orig-port-dst", &port.to_string()])?;
    listing.lines().map(|line| entry(line, proto).with_context(|| format!("in {line:?}"))).collect()
}

/// `udp 17 29 src=… dst=… sport=… dport=… [UNREPLIED] src=… dst=… sport=… dport=… mark=0 use=1`.
fn entry(line: &str, proto: Proto) -> Option<(Tuple, Tuple)> {
    Some((tuple(line, proto, 0)?, tuple(line, proto, 1)?))
}

fn tuple(line: &str, proto: Proto, index: usize) -> Option<Tuple> {
    let (src, dst) = (value(line, "src=", index)?, value(line, "dst=", index)?);
    let (sport, dport) = (value(line, "sport=", index)?, value(line, "dport=", index)?);
    Some(Tuple { proto, src, dst, sport, dport })
}

fn value<T: FromStr>(line: &str, key: &str, index: usize) -> Option<T> {
    line.split_whitespace().filter_map(|word| word.strip_prefix(key)).nth(index)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_entry_has_two_tuples() {
        let line = "tcp      6 9 CLOSE src=172.18.0.4 dst=172.18.0.3 sport=10000 dport=9088 src=10.244.1.9 dst=172.18.0.4 \
                    sport=80 dport=10000 [ASSURED] mark=0 use=1";
        let (original, reply) = entry(line, Proto::Tcp).unwrap();
        assert_eq!(original.to_string(), "172.18.0.4:10000 → 172.18.0.3:9088");
        assert_eq!(reply.to_string(), "10.244.1.9:80 → 172.18.0.4:10000");
        assert_eq!(entry("udp 17 29 src=1.2.3.4", Proto::Udp), None);
    }
}
