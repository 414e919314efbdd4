//! `porttrace simulate --batch` as people run it: packets in a file, answers through a pipe, on one core and on all.

use super::report;
use anyhow::{Context, Result, ensure};
use porttrace_user::core::model::trace::Packet;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

const PACKETS: usize = 1_000_000;
/// Answers with all hops are some 20 KB each: fewer of them do.
const WHOLE: usize = 100_000;

const ADDRESSES: &str = r#"[{"ifindex":1,"ifname":"lo","addr_info":[{"family":"inet","local":"127.0.0.1","prefixlen":8,"scope":"host"}]},
{"ifindex":2,"ifname":"eth0","addr_info":[{"family":"inet","local":"172.18.0.3","prefixlen":16,"scope":"global"}]}]"#;
const ROUTES: &str = r#"[{"dst":"172.18.0.0/16","dev":"eth0"},{"dst":"default","gateway":"172.18.0.1","dev":"eth0"}]"#;
const SYSCTLS: &str =
    "net.ipv4.ip_forward = 1\nnet.ipv4.conf.all.route_localnet = 1\nnet.ipv4.conf.all.rp_filter = 0\n";

/// Packets a second and the most memory that the command took.
pub fn measure(command: &Path, dump: &str, packet: impl Fn(usize) -> Packet) -> Result<()> {
    let directory = tempfile::tempdir().context("no temporary directory")?;
    let node = directory.path().join("node");
    fs::create_dir(&node)?;
    for (name, text) in [
        ("iptables-legacy-save.txt", dump),
        ("ip-addr.json", ADDRESSES),
        ("ip-route.json", ROUTES),
        ("sysctl.txt", SYSCTLS),
        ("conntrack.txt", ""),
        ("ss.txt", ""),
    ] {
        fs::write(node.join(name), text)?;
    }
    let (all, some) = (directory.path().join("all.jsonl"), directory.path().join("some.jsonl"));
    write(&all, PACKETS, &packet)?;
    write(&some, WHOLE, &packet)?;
    let cores = std::thread::available_parallelism().context("cores")?.get();
    for (name, file, packets, option) in
        [("batch", &all, PACKETS, Some("--no-hops")), ("batch_with_hops", &some, WHOLE, None)]
    {
        for threads in [1, cores] {
            let mut run = Command::new("taskset");
            run.args(["-c", &format!("0-{}", threads - 1)]).arg(command).args(["simulate", "--json", "--batch"]);
            run.arg(file).arg("--snapshot").arg(&node).args(option);
            let (seconds, memory) = answers(&mut run, packets)?;
            report(&format!("{name}_on_{threads}"), packets as f64 / seconds, "packets/s");
            report(&format!("{name}_on_{threads}_memory"), memory, "MiB");
        }
    }
    Ok(())
}

fn write(file: &Path, packets: usize, packet: impl Fn(usize) -> Packet) -> Result<()> {
    let mut out = BufWriter::new(File::create(file)?);
    for number in 0..packets {
        let tuple = packet(number).tuple;
        writeln!(
            out,
            r#"{{"src":"{}","sport":{},"dst":"{}","dport":{},"proto":"{}","in":"eth0"}}"#,
            tuple.src, tuple.sport, tuple.dst, tuple.dport, tuple.proto
        )?;
    }
    Ok(out.flush()?)
}

/// Reads all answers; seconds from start to end (reading the state included), and MiB at the most.
fn answers(run: &mut Command, expected: usize) -> Result<(f64, f64)> {
    let begin = Instant::now();
    let mut child = run.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("cannot start the command")?;
    let status = format!("/proc/{}/status", child.id());
    let mut out = child.stdout.take().context("no pipe")?;
    let (mut buffer, mut lines, mut peak, mut reads) = (vec![0; 1 << 20], 0, 0.0, 0u32);
    loop {
        let size = out.read(&mut buffer)?;
        if size == 0 {
            break;
        }
        lines += memchr::memchr_iter(b'\n', &buffer[..size]).count();
        reads += 1;
        if reads.is_multiple_of(256) {
            peak = most(&status).unwrap_or(peak);
        }
    }
    ensure!(child.wait()?.success() && lines == expected, "{lines} answers to {expected} packets");
    Ok((begin.elapsed().as_secs_f64(), peak))
}

/// `VmHWM` in MiB; `None` when the process is gone.
fn most(status: &str) -> Option<f64> {
    let text = fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<f64>().ok()? / 1024.0)
}
