#![forbid(unsafe_code)]
//! One pager process for all clones: right bytes, whoever dies, stops or hangs meanwhile.

use std::cell::{Cell, RefCell};
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pando_tests::command::{eventually, is_alive, signal_pid};
use pando_tests::grove::Grove;
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::{Ending, PagerConfig, PagerPlace};
use pando_vmm::clone::pool::PoolLimits;
use pando_vmm::clone::supervise::{Event, RootOptions, STOP_GRACE};
use rustix::process::Signal;
use rustix::thread::gettid;

/// How many clones fault at once while their pager dies; more by hand, as in
/// `PANDO_TEST_CLONES=100 cargo nextest run -p pando-tests --test shared_pager`.
fn crowd() -> usize {
    let asked = std::env::var("PANDO_TEST_CLONES").ok();
    asked.and_then(|clones| clones.parse().ok()).unwrap_or(8)
}

fn grove(engine: Engine, root: RootOptions) -> Result<Grove> {
    let pager = PagerConfig {
        place: PagerPlace::Shared,
        ..PagerConfig::default()
    };
    Grove::new(engine, pager, root)
}

/// A root that holds little: its forks need a pager.
fn small_root() -> RootOptions {
    RootOptions {
        budget_bytes: Some(5 << 20),
        ..RootOptions::default()
    }
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

fn pager_pid(grove: &Grove) -> Result<u32> {
    grove.supervisor.paging().pid().context("no pager process")
}

#[test]
fn clones_of_every_engine_are_served_by_one_process() -> Result<()> {
    for (engine, root) in [
        (Engine::Copy, RootOptions::default()),
        (Engine::Root, small_root()),
    ] {
        let mut grove = grove(engine, root)?;
        (0..10).for_each(|_| {
            grove.start();
        });
        grove.all_answer()?;
        assert_eq!(grove.supervisor.paging().clients(), 10);
        assert_eq!(grove.supervisor.paging().restarts, 0);
        for clone in grove.supervisor.clones() {
            assert!(
                !["shared", "none"].contains(&clone.io.as_str()),
                "{clone:?}"
            );
        }
        let pager = pager_pid(&grove)?;
        grove.supervisor.stop_all(STOP_GRACE)?;
        assert!(!is_alive(pager), "it ends with the last clone");
        let stats = &grove.supervisor.pager_stats;
        assert!(stats.installed_pages["cache"] > 0, "{stats:?}");
        grove.stop()?;
    }
    Ok(())
}

#[test]
fn a_root_that_holds_everything_needs_no_pager() -> Result<()> {
    let mut grove = grove(Engine::Root, RootOptions::default())?;
    (0..3).for_each(|_| {
        grove.start();
    });
    grove.all_answer()?;
    assert_eq!(grove.supervisor.paging().pid(), None);
    grove.stop()
}

#[test]
fn a_shell_is_served_before_it_is_a_clone_and_after() -> Result<()> {
    let mut grove = grove(
        Engine::Root,
        RootOptions {
            shells: PoolLimits {
                floor: 2,
                ceiling: 4,
            },
            ..small_root()
        },
    )?;
    grove.run(&[], |grove| grove.supervisor.forks().warm() == 2)?;
    assert_eq!(grove.supervisor.paging().clients(), 2);
    for _ in 0..4 {
        grove.start();
        grove.all_answer()?;
    }
    grove.stop()
}

/// Whether a process has ended, with all its threads, and waits for its parent to take its exit status:
/// then its sockets are closed.
fn is_zombie(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = stat.rsplit_once(") ").map(|(_, after)| after.to_owned());
    threads == 1 && after.is_some_and(|after| after.starts_with('Z'))
}

#[test]
fn a_shell_that_died_unseen_leaves_nothing_when_it_is_to_be_a_clone() -> Result<()> {
    let shells = PoolLimits {
        floor: 1,
        ceiling: 1,
    };
    let mut grove = grove(
        Engine::Root,
        RootOptions {
            shells,
            ..small_root()
        },
    )?;
    grove.run(&[], |grove| grove.supervisor.forks().warm() == 1)?;
    let known = [
        grove.supervisor.forks().root_pid(),
        Some(pager_pid(&grove)?),
    ];
    let children = fs::read_to_string(format!(
        "/proc/self/task/{}/children",
        gettid().as_raw_nonzero()
    ))?;
    let children = children.split_whitespace().map(str::parse);
    let shell = children
        .collect::<Result<Vec<u32>, _>>()?
        .into_iter()
        .find(|pid| !known.contains(&Some(*pid)))
        .context("no shell")?;
    signal_pid(shell, Signal::KILL)?;
    eventually("the shell is dead", || is_zombie(shell))?;
    // The supervisor has not looked since.
    grove.start();
    grove.all_answer()?;
    grove.run(&[], |grove| grove.supervisor.forks().warm() == 1)?;
    assert_eq!(grove.supervisor.paging().clients(), 2);
    grove.stop()
}

/// Kills the pager again and again while all clones fault, from their first page on.
fn kill_pager_while_they_fault(mut grove: Grove) -> Result<()> {
    const KILLS: usize = 6;
    // A machine so slow that none is ever ready in time must get the clones done all the same.
    const MOST_KILLS: usize = 30;
    let pause = Duration::from_millis(if crowd() > 20 { 300 } else { 40 });
    let (killed, last) = (Cell::new(0), Cell::new(Instant::now()));
    let error = RefCell::new(None);
    while killed.get() < KILLS {
        (0..crowd()).for_each(|_| {
            grove.start();
        });
        grove.run(&[], |grove| {
            if killed.get() < MOST_KILLS
                && last.get().elapsed() > pause
                && let Some(pager) = grove.supervisor.paging().pid()
            {
                if let Err(why) = signal_pid(pager, Signal::KILL) {
                    error.replace(Some(why));
                }
                last.set(Instant::now());
                killed.set(killed.get() + 1);
            }
            grove
                .open
                .values()
                .all(std::collections::VecDeque::is_empty)
        })?;
    }
    ensure!(error.borrow().is_none(), "{error:?}");
    grove.run(&[], |grove| {
        grove.supervisor.paging().restarts >= KILLS as u64
    })?;
    // Those of the first pager still have all of their memory.
    let first = grove.plan.clone(0);
    grove.ask(0, &first[5..6])?;
    grove.all_answer()?;
    grove.stop()
}

#[test]
fn clones_outlive_any_number_of_pagers() -> Result<()> {
    kill_pager_while_they_fault(grove(Engine::Copy, RootOptions::default())?)
}

#[test]
fn forks_outlive_any_number_of_pagers() -> Result<()> {
    kill_pager_while_they_fault(grove(Engine::Root, small_root())?)
}

#[test]
fn a_clone_killed_at_any_moment_is_forgotten_and_nobody_notices() -> Result<()> {
    let mut grove = grove(Engine::Copy, RootOptions::default())?;
    grove.start();
    grove.all_answer()?;
    let pager = pager_pid(&grove)?;
    let before = descriptors(pager);
    let mut victims = Vec::new();
    for round in 0..8_u64 {
        let victim = grove.start();
        victims.push(victim);
        let bystander = grove.start();
        let until = Instant::now() + Duration::from_millis(7 * round);
        grove.run(&victims, |_| Instant::now() >= until)?;
        if let Some(process) = grove.supervisor.clones()[victim].process.as_ref() {
            process.kill();
        }
        grove.run(&victims, |grove| {
            grove.open[&bystander].is_empty() && grove.supervisor.clones()[victim].process.is_none()
        })?;
        let process = grove.supervisor.clones()[bystander].process.as_ref();
        process.context("no process")?.ask_to_stop();
        victims.push(bystander);
        grove.run(&victims, |grove| {
            grove.supervisor.clones()[bystander].process.is_none()
        })?;
    }
    assert_eq!(pager_pid(&grove)?, pager, "it is the same process");
    assert_eq!(grove.supervisor.paging().clients(), 1);
    eventually("the pager has let go of all", || {
        descriptors(pager) == before
    })?;
    grove.supervisor.stop_all(STOP_GRACE)?;
    Ok(())
}

#[test]
fn a_pager_that_is_stopped_is_replaced() -> Result<()> {
    let mut grove = grove(Engine::Copy, RootOptions::default())?;
    grove.start();
    grove.all_answer()?;
    let stopped = pager_pid(&grove)?;
    signal_pid(stopped, Signal::STOP)?;
    grove.start();
    grove.all_answer()?;
    assert_ne!(pager_pid(&grove)?, stopped);
    assert!(!is_alive(stopped));
    assert_eq!(grove.supervisor.paging().restarts, 1);
    grove.stop()
}

#[test]
fn a_root_that_is_stopped_is_replaced() -> Result<()> {
    let mut grove = grove(Engine::Root, RootOptions::default())?;
    grove.start();
    grove.all_answer()?;
    let stopped = grove.supervisor.forks().root_pid().context("no root")?;
    signal_pid(stopped, Signal::STOP)?;
    grove.start();
    grove.all_answer()?;
    assert!(!is_alive(stopped));
    assert_eq!(grove.supervisor.forks().roots_started, 2);
    grove.stop()
}

#[test]
fn clones_end_by_name_when_every_pager_dies_at_once() -> Result<()> {
    let mut grove = grove(Engine::Copy, RootOptions::default())?;
    grove.start();
    grove.all_answer()?;
    let pager = pager_pid(&grove)?;
    let deadline = Instant::now() + Duration::from_secs(30);
    // Killed before it is ready, again and again.
    let mut ended = None;
    while ended.is_none() {
        ensure!(Instant::now() < deadline, "it is still restarted");
        if let Some(pager) = grove.supervisor.paging().pid() {
            let _ = signal_pid(pager, Signal::KILL);
        }
        for event in grove.supervisor.wait(Duration::from_millis(1))? {
            if let Event::Ended(number) = event {
                ended = Some(number);
            }
        }
    }
    assert!(!is_alive(pager));
    match &grove.supervisor.clones()[0].ending {
        Some(Ending::Failed { code, message }) => {
            assert_eq!(*code, 5);
            assert!(message.contains("the pager process ended"), "{message}");
        }
        other => anyhow::bail!("{other:?}"),
    }
    grove.supervisor.stop_all(STOP_GRACE)?;
    Ok(())
}
