//! The namespace guard: what it makes is there while it lives, and nothing stays behind.

use porttrace_tests::netns::{ChildGuard, Netns, namespaces_of};
use porttrace_tests::privilege::may_run;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(30);

#[test]
fn commands_and_closures_run_inside() {
    if !may_run("the namespace guard") {
        return;
    }
    let netns = Netns::new("inside").unwrap();
    let expected = format!("net:[{}]", netns.inode().unwrap());
    assert_eq!(netns.exec(["readlink", "/proc/self/ns/net"]).unwrap().trim(), expected);
    let inside = netns.run_in(|| std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino()).unwrap();
    assert_eq!(inside, u64::from(netns.inode().unwrap()));
    let outside = std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
    assert_ne!(inside, outside, "the caller's thread stays where it was");
    let failure = netns.exec(["ip", "link", "set", "nowhere", "up"]).unwrap_err();
    assert!(format!("{failure:#}").contains("nowhere"), "{failure:#}");
}

#[test]
fn input_and_output_are_passed() {
    if !may_run("the namespace guard") {
        return;
    }
    let netns = Netns::new("pipes").unwrap();
    let long = "a line of input\n".repeat(20_000);
    assert_eq!(netns.exec_with(["cat"], &long).unwrap(), long);
    let mut child = netns.spawn(["sh", "-c", "echo ready; echo oops >&2; exit 3"]).unwrap();
    assert_eq!(child.stdout.wait_for(WAIT, |line| (line == "ready").then_some(())), Some(()));
    assert_eq!(child.wait(WAIT).unwrap(), Some(3));
    assert_eq!(child.stderr.snapshot(), ["oops"]);
}

#[test]
fn a_panic_leaves_nothing_behind() {
    if !may_run("the namespace guard") {
        return;
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    let result = std::thread::spawn(move || {
        let netns = Netns::new("panic").unwrap();
        let child = netns.spawn(["sleep", "1000"]).unwrap();
        assert!(netns.processes().contains(&child.id().cast_signed()));
        sender.send((netns.name().to_owned(), child.id())).unwrap();
        panic!("as a failing test does");
    })
    .join();
    assert!(result.is_err());
    let (name, pid) = receiver.recv().unwrap();
    assert!(!namespaces_of(std::process::id()).contains(&name));
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the process inside was killed and reaped");
}

#[test]
fn leftovers_of_the_dead_are_swept() {
    if !may_run("the namespace guard") {
        return;
    }
    // A process that has ended and was reaped: its id is free, as after a killed test run.
    let mut dead = Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    let name = format!("ptl-{}-0-left", dead.id());
    assert!(Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &name, "sh", "-c", "echo entered; exec sleep 1000"]);
    let mut inside = ChildGuard::spawn(command).unwrap();
    assert!(inside.stdout.wait_for(WAIT, |line| (line == "entered").then_some(())).is_some());
    // A second process of this test binary sweeps when it makes its first namespace.
    let swept = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "commands_and_closures_run_inside"])
        .output()
        .unwrap();
    assert!(swept.status.success(), "{swept:?}");
    assert!(namespaces_of(dead.id()).is_empty());
    assert_eq!(inside.wait(WAIT).unwrap(), None, "the process inside was killed");
}
