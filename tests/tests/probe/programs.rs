//! Every kernel program is accepted by the verifier of this kernel, and is no bigger than it should be.

use crate::world::{World, config};
use porttrace_tests::bpf::{held_by, usage};
use porttrace_tests::privilege;
use porttrace_user::collect::probe::{Backend, ConntrackBackend, Probe, ProbeError};
use std::collections::BTreeSet;

/// Names as the kernel keeps them: 15 bytes.
const ALWAYS: [&str; 4] = ["tc_egress", "tc_ingress", "tp_drop", "tp_reset"];
const NETFILTER: [&str; 4] = ["nf_after_conntr", "nf_after_dnat", "nf_after_snat", "nf_local_in"];
const FENTRIES: [&str; 3] = ["fe_confirm", "fe_destroy", "fe_nat_setup"];
const KPROBES: [&str; 3] = ["kp_confirm", "kp_destroy", "kp_nat_setup"];

/// The verifier gives up at a million, and its time is part of the start.
const MOST_VERIFIED: u32 = 50_000;

#[test]
fn every_program_is_accepted_and_small() {
    if !privilege::may_run("the probe") {
        return;
    }
    let world = World::new("programs").unwrap();
    let mut ran = 0;
    for (backend, runs, own) in [
        (Backend::Netfilter, ConntrackBackend::Netfilter, &NETFILTER[..]),
        (Backend::Fentry, ConntrackBackend::Fentry, &FENTRIES[..]),
        (Backend::Kprobe, ConntrackBackend::Kprobe, &KPROBES[..]),
    ] {
        // The backend that is asked for must load; the other one is tried.
        let required = config().backend == backend;
        let loaded = world.node.run_in(|| accepted(backend, runs)).unwrap();
        match loaded {
            Ok(names) => {
                let expected: BTreeSet<String> = ALWAYS.iter().chain(own).map(|name| (*name).to_owned()).collect();
                assert!(names.is_superset(&expected), "{names:?} lacks some of {expected:?}");
                ran += 1;
            }
            Err(why) => {
                assert!(!required, "{why}");
                println!("not on this kernel: {why}");
            }
        }
    }
    assert!(ran > 0, "no conntrack backend loads here");
}

/// Names of the programs that this process holds with that backend, after a look at their sizes.
fn accepted(backend: Backend, runs: ConntrackBackend) -> Result<BTreeSet<String>, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    let mut wanted = config();
    wanted.backend = backend;
    let probe = match Probe::start(&wanted) {
        Err(ProbeError::Backend { why, .. }) => return Err(why),
        started => started.unwrap(),
    };
    let info = probe.info();
    assert_eq!(
        (info.conntrack_backend, info.degradations.len()),
        (runs, usize::from(backend == Backend::Kprobe)),
        "{info:?}"
    );
    let programs = usage(&held_by(std::process::id()).unwrap()).unwrap();
    for program in &programs {
        println!("{program}");
        assert!(program.instructions > 0, "{program}");
        assert!(program.verified <= MOST_VERIFIED, "{program}");
    }
    Ok(programs.into_iter().map(|program| program.name).collect())
}
