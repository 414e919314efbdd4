//! Manual pages and completion scripts: there is one for every subcommand, and the programs that read them take them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

const SUBCOMMANDS: [&str; 9] =
    ["completions", "doctor", "explain", "manual", "matrix", "ports", "simulate", "snapshot", "watch"];

fn porttrace(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_porttrace")).args(arguments).output().expect("porttrace runs")
}

fn is_there(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(program).exists()))
}

/// What `man` prints of a page without complaining.
fn rendered(page: &Path) -> String {
    let output =
        Command::new("groff").args(["-k", "-man", "-Tutf8", "-ww", "-P-cbou"]).arg(page).output().expect("groff runs");
    let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && complaints.is_empty(), "{}: {complaints}", page.display());
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn every_subcommand_has_a_manual_page_that_renders() {
    let folder = tempfile::tempdir().expect("a folder");
    let pages = folder.path().join("man1");
    let output = porttrace(&["manual", pages.to_str().expect("UTF-8")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let written: BTreeSet<String> = fs::read_dir(&pages)
        .expect("pages")
        .map(|entry| entry.expect("a page").file_name().into_string().expect("UTF-8"))
        .collect();
    let each = SUBCOMMANDS.iter().map(|name| format!("porttrace-{name}.1"));
    assert_eq!(written, each.chain(["porttrace.1".to_owned()]).collect());
    for name in &written {
        let page = pages.join(name);
        let source = fs::read_to_string(&page).expect("a page");
        for part in [".TH ", ".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION", ".SH OPTIONS"] {
            assert!(source.contains(part), "{name} has no {part:?}");
        }
        if is_there("groff") {
            let text = rendered(&page);
            assert!(text.contains("SYNOPSIS") && text.contains("--help"), "{name}:\n{text}");
        }
    }
    let watch = fs::read_to_string(pages.join("porttrace-watch.1")).expect("a page");
    assert!(watch.contains("\\-\\-conntrack\\-backend"), "{watch}");
}

/// bash itself completes: subcommands, then options of one.
#[test]
fn bash_completes_subcommands_and_options() {
    let script = porttrace(&["completions", "bash"]);
    assert!(script.status.success());
    if !is_there("bash") {
        eprintln!("skipped: there is no bash");
        return;
    }
    let completed = |line: &str, words: &str| -> String {
        let ask = format!(
            "source /dev/stdin; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE={line:?}; \
             COMP_POINT=${{#COMP_LINE}}; _porttrace porttrace \"${{COMP_WORDS[COMP_CWORD]}}\" x; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        let mut child = Command::new("bash")
            .args(["--norc", "-c", &ask])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("bash runs");
        std::io::Write::write_all(&mut child.stdin.take().expect("its input"), &script.stdout).expect("a script");
        let output = child.wait_with_output().expect("an end");
        assert!(output.status.success());
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let all = completed("porttrace ", "porttrace ''");
    for name in SUBCOMMANDS {
        assert!(all.lines().any(|line| line == name), "{name} is not among:\n{all}");
    }
    assert_eq!(completed("porttrace ex", "porttrace ex").trim(), "explain");
    assert_eq!(
        completed("porttrace watch --conntrack-b", "porttrace watch --conntrack-b").trim(),
        "--conntrack-backend"
    );
}
