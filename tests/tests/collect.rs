//! Live collection says what the system's own tools say.

use anyhow::{Result, ensure};
use porttrace_tests::netns::Netns;
use porttrace_tests::privilege::may_run;
use porttrace_user::collect::{conntrack, live, netlink, nftables, ruleset, snapshot};
use porttrace_user::core::model::flow::{Family, Proto};
use porttrace_user::core::model::rules::Ruleset;
use porttrace_user::core::model::state::{Address, ConntrackEntry, Link, Neighbour, NodeState, PolicyRule, RouteEntry};
use porttrace_user::core::model::trace::Flavour;
use porttrace_user::core::parse::notes::Notes;
use porttrace_user::core::parse::{self, iproute, iptables};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

/// Everything that a node's routing can have and this kernel allows, a line each.
const NETWORK: &str = "
link add v0 type veth peer name v1
link set v0 up
link set v1 up
addr add 10.9.0.1/24 dev v0
addr add 10.9.0.2/24 dev v0
addr add 10.9.1.1/32 peer 10.9.1.2 dev v0
addr add fd99::1/64 dev v0 nodad
link add br0 type bridge
link add p0 type veth peer name p1
link set p0 master br0
link set p0 type bridge_slave hairpin on
link set br0 up
link set p0 up
link set p1 up
link add vx type vxlan id 5 dev v0 dstport 4789 remote 10.9.0.7
route add default via 10.9.0.254
route add 10.50.0.0/16 nexthop via 10.9.0.9 dev v0 weight 3 nexthop dev p1 weight 1
route add blackhole 10.51.0.0/16
route add unreachable 10.52.0.0/16 metric 77
route add prohibit 10.53.0.0/16
route add throw 10.54.0.0/16 table 100
route add 10.55.0.0/16 via inet6 fe80::1 dev v0
route add 10.56.0.0/16 via 10.9.0.9 mtu 1400 table 100 src 10.9.0.2
nexthop add id 1 via 10.9.0.9 dev v0
route add 10.59.0.0/16 nhid 1
rule add fwmark 0x1/0xff lookup 100 prio 10
rule add not from 10.1.0.0/16 to 10.2.0.0/16 iif v0 oif v1 ipproto tcp sport 1-5 dport 80 lookup 100 prio 11
rule add from 10.3.0.3 prohibit prio 12
rule add blackhole prio 13 to 10.4.0.0/16
rule add unreachable prio 14 to 10.5.0.0/16
rule add goto 32766 prio 15 tos 0x10
rule add lookup main suppress_prefixlength 0 prio 16
rule add nop prio 17
rule add fwmark 7 lookup local prio 18
rule add lookup main prio 19 suppress_ifgroup 3
neigh add 10.9.0.77 lladdr 02:00:00:00:00:01 dev v0 nud permanent
neigh add fd99::77 lladdr 02:00:00:00:00:01 dev v0 nud permanent
";

const NETWORK_6: &str = "
route add fd50::/64 nexthop via fd99::9 dev v0 nexthop via fd99::8 dev v0
route add unreachable fd51::/64
route add blackhole fd52::/64
route add default via fd99::9
rule add from fd00::/8 lookup 100 prio 30
";

fn furnished(label: &str) -> Result<Netns> {
    let netns = Netns::new(label)?;
    netns.exec_with(["ip", "-batch", "-"], NETWORK)?;
    netns.exec_with(["ip", "-6", "-batch", "-"], NETWORK_6)?;
    // The kernel makes the local route of an IPv6 address a little after the address (addrconf_dad_work).
    let deadline = Instant::now() + Duration::from_secs(20);
    while !netns.exec(["ip", "-6", "route", "show", "table", "local"])?.contains("fd99::1 ") {
        ensure!(Instant::now() < deadline, "no local route for fd99::1");
    }
    Ok(netns)
}

fn without_notes<T>(parse: impl FnOnce(&mut Notes) -> Option<T>) -> T {
    let mut notes = Notes::new("tool");
    let value = parse(&mut notes);
    assert_eq!(notes.finish(), []);
    value.unwrap()
}

