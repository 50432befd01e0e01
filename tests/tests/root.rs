#![forbid(unsafe_code)]
//! Engine `root`: forks that share what their root holds, and nothing that any of them writes.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use pando_tests::command::{
    Running, eventually, finish, is_alive, make_template, names, pando, signal_pid,
};
use pando_tests::grove::{Grove, MEMORY_BYTES};
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::PagerConfig;
use pando_vmm::clone::pool::PoolLimits;
use pando_vmm::clone::supervise::{RootOptions, STOP_GRACE};
use pando_vmm::demo::plan::Step;
use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::{Command, Outcome, Pattern, Visit};
use pando_vmm::root::protocol::RangeFaults;
use rustix::process::Signal;

fn root_grove(root: RootOptions) -> Result<Grove> {
    Grove::new(Engine::Root, PagerConfig::default(), root)
}

#[test]
fn clones_of_a_root_see_the_template_and_only_their_own_writes() -> Result<()> {
    let mut grove = root_grove(RootOptions::default())?;
    (0..24).for_each(|_| {
        grove.start();
    });
    grove.all_answer()?;
    let (filled, holes) = grove.supervisor.forks().filled.context("no root")?;
    assert!(filled >= 4096 * 4096, "{filled}");
    assert_eq!(holes, 0);
    assert_eq!(
        grove.supervisor.pager_stats.fault_total.len(),
        0,
        "no pager is needed"
    );
    grove.stop()
}

#[test]
fn what_does_not_fit_the_root_is_brought_by_the_clones_pagers() -> Result<()> {
    for budget_bytes in [0, 5 << 20] {
        let mut grove = root_grove(RootOptions {
            budget_bytes: Some(budget_bytes),
            ..RootOptions::default()
        })?;
        (0..6).for_each(|_| {
            grove.start();
        });
        grove.all_answer()?;
        let (filled, holes) = grove.supervisor.forks().filled.context("no root")?;
        assert!(filled <= budget_bytes && holes > 0, "{filled} {holes}");
        grove.stop()?;
    }
    Ok(())
}

/// Rounds of writes of whole quarters of memory, by clones of different age, beside clones that
/// come and go: none may ever see another's.
#[test]
fn no_byte_crosses_between_clones() -> Result<()> {
    const CLONES: usize = 12;
    const ROUNDS: u64 = 6;
    let quarter = MEMORY_BYTES / 4096 / 4;
    let mut grove = root_grove(RootOptions::default())?;
    (0..CLONES).for_each(|_| {
        grove.start();
    });
    grove.all_answer()?;
    for round in 0..ROUNDS {
        for number in 0..CLONES {
            let visit = Visit {
                first_page: LAYOUT.first_data_page,
                range_pages: quarter,
                count: quarter,
                pattern: Pattern::Random {
                    seed: round * 1000 + number as u64,
                },
            };
            let salt = (round << 32) + number as u64 + 1;
            let count = quarter;
            let steps: [Step; 2] = [
                (
                    Command::Write { visit, salt },
                    Some(Outcome::Written { count }),
                ),
                (
                    Command::Verify { visit, salt },
                    Some(Outcome::Verified {
                        count,
                        mismatches: 0,
                        first_mismatch: None,
                    }),
                ),
            ];
            grove.ask(number, &steps)?;
        }
        let passing = grove.start();
        grove.all_answer()?;
        // Once more, when all the others have written.
        for number in 0..CLONES {
            let visit = Visit::all(LAYOUT.first_data_page, quarter);
            let salt = (round << 32) + number as u64 + 1;
            let expected = Outcome::Verified {
                count: quarter,
                mismatches: 0,
                first_mismatch: None,
            };
            grove.ask(number, &[(Command::Verify { visit, salt }, Some(expected))])?;
        }
        grove.all_answer()?;
        let process = grove.supervisor.clones()[passing].process.as_ref();
        process.context("no process")?.kill();
        grove.run(&[passing], |grove| {
            grove.supervisor.clones()[passing].process.is_none()
        })?;
    }
    grove.supervisor.stop_all(STOP_GRACE)?;
    Ok(())
}

