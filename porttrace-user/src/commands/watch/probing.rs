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

/// Something that did not come, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Its name in JSON.
    pub name: &'static str,
    pub count: u64,
    what: &'static str,
    why: &'static str,
}

impl Loss {
    /// While it may still become more.
    pub fn so_far(&self) -> String {
        format!("{} so far: {} ({})", self.what, self.count, self.why)
    }

    pub fn sentence(&self) -> String {
        format!("{} {}: {}", self.count, self.what, self.why)
    }
}

/// What was lost, only what occurred.
pub fn losses(lost: Lost) -> Vec<Loss> {
    let events = |why, count| Loss { name: why, count, what: "events lost", why };
    let left_out = Loss {
        name: "hooks left out",
        count: lost.left_out,
        what: "hooks left out",
        why: "they were running on that CPU already; for packets of watched ports or others",
    };
    let all =
        [events("ring buffer full", lost.ring_full), events("conntrack's queue full", lost.conntrack_full), left_out];
    all.into_iter().filter(|loss| loss.count > 0).collect()
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
        BackendChoice::Fentry => Backend::Fentry,
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
        ConntrackBackend::Fentry | ConntrackBackend::Kprobe | ConntrackBackend::Ctnetlink => {
            Sight { delivery: false, rewritten: true }
        }
        ConntrackBackend::None => Sight { delivery: false, rewritten: false },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_and_what_was_left_out_are_told_apart() {
        assert_eq!(losses(Lost::default()), []);
        let told = losses(Lost { ring_full: 12, conntrack_full: 0, left_out: 2 });
        let sentences: Vec<String> = told.iter().map(Loss::sentence).collect();
        let why = "they were running on that CPU already; for packets of watched ports or others";
        assert_eq!(sentences, ["12 events lost: ring buffer full".to_owned(), format!("2 hooks left out: {why}")]);
        assert_eq!(told[0].so_far(), "events lost so far: 12 (ring buffer full)");
        assert_eq!(told[1].so_far(), format!("hooks left out so far: 2 ({why})"));
    }
}
