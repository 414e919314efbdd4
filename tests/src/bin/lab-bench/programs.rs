//! How long each kernel program runs, by the kernel's own count, and how large it is.

use crate::Arguments;
use crate::scene::{OTHER_PORT, Scene};
use anyhow::Result;
use porttrace_tests::bpf::{self, Attachment};
use porttrace_tests::lab::topology::HOST_PORT;
use porttrace_tests::load::Pace;
use porttrace_user::core::model::flow::Proto;
use std::time::Duration;

/// Counting costs time too, so this is a run of its own.
pub fn measure(scene: &Scene, arguments: &Arguments) -> Result<()> {
    let _counting = bpf::count_time()?;
    let nothing = scene.node().run_in(|| Attachment::of_nothing("eth0"))??;
    for (port, options) in [(HOST_PORT, &[][..]), (HOST_PORT, &["--conntrack-backend", "ctnetlink"]), (OTHER_PORT, &[])]
    {
        let watch = scene.watch(port, options)?;
        let made = scene.connect(Proto::Tcp, Pace::AsFastAsPossible, Duration::from_secs_f64(arguments.seconds))?;
        let words = [&["watch", &port.to_string()], options].concat().join(" ");
        println!("\nkernel programs of porttrace {words}, {:.0} connections a second to {HOST_PORT}", made.rate());
        for program in bpf::usage(&bpf::held_by(watch.id())?)?.iter().filter(|program| program.runs > 0) {
            println!("  {program}");
        }
        println!("  {}  (of all so far: what counting costs, in every figure)", nothing.usage()?);
    }
    Ok(())
}