#[test]
fn clones_outlive_their_root_and_new_ones_come_from_another() -> Result<()> {
    let mut grove = root_grove(RootOptions::default())?;
    for round in 0..4 {
        (0..3).for_each(|_| {
            grove.start();
        });
        // In the first rounds while clones are being forked, later when they all run.
        if round > 1 {
            grove.all_answer()?;
        } else {
            grove.run(&[], |grove| grove.supervisor.forks().root_pid().is_some())?;
        }
        let root = grove.supervisor.forks().root_pid().context("no root")?;
        signal_pid(root, Signal::KILL)?;
        grove.run(&[], |grove| {
            grove.supervisor.forks().root_pid() != Some(root)
        })?;
        grove.start();
        grove.all_answer()?;
    }
    assert!(grove.supervisor.forks().roots_started >= 5);
    // Those of the first root still have all of their memory.
    let first = grove.plan.clone(0);
    grove.ask(0, &first[5..6])?;
    grove.all_answer()?;
    grove.stop()
}

#[test]
fn a_root_that_is_stopped_is_replaced_and_its_forks_are_asked_of_another() -> Result<()> {
    let mut grove = root_grove(RootOptions {
        fork_deadline: Some(Duration::from_secs(2)),
        ..RootOptions::default()
    })?;
    let first = grove.start();
    grove.all_answer()?;
    let root = grove.supervisor.forks().root_pid().context("no root")?;
    signal_pid(root, Signal::STOP)?;
    (0..3).for_each(|_| {
        grove.start();
    });
    grove.all_answer()?;
    assert_eq!(grove.supervisor.forks().roots_started, 2);
    assert!(!is_alive(root), "the stopped root is left");
    let steps = grove.plan.clone(first as u64);
    grove.ask(first, &steps[5..6])?;
    grove.all_answer()?;
    grove.stop()
}

/// What clones ask pagers for is filled between forks, and forks to come find it.
#[test]
fn a_root_fills_what_clones_ask_for_and_gives_up_what_none_is_known_to_need() -> Result<()> {
    let mut grove = root_grove(RootOptions {
        budget_bytes: Some(4 << 20),
        ..RootOptions::default()
    })?;
    grove.start();
    grove.all_answer()?;
    let before = grove.supervisor.forks().filled.context("no root")?;
    let faults: Vec<_> = (4..6)
        .map(|unit| RangeFaults {
            backend: 0,
            unit,
            faults: 500,
        })
        .collect();
    grove.supervisor.note_hole_faults(&faults);
    grove.run(&[], |grove| grove.supervisor.forks().promoted_ranges() == 2)?;
    let after = grove.supervisor.forks().filled.context("no root")?;
    assert_eq!(before, after, "as much is held, of other ranges");
    (0..3).for_each(|_| {
        grove.start();
    });
    grove.all_answer()?;
    // Nothing is filled twice.
    let answers = grove.supervisor.forks().hole_faults_answered();
    grove.supervisor.note_hole_faults(&faults);
    grove.run(&[], |grove| {
        grove.supervisor.forks().hole_faults_answered() > answers
    })?;
    assert_eq!(grove.supervisor.forks().promoted_ranges(), 2);
    assert_eq!(grove.supervisor.forks().filled, Some(after));
    assert_eq!(grove.supervisor.forks().roots_started, 1);
    grove.stop()
}

