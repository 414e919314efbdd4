//! The compiled kernel side: loading it with aya, and the programs that aya has no type for by hand.

use super::offsets::KernelTypes;
use super::ring::Ring;
pub use super::sys::ProgramType;
use super::sys::{self, NetfilterHook};
use super::tracked::{Tracked, buckets_for};
use super::{ProbeConfig, ProbeError, missing_map};
use aya::maps::{Map, MapData};
use aya::programs::{KProbe, SchedClassifier};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use aya_obj::Object;
use aya_obj::generated::{BPF_CALL, BPF_JMP, BPF_PSEUDO_KFUNC_CALL, bpf_insn};
use porttrace_ebpf::CALL_RDONLY_CAST;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

static BYTES: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/porttrace.bpf.o"));

/// How often the reader is woken while the ring buffer fills.
const WAKE_UPS: u32 = 4;

const PRE_ROUTING: u32 = 0;
const LOCAL_IN: u32 = 1;
const LOCAL_OUT: u32 = 3;
const POST_ROUTING: u32 = 4;

/// Program, hook, priority: just after conntrack (-200), after NAT's destination half (-100), after its source half (100).
/// `INT_MIN` itself is refused by the kernel (net/netfilter/nf_bpf_link.c).
const NETFILTER: [(&str, u32, i32); 7] = [
    ("nf_after_conntrack", PRE_ROUTING, -199),
    ("nf_after_conntrack", LOCAL_OUT, -199),
    ("nf_after_dnat", PRE_ROUTING, -99),
    ("nf_after_dnat", LOCAL_OUT, -99),
    ("nf_local_in", LOCAL_IN, i32::MIN + 1),
    ("nf_after_snat", LOCAL_IN, 101),
    ("nf_after_snat", POST_ROUTING, 101),
];
/// The programs of [`NETFILTER`], the one that takes the verifier longest first.
pub const NETFILTER_PROGRAMS: [&str; 4] = ["nf_after_conntrack", "nf_after_dnat", "nf_after_snat", "nf_local_in"];

/// Room for other porttraces between a hook's priority and the next one that matters (-199 to mangle's -150).
const PRIORITIES: i32 = 40;
const FAMILIES: [u32; 2] = [libc::NFPROTO_IPV4 as u32, libc::NFPROTO_IPV6 as u32];

/// kprobe programs and the functions that they wait for; all are symbols of modules on most kernels.
const KPROBES: [(&str, &str); 3] =
    [("kp_nat_setup", "nf_nat_setup_info"), ("kp_confirm", "__nf_conntrack_confirm"), ("kp_destroy", "nf_ct_delete")];

/// The loaded object, and links that hold as long as it lives.
pub struct Kernel {
    pub ebpf: Ebpf,
    /// Those of map `TRACKED`.
    buckets: u32,
    ring_bytes: u32,
    types: KernelTypes,
    /// What [`Self::load_programs`] made of the programs that aya has no type for.
    by_hand: BTreeMap<&'static str, Result<OwnedFd, String>>,
    links: Vec<OwnedFd>,
}

impl Kernel {
    /// Creates the maps, with `netns` (inode number) as the one namespace that counts.
    ///
    /// `predicts`: [`super::Probe::predict`] will be used.
    pub fn load(
        loader: EbpfLoader<'static>,
        types: &KernelTypes,
        netns: u32,
        config: &ProbeConfig,
        predicts: bool,
    ) -> Result<Self, ProbeError> {
        let predicts = u32::from(predicts);
        let offsets = types.offsets.words();
        let reset_has_reason = u32::from(types.reset_has_reason);
        let mut reasons = types.drop_reasons.iter();
        let queue_purge = reasons.find(|(_, name)| *name == "QUEUE_PURGE").map_or(u32::MAX, |(reason, _)| *reason);
        let log_level = if config.kernel_log { u8::MAX } else { 0 };
        // The kernel wants a power of two of pages; aya makes it one in the same way.
        let ring_bytes = config.ring_bytes.next_power_of_two().max(4096);
        let wake_bytes = ring_bytes / WAKE_UPS;
        let show_data = u32::from(config.data);
        let buckets = buckets_for(config.tracked);
        // It borrows the values above for a shorter time than it could.
        let mut loader: EbpfLoader<'_> = loader;
        let ebpf = loader
            .verifier_log_level(VerifierLogLevel::STATS)
            .override_global("OFFSETS", &offsets[..], true)
            .override_global("NETNS", &netns, true)
            .override_global("RESET_HAS_REASON", &reset_has_reason, true)
            .override_global("QUEUE_PURGE", &queue_purge, true)
            .override_global("WAKE_BYTES", &wake_bytes, true)
            .override_global("SHOW_DATA", &show_data, true)
            .override_global("PREDICTS", &predicts, true)
            .override_global("AYA_LOG_LEVEL", &log_level, false)
            .map_max_entries("EVENTS", ring_bytes)
            .override_global("TRACKED_MASK", &(buckets - 1), true)
            .map_max_entries("TRACKED", buckets)
            .load(BYTES)
            .map_err(|error| ProbeError::Load { what: "the maps".into(), why: chain(&error) })?;
        Ok(Self { ebpf, buckets, ring_bytes, types: types.clone(), by_hand: BTreeMap::new(), links: Vec::new() })
    }

