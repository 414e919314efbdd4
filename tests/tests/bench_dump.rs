//! The dump that the simulator is measured on is one that the kernel has: iptables loads it and prints it again as it was.

#[path = "../../porttrace-user/examples/bench_sim/generator.rs"]
mod generator;

use porttrace_tests::lab::rules::IptablesFlavour;
use porttrace_tests::privilege::may_run;
use porttrace_tests::reload::reload;

#[test]
fn the_kernel_takes_the_generated_dump() {
    if !may_run("loading rules") {
        return;
    }
    let file = std::env::temp_dir().join(format!("ptl-{}-bench.rules", std::process::id()));
    std::fs::write(&file, generator::dump(&generator::services(120, 4, 40))).unwrap();
    let outcomes = [IptablesFlavour::Legacy, IptablesFlavour::Nft].map(|flavour| reload(&file, flavour));
    std::fs::remove_file(&file).unwrap();
    for outcome in outcomes {
        outcome.unwrap();
    }
}
