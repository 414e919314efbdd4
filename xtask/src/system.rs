//! What this machine is and where the build puts things.
use crate::shell;
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The repository's root.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Cargo's target directory (`CARGO_TARGET_DIR`, else `target` at the root).
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// Whether this process runs as root (the effective user of /proc/self).
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// Whether packages come from apt here (Debian, Ubuntu and what is made of them).
pub fn has_apt() -> bool {
    Path::new("/etc/debian_version").exists() && which("apt-get")
}

/// Whether a program of this name is on the PATH or in the usual administrator's directories.
pub fn which(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).any(|dir| dir.join(program).is_file())
}

/// Those of `names` that dpkg does not have installed, in the order given.
pub fn missing_packages<'a>(names: &[&'a str]) -> Vec<&'a str> {
    // dpkg-query exits with 1 when one name is unknown, and still prints the others.
    let listed = Command::new("dpkg-query").args(["-W", "-f", "${Package} ${db:Status-Status}\n"]).args(names).output();
    let text = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let installed: BTreeSet<&str> = text.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    names.iter().copied().filter(|name| !installed.contains(name)).collect()
}

/// A command as root: itself when we are root, else through sudo, which may ask for a password.
pub fn as_root(program: &Path) -> Command {
    if is_root() {
        return Command::new(program);
    }
    println!("· {} needs root: going through sudo", program.file_name().unwrap_or_default().to_string_lossy());
    let mut command = Command::new("sudo");
    command.arg("--").arg(program);
    command
}

/// Replaces this process by the command, so that signals and the exit code pass through unchanged.
pub fn become_(command: &mut Command) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start `{}`", shell::describe(command)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_holds_the_workspace() {
        assert!(root().join("porttrace-user").is_dir());
    }

    #[test]
    fn unknown_package_is_missing() {
        assert_eq!(missing_packages(&["no-such-package-at-all"]), ["no-such-package-at-all"]);
    }
}
