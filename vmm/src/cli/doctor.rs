#![forbid(unsafe_code)]
//! `pando doctor`: what this host can do, and the fix for what it cannot.

use super::args::DoctorArgs;
use super::fail::Failure;
use super::out::say;
use crate::host::doctor::{Finding, Grade, examine};
use crate::report::exit;

/// Examines the host. The exit code says whether `pando demo` can run.
pub fn run(args: &DoctorArgs) -> Result<u8, Failure> {
    let findings = examine();
    let can_run = findings.iter().all(|finding| finding.grade != Grade::Fail);
    if args.json {
        let document = serde_json::json!({ "demo_can_run": can_run, "findings": findings });
        say!("{document:#}");
    } else {
        print_findings(&findings);
        say!("\n{}", verdict(&findings));
    }
    Ok(if can_run { exit::OK } else { exit::HOST })
}

fn print_findings(findings: &[Finding]) {
    let width = findings
        .iter()
        .map(|finding| finding.what.len())
        .max()
        .unwrap_or(0);
    for finding in findings {
        say!(
            "{:<5} {:<width$}  {}",
            finding.grade.to_string(),
            finding.what,
            finding.found
        );
        if let Some(fix) = &finding.fix {
            say!("{:<5} {:<width$}  fix: {fix}", "", "");
        }
    }
}

fn verdict(findings: &[Finding]) -> String {
    let count = |grade| {
        findings
            .iter()
            .filter(|finding| finding.grade == grade)
            .count()
    };
    match (count(Grade::Fail), count(Grade::Warn)) {
        (0, 0) => "this host can do everything: try `pando demo`".to_owned(),
        (0, warnings) => {
            format!("`pando demo` can run; {warnings} findings make it slower or smaller")
        }
        (failures, _) => {
            format!("`pando demo` cannot run: {failures} findings must be fixed first")
        }
    }
}
