#![forbid(unsafe_code)]
//! Idle clones give clean memory back to the host, and nobody can tell.

use std::num::NonZeroU32;

use anyhow::{Context, Result};
use pando_tests::command::{Running, eventually, finish, make_template, pando};
use pando_tests::grove::Grove;
use pando_tests::herd::{Herd, Pasture};
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::PagerPlace;
use pando_vmm::clone::learn::Learn;
use pando_vmm::clone::supervise::{CloneOptions, RootOptions};
use pando_vmm::host::require_write_tracking;
use pando_vmm::observe::memory::ram::{Accuracy, RamMemory};
use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::{Command, Pattern, Visit};
use rustix::process::Signal;

/// Pages with data of the template: 16 MiB.
const DATA_PAGES: u64 = 4096;
/// Pages of them that each clone writes.
const OWN_PAGES: u64 = 512;
/// Private clean memory that a clone may keep.
const BUDGET: u64 = 1 << 20;
const PAGE: u64 = 4096;
const CLONES: usize = 3;
const SALT: u64 = 0x5eed;

fn all() -> Visit {
    Visit::all(LAYOUT.first_data_page, DATA_PAGES)
}

fn some(seed: u64) -> Visit {
    Visit {
        count: OWN_PAGES,
        pattern: Pattern::Random { seed },
        ..all()
    }
}

fn pasture() -> Result<Pasture> {
    Pasture::new(&[Command::Write {
        visit: all(),
        salt: SALT,
    }])
}

fn giving(options: &mut CloneOptions, policy: &str) -> Result<()> {
    options.measure_memory = true;
    options.pager.give_back = Some(policy.parse().map_err(anyhow::Error::msg)?);
    Ok(())
}

fn ram(grove: &Grove, clone: usize) -> Option<RamMemory> {
    let memory = grove.supervisor.usage().of(clone)?;
    // In what a root filled nothing tracks writes: private pages there are those that were written.
    assert_ne!(memory.accuracy, Accuracy::Sums);
    Some(memory.ram)
}

/// Where nothing can be told from what was written the feature is off, which is said by name.
fn is_off() -> bool {
    match require_write_tracking() {
        Ok(()) => false,
        Err(why) => {
            assert!(why.contains("Linux 6.7"), "{why}");
            true
        }
    }
}

/// Each clone reads everything, writes some, and idles; then its clean memory is within the budget,
/// what it wrote is there, and everything it reads afterwards is right. Twice.
fn idle_clones_shrink(engine: Engine, place: PagerPlace, root_bytes: Option<u64>) -> Result<()> {
    if is_off() {
        return Ok(());
    }
    let pasture = pasture()?;
    let mut policy = Ok(());
    let mut herd = Herd::new(&pasture, |options| {
        options.engine = engine;
        options.pager.place = place;
        options.root = RootOptions {
            budget_bytes: root_bytes,
            ..RootOptions::default()
        };
        policy = giving(options, "200ms:1M");
    })?;
    policy?;
    let life = |clone: usize| {
        let salt = clone as u64 + 1;
        [
            // Of those that it wrote the model knows that they differ.
            Command::Verify {
                visit: all(),
                salt: SALT,
            },
            Command::Write {
                visit: some(salt),
                salt,
            },
        ]
    };
    for clone in 0..CLONES {
        herd.start(&life(clone));
    }
    herd.grove.all_answer()?;
    for round in 1..=2 {
        herd.grove.run(&[], |grove| {
            (0..CLONES).all(|clone| {
                let given = grove.supervisor.clones()[clone].given_back.bytes;
                let clean = ram(grove, clone).map(|ram| ram.private_clean_bytes);
                given > round * (8 << 20) && clean.is_some_and(|clean| clean <= BUDGET)
            })
        })?;
        for clone in 0..CLONES {
            let ram = ram(&herd.grove, clone).context("not measured")?;
            let wrote = OWN_PAGES * PAGE;
            // The guest's own stack and the like come on top; and pages that a root made huge since are the
            // fork's alone, untracked: they count as dirty.
            let most = wrote + 64 * PAGE + root_bytes.unwrap_or(0);
            assert!(
                (wrote..most).contains(&ram.private_dirty_bytes),
                "{engine} {place:?}: {ram:?}"
            );
            let salt = clone as u64 + 1;
            let verify = Command::Verify {
                visit: some(salt),
                salt,
            };
            // Every byte of some.
            let checksum = Command::Checksum {
                first_page: LAYOUT.first_data_page,
                pages: 128,
            };
            herd.ask(clone, &[verify, life(clone)[0].clone(), checksum])?;
        }
        herd.grove.all_answer()?;
    }
    let all = herd.grove.supervisor.given_back();
    assert!(all.pauses >= 2 * CLONES as u64, "{all:?}");
    herd.grove.stop()
}

