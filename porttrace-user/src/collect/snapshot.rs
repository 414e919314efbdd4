//! Snapshots: a node's files in a directory or a tar (plain, zstd, gzip), so that it can be looked at elsewhere.

use crate::core::model::state::NodeState;
use crate::core::parse::{self, Files};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};
use thiserror::Error;

/// The files that make up a snapshot; others in a directory or archive are passed over.
pub const NAMES: [&str; 35] = [
    "snapshot.json",
    "iptables-save.txt",
    "iptables-legacy-save.txt",
    "ip6tables-save.txt",
    "ip6tables-legacy-save.txt",
    "nft-hooks.txt",
    "nft-ruleset.json",
    "nft-ruleset.txt",
    "ip-link.json",
    "bridge-link.json",
    "ip-addr.json",
    "ip-route.json",
    "ip6-route.json",
    "ip-rule.json",
    "ip6-rule.json",
    "ip-neigh.json",
    "sysctl.txt",
    "conntrack.txt",
    "ipset.txt",
    "ipvsadm.txt",
    "ip_vs.txt",
    "ss.txt",
    "nf_conntrack.txt",
    "netstat.txt",
    "clock.txt",
    "proxy-mode.txt",
    "kube-proxy-config.json",
    "kube-proxy-metrics.txt",
    "bridge-fdb.json",
    "ip-netns.txt",
    "uname.txt",
    "cluster.json",
    "cri.json",
    "netns.json",
    "cni-results.json",
];

/// Bytes that a snapshot may unpack to; far above the dump of the largest cluster, below a machine's memory.
const LARGEST: u64 = 512 << 20;
/// Entries that an archive may have.
const ENTRIES: usize = 20_000;

#[path = "snapshot_layout.rs"]
mod layout;