    /// Loads the TC programs, then does `meanwhile`, while those `by_hand` are loaded on other threads: the verifier takes most of
    /// the start. A program that cannot be loaded by hand is an error only when it is attached.
    pub fn load_programs<T>(
        &mut self,
        by_hand: &[(&'static str, ProgramType)],
        meanwhile: impl FnOnce(&Self) -> T,
    ) -> Result<T, ProbeError> {
        let object = if by_hand.is_empty() { None } else { Some(relocate(&self.ebpf, self.types.rdonly_cast)) };
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            while let (Some(object), Some((name, kind))) = (&object, by_hand.get(next.fetch_add(1, Ordering::Relaxed)))
            {
                let loaded = object.as_ref().map_err(String::clone).and_then(|object| load(object, name, *kind));
                done.push((*name, loaded));
            }
            done
        };
        thread::scope(|scope| {
            let others = [scope.spawn(work), scope.spawn(work)];
            let classifiers = ["tc_ingress", "tc_egress"].into_iter().try_for_each(|name| self.load_classifier(name));
            let done = classifiers.map(|()| meanwhile(self));
            self.by_hand.extend(others.into_iter().filter_map(|other| other.join().ok()).flatten());
            done
        })
    }

    fn load_classifier(&mut self, name: &str) -> Result<(), ProbeError> {
        let failed = |why| ProbeError::Load { what: format!("the TC program {name}"), why };
        let program: &mut SchedClassifier = self
            .ebpf
            .program_mut(name)
            .ok_or_else(|| failed("it is not in the object".into()))?
            .try_into()
            .map_err(|error| failed(chain(&error)))?;
        program.load().map_err(|error| failed(chain(&error)))
    }

    /// Descriptor of a loaded TC program.
    pub fn classifier(&self, name: &str) -> Result<BorrowedFd<'_>, ProbeError> {
        let failed = |why| ProbeError::Load { what: format!("the TC program {name}"), why };
        let program = self.ebpf.program(name).ok_or_else(|| failed("it is not in the object".into()))?;
        program.fd().map(AsFd::as_fd).map_err(|error| failed(chain(&error)))
    }

    /// Attaches the NETFILTER programs to the hooks of the current network namespace: all or none.
    pub fn attach_netfilter(&mut self) -> Result<(), String> {
        let mut links = Vec::new();
        let mut loaded: Option<(&str, OwnedFd)> = None;
        for (name, hook, priority) in NETFILTER {
            let program = match loaded.take() {
                Some((last, program)) if last == name => program,
                _ => self.loaded(name)?,
            };
            for pf in FAMILIES {
                let link = link_near(program.as_fd(), NetfilterHook { pf, hook, priority })
                    .map_err(|error| format!("attaching {name} to hook {hook} of family {pf}: {error}"))?;
                links.push(link);
            }
            loaded = Some((name, program));
        }
        self.links.append(&mut links);
        Ok(())
    }

    /// Attaches the conntrack kprobes: all or none.
    pub fn attach_kprobes(&mut self) -> Result<(), String> {
        let outcome = KPROBES.into_iter().try_for_each(|(name, function)| {
            let failed = |why: String| format!("kprobe on {function}: {why}");
            let program = self.kprobe(name).map_err(failed)?;
            program.load().map_err(|error| failed(chain(&error)))?;
            program.attach(function, 0).map(|_| ()).map_err(|error| failed(chain(&error)))
        });
        if outcome.is_err() {
            for (name, _) in KPROBES {
                // Those that were not loaded cannot be unloaded.
                let _ = self.kprobe(name).map(KProbe::unload);
            }
        }
        outcome
    }

