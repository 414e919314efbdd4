//! Debian's kernel image: downloaded and unpacked into the target directory, never installed.
use super::Kernel;
use crate::{setup, shell, system};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// An unpacked kernel image.
pub struct Image {
    /// The compressed kernel that boots.
    pub vmlinuz: PathBuf,
    /// Its `lib/modules`, with the dependency lists made.
    pub modules: PathBuf,
    /// `6.1.0-50-amd64`, as `uname -r` prints it there.
    pub release: String,
}

/// The unpacked image of this kernel series; downloads it when it is not there yet.
///
/// # Errors
/// When apt does not offer the image, or it cannot be downloaded or unpacked.
pub fn fetch(kernel: Kernel) -> Result<Image> {
    let home = system::target().join("vm").join(kernel.series());
    if let Some(image) = find(&home) {
        return Ok(image);
    }
    if !system::has_apt() {
        bail!("the virtual machine boots Debian's kernel image, and there is no apt here to get it from");
    }
    shell::step(&format!("download and unpack Debian's {} kernel", kernel.series()), || {
        if let Err(error) = download(kernel, &home) {
            println!("· {error:#}\n· trying once more with fresh package lists");
            setup::update()?;
            download(kernel, &home)?;
        }
        find(&home).with_context(|| format!("the kernel package unpacked in {} has no kernel in it", home.display()))
    })
}

/// What an earlier run left; the dependency list is made last, so it says that the work was finished.
fn find(home: &Path) -> Option<Image> {
    let modules = home.join("lib/modules");
    let entry = std::fs::read_dir(&modules).ok()?.flatten().next()?;
    let release = entry.file_name().to_string_lossy().into_owned();
    let vmlinuz = home.join("boot").join(format!("vmlinuz-{release}"));
    let whole = vmlinuz.exists() && entry.path().join("modules.dep").exists();
    whole.then_some(Image { vmlinuz, modules, release })
}

fn download(kernel: Kernel, home: &Path) -> Result<()> {
    if home.exists() {
        std::fs::remove_dir_all(home).with_context(|| format!("cannot remove {}", home.display()))?;
    }
    std::fs::create_dir_all(home).with_context(|| format!("cannot create {}", home.display()))?;
    let package = package(kernel)?;
    // Without this apt warns that its download user cannot write here.
    let apt_options = ["-q", "-o", "APT::Sandbox::User=root", "download"];
    shell::quietly(setup::apt().current_dir(home).args(apt_options).arg(&package))?;
    let archive = std::fs::read_dir(home)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download {package} left no package in {}", home.display()))?;
    shell::quietly(Command::new("dpkg").arg("-x").arg(&archive).arg(home))?;
    std::fs::remove_file(&archive)?;
    let release = package.trim_start_matches("linux-image-");
    shell::quietly(Command::new("depmod").arg("-b").arg(home).arg(release))
}

/// The real package behind the series' meta-package.
fn package(kernel: Kernel) -> Result<String> {
    let meta = kernel.package();
    let listed = shell::probe(Command::new("apt-cache").args(["depends", meta])).unwrap_or_default();
    let package = listed.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    let release = package.with_context(|| format!("apt does not offer {meta}; it is in Debian 12 and later"))?;
    Ok(format!("linux-image-{release}"))
}
