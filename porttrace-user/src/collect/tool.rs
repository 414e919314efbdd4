//! Programs of the system that only look: found, run, and their failures told.

use std::env;
use std::io::{self, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use thiserror::Error;

/// Where tools for administrators lie, should `PATH` leave it out.
const USUAL: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Why a tool gave nothing.
#[derive(Debug, Error)]
pub enum ToolError {
    #[error("{0} is not installed")]
    Missing(String),
    #[error("{tool} could not be started: {source}")]
    Start { tool: String, source: io::Error },
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
    let mut output = Vec::new();
    stream(name, arguments, |bytes| output.extend_from_slice(bytes))?;
    Ok(output)
}

/// As [`run`], handing over what the tool writes as it comes; when there is an error, that was not all.
pub(super) fn stream(name: &str, arguments: &[&str], mut take: impl FnMut(&[u8])) -> Result<(), ToolError> {
    let tool = [&[name], arguments].concat().join(" ");
    let program = find(name).ok_or_else(|| ToolError::Missing(name.to_owned()))?;
    let start_error = |source| ToolError::Start { tool: tool.clone(), source };
    let mut child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start_error)?;
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let (read, complaint) = thread::scope(|scope| {
        // Beside, or a tool that complains much would wait for a reader.
        let errors = scope.spawn(|| errors.map_or_else(Vec::new, all));
        let read = output.map_or(Ok(()), |mut output| pass_on(&mut output, &mut take));
        (read, errors.join().unwrap_or_default())
    });
    let status = child.wait().map_err(start_error)?;
    read.map_err(start_error)?;
    if status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&complaint);
    let why = complaint.lines().find(|line| !line.trim().is_empty()).unwrap_or("it does not say why").trim().to_owned();
    Err(ToolError::Failed { tool, status: status.to_string(), why })
}

fn pass_on(from: &mut impl Read, take: &mut impl FnMut(&[u8])) -> io::Result<()> {
    // What a pipe holds.
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => take(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn all(mut from: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    // What came before an error is the best that there is.
    let _ = from.read_to_end(&mut all);
    all
}
