#![forbid(unsafe_code)]
//! Clones under stress, at the size of a test: the same as `pando-bench soak` does at full size.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use pando_tests::command::{Finished, finish};
use pando_tests::rig::built_program;
use serde_json::Value;

fn bench(args: &[&str]) -> Result<Finished> {
    let mut command = Command::new(built_program("pando-bench")?);
    finish(command.args(args).arg("--json").stdin(Stdio::null()))
}

fn soak(args: &[&str]) -> Result<Finished> {
    bench(&[&["soak", "--small", "--memory", "64M"][..], args].concat())
}

/// The trials of a run in which nothing was wrong.
fn trials(finished: Finished) -> Result<Vec<Value>> {
    let document = finished.expect_code(0)?.json()?;
    ensure!(document["results"]["seed"].is_u64(), "{document:#}");
    let trials = document["results"]["trials"].as_array();
    let trials = trials.context("no trials")?.clone();
    for trial in &trials {
        ensure!(trial["wrong"] == 0, "{trial:#}");
        ensure!(
            trial["done"]["right answers"].as_u64() > Some(0),
            "{trial:#}"
        );
        for what in ["processes", "descriptors", "cgroups"] {
            ensure!(trial["left"][what] == Value::Array(vec![]), "{trial:#}");
        }
    }
    Ok(trials)
}

/// Where no cgroup with a limit can be made, that is what is said.
fn where_limits_can_be_set(finished: Finished) -> Result<Vec<Value>> {
    if finished.stderr.contains("no cgroup with a limit of") {
        finished.expect_code(1)?;
        return Ok(Vec::new());
    }
    trials(finished)
}

#[test]
fn no_byte_crosses_while_clones_come_and_go() -> Result<()> {
    let trials = trials(soak(&["isolation"])?)?;
    assert_eq!(trials.len(), 2, "engines root and copy");
    Ok(())
}

#[test]
fn the_second_generation_asks_for_little_zero_pages_or_not() -> Result<()> {
    for trial in trials(soak(&["second-generation", "--engines", "copy,root"])?)? {
        let faults = |generation| trial["done"][format!("faults of the {generation}")].as_u64();
        let first = faults("first generation");
        assert!(first > Some(1000), "{trial:#}");
        assert!(
            faults("second").map(|second| second * 20) <= first,
            "{trial:#}"
        );
    }
    Ok(())
}

/// Where nothing can be told from what was written, that is what is said.
#[test]
fn idle_clones_shrink_to_their_budget_and_read_as_before() -> Result<()> {
    let finished = soak(&["give-back"])?;
    if finished.stderr.contains("give-back is off on this host") {
        finished.expect_code(1)?;
        return Ok(());
    }
    let trials = trials(finished)?;
    assert_eq!(trials.len(), 2, "engines root and copy");
    for trial in trials {
        let done = |what: &str| trial["done"][what].as_u64();
        // Three clones, two rounds, 30 MiB that each read and did not write.
        assert!(done("MiB given back") >= Some(3 * 2 * 29), "{trial:#}");
        assert!(
            done("KiB of clean memory left, at most") <= Some(1024),
            "{trial:#}"
        );
    }
    Ok(())
}

#[test]
fn a_clone_killed_at_any_moment_leaves_nothing_and_nobody_notices() -> Result<()> {
    for trial in trials(soak(&["kill-clones", "--cgroups"])?)? {
        assert_eq!(trial["done"]["kills"], 24, "{trial:#}");
    }
    Ok(())
}

#[test]
fn clones_outlive_roots_that_are_killed_while_they_fork() -> Result<()> {
    let trials = trials(soak(&["kill-root"])?)?;
    assert!(trials[0]["done"]["roots"].as_u64() > Some(3), "{trials:#?}");
    Ok(())
}

#[test]
fn clones_get_every_byte_although_their_pager_is_killed_again_and_again() -> Result<()> {
    for trial in trials(soak(&["kill-pager", "--every-ms", "100"])?)? {
        assert!(trial["done"]["kills"].as_u64() > Some(0), "{trial:#}");
    }
    Ok(())
}

#[test]
fn a_template_changed_while_served_gives_no_wrong_byte() -> Result<()> {
    let trials = trials(soak(&["template"])?)?;
    assert_eq!(trials[0]["done"]["changes"], 3, "{trials:#?}");
    Ok(())
}

#[test]
fn a_clone_without_memory_fails_alone() -> Result<()> {
    for trial in where_limits_can_be_set(soak(&["memory"])?)? {
        assert_eq!(
            trial["done"]["of them failed by their limit"], 1,
            "{trial:#}"
        );
    }
    Ok(())
}

#[test]
fn a_batch_goes_on_without_those_that_find_no_descriptor_or_process() -> Result<()> {
    for trial in where_limits_can_be_set(soak(&["limits"])?)? {
        let failed = &trial["done"]["of them failed for want of descriptors"];
        assert!(failed.as_u64() > Some(0), "{trial:#}");
    }
    Ok(())
}

/// What would be the use of a run that always ends well?
#[test]
fn a_clone_that_ends_unasked_is_found() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let program = dir.path().join("pando");
    let real = built_program("pando")?;
    let script = format!(
        "#!/bin/sh\n(sleep 1; kill -9 $$) & exec {} \"$@\"\n",
        real.display()
    );
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let given = program.to_str().context("no text")?;
    let args = [
        "isolation",
        "--engines",
        "copy",
        "--seed",
        "7",
        "--rounds",
        "50",
        "--pando",
        given,
    ];
    soak(&args)?.expect_code(1)?.expect_error(&[
        "isolation with engine copy: wrong",
        "--seed 7",
        "signal 9",
    ])?;
    Ok(())
}

#[test]
fn clones_alive_at_once_are_counted_compared_and_given_back() -> Result<()> {
    let args = [
        "density",
        "--counts",
        "5,12",
        "--engines",
        "kernel,root,copy",
        "--memory",
        "64M",
    ];
    let document = bench(&args)?.expect_code(0)?.json()?;
    let engines = document["results"]["engines"].as_array();
    let engines = engines.context("no engines")?;
    assert_eq!(engines.len(), 3);
    for engine in engines {
        // Four answers each on the way up, and one when all have written.
        assert_eq!(engine["right_answers"], 12 * 5, "{engine:#}");
        assert_eq!(engine["wrong"], 0, "{engine:#}");
        assert_eq!(engine["memory"]["clones"], 12, "{engine:#}");
        assert_eq!(engine["left"]["processes"], Value::Array(vec![]));
        assert_eq!(engine["left"]["descriptors"], Value::Array(vec![]));
    }
    assert_eq!(
        document["results"]["floor"][0]["grown"]["steps"][1]["alive"],
        12
    );
    Ok(())
}

#[test]
fn one_pager_is_measured_under_many_clones() -> Result<()> {
    let args = [
        "pager",
        "--memory",
        "4M",
        "--clones",
        "1,6",
        "--pages",
        "32",
        "--rounds",
        "1",
        "--pairs",
        "2",
        "--no-cold",
    ];
    let document = bench(&args)?.expect_code(0)?.json()?;
    let results = &document["results"];
    assert!(
        results["targets"].as_array().map(Vec::len) >= Some(5),
        "{document:#}"
    );
    let setups = results["setups"].as_array().context("no setups")?;
    for setup in setups {
        let six = &setup["loads"][1];
        assert_eq!(six["load"]["clones"], 6, "{six:#}");
        assert!(six["faults"].as_u64() > Some(0), "{six:#}");
    }
    Ok(())
}
