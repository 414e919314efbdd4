//! A path as it is written down on the way: rules and routes by number, rewrites by what is new. A thousand branches are walked
//! far more often than they are read, so names are looked up and counted only when a path is told as [`Hop`]s.

use super::flow::Tuple;
use super::name::{Name, name};
use super::rules::{Policy, Rule, Target};
use super::trace::{Action, Chains, Hook, Hop, Manip, Place, Route, RouteKind, RuleRef};
use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

/// What the numbers in steps stand for.
#[derive(Debug, Default)]
pub struct Lists {
    pub tables: Vec<Arc<Chains>>,
    pub routes: Vec<Arc<RouteWords>>,
}

/// A route in words.
#[derive(Debug)]
pub struct RouteWords {
    pub table: Name,
    /// As `ip route` prints it.
    pub text: Name,
    /// Interface and gateway of each next hop.
    pub ways: Vec<(Option<Name>, Option<IpAddr>)>,
}

/// A rule by numbers: its table among [`Lists::tables`], its chain there, and its 1-based position; 0 is the chain's policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleAt {
    pub table: u16,
    pub chain: u32,
    pub number: u32,
}

/// What a rule did.
#[derive(Clone, Debug)]
pub enum Act {
    /// What its target says, or the policy.
    Target,
    Mark(u32),
    ConnMark(u32),
    Said(Box<Action>),
}

/// Which of a route's next hops was taken.
#[derive(Clone, Copy, Debug)]
pub enum Taken {
    None,
    Loopback,
    Way(u16),
}

/// One step. What it leaves out follows from the steps before it.
#[derive(Clone, Debug)]
pub enum Step {
    Receive {
        interface: Name,
    },
    LocalSend,
    /// The sender had not chosen its source address.
    Source {
        address: IpAddr,
    },
    Conntrack {
        state: &'static str,
        entry: Option<Box<str>>,
    },
    Rule {
        hook: Hook,
        at: RuleAt,
        act: Act,
    },
    /// The half that is new.
    Rewrite {
        hook: Hook,
        what: Manip,
        address: IpAddr,
        port: u16,
        by: Option<RuleAt>,
    },
    /// `route`: its number among [`Lists::routes`].
    Route {
        kind: RouteKind,
        route: Option<u32>,
        taken: Taken,
    },
    Transmit {
        interface: Name,
        gateway: Option<IpAddr>,
    },
    Deliver {
        listener: Option<Box<str>>,
    },
    /// The reply of the same connection, as it leaves; it arrives as the packet turned round.
    Reply(Tuple),
    /// The same where it arrives otherwise: as it arrives, and as it leaves.
    OtherReply(Box<[Tuple; 2]>),
    Note(Cow<'static, str>),
}

impl Lists {
    /// The rule at a place; the place alone where there is none.
    pub fn rule(&self, at: RuleAt) -> Option<RuleRef> {
        let place = Place::new(self.tables.get(usize::from(at.table))?, at.chain)?;
        Some(RuleRef::new(place, Some(at.number)))
    }

    /// Puts steps into words; `tuple` is what the packet looks like before them, and then after them.
    pub fn tell(&self, steps: &[Step], tuple: &mut Tuple) -> Vec<Hop> {
        let mut hops = Vec::with_capacity(steps.len() + 1);
        for step in steps {
            self.tell_one(step, tuple, &mut hops);
        }
        hops
    }

