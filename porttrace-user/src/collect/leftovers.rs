//! What a porttrace that was killed left in the network namespaces of pods (`--into-pods` without tcx).

use super::{pods, probe};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

/// Removes it from every namespace that hangs on the calling thread's by an interface, and returns a sentence for each where
/// something stayed. What a living porttrace holds is not touched.
pub fn remove_from_pods() -> Vec<String> {
    let stayed = |(name, path): (String, PathBuf)| {
        let error = in_namespace(&path).err()?;
        Some(format!("what an earlier porttrace left in the network namespace {name} cannot be removed: {error}"))
    };
    pods::places(&[]).into_iter().filter_map(stayed).collect()
}

/// A namespace that is gone, or no neighbour of ours, has nothing.
fn in_namespace(path: &Path) -> io::Result<()> {
    let Some(namespace) = File::open(path).ok().filter(|file| pods::number_of(file).is_some()) else { return Ok(()) };
    let work = move || match setns(namespace, CloneFlags::CLONE_NEWNET) {
        Ok(()) => probe::remove_leftovers().map(drop),
        // Whoever may not enter could not have left anything.
        Err(_) => Ok(()),
    };
    thread::Builder::new().name("leftovers".into()).spawn(work)?.join().unwrap_or(Ok(()))
}
