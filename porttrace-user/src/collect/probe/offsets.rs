//! Offsets of kernel structure members, from BTF: vmlinux's, and that of the module nf_conntrack where it is one.

use super::btf::{Btf, BtfError};
use super::sys::Function;
use porttrace_ebpf::Offsets;
use std::collections::BTreeMap;
use std::path::Path;
use thiserror::Error;

const TYPES: &str = "/sys/kernel/btf";
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MODULE: &str = "/sys/kernel/btf/nf_conntrack";

/// The functions of conntrack at which its entries are observed where no NETFILTER program is, and their modules where they are
/// in one.
pub const CONNTRACK_FUNCTIONS: [(&str, &str); 3] =
    [("nf_nat_setup_info", "nf_nat"), ("__nf_conntrack_confirm", "nf_conntrack"), ("nf_ct_delete", "nf_conntrack")];

const WANTED: [&str; 24] = [
    "__nf_conntrack_confirm",
    "bpf_rdonly_cast",
    "btf_trace_kfree_skb",
    "btf_trace_tcp_send_reset",
    "dst_entry",
    "net",
    "net_device",
    "nf_conn",
    "nf_conntrack_man",
    "nf_conntrack_tuple",
    "nf_conntrack_tuple_hash",
    "nf_ct_delete",
    "nf_ct_ext_id",
    "nf_hook_state",
    "nf_nat_setup_info",
    "ns_common",
    "rt6_info",
    "rtnl_link_stats64",
    "rtable",
    "sk_buff",
    "sk_rst_reason",
    "skb_drop_reason",
    "sock",
    "sock_common",
];

/// What the probe takes from the kernel's BTF.
#[derive(Clone, Debug, Default)]
pub struct KernelTypes {
    pub offsets: Offsets,
    /// `attach_btf_id` of the tracepoints; `None` where the kernel has no such tracepoint.
    pub kfree_skb: Option<u32>,
    pub tcp_send_reset: Option<u32>,
    /// Those of [`CONNTRACK_FUNCTIONS`].
    pub conntrack_functions: [Option<Function>; 3],
    /// The kernel function `bpf_rdonly_cast` (Linux 6.2).
    pub rdonly_cast: Option<u32>,
    /// The tracepoint `tcp_send_reset` says why (Linux 6.11).
    pub reset_has_reason: bool,
    /// The tracepoint `kfree_skb` says why (Linux 5.17).
    pub drop_has_reason: bool,
    /// Names of `enum skb_drop_reason` and `enum sk_rst_reason` without their prefixes.
    pub drop_reasons: BTreeMap<u32, String>,
    pub reset_reasons: BTreeMap<u32, String>,
}

