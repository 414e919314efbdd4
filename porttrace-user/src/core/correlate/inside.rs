//! A connection told twice: as the node saw it, and as the pod saw it in its own network namespace, joined where the one hands
//! the packet to the other.

use super::flow::{Flow, Way};
use super::judge::{Outcome, Refuser};
use super::sight::Sight;
use super::story::{Certainty, Line, Story, What};
use crate::core::diagnose::Finding;
use crate::core::model::flow::Tuple;
use crate::core::model::interfaces::Interfaces;
use crate::core::model::pods::PodSockets;
use crate::core::model::trace::Verdict;
use porttrace_ebpf::Kind;

/// One connection, judged and told.
#[derive(Clone, Debug)]
pub struct Report {
    pub flow: Flow,
    pub story: Story,
    pub outcome: Outcome,
    /// Why it failed, where a finding explains it.
    pub finding: Option<Finding>,
    /// The same connection inside the pod that it was sent to, where that was followed.
    pub inside: Option<Box<Inside>>,
}

/// What the pod saw of a connection. Times of its story count from the node's first sighting.
#[derive(Clone, Debug)]
pub struct Inside {
    /// The pod's name, or that of its network namespace.
    pub name: String,
    /// Inode number of the namespace.
    pub netns: u32,
    pub interfaces: Interfaces,
    /// What of the pod's part of the way would have been seen.
    pub sight: Sight,
    pub flow: Flow,
    pub story: Story,
    pub outcome: Outcome,
}

impl Inside {
    /// Whether the cause of a failure is in the pod and is not what listens there: its own rules, whom it passes on to, or that it
    /// cannot answer.
    pub fn explains(&self) -> bool {
        let passes_on = self.flow.dnat().flatten().is_some();
        let refuses = matches!(self.outcome, Outcome::Refused { .. }) && !refuses_itself(self);
        let cannot_answer = matches!(self.story.answer_end, Some(Verdict::Dropped { .. } | Verdict::Rejected { .. }));
        passes_on || refuses || cannot_answer || matches!(self.outcome, Outcome::Dropped { .. })
    }

    /// Counts the story's times from `node`'s first sighting.
    pub fn timed_by(mut self, node: &Flow) -> Self {
        for line in &mut self.story.lines {
            line.offset_ns = line.offset_ns.map(|ns| (ns + self.flow.start_ns).saturating_sub(node.start_ns));
        }
        self
    }
}

impl Report {
    /// All lines, the pod's (with whose they are) where the request was handed over: before what came back.
    pub fn lines(&self) -> Vec<(&Line, Option<&Inside>)> {
        let outside = &self.story.lines;
        let inside = self.inside.as_deref();
        let back = outside.iter().position(comes_back).unwrap_or(outside.len());
        let pods =
            inside.into_iter().flat_map(|inside| inside.story.lines.iter().map(move |line| (line, Some(inside))));
        let (there, back) = outside.split_at(back);
        let of_node = |line| (line, None);
        there.iter().map(of_node).chain(pods).chain(back.iter().map(of_node)).collect()
    }
}

fn comes_back(line: &Line) -> bool {
    matches!(line.what, What::Packet { way: Way::Reply, .. } | What::Drop { way: Way::Reply, .. })
}

/// The tuple under which a connection's request leaves this node, and so opens the connection that a pod sees: after all NAT, as
/// conntrack says or as the packet that left showed it. `None`: it never left.
pub fn tuple_outside(flow: &Flow) -> Option<Tuple> {
    let left = flow.seen(Way::Request).filter(|seen| seen.event.kind == Kind::TcEgress).last()?;
    flow.reply.map(Tuple::inverted).or(left.event.packet)
}

/// Whether the pod's own stack refused, and no rule of the pod: nothing listens there, then.
pub fn refuses_itself(inside: &Inside) -> bool {
    let end = inside.story.branch.as_ref().map(|branch| &branch.verdict);
    match inside.outcome {
        Outcome::Refused { by: Refuser::ThisNode, .. } => !matches!(end, Some(Verdict::Rejected { .. })),
        Outcome::Refused { by: Refuser::Unseen, .. } => matches!(end, Some(Verdict::Delivered { .. })),
        _ => false,
    }
}

