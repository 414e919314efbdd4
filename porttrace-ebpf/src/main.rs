//! The table of kernel programs: section → function; nothing else.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("porttrace-ebpf is a kernel object: `cargo xtask build` compiles it for bpfel-unknown-none");
    std::process::exit(2);
}