#[derive(Debug, Error)]
pub enum OffsetsError {
    #[error(transparent)]
    Btf(#[from] BtfError),
    #[error("the kernel's BTF has no {structure}.{member}")]
    Missing { structure: &'static str, member: &'static str },
    #[error("this kernel lays out struct {0} differently from all kernels known to porttrace")]
    Unlike(&'static str),
}

/// Reads BTF and looks up all that is needed.
pub fn kernel_types() -> Result<KernelTypes, OffsetsError> {
    let vmlinux = Btf::read(Path::new(VMLINUX), None, &WANTED)?;
    let module = Path::new(MODULE);
    let split = if module.exists() { Some(Btf::read(module, Some(&vmlinux), &WANTED)?) } else { None };
    let btf = split.as_ref().unwrap_or(&vmlinux);
    Ok(KernelTypes {
        offsets: offsets(btf)?,
        kfree_skb: btf.typedef("btf_trace_kfree_skb"),
        tcp_send_reset: btf.typedef("btf_trace_tcp_send_reset"),
        conntrack_functions: CONNTRACK_FUNCTIONS.map(|(name, module)| function(&vmlinux, name, module)),
        rdonly_cast: btf.function("bpf_rdonly_cast"),
        reset_has_reason: btf.tracepoint_arguments("btf_trace_tcp_send_reset").is_some_and(|count| count >= 3),
        drop_has_reason: btf.tracepoint_arguments("btf_trace_kfree_skb").is_some_and(|count| count >= 3),
        drop_reasons: names(btf, "skb_drop_reason", "SKB_DROP_REASON_"),
        reset_reasons: names(btf, "sk_rst_reason", "SK_RST_REASON_"),
    })
}

fn function(vmlinux: &Btf<'_>, name: &str, module: &'static str) -> Option<Function> {
    if let Some(btf_id) = vmlinux.function(name) {
        return Some(Function { btf_id, module: None });
    }
    let types = Btf::read(&Path::new(TYPES).join(module), Some(vmlinux), &[name]).ok()?;
    Some(Function { btf_id: types.function(name)?, module: Some(module) })
}

fn offsets(btf: &Btf<'_>) -> Result<Offsets, OffsetsError> {
    let of = |structure: &'static str, member: &'static str| {
        btf.offset(structure, member).ok_or(OffsetsError::Missing { structure, member })
    };
    check_tuple(btf)?;
    let [rt_type, rt_gw_family, rt_gw] = all_of(btf, "rtable", ["rt_type", "rt_gw_family", "rt_gw4"]);
    let [rt6_flags, rt6_gateway] = all_of(btf, "rt6_info", ["rt6i_flags", "rt6i_gateway"]);
    Ok(Offsets {
        skb_dev: of("sk_buff", "dev")?,
        skb_sk: of("sk_buff", "sk")?,
        skb_refdst: of("sk_buff", "_skb_refdst")?,
        skb_nfct: of("sk_buff", "_nfct")?,
        skb_len: of("sk_buff", "len")?,
        skb_data_len: of("sk_buff", "data_len")?,
        skb_head: of("sk_buff", "head")?,
        skb_data: of("sk_buff", "data")?,
        skb_network_header: of("sk_buff", "network_header")?,
        skb_mark: of("sk_buff", "mark")?,
        ct_tuplehash: of("nf_conn", "tuplehash")?,
        ct_tuplehash_size: btf
            .size("nf_conntrack_tuple_hash")
            .ok_or(OffsetsError::Missing { structure: "nf_conntrack_tuple_hash", member: "(size)" })?,
        tuplehash_tuple: of("nf_conntrack_tuple_hash", "tuple")?,
        ct_status: of("nf_conn", "status")?,
        ct_net: of("nf_conn", "ct_net")?,
        ct_mark: btf.offset("nf_conn", "mark").unwrap_or(0),
        ct_ext: of("nf_conn", "ext")?,
        ext_acct: btf
            .constant("nf_ct_ext_id", "NF_CT_EXT_ACCT")
            .ok_or(OffsetsError::Missing { structure: "nf_ct_ext_id", member: "NF_CT_EXT_ACCT" })?,
        net_inum: of("net", "ns")? + of("ns_common", "inum")?,
        dev_ifindex: of("net_device", "ifindex")?,
        dev_net: of("net_device", "nd_net")?,
        sock_net: of("sock", "__sk_common")? + of("sock_common", "skc_net")?,
        dst_dev: of("dst_entry", "dev")?,
        dst_flags: of("dst_entry", "flags")?,
        state_hook: of("nf_hook_state", "hook")?,
        state_in: both_interfaces(btf)?,
        rt_type,
        rt_gw_family,
        rt_gw,
        rt6_flags,
        rt6_gateway,
        words_type: btf.structure("rtnl_link_stats64").unwrap_or(0),
    })
}

/// Offsets of all these members, or zeros when one is missing.
fn all_of<const N: usize>(btf: &Btf<'_>, structure: &str, members: [&str; N]) -> [u32; N] {
    let found = members.map(|member| btf.offset(structure, member));
    if found.iter().all(Option::is_some) { found.map(Option::unwrap_or_default) } else { [0; N] }
}

/// The kernel side reads both pointers at once.
fn both_interfaces(btf: &Btf<'_>) -> Result<u32, OffsetsError> {
    match (btf.offset("nf_hook_state", "in"), btf.offset("nf_hook_state", "out")) {
        (Some(entering), Some(leaving)) if leaving == entering + 8 => Ok(entering),
        (None, _) => Err(OffsetsError::Missing { structure: "nf_hook_state", member: "in" }),
        _ => Err(OffsetsError::Unlike("nf_hook_state")),
    }
}

/// The kernel side reads a tuple as one block of 40 bytes: it must be the block that it thinks it is.
fn check_tuple(btf: &Btf<'_>) -> Result<(), OffsetsError> {
    let layout = [
        btf.offset("nf_conntrack_tuple", "src"),
        btf.offset("nf_conntrack_man", "u"),
        btf.offset("nf_conntrack_man", "l3num"),
        btf.offset("nf_conntrack_tuple", "dst"),
    ];
    let expected = [0, 16, 18, 20].map(Some);
    if layout == expected && btf.size("nf_conntrack_tuple") == Some(40) {
        Ok(())
    } else {
        Err(OffsetsError::Unlike("nf_conntrack_tuple"))
    }
}

fn names(btf: &Btf<'_>, enumeration: &str, prefix: &str) -> BTreeMap<u32, String> {
    btf.constants(enumeration)
        .into_iter()
        .map(|(value, name)| (value, name.strip_prefix(prefix).unwrap_or(&name).to_owned()))
        .collect()
}