/// Why a snapshot could not be read or written.
#[derive(Debug, Error)]
pub enum SnapshotError {
    #[error("cannot read the snapshot {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is neither a directory nor a tar archive (plain, .tar.zst or .tar.gz)", path.display())]
    Kind { path: PathBuf },
    #[error("the archive {} is damaged or cut short ({why}); take the snapshot again", path.display())]
    Damaged { path: PathBuf, why: String },
    #[error("{} holds {entry:?}, {why}: a snapshot has plain files only; nothing was read from it", path.display())]
    Unsafe { path: PathBuf, entry: String, why: &'static str },
    #[error("{} unpacks to more than {} MiB or {ENTRIES} files: this is not a node's snapshot", path.display(), LARGEST >> 20)]
    TooBig { path: PathBuf },
    #[error("{} holds none of the files of a node (iptables-save.txt, ip-route.json, sysctl.txt, …)", path.display())]
    Empty { path: PathBuf },
    #[error("{} holds several nodes ({}): unpack it and name one of these directories", path.display(), nodes.join(", "))]
    Several { path: PathBuf, nodes: Vec<String> },
    #[error("cannot write the snapshot {}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// Reads a snapshot: a directory, or an archive of one, with any of [`NAMES`] missing.
///
/// # Errors
/// When it cannot be read, is damaged, or holds what no snapshot holds (links, paths that climb out, endless files).
/// What is wrong *inside* a file is no error but a diagnostic of the state.
pub fn read(path: &Path) -> Result<NodeState, SnapshotError> {
    read_files(path).map(|files| parse::state(&files))
}

/// As [`read`], without turning the files into a state.
///
/// # Errors
/// As [`read`].
pub fn read_files(path: &Path) -> Result<Files, SnapshotError> {
    let failed = |source| SnapshotError::Read { path: path.to_owned(), source };
    let files = if fs::metadata(path).map_err(failed)?.is_dir() { read_directory(path)? } else { read_archive(path)? };
    if files.is_empty() {
        return Err(SnapshotError::Empty { path: path.to_owned() });
    }
    Ok(files)
}

/// Writes a snapshot as one `.tar.zst` that only its owner can read, complete or not at all; the same files make the same
/// bytes. Returns its size in bytes.
///
/// # Errors
/// When the file cannot be made or written; nothing is left behind then.
pub fn write(files: &Files, path: &Path) -> Result<u64, SnapshotError> {
    let failed = |source| SnapshotError::Write { path: path.to_owned(), source };
    if path.is_dir() {
        return Err(failed(io::Error::new(ErrorKind::IsADirectory, "it is a directory; name a file")));
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // `tempfile` makes it with mode 0600 and removes it unless it is persisted.
    let mut file = tempfile::Builder::new().prefix(".porttrace-").tempfile_in(directory).map_err(failed)?;
    write_archive(files, file.as_file_mut()).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    let size = file.as_file().metadata().map_err(failed)?.len();
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(size)
}

fn write_archive(files: &Files, file: &mut File) -> io::Result<()> {
    let mut encoder = zstd::Encoder::new(BufWriter::new(file), 3)?;
    encoder.include_checksum(true)?;
    let mut archive = tar::Builder::new(encoder);
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        archive.append_data(&mut header, name, bytes.as_slice())?;
    }
    archive.into_inner()?.finish()?.flush()
}

fn read_directory(path: &Path) -> Result<Files, SnapshotError> {
    let mut left = LARGEST;
    let mut files = Files::new();
    let mut take = |folder: &Path, name: String| -> Result<(), SnapshotError> {
        if !files.contains_key(&name)
            && let Some(bytes) = read_plain(folder, &name, &mut left)?
        {
            files.insert(name, bytes);
        }
        Ok(())
    };
    for folder in layout::folders(path) {
        // Of the folder above, only what speaks of the cluster: its other files are another node's, or nobody's.
        let mut names = NAMES.iter().filter(|name| folder == path || layout::CLUSTER.contains(name));
        names.try_for_each(|name| take(&folder, (*name).to_owned()))?;
        for name in layout::below(&folder, ENTRIES) {
            take(&folder, name)?;
        }
    }
    Ok(files)
}

/// Reads one file of a directory, `None` when it is not there; a link or a device there is refused.
fn read_plain(directory: &Path, name: &str, left: &mut u64) -> Result<Option<Vec<u8>>, SnapshotError> {
    let path = directory.join(name);
    let failed = |source| SnapshotError::Read { path: path.clone(), source };
    let refused = |why| SnapshotError::Unsafe { path: directory.to_owned(), entry: name.to_owned(), why };
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if metadata.is_symlink() => return Err(refused("a symbolic link")),
        Ok(metadata) if !metadata.is_file() => return Err(refused("which is not a plain file")),
        Ok(_) => {}
    }
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(&path).map_err(failed)?;
    let mut bytes = Vec::new();
    // One byte more than allowed tells "as large as allowed" from "larger".
    file.take(*left + 1).read_to_end(&mut bytes).map_err(failed)?;
    *left = left.checked_sub(bytes.len() as u64).ok_or(SnapshotError::TooBig { path: directory.to_owned() })?;
    Ok(Some(bytes))
}

fn read_archive(path: &Path) -> Result<Files, SnapshotError> {
    let failed = |source| SnapshotError::Read { path: path.to_owned(), source };
    let mut start = Vec::new();
    let flags = libc::O_NONBLOCK;
    let open = || OpenOptions::new().read(true).custom_flags(flags).open(path);
    open().and_then(|file| file.take(512).read_to_end(&mut start)).map_err(failed)?;
    let file = BufReader::new(open().map_err(failed)?);
    let reader: Box<dyn Read> = if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Box::new(zstd::Decoder::new(file).map_err(failed)?)
    } else if start.starts_with(&[0x1f, 0x8b]) {
        Box::new(flate2::bufread::MultiGzDecoder::new(file))
    } else if start.get(257..262) == Some(b"ustar") {
        Box::new(file)
    } else {
        return Err(SnapshotError::Kind { path: path.to_owned() });
    };
    // A byte budget around the decoder: whatever the archive claims, no more than this is ever unpacked.
    let mut limited = reader.take(LARGEST + 1);
    let mut found = Vec::new();
    let outcome = unpack(path, &mut limited, &mut found);
    if limited.limit() == 0 {
        return Err(SnapshotError::TooBig { path: path.to_owned() });
    }
    outcome?;
    // The checksum stands behind the last entry: damage shows only when the stream is read to its end.
    io::copy(&mut limited, &mut io::sink()).map_err(|error| damaged(path, &error))?;
    if limited.limit() == 0 {
        return Err(SnapshotError::TooBig { path: path.to_owned() });
    }
    without_top(path, found)
}

