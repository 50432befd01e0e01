#![forbid(unsafe_code)]
//! `pando template warm`: what clones touch is recorded, kept, shown, and never in the way.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use pando_tests::command::{Finished, Running, finish, make_template, names, pando};
use rustix::process::Signal;
use serde_json::Value;

/// Reads 100 pages without data, then writes 64 others in random order.
const INPUT: &str = r"r 400 100 64 0 0\nw 800 100 40 2 9 7";

fn warm(template: &Path, args: &[&str]) -> Result<Finished> {
    finish(
        pando(&["template", "warm"])?
            .arg(template)
            .args(["--idle", "0.2"])
            .args(args),
    )
}

/// Records a run in which the guest says who it is.
fn warm_once(template: &Path) -> Result<Finished> {
    warm(template, &["--runs", "1", "--input", "i"])
}

fn inspect(template: &Path) -> Result<Value> {
    finish(pando(&["template", "inspect", "--json"])?.arg(template))?
        .expect_code(0)?
        .json()
}

#[test]
fn runs_are_recorded_kept_and_shown() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    assert_eq!(inspect(&template)?["working_set"]["state"], "absent");
    let result = warm(&template, &["--runs", "2", "--input", INPUT, "--json"])?;
    let result = result.expect_code(0)?.json()?;
    let run = |number: usize| &result["runs"][number]["touches"];
    assert_eq!(run(0)["zero_reads"], 100, "{result:#}");
    assert_eq!((&run(0)["known"], &run(1)["new"]), (&0.into(), &0.into()));
    assert_eq!(run(0)["new"], run(1)["known"]);
    assert_eq!(run(0)["is_complete"], true);
    assert_eq!(result["runs"][0]["ending"], "stopped");

    let set = &inspect(&template)?["working_set"];
    assert_eq!((&set["state"], &set["runs"]), (&"known".into(), &2.into()));
    assert_eq!(set["pages"], run(0)["new"]);
    // Those that were read, and those that were written.
    assert_eq!(set["zero_pages"], 164);
    assert!(set["written_pages"].as_u64() >= Some(64), "{set:#}");
    // The pages that were written in random order are one run of neighbours here and there.
    let written = set["touched"].as_array().context("touched")?;
    let inside = |run: &&Value| (0x800..0x900).contains(&run["first_page"].as_u64().unwrap_or(0));
    let pages: u64 = written
        .iter()
        .filter(inside)
        .filter_map(|run| run["pages"].as_u64())
        .sum();
    assert_eq!(pages, 64);

    let svg = dir.path().join("map.svg");
    let shown = finish(
        pando(&["template", "inspect", "--svg"])?
            .arg(&svg)
            .arg(&template),
    )?;
    let shown = shown.expect_code(0)?.stdout;
    for text in [
        "learned from 2 runs",
        "what clones touch",
        "when they come to it",
    ] {
        assert!(shown.contains(text), "{shown}");
    }
    assert!(fs::read_to_string(svg)?.contains("when they come to it"));
    finish(pando(&["template", "verify"])?.arg(&template))?.expect_code(0)?;
    assert_eq!(
        names(&template)?,
        [
            "manifest.json",
            "pages.idx",
            "ram0.mem",
            "state.bin",
            "working-set"
        ]
    );
    Ok(())
}

#[test]
fn the_table_says_what_each_run_did_and_a_later_warm_adds() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let first = warm_once(&template)?.expect_code(0)?;
    assert!(
        first.stdout.contains("learned from 1 run\n"),
        "{}",
        first.stdout
    );
    assert!(first.stdout.contains("kept in "), "{}", first.stdout);
    let second = warm(&template, &["--runs", "1", "--input", "w 800 100 40 0 0 7"])?;
    assert!(
        second
            .expect_code(0)?
            .stdout
            .contains("learned from 2 runs")
    );
    assert_eq!(inspect(&template)?["working_set"]["zero_pages"], 64);
    Ok(())
}

/// A page that is read first and written later faults once, for the read.
#[test]
fn a_page_that_is_written_after_it_was_read_counts_as_written() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let input = r"r 800 40 40 0 0\nw 800 20 20 0 0 7";
    let result = warm(&template, &["--runs", "1", "--input", input, "--json"])?;
    let result = result.expect_code(0)?.json()?;
    assert_eq!(result["runs"][0]["touches"]["zero_reads"], 32, "{result:#}");
    assert_eq!(result["working_set"]["zero_pages"], 64);
    assert!(result["working_set"]["written_pages"].as_u64() < Some(64));
    Ok(())
}

