//! Good archives come back as they were; bad ones end in one sentence.

use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};

fn files() -> Files {
    [
        ("snapshot.json", r#"{"format":1,"porttrace":"0.1.0","node":"worker3"}"#),
        ("ip-addr.json", r#"[{"ifname":"eth0","addr_info":[{"family":"inet","local":"172.18.0.3","prefixlen":16,"scope":"global"}]}]"#),
        ("sysctl.txt", "net.ipv4.ip_forward = 1\n"),
        ("objects/pods.yaml", "kind: Pod\nmetadata: {name: p}\n"),
        ("netns/pod-a/state.json", "{}"),
        ("xt_recent/KUBE-SEP-X", "src=10.0.0.1 ttl: 64 last_seen: 5 oldest_pkt: 1 5\n"),
    ]
    .into_iter()
    .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
    .collect()
}

/// A tar of entries (type, path, link or content), made by hand so that it may be as evil as it likes.
fn tar_of(entries: &[(tar::EntryType, &str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (kind, path, content) in entries {
        let mut header = tar::Header::new_gnu();
        let bytes = header.as_mut_bytes();
        bytes[..path.len()].copy_from_slice(path.as_bytes());
        let is_link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
        if is_link {
            header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content);
        }
        header.set_entry_type(*kind);
        header.set_size(if is_link { 0 } else { content.len() as u64 });
        header.set_mode(0o644);
        header.set_cksum();
        archive.extend_from_slice(header.as_bytes());
        if !is_link {
            archive.extend_from_slice(content);
            archive.resize(archive.len().next_multiple_of(512), 0);
        }
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

fn error_of(bytes: &[u8]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("node.tar");
    fs::write(&path, bytes).unwrap();
    read_files(&path).unwrap_err().to_string()
}

#[test]
fn what_is_written_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("node.tar.zst");
    let size = write(&files(), &path).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (size, 0o600));
    assert_eq!(read_files(&path).unwrap(), files());
    let state = read(&path).unwrap();
    assert_eq!(state.name.as_deref(), Some("worker3"));
    assert_eq!(state.sysctls.unwrap()["net.ipv4.ip_forward"], "1");
    assert_eq!(state.recent.unwrap()["KUBE-SEP-X"].len(), 1);
    assert!(state.diagnostics.iter().any(|d| d.source == "ip-route.json" && d.message.starts_with("not there: ")));
    let first = fs::read(&path).unwrap();
    write(&files(), &path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), first, "the same files make the same bytes");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn directories_and_every_packing_are_read() {
    use tar::EntryType::{Directory, Regular};
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in files() {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    fs::write(directory.path().join("diary.txt"), "dear diary").unwrap();
    assert_eq!(read_files(directory.path()).unwrap(), files());

    for top in ["", "./", "worker3/", "nodes/worker3/"] {
        let names: Vec<String> = files().keys().map(|name| format!("{top}{name}")).collect();
        let contents: Vec<Vec<u8>> = files().into_values().collect();
        let mut entries: Vec<_> =
            names.iter().zip(&contents).map(|(name, content)| (Regular, name.as_str(), content.as_slice())).collect();
        entries.insert(0, (Directory, "./", b""));
        entries.push((Regular, "other.bin", b"x"));
        let plain = tar_of(&entries);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        for bytes in [plain.clone(), zstd::encode_all(plain.as_slice(), 1).unwrap(), gzip.finish().unwrap()] {
            let path = directory.path().join("packed");
            fs::write(&path, bytes).unwrap();
            assert_eq!(read_files(&path).unwrap(), files(), "packed below {top:?}");
        }
    }
}

#[test]
fn evil_entries_are_refused() {
    use tar::EntryType::{Block, Fifo, Link, Regular, Symlink};
    for (entry, words) in [
        ((Regular, "../sysctl.txt", &b"x"[..]), "climbs out"),
        ((Regular, "a/../../sysctl.txt", b"x"), "climbs out"),
        ((Regular, "/etc/sysctl.txt", b"x"), "absolute"),
        ((Symlink, "sysctl.txt", b"/etc/shadow"), "a link"),
        ((Link, "sysctl.txt", b"/etc/shadow"), "a link"),
        ((Fifo, "sysctl.txt", b""), "not a plain file"),
        ((Block, "disk", b""), "not a plain file"),
    ] {
        let message = error_of(&tar_of(&[(Regular, "ip-addr.json", b"[]"), entry]));
        assert!(message.contains(words) && message.contains(entry.1), "{message}");
        assert_eq!(message.lines().count(), 1);
    }
}

#[test]
fn links_in_a_directory_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    symlink("/etc/hostname", directory.path().join("sysctl.txt")).unwrap();
    let message = read_files(directory.path()).unwrap_err().to_string();
    assert!(message.contains("symbolic link"), "{message}");
}

#[test]
fn damage_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("node.tar.zst");
    let mut files = files();
    files.insert("conntrack.txt".to_owned(), (0..200_000u32).flat_map(|n| n.to_le_bytes()).collect());
    write(&files, &path).unwrap();
    let whole = fs::read(&path).unwrap();
    let message = error_of(&whole[..whole.len() / 2]);
    assert!(message.contains("damaged or cut short"), "{message}");
    let message = error_of(&whole[..whole.len() - 3]);
    assert!(message.contains("damaged or cut short"), "{message}");
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x55;
    assert!(error_of(&flipped).contains("damaged or cut short"), "{}", error_of(&flipped));
    assert!(error_of(b"hello").contains("neither a directory nor a tar"));
    assert!(error_of(b"").contains("neither a directory nor a tar"));
    assert!(error_of(&tar_of(&[(tar::EntryType::Regular, "x", b"y")])).contains("none of the files"));
    let two = [(tar::EntryType::Regular, "a/sysctl.txt", &b""[..]), (tar::EntryType::Regular, "b/sysctl.txt", b"")];
    assert!(error_of(&tar_of(&two)).contains("several nodes (a/, b/)"));
    assert!(read_files(&directory.path().join("nothing")).unwrap_err().to_string().contains("cannot read"));
}

#[test]
fn a_bomb_ends_with_one_sentence() {
    // One entry that claims and has 4 GiB of zeros: some hundred kilobytes of zstd.
    let mut header = tar::Header::new_gnu();
    header.set_path("unknown.bin").unwrap();
    header.set_size(4 << 30);
    header.set_cksum();
    let content = io::repeat(0).take(LARGEST + (1 << 20));
    let bomb = zstd::encode_all(header.as_bytes().chain(content), 1).unwrap();
    assert!(bomb.len() < 1 << 20);
    let message = error_of(&bomb);
    assert!(message.contains("unpacks to more than 512 MiB"), "{message}");

    let many: Vec<_> = (0..=ENTRIES).map(|_| (tar::EntryType::Regular, "x", &b""[..])).collect();
    assert!(error_of(&zstd::encode_all(tar_of(&many).as_slice(), 1).unwrap()).contains("20000 files"));
}

#[test]
fn writing_where_one_cannot_is_said() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(write(&files(), directory.path()), Err(SnapshotError::Write { .. })));
    assert!(matches!(write(&files(), &directory.path().join("no/such/place")), Err(SnapshotError::Write { .. })));
}

#[test]
fn what_speaks_of_the_cluster_is_found_beside_the_nodes() {
    let directory = tempfile::tempdir().unwrap();
    let node = directory.path().join("nodes/worker3");
    for (name, text) in [
        ("nodes/worker3/sysctl.txt", "net.ipv4.ip_forward = 1\n"),
        ("nodes/worker2/sysctl.txt", "net.ipv4.ip_forward = 0\n"),
        ("sysctl.txt", "net.ipv4.ip_forward = 2\n"),
        ("objects/pods.yaml", "kind: Pod\nmetadata: {name: p}\n"),
        ("objects/notes.txt", "mine"),
        ("cni-results.json", "{}"),
        ("netns/pod-a/state.json", "{}"),
    ] {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let files = read_files(&node).unwrap();
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(names, ["cni-results.json", "netns/pod-a/state.json", "objects/pods.yaml", "sysctl.txt"]);
    assert_eq!(files["sysctl.txt"], b"net.ipv4.ip_forward = 1\n");
}