/// Says at the end of the pod's lines what listens there.
pub fn note_listeners(inside: &mut Inside, sockets: &PodSockets) {
    let asked = inside.flow.destination();
    let proto = inside.flow.original.proto;
    let Some(ports) = sockets.ports(proto, asked.ip()) else { return };
    let said: Vec<String> = ports.iter().take(4).map(|(port, process)| listener(*port, *process)).collect();
    let text = match said.as_slice() {
        [] => format!("nothing listens here on any {proto} port"),
        _ if ports.iter().any(|(port, _)| *port == asked.port()) => {
            format!("something listens on {proto} port {} here now", asked.port())
        }
        said => format!("nothing listens on {proto} port {} here, but on {}", asked.port(), said.join(", ")),
    };
    inside.story.lines.push(Line { offset_ns: None, certainty: Certainty::Observed, what: What::Note { text } });
}

fn listener(port: u16, process: Option<&str>) -> String {
    process.map_or_else(|| port.to_string(), |process| format!("{port} ({process})"))
}

#[cfg(test)]
mod tests {
    use super::super::flow::{ACK, RST, SYN};
    use super::super::judge::judge;
    use super::super::story::tell;
    use super::super::tests::{FROM_POD, MS, TO_POD, event, interfaces, refused, reported, tuple};
    use super::super::{Correlator, Limits};
    use super::*;
    use crate::core::model::flow::Proto;
    use crate::core::model::state::Socket;

    /// What the pod's probe saw of the founding story, 6 µs after the SYN left the node for it.
    fn in_the_pod() -> Flow {
        let mut pod = Correlator::new([8081], Limits::default());
        pod.push(event(11_000, Kind::TcIngress, 2, TO_POD, SYN));
        pod.push(event(12_000, Kind::LocalIn, 2, TO_POD, SYN));
        pod.push(event(20_000, Kind::TcEgress, 2, FROM_POD, RST | ACK));
        assert!(pod.opened_by(tuple(FROM_POD)).is_none(), "it was opened the other way round");
        pod.opened_by(tuple(TO_POD)).expect("the pod saw it").clone()
    }

    fn inside() -> Inside {
        let flow = in_the_pod();
        let story = tell(&flow, None, &interfaces(), false);
        let outcome = judge(&flow, &interfaces());
        Inside {
            name: "frontend".into(),
            netns: 7,
            interfaces: interfaces(),
            sight: Sight::WHOLE,
            flow,
            story,
            outcome,
        }
    }

    #[test]
    fn the_pods_lines_stand_between_the_way_there_and_the_way_back_by_the_nodes_clock() {
        let flow = reported(refused(), 200 * MS);
        assert_eq!(tuple_outside(&flow), Some(tuple(TO_POD)));
        let story = tell(&flow, None, &interfaces(), false);
        let outcome = judge(&flow, &interfaces());
        let inside = Some(Box::new(inside().timed_by(&flow)));
        let report = Report { flow, story, outcome, finding: None, inside };
        let lines = report.lines();
        let packets = lines.iter().filter(|(line, _)| matches!(line.what, What::Packet { .. }));
        let told: Vec<_> = packets.map(|(line, inside)| (line.offset_ns.unwrap_or(0), inside.is_some())).collect();
        // Node in and out, pod in and out, node in and out.
        let expected = [(0, false), (4_000, false), (10_000, true), (19_000, true), (30_000, false), (35_000, false)];
        assert_eq!(told, expected);
    }

    #[test]
    fn a_packet_that_never_left_opens_nothing_elsewhere() {
        let flow = reported(refused().into_iter().take(3).collect(), 2_000 * MS);
        assert_eq!(tuple_outside(&flow), None);
    }

    #[test]
    fn what_listens_is_noted_where_the_pod_itself_refused() {
        let mut inside = inside();
        assert!(refuses_itself(&inside));
        let note = |inside: &Inside| match inside.story.lines.last().map(|line| line.what.clone()) {
            Some(What::Note { text }) => text,
            other => panic!("{other:?}"),
        };
        let pod = "10.244.1.9".parse().expect("an address");
        let mut sockets = PodSockets::default();
        sockets.insert([pod], &[]);
        note_listeners(&mut inside, &sockets);
        assert_eq!(note(&inside), "nothing listens here on any tcp port");
        let process = Some("nginx/7".to_owned());
        sockets.insert([pod], &[Socket { proto: Proto::Tcp, address: pod, port: 80, v6only: false, process }]);
        note_listeners(&mut inside, &sockets);
        assert_eq!(note(&inside), "nothing listens on tcp port 8081 here, but on 80 (nginx/7)");
    }
}
