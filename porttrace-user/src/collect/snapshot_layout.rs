//! Where a snapshot's files lie: most of them side by side, some in folders.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders of files: lists of `xt_recent`, Kubernetes objects.
const FLAT: [&str; 2] = ["xt_recent", "objects"];
/// The folder of the pods' network namespaces, each a folder with one file.
const NAMESPACES: &str = "netns";
const STATE: &str = "state.json";

/// Files that speak of the whole cluster: they may also lie beside the folder `nodes` that this node's folder is in.
pub(super) const CLUSTER: [&str; 3] = ["cluster.json", "cri.json", "cni-results.json"];

/// The folders to look into: the node's own, and the one above `nodes/NAME`.
pub(super) fn folders(path: &Path) -> Vec<PathBuf> {
    let above = path.canonicalize().ok().and_then(|path| {
        let nodes = path.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "nodes"))?;
        nodes.parent().map(Path::to_owned)
    });
    [Some(path.to_owned()), above].into_iter().flatten().collect()
}

/// How many components of a path are the snapshot's own: 1 for a plain file, more for one in its folders.
pub(super) fn depth(path: &Path) -> usize {
    let mut parts = path.iter().rev().map(|part| part.to_string_lossy());
    let (name, folder, outer) = (parts.next(), parts.next(), parts.next());
    match (name.as_deref(), folder.as_deref(), outer.as_deref()) {
        (Some(STATE), Some(_), Some(NAMESPACES)) => 3,
        (Some(name), Some(folder), _) if FLAT.contains(&folder) && fits(folder, name) => 2,
        _ => 1,
    }
}

fn fits(folder: &str, name: &str) -> bool {
    folder != "objects" || [".json", ".yaml", ".yml"].iter().any(|end| name.ends_with(end))
}

/// The names of the files in its folders, sorted, no more than `most` of each folder.
pub(super) fn below(path: &Path, most: usize) -> Vec<String> {
    // A link to a folder elsewhere is not followed: a snapshot is somebody else's.
    let is_folder = |path: &Path| fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    let list = |folder: &str| {
        let folder = Some(path.join(folder)).filter(|folder| is_folder(folder));
        let entries = folder.and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten().take(most);
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    };
    let mut names = Vec::new();
    for folder in FLAT {
        names.extend(list(folder).into_iter().filter(|name| fits(folder, name)).map(|name| format!("{folder}/{name}")));
    }
    let namespaces = list(NAMESPACES).into_iter().filter(|name| is_folder(&path.join(NAMESPACES).join(name)));
    names.extend(namespaces.map(|name| format!("{NAMESPACES}/{name}/{STATE}")));
    names
}
