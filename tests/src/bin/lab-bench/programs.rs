//! How long each kernel program runs, by the kernel's own count, and how large it is.

use crate::Arguments;
use crate::scene::{CLIENT_PORTS, OTHER_PORT, Scene};
use anyhow::Result;
use porttrace_tests::bpf::{self, Attachment};
use porttrace_tests::lab::topology::HOST_PORT;
use porttrace_tests::load::{Pace, Until};
use porttrace_user::core::model::flow::Proto;
use std::time::{Duration, Instant};

/// Counting costs time too, so this is a run of its own.
pub fn measure(scene: &Scene, arguments: &Arguments) -> Result<()> {
    let _counting = bpf::count_time()?;
    let nothing = scene.node().run_in(|| Attachment::of_nothing("eth0"))??;
    let by_events = &["--conntrack-backend", "ctnetlink"][..];
    for (port, options, proto) in [
        (HOST_PORT, &[][..], Proto::Tcp),
        // Each port once, one datagram a connection: every run makes an event.
        (HOST_PORT, &[], Proto::Udp),
        (HOST_PORT, by_events, Proto::Tcp),
        (OTHER_PORT, &[], Proto::Tcp),
        (OTHER_PORT, &[], Proto::Udp),
    ] {
        let watch = scene.watch(port, options)?;
        let until = match proto {
            Proto::Udp => Until::Rounds(1),
            _ => Until::Time(Instant::now() + Duration::from_secs_f64(arguments.seconds)),
        };
        let made = scene.connect_from(CLIENT_PORTS, proto, Pace::AsFastAsPossible, until)?;
        let words = [&["watch", &port.to_string()], options].concat().join(" ");
        let rate = made.rate();
        println!("\nkernel programs of porttrace {words}, {rate:.0} new {proto} connections a second to {HOST_PORT}");
        for program in bpf::usage(&bpf::held_by(watch.id())?)?.iter().filter(|program| program.runs > 0) {
            println!("  {program}");
        }
        println!("  {}  (of all so far: what counting costs, in every figure)", nothing.usage()?);
    }
    Ok(())
}