    fn kprobe(&mut self, name: &str) -> Result<&mut KProbe, String> {
        let program = self.ebpf.program_mut(name).ok_or("not in the object")?;
        program.try_into().map_err(|error: aya::programs::ProgramError| chain(&error))
    }

    /// Attaches a `tp_btf` program to its tracepoint.
    pub fn attach_tracepoint(&mut self, name: &str) -> Result<(), String> {
        let program = self.loaded(name)?;
        let link = sys::open_raw_tracepoint(program.as_fd()).map_err(|error| format!("attaching {name}: {error}"))?;
        self.links.push(link);
        Ok(())
    }

    /// The ring buffer, which is then no longer in the object.
    pub fn take_ring(&mut self) -> Result<Ring, ProbeError> {
        match self.ebpf.take_map("EVENTS") {
            Some(Map::RingBuf(map)) => Ring::of(map, self.ring_bytes),
            _ => Err(missing_map("EVENTS")),
        }
    }

    /// The table of watched connections.
    pub fn tracked(&self) -> Result<Tracked, ProbeError> {
        match self.ebpf.map("TRACKED") {
            Some(Map::Array(map)) => Tracked::of(map, self.buckets),
            _ => Err(missing_map("TRACKED")),
        }
    }

    pub const fn types(&self) -> &KernelTypes {
        &self.types
    }

    fn loaded(&mut self, name: &str) -> Result<OwnedFd, String> {
        self.by_hand.remove(name).unwrap_or_else(|| Err(format!("{name} was not loaded")))
    }
}

fn load(object: &Object, name: &str, kind: ProgramType) -> Result<OwnedFd, String> {
    let program = object.programs.get(name).ok_or_else(|| format!("{name} is not in the object"))?;
    let function =
        object.functions.get(&program.function_key()).ok_or_else(|| format!("{name} has no instructions"))?;
    sys::load(name, kind, &function.instructions, &program.license).map_err(|(error, log)| {
        let log = if log.is_empty() { String::new() } else { format!("\n{log}") };
        format!("loading {name}: {error}{log}")
    })
}

/// Links at the priority or soon after it: the kernel takes one BPF program for each priority of a hook (EBUSY,
/// `nf_hook_entries_grow` in net/netfilter/core.c), and another porttrace may watch this node too.
fn link_near(program: BorrowedFd<'_>, mut at: NetfilterHook) -> io::Result<OwnedFd> {
    let last = at.priority + PRIORITIES;
    loop {
        match sys::link_netfilter(program, at) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && at.priority < last => at.priority += 1,
            outcome => return outcome,
        }
    }
}

/// The same object once more, its references to maps filled in with the maps that aya made (its constants included), and its calls
/// of `bpf_rdonly_cast` with that function's BTF id. Where there is none (before Linux 6.2), the kernel refuses programs that call
/// it: those of NETFILTER, which it then does not know either.
fn relocate(ebpf: &Ebpf, rdonly_cast: Option<u32>) -> Result<Object, String> {
    let mut object = Object::parse(BYTES).map_err(|error| chain(&error))?;
    if let Some(function) = rdonly_cast {
        object.functions.values_mut().flat_map(|code| &mut code.instructions).for_each(|one| name_cast(one, function));
    }
    let maps: Vec<_> = object
        .maps
        .iter()
        .filter_map(|(name, map)| Some((name.clone(), fd_of(ebpf.map(name)?)?, map.clone())))
        .collect();
    let text: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    object
        .relocate_maps(maps.iter().map(|(name, fd, map)| (name.as_str(), *fd, map)), &text)
        .map_err(|error| chain(&error))?;
    object.relocate_calls(&text).map_err(|error| chain(&error))?;
    Ok(object)
}

/// Makes a call of the kernel function with this BTF id of one that stands for it.
fn name_cast(instruction: &mut bpf_insn, function: u32) {
    const CALL: u8 = (BPF_JMP | BPF_CALL) as u8;
    if instruction.code == CALL && instruction.src_reg() == 0 && instruction.imm == CALL_RDONLY_CAST {
        instruction.set_src_reg(BPF_PSEUDO_KFUNC_CALL as u8);
        instruction.imm = function.cast_signed();
    }
}

fn fd_of(map: &Map) -> Option<i32> {
    let data: &MapData = match map {
        Map::Array(data) | Map::HashMap(data) | Map::PerCpuArray(data) | Map::RingBuf(data) => data,
        _ => return None,
    };
    Some(data.fd().as_fd().as_raw_fd())
}

/// An error with all its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    text
}