fn unpack(path: &Path, reader: &mut dyn Read, found: &mut Vec<(PathBuf, Vec<u8>)>) -> Result<(), SnapshotError> {
    let mut archive = tar::Archive::new(reader);
    for (count, entry) in archive.entries().map_err(|error| damaged(path, &error))?.enumerate() {
        let mut entry = entry.map_err(|error| damaged(path, &error))?;
        if count >= ENTRIES {
            return Err(SnapshotError::TooBig { path: path.to_owned() });
        }
        let name = entry.path().map_err(|error| damaged(path, &error))?.into_owned();
        let refused = |why| SnapshotError::Unsafe { path: path.to_owned(), entry: name.display().to_string(), why };
        let name = normal(&name).map_err(refused)?;
        match entry.header().entry_type() {
            tar::EntryType::Directory | tar::EntryType::XGlobalHeader => continue,
            tar::EntryType::Regular | tar::EntryType::Continuous => {}
            tar::EntryType::Symlink | tar::EntryType::Link => return Err(refused("a link")),
            _ => return Err(refused("which is not a plain file")),
        }
        if is_known(&name) {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(|error| damaged(path, &error))?;
            found.push((name, bytes));
        }
    }
    Ok(())
}

fn damaged(path: &Path, error: &io::Error) -> SnapshotError {
    // The tar reader quotes names as it found them: whatever bytes stand there must not reach a terminal.
    let why = error.to_string().chars().take(200).flat_map(char::escape_debug).collect();
    SnapshotError::Damaged { path: path.to_owned(), why }
}

/// The path without `.` components.
fn normal(path: &Path) -> Result<PathBuf, &'static str> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => normal.push(part),
            Component::CurDir => {}
            Component::ParentDir => return Err("a path that climbs out"),
            Component::RootDir | Component::Prefix(_) => return Err("an absolute path"),
        }
    }
    Ok(normal)
}

fn is_known(path: &Path) -> bool {
    layout::depth(path) > 1 || path.file_name().is_some_and(|name| NAMES.iter().any(|known| *known == name))
}

/// Takes the files of the one directory that has them (people pack `node/…` as well as `./…`), with what is below it.
fn without_top(path: &Path, found: Vec<(PathBuf, Vec<u8>)>) -> Result<Files, SnapshotError> {
    let top = |path: &Path| path.ancestors().nth(layout::depth(path)).map(Path::to_owned).unwrap_or_default();
    let tops: BTreeSet<PathBuf> = found.iter().map(|(name, _)| top(name)).collect();
    if tops.len() > 1 {
        let nodes = tops.iter().map(|top| format!("{}/", top.display().to_string().escape_debug())).collect();
        return Err(SnapshotError::Several { path: path.to_owned(), nodes });
    }
    let Some(top) = tops.into_iter().next() else { return Ok(Files::new()) };
    let below = |(name, bytes): (PathBuf, Vec<u8>)| Some((name.strip_prefix(&top).ok()?.to_str()?.to_owned(), bytes));
    Ok(found.into_iter().filter_map(below).collect())
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
