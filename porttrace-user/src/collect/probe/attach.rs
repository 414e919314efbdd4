//! The steps of attaching, each with what it costs when it fails.

use super::config::{Backend, ConntrackBackend, ProbeConfig, ProbeError, RING_BYTES, TcMode};
use super::late;
use super::object::{Kernel, NETFILTER_PROGRAMS, ProgramType};
use super::offsets::KernelTypes;
use super::tc::Attachments;
use crate::collect::ctnetlink::{Listener, RECEIVE_BYTES};
use crate::collect::links::LinkWatcher;

/// `trace_call_bpf` (kernel/trace/bpf_trace.c) and `kprobe_ftrace_handler` (arch/x86/kernel/kprobes/ftrace.c).
const KPROBES_ARE_LEFT_OUT: &str = "connections that an interrupt brings while another eBPF program or kprobe runs may be \
                                    told without their NAT: the kernel leaves kprobes out then, and does not count that";

/// Attaches the TC programs; an interface that vanished meanwhile is no error.
pub fn attach_interface(
    kernel: &Kernel,
    attachments: &mut Attachments,
    index: u32,
    name: &str,
) -> Result<(), ProbeError> {
    let programs = kernel.classifiers()?;
    match attachments.attach(index, programs) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(error) => Err(ProbeError::Attach { name: name.to_owned(), error }),
        Ok(()) => Ok(()),
    }
}

/// The interfaces of this network namespace, and our programs on them.
pub struct OnInterfaces {
    pub links: LinkWatcher,
    pub attachments: Attachments,
    /// What is not seen, a sentence each.
    pub refusals: Vec<String>,
}

/// Attaches to all interfaces that are there.
fn attach_interfaces(kernel: &Kernel, mode: Option<TcMode>) -> Result<OnInterfaces, ProbeError> {
    let links = LinkWatcher::new()?;
    let programs = kernel.classifiers()?;
    let mut attachments = Attachments::new(mode, programs)
        .map_err(|error| ProbeError::Io { what: "preparing to attach to interfaces", error })?;
    let mut refusals = Vec::new();
    for (index, name) in links.present() {
        if let Err(error) = attach_interface(kernel, &mut attachments, *index, name) {
            refusals.push(format!("packets at {name} are not seen: {error}"));
        }
    }
    if attachments.count() == 0 {
        return Err(ProbeError::NoInterface { why: refusals.join("; ") });
    }
    Ok(OnInterfaces { links, attachments, refusals })
}

/// The loaded object on the interfaces, and how it learns what conntrack does.
pub struct Observed {
    pub kernel: Kernel,
    pub interfaces: OnInterfaces,
    pub backend: ConntrackBackend,
    /// With [`ConntrackBackend::Ctnetlink`].
    pub listener: Option<Listener>,
}

/// Loads the object, attaches it to the interfaces, and takes the backend that is wanted, or the best that this kernel allows;
/// what that costs is said. Until [`super::ports::Ports::watch`], nothing is watched.
pub fn observe_conntrack(
    config: &ProbeConfig,
    types: &KernelTypes,
    netns: u32,
    without_types: Option<&str>,
    degradations: &mut Vec<String>,
) -> Result<Observed, ProbeError> {
    let loaded = |backend, predicts| {
        let mut kernel = Kernel::load(types, netns, config, predicts)?;
        let others = if without_types.is_none() { other_programs(types, backend) } else { Vec::new() };
        // Most of this is waiting for the kernel, which then has time for its verifier.
        let interfaces = kernel.load_programs(&others, |kernel| attach_interfaces(kernel, config.tc))??;
        Ok::<_, ProbeError>((kernel, interfaces))
    };
    let by_events = |listener, why: Option<&str>, degradations: &mut Vec<String>| {
        degradations.push(late::costs(why));
        let (kernel, interfaces) = loaded(Backend::Ctnetlink, true)?;
        Ok(Observed { kernel, interfaces, backend: ConntrackBackend::Ctnetlink, listener: Some(listener) })
    };
    if config.backend == Backend::Ctnetlink {
        return by_events(Listener::open(&config.ports, events_room(config))?, None, degradations);
    }
    let (mut kernel, interfaces) = loaded(config.backend, false)?;
    let mut why = match attach_conntrack(&mut kernel, config.backend, without_types, degradations)? {
        Ok(backend) => return Ok(Observed { kernel, interfaces, backend, listener: None }),
        Err(why) => why,
    };
    if config.backend == Backend::Auto {
        match Listener::open(&config.ports, events_room(config)) {
            Ok(listener) => {
                drop((kernel, interfaces));
                return by_events(listener, Some(&why), degradations);
            }
            Err(error) => why = format!("{why}; {error}"),
        }
    }
    degradations.push(format!("NAT rewrites are predicted, not observed: {why}"));
    Ok(Observed { kernel, interfaces, backend: ConntrackBackend::None, listener: None })
}