    fn tell_one(&self, step: &Step, tuple: &mut Tuple, hops: &mut Vec<Hop>) {
        let hop = match step {
            Step::Receive { interface } => Hop::Receive { interface: interface.clone(), tuple: *tuple },
            Step::LocalSend => Hop::LocalSend { tuple: *tuple },
            Step::Source { address } => {
                tuple.src = *address;
                Hop::Note { text: format!("source address {address} is chosen for the sender").into() }
            }
            Step::Conntrack { state, entry } => {
                Hop::Conntrack { state, entry: entry.as_deref().map(ToOwned::to_owned) }
            }
            Step::Rule { hook, at, act } => {
                let Some(rule) = self.rule(*at) else { return };
                let action = self.action(*at, &rule, act);
                Hop::Rule { hook: *hook, rule, action }
            }
            Step::Rewrite { hook, what, address, port, by } => {
                let before = *tuple;
                match what {
                    Manip::Snat => (tuple.src, tuple.sport) = (*address, *port),
                    Manip::Dnat => (tuple.dst, tuple.dport) = (*address, *port),
                }
                let by = by.and_then(|by| self.rule(by));
                Hop::Rewrite { hook: *hook, what: *what, before, after: *tuple, by }
            }
            Step::Route { kind, route, taken } => Hop::Route {
                decision: self.route(
                    *kind,
                    route.and_then(|at| self.routes.get(at as usize).map(|route| &**route)),
                    *taken,
                    tuple.dst,
                ),
            },
            Step::Transmit { interface, gateway } => {
                Hop::Transmit { interface: interface.clone(), gateway: *gateway, tuple: *tuple }
            }
            Step::Deliver { listener } => {
                Hop::Deliver { tuple: *tuple, listener: listener.as_deref().map(ToOwned::to_owned) }
            }
            Step::Reply(end) => return reply(tuple.inverted(), *end, hops),
            Step::OtherReply(both) => return reply(both[0], both[1], hops),
            Step::Note(text) => Hop::Note { text: text.clone() },
        };
        hops.push(hop);
    }

    fn action(&self, at: RuleAt, rule: &RuleRef, act: &Act) -> Action {
        let chains = self.tables.get(usize::from(at.table));
        match act {
            Act::Mark(mark) => Action::Mark { mark: *mark },
            Act::ConnMark(mark) => Action::ConnMark { mark: *mark },
            Act::Said(action) => (**action).clone(),
            Act::Target => match rule.rule() {
                Some(rule) => chains.map_or(Action::Continue, |chains| of_target(rule, chains)),
                None => match chains.and_then(|chains| chains.chain(at.chain)?.policy) {
                    Some(Policy::Drop) => Action::Drop,
                    Some(Policy::Accept) | None => Action::Accept,
                },
            },
        }
    }

    fn route(&self, kind: RouteKind, route: Option<&RouteWords>, taken: Taken, dst: IpAddr) -> Route {
        let (interface, gateway) = match taken {
            Taken::None => (None, None),
            Taken::Loopback => (Some(name!("lo")), None),
            Taken::Way(at) => route.and_then(|route| route.ways.get(usize::from(at))).cloned().unwrap_or_default(),
        };
        let (table, route) = route.map(|route| (route.table.clone(), route.text.clone())).unwrap_or_default();
        Route { dst, kind, interface, gateway, table, route }
    }
}

/// What a target does, where that does not depend on the packet.
fn of_target(rule: &Rule, chains: &Arc<Chains>) -> Action {
    let chain = |at: &u32| Place::new(chains, *at);
    match &rule.target {
        Target::Jump(to) => chain(to).map_or(Action::Continue, |chain| Action::Jump { chain }),
        Target::Goto(to) => chain(to).map_or(Action::Continue, |chain| Action::Goto { chain }),
        Target::Accept => Action::Accept,
        Target::Drop => Action::Drop,
        Target::Return => Action::Return,
        Target::Reject(with) => Action::Reject { with: with.clone() },
        Target::Dnat(range) => Action::Dnat { to: range.to_string().into() },
        Target::Snat(range) => Action::Snat { to: range.to_string().into() },
        Target::Redirect(range) => Action::Redirect { to: range.to_string().into() },
        Target::Masquerade(_) => Action::Masquerade,
        Target::Notrack => Action::Notrack,
        Target::Other(text) | Target::Stop(text) | Target::Missing(text) => Action::Other { target: text.clone() },
        Target::None
        | Target::Mark(_)
        | Target::ConnMark(_)
        | Target::Netmap(_)
        | Target::Ttl(_)
        | Target::Tos { .. }
        | Target::Tproxy(_)
        | Target::Native(_) => Action::Continue,
    }
}

/// What NAT does to a reply: the source half first, on its way in, then the destination half.
fn reply(before: Tuple, end: Tuple, hops: &mut Vec<Hop>) {
    let middle = Tuple { dst: end.dst, dport: end.dport, ..before };
    for (before, after) in [(before, middle), (middle, end)] {
        if before != after {
            hops.push(Hop::ReplyRewrite { before, after });
        }
    }
}
