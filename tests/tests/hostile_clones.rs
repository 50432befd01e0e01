#![forbid(unsafe_code)]
//! Processes of clones that do what none should: their supervisor goes on, and says what they did.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pando_tests::command::{HANG, eventually, is_alive, signal_pid};
use pando_tests::grove::{Grove, usual_options};
use pando_tests::rig::built_program;
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::{Ending, Io, PagerConfig, PagerPlace};
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::{CloneOptions, Event, RootOptions, Supervisor};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{
    ForeignRawFd, PidfdFlags, PidfdGetfdFlags, Signal, getpid, pidfd_getfd, pidfd_open,
};

fn grove(io: Io) -> Result<Grove> {
    let pager = PagerConfig {
        io,
        place: PagerPlace::Shared,
        ..PagerConfig::default()
    };
    Grove::new(Engine::Copy, pager, RootOptions::default())
}

/// How clone `number` failed.
fn failure(supervisor: &Supervisor, number: usize) -> Result<(u8, String)> {
    match &supervisor.clones()[number].ending {
        Some(Ending::Failed { code, message }) => Ok((*code, message.clone())),
        other => bail!("it ended with {other:?}"),
    }
}

/// Has each userfaultfd that this process holds, and shares with clones, wait when it is read.
fn make_blocking() -> Result<()> {
    let own = pidfd_open(getpid(), PidfdFlags::empty())?;
    let mut count = 0;
    for entry in fs::read_dir("/proc/self/fd")?.flatten() {
        let is_uffd = fs::read_link(entry.path())
            .is_ok_and(|target| target == Path::new("anon_inode:[userfaultfd]"));
        if !is_uffd {
            continue;
        }
        let number: ForeignRawFd = entry.file_name().to_string_lossy().parse()?;
        let shared = pidfd_getfd(&own, number, PidfdGetfdFlags::empty())?;
        fcntl_setfl(&shared, fcntl_getfl(&shared)? - OFlags::NONBLOCK)?;
        count += 1;
    }
    ensure!(count > 0, "no userfaultfd is held");
    Ok(())
}

#[test]
fn a_clone_that_spoils_its_userfaultfd_is_served_as_before() -> Result<()> {
    for io in [Io::Auto, Io::Pread] {
        let mut grove = grove(io)?;
        let mut steps = grove.plan.clone(0);
        let rest = steps.split_off(1);
        grove.start_with(steps);
        grove.all_answer()?;
        make_blocking()?;
        grove.ask(0, &rest)?;
        grove.start();
        grove.all_answer()?;
        grove.stop()?;
    }
    Ok(())
}

#[test]
fn the_end_of_a_clone_is_heard_though_others_hold_its_socket() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let holder = dir.path().join("holder");
    let program = dir.path().join("pando");
    // Its standard input is its control socket; what it starts keeps that open.
    fs::write(
        &program,
        format!(
            "#!/bin/sh\n\
             case $1 in clone-worker) ;; *) exec '{}' \"$@\" ;; esac\n\
             exec 3<&0\n\
             sleep 600 2>/dev/null &\n\
             echo $! >'{}'\n\
             exit 3\n",
            built_program("pando")?.display(),
            holder.display()
        ),
    )?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let grove = grove(Io::Auto)?;
    let mut supervisor = Supervisor::new(CloneOptions {
        program,
        ..usual_options(grove.template().context("no template")?)?
    })?;
    supervisor.start(&SerialPlan::Null, &[]);
    let deadline = Instant::now() + HANG;
    let mut ended = false;
    while !ended {
        ensure!(Instant::now() < deadline, "its end is not heard");
        ended = supervisor
            .wait(Duration::from_millis(20))?
            .contains(&Event::Ended(0));
    }
    let holder: u32 = fs::read_to_string(holder)?.trim().parse()?;
    let is_held = is_alive(holder);
    signal_pid(holder, Signal::KILL)?;
    assert!(is_held, "its socket was held all the time");
    assert_eq!(failure(&supervisor, 0)?.0, 3);
    supervisor.stop_all(Duration::from_secs(10))?;
    eventually("the holder has ended", || !is_alive(holder))
}
