#![forbid(unsafe_code)]
//! A cgroup for each clone: there while it lives, gone with it, whoever is killed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pando_tests::command::{
    Running, eventually, finish, is_alive, make_template, names, pando, signal_pid,
};
use pando_vmm::clone::cgroup::CloneGroups;
use pando_vmm::host::cgroups::Membership;
use rustix::process::Signal;

/// Where a supervisor's directory would be; `None` where clones can have no cgroups here.
fn above() -> Option<PathBuf> {
    let groups = CloneGroups::new();
    groups.ok()?;
    Membership::of_self().unified.map(|place| place.dir)
}

fn start(template: &Path, engine: &str) -> Result<Running> {
    Running::start(pando(&["clone"])?.arg(template).args([
        "--count",
        "4",
        "--engine",
        engine,
        "--cgroups",
        "--json",
    ]))
}

/// The processes of each clone's cgroup.
fn groups(dir: &Path) -> Vec<Vec<u32>> {
    let Ok(names) = names(dir) else {
        return Vec::new();
    };
    let clones = names.iter().filter(|name| name.parse::<u64>().is_ok());
    clones
        .map(|name| {
            let text = fs::read_to_string(dir.join(name).join("cgroup.procs"));
            let pids = text.unwrap_or_default();
            pids.lines().filter_map(|pid| pid.parse().ok()).collect()
        })
        .collect()
}

fn all_in_their_own(dir: &Path) -> bool {
    let groups = groups(dir);
    groups.len() == 4 && groups.iter().all(|pids| pids.len() == 1)
}

#[test]
fn each_clone_has_its_cgroup_and_takes_it_along() -> Result<()> {
    let Some(above) = above() else {
        return Ok(());
    };
    let parent = tempfile::tempdir()?;
    let template = make_template(parent.path())?;
    for engine in ["copy", "root", "kernel"] {
        let running = start(&template, engine)?;
        let dir = above.join(format!("pando-{}", running.pid()));
        eventually("each clone is in a cgroup", || all_in_their_own(&dir))?;
        let killed = groups(&dir)[0][0];
        signal_pid(killed, Signal::KILL)?;
        eventually("its cgroup goes with it", || groups(&dir).len() == 3)?;
        running.signal(Signal::TERM)?;
        let finished = running.finish()?.expect_code(1)?;
        finished.expect_error(&["it was killed by signal 9", "1 of 4 clones failed"])?;
        ensure!(!dir.exists(), "{engine}: {} is left", dir.display());
    }
    Ok(())
}

#[test]
fn what_a_killed_supervisor_leaves_the_next_one_removes() -> Result<()> {
    let Some(above) = above() else {
        return Ok(());
    };
    let parent = tempfile::tempdir()?;
    let template = make_template(parent.path())?;
    for engine in ["copy", "root"] {
        let mut running = start(&template, engine)?;
        let left = above.join(format!("pando-{}", running.pid()));
        eventually("each clone is in a cgroup", || all_in_their_own(&left))?;
        let clones = groups(&left).concat();
        running.child.kill()?;
        running.child.wait()?;
        eventually("all clones are gone", || {
            clones.iter().all(|&pid| !is_alive(pid))
        })?;
        ensure!(left.exists(), "nobody could remove it");
        let next = start(&template, engine)?;
        let dir = above.join(format!("pando-{}", next.pid()));
        eventually("the next one has its own", || all_in_their_own(&dir))?;
        ensure!(!left.exists(), "{engine}: {} is left", left.display());
        next.signal(Signal::TERM)?;
        next.finish()?.expect_code(0)?;
        ensure!(!dir.exists(), "{engine}: {} is left", dir.display());
    }
    Ok(())
}

#[test]
fn why_the_kernels_share_is_unknown_is_said() -> Result<()> {
    let parent = tempfile::tempdir()?;
    let template = make_template(parent.path())?;
    let running = Running::start(
        pando(&["clone"])?
            .arg(&template)
            .args(["--count", "2", "--json"]),
    )?;
    eventually("two clones", || running.clones().len() == 2)?;
    running.signal(Signal::TERM)?;
    let document = running.finish()?.json()?;
    let why = document["memory"]["kernel_unknown"]
        .as_str()
        .context("no reason")?
        .to_owned();
    ensure!(why.contains("--cgroups"), "{why}");
    ensure!(document["memory"]["total"]["kernel_bytes"].is_null());
    let help = finish(&mut pando(&["clone", "--help"])?)?.expect_code(0)?;
    ensure!(help.stdout.contains("--cgroups"));
    Ok(())
}
