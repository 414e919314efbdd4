//! The kernel, the probe's programs, and conntrack's settings.

use super::facts::{Conntrack, Facts, Trial};
use super::{Backend, Check, Group, Status};

const SUDO: &str = "run it with sudo";

pub fn checks(facts: &Facts, backend: Backend) -> Vec<Check> {
    let mut checks = vec![version(facts), rights(facts), lockdown(facts)];
    if facts.rights.missing.is_empty() {
        checks.extend(pods(facts));
        checks.extend([types(facts), programs(facts), interfaces(facts)]);
        checks.extend([netfilter(facts, backend), fentry(facts, backend), kprobe(facts, backend)]);
        checks.extend([ctnetlink(facts, backend), drops(facts), resets(facts)]);
    } else {
        let text = "nothing was tried, for want of these capabilities";
        checks.push(Check::new(Group::Probe, "programs", Status::Unknown, text));
    }
    checks.extend(table(&facts.conntrack));
    checks.extend(events(facts, backend));
    checks.extend(accounting(&facts.conntrack));
    checks
}

fn version(facts: &Facts) -> Check {
    Check::new(Group::Kernel, "kernel", Status::Note, format!("Linux {} on {}", facts.kernel, facts.machine))
}

fn rights(facts: &Facts) -> Check {
    let check = |status, text| Check::new(Group::Kernel, "capabilities", status, text);
    if facts.rights.missing.is_empty() {
        return check(Status::Good, "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are there".to_owned());
    }
    check(Status::Bad, format!("this process lacks {}", facts.rights.missing.join(", ")))
        .costs("the probe cannot be loaded, and rules and connections stay hidden")
        .advice(format!("{SUDO}, or give these capabilities to the container"))
}

fn pods(facts: &Facts) -> Option<Check> {
    let missing = &facts.rights.missing_for_pods;
    if missing.is_empty() || !facts.rights.missing.is_empty() {
        return None;
    }
    let text = format!("pods cannot be looked into without {}", missing.join(", "));
    let check = Check::new(Group::Kernel, "pods", Status::Warning, text);
    Some(check.costs("what listens inside a pod that refuses is not told").advice(SUDO))
}

fn lockdown(facts: &Facts) -> Check {
    let check = |status, text: &str| Check::new(Group::Kernel, "lockdown", status, text);
    match facts.lockdown.as_deref() {
        None => check(Status::Note, "no lockdown that the kernel tells of"),
        Some("confidentiality") => check(Status::Bad, "the kernel is locked down for confidentiality")
            .costs("programs may not read kernel memory: neither NAT nor drops can be observed by them")
            .advice("boot with lockdown=integrity, or without Secure Boot's confidentiality mode"),
        Some(mode) => check(Status::Good, &format!("lockdown is {mode}; that lets the probe read")),
    }
}

fn types(facts: &Facts) -> Check {
    let trial = &facts.trials.types;
    of_trial(Group::Kernel, "types", trial, "BTF").unwrap_or_else(|check| {
        check.costs("conntrack hooks and drop reasons cannot run: they need the places of the kernel's members").advice(
            "use a kernel with CONFIG_DEBUG_INFO_BTF and CONFIG_DEBUG_INFO_BTF_MODULES; if nf_conntrack is a module, \
             it must be loaded first",
        )
    })
}

fn programs(facts: &Facts) -> Check {
    let trials = &facts.trials;
    let trial = if trials.maps.works() { &trials.tc } else { &trials.maps };
    of_trial(Group::Probe, "programs", trial, "TC programs and ring buffer").unwrap_or_else(|check| {
        bad(check).costs("watch cannot run").advice(
            "use Linux 5.8 or later (ring buffer) with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF, and check that no \
             seccomp or LSM policy forbids bpf(); before 5.11 also raise RLIMIT_MEMLOCK",
        )
    })
}