/// Room for conntrack's messages, which grows and shrinks with the ring buffer.
fn events_room(config: &ProbeConfig) -> u32 {
    u64::from(RECEIVE_BYTES)
        .saturating_mul(config.ring_bytes.into())
        .div_ceil(RING_BYTES.into())
        .try_into()
        .unwrap_or(u32::MAX)
}

/// Attaches the conntrack hooks that `wanted` names, or the first that this kernel allows; the inner error says why none runs.
fn attach_conntrack(
    kernel: &mut Kernel,
    wanted: Backend,
    without_types: Option<&str>,
    degradations: &mut Vec<String>,
) -> Result<Result<ConntrackBackend, String>, ProbeError> {
    if wanted == Backend::TcOnly {
        return Ok(Err("only TC was asked for".to_owned()));
    }
    let mut reasons = Vec::new();
    let tries = [
        (Backend::Netfilter, "netfilter", ConntrackBackend::Netfilter),
        (Backend::Fentry, "fentry", ConntrackBackend::Fentry),
        (Backend::Kprobe, "kprobe", ConntrackBackend::Kprobe),
    ];
    for (backend, name, runs) in tries {
        if wanted != Backend::Auto && wanted != backend {
            continue;
        }
        let outcome = match (without_types, backend) {
            (Some(why), _) => Err(why.to_owned()),
            (None, Backend::Netfilter) => kernel.attach_netfilter(),
            (None, Backend::Fentry) => kernel.attach_fentries(),
            (None, _) => kernel.attach_kprobes(),
        };
        match outcome {
            Ok(()) => {
                if runs == ConntrackBackend::Kprobe {
                    degradations.push(KPROBES_ARE_LEFT_OUT.to_owned());
                }
                return Ok(Ok(runs));
            }
            Err(why) if wanted == backend => return Err(ProbeError::Backend { backend: name, why }),
            Err(why) => reasons.push(why),
        }
    }
    reasons.dedup();
    Ok(Err(reasons.join("; ")))
}

/// Attaches the tracepoints; returns whether drops and whether resets are seen.
pub fn attach_tracepoints(
    kernel: &mut Kernel,
    without_types: Option<&str>,
    degradations: &mut Vec<String>,
) -> (bool, bool) {
    let there = tracepoints(kernel.types()).map(|(name, id)| (name, id.is_some()));
    let losses = ["drops are not reported with their reason", "resets of this node's TCP are seen only as packets"];
    let mut attach = |(name, is_there): (&str, bool), loss: &str| {
        let outcome = match (without_types, is_there) {
            (Some(why), _) => Err(why.to_owned()),
            (None, false) => Err("this kernel has no such tracepoint".to_owned()),
            (None, true) => kernel.attach_tracepoint(name),
        };
        outcome.map_err(|why| degradations.push(format!("{loss}: {why}"))).is_ok()
    };
    (attach(there[0], losses[0]), attach(there[1], losses[1]))
}

/// The `tp_btf` programs, and the BTF id of their tracepoints where this kernel has them.
fn tracepoints(types: &KernelTypes) -> [(&'static str, Option<u32>); 2] {
    [("tp_drop", types.kfree_skb.filter(|_| types.drop_has_reason)), ("tp_reset", types.tcp_send_reset)]
}

/// The programs that are wanted here beside those of TC, but for kprobes.
pub fn other_programs(types: &KernelTypes, wanted: Backend) -> Vec<(&'static str, ProgramType)> {
    let netfilter = if matches!(wanted, Backend::Auto | Backend::Netfilter) { &NETFILTER_PROGRAMS[..] } else { &[] };
    let tracepoints = tracepoints(types)
        .into_iter()
        .filter_map(|(name, id)| Some((name, ProgramType::RawTracepoint { attach_btf_id: id? })));
    netfilter.iter().map(|name| (*name, ProgramType::Netfilter)).chain(tracepoints).collect()
}
