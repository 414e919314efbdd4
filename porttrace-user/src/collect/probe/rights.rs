//! The capabilities that loading and attaching need.

use super::ProbeError;

const NET_ADMIN: u32 = 12;
const SYS_PTRACE: u32 = 19;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

/// Capabilities that the calling thread does not have.
pub struct Lacking {
    /// Without these the probe does not start.
    pub needed: Vec<&'static str>,
    /// Without these the insides of pods stay hidden.
    pub for_pods: Vec<&'static str>,
}

/// Names what is missing in one sentence.
pub fn check() -> Result<(), ProbeError> {
    match lacking().needed {
        names if names.is_empty() => Ok(()),
        names => Err(ProbeError::Rights { missing: names.join(", ") }),
    }
}

/// What is missing; CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON. Where the mask cannot be read nothing counts as
/// missing: the kernel will say no itself.
pub fn lacking() -> Lacking {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let mask = effective(&status);
    let pods = [(SYS_ADMIN, "CAP_SYS_ADMIN"), (SYS_PTRACE, "CAP_SYS_PTRACE")];
    let for_pods = pods.into_iter().filter(|(bit, _)| mask >> bit & 1 == 0).map(|(_, name)| name).collect();
    Lacking { needed: missing(mask), for_pods }
}

/// The mask `CapEff`; an unreadable one counts as full, the kernel will say no itself.
fn effective(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(u64::MAX)
}

fn missing(mask: u64) -> Vec<&'static str> {
    let has = |capability: u32| mask >> capability & 1 == 1;
    let mut names = Vec::new();
    if !has(BPF) && !has(SYS_ADMIN) {
        names.push("CAP_BPF");
    }
    if !has(NET_ADMIN) {
        names.push("CAP_NET_ADMIN");
    }
    if !has(PERFMON) && !has(SYS_ADMIN) {
        names.push("CAP_PERFMON");
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sys_admin_stands_for_bpf_and_perfmon() {
        assert_eq!(missing(effective("Name:\tx\nCapEff:\t0000000000000000\n")).len(), 3);
        assert_eq!(missing(1 << SYS_ADMIN), ["CAP_NET_ADMIN"]);
        assert!(missing(effective("CapEff:\t000001ffffffffff\n")).is_empty());
        assert_eq!(missing(1 << BPF | 1 << NET_ADMIN), ["CAP_PERFMON"]);
    }
}
