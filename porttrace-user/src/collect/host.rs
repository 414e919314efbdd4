//! Files of the node, also from inside a container that shares the node's processes but not its mounts (the DaemonSet).

use std::path::{Path, PathBuf};

/// The root file system of the node as its first process sees it.
const HOST: &str = "/proc/1/root";

/// Where this file of the node can be opened: where it says, else through the node's first process.
pub(super) fn file(path: impl AsRef<Path>) -> Option<PathBuf> {
    let path = path.as_ref();
    let through = || Path::new(HOST).join(path.strip_prefix("/").unwrap_or(path));
    // Through /proc the last component may be a link that must be read there too; `exists` follows it.
    std::iter::once(path.to_owned()).chain(std::iter::once_with(through)).find(|path| path.exists())
}