/// Link-local IPv6 comes and goes by itself while interfaces come up; it is compared by nothing.
fn settles_by_itself(text: &str) -> bool {
    text.starts_with("fe80") || text.starts_with("ff00")
}

#[test]
fn netlink_says_what_ip_says() -> Result<()> {
    if !may_run("collecting in a namespace") {
        return Ok(());
    }
    let netns = furnished("collect-netlink")?;
    let network = netns.run_in(netlink::read)?;
    assert_eq!(network.diagnostics, []);

    let mut links: Vec<Link> =
        without_notes(|notes| iproute::links(&netns.exec(["ip", "-d", "-j", "link"]).unwrap(), notes));
    let bridge = netns.exec(["bridge", "-d", "-j", "link"])?;
    iproute::apply_bridge_links(&mut links, &bridge, &mut Notes::new("bridge"));
    // For a link within the namespace `ip` prints the peer's name, which the parser turns into its index.
    assert_eq!(network.links.unwrap(), links);
    assert!(links.iter().any(|link| link.hairpin == Some(true) && link.master.as_deref() == Some("br0")));

    let stable = |all: Vec<Address>| -> Vec<Address> {
        all.into_iter().filter(|one| !settles_by_itself(&one.address.to_string())).collect()
    };
    let expected = without_notes(|notes| iproute::addresses(&netns.exec(["ip", "-j", "addr"]).unwrap(), notes));
    assert_eq!(stable(network.addresses.unwrap()), stable(expected));

    let stable = |all: Vec<RouteEntry>| -> Vec<RouteEntry> {
        all.into_iter().filter(|one| !settles_by_itself(&one.dst.to_string())).collect()
    };
    let mut expected = Vec::new();
    for (flag, family) in [("-4", Family::V4), ("-6", Family::V6)] {
        let text = netns.exec(["ip", flag, "-j", "route", "show", "table", "all"])?;
        expected.extend(without_notes(|notes| iproute::routes(&text, family, notes)));
    }
    assert_eq!(stable(network.routes.unwrap()), stable(expected));

    let mut expected: Vec<PolicyRule> = Vec::new();
    for (flag, family) in [("-4", Family::V4), ("-6", Family::V6)] {
        let text = netns.exec(["ip", flag, "-j", "rule"])?;
        expected.extend(without_notes(|notes| iproute::policy(&text, family, notes)));
    }
    assert_eq!(network.policy.unwrap(), expected);

    let stable = |mut all: Vec<Neighbour>| -> Vec<Neighbour> {
        all.retain(|one| !settles_by_itself(&one.address.to_string()));
        all.sort_by_key(|one| one.address);
        all
    };
    let expected = without_notes(|notes| iproute::neighbours(&netns.exec(["ip", "-j", "neigh"]).unwrap(), notes));
    assert_eq!(stable(expected.clone()).len(), 2);
    assert_eq!(stable(network.neighbours.unwrap()), stable(expected));
    Ok(())
}

