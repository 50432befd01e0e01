#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    reason = "a failure anywhere in a test is a failure of the test"
)]
//! `pando-bench floor` as a user runs it, on real KVM, with few clones.

use std::process::{Command, Output};

use serde_json::Value;

fn floor(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pando-bench"))
        .arg("floor")
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn json_has_the_host_the_marks_and_every_figure() {
    let output = floor(&[
        "--count",
        "4",
        "--parallel",
        "5",
        "--rounds",
        "2",
        "--memory",
        "8M",
        "--json",
    ]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["benchmark"], "floor");
    assert!(
        report["host"]["kvm"]["ns_per_instruction"]
            .as_f64()
            .unwrap()
            > 0.0
    );
    let marks = report["marks"].to_string();
    assert!(
        marks.contains("clock starts") && marks.contains("clock stops"),
        "{marks}"
    );
    let results = &report["results"];
    assert_eq!(results["memory_bytes"], 8 << 20);
    let start = results["start"].as_array().unwrap();
    assert_eq!(start.len(), 2);
    assert_eq!(start[0]["summary"]["samples"], 8);
    assert_eq!(start[0]["ratio"]["p50"], 1.0);
    assert_eq!(start[1]["summary"]["samples"], 2);
    let waves = results["waves"].as_array().unwrap();
    assert_eq!(waves.len(), 2);
    assert!(waves.iter().all(|wave| wave["clones"] == 5));
    for stage in ["fork", "vm", "run"] {
        let summary = &results["stages"][stage];
        assert_eq!(summary["samples"], 8, "{stage}");
        assert!(summary["p50_ns"].as_u64().unwrap() > 0, "{stage}");
    }
}

#[test]
fn the_table_says_when_the_clock_runs() {
    let output = floor(&[
        "--count",
        "2",
        "--parallel",
        "2",
        "--rounds",
        "1",
        "--memory",
        "4M",
    ]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "clock starts",
        "clock stops",
        "one after the other",
        "2 together",
        "p99",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[test]
fn memory_that_is_too_small_or_no_size_is_refused() {
    for (memory, message) in [
        ("2M", "guest memory of 2097152 bytes"),
        ("5000000", "whole pages"),
        ("many", "is no size"),
    ] {
        let output = floor(&["--memory", memory]);
        assert!(!output.status.success());
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains(message), "{errors}");
    }
}
