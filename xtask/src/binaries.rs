//! The workspace's test binaries, built once and then run one by one (here, or in the virtual machine).
use crate::{build, shell, system};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One test binary as cargo made it.
#[derive(Debug, PartialEq)]
pub struct TestBinary {
    /// The package's name.
    pub package: String,
    /// The target's name: the library's, a binary's, or a file of `tests/`.
    pub target: String,
    /// Where the binary is.
    pub path: PathBuf,
    /// The package's directory, where cargo would run it.
    pub directory: PathBuf,
}

impl TestBinary {
    /// The command that runs it as `cargo test` would.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.current_dir(&self.directory).env("CARGO_MANIFEST_DIR", &self.directory);
        command.env("PORTTRACE", build::directory(false).join("porttrace"));
        command
    }

    /// `package/target`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.package, self.target)
    }
}

/// Everything that runs on this machine's own target. The kernel object's crate is left out: its binary has the command's
/// name, and its library is a dependency of the others. One selection everywhere, so that cargo builds each crate once.
pub const SELECTION: [&str; 3] = ["--workspace", "--exclude", "porttrace-ebpf"];

/// Builds the binaries and all tests in the dev profile, and returns the tests sorted by name.
pub fn build_all() -> Result<Vec<TestBinary>> {
    shell::run(shell::cargo().current_dir(system::root()).arg("build").args(SELECTION))?;
    let mut cargo = shell::cargo();
    cargo.current_dir(system::root()).arg("test").args(SELECTION);
    let messages = shell::output(cargo.args(["--no-run", "--message-format", "json-render-diagnostics"]))?;
    parse(&messages)
}

/// The test binaries among cargo's JSON messages.
fn parse(messages: &str) -> Result<Vec<TestBinary>> {
    let mut found = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line).context("cargo printed a message that is not JSON")?;
        found.extend(test_binary(&message));
    }
    found.sort_by_key(TestBinary::name);
    Ok(found)
}

fn test_binary(message: &Value) -> Option<TestBinary> {
    let path = message["executable"].as_str()?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    let directory = Path::new(message["manifest_path"].as_str()?).parent()?.to_path_buf();
    Some(TestBinary {
        package: package_name(message["package_id"].as_str()?),
        target: message["target"]["name"].as_str()?.to_owned(),
        path: path.into(),
        directory,
    })
}

/// `path+file:///x/xtask#0.1.0` and `path+file:///x/tests#porttrace-tests@0.1.0` both name their package.
fn package_name(id: &str) -> String {
    let (source, fragment) = id.split_once('#').unwrap_or((id, ""));
    match fragment.split_once('@') {
        Some((name, _)) => name.to_owned(),
        None => source.rsplit('/').next().unwrap_or(source).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_test_binaries_only() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","package_id":"path+file:///x/tests#porttrace-tests@0.1.0","#,
            r#""manifest_path":"/x/tests/Cargo.toml","target":{"name":"lab"},"profile":{"test":true},"executable":"/t/lab-1"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","package_id":"path+file:///x/xtask#0.1.0","#,
            r#""manifest_path":"/x/xtask/Cargo.toml","target":{"name":"xtask"},"profile":{"test":false},"executable":"/t/xtask"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        let expected = TestBinary {
            package: "porttrace-tests".into(),
            target: "lab".into(),
            path: "/t/lab-1".into(),
            directory: "/x/tests".into(),
        };
        assert_eq!(parse(messages).unwrap(), [expected]);
    }

    #[test]
    fn package_names() {
        assert_eq!(package_name("path+file:///x/xtask#0.1.0"), "xtask");
        assert_eq!(package_name("path+file:///x/tests#porttrace-tests@0.1.0"), "porttrace-tests");
    }
}
