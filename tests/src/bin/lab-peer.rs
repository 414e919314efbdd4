//! A server or a client for the lab, run inside one of its namespaces.

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use porttrace_tests::peer::{Connect, Outcome, Serve, Transport, connect, serve};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Answer on these ports, IPv4 and IPv6 (or on one address); print `ready`, then a JSON line a request.
    Serve {
        #[arg(long, default_value = "peer")]
        name: String,
        #[arg(long, value_delimiter = ',')]
        tcp: Vec<u16>,
        #[arg(long, value_delimiter = ',')]
        udp: Vec<u16>,
        /// The address to listen on.
        #[arg(long)]
        address: Option<IpAddr>,
        /// Log no requests.
        #[arg(long)]
        quiet: bool,
    },
    /// Connect, and print what came of it as a JSON line each time; exit 1 when not all were answered.
    Connect {
        proto: Proto,
        ip: IpAddr,
        port: u16,
        /// Own address, or address and port.
        #[arg(long, value_parser = bind_address)]
        bind: Option<SocketAddr>,
        /// Milliseconds.
        #[arg(long, default_value_t = 2000)]
        timeout: u64,
        #[arg(long, default_value_t = 1)]
        count: u32,
        /// Bytes that the server shall send (TCP).
        #[arg(long, default_value_t = 0)]
        bytes: u64,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Proto {
    Tcp,
    Udp,
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().role {
        Role::Serve { name, tcp, udp, address, quiet } => {
            serve(&Serve { name, tcp, udp, address, quiet })?;
            Ok(ExitCode::SUCCESS)
        }
        Role::Connect { proto, ip, port, bind, timeout, count, bytes } => {
            let proto = match proto {
                Proto::Tcp => Transport::Tcp,
                Proto::Udp => Transport::Udp,
            };
            let to = SocketAddr::new(ip, port);
            let request = Connect { proto, to, bind, timeout: Duration::from_millis(timeout), bytes };
            let mut failed = false;
            for _ in 0..count {
                let answer = connect(&request)?;
                failed |= answer.result != Outcome::Ok;
                println!("{}", serde_json::to_string(&answer)?);
            }
            Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
        }
    }
}

/// `IP` or `IP:PORT` (`[IP]:PORT` for IPv6).
fn bind_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, 0));
    }
    text.parse().map_err(|_| format!("{text:?} is neither an address nor address:port"))
}
