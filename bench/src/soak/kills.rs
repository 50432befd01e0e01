#![forbid(unsafe_code)]
//! Processes that are killed at random moments.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::PagerPlace;
use pando_vmm::demo::plan::Step;
use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::{Pattern, Visit};
use rustix::process::{Pid, Signal, kill_process};

use super::{Found, Stage};
use crate::clone::workload::{DATA_PAGES, TEMPLATE_SALT};
use crate::footprint::{Footprint, descendants, exists};
use crate::grove::{Grove, echo, verify, write_and_verify};
use crate::seed::Random;

/// Clones that nobody kills, and kills; full and small.
const CLONES: [(u32, u32); 2] = [(8, 500), (3, 24)];
/// Clones that start around each kill of a root, and kills.
const ROOTS: [(u32, u32); 2] = [(8, 7), (3, 3)];
/// Clones that fault while the pager is killed, and batches of them.
const PAGERS: [(u32, u32); 2] = [(100, 3), (8, 1)];
/// Pagers are killed no more often: on a machine that is busy with other things a new one may not come
/// to serve anybody before it is killed too, and the clones would never be done. A supervisor allows
/// 300 in a minute.
const MOST_PAGER_KILLS: u64 = 200;
/// A victim lives at most this long.
const LIFE_US: u64 = 60_000;
/// A root lives at most so long before it is killed.
const ROOT_LIFE_US: u64 = 120_000;
/// A supervisor makes so many roots in a minute at most; it gives up on a template whose root dies
/// more often.
const ROOTS_A_MINUTE: u32 = 7;
/// Clones of earlier rounds that are kept.
const KEPT: usize = 40;
/// How the pager process calls itself.
const PAGER_NAME: &str = "pager-worker";

/// Kills clones; the others do their work all the time.
pub(super) fn clones(stage: &Stage<'_>, engine: Engine) -> Result<Found> {
    let (clones, kills) = stage.sizes(CLONES[0], CLONES[1]);
    let subject = stage.template()?;
    let sockets = tempfile::tempdir().context("cannot make a folder for sockets")?;
    let mut grove = Grove::new(stage.options(&subject, engine))?;
    let before = Footprint::take()?;
    let mut random = stage.random();
    let others: Vec<usize> = (0..clones)
        .map(|_| grove.start(work(&mut random)))
        .collect();
    grove.all_answer()?;
    let mut before_running = 0;
    for kill in 0..kills {
        // They are never idle.
        for &other in &others {
            if !grove.owes(other) {
                grove.ask(other, work(&mut random));
            }
        }
        let socket = sockets.path().join(format!("victim-{kill}.sock"));
        let victim = if random.below(3) == 0 {
            grove.start_on_socket(socket.clone())
        } else {
            grove.start(work(&mut random))
        };
        // A third of them at once, a third at some time, a third when their guest runs.
        let when = random.below(3);
        if when == 2 {
            grove.until("the victim runs", |grove| {
                grove.supervisor.clones()[victim].running.is_some() || grove.has_ended(victim)
            })?;
        }
        if when > 0 {
            grove.pass(Duration::from_micros(random.below(LIFE_US)))?;
        }
        let is_running = grove.supervisor.clones()[victim].running.is_some();
        before_running += u64::from(!is_running);
        let cgroup = grove.supervisor.clones()[victim].process.as_ref();
        let cgroup = cgroup.and_then(|process| process.cgroup().map(std::path::Path::to_owned));
        grove.kill(victim)?;
        let pid = grove.supervisor.clones()[victim].pid;
        if pid != 0 && exists(pid) && descendants(std::process::id())?.contains_key(&pid) {
            grove.complain(format!(
                "process {pid} of the killed clone {victim} is left"
            ));
        }
        if socket.exists() {
            grove.complain(format!("{} of a killed clone is left", socket.display()));
        }
        if let Some(cgroup) = cgroup.filter(|cgroup| cgroup.exists()) {
            grove.complain(format!("{} of a killed clone is left", cgroup.display()));
        }
    }
    grove.all_answer()?;
    let done = [
        ("kills", u64::from(kills)),
        ("of them before the guest ran", before_running),
        ("others", u64::from(clones)),
    ];
    stage.finish(grove, &before, done.into())
}

