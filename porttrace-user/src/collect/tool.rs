//! Programs of the system that only look: found, run, and their failures told.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use thiserror::Error;

/// Where tools for administrators lie, should `PATH` leave it out.
const USUAL: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Why a tool gave nothing.
#[derive(Debug, Error)]
pub enum ToolError {
    #[error("{0} is not installed")]
    Missing(String),
    #[error("{tool} could not be started: {source}")]
    Start { tool: String, source: std::io::Error },
    #[error("{tool} failed ({status}): {why}")]
    Failed { tool: String, status: String, why: String },
}

/// Where a tool lies, or `None` when it is not installed.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).chain(USUAL.iter().map(PathBuf::from));
    places.map(|place| place.join(name)).find(|file| file.is_file())
}

/// Runs a tool to its end and gives its standard output. It inherits the calling thread's network namespace.
///
/// # Errors
/// When it is not installed, does not start, or fails; its first line of complaint is in the message.
pub(super) fn run(name: &str, arguments: &[&str]) -> Result<Vec<u8>, ToolError> {
    let tool = [&[name], arguments].concat().join(" ");
    let program = find(name).ok_or_else(|| ToolError::Missing(name.to_owned()))?;
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| ToolError::Start { tool: tool.clone(), source })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let why = complaint.lines().find(|line| !line.trim().is_empty()).unwrap_or("it does not say why").trim().to_owned();
    Err(ToolError::Failed { tool, status: output.status.to_string(), why })
}
