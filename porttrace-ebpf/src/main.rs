//! The table of kernel programs: section → function; nothing else.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod conntrack;
#[cfg(target_arch = "bpf")]
mod drops;
#[cfg(target_arch = "bpf")]
mod emit;
#[cfg(target_arch = "bpf")]
mod flow;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod packet;
#[cfg(target_arch = "bpf")]
mod route;
#[cfg(target_arch = "bpf")]
mod skb;

#[cfg(target_arch = "bpf")]
mod programs {
    use crate::skb::peek;
    use crate::{conntrack, drops, flow};
    use aya_ebpf::EbpfContext;
    use aya_ebpf::macros::{btf_tracepoint, classifier, fentry, kprobe};
    use aya_ebpf::programs::{BtfTracePointContext, FEntryContext, ProbeContext, TcContext};
    use core::ffi::c_void;
    use porttrace_ebpf::Kind;

    /// `TCX_NEXT`, `TC_ACT_UNSPEC`: the next program or filter decides.
    const NEXT: i32 = -1;
    /// `NF_ACCEPT`.
    const ACCEPT: i32 = 1;

    #[classifier]
    pub fn tc_ingress(ctx: TcContext) -> i32 {
        flow::sighting(&ctx, Kind::TcIngress);
        NEXT
    }

    #[classifier]
    pub fn tc_egress(ctx: TcContext) -> i32 {
        flow::sighting(&ctx, Kind::TcEgress);
        NEXT
    }

    // The section name only makes the loader's parser accept these; they are loaded as BPF_PROG_TYPE_NETFILTER.

    #[unsafe(no_mangle)]
    #[unsafe(link_section = "classifier/nf_after_conntrack")]
    pub extern "C" fn nf_after_conntrack(ctx: *mut c_void) -> i32 {
        conntrack::hook(ctx, Kind::AfterConntrack);
        ACCEPT
    }

    #[unsafe(no_mangle)]
    #[unsafe(link_section = "classifier/nf_after_dnat")]
    pub extern "C" fn nf_after_dnat(ctx: *mut c_void) -> i32 {
        conntrack::hook(ctx, Kind::AfterDnat);
        ACCEPT
    }

    #[unsafe(no_mangle)]
    #[unsafe(link_section = "classifier/nf_after_snat")]
    pub extern "C" fn nf_after_snat(ctx: *mut c_void) -> i32 {
        conntrack::hook(ctx, Kind::AfterSnat);
        ACCEPT
    }

    #[unsafe(no_mangle)]
    #[unsafe(link_section = "classifier/nf_local_in")]
    pub extern "C" fn nf_local_in(ctx: *mut c_void) -> i32 {
        conntrack::hook(ctx, Kind::LocalIn);
        ACCEPT
    }

    /// `nf_nat_setup_info(struct nf_conn *ct, const struct nf_nat_range2 *range, enum nf_nat_manip_type maniptype)`
    #[kprobe]
    pub fn kp_nat_setup(ctx: ProbeContext) -> u32 {
        conntrack::nat_setup::<false>(ctx.arg(0).unwrap_or(0), ctx.arg(2).unwrap_or(0));
        0
    }

    /// `__nf_conntrack_confirm(struct sk_buff *skb)`
    #[kprobe]
    pub fn kp_confirm(ctx: ProbeContext) -> u32 {
        conntrack::confirm::<false>(ctx.arg(0).unwrap_or(0));
        0
    }

    /// `nf_ct_delete(struct nf_conn *ct, u32 portid, int report)`
    #[kprobe]
    pub fn kp_destroy(ctx: ProbeContext) -> u32 {
        conntrack::destroy::<false>(ctx.arg(0).unwrap_or(0));
        0
    }

    // The same functions where the kernel can call programs at their beginning (trampolines). Each of these is loaded twice.

    #[fentry(function = "nf_nat_setup_info")]
    pub fn fe_nat_setup(ctx: FEntryContext) -> i32 {
        conntrack::nat_setup::<true>(argument(&ctx, 0), argument(&ctx, 2) as u32);
        0
    }

    #[fentry(function = "__nf_conntrack_confirm")]
    pub fn fe_confirm(ctx: FEntryContext) -> i32 {
        conntrack::confirm::<true>(argument(&ctx, 0));
        0
    }

    #[fentry(function = "nf_ct_delete")]
    pub fn fe_destroy(ctx: FEntryContext) -> i32 {
        conntrack::destroy::<true>(argument(&ctx, 0));
        0
    }

    /// An argument of the function as a number: the verifier, which knows its type, would forbid to reckon with it.
    #[inline(always)]
    fn argument(ctx: &FEntryContext, number: u64) -> u64 {
        peek(ctx.as_ptr() as u64 + 8 * number)
    }

    /// `kfree_skb(struct sk_buff *skb, void *location, enum skb_drop_reason reason, …)`
    #[btf_tracepoint(function = "kfree_skb")]
    pub fn tp_drop(ctx: BtfTracePointContext) -> i32 {
        drops::dropped(ctx.arg(0), ctx.arg(2));
        0
    }

    /// `tcp_send_reset(const struct sock *sk, const struct sk_buff *skb, …)`
    #[btf_tracepoint(function = "tcp_send_reset")]
    pub fn tp_reset(ctx: BtfTracePointContext) -> i32 {
        drops::reset_sent(&ctx);
        0
    }

    #[panic_handler]
    fn panic(_info: &core::panic::PanicInfo) -> ! {
        loop {}
    }

    /// Helpers such as `bpf_probe_read_kernel` are for programs under a GPL-compatible licence only.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("porttrace-ebpf is a kernel object: `cargo xtask build` compiles it for bpfel-unknown-none");
    std::process::exit(2);
}