#[test]
fn a_damaged_working_set_is_a_note_and_never_a_failure() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    warm_once(&template)?.expect_code(0)?;
    let path = template.join("working-set");
    fs::remove_file(&path)?;
    for garbage in [&b""[..], b"nonsense", &[0xff; 4096]] {
        fs::write(&path, garbage)?;
        let set = &inspect(&template)?["working_set"];
        assert_eq!(set["state"], "ignored", "{set}");
        finish(pando(&["template", "inspect"])?.arg(&template))?.expect_code(0)?;
        finish(pando(&["template", "verify"])?.arg(&template))?
            .expect_code(0)?
            .expect_error(&["note: its working set is ignored", "pando template warm"])?;
        let mut clone = pando(&["clone"])?;
        let running = Running::start(clone.arg(&template).args(["--count", "2"]))?;
        pando_tests::command::eventually("two clones run", || running.clones().len() == 2)?;
        running.signal(Signal::TERM)?;
        running.finish()?.expect_code(0)?;
    }
    warm_once(&template)?
        .expect_code(0)?
        .expect_error(&["note: the working set that was there is replaced"])?;
    assert_eq!(inspect(&template)?["working_set"]["runs"], 1);
    Ok(())
}

#[test]
fn a_copy_keeps_what_was_learned_and_another_template_does_not_take_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    warm_once(&template)?.expect_code(0)?;
    let copy = dir.path().join("copy");
    fs::create_dir(&copy)?;
    for name in names(&template)? {
        fs::copy(template.join(&name), copy.join(&name))?;
    }
    finish(pando(&["template", "verify", "--reseal"])?.arg(&copy))?.expect_code(0)?;
    assert_eq!(inspect(&copy)?["working_set"]["runs"], 1);

    let other = tempfile::tempdir()?;
    let other = make_template(other.path()).map(|path| (path, other))?;
    warm_once(&other.0)?.expect_code(0)?;
    // Two boots may come to the very same memory: then it is the same template in all but name.
    let index = |template: &Path| fs::read(template.join("pages.idx"));
    if index(&other.0)? != index(&template)? {
        fs::remove_file(template.join("working-set"))?;
        fs::copy(other.0.join("working-set"), template.join("working-set"))?;
        let set = &inspect(&template)?["working_set"];
        assert_eq!(set["state"], "ignored", "{set}");
    }
    Ok(())
}

#[test]
fn two_that_warm_at_once_both_count() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let start = || {
        let mut command = pando(&["template", "warm", "--runs", "3", "--idle", "0.1"])?;
        Running::start(command.arg(&template).args(["--input", "i"]))
    };
    let both = [start()?, start()?];
    for running in both {
        running.finish()?.expect_code(0)?;
    }
    assert_eq!(inspect(&template)?["working_set"]["runs"], 6);
    Ok(())
}

#[test]
fn what_cannot_be_is_said_before_anything_runs() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    for (args, text) in [
        (["--seconds", "0"], "--seconds 0 is no time above 0"),
        (["--seconds", "nan"], "--seconds NaN is no time above 0"),
        (["--idle", "1e9"], "--idle 1000000000 is no time above 0"),
        (["--runs", "0"], "0 is not in 1..=1000"),
        (["--input", r"a\x"], r"'\x' is neither"),
    ] {
        let mut command = pando(&["template", "warm"])?;
        finish(command.arg(&template).args(args))?
            .expect_code(2)?
            .expect_error(&[text])?;
    }
    finish(pando(&["template", "warm"])?.arg(dir.path()))?
        .expect_code(4)?
        .expect_error(&["is not a template"])?;
    assert!(!template.join("working-set").exists());
    Ok(())
}

#[test]
fn a_guest_that_touches_nothing_is_named_with_what_to_do() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    // It is halted until something comes on its COM1.
    warm(&template, &["--runs", "1"])?
        .expect_code(1)?
        .expect_error(&["touched nothing", "--input"])?;
    assert!(!template.join("working-set").exists());
    Ok(())
}

#[test]
fn an_interrupt_ends_the_run_and_keeps_those_before() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    warm_once(&template)?.expect_code(0)?;
    let mut command = pando(&["template", "warm", "--idle", "50", "--seconds", "100"])?;
    let running = Running::start(command.arg(&template))?;
    pando_tests::command::eventually("a clone runs", || running.clones().len() == 1)?;
    let clone = running.clones()[0];
    running.signal(Signal::INT)?;
    running
        .finish()?
        .expect_code(1)?
        .expect_error(&["interrupted in run 1", "is kept"])?;
    assert!(!pando_tests::command::is_alive(clone));
    assert_eq!(inspect(&template)?["working_set"]["runs"], 1);
    Ok(())
}

#[test]
fn a_clone_that_is_killed_fails_its_run_and_teaches_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let mut command = pando(&["template", "warm", "--idle", "50", "--seconds", "100"])?;
    let running = Running::start(command.arg(&template))?;
    pando_tests::command::eventually("a clone runs", || running.clones().len() == 1)?;
    pando_tests::command::signal_pid(running.clones()[0], Signal::KILL)?;
    running.finish()?.expect_code(1)?.expect_error(&[
        "run 1 failed: it was killed by signal 9",
        "console ended with",
    ])?;
    assert!(!template.join("working-set").exists());
    Ok(())
}

#[test]
fn a_guest_that_powers_off_has_had_its_run() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let args = ["--runs", "1", "--idle", "50", "--input", "p", "--json"];
    let mut command = pando(&["template", "warm"])?;
    let result = finish(command.arg(&template).args(args))?
        .expect_code(0)?
        .json()?;
    assert_eq!(result["runs"][0]["ending"], "power-off");
    Ok(())
}
