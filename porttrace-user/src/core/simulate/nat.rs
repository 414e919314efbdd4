//! NAT: which manip a rule sets up, and how a packet of the connection is rewritten (net/netfilter/nf_nat_core.c).

use super::compiled::{BaseChain, Entry};
use super::conn::{CONFIRMED, Conn};
use super::nat_hash::pick;
use super::run::{Next, Run};
use super::walk::{Again, Frame, Walk};
use crate::core::model::flow::{Direction, Family, Tuple};
use crate::core::model::rules::{NatRange, Net, Target};
use crate::core::model::steps::{Act, RuleAt, Step};
use crate::core::model::trace::{Action, Decision, DropReason, Hook, Manip, Verdict};
use std::net::IpAddr;

/// What a NAT target allows: addresses (`None`: unchanged) and the rest of the rule's range.
struct Range<'r> {
    addresses: Option<(IpAddr, IpAddr)>,
    with: &'r NatRange,
}

/// What a rule did and what became of the packet, where its NAT target could not do its work.
pub(super) type Instead = Box<(Act, Verdict)>;

/// `HOOK2MANIP`.
const fn manip_of(hook: Hook) -> Manip {
    if matches!(hook, Hook::Postrouting | Hook::Input) { Manip::Snat } else { Manip::Dnat }
}

fn done(conn: &mut Conn, manip: Manip) -> &mut bool {
    match manip {
        Manip::Snat => &mut conn.src_done,
        Manip::Dnat => &mut conn.dst_done,
    }
}

impl<'s> Run<'s> {
    /// `nf_nat_inet_fn`: one chain after the other while the manip is open, then the rewrite.
    pub(super) fn nat(&mut self, walk: &mut Walk<'s>, chains: &[BaseChain]) -> Next {
        let manip = manip_of(walk.stage.hook);
        if walk.conn.tracked() {
            if !*done(&mut walk.conn, manip) {
                if let Some(base) = chains.get(usize::from(walk.stage.nat)) {
                    walk.frames.push(Frame { table: base.table, chain: base.chain, next: 0 });
                    return Next::Go;
                }
                self.null_binding(walk, manip);
            }
            self.doubt_masquerade(walk);
            self.rewrite(walk, manip);
        }
        walk.stage.entry += 1;
        walk.stage.nat = 0;
        // `nf_nat_ipv4_local_fn`: whatever changed the destination, the way out is looked up again.
        let conn = &walk.conn;
        if walk.stage.hook == Hook::Output && conn.tracked() && destination_changes(conn) {
            return self.reroute(walk);
        }
        Next::Go
    }

    /// A connection that MASQUERADE made is killed when its way out changes (`nf_nat_oif_changed`), also where the address that
    /// it took was the sender's own. The entry does not say who made it: where its address is not the one that MASQUERADE
    /// would take here, both are followed.
    fn doubt_masquerade(&mut self, walk: &mut Walk<'s>) {
        let conn = &walk.conn;
        if walk.stage.hook != Hook::Postrouting || !conn.existed || conn.direction != Direction::Original {
            return;
        }
        let (source, Some(output)) = (conn.reply.dst, walk.output_name()) else { return };
        let own = self.sim.routing.is_local(source) == Some(true);
        let towards = walk.gateway.filter(|_| walk.family() == Family::V4).unwrap_or(walk.tuple.dst);
        if !own || self.sim.config.source_address(output, towards).is_none_or(|here| here == Some(source)) {
            return;
        }
        let text = format!(
            "MASQUERADE made this connection with {source} towards another interface than {output}: then the kernel drops \
             the packet and forgets the connection"
        );
        let mut other = walk.fork();
        other.decide(Decision::Assumed { rule: None, text: text.clone(), taken: true });
        other.again = Some(Box::new(Again::Drop(text.clone())));
        self.later(other);
        walk.decide(Decision::Assumed { rule: None, text, taken: false });
    }

    /// No rule set the manip up: `nf_nat_alloc_null_binding` keeps the tuple, unless its source port is taken.
    fn null_binding(&mut self, walk: &mut Walk<'s>, manip: Manip) {
        if walk.conn.status & CONFIRMED != 0 {
            return;
        }
        *done(&mut walk.conn, manip) = true;
        if manip == Manip::Snat && self.taken(walk, walk.conn.reply) {
            walk.conn.sport_chosen = true;
            walk.note("another connection has this tuple: the kernel chooses another source port");
        }
    }

