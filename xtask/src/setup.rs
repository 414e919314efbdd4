//! `cargo xtask setup`: what building and testing need, installed where that is possible, named where it is not.
use crate::{shell, system, vm};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Install what building and testing need: BPF toolchain, bpf-linker, netfilter tools, CNI plugins.
#[derive(clap::Args)]
pub struct Args {
    /// Also what the tests in a virtual machine need: qemu and Debian's kernel image.
    #[arg(long)]
    vm: bool,
    /// Only what building needs, not the lab's tools.
    #[arg(long, conflicts_with = "vm")]
    build_only: bool,
}

/// What the caller is about to do; building is always among it.
#[derive(Clone, Copy, Default)]
pub struct Needs {
    /// Tests and demonstrations in network namespaces.
    pub lab: bool,
    /// Tests in a virtual machine.
    pub vm: bool,
    /// Measurements beside other tools.
    pub bench: bool,
}

/// The oldest bpf-linker release series that links the kernel object, and the version that setup builds.
const LINKER_SERIES: (u32, u32) = (0, 13);
const LINKER_VERSION: &str = "0.13.0";
const LLVM: &str = "/usr/lib/llvm-22";

/// A rustc with a prebuilt `core` for bpfel-unknown-none, and that `core`.
const CORE_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];
const LINKER_PACKAGES: [&str; 7] =
    ["gcc", "g++", "llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "libzstd-dev", "libxml2-dev"];
/// What compiles the container runtime's interface (crate k8s-cri).
const PROTOC_PACKAGE: &str = "protobuf-compiler";
const LAB_PACKAGES: [&str; 12] = [
    "iptables",
    "nftables",
    "conntrack",
    "ipset",
    "bpftool",
    "containernetworking-plugins",
    "iproute2",
    "procps",
    "sudo",
    "containerd",
    "runc",
    "busybox-static",
];
const BENCH_PACKAGES: [&str; 1] = ["tcpdump"];
const VM_PACKAGES: [&str; 3] = ["qemu-system-x86", "cpio", "kmod"];

/// Installs what is missing and says what was there.
pub fn main(args: &Args) -> Result<()> {
    ensure(Needs { lab: !args.build_only, vm: args.vm, ..Needs::default() })
}

/// Installs what is missing for `needs`; when nothing is, this takes a fraction of a second and changes nothing.
///
/// # Errors
/// One sentence a missing thing when it cannot be installed from here (no apt, or not root).
pub fn ensure(needs: Needs) -> Result<()> {
    shell::step("setup", || {
        if needs.lab {
            rust_components()?;
        }
        let core = bpf_core();
        let linker = linker_works();
        let mut wanted: Vec<&str> = Vec::new();
        wanted.extend(core.is_none().then_some(CORE_PACKAGES).iter().flatten());
        wanted.extend((!linker).then_some(LINKER_PACKAGES).iter().flatten());
        wanted.extend((!system::which("protoc")).then_some(PROTOC_PACKAGE));
        wanted.extend(needs.lab.then_some(LAB_PACKAGES).iter().flatten().filter(|package| !provided(package)));
        wanted.extend(needs.bench.then_some(BENCH_PACKAGES).iter().flatten().filter(|package| !provided(package)));
        wanted.extend(needs.vm.then_some(VM_PACKAGES).iter().flatten());
        install(&wanted)?;
        let core = core.or_else(bpf_core).context(
            "no Rust toolchain can build for bpfel-unknown-none: \
             run `rustup toolchain install nightly --component rust-src`",
        )?;
        println!("· BPF toolchain: {core}");
        if !linker {
            install_linker()?;
        }
        if needs.vm {
            let image = vm::image::fetch(vm::Kernel::default())?;
            println!("· kernel {} ({}, {})", image.release, image.vmlinuz.display(), image.modules.display());
        }
        Ok(())
    })
}

/// Formatting and linting are part of the tests; rustup may have been asked for a minimal profile (container images are).
fn rust_components() -> Result<()> {
    for component in ["fmt", "clippy"] {
        if shell::probe(shell::cargo().args([component, "--version"])).is_none() {
            bail!("`cargo {component}` is missing: run `rustup component add rustfmt clippy`");
        }
    }
    Ok(())
}

/// The toolchain that can build the kernel object: a nightly with core's source, else a rustc with a prebuilt core.
fn bpf_core() -> Option<String> {
    let nightly = shell::probe(
        // Looking must not download a toolchain.
        Command::new("rustup").env("RUSTUP_AUTO_INSTALL", "0").args(["run", "nightly", "rustc", "--print", "sysroot"]),
    );
    if nightly.is_some_and(|sysroot| Path::new(&sysroot).join("lib/rustlib/src/rust/library/core").is_dir()) {
        return Some("rustup's nightly, building core from source".to_owned());
    }
    ["rustc", "/usr/bin/rustc"].into_iter().find_map(|rustc| {
        let sysroot = shell::probe(Command::new(rustc).args(["--print", "sysroot"]))?;
        let core = Path::new(&sysroot).join("lib/rustlib/bpfel-unknown-none/lib");
        core.is_dir().then(|| format!("{rustc} with a prebuilt core"))
    })
}

/// Whether bpf-linker starts (it may lack its LLVM library) and is new enough.
fn linker_works() -> bool {
    let version = shell::probe(Command::new("bpf-linker").arg("--version"));
    let found = version.as_deref().and_then(series);
    match found {
        Some(found) => found >= LINKER_SERIES,
        None => false,
    }
}

/// Major and minor of `bpf-linker 0.13.0`.
fn series(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.rsplit(' ').next()?.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

fn install_linker() -> Result<()> {
    let llvm = PathBuf::from(LLVM);
    if !llvm.join("bin/llvm-config").exists() {
        bail!(
            "bpf-linker {LINKER_VERSION} is missing: run `cargo install bpf-linker` (it needs an LLVM to build with)"
        );
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(llvm.join("bin")).chain(std::env::split_paths(&path)))?;
    let mut cargo = shell::cargo();
    cargo.env("PATH", path).env("LLVM_PREFIX", &llvm).args(["install", "bpf-linker", "--version", LINKER_VERSION]);
    cargo.args(["--locked", "--force", "--no-default-features", "--features", "llvm-22"]);
    shell::step(&format!("build bpf-linker {LINKER_VERSION}"), || shell::quietly(&mut cargo))?;
    if !linker_works() {
        bail!("bpf-linker was installed and still does not start: is cargo's bin directory on the PATH?");
    }
    Ok(())
}

/// Whether a lab package's programs are here although dpkg may not know them (other distributions, own builds).
fn provided(package: &str) -> bool {
    match package {
        "containernetworking-plugins" => {
            ["/opt/cni/bin", "/usr/lib/cni"].iter().any(|dir| Path::new(dir).join("portmap").exists())
        }
        "iproute2" => system::which("ip"),
        "procps" => system::which("sysctl"),
        "busybox-static" => system::which("busybox"),
        "nftables" => system::which("nft"),
        // Being root, nothing goes through sudo.
        "sudo" => system::is_root() || system::which("sudo"),
        program => system::which(program),
    }
}

/// Installs those packages that are missing, with one `apt-get update` first and one more try after a failure.
fn install(wanted: &[&str]) -> Result<()> {
    let missing = system::missing_packages(wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !system::has_apt() {
        bail!("missing here: {}", without_apt(&missing));
    }
    if !system::is_root() {
        bail!("packages are missing: run `sudo apt-get install {names}`");
    }
    shell::step(&format!("install {names}"), || {
        update()?;
        if let Err(error) = apt_install(&missing) {
            println!("· {error:#}\n· trying once more");
            update()?;
            apt_install(&missing)?;
        }
        Ok(())
    })
}

/// Refreshes apt's lists.
pub fn update() -> Result<()> {
    shell::quietly(apt().args(["update", "-q"])).context("apt cannot refresh its package lists")
}

/// `apt-get` that asks nothing.
pub fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").env("NEEDRESTART_MODE", "a");
    apt
}

fn apt_install(packages: &[&str]) -> Result<()> {
    let mut apt = apt();
    apt.args(["install", "-y", "-q", "--no-install-recommends"]).args(packages);
    shell::quietly(&mut apt)
}

/// The packages of programs that tests and measurements run.
fn tools_packages() -> impl Iterator<Item = &'static str> {
    LAB_PACKAGES.into_iter().chain(VM_PACKAGES).chain(BENCH_PACKAGES)
}

/// What to do on a system whose packages we do not know.
fn without_apt(missing: &[&str]) -> String {
    let mut advice = Vec::new();
    if missing.contains(&CORE_PACKAGES[0]) {
        advice.push("a BPF toolchain (`rustup toolchain install nightly --component rust-src`)".to_owned());
    }
    if missing.contains(&LINKER_PACKAGES[2]) {
        advice.push(format!("bpf-linker (`cargo install bpf-linker --version {LINKER_VERSION}`)"));
    }
    if missing.contains(&PROTOC_PACKAGE) {
        advice.push("protoc, the protocol buffers compiler".to_owned());
    }
    let tools: Vec<&str> =
        missing.iter().copied().filter(|name| tools_packages().any(|package| package == *name)).collect();
    if !tools.is_empty() {
        advice.push(format!("the tools that Debian packages as {}", tools.join(", ")));
    }
    advice.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linker_versions_compare() {
        assert_eq!(series("bpf-linker 0.13.0"), Some((0, 13)));
        assert!(series("bpf-linker 0.9.15").is_some_and(|found| found < LINKER_SERIES));
        assert_eq!(series("bpf-linker"), None);
    }

    #[test]
    fn advice_names_the_commands() {
        let advice = without_apt(&["rustc-web", "llvm-22-dev", "protobuf-compiler", "ipset"]);
        assert!(advice.contains("--component rust-src"), "{advice}");
        assert!(advice.contains("cargo install bpf-linker"), "{advice}");
        assert!(advice.contains("protoc"), "{advice}");
        assert!(advice.contains("ipset"), "{advice}");
    }
}