/// The rules of a state as text, by flavour and family.
fn rules(state: &NodeState) -> Vec<(Flavour, Family, Vec<String>)> {
    let text = |set: &Ruleset| -> Vec<String> {
        let chains = set.tables.iter().flat_map(|table| &table.chains);
        chains.flat_map(|chain| &chain.rules).map(|rule| rule.text.to_string()).collect()
    };
    state.rulesets.iter().map(|set| (set.flavour, set.family, text(set))).collect()
}
#[test]
fn a_live_state_equals_its_snapshot_and_the_tools() -> Result<()> {
    if !may_run("collecting in a namespace") {
        return Ok(());
    }
    let netns = furnished("collect-state")?;
    netns.exec([
        "iptables-nft",
        "-t",
        "nat",
        "-A",
        "PREROUTING",
        "-p",
        "tcp",
        "--dport",
        "9088",
        "-j",
        "DNAT",
        "--to-destination",
        "10.9.0.9:80",
    ])?;
    netns.exec([
        "iptables-legacy",
        "-A",
        "INPUT",
        "-p",
        "udp",
        "-m",
        "recent",
        "--set",
        "--name",
        "SEEN",
        "--rsource",
    ])?;
    netns.exec(["ip6tables-nft", "-A", "FORWARD", "-j", "ACCEPT"])?;
    netns.exec(["ipset", "create", "some", "hash:ip"])?;
    netns.exec(["ipset", "add", "some", "1.2.3.4"])?;
    netns.exec(["iptables-nft", "-A", "FORWARD", "-m", "set", "--match-set", "some", "src", "-j", "DROP"])?;
    netns.exec(["iptables-nft", "-A", "OUTPUT", "-m", "conntrack", "--ctstate", "NEW"])?;
    let native = "add table inet native\nadd chain inet native in { type filter hook input priority 5; }\n\
                  add rule inet native in tcp dport 9 drop\n";
    netns.exec_with(["nft", "-f", "-"], native)?;
    netns.exec(["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;

    let (state, again, listener) = netns.run_in(|| {
        let listener = TcpListener::bind("[::]:8080").unwrap();
        let receiver = UdpSocket::bind("127.0.0.1:5353").unwrap();
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        sender.send_to(b"hello", "127.0.0.1:5353").unwrap();
        let options = live::Options { processes: true, conntrack: true, report: true };
        let collected = live::collect(options);
        let file = std::env::temp_dir().join(format!("ptl-{}-node.tar.zst", std::process::id()));
        snapshot::write(&collected.files, &file).unwrap();
        let again = snapshot::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        drop((listener, receiver));
        (parse::state(&collected.files), again, sender.local_addr().unwrap())
    })?;
    assert_eq!(format!("{again:?}"), format!("{state:?}"), "a snapshot is read back as it was taken");

    let mut expected = Vec::new();
    for (tool, flavour, family) in [
        ("iptables-nft-save", Flavour::IptablesNft, Family::V4),
        ("iptables-legacy-save", Flavour::IptablesLegacy, Family::V4),
        ("ip6tables-nft-save", Flavour::IptablesNft, Family::V6),
    ] {
        let (set, problems) = iptables::parse(&netns.exec([tool])?, tool, flavour, family);
        assert_eq!(problems, []);
        expected.push(std::sync::Arc::new(set));
    }
    let expected = NodeState { rulesets: expected, ..NodeState::default() };
    assert_eq!(rules(&state), rules(&expected));
    assert_eq!(rules(&state).iter().map(|(_, _, texts)| texts.len()).collect::<Vec<_>>(), [3, 1, 1]);

    let said: Vec<&str> = state.diagnostics.iter().map(|note| note.message.as_str()).collect();
    assert_eq!(said, [""; 0]);
    let native = state.native_rules.iter().flat_map(|set| &set.tables).flat_map(|table| &table.chains);
    let native: Vec<_> = native.flat_map(|chain| &chain.rules).map(|rule| rule.text.to_string()).collect();
    assert_eq!(native, ["tcp dport 9 drop"; 2], "of both families");
    assert_eq!(state.sysctls.unwrap()["net.ipv4.ip_forward"], "1");
    assert_eq!(state.sets.unwrap()["some"].members, ["1.2.3.4"]);
    let seen = &state.recent.unwrap()["SEEN"];
    assert_eq!(seen.len(), 1);
    assert!(seen[0].age.unwrap() <= 5, "{seen:?}");

    let sockets = state.sockets.unwrap();
    let ours = format!("/{}", std::process::id());
    let find = |proto, port| sockets.iter().find(|socket| socket.proto == proto && socket.port == port).unwrap();
    let tcp = find(Proto::Tcp, 8080);
    assert!(tcp.address.to_string() == "::" && !tcp.v6only, "{tcp:?}");
    assert!(tcp.process.as_ref().unwrap().ends_with(&ours), "{tcp:?}");
    assert_eq!(find(Proto::Udp, 5353).address.to_string(), "127.0.0.1");

    let entries = state.conntrack.unwrap();
    let flow = entries.iter().find(|entry| entry.original.sport == listener.port()).unwrap();
    assert_eq!(flow.original.to_string(), format!("{listener} → 127.0.0.1:5353"));
    assert!(flow.unreplied && !flow.assured && flow.reply == flow.original.inverted());
    Ok(())
}

#[test]
fn ctnetlink_says_what_conntrack_says() -> Result<()> {
    if !may_run("collecting in a namespace") {
        return Ok(());
    }
    let netns = Netns::new("collect-ct")?;
    for tool in ["iptables-nft", "ip6tables-nft"] {
        netns.exec([
            tool,
            "-t",
            "nat",
            "-A",
            "OUTPUT",
            "-p",
            "tcp",
            "--dport",
            "9",
            "-j",
            "REDIRECT",
            "--to-ports",
            "80",
        ])?;
    }
    netns.exec(["iptables-nft", "-t", "raw", "-A", "OUTPUT", "-p", "udp", "-j", "CT", "--zone", "5"])?;
    netns.exec([
        "iptables-nft",
        "-t",
        "mangle",
        "-A",
        "OUTPUT",
        "-p",
        "udp",
        "-j",
        "CONNMARK",
        "--set-mark",
        "0x4000",
    ])?;
    let entries = netns.run_in(|| {
        let mut open = Vec::new();
        for (listen, to) in [("127.0.0.1:80", "127.0.0.1:9"), ("[::1]:80", "[::1]:9")] {
            let listener = TcpListener::bind(listen).unwrap();
            open.push((std::net::TcpStream::connect(to).unwrap(), listener));
        }
        let sender = UdpSocket::bind("127.0.0.1:7000").unwrap();
        sender.send_to(b"x", "127.0.0.1:7001").unwrap();
        let all = conntrack::dump(|_| true).unwrap();
        let to_nine = conntrack::dump(|entry| conntrack::concerns(entry, &[9])).unwrap();
        let to_eighty = conntrack::dump(|entry| conntrack::concerns(entry, &[80])).unwrap();
        assert_eq!((to_nine.len(), to_eighty.len()), (2, 2));
        (all, std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap())
    })?;
    let sorted = |mut entries: Vec<ConntrackEntry>| {
        // Time goes by between the two listings.
        entries.iter_mut().for_each(|entry| entry.timeout = None);
        entries.sort_by_key(|entry| entry.original);
        entries
    };
    let (all, proc) = (sorted(entries.0), entries.1);
    let mut notes = Notes::new("proc");
    assert_eq!(all, sorted(parse::conntrack::entries(&proc, &mut notes)));
    assert_eq!(notes.finish(), []);
    assert_eq!(all.len(), 3);
    let udp = all.iter().find(|entry| entry.original.proto == Proto::Udp).unwrap();
    assert_eq!((udp.zone, udp.mark, udp.unreplied), (5, 0x4000, true));
    let tcp = all.iter().find(|entry| entry.original.proto == Proto::Tcp).unwrap();
    assert_eq!((tcp.state.as_str(), tcp.assured, tcp.original.dport, tcp.reply.sport), ("ESTABLISHED", true, 9, 80));
    Ok(())
}

#[test]
fn a_fingerprint_changes_with_the_rules() -> Result<()> {
    if !may_run("collecting in a namespace") {
        return Ok(());
    }
    let netns = Netns::new("collect-print")?;
    let take = || netns.run_in(ruleset::Fingerprint::take);
    let first = take()?;
    assert_eq!(take()?, first);
    assert!(!first.has_legacy());
    // Looking registers no tables.
    let (sets, problems) = netns.run_in(ruleset::read_all)?;
    assert!(sets.is_empty() && problems.is_empty(), "{problems:?}");
    assert_eq!(netns.exec(["cat", "/proc/net/ip_tables_names"])?, "");
    assert_eq!(netns.exec(["nft", "list", "tables"])?, "");
    assert_eq!(take()?, first);

    netns.exec(["iptables-nft", "-A", "INPUT", "-j", "ACCEPT"])?;
    let second = take()?;
    assert_ne!(second, first);
    netns.exec(["iptables-legacy", "-A", "INPUT", "-i", "lo"])?;
    let third = take()?;
    assert!(third.has_legacy() && third != second);
    // Counters are no change.
    netns.run_in(|| UdpSocket::bind("127.0.0.1:7000").unwrap().send_to(b"x", "127.0.0.1:7001").unwrap())?;
    assert_eq!(take()?, third);
    netns.exec(["iptables-legacy", "-D", "INPUT", "1"])?;
    assert_ne!(take()?, third);
    let (sets, problems) = netns.run_in(ruleset::read_all)?;
    assert_eq!(sets.len(), 2);
    assert_eq!(problems, []);
    Ok(())
}

/// Base chains of every type and IP family, beside those that IP packets do not meet or that say nothing.
const NATIVE: &str = "
add table ip kube-proxy
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100; }
add chain ip kube-proxy services
add chain ip kube-proxy empty { type filter hook output priority 0; }
add chain ip kube-proxy closed { type filter hook forward priority 5; policy drop; }
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy services tcp dport 30080 dnat to 10.244.1.9:80
add rule ip kube-proxy nat-postrouting accept
add table inet fw
add chain inet fw marking { type route hook output priority -150; }
add chain inet fw guard { type filter hook input priority -10; }
add rule inet fw marking meta mark set 1
add rule inet fw guard accept
add table ip plain
add chain ip plain pre { type nat hook prerouting priority -90; }
add chain ip plain post { type nat hook postrouting priority 90; }
add rule ip plain pre accept
add rule ip plain post masquerade
add table inet here
add chain inet here out { type nat hook output priority -100; }
add rule inet here out tcp dport 1 redirect to :2
add table ip there
add chain ip there pre { type nat hook prerouting priority -100; }
add chain ip there more
add rule ip there pre jump more
add rule ip there more dnat to tcp dport map { 1 : 10.0.0.1 }
add table bridge b
add chain bridge b in { type filter hook input priority 0; }
add rule bridge b in accept
";

#[test]
fn netlink_says_which_native_base_chains_there_are() -> Result<()> {
    if !may_run("collecting in a namespace") {
        return Ok(());
    }
    let netns = Netns::new("collect-native")?;
    netns.exec_with(["nft", "-f", "-"], NATIVE)?;
    netns.exec(["iptables-nft", "-t", "nat", "-A", "PREROUTING", "-j", "ACCEPT"])?;
    let found = netns.run_in(nftables::bases)??;
    let mut told = parse::nftables::bases_of_ruleset(&netns.exec(["nft", "-j", "list", "ruleset"])?)?;
    told.retain(|base| base.chain != "empty");
    told.sort();
    assert_eq!(found, told);
    let state = netns.run_in(|| live::node(live::Options::default()).state)?;
    assert_eq!((&state.native, state.native_dnat()), (&found, None), "all of it was read");
    let rules = state.native_rules.iter().flat_map(|set| set.tables.iter().map(|table| (set.family, table)));
    let rules =
        rules.map(|(family, table)| (family, &*table.name, table.chains.iter().map(|one| one.rules.len()).sum()));
    let (four, six) = (Family::V4, Family::V6);
    let told: Vec<(_, &str, usize)> = rules.collect();
    let wanted = [
        (four, "ip kube-proxy", 3),
        (four, "inet fw", 2),
        (four, "ip plain", 2),
        (four, "inet here", 1),
        (four, "ip there", 2),
    ];
    assert_eq!(told[..5], wanted, "as they were made");
    assert_eq!(told[5..], [(six, "inet fw", 2), (six, "inet here", 1)]);
    let unread = NodeState { native_rules: Vec::new(), ..state };
    let tables = Some("inet here, ip kube-proxy, ip there");
    assert_eq!(unread.native_dnat().as_deref(), tables, "what only masquerades does not");
    let names: Vec<&str> = found.iter().map(|base| base.chain.as_str()).collect();
    let wanted = ["guard", "marking", "out", "closed", "nat-postrouting", "nat-prerouting", "post", "pre", "pre"];
    assert_eq!(names, wanted);
    Ok(())
}