fn interfaces(facts: &Facts) -> Check {
    let trials = &facts.trials;
    let check = |status, text: String| Check::new(Group::Probe, "interfaces", status, text);
    let place = &trials.place;
    match (&trials.tcx, &trials.clsact) {
        (Trial::Works(_), Trial::Works(_)) => {
            check(Status::Good, format!("tcx links; clsact works too (tried {place})"))
        }
        (Trial::Works(_), other) => check(Status::Good, format!("tcx links (tried {place}); clsact: {}", other.text())),
        (other, Trial::Works(_)) => {
            check(Status::Good, format!("clsact filters (tried {place}); tcx: {}", other.text()))
                .costs("filters outlive a killed watch until the next start removes them")
        }
        (Trial::Untried(why), _) => check(Status::Unknown, format!("not tried: {why}")),
        (Trial::Fails(tcx), clsact) => {
            check(Status::Bad, format!("neither tcx ({tcx}) nor clsact ({})", clsact.text()))
                .costs("watch cannot run: no packet is seen")
                .advice("use Linux 6.6 or later (tcx), or one with CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF")
        }
    }
}

fn netfilter(facts: &Facts, backend: Backend) -> Check {
    conntrack_hooks(&facts.trials.netfilter, "netfilter", "NETFILTER programs", backend, |check| {
        check.costs("NAT is not observed packet by packet at netfilter's hooks").advice(
            "Linux 6.4 or later has them, with CONFIG_NETFILTER_BPF_LINK and the BPF JIT (net.core.bpf_jit_enable)",
        )
    })
}

fn fentry(facts: &Facts, backend: Backend) -> Check {
    conntrack_hooks(&facts.trials.fentry, "fentry", "fentry programs", backend, |check| {
        check.costs("NAT is not observed where conntrack makes an entry, but for kprobes").advice(
            "needs CAP_SYS_ADMIN where nf_nat and nf_conntrack are modules, their BTF, and a kernel with \
             CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS (arm64: 6.4 or later)",
        )
    })
}

fn kprobe(facts: &Facts, backend: Backend) -> Check {
    let check = conntrack_hooks(&facts.trials.kprobe, "kprobe", "kprobes", backend, |check| {
        check
            .costs("NAT is not observed where conntrack makes an entry")
            .advice("needs CAP_SYS_ADMIN, CONFIG_KPROBES and the symbols of nf_nat and nf_conntrack")
    });
    if backend != Backend::Kprobe {
        return check;
    }
    check.costs("connections that come by an interrupt of another eBPF program or kprobe may be told without their NAT")
}

/// What `watch` falls back to; what that costs is said where it does.
fn ctnetlink(facts: &Facts, backend: Backend) -> Check {
    let check = conntrack_hooks(&facts.trials.ctnetlink, "ctnetlink", "conntrack's events", backend, |check| {
        check
            .costs("what conntrack did is not told afterwards either")
            .advice("needs CAP_NET_ADMIN and CONFIG_NF_CT_NETLINK (module nf_conntrack_netlink)")
    });
    if backend != Backend::Ctnetlink {
        return check;
    }
    check.costs("NAT is told some milliseconds late, and only of connections that conntrack let through")
}

/// Where programs observe conntrack, it is only noted that others would not.
fn conntrack_hooks(
    trial: &Trial,
    id: &'static str,
    name: &str,
    backend: Backend,
    explain: impl FnOnce(Check) -> Check,
) -> Check {
    of_trial(Group::Probe, id, trial, name).unwrap_or_else(|mut check| {
        let other = match backend {
            Backend::Netfilter => "NETFILTER programs run",
            Backend::Fentry => "fentry programs run",
            Backend::Kprobe => "kprobes run",
            Backend::Ctnetlink | Backend::None => return explain(check),
        };
        check.status = Status::Note;
        check.text += &format!("; not needed: {other}");
        check
    })
}

