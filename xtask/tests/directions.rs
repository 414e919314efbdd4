//! Holds the directions of imports between the rooms of porttrace-user: core is pure, collect and render do not know each other.
mod imports;

use imports::{Import, imports};
use std::path::{Path, PathBuf};

/// What a room must not name: path prefixes (`std::fs`), or macros (`println!`).
fn forbidden(room: &str) -> &'static [&'static str] {
    match room {
        "core" => &[
            "crate::collect",
            "crate::render",
            "crate::commands",
            "std::fs",
            "std::process",
            "std::thread",
            "std::env",
            "std::os",
            "std::io::stdin",
            "std::io::stdout",
            "std::io::stderr",
            "std::net::TcpStream",
            "std::net::TcpListener",
            "std::net::UdpSocket",
            "std::net::ToSocketAddrs",
            "std::time::SystemTime",
            "std::time::Instant",
            "std::hash::RandomState",
            "tokio",
            "rand",
            "aya",
            "aya_obj",
            "libc",
            "nix",
            "netlink_sys",
            "print!",
            "println!",
            "eprint!",
            "eprintln!",
            "dbg!",
        ],
        "collect" => &[
            "crate::render",
            "crate::commands",
            "crate::core::simulate",
            "crate::core::correlate",
            "crate::core::diagnose",
            "print!",
            "println!",
            "eprint!",
            "eprintln!",
            "dbg!",
        ],
        "render" => &["crate::collect", "crate::commands", "aya", "nix", "libc", "netlink_sys", "dbg!"],
        _ => &["dbg!"],
    }
}

/// What `source`, the file of this module (`["core", "model"]`), names although its room must not: line and path.
fn violations(module: &[&str], source: &str) -> Vec<(usize, String)> {
    let forbidden = forbidden(module.first().copied().unwrap_or_default());
    let named = imports(module, source);
    let against = |import: &Import| forbidden.iter().any(|prefix| reaches(&import.path, prefix));
    named.into_iter().filter(against).map(|import| (import.line, import.path)).collect()
}

/// Whether naming `path` gives access to `prefix`: the same, below it, or a glob above it.
fn reaches(path: &str, prefix: &str) -> bool {
    let below = |path: &str, prefix: &str| {
        path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    };
    below(path, prefix) || path.strip_suffix("::*").is_some_and(|parent| below(prefix, parent))
}

/// All source files under `directory`, sorted; test modules in files of their own are left out.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).expect("a readable source directory").flatten() {
        let path = entry.path();
        if path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests")) {
            continue;
        }
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn rooms_keep_their_directions() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("porttrace-user/src");
    let files = sources(&root);
    assert!(files.iter().any(|file| file.starts_with(root.join("core"))), "no core in {}", root.display());
    let mut wrong = Vec::new();
    for file in &files {
        let relative = file.strip_prefix(&root).expect("a file below the root").with_extension("");
        let module: Vec<&str> =
            relative.iter().filter_map(|part| part.to_str()).filter(|part| *part != "mod").collect();
        let source = std::fs::read_to_string(file).expect("a readable source file");
        for (line, path) in violations(&module, &source) {
            wrong.push(format!("porttrace-user/src/{}.rs:{line} names {path}", relative.display()));
        }
    }
    assert!(wrong.is_empty(), "imports against the directions of ARCHITECTURE.md:\n{}", wrong.join("\n"));
}

#[test]
fn every_way_of_naming_is_caught() {
    let cases = [
        ("use std::fs;", "std::fs"),
        ("use std::{collections::BTreeMap, fs::{self, File}};", "std::fs"),
        ("fn now() -> u64 { std::time::SystemTime::now(); 0 }", "std::time::SystemTime::now"),
        ("use std::time::{self, Duration};\nfn f() { time::Instant::now(); }", "std::time::Instant::now"),
        ("use std::net::*;", "std::net::*"),
        ("use std::net as n;\nfn f() { n::UdpSocket::bind(a); }", "std::net::UdpSocket::bind"),
        ("use super::super::render::text::Line;", "crate::render::text::Line"),
        ("use crate::{collect, core};", "crate::collect"),
        ("pub(crate) use tokio::sync::mpsc;", "tokio::sync::mpsc"),
        ("fn f() { println!(\"x\"); }", "println!"),
        ("fn f() { ::std::process::exit(1) }", "std::process::exit"),
    ];
    for (source, path) in cases {
        let found: Vec<String> = violations(&["core", "model"], source).into_iter().map(|(_, path)| path).collect();
        assert!(found.iter().any(|found| found == path), "{source}: {found:?}");
    }
}

#[test]
fn rooms_differ() {
    assert_eq!(violations(&["render", "text"], "\nuse crate::collect::state;").len(), 1);
    assert_eq!(violations(&["render", "text"], "\nuse crate::collect::state;")[0].0, 2);
    assert_eq!(violations(&["collect", "probe"], "use crate::render::text;").len(), 1);
    assert_eq!(violations(&["collect", "probe"], "use crate::core::simulate::walk;").len(), 1);
    assert!(violations(&["commands", "watch"], "use crate::{collect, render};").is_empty());
}

#[test]
fn what_is_allowed_passes() {
    let source = r##"
        //! Never std::fs here; `tokio` neither.
        use std::net::{IpAddr, Ipv4Addr};
        use std::time::Duration;
        use crate::core::model::flow::Flow;
        /* std::process /* nested */ */
        fn f() -> &'static str { let c = '"'; r#"std::thread "quoted""# }
        #[cfg(test)]
        mod tests {
            use std::fs;
            fn g() { println!("}"); }
        }
        fn h(a: &'static str) {}
    "##;
    assert_eq!(violations(&["core", "model"], source), []);
}
