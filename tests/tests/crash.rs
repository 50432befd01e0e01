#![forbid(unsafe_code)]
//! Processes killed at any point: nothing is left that a user would have to clean.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use pando_tests::command::{
    Running, eventually, finish, is_alive, make_template, names, pando, signal_pid,
};
use pando_tests::grove::usual_options;
use pando_tests::rig::built_program;
use pando_vmm::clone::control::Ending;
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::{CloneOptions, Event, STOP_GRACE, Supervisor};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

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
    assert_eq!(running.clones().len(), 4);
    let processes = running.children();
    assert_eq!(processes.len(), 5, "four clones and their pager");
    running.child.kill()?;
    running.child.wait()?;
    eventually("all are gone", || {
        processes.iter().all(|&pid| !is_alive(pid))
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
    let clones = running.clones();
    signal_pid(clones[1], Signal::KILL)?;
    eventually("the killed one is gone", || !is_alive(clones[1]))?;
    assert!(is_alive(clones[0]) && is_alive(clones[2]));
    running.signal(Signal::INT)?;
    running
        .finish()?
        .expect_code(1)?
        .expect_error(&["clone 1: it was killed by signal 9", "1 of 3 clones failed"])?;
    assert!(clones.iter().all(|&pid| !is_alive(pid)));
    assert_eq!(
        names(&dir.path().join("serial"))?,
        Vec::<String>::new(),
        "nor its socket"
    );
    Ok(())
}

#[test]
fn signals_end_all_clones_cleanly() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let serial = dir.path().join("serial");
        let running = start_clones(&template, &serial, 5)?;
        let clones = running.clones();
        running.signal(signal)?;
        running.finish()?.expect_code(0)?;
        assert!(clones.iter().all(|&pid| !is_alive(pid)));
        assert_eq!(names(&serial)?, Vec::<String>::new(), "sockets are removed");
    }
    Ok(())
}

#[test]
fn each_log_line_of_a_clone_has_its_number() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let serial = dir.path().join("serial");
    let running = Running::start(
        pando(&["-v", "clone", "--count", "2", "--serial"])?
            .arg(&serial)
            .arg(&template),
    )?;
    eventually("both clones listen", || {
        (0..2).all(|k| UnixStream::connect(serial.join(format!("clone-{k}.sock"))).is_ok())
    })?;
    running.signal(Signal::TERM)?;
    running.finish()?.expect_code(0)?.expect_error(&[
        "clone=0 ",
        "clone=1 ",
        "stopping the machine",
    ])?;
    Ok(())
}

fn is_raw(terminal: &OwnedFd) -> bool {
    tcgetattr(terminal).is_ok_and(|modes| !modes.local_modes.contains(LocalModes::ICANON))
}

fn modes(terminal: &OwnedFd) -> Result<String> {
    let Termios {
        input_modes,
        output_modes,
        control_modes,
        local_modes,
        special_codes,
        ..
    } = tcgetattr(terminal)?;
    Ok(format!(
        "{input_modes:?} {output_modes:?} {control_modes:?} {local_modes:?} {special_codes:?}"
    ))
}

#[test]
fn a_killed_clone_gives_the_terminal_back() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let person = openpt(flags)?;
    unlockpt(&person)?;
    let terminal = ioctl_tiocgptpeer(&person, flags)?;
    let before = modes(&terminal)?;
    for signal in [Signal::KILL, Signal::BUS, Signal::TERM] {
        let mut command = pando(&["clone"])?;
        command
            .arg(&template)
            .stdin(terminal.try_clone()?)
            .stdout(terminal.try_clone()?)
            .stderr(Stdio::piped());
        let mut running = Running {
            child: command.spawn()?,
        };
        eventually("the terminal is raw", || is_raw(&terminal))?;
        let clones = running.clones();
        assert_eq!(clones.len(), 1);
        signal_pid(clones[0], signal)?;
        // The handler of SIGBUS ends the process as for memory that cannot be read.
        let code = match signal {
            Signal::KILL => 1,
            Signal::BUS => 5,
            _ => 0,
        };
        assert_eq!(running.wait()?, Some(code), "{signal:?}");
        assert_eq!(modes(&terminal)?, before, "after {signal:?}");
    }
    Ok(())
}

#[test]
fn a_vm_that_ends_by_sigbus_gives_the_terminal_back() -> Result<()> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let person = openpt(flags)?;
    unlockpt(&person)?;
    let terminal = ioctl_tiocgptpeer(&person, flags)?;
    let before = modes(&terminal)?;
    let mut command = pando(&["run", "--kernel", "embedded", "--memory", "64M"])?;
    command
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(Stdio::piped());
    let mut running = Running {
        child: command.spawn()?,
    };
    eventually("the terminal is raw", || is_raw(&terminal))?;
    signal_pid(running.pid(), Signal::BUS)?;
    assert_eq!(running.wait()?, Some(5));
    assert_eq!(modes(&terminal)?, before);
    Ok(())
}

#[test]
fn a_clone_that_cannot_be_started_does_not_touch_the_others() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let program = dir.path().join("pando");
    let link = || std::os::unix::fs::symlink(built_program("pando").unwrap_or_default(), &program);
    link()?;
    let mut supervisor = Supervisor::new(CloneOptions {
        program: program.clone(),
        overcommit: false,
        ..usual_options(template)?
    })?;
    supervisor.start(&SerialPlan::Null, &[]);
    std::fs::remove_file(&program)?;
    let lost = supervisor.start(&SerialPlan::Null, &[]);
    link()?;
    supervisor.start(&SerialPlan::Null, &[]);
    let mut seen = Vec::new();
    for _ in 0..100 {
        seen.extend(supervisor.wait(Duration::from_millis(100))?);
        if seen.len() == 3 {
            break;
        }
    }
    assert_eq!(seen[0], Event::Ended(lost));
    assert!(
        seen.contains(&Event::Started(0)) && seen.contains(&Event::Started(2)),
        "{seen:?}"
    );
    assert_eq!(supervisor.live(), 2);
    supervisor.stop_all(STOP_GRACE)?;
    let endings: Vec<&Ending> = supervisor
        .clones()
        .iter()
        .filter_map(|clone| clone.ending.as_ref())
        .collect();
    assert_eq!(
        (endings[0], endings[2]),
        (&Ending::Stopped, &Ending::Stopped)
    );
    let Ending::Failed { code, message } = endings[lost] else {
        anyhow::bail!("it ended with {:?}", endings[lost]);
    };
    assert_eq!(*code, 1);
    message
        .contains("cannot start a clone's process")
        .then_some(())
        .with_context(|| message.clone())
}
