#![forbid(unsafe_code)]
//! What runs out: memory of one clone's cgroup, descriptors, processes. One fails, the others go on.

use std::fs;

use anyhow::{Context, Result, ensure};
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::Ending;
use pando_vmm::demo::plan::Step;
use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::{Pattern, Visit};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Found, Stage};
use crate::clone::workload::{DATA_PAGES, TEMPLATE_SALT};
use crate::footprint::Footprint;
use crate::grove::{Grove, echo, verify, write_and_verify};
use crate::limited::{Limit, Limited};

/// Clones, and rounds; full and small.
const MEMORY: [(u32, u32); 2] = [(20, 5), (4, 1)];
const BATCHES: [(u32, u32); 2] = [(40, 3), (12, 1)];
/// Memory that the victim may have: less than what it is asked to write.
const VICTIM_BYTES: u64 = 8 << 20;
/// Pages that each clone writes: 16 MiB.
const WRITTEN_PAGES: u64 = 4096;
/// Threads that a clone may have: a limit of processes counts them.
const THREADS: u64 = 5;

/// One clone meets the limit of memory of its cgroup.
pub(super) fn memory(stage: &Stage<'_>, engine: Engine) -> Result<Found> {
    let (clones, rounds) = stage.sizes(MEMORY[0], MEMORY[1]);
    let subject = stage.template()?;
    let mut grove = Grove::new(stage.options(&subject, engine))?;
    let before = Footprint::take()?;
    let mut random = stage.random();
    let mut failed = 0;
    for _ in 0..rounds {
        let limited = Limited::new(Limit::Memory(VICTIM_BYTES))?;
        let all: Vec<usize> = (0..clones).map(|_| grove.start(vec![echo(1)])).collect();
        grove.all_answer()?;
        let victim = all[random.place(all.len())];
        limited.admit(grove.process(victim).context("the victim has no process")?)?;
        grove.may_end(victim);
        for &number in &all {
            let visit = Visit {
                first_page: LAYOUT.first_data_page,
                range_pages: WRITTEN_PAGES,
                count: WRITTEN_PAGES,
                pattern: Pattern::Random {
                    seed: random.next(),
                },
            };
            grove.ask(number, write_and_verify(visit, random.next() | 1));
        }
        grove.all_answer()?;
        match grove.ending(victim) {
            Some(Ending::Failed { .. }) => failed += 1,
            other => {
                let other = format!("{other:?}");
                grove.complain(format!(
                    "clone {victim} was to write {WRITTEN_PAGES} pages in {VICTIM_BYTES} bytes and ended \
                     with {other}"
                ));
            }
        }
        for number in all {
            grove.stop(number)?;
        }
    }
    let done = [
        ("rounds", u64::from(rounds)),
        ("clones", u64::from(clones * rounds)),
        ("of them failed by their limit", failed),
    ];
    stage.finish(grove, &before, done.into())
}

/// Descriptors, then processes, run out in the middle of a batch.
pub(super) fn batches(stage: &Stage<'_>, engine: Engine) -> Result<Found> {
    let (clones, rounds) = stage.sizes(BATCHES[0], BATCHES[1]);
    let subject = stage.template()?;
    let mut grove = Grove::new(stage.options(&subject, engine))?;
    let before = Footprint::take()?;
    grove.prepare()?;
    let mut failed = [0, 0];
    for _ in 0..rounds {
        let open = fs::read_dir("/proc/self/fd")
            .context("cannot list descriptors")?
            .count() as u64;
        // Each clone takes three descriptors or a few more: for about half of them.
        let limits = getrlimit(Resource::Nofile);
        set_descriptors(open + u64::from(clones) * 3 / 2, limits.maximum)?;
        let ran_out = batch(&mut grove, clones);
        set_descriptors(limits.current.unwrap_or(u64::MAX), limits.maximum)?;
        failed[0] += ran_out.context("with few descriptors")?;

        // None of this process's children but a root is in it.
        let room = u64::from(clones) * THREADS / 2;
        let mut limited = Limited::new(Limit::Processes(room))?;
        limited.enter()?;
        // Forks are where their root is.
        let root = grove.supervisor.forks().root_pid();
        root.map_or(Ok(()), |root| limited.admit(root))?;
        let ran_out = batch(&mut grove, clones);
        let root = grove.supervisor.forks().root_pid();
        root.map_or(Ok(()), |root| limited.release(root))?;
        limited.leave()?;
        failed[1] += ran_out.context("with few processes")?;
        // And now there is room again.
        let more = grove.start(work());
        grove.all_answer()?;
        grove.stop(more)?;
    }
    ensure!(
        failed[0] > 0 && failed[1] > 0,
        "{} clones met the limit of descriptors, {} that of processes: give more --clones",
        failed[0],
        failed[1]
    );
    let done = [
        ("batches", u64::from(rounds) * 2),
        ("clones", u64::from(clones * rounds) * 2),
        ("of them failed for want of descriptors", failed[0]),
        ("for want of processes", failed[1]),
    ];
    stage.finish(grove, &before, done.into())
}

fn work() -> Vec<Step> {
    let half = DATA_PAGES / 2;
    let mut steps = vec![
        echo(1),
        verify(Visit::all(LAYOUT.first_data_page + half, 64), TEMPLATE_SALT),
    ];
    steps.extend(write_and_verify(Visit::all(LAYOUT.first_data_page, 64), 5));
    steps
}

/// Starts clones, some of which cannot be: they fail, and all others answer. Ends all; how many
/// failed.
fn batch(grove: &mut Grove, clones: u32) -> Result<u64> {
    let mut batch = Vec::new();
    for _ in 0..clones {
        let number = grove.start(work());
        grove.may_end(number);
        batch.push(number);
        // One after the other: of many that start at once, each might take what another lacks.
        grove.until("a clone has answered or failed", |grove| {
            !grove.owes(number)
        })?;
    }
    grove.all_answer()?;
    let mut failed = 0;
    for &number in &batch {
        match grove.ending(number).cloned() {
            None => (),
            Some(Ending::Failed { message, .. }) if !message.is_empty() => failed += 1,
            other => grove.complain(format!("clone {number} ended with {other:?}")),
        }
    }
    if failed == u64::from(clones) {
        grove.complain(format!("all {clones} clones of a batch failed, not some"));
    }
    for number in batch {
        grove.stop(number)?;
    }
    Ok(failed)
}

fn set_descriptors(current: u64, maximum: Option<u64>) -> Result<()> {
    let limit = Rlimit {
        current: maximum.map_or(Some(current), |maximum| Some(current.min(maximum))),
        maximum,
    };
    setrlimit(Resource::Nofile, limit).context("cannot set the limit of descriptors")
}
