//! Compiles the kernel side for `bpfel-unknown-none` with the BPF toolchain that is there; the library embeds the object.
//!
//! The target has no prebuilt `core` in rustup, so in this order: a rustup nightly with `rust-src` (then `-Z build-std`), a
//! rustc whose sysroot has the target (Debian's packages rustc-web and libstd-rust-web-dev-bpf), else one message.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "bpfel-unknown-none";

/// What the surrounding cargo sets for its own rustc; none of it may reach the inner one.
const NOT_INHERITED: [&str; 12] = [
    "RUSTC",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTDOC",
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_DIR",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_MAKEFLAGS",
    "MAKEFLAGS",
    "RUSTUP_TOOLCHAIN",
];

fn main() {
    if let Err(message) = build() {
        eprintln!("porttrace: {message}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let workspace = manifest.parent().ok_or("the crate has no workspace around it")?.to_path_buf();
    for watched in ["porttrace-ebpf/src", "porttrace-ebpf/Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", workspace.join(watched).display());
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=PORTTRACE_BPF_RUSTC");

    let linker = find_linker()?;
    let mut cargo = toolchain()?;
    let target_dir = out.join("bpf");
    prepend_path(&mut cargo, &linker)?;
    cargo
        .current_dir(&workspace)
        .args([
            "build",
            "--package",
            "porttrace-ebpf",
            "--bin",
            "porttrace",
            "--release",
            "--locked",
            "--target",
            TARGET,
        ])
        .arg("--target-dir")
        .arg(&target_dir);
    let status = cargo.status().map_err(|error| format!("cannot run {cargo:?}: {error}"))?;
    if !status.success() {
        return Err(format!("the eBPF programs did not compile ({status}); the compiler's messages are above"));
    }
    let object = target_dir.join(TARGET).join("release/porttrace");
    std::fs::copy(&object, out.join("porttrace.bpf.o"))
        .map_err(|error| format!("cannot copy {}: {error}", object.display()))?;
    Ok(())
}

/// The inner cargo, set up for the first BPF toolchain that is found.
fn toolchain() -> Result<Command, String> {
    if nightly_has_source() {
        let mut command = clean("rustup");
        command.args(["run", "nightly", "cargo", "-Z", "build-std=core"]);
        return Ok(command);
    }
    let rustc = prebuilt_rustc().ok_or_else(|| {
        format!(
            "no Rust toolchain here can compile eBPF (target {TARGET}). Install one and build again:\n\
             \x20 Debian, Ubuntu:  apt-get install rustc-web libstd-rust-web-dev-bpf\n\
             \x20 with rustup:     rustup toolchain install nightly --component rust-src\n\
             or let `cargo xtask setup` do it. PORTTRACE_BPF_RUSTC can name a rustc that has the target."
        )
    })?;
    let mut command = clean(variable("CARGO")?);
    // Inline assembly for BPF is an unstable feature, and this compiler a stable one.
    command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
    Ok(command)
}

fn clean(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for name in NOT_INHERITED {
        command.env_remove(name);
    }
    command
}

fn nightly_has_source() -> bool {
    output("rustup", &["run", "nightly", "rustc", "--print", "sysroot"])
        .is_some_and(|sysroot| Path::new(&sysroot).join("lib/rustlib/src/rust/library/core/src/lib.rs").exists())
}

/// A rustc whose sysroot holds a `core` for the target.
fn prebuilt_rustc() -> Option<PathBuf> {
    let named = env::var_os("PORTTRACE_BPF_RUSTC").map(PathBuf::from);
    let in_path = env::var_os("PATH").unwrap_or_default();
    let searched = env::split_paths(&in_path).map(|folder| folder.join("rustc"));
    named.into_iter().chain([PathBuf::from("/usr/bin/rustc")]).chain(searched).find(|rustc| {
        output(rustc, &["--print", "sysroot"])
            .is_some_and(|sysroot| Path::new(&sysroot).join("lib/rustlib").join(TARGET).join("lib").is_dir())
    })
}

fn find_linker() -> Result<PathBuf, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    env::split_paths(&path)
        .chain(cargo_home.into_iter().chain(home).map(|folder| folder.join("bin")))
        .find(|folder| folder.join("bpf-linker").is_file())
        .ok_or_else(|| {
            "bpf-linker is missing: `cargo install bpf-linker` (it needs LLVM), or `cargo xtask setup`".to_owned()
        })
}

fn prepend_path(command: &mut Command, folder: &Path) -> Result<(), String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let joined = env::join_paths([folder.to_path_buf()].into_iter().chain(env::split_paths(&path)))
        .map_err(|error| format!("PATH: {error}"))?;
    command.env("PATH", joined);
    Ok(())
}

/// A command's trimmed standard output, if it succeeds.
fn output(program: impl AsRef<OsStr>, arguments: &[&str]) -> Option<String> {
    let output = clean(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}
