//! Running other programs: every failure names the command, every step says how long it took.
use anyhow::{Context, Result, bail};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How many lines of a failed command's output are shown.
const TAIL: usize = 40;

/// Runs `work` between "→ what" and "✓ what (1.2 s)"; a failure is printed as "✗" and handed on.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("→ {what}");
    let start = Instant::now();
    let done = work();
    let mark = if done.is_ok() { "✓" } else { "✗" };
    println!("{mark} {what} ({})", seconds(start.elapsed()));
    done
}

/// A duration as people read it: `0.4 s`, `73 s`.
pub fn seconds(took: Duration) -> String {
    let value = took.as_secs_f64();
    if value < 10.0 { format!("{value:.1} s") } else { format!("{value:.0} s") }
}

/// Runs the command with this terminal as its output. Errors when it cannot start or does not exit with 0.
pub fn run(command: &mut Command) -> Result<()> {
    let name = describe(command);
    let status = command.status().with_context(|| cannot_start(&name))?;
    if !status.success() {
        bail!("`{name}` failed ({status})");
    }
    Ok(())
}

/// Runs the command without showing its output, unless it fails: then its last lines are part of the error.
pub fn quietly(command: &mut Command) -> Result<()> {
    let name = describe(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| cannot_start(&name))?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].concat();
    bail!("`{name}` failed ({}); its last lines:\n{}", output.status, tail(&String::from_utf8_lossy(&text)))
}

/// The standard output of a command that must succeed; its standard error goes to the terminal.
pub fn output(command: &mut Command) -> Result<String> {
    let name = describe(command);
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().with_context(|| cannot_start(&name))?;
    if !output.status.success() {
        bail!("`{name}` failed ({})", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The standard output of a command if it is there and succeeds; for looking, not for doing.
pub fn probe(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The cargo that runs this program, so that the same toolchain builds everything.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Program and arguments as one would type them.
pub fn describe(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    let arguments = command.get_args().map(|argument| argument.to_string_lossy());
    std::iter::once(name.into()).chain(arguments).collect::<Vec<_>>().join(" ")
}

fn cannot_start(name: &str) -> String {
    format!("cannot start `{name}`")
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_names_the_command_and_shows_its_output() {
        let error = quietly(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c"), "{error}");
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.contains("why"), "{error}");
    }

    #[test]
    fn missing_program_is_named() {
        let error = run(&mut Command::new("no-such-program")).unwrap_err().to_string();
        assert_eq!(error, "cannot start `no-such-program`");
    }

    #[test]
    fn tail_keeps_the_last_lines() {
        let text: String = (0..100).map(|line| format!("{line}\n")).collect();
        assert!(tail(&text).starts_with("60\n"));
        assert!(tail(&text).ends_with("99"));
    }
}
