//! Tests that need root: they fail in CI when they cannot run, and say `skipped: why` elsewhere.

/// Whether this process may make network namespaces. `false` means that the caller returns at once: the reason was printed.
///
/// # Panics
/// When `CI=true` and the process is not root: a privileged test that silently did not run would be a lie.
pub fn may_run(what: &str) -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    let why = format!("{what} needs root (network namespaces)");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{why}, and CI=true allows no skipping");
    println!("skipped: {why}");
    false
}
