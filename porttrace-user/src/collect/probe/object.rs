//! The compiled kernel side: read and put together with aya, which has no types for some of its programs: all are loaded alike here.

use super::mapping::page;
use super::offsets::{CONNTRACK_FUNCTIONS, KernelTypes};
use super::ring::Ring;
pub use super::sys::ProgramType;
use super::sys::{self, NetfilterHook};
use super::tracked::{Tracked, buckets_for};
use super::{ProbeConfig, ProbeError, missing_map};
use aya::maps::{Map, MapData};
use aya::programs::{KProbe, ProbeKind, ProgramInfo, loaded_programs};
use aya_obj::generated::{BPF_CALL, BPF_JMP, BPF_PSEUDO_KFUNC_CALL, bpf_insn};
use aya_obj::{EbpfSectionKind, Object};
use porttrace_ebpf::CALL_RDONLY_CAST;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

static BYTES: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/porttrace.bpf.o"));

/// Which of its lines the kernel side logs (aya-log).
const LOG_LEVEL: &str = "AYA_LOG_LEVEL";
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
/// The TC programs.
const CLASSIFIERS: [&str; 2] = ["tc_ingress", "tc_egress"];
/// The programs of [`NETFILTER`], the one that takes the verifier longest first.
pub const NETFILTER_PROGRAMS: [&str; 4] = ["nf_after_conntrack", "nf_after_dnat", "nf_after_snat", "nf_local_in"];

/// Room for other porttraces between a hook's priority and the next one that matters (-199 to mangle's -150).
const PRIORITIES: i32 = 40;
const FAMILIES: [u32; 2] = [libc::NFPROTO_IPV4 as u32, libc::NFPROTO_IPV6 as u32];

/// Programs at [`CONNTRACK_FUNCTIONS`], in their order. Of the first kind each is there twice: the kernel leaves a program out
/// while it is running on that CPU, and then the other one of the pair is not.
const FENTRIES: [&str; 3] = ["fe_nat_setup", "fe_confirm", "fe_destroy"];
const KPROBES: [&str; 3] = ["kp_nat_setup", "kp_confirm", "kp_destroy"];

/// The kernel side: its maps, its programs as far as they are loaded, and links that hold as long as it lives.
pub struct Kernel {
    /// References to maps and functions are filled in.
    object: Object,
    maps: BTreeMap<String, Map>,
    /// Elements of `TRACKED` and of `SLOTS`.
    buckets: u32,
    ring_bytes: u32,
    types: KernelTypes,
    classifiers: OnceLock<[OwnedFd; 2]>,
    /// What [`Self::load_programs`] made of all others; one that could not be loaded is an error only when it is attached.
    loaded: BTreeMap<&'static str, Result<OwnedFd, String>>,
    links: Vec<OwnedFd>,
    kprobes: Vec<KProbe>,
    /// Programs at kernel functions and tracepoints, which may be left out.
    tracing: Vec<OwnedFd>,
}

impl Kernel {
    /// Creates the maps, with `netns` (inode number) as the one namespace that counts.
    ///
    /// `predicts`: [`super::Probe::predict`] will be used.
    ///
    /// aya's own loader would first read all of the kernel's BTF, for which nothing here asks: some 30 ms, and 13 MiB.
    pub fn load(types: &KernelTypes, netns: u32, config: &ProbeConfig, predicts: bool) -> Result<Self, ProbeError> {
        let failed = |why| ProbeError::Load { what: "the maps".into(), why };
        // The kernel wants a power of two of pages.
        let ring_bytes = config.ring_bytes.next_power_of_two().max(u32::try_from(page()).unwrap_or(4096));
        let buckets = buckets_for(config.tracked);
        let mut reasons = types.drop_reasons.iter();
        let queue_purge = reasons.find(|(_, name)| *name == "QUEUE_PURGE").map_or(u32::MAX, |(reason, _)| *reason);
        let constants = [
            ("NETNS", netns.to_ne_bytes().to_vec()),
            ("RESET_HAS_REASON", u32::from(types.reset_has_reason).to_ne_bytes().to_vec()),
            ("QUEUE_PURGE", queue_purge.to_ne_bytes().to_vec()),
            ("WAKE_BYTES", (ring_bytes / WAKE_UPS).to_ne_bytes().to_vec()),
            ("SHOW_DATA", u32::from(config.data).to_ne_bytes().to_vec()),
            ("PREDICTS", u32::from(predicts).to_ne_bytes().to_vec()),
            ("TRACKED_MASK", (buckets - 1).to_ne_bytes().to_vec()),
            ("OFFSETS", types.offsets.words().into_iter().flat_map(u32::to_ne_bytes).collect()),
            (LOG_LEVEL, vec![if config.kernel_log { u8::MAX } else { 0 }]),
        ];
        let mut object = Object::parse(BYTES).map_err(|error| failed(chain(&error)))?;
        // Of these only the log's may be missing.
        let constants = constants.iter().map(|(name, value)| (*name, (&value[..], *name != LOG_LEVEL))).collect();
        object.patch_map_data(constants).map_err(|error| failed(chain(&error)))?;
        for (name, entries) in [("EVENTS", ring_bytes), ("TRACKED", buckets), ("SLOTS", buckets)] {
            object.maps.get_mut(name).ok_or_else(|| missing_map(name))?.set_max_entries(entries);
        }
        let maps = create_maps(&object).map_err(failed)?;
        relocate(&mut object, &maps, types.rdonly_cast).map_err(failed)?;
        Ok(Self {
            object,
            maps,
            buckets,
            ring_bytes,
            types: types.clone(),
            classifiers: OnceLock::new(),
            loaded: BTreeMap::new(),
            links: Vec::new(),
            kprobes: Vec::new(),
            tracing: Vec::new(),
        })
    }