/// Kills the root while clones are being forked.
pub(super) fn root(stage: &Stage<'_>, engine: Engine) -> Result<Found> {
    ensure!(
        engine == Engine::Root,
        "engine {engine} has no root: give --engines root"
    );
    let (clones, kills) = stage.sizes(ROOTS[0], ROOTS[1]);
    let subject = stage.template()?;
    let mut grove = Grove::new(stage.options(&subject, engine))?;
    let before = Footprint::take()?;
    let mut random = stage.random();
    let mut oldest = 0;
    let begun = Instant::now();
    for kill in 0..kills {
        // More would be taken for a template that can have no root.
        let minutes = kill / ROOTS_A_MINUTE;
        let due = Duration::from_secs(u64::from(minutes) * 61);
        grove.pass(due.saturating_sub(begun.elapsed()))?;
        for _ in 0..clones {
            grove.start(work(&mut random));
        }
        grove.until("there is a root", |grove| {
            grove.supervisor.forks().root_pid().is_some()
        })?;
        grove.pass(Duration::from_micros(random.below(ROOT_LIFE_US)))?;
        let root = grove.supervisor.forks().root_pid().context("no root")?;
        kill_hard(root)?;
        grove.until("the root is missed", |grove| {
            grove.supervisor.forks().root_pid() != Some(root)
        })?;
        // Of the next root; and those of the last go on.
        grove.start(work(&mut random));
        for number in grove.live() {
            if !grove.owes(number) && grove.process(number).is_some() {
                grove.ask(number, work(&mut random));
            }
        }
        grove.all_answer()?;
        while grove.live().len() > KEPT {
            grove.stop(oldest)?;
            oldest += 1;
        }
    }
    let done = [
        ("kills", u64::from(kills)),
        ("roots", grove.supervisor.forks().roots_started),
        ("clones", grove.supervisor.clones().len() as u64),
    ];
    stage.finish(grove, &before, done.into())
}

/// Kills the pager process again and again while clones fault.
pub(super) fn pager(stage: &Stage<'_>, engine: Engine) -> Result<Found> {
    let (clones, batches) = stage.sizes(PAGERS[0], PAGERS[1]);
    let every = Duration::from_millis(u64::from(stage.args.every_ms.get()));
    let subject = stage.template()?;
    let mut options = stage.options(&subject, engine);
    // All pages come by fault: nothing ahead, nothing from a root.
    options.pager.working_set = false;
    options.root.budget_bytes = Some(0);
    options.pager.place = PagerPlace::Shared;
    let mut grove = Grove::new(options)?;
    let before = Footprint::take()?;
    let mut random = stage.random();
    let mut kills = 0;
    for _ in 0..batches {
        let batch: Vec<usize> = (0..clones)
            .map(|_| grove.start(faulting(&mut random)))
            .collect();
        let mut next = Instant::now() + every;
        while grove.owing() > 0 {
            grove.look(Duration::from_millis(10))?;
            if kills < MOST_PAGER_KILLS && Instant::now() >= next {
                next = Instant::now() + every;
                for pid in pagers()? {
                    kills += u64::from(kill_hard(pid).is_ok());
                }
            }
        }
        for number in batch {
            grove.stop(number)?;
        }
    }
    ensure!(
        kills > 0,
        "no process named {PAGER_NAME} was there to be killed: all clones were done before, or each has \
         a pager of its own"
    );
    let done = [("kills", kills), ("clones", u64::from(clones * batches))];
    stage.finish(grove, &before, done.into())
}

/// Pager processes among the children of this process.
fn pagers() -> Result<Vec<u32>> {
    let is_pager = |pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(PAGER_NAME))
    };
    let all = descendants(std::process::id())?;
    Ok(all.into_keys().filter(is_pager).collect())
}

fn kill_hard(pid: u32) -> Result<()> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .context("no process")?;
    kill_process(pid, Signal::KILL).context("cannot kill a process")
}

/// Some work that touches pages of the template and writes others.
fn work(random: &mut Random) -> Vec<Step> {
    let half = DATA_PAGES / 2;
    let visit = |first_page, count, random: &mut Random| Visit {
        first_page,
        range_pages: half,
        count,
        pattern: Pattern::Random {
            seed: random.next(),
        },
    };
    // Written in the lower half, read in the upper: what is read is the template's for ever.
    let read = visit(LAYOUT.first_data_page + half, 64, random);
    let own = visit(LAYOUT.first_data_page, 256, random);
    let salt = random.next() >> 1 | 1;
    let mut steps = vec![echo(random.next()), verify(read, TEMPLATE_SALT)];
    steps.extend(write_and_verify(own, salt));
    steps
}

/// Verifies every page of the template in random order, then writes all of it.
fn faulting(random: &mut Random) -> Vec<Step> {
    let all = Visit {
        first_page: LAYOUT.first_data_page,
        range_pages: DATA_PAGES,
        count: DATA_PAGES,
        pattern: Pattern::Random {
            seed: random.next(),
        },
    };
    let mut steps = vec![echo(1), verify(all, TEMPLATE_SALT)];
    steps.extend(write_and_verify(all, random.next() >> 1 | 1));
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use pando_vmm::payload::model::DataPages;

    #[test]
    fn work_can_be_done_again_and_again() {
        let mut guest = DataPages::new((64 << 20) / 4096);
        guest.obey(&crate::clone::workload::fill());
        let mut random = Random::new(4);
        for _ in 0..50 {
            for (command, expected) in work(&mut random) {
                assert_eq!(guest.obey(&command), expected, "{command:?}");
            }
        }
        let mut fresh = DataPages::new((64 << 20) / 4096);
        fresh.obey(&crate::clone::workload::fill());
        for (command, expected) in faulting(&mut random) {
            assert_eq!(fresh.obey(&command), expected, "{command:?}");
        }
    }
}
