#![forbid(unsafe_code)]
//! `pando demo` as a user runs it: every clone verified, the template unchanged, metrics that move.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use pando_tests::command::{Running, finish, names, pando};
use pando_tests::metrics::{address, scrape, sum};
use rustix::process::Signal;

fn demo(args: &[&str]) -> Result<serde_json::Value> {
    let mut all = vec!["demo", "--json", "--memory", "64M"];
    all.extend(args);
    finish(&mut pando(&all)?)?.expect_code(0)?.json()
}

fn check(result: &serde_json::Value, clones: u64) {
    assert_eq!(result["verified"], clones, "{result:#}");
    assert_eq!(result["failures"], serde_json::json!([]));
    assert_eq!(result["template"]["unchanged"], true);
    assert_eq!(
        result["template"]["digest_before"],
        result["template"]["digest_after"]
    );
    let total = result["start"].as_array().and_then(|stages| stages.last());
    let total = total.map(|stage| (stage[0].as_str(), stage[1]["count"].as_u64()));
    assert_eq!(total, Some((Some("total"), Some(clones))));
}

#[test]
fn one_clone_is_verified() -> Result<()> {
    let result = demo(&["--clones", "1"])?;
    check(&result, 1);
    assert!(
        result["io"]
            .as_str()
            .is_some_and(|io| io.starts_with("uring")),
        "{}",
        result["io"]
    );
    let faults = &result["pager"]["fault_us"];
    assert!(faults["zero"]["count"].as_u64() > Some(0), "{faults:#}");
    let data = ["cache", "disk"]
        .iter()
        .filter_map(|s| faults[s]["count"].as_u64())
        .sum::<u64>();
    assert!(data > 0, "{faults:#}");
    Ok(())
}

#[test]
fn twenty_clones_are_verified_and_alive_at_once() -> Result<()> {
    let result = demo(&["--clones", "20"])?;
    check(&result, 20);
    assert!(result["memory"]["private_bytes_p50"].as_u64() > Some(0));
    Ok(())
}

#[test]
fn pages_read_by_pread_are_right_as_well() -> Result<()> {
    let result = demo(&["--clones", "2", "--io", "pread"])?;
    check(&result, 2);
    assert_eq!(result["io"], "pread");
    Ok(())
}

#[test]
fn engine_kernel_gives_the_same_answers_without_a_pager() -> Result<()> {
    let result = demo(&["--clones", "2", "--engine", "kernel"])?;
    check(&result, 2);
    assert_eq!(result["io"], "none");
    assert_eq!(result["pager"]["fault_us"], serde_json::json!({}));
    Ok(())
}

#[test]
fn a_template_can_be_kept_and_used_again() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let kept = dir.path().join("kept");
    demo(&[
        "--clones",
        "1",
        "--template",
        kept.to_str().context("a plain path")?,
    ])?;
    assert_eq!(
        names(&kept)?,
        ["manifest.json", "pages.idx", "ram0.mem", "state.bin"]
    );
    finish(pando(&["template", "verify"])?.arg(&kept))?.expect_code(0)?;
    Ok(())
}

#[test]
fn metrics_are_valid_and_every_family_moves() -> Result<()> {
    let mut running = Running::start(&mut pando(&[
        "demo",
        "--hold",
        "--clones",
        "3",
        "--memory",
        "64M",
        "--metrics",
        "127.0.0.1:0",
    ])?)?;
    let address = address(&mut running)?;
    running.wait_stderr("clones verified; holding")?;
    // Clones report each second.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let exposition = scrape(&address)?;
    for family in [
        "pando_build_info",
        "pando_clones",
        "pando_clone_start_seconds_count",
        "pando_clone_memory_bytes",
        "pando_pager_faults_total",
        "pando_pager_fault_seconds_count",
        "pando_pager_pages_installed_total",
        "pando_pager_bytes_read_total",
    ] {
        assert!(
            sum(&exposition, family) > Some(0.0),
            "{family} does not move in:\n{exposition}"
        );
    }
    assert!(
        exposition.contains("pando_clone_start_seconds_bucket"),
        "histograms have buckets"
    );
    assert!(
        exposition.contains("le=\"0.00001\""),
        "buckets begin at microseconds:\n{exposition}"
    );
    for stage in ["queue", "read", "install", "total"] {
        assert!(
            exposition.contains(&format!("stage=\"{stage}\"")),
            "{stage}"
        );
    }
    check_with_promtool(&exposition)?;
    running.signal(Signal::INT)?;
    running.finish()?.expect_code(0)?;
    Ok(())
}

fn check_with_promtool(exposition: &str) -> Result<()> {
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("promtool is needed: apt-get install prometheus")?;
    promtool
        .stdin
        .take()
        .context("no pipe")?
        .write_all(exposition.as_bytes())?;
    let output = promtool.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && text.is_empty(),
        "promtool: {text}"
    );
    Ok(())
}

#[test]
fn a_demo_interrupted_while_it_makes_its_template_leaves_nothing() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    for delay_ms in [0, 20, 60, 120, 200, 300] {
        let mut running = Running::start(
            pando(&["demo", "--clones", "2", "--memory", "64M"])?.env("TMPDIR", scratch.path()),
        )?;
        running.wait_stderr("metrics: http://")?;
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        running.signal(Signal::TERM)?;
        running.finish()?;
        assert_eq!(
            names(scratch.path())?,
            Vec::<String>::new(),
            "after {delay_ms} ms"
        );
    }
    Ok(())
}

#[test]
fn an_interrupted_demo_ends_all_and_leaves_nothing() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let mut running = Running::start(
        pando(&["demo", "--clones", "400", "--memory", "64M"])?.env("TMPDIR", scratch.path()),
    )?;
    running.wait_stderr("metrics: http://")?;
    pando_tests::command::eventually("clones run", || running.children().len() > 3)?;
    let children = running.children();
    running.signal(Signal::TERM)?;
    let finished = running.finish()?;
    assert_eq!(finished.code, Some(1), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("interrupted"),
        "{}",
        finished.stderr
    );
    assert!(
        children
            .iter()
            .all(|&pid| !pando_tests::command::is_alive(pid))
    );
    assert_eq!(names(scratch.path())?, Vec::<String>::new());
    Ok(())
}
