//! What rules do.

use super::name::Name;
use super::native::Statements;
use super::rules::Net;
use std::fmt;
use std::net::IpAddr;

/// What a rule does. Chains are indices into the table's `chains`.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// No `-j`: the rule only counts.
    None,
    Accept,
    Drop,
    Return,
    Jump(u32),
    Goto(u32),
    /// The kind of answer, as iptables writes it.
    Reject(Name),
    Dnat(Box<NatRange>),
    Snat(Box<NatRange>),
    Masquerade(Box<NatRange>),
    Redirect(Box<NatRange>),
    Netmap(Box<Net>),
    Mark(MarkOp),
    ConnMark(ConnMarkOp),
    /// `-j NOTRACK`, `-j CT --notrack`.
    Notrack,
    /// TTL, HL.
    Ttl(TtlOp),
    /// TOS, DSCP: `tos = (tos & !mask) ^ value`.
    Tos {
        value: u8,
        mask: u8,
    },
    Tproxy(Box<Tproxy>),
    /// A native rule, which has its matches among its statements.
    Native(Box<Statements>),
    /// Leaves the model: NFQUEUE, QUEUE, SYNPROXY, …
    Stop(Name),
    /// Named, without effect on the path: LOG, TRACE, CT --zone, …
    Other(Name),
    /// Neither a chain of the table nor a target that porttrace knows.
    Missing(Name),
}

/// `--to-destination`, `--to-source`, `--to-ports` with their options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NatRange {
    pub addresses: Option<(Net, Net)>,
    pub ports: Option<(u16, u16)>,
    /// They came by `--to-ports`.
    pub of_ports: bool,
    /// `--to-destination 10.0.0.1:1000-2000/1000`: ports are shifted by their distance to this one.
    pub base_port: Option<u16>,
    /// `--random` or `--random-fully`.
    pub random: bool,
    pub persistent: bool,
}

/// As iptables writes it behind `--to-destination` and `--to-source` (`print_range` in libxt_NAT.c), or behind `--to-ports`, which
/// has no addresses and no colon.
impl fmt::Display for NatRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((low, high)) = self.addresses.as_ref().map(|(low, high)| (low.address(), high.address())) {
            let brackets = if low.is_ipv6() && self.ports.is_some() { ("[", "]") } else { ("", "") };
            write!(f, "{}{low}", brackets.0)?;
            if low != high {
                write!(f, "-{high}")?;
            }
            write!(f, "{}", brackets.1)?;
        }
        if let Some((low, high)) = self.ports {
            write!(f, "{}{low}", if self.of_ports { "" } else { ":" })?;
            if low != high {
                write!(f, "-{high}")?;
            }
        }
        self.base_port.map_or(Ok(()), |base| write!(f, "/{base}"))
    }
}

/// `mark = (mark & !mask) ^ value` (`xt_mark.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkOp {
    pub value: u32,
    pub mask: u32,
}

/// `--ttl-set`, `--ttl-inc`, `--ttl-dec`, and the same for the hop limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TtlOp {
    Set(u8),
    Add(u8),
    Subtract(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnMarkOp {
    Set(MarkOp),
    /// Packet → connection, connection → packet, with the masks of the connection and of the packet.
    Save {
        ct_mask: u32,
        nf_mask: u32,
    },
    Restore {
        ct_mask: u32,
        nf_mask: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tproxy {
    pub on_ip: Option<IpAddr>,
    /// 0: the packet's own destination port.
    pub on_port: u16,
    pub mark: MarkOp,
}