    /// Loads the TC programs, then does `meanwhile`, while the `others` are loaded on other threads: the verifier takes most of the
    /// start.
    pub fn load_programs<T>(
        &mut self,
        others: &[(&'static str, ProgramType)],
        meanwhile: impl FnOnce(&Self) -> T,
    ) -> Result<T, ProbeError> {
        let next = AtomicUsize::new(0);
        let kernel = &*self;
        let work = || {
            let mut done = Vec::new();
            while let Some((name, kind)) = others.get(next.fetch_add(1, Ordering::Relaxed)) {
                done.push((*name, load(&kernel.object, name, *kind)));
            }
            done
        };
        let (done, loaded) = thread::scope(|scope| {
            let threads = [scope.spawn(work), scope.spawn(work)];
            let done = kernel.load_classifiers().map(|()| meanwhile(kernel));
            (done, threads.into_iter().filter_map(|thread| thread.join().ok()).flatten().collect::<Vec<_>>())
        });
        self.loaded.extend(loaded);
        done
    }

    fn load_classifiers(&self) -> Result<(), ProbeError> {
        let load = |name: &str| {
            load(&self.object, name, ProgramType::Classifier)
                .map_err(|why| ProbeError::Load { what: format!("the TC program {name}"), why })
        };
        let [ingress, egress] = CLASSIFIERS;
        // They are loaded once.
        let _ = self.classifiers.set([load(ingress)?, load(egress)?]);
        Ok(())
    }

    /// Descriptors of the loaded TC programs, for ingress and egress.
    pub fn classifiers(&self) -> Result<[BorrowedFd<'_>; 2], ProbeError> {
        let missing =
            || ProbeError::Load { what: "the TC programs".to_owned(), why: "they were not loaded".to_owned() };
        self.classifiers.get().map(|programs| programs.each_ref().map(AsFd::as_fd)).ok_or_else(missing)
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

    /// Attaches the programs that the kernel calls where conntrack's functions begin: all or none.
    pub fn attach_fentries(&mut self) -> Result<(), String> {
        let mut links = Vec::new();
        let functions = self.types.conntrack_functions.into_iter().zip(CONNTRACK_FUNCTIONS);
        for (name, (function, (called, _))) in FENTRIES.into_iter().zip(functions) {
            let function = function.ok_or_else(|| format!("the kernel's BTF has no function {called}"))?;
            for _ in 0..2 {
                let program = load(&self.object, name, ProgramType::Fentry(function))?;
                let link = sys::open_raw_tracepoint(program.as_fd());
                links.push(link.map_err(|error| format!("attaching {name} to {called}: {error}"))?);
            }
        }
        self.links.append(&mut links);
        Ok(())
    }

    /// Attaches the conntrack kprobes: all or none.
    pub fn attach_kprobes(&mut self) -> Result<(), String> {
        for (name, (function, _)) in KPROBES.into_iter().zip(CONNTRACK_FUNCTIONS) {
            let attached = self.attach_kprobe(name, function);
            match attached {
                Ok(kprobe) => self.kprobes.push(kprobe),
                Err(why) => {
                    self.kprobes.clear();
                    return Err(format!("kprobe on {function}: {why}"));
                }
            }
        }
        Ok(())
    }

    fn attach_kprobe(&mut self, name: &'static str, function: &str) -> Result<KProbe, String> {
        let program = load(&self.object, name, ProgramType::Kprobe)?;
        let id = sys::program_id(program.as_fd()).map_err(|error| error.to_string())?;
        let info = info_of(id)?;
        // SAFETY: it is the program that was just loaded as one of this type.
        let kprobe = unsafe { KProbe::from_program_info(info, name.into(), ProbeKind::Entry) };
        let mut kprobe = kprobe.map_err(|error| chain(&error))?;
        kprobe.attach(function, 0).map_err(|error| chain(&error))?;
        self.tracing.push(program);
        Ok(kprobe)
    }

    /// Attaches a `tp_btf` program to its tracepoint.
    pub fn attach_tracepoint(&mut self, name: &str) -> Result<(), String> {
        let program = self.loaded(name)?;
        let link = sys::open_raw_tracepoint(program.as_fd()).map_err(|error| format!("attaching {name}: {error}"))?;
        self.links.push(link);
        self.tracing.push(program);
        Ok(())
    }

    /// How often the kernel left out a program at a tracepoint, or one of a kprobe.
    pub fn left_out(&self) -> io::Result<u64> {
        self.tracing.iter().map(|program| sys::left_out(program.as_fd())).sum()
    }

    /// The ring buffer, which is then no longer here.
    pub fn take_ring(&mut self) -> Result<Ring, ProbeError> {
        match self.take_map("EVENTS")? {
            Map::RingBuf(map) => Ring::of(map, self.ring_bytes),
            _ => Err(missing_map("EVENTS")),
        }
    }

    /// The table of watched connections.
    pub fn tracked(&self) -> Result<Tracked, ProbeError> {
        let array = |name| match self.maps.get(name) {
            Some(Map::Array(map)) => Ok(map),
            _ => Err(missing_map(name)),
        };
        Tracked::of(array("TRACKED")?, array("SLOTS")?, self.buckets)
    }

    pub fn map_mut(&mut self, name: &'static str) -> Result<&mut Map, ProbeError> {
        self.maps.get_mut(name).ok_or_else(|| missing_map(name))
    }

    /// A map, which is then no longer here.
    pub fn take_map(&mut self, name: &'static str) -> Result<Map, ProbeError> {
        self.maps.remove(name).ok_or_else(|| missing_map(name))
    }

    pub const fn types(&self) -> &KernelTypes {
        &self.types
    }

    fn loaded(&mut self, name: &str) -> Result<OwnedFd, String> {
        self.loaded.remove(name).unwrap_or_else(|| Err(format!("{name} was not loaded")))
    }
}

/// What aya knows a loaded program by. It opens programs by number, which takes CAP_SYS_ADMIN; others may go meanwhile.
fn info_of(program: u32) -> Result<ProgramInfo, String> {
    let mut why = "it is not among those that are loaded".to_owned();
    for info in loaded_programs() {
        match info {
            Ok(info) if info.id() == program => return Ok(info),
            Ok(_) => {}
            Err(error) => why = format!("looking it up among loaded programs: {}", chain(&error)),
        }
    }
    Err(why)
}

/// Creates the object's maps, its constants among them.
fn create_maps(object: &Object) -> Result<BTreeMap<String, Map>, String> {
    let create = |(name, map): (&String, &aya_obj::Map)| {
        let failed = |error: &dyn std::error::Error| format!("{name}: {}", chain(error));
        let created = MapData::create(map.clone(), name, None).map_err(|error| failed(&error))?;
        let fd = created.fd().as_fd();
        if !map.data().is_empty() {
            sys::fill(fd, map.data()).map_err(|error| failed(&error))?;
        }
        if map.section_kind() == EbpfSectionKind::Rodata {
            sys::freeze(fd).map_err(|error| failed(&error))?;
        }
        Ok((name.clone(), Map::from_map_data(created).map_err(|error| failed(&error))?))
    };
    object.maps.iter().map(create).collect()
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

/// Fills in the references to maps and functions, and calls of `bpf_rdonly_cast` with that function's BTF id. Where there is none
/// (before Linux 6.2), the kernel refuses programs that call it: those of NETFILTER, which it then does not know either.
fn relocate(object: &mut Object, maps: &BTreeMap<String, Map>, rdonly_cast: Option<u32>) -> Result<(), String> {
    if let Some(function) = rdonly_cast {
        object.functions.values_mut().flat_map(|code| &mut code.instructions).for_each(|one| name_cast(one, function));
    }
    let maps: Vec<_> = object
        .maps
        .iter()
        .filter_map(|(name, map)| Some((name.clone(), fd_of(maps.get(name)?)?, map.clone())))
        .collect();
    let text: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    object
        .relocate_maps(maps.iter().map(|(name, fd, map)| (name.as_str(), *fd, map)), &text)
        .map_err(|error| chain(&error))?;
    object.relocate_calls(&text).map_err(|error| chain(&error))
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
