//! The steps of attaching, each with what it costs when it fails.

use super::config::{Backend, ConntrackBackend, ProbeConfig, ProbeError};
use super::object::Kernel;
use super::tc::Attachments;
use super::{map_error, missing_map};
use aya::maps::Array;

/// Attaches the TC programs; an interface that vanished meanwhile is no error.
pub fn attach_interface(
    kernel: &Kernel,
    attachments: &mut Attachments,
    index: u32,
    name: &str,
) -> Result<(), ProbeError> {
    let programs = [kernel.classifier("tc_ingress")?, kernel.classifier("tc_egress")?];
    match attachments.attach(index, programs) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(error) => Err(ProbeError::Attach { name: name.to_owned(), error }),
        Ok(()) => Ok(()),
    }
}

/// Attaches the conntrack hooks that `wanted` names, or the first that this kernel allows; without any, says so.
pub fn attach_conntrack(
    kernel: &mut Kernel,
    wanted: Backend,
    without_types: Option<&str>,
    degradations: &mut Vec<String>,
) -> Result<ConntrackBackend, ProbeError> {
    const LOSS: &str = "NAT rewrites are predicted, not observed";
    if wanted == Backend::TcOnly {
        degradations.push(format!("{LOSS}: only TC was asked for"));
        return Ok(ConntrackBackend::None);
    }
    let mut reasons = Vec::new();
    let tries = [
        (Backend::Netfilter, "netfilter", ConntrackBackend::Netfilter),
        (Backend::Kprobe, "kprobe", ConntrackBackend::Kprobe),
    ];
    for (backend, name, runs) in tries {
        if wanted != Backend::Auto && wanted != backend {
            continue;
        }
        let outcome = match (without_types, backend) {
            (Some(why), _) => Err(why.to_owned()),
            (None, Backend::Netfilter) => kernel.attach_netfilter(),
            (None, _) => kernel.attach_kprobes(),
        };
        match outcome {
            Ok(()) => return Ok(runs),
            Err(why) if wanted == backend => return Err(ProbeError::Backend { backend: name, why }),
            Err(why) => reasons.push(why),
        }
    }
    reasons.dedup();
    degradations.push(format!("{LOSS}: {}", reasons.join("; ")));
    Ok(ConntrackBackend::None)
}

/// Attaches the tracepoints; returns whether drops and whether resets are seen.
pub fn attach_tracepoints(
    kernel: &mut Kernel,
    without_types: Option<&str>,
    degradations: &mut Vec<String>,
) -> (bool, bool) {
    let types = kernel.types().clone();
    let mut attach = |name: &str, loss: &str, id: Option<u32>| {
        let outcome = match (without_types, id) {
            (Some(why), _) => Err(why.to_owned()),
            (None, None) => Err("this kernel has no such tracepoint".to_owned()),
            (None, Some(id)) => kernel.attach_tracepoint(name, id),
        };
        outcome.map_err(|why| degradations.push(format!("{loss}: {why}"))).is_ok()
    };
    let kfree_skb = types.kfree_skb.filter(|_| types.drop_has_reason);
    let drops = attach("tp_drop", "drops are not reported with their reason", kfree_skb);
    let resets = attach("tp_reset", "resets of this node's TCP are seen only as packets", types.tcp_send_reset);
    (drops, resets)
}

/// Writes the port filter.
pub fn watch_ports(kernel: &mut Kernel, config: &ProbeConfig) -> Result<(), ProbeError> {
    let mut bits = vec![0u8; 65_536];
    for port in &config.ports {
        bits[usize::from(*port)] = config.protos.bits();
    }
    let table: [u8; 65_536] = bits.try_into().unwrap_or([0; 65_536]);
    let map = kernel.ebpf.map_mut("PORTS").ok_or_else(|| missing_map("PORTS"))?;
    let mut ports: Array<_, [u8; 65_536]> = Array::try_from(map).map_err(|error| map_error("PORTS", &error))?;
    ports.set(0, table, 0).map_err(|error| map_error("PORTS", &error))
}
