//! The capabilities that loading and attaching need.

use super::ProbeError;

const NET_ADMIN: u32 = 12;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

/// Names what is missing in one sentence; CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON.
pub fn check() -> Result<(), ProbeError> {
    let status = std::fs::read_to_string("/proc/thread-self/status")
        .map_err(|error| ProbeError::Io { what: "reading /proc/thread-self/status", error })?;
    match missing(effective(&status)) {
        names if names.is_empty() => Ok(()),
        names => Err(ProbeError::Rights { missing: names.join(", ") }),
    }
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
