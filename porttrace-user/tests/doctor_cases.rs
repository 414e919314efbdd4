//! The doctor's report on recorded and on imagined nodes: one folder a case under `tests/cases/doctor`, its facts in
//! `facts.json` (as `porttrace doctor --json` gives them), what is printed beside them.

use porttrace_user::core::doctor::facts::Facts;
use porttrace_user::core::doctor::{Report, Status, examine};
use porttrace_user::render::doctor::{json, text};
use porttrace_user::render::style::{Style, When};
use std::fs;
use std::path::{Path, PathBuf};

fn cases() -> Vec<(String, PathBuf)> {
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/doctor");
    let mut cases: Vec<(String, PathBuf)> = fs::read_dir(home)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
        .collect();
    cases.sort();
    cases
}

fn facts(path: &Path) -> Facts {
    serde_json::from_slice(&fs::read(path.join("facts.json")).unwrap()).unwrap()
}

#[test]
fn every_case_reads_as_it_should() {
    let cases = cases();
    assert!(cases.len() >= 10, "only {} cases", cases.len());
    let style = Style::new(When::Never, false, true, Some(80));
    for (name, path) in cases {
        let facts = facts(&path);
        let report = examine(&facts);
        let printed = text(&facts, &report, style);
        for line in printed.lines() {
            assert!(line.chars().count() <= 80 || line.trim().split(' ').count() == 1, "{name}: too wide: {line}");
        }
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path(&path);
        settings.set_prepend_module_to_snapshot(false);
        settings.set_omit_expression(true);
        settings.bind(|| insta::assert_snapshot!("report", printed));
        every_lack_is_explained(&name, &report);
        the_answer_follows_from_the_checks(&name, &report);
        the_json_says_the_same(&facts, &report);
    }
}

fn every_lack_is_explained(name: &str, report: &Report) {
    for check in report.checks.iter().filter(|check| check.status >= Status::Warning) {
        assert!(check.costs.is_some(), "{name}: {} costs nothing?", check.id);
        assert!(check.advice.is_some(), "{name}: nothing to do about {}?", check.id);
    }
}

/// `watch` cannot run exactly when a part of the kernel or the probe is bad; lockdown alone only blinds it.
fn the_answer_follows_from_the_checks(name: &str, report: &Report) {
    let fatal = ["capabilities", "programs", "interfaces"];
    let any = report.checks.iter().any(|check| check.status == Status::Bad && fatal.contains(&check.id));
    assert_eq!(report.can_watch, !any, "{name}");
    let impaired = report.checks.iter().any(|check| check.status >= Status::Unknown);
    assert_eq!(report.degraded, impaired, "{name}");
}

fn the_json_says_the_same(facts: &Facts, report: &Report) {
    let value = json(facts, report);
    assert_eq!(value["v"], 1);
    assert_eq!(value["can_watch"], report.can_watch);
    assert_eq!(value["checks"].as_array().unwrap().len(), report.checks.len());
    let again: Facts = serde_json::from_value(value["facts"].clone()).unwrap();
    assert_eq!(&again, facts, "facts survive the way through a report");
}

#[test]
fn facts_that_are_unknown_are_not_taken_for_good() {
    let report = examine(&Facts::default());
    assert!(!report.can_watch);
    assert!(report.degraded);
    let good = report.checks.iter().filter(|check| check.status == Status::Good);
    let good: Vec<&str> = good.map(|check| check.id).collect();
    assert_eq!(good, ["capabilities"], "nothing is missing among the capabilities, and nothing else is known");
}
