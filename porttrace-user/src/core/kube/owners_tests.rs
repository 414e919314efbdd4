use super::*;
use crate::core::model::state::Socket;
use crate::core::model::trace::Flavour;
use crate::core::parse::iptables;

const RULES: &str = "*nat\n:KUBE-NODEPORTS - [0:0]\n:KUBE-EXT-A - [0:0]\n\
    -A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-A\nCOMMIT\n";

fn state(sockets: &[u16]) -> NodeState {
    let (ruleset, problems) = iptables::parse(RULES, "rules", Flavour::IptablesNft, Family::V4);
    assert_eq!(problems, []);
    let socket = |port: &u16| Socket {
        proto: Proto::Tcp,
        address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        port: *port,
        v6only: false,
        process: None,
    };
    let sockets = Some(sockets.iter().map(socket).collect());
    NodeState { rulesets: vec![Arc::new(ruleset)], sockets, ..NodeState::default() }
}

fn ports(owners: &Owners) -> Vec<u16> {
    owners.all().map(|claim| claim.port).collect()
}

#[test]
fn of_the_same_rules_only_the_sockets_are_read_again() {
    let before = state(&[22]);
    let owners = Owners::of(&before);
    assert_eq!(ports(&owners), [30080, 22]);
    let after = NodeState { sockets: state(&[80, 81]).sockets, ..before };
    let renewed = owners.renewed(&after);
    assert_eq!(ports(&renewed), [30080, 80, 81]);
    assert!(Arc::ptr_eq(&owners.of_rules, &renewed.of_rules));
    let other = owners.renewed(&state(&[]));
    assert_eq!(ports(&other), [30080]);
    assert!(!Arc::ptr_eq(&owners.of_rules, &other.of_rules));
}
