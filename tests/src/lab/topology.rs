//! Names and addresses of the cluster, as a kind cluster with three workers has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A worker node of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NodeName {
    /// 172.18.0.3, pods 10.244.1.0/24: the node that is looked at.
    Worker3,
    /// 172.18.0.4, pods 10.244.3.0/24.
    Worker2,
    /// 172.18.0.5, pods 10.244.2.0/24.
    Worker,
}

impl NodeName {
    pub const ALL: [Self; 3] = [Self::Worker3, Self::Worker2, Self::Worker];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Worker3 => "worker3",
            Self::Worker2 => "worker2",
            Self::Worker => "worker",
        }
    }

    pub const fn v4(self) -> Ipv4Addr {
        Ipv4Addr::new(172, 18, 0, self.host() as u8)
    }

    pub const fn v6(self) -> Ipv6Addr {
        segment_v6(self.host())
    }

    /// Third byte of the IPv4 pod subnet, fourth group of the IPv6 one.
    pub const fn subnet(self) -> u8 {
        match self {
            Self::Worker3 => 1,
            Self::Worker2 => 3,
            Self::Worker => 2,
        }
    }

    /// The address of the pod with this number on the node.
    pub const fn pod_v4(self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.subnet(), number)
    }

    /// The IPv6 address of the pod with this number; the number reads the same in both families (`.11` and `::11`).
    pub const fn pod_v6(self, number: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x10, 0x244, self.subnet() as u16, 0, 0, 0, decimal_as_hex(number))
    }

    const fn host(self) -> u16 {
        match self {
            Self::Worker3 => 3,
            Self::Worker2 => 4,
            Self::Worker => 5,
        }
    }
}

/// The client outside of the cluster, on the nodes' segment.
pub const OUTSIDE_V4: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 100);
/// See [`OUTSIDE_V4`].
pub const OUTSIDE_V6: Ipv6Addr = segment_v6(0x100);
/// The segment's gateway: the bridge itself. Nothing is behind it.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);
/// See [`GATEWAY_V4`].
pub const GATEWAY_V6: Ipv6Addr = segment_v6(1);

/// hostPort of pod `frontend` on worker3, TCP and UDP.
pub const HOST_PORT: u16 = 9088;
/// Number of the `frontend` pods in their nodes' subnets.
pub const FRONTEND: u8 = 9;
/// Number of the `dns` pods.
pub const DNS: u8 = 11;
/// Number of the `client` pods.
pub const CLIENT: u8 = 20;

/// Services in kube-proxy's rules (`tests/cases/lab`).
pub mod service {
    use super::{IpAddr, Ipv4Addr, Ipv6Addr};

    /// `default/frontend:http`, TCP, IPv4, to the three frontend pods.
    pub const FRONTEND_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 48, 151));
    /// Its and `default/dual:http`'s port.
    pub const HTTP_PORT: u16 = 8088;
    pub const FRONTEND_NODE_PORT: u16 = 30080;
    /// `default/dual:http`, TCP, both families, to the three frontend pods.
    pub const DUAL_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 200, 27));
    pub const DUAL_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xc81b));
    pub const DUAL_NODE_PORT: u16 = 30120;
    /// `default/udp-np:dns`, UDP, IPv4, to the three dns pods.
    pub const DNS_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 200, 26));
    pub const DNS_PORT: u16 = 53;
    pub const DNS_NODE_PORT: u16 = 30053;
    /// `default/noep:p80`, TCP, IPv4, without endpoints: rejected.
    pub const NO_ENDPOINTS_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 200, 14));
    pub const NO_ENDPOINTS_PORT: u16 = 80;
    pub const NO_ENDPOINTS_NODE_PORT: u16 = 30104;
}

const fn segment_v6(host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfc00, 0xf853, 0xccd, 0xe793, 0, 0, 0, host)
}

/// `11` → `0x11`, so that IPv6 addresses read like the IPv4 ones (0 to 99).
const fn decimal_as_hex(number: u8) -> u16 {
    (number / 10 * 16 + number % 10) as u16
}