#[test]
fn idle_clones_with_pagers_of_their_own_shrink_to_the_budget() -> Result<()> {
    idle_clones_shrink(Engine::Copy, PagerPlace::Own, None)
}

#[test]
fn idle_clones_of_one_pager_process_shrink_to_the_budget() -> Result<()> {
    idle_clones_shrink(Engine::Copy, PagerPlace::Shared, None)
}

#[test]
fn idle_forks_shrink_by_what_their_root_did_not_give() -> Result<()> {
    idle_clones_shrink(Engine::Root, PagerPlace::Own, Some(2 << 20))
}

#[test]
fn idle_forks_of_one_pager_process_shrink_by_what_their_root_did_not_give() -> Result<()> {
    idle_clones_shrink(Engine::Root, PagerPlace::Shared, Some(2 << 20))
}

/// What was brought ahead because clones mostly write it, and was not written, is clean too: with
/// engine copy, and of forks, which got copies of their own of what their root holds.
#[test]
fn what_the_working_set_brought_in_vain_goes_back() -> Result<()> {
    if is_off() {
        return Ok(());
    }
    for engine in [Engine::Copy, Engine::Root] {
        let pasture = pasture()?;
        let mut teachers = Herd::new(&pasture, |options| {
            options.engine = engine;
            options.pager.learn = Learn::Every(NonZeroU32::MIN);
        })?;
        let write = Command::Write {
            visit: some(1),
            salt: 1,
        };
        (0..2).for_each(|_| _ = teachers.start(std::slice::from_ref(&write)));
        teachers.grove.all_answer()?;
        teachers.grove.stop()?;
        assert_eq!(teachers.grove.supervisor.finish_lessons().learned, 2);
        let mut policy = Ok(());
        let mut herd = Herd::new(&pasture, |options| {
            options.engine = engine;
            policy = giving(options, "200ms");
        })?;
        policy?;
        let clone = herd.start(&[Command::Echo(vec![1])]);
        herd.grove.all_answer()?;
        herd.grove.run(&[], |grove| {
            let given = grove.supervisor.clones()[clone].given_back.bytes;
            given >= OWN_PAGES * PAGE
                && ram(grove, clone).is_some_and(|ram| ram.private_clean_bytes == 0)
        })?;
        let ram = ram(&herd.grove, clone).context("not measured")?;
        // Pages that a root made huge since are the fork's alone, untracked: they count as dirty.
        let is_told = engine == Engine::Copy;
        assert!(
            !is_told || ram.private_dirty_bytes < 64 * PAGE,
            "{engine}: {ram:?}"
        );
        herd.ask(
            clone,
            &[
                Command::Verify {
                    visit: all(),
                    salt: SALT,
                },
                write.clone(),
                Command::Verify {
                    visit: some(1),
                    salt: 1,
                },
            ],
        )?;
        herd.grove.all_answer()?;
        herd.grove.stop()?;
    }
    Ok(())
}

#[test]
fn the_command_says_what_went_and_the_doctor_whether_it_can() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let mut command = pando(&["clone", "--json", "--give-back", "100ms"])?;
    let running = Running::start(command.arg(&template))?;
    eventually("a clone runs", || running.children().len() == 1)?;
    running.signal(Signal::TERM)?;
    let document = running.finish()?.expect_code(0)?.json()?;
    assert!(document["given_back"]["bytes"].is_u64(), "{document:#}");
    assert!(document["clones"][0]["given_back"]["pauses"].is_u64());
    let findings = finish(&mut pando(&["doctor", "--json"])?)?.stdout;
    assert!(findings.contains("\"give-back\""), "{findings}");
    finish(pando(&["clone", "--give-back", "soon"])?.arg(&template))?
        .expect_code(2)?
        .expect_error(&["'soon' is no age"])?;
    let mut command = pando(&["clone", "--engine", "kernel", "--count", "2"])?;
    let command = command.args(["--give-back", "1s"]).arg(&template);
    let running = Running::start(command)?;
    eventually("two clones run", || running.children().len() >= 2)?;
    running.signal(Signal::TERM)?;
    let finished = running.finish()?.expect_code(0)?;
    finished.expect_error(&["note: give-back is off: engine kernel has no pager"])?;
    Ok(())
}
