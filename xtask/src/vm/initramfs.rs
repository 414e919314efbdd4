//! The initramfs: a static busybox, the modules that reach the host's files, and init.
use super::guest::Guest;
use super::image::Image;
use crate::shell;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What init needs to see the host's root file system; loaded with what they depend on.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
const DIRECTORIES: [&str; 9] = ["bin", "modules", "proc", "sys", "dev", "host", "new", "writable", "tmp"];
const BUSYBOX: &str = "/bin/busybox";

/// Writes the archive for this image and run, and returns its path.
pub fn write(image: &Image, guest: &Guest) -> Result<PathBuf> {
    let tree = guest.script.with_extension("initramfs");
    let archive = guest.script.with_extension("cpio");
    let made = fill(&tree, image, guest).and_then(|()| pack(&tree, &archive));
    // The tree is small and in the target directory; the archive is what counts.
    drop(fs::remove_dir_all(&tree));
    made.with_context(|| format!("cannot make {}", archive.display()))?;
    Ok(archive)
}

fn fill(tree: &Path, image: &Image, guest: &Guest) -> Result<()> {
    for directory in DIRECTORIES {
        fs::create_dir_all(tree.join(directory))?;
    }
    fs::copy(BUSYBOX, tree.join("bin/busybox")).with_context(|| format!("cannot copy {BUSYBOX}"))?;
    let home = image.modules.join(&image.release);
    let [loadable, builtin] = ["modules.dep", "modules.builtin"].map(|name| fs::read_to_string(home.join(name)));
    let order = load_order(&loadable?, &builtin?)?;
    let mut names = Vec::new();
    for module in &order {
        let name = module.rsplit('/').next().unwrap_or(module);
        fs::copy(home.join(module), tree.join("modules").join(name))
            .with_context(|| format!("cannot copy {module}"))?;
        names.push(name);
    }
    executable(&tree.join("init"), &guest.init.replace("@MODULES@", &names.join(" ")))?;
    executable(&tree.join("modprobe"), &guest.modprobe)
}

fn executable(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn pack(tree: &Path, archive: &Path) -> Result<()> {
    let mut command = Command::new("cpio");
    command.args(["--create", "--format=newc", "--quiet", "--reproducible"]).current_dir(tree);
    let mut cpio = command
        .stdin(Stdio::piped())
        .stdout(fs::File::create(archive)?)
        .spawn()
        .with_context(|| format!("cannot start `{}`", shell::describe(&command)))?;
    let names = shell::output(Command::new("find").arg(".").current_dir(tree))?;
    let mut input = cpio.stdin.take().context("cpio has no input")?;
    std::io::Write::write_all(&mut input, names.as_bytes())?;
    drop(input);
    let status = cpio.wait()?;
    if !status.success() {
        bail!("cpio failed ({status})");
    }
    Ok(())
}

/// The modules' files, each after what it depends on (`modules.dep`: "file: direct and indirect dependencies").
fn load_order(dependencies: &str, builtin: &str) -> Result<Vec<String>> {
    let table: BTreeMap<&str, (&str, Vec<&str>)> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (module_name(file), (file, needs.split_whitespace().collect())))
        .collect();
    let mut order: Vec<String> = Vec::new();
    for module in MODULES {
        if builtin.lines().any(|file| module_name(file) == module) {
            continue;
        }
        let (file, needs) = table.get(module).with_context(|| format!("the kernel has no module {module}"))?;
        // depmod lists what must come first last.
        for file in needs.iter().rev().chain(std::iter::once(file)) {
            if !order.iter().any(|known| known == file) {
                order.push((*file).to_owned());
            }
        }
    }
    Ok(order)
}

/// `virtio_pci` for `kernel/drivers/virtio/virtio_pci.ko.xz`.
fn module_name(file: &str) -> &str {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split('.').next().unwrap_or(name)
}

/// Removes the archive of a run.
pub fn remove(archive: &Path) {
    // It is only a file in the target directory, and the name is not used again soon.
    drop(fs::remove_file(archive));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first() {
        let text = "kernel/v/virtio_pci.ko: kernel/v/legacy.ko kernel/v/virtio_ring.ko kernel/v/virtio.ko\n\
                    kernel/n/9pnet_virtio.ko: kernel/n/9pnet.ko kernel/v/virtio_ring.ko kernel/v/virtio.ko\n\
                    kernel/f/9p.ko.xz: kernel/n/9pnet.ko\nkernel/f/overlay.ko:\n";
        let order = load_order(text, "").unwrap();
        let names: Vec<&str> = order.iter().map(|file| module_name(file)).collect();
        assert_eq!(names, ["virtio", "virtio_ring", "legacy", "virtio_pci", "9pnet", "9pnet_virtio", "9p", "overlay"]);
    }

    #[test]
    fn missing_module_is_named() {
        assert!(load_order("kernel/f/9p.ko:\n", "").unwrap_err().to_string().contains("virtio_pci"));
    }

    #[test]
    fn builtin_modules_need_no_loading() {
        let builtin = "kernel/drivers/virtio/virtio_pci.ko\nkernel/net/9p/9pnet_virtio.ko\nkernel/fs/9p/9p.ko\n";
        assert_eq!(load_order("kernel/f/overlay.ko.xz:\n", builtin).unwrap(), ["kernel/f/overlay.ko.xz"]);
    }
}