#[test]
fn a_shell_becomes_a_clone_and_the_pool_fills_again() -> Result<()> {
    let shells = PoolLimits {
        floor: 2,
        ceiling: 4,
    };
    let mut grove = root_grove(RootOptions {
        shells,
        ..RootOptions::default()
    })?;
    grove.run(&[], |grove| grove.supervisor.forks().warm() == 2)?;
    for _ in 0..5 {
        let number = grove.start();
        assert!(
            grove.supervisor.clones()[number].process.is_some(),
            "a shell was there"
        );
        grove.all_answer()?;
        let stages: Vec<_> = grove.supervisor.clones()[number]
            .stages
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(stages, ["identity", "resume"]);
        grove.run(&[], |grove| grove.supervisor.forks().warm() >= 2)?;
    }
    grove.stop()
}

fn start_clones(template: &Path, serial: &Path, count: u32) -> Result<Running> {
    let running = Running::start(
        pando(&["clone", "--engine", "root"])?
            .arg(template)
            .args(["--count", &count.to_string(), "--serial"])
            .arg(serial),
    )?;
    eventually("all clones listen", || {
        (0..count).all(|k| {
            let socket = serial.join(format!("clone-{k}.sock"));
            std::os::unix::net::UnixStream::connect(socket).is_ok()
        })
    })?;
    Ok(running)
}

#[test]
fn root_and_clones_end_with_their_supervisor() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let serial = dir.path().join("serial");
    let mut running = start_clones(&template, &serial, 4)?;
    let processes = running.children();
    assert_eq!(processes.len(), 5, "a root and four clones");
    running.child.kill()?;
    running.child.wait()?;
    eventually("all are gone", || {
        processes.iter().all(|&pid| !is_alive(pid))
    })?;
    let running = start_clones(&template, &serial, 4)?;
    let processes = running.children();
    running.signal(Signal::TERM)?;
    running.finish()?.expect_code(0)?;
    assert!(processes.iter().all(|&pid| !is_alive(pid)));
    assert_eq!(names(&serial)?, Vec::<String>::new());
    Ok(())
}

#[test]
fn clones_come_from_shells_that_were_made_ahead() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let mut command = pando(&["clone", "--engine", "root", "--warm", "2:3", "--count", "2"])?;
    command.args(["--json", "-v"]).arg(&template);
    let running = Running::start(&mut command)?;
    eventually("root, two clones and a pool", || {
        running.children().len() >= 5
    })?;
    running.signal(Signal::TERM)?;
    let done = running.finish()?.expect_code(0)?.json()?;
    for clone in 0..2 {
        let stages = done["clones"][clone]["stages_us"].as_object();
        let stages = stages.context("no stages")?;
        assert!(!stages.contains_key("fork"), "made on request: {stages:?}");
        assert!(stages.contains_key("identity"), "{stages:?}");
    }
    for (arguments, said) in [
        (["--engine", "copy", "--warm", "1"], "--engine root"),
        (["--engine", "root", "--warm", "3:2"], "above the ceiling"),
        (["--engine", "root", "--warm", "0"], "room for nothing"),
    ] {
        finish(pando(&["clone"])?.args(arguments).arg(&template))?
            .expect_code(2)?
            .expect_error(&[said])?;
    }
    Ok(())
}

#[test]
fn a_damaged_template_is_refused_by_the_root_and_told_once_for_each_clone() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let state = template.join("state.bin");
    let bytes = std::fs::read(&state)?;
    std::fs::remove_file(&state)?;
    std::fs::write(&state, bytes)?;
    finish(pando(&["clone", "--engine", "root"])?.arg(&template))?
        .expect_code(4)?
        .expect_error(&["state.bin"])?;
    Ok(())
}

#[test]
fn a_demo_with_engine_root_verifies_every_clone() -> Result<()> {
    let done = finish(&mut pando(&[
        "demo", "--engine", "root", "--clones", "30", "--memory", "64M", "--json",
    ])?)?
    .expect_code(0)?
    .json()?;
    assert_eq!(done["verified"], 30, "{done:#}");
    assert_eq!(done["template"]["unchanged"], true, "{done:#}");
    Ok(())
}
