//! The probe's own programs, loaded and attached for a moment where they meet no packet: what a kernel allows is found out by
//! trying, not by its version.

use super::attach::other_programs;
use super::config::{Backend, Protos, TcMode};
use super::object::{Kernel, chain};
use super::offsets::{KernelTypes, kernel_types};
use super::tc::Attachments;
use super::{ProbeConfig, own_netns, rights};
use crate::core::doctor::facts::{Rights, Trial, Trials};
use nix::sched::{CloneFlags, unshare};
use std::path::Path;
use std::thread;

/// Index of `lo` in every network namespace.
const LOOPBACK: u32 = 1;

/// The capabilities that are missing, by [`rights`].
pub fn capabilities() -> Rights {
    let missing = rights::lacking();
    Rights {
        root: nix::unistd::geteuid().is_root(),
        missing: missing.needed.iter().map(ToString::to_string).collect(),
        missing_for_pods: missing.for_pods.iter().map(ToString::to_string).collect(),
    }
}

/// Tries everything in a network namespace of its own, or on this one's `lo` where none can be made. What was attached is
/// gone when this returns.
pub fn trials() -> Trials {
    let missing = rights::lacking().needed;
    if !missing.is_empty() {
        return Trials {
            place: "nowhere".to_owned(),
            ..all(&Trial::Untried(format!("without {}", missing.join(", "))))
        };
    }
    let tried = thread::spawn(|| {
        let own = unshare(CloneFlags::CLONE_NEWNET).is_ok();
        let place = if own { "in a network namespace of its own" } else { "on lo" };
        Trials { place: place.to_owned(), ..attempt() }
    });
    tried.join().unwrap_or_else(|_| all(&Trial::Untried("the attempt broke off".to_owned())))
}

fn all(trial: &Trial) -> Trials {
    let each = || trial.clone();
    Trials {
        place: String::new(),
        types: each(),
        maps: each(),
        tc: each(),
        tcx: each(),
        clsact: each(),
        netfilter: each(),
        fentry: each(),
        kprobe: each(),
        ctnetlink: each(),
        drops: each(),
        resets: each(),
    }
}

fn attempt() -> Trials {
    let types = kernel_types().map_err(|error| chain(&error));
    let mut trials = all(&Trial::Untried("something before it failed".to_owned()));
    trials.types = match &types {
        Ok(_) => Trial::Works(module_types().to_owned()),
        Err(why) => Trial::Fails(why.clone()),
    };
    let config = ProbeConfig { protos: Protos::ALL, ..ProbeConfig::new([]) };
    let known = types.clone().unwrap_or_default();
    let netns = own_netns().unwrap_or_default();
    let mut kernel = match Kernel::load(&known, netns, &config, true) {
        Ok(kernel) => kernel,
        Err(error) => {
            trials.maps = Trial::Fails(chain(&error));
            return trials;
        }
    };
    trials.maps = Trial::Works(format!("ring buffer of {} MiB, {} tuples", config.ring_bytes >> 20, config.tracked));
    let others = if types.is_ok() { other_programs(&known, Backend::Auto) } else { Vec::new() };
    trials.tc = trial(kernel.load_programs(&others, |_| ()).map_err(|error| chain(&error)), "they load");
    if trials.tc.works() {
        trials.tcx = interface(&kernel, TcMode::Tcx);
        trials.clsact = interface(&kernel, TcMode::Clsact);
    }
    if let Err(why) = &types {
        let untried = Trial::Untried(format!("the kernel's types are not known: {why}"));
        let Trials { netfilter, fentry, kprobe, drops, resets, .. } = &mut trials;
        for place in [netfilter, fentry, kprobe, drops, resets] {
            *place = untried.clone();
        }
        return trials;
    }
    hooks(&mut kernel, &known, &mut trials);
    trials
}

/// Where the types of conntrack come from.
fn module_types() -> &'static str {
    if Path::new("/sys/kernel/btf/nf_conntrack").exists() {
        "the kernel's, and those of the module nf_conntrack"
    } else {
        "the kernel's, nf_conntrack built in"
    }
}

fn hooks(kernel: &mut Kernel, types: &KernelTypes, trials: &mut Trials) {
    trials.netfilter = trial(kernel.attach_netfilter(), "they load, and attach to all hooks");
    trials.fentry = trial(kernel.attach_fentries(), "they load and attach");
    trials.kprobe = trial(kernel.attach_kprobes(), "they load and attach");
    let mut tracepoint = |name: &str, id: Option<u32>| match id {
        Some(_) => trial(kernel.attach_tracepoint(name), ""),
        None => Trial::Fails("this kernel has no such tracepoint".to_owned()),
    };
    trials.drops = match (types.kfree_skb, types.drop_has_reason) {
        (Some(_), false) => Trial::Fails("this kernel drops without a reason (before 5.17)".to_owned()),
        (id, _) => tracepoint("tp_drop", id),
    };
    trials.resets = tracepoint("tp_reset", types.tcp_send_reset);
}

fn interface(kernel: &Kernel, mode: TcMode) -> Trial {
    let attach = || -> Result<(), String> {
        let programs = kernel.classifiers().map_err(|error| chain(&error))?;
        let mut attachments = Attachments::new(Some(mode), programs).map_err(|error| error.to_string())?;
        attachments.attach(LOOPBACK, programs).map_err(|error| error.to_string())
    };
    trial(attach(), "")
}

fn trial(outcome: Result<(), String>, how: &str) -> Trial {
    match outcome {
        Ok(()) => Trial::Works(how.to_owned()),
        // A verifier's log follows on lines of its own: the first one says what failed.
        Err(why) => Trial::Fails(why.lines().next().unwrap_or_default().to_owned()),
    }
}
