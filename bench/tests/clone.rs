#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    reason = "a failure anywhere in a test is a failure of the test"
)]
//! `pando-bench clone` as a user runs it, on real KVM, with few clones.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Once;

use serde_json::Value;

const SMALL: [&str; 10] = [
    "--memory", "64M", "--rounds", "1", "--starts", "2", "--count", "3", "--waves", "1",
];

/// Runs the benchmark; the program whose clones it measures is built first, for a test of this
/// crate alone does not.
fn clone(arguments: &[&str]) -> Output {
    static BUILT: Once = Once::new();
    let bench = Path::new(env!("CARGO_BIN_EXE_pando-bench"));
    BUILT.call_once(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "-p", "pando-vmm", "--bin", "pando"]);
        if bench.parent().unwrap().ends_with("release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success());
    });
    Command::new(bench)
        .arg("clone")
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn json_has_every_workload_variant_and_wave() {
    let variants = ["--io", "auto,pread", "--no-verify", "--json"];
    let output = clone(&[&SMALL[..], &variants].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["benchmark"], "clone");
    let results = &report["results"];
    let workloads = results["workloads"].as_array().unwrap();
    assert_eq!(workloads.len(), 3);
    for compared in workloads {
        let variants = compared["variants"].as_array().unwrap();
        let names: Vec<_> = variants.iter().map(|v| v["name"].as_str()).collect();
        let wanted = [
            "kernel",
            "copy",
            "copy, not verified",
            "copy, pread",
            "copy, pread, not verified",
            "copy, shared pager",
            "root",
            "root, warm shell",
        ];
        assert_eq!(names, wanted.map(Some));
        for variant in variants {
            assert_eq!(variant["summary"]["samples"], 2);
            let stages = variant["stages"].to_string();
            let own: &[&str] = match variant["name"].as_str() {
                Some("root") => &["fork", "memory", "threads"],
                Some("root, warm shell") => &["identity", "resume"],
                _ => &["spawn", "exec", "memory", "resume"],
            };
            for stage in own.iter().chain(&["first output, and rest"]) {
                assert!(stages.contains(stage), "no {stage} in {stages}");
            }
            let paged = variant["setup"]["engine"] == "copy";
            let faults = &variant["pager"]["counters"];
            // A pager of all clones tells what it did each second, not when a clone ends.
            if variant["setup"]["place"] != "shared" {
                assert_eq!(faults.as_object().unwrap().is_empty(), !paged, "{faults}");
            }
        }
        let first = compared["workload"] == "first-output";
        assert_eq!(compared["floor"].is_object(), first);
        assert_eq!(variants[0]["over_floor"].is_object(), first);
    }
    assert_eq!(results["floor_waves"].as_array().unwrap().len(), 1);
    let waves = results["waves"].as_array().unwrap();
    assert_eq!(waves.len(), 8);
    assert!(waves.iter().all(|wave| wave["waves"][0]["clones"] == 3));
    let targets = results["targets"].as_array().unwrap();
    assert!(targets.iter().any(|target| target["met"].is_boolean()));
}

#[test]
fn the_table_says_when_the_clock_runs_and_what_is_met() {
    let output = clone(&SMALL);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "clock starts",
        "clock stops",
        "floor",
        "vs kernel",
        "where the time goes",
        "memory each",
        "engine root, warm shell, p50",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    for (arguments, message) in [
        (["--engines", "fork"], "'fork' is no engine"),
        (["--memory", "12"], "12"),
        (["--pando", "/nowhere/pando"], "no program /nowhere/pando"),
    ] {
        let output = clone(&arguments);
        assert!(!output.status.success());
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains(message), "{errors}");
    }
}
