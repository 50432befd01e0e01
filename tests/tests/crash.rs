#![forbid(unsafe_code)]
//! Processes killed at any point: nothing is left that a user would have to clean.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use pando_tests::command::{
    Running, eventually, finish, is_alive, make_template, names, pando, signal_pid,
};
use rustix::process::Signal;

fn start_clones(template: &Path, serial: &Path, count: u32) -> Result<Running> {
    let running = Running::start(
        pando(&["clone"])?
            .arg(template)
            .args(["--count", &count.to_string(), "--serial"])
            .arg(serial),
    )?;
    // A socket that was left by a killed clone has a name and nobody behind it.
    eventually("all clones listen", || {
        (0..count).all(|k| UnixStream::connect(serial.join(format!("clone-{k}.sock"))).is_ok())
    })?;
    Ok(running)
}

#[test]
fn a_create_killed_anywhere_leaves_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for delay_ms in [0, 3, 10, 20, 40, 60, 80, 100, 130, 170, 220, 300] {
        let mut running = Running::start(
            pando(&["template", "create"])?
                .arg(dir.path().join("t"))
                .args([
                    "--kernel",
                    "embedded",
                    "--memory",
                    "256M",
                    "--ready",
                    "serial:pando guest ready",
                ]),
        )?;
        std::thread::sleep(Duration::from_millis(delay_ms));
        running.child.kill()?;
        running.child.wait()?;
        let left = names(dir.path())?;
        if left == ["t"] {
            // It was quicker than the kill: then it is a whole template.
            finish(pando(&["template", "verify"])?.arg(dir.path().join("t")))?.expect_code(0)?;
            std::fs::remove_dir_all(dir.path().join("t"))?;
        } else if left.len() == 1 && left[0].starts_with(".t.partial-") {
            // Killed in the instant of the links: no template, and the next create removes it.
            assert!(!dir.path().join(&left[0]).join("manifest.json").exists());
        } else {
            assert_eq!(left, Vec::<String>::new(), "killed after {delay_ms} ms");
        }
    }
    make_template(dir.path())?;
    assert_eq!(names(dir.path())?, ["t"]);
    Ok(())
}

#[test]
fn clones_end_with_their_supervisor() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let serial = dir.path().join("serial");
    let mut running = start_clones(&template, &serial, 4)?;
    let clones = running.children();
    assert_eq!(clones.len(), 4);
    running.child.kill()?;
    running.child.wait()?;
    eventually("all clones are gone", || {
        clones.iter().all(|&pid| !is_alive(pid))
    })?;
    // Sockets of killed clones need no cleaning: the next ones take their place.
    let running = start_clones(&template, &serial, 4)?;
    running.signal(Signal::TERM)?;
    running.finish()?.expect_code(0)?;
    assert_eq!(names(&serial)?, Vec::<String>::new());
    assert_eq!(names(dir.path())?, ["serial", "t"]);
    Ok(())
}

#[test]
fn a_killed_clone_does_not_touch_the_others() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let running = start_clones(&template, &dir.path().join("serial"), 3)?;
    let clones = running.children();
    signal_pid(clones[1], Signal::KILL)?;
    eventually("the killed one is gone", || !is_alive(clones[1]))?;
    assert!(is_alive(clones[0]) && is_alive(clones[2]));
    running.signal(Signal::INT)?;
    running
        .finish()?
        .expect_code(1)?
        .expect_error(&["clone 1: it was killed by signal 9", "1 of 3 clones failed"])?;
    assert!(clones.iter().all(|&pid| !is_alive(pid)));
    Ok(())
}

#[test]
fn signals_end_all_clones_cleanly() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    for signal in [Signal::TERM, Signal::INT] {
        let serial = dir.path().join("serial");
        let running = start_clones(&template, &serial, 5)?;
        let clones = running.children();
        running.signal(signal)?;
        running.finish()?.expect_code(0)?;
        assert!(clones.iter().all(|&pid| !is_alive(pid)));
        assert_eq!(names(&serial)?, Vec::<String>::new(), "sockets are removed");
    }
    Ok(())
}
