//! What an event changes about a connection: that it is answered, when its outcome is known, that it ends.

use super::Limits;
use super::flow::{End, FIN, Flow, RST, Stage, Way};
use crate::core::model::event::Event;
use porttrace_ebpf::Kind;

/// What is to be done about it.
pub(super) enum Change {
    None,
    DecideBy(u64),
    Ended(End),
}

/// What an event means for the flow's stage: an answer, a refusal, a drop or an end.
pub(super) fn react(flow: &mut Flow, event: &Event, way: Way, limits: &Limits) -> Change {
    let answer = match event.kind {
        Kind::IcmpError => true,
        Kind::TcIngress | Kind::TcEgress => way == Way::Reply || (flow.is_tcp() && event.l4_flags & RST != 0),
        _ => false,
    };
    flow.answered |= answer;
    if let Some(end) = end_of(flow, event, way) {
        match flow.stage {
            Stage::Ended => return Change::None,
            Stage::Unanswered if answer => flow.end = Some(end),
            Stage::Unanswered | Stage::Reported => return Change::Ended(end),
            Stage::Open | Stage::Late => flow.end = Some(merge(flow.end, end)),
        }
    }
    let by = event.time_ns + limits.grace_ns;
    match flow.stage {
        Stage::Unanswered if answer => {
            flow.stage = Stage::Late;
            Change::DecideBy(by)
        }
        Stage::Open if answer || matches!(event.kind, Kind::Dropped | Kind::ResetSent | Kind::Destroyed) => {
            // The first of them counts.
            if by < flow.due_at || flow.due_at < event.time_ns { Change::DecideBy(by) } else { Change::None }
        }
        _ => Change::None,
    }
}

fn end_of(flow: &Flow, event: &Event, way: Way) -> Option<End> {
    let bytes = (event.orig_bytes + event.reply_bytes > 0).then_some((event.orig_bytes, event.reply_bytes));
    let tcp_end = flow.is_tcp()
        && matches!(event.kind, Kind::TcIngress | Kind::TcEgress)
        && event.packet.is_some()
        && (event.l4_flags & RST != 0 || (event.l4_flags & FIN != 0 && way == Way::Reply));
    (event.kind == Kind::Destroyed || tcp_end).then_some(End {
        at_ns: event.time_ns,
        reset: event.l4_flags & RST != 0,
        bytes,
    })
}

fn merge(earlier: Option<End>, later: End) -> End {
    match earlier {
        Some(earlier) => {
            End { at_ns: later.at_ns, reset: earlier.reset || later.reset, bytes: later.bytes.or(earlier.bytes) }
        }
        None => later,
    }
}
