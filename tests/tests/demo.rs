//! The demonstration ends cleanly, also when somebody interrupts it.

use nix::sys::signal::Signal;
use porttrace_tests::netns::{ChildGuard, namespaces_of};
use porttrace_tests::privilege::may_run;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(30);

/// A stand-in for porttrace that says this and then waits to be killed.
fn stand_in(name: &str, script: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("ptl-{}-{name}", std::process::id()));
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}

fn demo(porttrace: &PathBuf) -> ChildGuard {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lab-demo"));
    command.arg("--porttrace").arg(porttrace);
    ChildGuard::spawn(command).unwrap()
}

#[test]
fn an_interrupt_removes_everything() {
    if !may_run("the demonstration") {
        return;
    }
    // `exec`: nothing may outlive the process that gets the signal.
    let porttrace = stand_in("silent", "echo started; exec sleep 1000");
    let mut demo = demo(&porttrace);
    assert!(
        demo.stdout.wait_for(WAIT, |line| (line == "started").then_some(())).is_some(),
        "{:?}",
        demo.stderr.snapshot()
    );
    assert!(!namespaces_of(demo.id()).is_empty(), "the lab is up");
    demo.signal(Signal::SIGINT).unwrap();
    assert_eq!(demo.wait(WAIT).unwrap(), Some(130), "{:?}", demo.stderr.snapshot());
    assert!(namespaces_of(demo.id()).is_empty());
    std::fs::remove_file(porttrace).unwrap();
}

#[test]
fn a_porttrace_that_fails_is_reported() {
    if !may_run("the demonstration") {
        return;
    }
    let porttrace = stand_in("failing", "echo 'no such luck' >&2; exit 1");
    let mut demo = demo(&porttrace);
    assert_eq!(demo.wait(WAIT).unwrap(), Some(1));
    let said = demo.stderr.snapshot().join("\n");
    assert!(said.contains("does not get ready: no such luck"), "{said}");
    assert!(namespaces_of(demo.id()).is_empty());
    std::fs::remove_file(porttrace).unwrap();
}

#[test]
fn a_verdict_that_never_comes_is_a_failure() {
    if !may_run("the demonstration") {
        return;
    }
    let porttrace = stand_in("mute", "echo 'ready after 1 ms'; sleep 2");
    let mut demo = demo(&porttrace);
    assert_eq!(demo.wait(WAIT).unwrap(), Some(1));
    let said = demo.stderr.snapshot().join("\n");
    assert!(said.contains("did not tell the connection from 172.18.0.4:"), "{said}");
    assert!(namespaces_of(demo.id()).is_empty());
    std::fs::remove_file(porttrace).unwrap();
}