    /// Whether another conntrack entry owns the tuple (`nf_nat_used_tuple`).
    fn taken(&self, walk: &Walk<'_>, reply: Tuple) -> bool {
        self.sim.config.entry(&reply).flatten().is_some_and(|(entry, _)| walk.replaced.as_deref() != Some(&entry.reply))
    }

    /// `nf_nat_packet`: the packet gets the half of its translated tuple that this hook is for.
    fn rewrite(&mut self, walk: &mut Walk<'s>, manip: Manip) {
        let target = walk.conn.translated();
        let (address, port) = match manip {
            Manip::Snat => (target.src, target.sport),
            Manip::Dnat => (target.dst, target.dport),
        };
        let by = walk.nat_by.take();
        let half = match manip {
            Manip::Snat => (&mut walk.tuple.src, &mut walk.tuple.sport),
            Manip::Dnat => (&mut walk.tuple.dst, &mut walk.tuple.dport),
        };
        if (*half.0, *half.1) != (address, port) {
            (*half.0, *half.1) = (address, port);
            walk.step(Step::Rewrite { hook: walk.stage.hook, what: manip, address, port, by });
        }
    }

    /// Sets up the manip of a NAT target. The error is what the packet gets instead.
    pub(super) fn translate_by(&mut self, walk: &mut Walk<'s>, target: &Target, at: RuleAt) -> Result<Act, Instead> {
        let hook = walk.stage.hook;
        let plain = NatRange::default();
        let mut act = Act::Target;
        let one = |address| Some((address, address));
        let range = match target {
            Target::Dnat(range) | Target::Snat(range) => Range { addresses: ends(range), with: range },
            Target::Masquerade(range) => match self.masquerade(walk, at)? {
                Some(address) => Range { addresses: one(address), with: range },
                None => return Ok(act),
            },
            Target::Redirect(range) => {
                let address = self.redirect(walk, at).map_err(|verdict| Box::new((Act::Target, verdict)))?;
                Range { addresses: one(address), with: range }
            }
            Target::Netmap(net) => {
                let old = if manip_of(hook) == Manip::Snat { walk.tuple.src } else { walk.tuple.dst };
                let new = netmap(net, old);
                act = Act::Said(Box::new(Action::Netmap { to: new.to_string().into() }));
                Range { addresses: one(new), with: &plain }
            }
            _ => return Ok(act),
        };
        let entry = self.sim.entry(self.order, walk.family(), hook, walk.stage.entry.into());
        if !matches!(entry, Some(Entry::Nat(_))) || !walk.conn.tracked() {
            let because = "a NAT target outside a chain of type nat".into();
            return Err(Box::new((act, Verdict::Unknown { because, by: self.sim.rule(at) })));
        }
        let wrong = range.addresses.is_some_and(|(low, _)| Family::of(low) != walk.family());
        if wrong {
            let because = "the target's address is of the other family".into();
            return Err(Box::new((act, Verdict::Unknown { because, by: self.sim.rule(at) })));
        }
        self.set_up(walk, &range, manip_of(hook));
        Ok(act)
    }

    /// `nf_nat_masquerade_ipv4`, `nf_nat_masquerade_ipv6`: the address that the output interface has towards the next hop.
    fn masquerade(&mut self, walk: &mut Walk<'s>, at: RuleAt) -> Result<Option<IpAddr>, Instead> {
        if walk.conn.original.src.is_unspecified() {
            return Ok(None);
        }
        let unknown = |because: &str| {
            Box::new((Act::Target, Verdict::Unknown { because: because.into(), by: self.sim.rule(at) }))
        };
        let Some(output) = walk.output_name() else {
            return Err(unknown("which address MASQUERADE takes is not known without routes"));
        };
        let towards = match walk.family() {
            Family::V4 => walk.gateway.unwrap_or(walk.tuple.dst),
            Family::V6 => walk.tuple.dst,
        };
        match self.sim.config.source_address(output, towards) {
            None => Err(unknown("which address MASQUERADE takes is not known without addresses")),
            Some(None) => {
                Err(Box::new((Act::Target, Verdict::Dropped { reason: DropReason::NoAddress, by: self.sim.rule(at) })))
            }
            Some(found) => Ok(found),
        }
    }