fn drops(facts: &Facts) -> Check {
    of_trial(Group::Probe, "drops", &facts.trials.drops, "drops with the kernel's reason").unwrap_or_else(|check| {
        check
            .costs("a packet that the kernel drops shows as silence, without the reason")
            .advice("Linux 5.17 or later with BTF tells reasons")
    })
}

fn resets(facts: &Facts) -> Check {
    of_trial(Group::Probe, "resets", &facts.trials.resets, "resets of this node's TCP").unwrap_or_else(|check| {
        let mut check = check.costs("a reset that this node sends is seen only as a packet");
        check.status = check.status.min(Status::Note);
        check
    })
}

fn table(conntrack: &Conntrack) -> Option<Check> {
    let check = |status, text: String| Check::new(Group::Conntrack, "table", status, text);
    let (Some(count), Some(max)) = (conntrack.count, conntrack.max) else {
        let check =
            check(Status::Unknown, "conntrack's settings are not there: it is not loaded in this kernel".to_owned());
        return Some(
            check
                .costs("without conntrack there is no NAT to observe; kube-proxy and portmap load it")
                .advice("look again when the node has pods, or load nf_conntrack"),
        );
    };
    let share = count.saturating_mul(100).checked_div(max).unwrap_or(0);
    let text = format!("{count} of {max} entries ({share} %)");
    if share >= 80 {
        return Some(
            check(Status::Warning, text)
                .costs("when the table is full, the kernel drops the first packets of new connections")
                .advice("raise net.netfilter.nf_conntrack_max, and look for who opens so many connections"),
        );
    }
    let slow = conntrack.buckets.is_some_and(|buckets| buckets > 0 && max / buckets > 8);
    let text = match (conntrack.buckets, slow) {
        (Some(buckets), true) => format!("{text}; only {buckets} buckets for them: a full table would be slow"),
        (Some(buckets), false) => format!("{text}, {buckets} buckets"),
        (None, _) => text,
    };
    Some(check(if slow { Status::Note } else { Status::Good }, text))
}

fn events(facts: &Facts, backend: Backend) -> Option<Check> {
    let check = |status, text: &str| Check::new(Group::Conntrack, "events", status, text);
    Some(match facts.conntrack.events? {
        0 => {
            let off = "net.netfilter.nf_conntrack_events is 0: conntrack tells nobody of its entries";
            if matches!(backend, Backend::Netfilter | Backend::Fentry | Backend::Kprobe) {
                check(Status::Note, off)
            } else {
                check(Status::Warning, off)
                    .costs("NAT cannot be observed by conntrack's events")
                    .advice("set net.netfilter.nf_conntrack_events to 1 or 2")
            }
        }
        1 => check(Status::Good, "net.netfilter.nf_conntrack_events is 1: events are always there"),
        _ => check(Status::Good, "net.netfilter.nf_conntrack_events is 2: events while somebody listens"),
    })
}

fn accounting(conntrack: &Conntrack) -> Option<Check> {
    let check = |status, text: &str| Check::new(Group::Conntrack, "accounting", status, text);
    Some(match conntrack.acct? {
        0 => check(
            Status::Note,
            "net.netfilter.nf_conntrack_acct is 0: conntrack counts no bytes; the probe does itself",
        ),
        _ => check(Status::Good, "conntrack counts packets and bytes"),
    })
}

/// Good, or a warning still to be explained. `what` begins the sentence.
fn of_trial(group: Group, id: &'static str, trial: &Trial, what: &str) -> Result<Check, Check> {
    match trial {
        Trial::Works(how) if how.is_empty() => Ok(Check::new(group, id, Status::Good, what)),
        Trial::Works(how) => Ok(Check::new(group, id, Status::Good, format!("{what}: {how}"))),
        Trial::Fails(why) => Err(Check::new(group, id, Status::Warning, format!("{what}: {why}"))),
        Trial::Untried(why) => Ok(Check::new(group, id, Status::Unknown, format!("{what}: not tried, {why}"))),
    }
}

fn bad(mut check: Check) -> Check {
    check.status = Status::Bad;
    check
}
