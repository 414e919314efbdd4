//! What the probe is told to do, and what is said of it.

use super::args::{Args, BackendChoice, ProtoChoice, TcChoice};
use porttrace_user::collect::probe::{Backend, ConntrackBackend, Lost, ProbeConfig, ProbeInfo, Protos, TcMode};
use porttrace_user::core::correlate::sight::Sight;
use porttrace_user::core::quantity::count;
use std::time::Duration;

/// What runs, for the header; `captures`: since when all is captured, or `None` where that waits for the rules.
pub fn probes_sentence(info: &ProbeInfo, captures: Option<Duration>) -> String {
    let conntrack = match info.conntrack_backend {
        ConntrackBackend::None => "not observed".to_owned(),
        backend => format!("by {backend}"),
    };
    let since = match captures {
        Some(after) => format!("capturing after {} ms", after.as_millis()),
        None => "capturing once the rules are read".to_owned(),
    };
    format!("TC ({}) on {}; conntrack {conntrack}; {since}", tc_name(info.tc), count(info.interfaces, "interface"),)
}

/// Lost events by reason, only those that occurred.
pub fn reasons(lost: Lost) -> Vec<(String, u64)> {
    [("ring buffer full", lost.ring_full), ("conntrack's queue full", lost.conntrack_full)]
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(reason, count)| (reason.to_owned(), count))
        .collect()
}

/// The node's probe as the arguments want it.
pub fn probe_config(args: &Args) -> ProbeConfig {
    let protos = match args.proto {
        ProtoChoice::All => Protos::ALL,
        one => Protos { tcp: one == ProtoChoice::Tcp, udp: one == ProtoChoice::Udp, sctp: one == ProtoChoice::Sctp },
    };
    let backend = match args.conntrack_backend {
        BackendChoice::Auto => Backend::Auto,
        BackendChoice::Netfilter => Backend::Netfilter,
        BackendChoice::Kprobe => Backend::Kprobe,
        BackendChoice::Ctnetlink => Backend::Ctnetlink,
        BackendChoice::None => Backend::TcOnly,
    };
    ProbeConfig {
        protos,
        backend,
        tc: match args.tc {
            TcChoice::Auto => None,
            TcChoice::Tcx => Some(TcMode::Tcx),
            TcChoice::Clsact => Some(TcMode::Clsact),
        },
        ring_bytes: args.buffer,
        // Only the whole story shows them.
        data: args.verbose > 0,
        kernel_log: args.verbose > 1,
        ..ProbeConfig::new(args.ports.iter().copied())
    }
}

const fn tc_name(mode: TcMode) -> &'static str {
    match mode {
        TcMode::Tcx => "tcx",
        TcMode::Clsact => "clsact",
    }
}

/// What is seen with a backend of a packet's way behind the rules.
pub const fn sight(backend: ConntrackBackend) -> Sight {
    match backend {
        ConntrackBackend::Netfilter => Sight::WHOLE,
        // Only where conntrack is in use, by what it confirms.
        ConntrackBackend::Kprobe | ConntrackBackend::Ctnetlink => Sight { delivery: false, rewritten: true },
        ConntrackBackend::None => Sight { delivery: false, rewritten: false },
    }
}
