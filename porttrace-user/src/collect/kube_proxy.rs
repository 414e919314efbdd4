//! kube-proxy on this node: what its process was told, and the mode in which it says that it runs.

use super::sockets;
use crate::core::model::cluster::Part;
use crate::core::model::facts::ProxyConfig;
use crate::core::model::flow::Proto;
use crate::core::parse::kube_proxy::{DEFAULT_MODE, config, flag, flags};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Programs with a kube-proxy in them.
const PROGRAMS: [&str; 3] = ["kube-proxy", "k3s", "rke2"];
/// A configuration file is some kilobytes.
const LARGEST: u64 = 1 << 20;
/// Where its metrics are, unless it is told otherwise (pkg/cluster/ports/ports.go, `ProxyStatusPort`).
const METRICS: u16 = 10249;
/// For connecting, and for each piece of the answer: it comes from this very node.
const PATIENCE: Duration = Duration::from_millis(200);
/// The answer is a word behind some headers.
const ANSWER: u64 = 4096;

/// What kube-proxy of this network namespace was told, with the mode that it really runs in where it says so.
pub fn read() -> Part<ProxyConfig> {
    read_in(Path::new("/proc"))
}

fn read_in(proc: &Path) -> Part<ProxyConfig> {
    let told = processes(proc).first().map(|process| match process.program.as_str() {
        "kube-proxy" => told(&process.place, &process.words),
        // Without a word about kube-proxy in its arguments it runs with the defaults; the mode is asked below.
        _ => Ok(flags(&process.words)),
    });
    let (mut config, known) = match told {
        Some(Ok(config)) => (config, true),
        Some(Err(why)) => return asked(METRICS).map_or(Part::Missing(why), |mode| Part::Known(with_mode(mode))),
        None => (ProxyConfig::default(), false),
    };
    match asked(metrics_port(&config.metrics)) {
        Some(mode) => config.mode = mode,
        None if !known => return Part::Missing("no process of kube-proxy is to be seen here".to_owned()),
        None if config.mode.is_empty() => DEFAULT_MODE.clone_into(&mut config.mode),
        None => {}
    }
    Part::Known(config)
}

fn with_mode(mode: String) -> ProxyConfig {
    ProxyConfig { mode, ..ProxyConfig::default() }
}

/// A process with a kube-proxy in it.
struct Process {
    program: String,
    /// Its directory in `/proc`.
    place: PathBuf,
    words: Vec<String>,
}

/// Those of this network namespace: on a machine that plays several nodes the others' are not ours.
fn processes(proc: &Path) -> Vec<Process> {
    let namespace = |path: &Path| fs::metadata(path).map(|metadata| metadata.ino()).ok();
    let own = namespace(Path::new("/proc/thread-self/ns/net"));
    let mut found = Vec::new();
    for entry in fs::read_dir(proc).into_iter().flatten().flatten() {
        let is_process = entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
        let Some(line) = Some(entry.path().join("cmdline")).filter(|_| is_process).and_then(|path| fs::read(path).ok())
        else {
            continue;
        };
        let words = words(&line);
        let program = words.first().and_then(|word| word.rsplit('/').next()).unwrap_or_default().to_owned();
        let is_ours = || namespace(&entry.path().join("ns/net")).is_none_or(|number| Some(number) == own);
        if PROGRAMS.contains(&program.as_str()) && is_ours() {
            found.push(Process { program, place: entry.path(), words });
        }
    }
    found.sort_by_key(|process| PROGRAMS.iter().position(|name| *name == process.program));
    found
}