    /// `nf_nat_redirect_ipv4`: loopback for what the node sends, else the first address of the input interface.
    fn redirect(&mut self, walk: &Walk<'_>, at: RuleAt) -> Result<IpAddr, Verdict> {
        let family = walk.family();
        if walk.stage.hook == Hook::Output {
            return Ok(match family {
                Family::V4 => IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
                Family::V6 => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
            });
        }
        let input = walk.input_name().unwrap_or("lo");
        match self.sim.config.first_address(input, walk.tuple.dst) {
            Some(Some(address)) => Ok(address),
            Some(None) => Err(Verdict::Dropped { reason: DropReason::NoAddress, by: self.sim.rule(at) }),
            None => {
                let because = format!("the address of {input} is not part of the state");
                Err(Verdict::Unknown { because, by: self.sim.rule(at) })
            }
        }
    }

    /// `nf_nat_setup_info` → `get_unique_tuple`.
    fn set_up(&mut self, walk: &mut Walk<'s>, range: &Range<'_>, manip: Manip) {
        let old = walk.conn.reply.inverted();
        let mut new = old;
        // "Can't setup nat info for confirmed ct": the rule matches without effect.
        if walk.conn.status & CONFIRMED != 0 {
            return;
        }
        *done(&mut walk.conn, manip) = true;
        let fits = range.addresses.is_none_or(|(low, high)| (low..=high).contains(&old.src));
        let port_fits = range.with.ports.is_none_or(|(low, high)| (low..=high).contains(&old.sport));
        let keeps = manip == Manip::Snat && !range.with.random && fits && port_fits;
        if keeps && !self.taken(walk, old.inverted()) {
            return;
        }
        if let Some(ends) = range.addresses {
            let address = pick(ends, &old, manip, range.with.persistent);
            match manip {
                Manip::Snat => new.src = address,
                Manip::Dnat => new.dst = address,
            }
        }
        if new.proto.has_ports() || range.with.ports.is_none() {
            self.choose_port(walk, &mut new, range.with, manip);
        }
        walk.conn.reply = new.inverted();
    }

    /// The per-protocol half of `get_unique_tuple` and `nf_nat_l4proto_unique_tuple`.
    fn choose_port(&mut self, walk: &mut Walk<'s>, new: &mut Tuple, range: &NatRange, manip: Manip) {
        let port = if manip == Manip::Snat { new.sport } else { new.dport };
        let free = !self.taken(walk, new.inverted());
        let keeps = match range.ports {
            _ if range.random => false,
            Some((low, high)) => range.base_port.is_none() && (low..=high).contains(&port) && (low == high || free),
            None => free,
        };
        if keeps {
            return;
        }
        match (range.ports, manip) {
            // "If it's dst rewrite, can't change port"
            (None, Manip::Dnat) => {}
            (Some((low, high)), Manip::Dnat) => {
                let size = u32::from(high.abs_diff(low)) + 1;
                let offset = match range.base_port {
                    Some(base) => u32::from(port.wrapping_sub(base)) % size,
                    None if range.random && size > 1 => {
                        self.assume(format!(
                            "the kernel chooses a destination port from {low} to {high} at random; {low} is shown"
                        ));
                        0
                    }
                    None => 0,
                };
                new.dport = low.min(high).wrapping_add(offset as u16);
            }
            (Some((low, high)), Manip::Snat) if low == high => new.sport = low,
            (_, Manip::Snat) => {
                walk.conn.sport_chosen = true;
                walk.note("the kernel chooses the source port; the old one is shown");
            }
        }
    }
}

/// The destination of this direction differs from what the packet was sent to.
fn destination_changes(conn: &Conn) -> bool {
    use crate::core::model::flow::Direction::{Original, Reply};
    match conn.direction {
        Original => conn.original.dst != conn.reply.src,
        Reply => conn.reply.dst != conn.original.src,
    }
}

/// The first and the last address that a rule allows.
fn ends(range: &NatRange) -> Option<(IpAddr, IpAddr)> {
    range.addresses.as_ref().map(|(low, high)| (low.address(), high.address()))
}

/// `netmap_tg4`: the network part is the rule's, the host part the packet's.
fn netmap(net: &Net, old: IpAddr) -> IpAddr {
    match (net, old) {
        (Net::V4 { addr, mask }, IpAddr::V4(four)) => IpAddr::V4((addr & mask | four.to_bits() & !mask).into()),
        (Net::V6(both), IpAddr::V6(six)) => IpAddr::V6((both.0 & both.1 | six.to_bits() & !both.1).into()),
        _ => old,
    }
}
