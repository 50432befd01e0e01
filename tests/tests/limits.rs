#![forbid(unsafe_code)]
//! Hosts without room: said before anything starts, with the arithmetic; and when it runs out half
//! way through a batch, those that do not fit fail by themselves.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use pando_tests::command::{Running, eventually, finish, make_template};
use pando_tests::metrics::{address, scrape};
use pando_tests::rig::built_program;
use pando_vmm::host::cgroups::Membership;
use rustix::process::Signal;

/// A cgroup of the test's own with a limit of processes; removed when dropped.
struct Limited(PathBuf);

impl Limited {
    /// `None` where no cgroup of processes can be made.
    fn new(limit: u64) -> Option<Self> {
        let membership = Membership::of_self();
        let above = membership.pids.or(membership.unified)?.dir;
        let dir = above.join(format!("pando-test-{}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        let limited = Self(dir);
        fs::write(limited.0.join("pids.max"), limit.to_string()).ok()?;
        Some(limited)
    }

    /// `pando` with these arguments, in this cgroup from its first instruction on.
    fn pando(&self, args: &[&str], template: &Path) -> Result<Command> {
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(self.0.join("cgroup.procs"))
            .arg(built_program("pando")?)
            .arg("clone")
            .arg(template)
            .args(args)
            .stdin(Stdio::null());
        Ok(command)
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn clones(exposition: &str, state: &str) -> Option<f64> {
    let label = format!("state=\"{state}\"");
    let mut lines = exposition
        .lines()
        .filter(|line| line.starts_with("pando_clones{") && line.contains(&label));
    lines.next()?.rsplit(' ').next()?.parse().ok()
}

#[test]
fn a_batch_that_meets_the_limit_of_processes_goes_on_without_those_that_do_not_fit() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let Some(limited) = Limited::new(36) else {
        // A host where no cgroup can be made: the arithmetic is tested without one.
        return Ok(());
    };
    let refused = finish(&mut limited.pando(&["--count", "8"], &template)?)?.expect_code(1)?;
    let text = ["threads each", "pids.max of", "allows 36", "--overcommit"];
    refused.expect_error(&text)?;
    for engine in ["copy", "kernel", "root"] {
        let args = ["--count", "8", "--overcommit", "--engine", engine, "--json"];
        let metrics = ["--metrics", "127.0.0.1:0"];
        let mut running =
            Running::start(&mut limited.pando(&[&args[..], &metrics].concat(), &template)?)?;
        let served = address(&mut running)?;
        let count = |state| scrape(&served).ok().and_then(|text| clones(&text, state));
        eventually("every clone runs or has failed", || {
            let settled = count("running").zip(count("ended"));
            settled.is_some_and(|(running, ended)| running + ended == 8.0)
        })?;
        let (lived, failed) = (count("running"), count("ended"));
        running.signal(Signal::INT)?;
        let finished = running.finish()?.expect_code(1)?;
        let endings = finished.json()?["clones"]
            .as_array()
            .context("no clones")?
            .iter()
            .map(|clone| clone["ending"].clone())
            .collect::<Vec<_>>();
        let stopped = endings.iter().filter(|ending| *ending == "stopped").count();
        ensure!(endings.len() == 8, "{engine}: {endings:?}");
        ensure!(
            stopped > 0 && Some(stopped as f64) <= lived && failed > Some(0.0),
            "{engine}: {endings:?}"
        );
        finished.expect_error(&["of 8 clones failed"])?;
    }
    let left = fs::read_to_string(limited.0.join("cgroup.procs"))?;
    ensure!(left.is_empty(), "processes are left: {left}");
    Ok(())
}
