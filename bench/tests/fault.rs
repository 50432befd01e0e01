#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    reason = "a failure anywhere in a test is a failure of the test"
)]
//! `pando-bench fault` as a user runs it, on real userfaultfd memory, with few pages.

use std::process::{Command, Output};

use serde_json::Value;

fn fault(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pando-bench"))
        .arg("fault")
        .args(arguments)
        .output()
        .unwrap()
}

const SMALL: [&str; 10] = [
    "--memory",
    "1M",
    "--pages",
    "64",
    "--rounds",
    "2",
    "--threads",
    "1,3",
    "--spin-us",
    "10",
];

#[test]
fn json_has_every_group_its_pages_and_its_targets() {
    let output = fault(&[&SMALL[..], &["--json"]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["benchmark"], "fault");
    assert!(report["host"]["cpus"].as_u64().unwrap() > 0);
    let marks = report["marks"].to_string();
    assert!(
        marks.contains("clock starts") && marks.contains("stops"),
        "{marks}"
    );
    let groups = report["results"]["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 5);
    for group in groups {
        let ways = group["ways"].as_array().unwrap();
        assert!(ways.len() >= 2, "{}", group["title"]);
        assert_eq!(ways[0]["page"]["ratio"]["p50"], 1.0);
        for way in ways {
            let touched = 2 * way["load"]["pages"].as_u64().unwrap();
            let clones = way["load"]["clones"].as_u64().unwrap();
            assert_eq!(way["touch"]["samples"], touched * clones);
            let faults = way["pager"]["faults"].as_u64().unwrap();
            assert_eq!(faults > 0, way["engine"] != "kernel", "{way}");
            if way["load"]["content"] == "zero" {
                assert_eq!(way["pager"]["bytes_read"], 0);
            }
        }
    }
    assert_eq!(report["results"]["bulk"].as_array().unwrap().len(), 3);
    let targets = report["results"]["targets"].as_array().unwrap();
    assert!(targets.iter().any(|target| target["met"].is_boolean()));
}

#[test]
fn the_table_has_the_baselines_and_the_targets() {
    let output = fault(&SMALL);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "clock starts",
        "kernel, read",
        "copy, same CPU",
        "memcpy",
        "UFFDIO_ZEROPAGE",
        "targets",
        "faults/s",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[test]
fn an_image_that_cannot_be_halved_is_refused() {
    for memory in ["0", "4096", "600K"] {
        let output = fault(&["--memory", memory]);
        assert!(!output.status.success());
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains("give a multiple of 524288"), "{errors}");
    }
}