/// The arguments in `/proc/PID/cmdline`.
pub(super) fn words(line: &[u8]) -> Vec<String> {
    line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// What the process in a directory of `/proc` was told.
///
/// # Errors
/// One sentence when its configuration file cannot be read.
pub(super) fn told(place: &Path, words: &[String]) -> Result<ProxyConfig, String> {
    // With a file it passes over most of its flags (cmd/kube-proxy/app/options.go, `Complete`).
    let Some(file) = flag(words, "config") else { return Ok(flags(words)) };
    // Its files are those of its own root.
    let inside = place.join("root").join(file.trim_start_matches('/'));
    let failed = |why: String| format!("kube-proxy's configuration {file} cannot be read: {why}");
    let opened = File::open(inside).map_err(|error| failed(error.to_string()))?;
    let mut text = String::new();
    opened.take(LARGEST).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
    config(&text).map_err(failed)
}

/// The mode of the process in a directory of `/proc`: the one that it says, else the one that it was told.
///
/// # Errors
/// One sentence when neither is to be had.
pub(super) fn mode_of(place: &Path, words: &[String]) -> Result<String, String> {
    let told = told(place, words);
    let port = told.as_ref().map_or(METRICS, |config| metrics_port(&config.metrics));
    match (asked(port), told) {
        (Some(mode), _) => Ok(mode),
        (None, Ok(config)) if config.mode.is_empty() => Ok(DEFAULT_MODE.to_owned()),
        (None, Ok(config)) => Ok(config.mode),
        (None, Err(why)) => Err(why),
    }
}

/// Where its metrics are on the loopback address; nowhere when they are bound to another address.
fn metrics_port(bound: &str) -> u16 {
    match bound.parse::<SocketAddr>() {
        Ok(at) if at.ip().is_loopback() || at.ip().is_unspecified() => at.port(),
        Ok(_) => 0,
        Err(_) => METRICS,
    }
}

/// `/proxyMode` of the process that listens on this port of 127.0.0.1. Nothing is sent where nobody listens.
fn asked(port: u16) -> Option<String> {
    let at = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let takes = |address: IpAddr| address == at || address.is_unspecified();
    let sockets = sockets::read(false).ok()?;
    if !sockets.iter().any(|socket| socket.proto == Proto::Tcp && socket.port == port && takes(socket.address)) {
        return None;
    }
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(at, port), PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.set_write_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(b"GET /proxyMode HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    // What came before the deadline counts: the server may keep the connection open.
    let _ = stream.take(ANSWER).read_to_end(&mut answer);
    mode(&String::from_utf8_lossy(&answer))
}

/// The mode in an HTTP answer.
fn mode(answer: &str) -> Option<String> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let is_good = head.split(' ').nth(1) == Some("200");
    let mode = body.trim();
    (is_good && matches!(mode, "iptables" | "ipvs" | "nftables")).then(|| mode.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::unix::fs::symlink;
    use std::thread;

    /// A `/proc` with one process in our own network namespace.
    fn proc(words: &[&str], files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        let process = folder.path().join("4711");
        fs::create_dir_all(process.join("root/etc")).expect("a folder");
        fs::create_dir_all(process.join("ns")).expect("a folder");
        symlink(fs::canonicalize("/proc/self").expect("proc").join("ns/net"), process.join("ns/net")).expect("a link");
        fs::write(process.join("cmdline"), words.join("\0") + "\0").expect("a file");
        for (name, text) in files {
            fs::write(process.join("root").join(name), text).expect("a file");
        }
        fs::write(folder.path().join("uptime"), "1 1").expect("a file");
        folder
    }

    #[test]
    fn a_configuration_file_comes_before_flags_and_is_looked_for_in_the_process_own_root() {
        let words = ["/usr/bin/kube-proxy", "--config=/etc/config.conf", "--proxy-mode=ipvs"];
        let text = "mode: nftables\nclusterCIDR: 10.244.0.0/16\nmetricsBindAddress: 127.0.0.1:1\n";
        let folder = proc(&words, &[("etc/config.conf", text)]);
        let read = read_in(folder.path());
        let config = read.known().expect("a configuration");
        assert_eq!((config.mode.as_str(), config.cluster_cidrs.len()), ("nftables", 1));
    }

    #[test]
    fn without_a_word_its_mode_is_the_default_and_a_lost_file_is_said() {
        let folder = proc(&["kube-proxy", "--metrics-bind-address=127.0.0.1:1"], &[]);
        assert_eq!(read_in(folder.path()).known().map(|config| config.mode.as_str()), Some("iptables"));
        let folder = proc(&["kube-proxy", "--config", "/etc/gone"], &[]);
        let why = read_in(folder.path()).get().expect_err("no file").to_owned();
        assert!(why.contains("/etc/gone"), "{why}");
        let folder = proc(&["sleep", "kube-proxy"], &[]);
        assert!(read_in(folder.path()).known().is_none());
    }

    #[test]
    fn the_mode_that_it_says_counts() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut request = [0; 64];
            let size = stream.read(&mut request).expect("a request");
            stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nipvs").expect("an answer");
            String::from_utf8_lossy(&request[..size]).into_owned()
        });
        let metrics = format!("--metrics-bind-address=0.0.0.0:{port}");
        let folder = proc(&["kube-proxy", "--proxy-mode=iptables", &metrics], &[]);
        assert_eq!(read_in(folder.path()).known().map(|config| config.mode.as_str()), Some("ipvs"));
        assert!(server.join().expect("a request").starts_with("GET /proxyMode "));
    }

    #[test]
    fn what_is_no_mode_is_none() {
        assert_eq!(mode("HTTP/1.1 200 OK\r\n\r\niptables\n").as_deref(), Some("iptables"));
        for answer in ["HTTP/1.1 404 Not Found\r\n\r\niptables", "HTTP/1.1 200 OK\r\n\r\n<html>", "iptables", ""] {
            assert_eq!(mode(answer), None, "{answer}");
        }
        assert_eq!(metrics_port("10.0.0.1:10249"), 0);
        assert_eq!(metrics_port("[::]:7"), 7);
        assert_eq!(metrics_port(""), METRICS);
    }
}
