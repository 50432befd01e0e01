#![forbid(unsafe_code)]
//! Clones teach their template in passing, and the next ones ask for little.

use std::num::NonZeroU32;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result};
use pando_tests::command::{Running, eventually, finish, make_template, names, pando};
use pando_tests::herd::{Herd, Pasture};
use pando_vmm::clone::Engine;
use pando_vmm::clone::learn::{Learn, Lessons};
use pando_vmm::clone::supervise::RootOptions;
use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::{Command, Pattern, Visit};
use pando_vmm::template::Template;
use pando_vmm::template::working_set::{Found, WorkingSetFile};
use rustix::process::Signal;

/// Where the template's guest wrote and clones read: 32 MiB.
const RANGE_PAGES: u64 = 8192;
/// Pages with data among them; the others, 63 %, are zeros.
const DATA_PAGES: u64 = RANGE_PAGES * 37 / 100;
/// Pages that each clone reads.
const TOUCHED_PAGES: u64 = 2048;
/// Those of them that all clones read; each reads the rest, a tenth, on its own.
const COMMON_PAGES: u64 = TOUCHED_PAGES * 90 / 100;
/// Clones of a generation.
const CLONES: u64 = 6;
/// What the template's pages are written with.
const SALT: u64 = 0x5eed;

fn random(count: u64, seed: u64) -> Visit {
    Visit {
        first_page: LAYOUT.first_data_page,
        range_pages: RANGE_PAGES,
        count,
        pattern: Pattern::Random { seed },
    }
}

fn every(clones: u32) -> Learn {
    NonZeroU32::new(clones).map_or(Learn::Off, Learn::Every)
}

fn pasture() -> Result<Pasture> {
    Pasture::new(&[Command::Write {
        visit: random(DATA_PAGES, 1),
        salt: SALT,
    }])
}

/// What clone `seed` does: reads nine tenths as all others, one tenth on its own, in random order;
/// writes some of what it read; and looks at all of it again.
fn life(seed: u64) -> Vec<Command> {
    let (common, own) = (
        random(COMMON_PAGES, 2),
        random(TOUCHED_PAGES - COMMON_PAGES, 1000 + seed),
    );
    let some = random(COMMON_PAGES / 8, 2);
    vec![
        Command::Touch(common),
        Command::Touch(own),
        Command::Write {
            visit: some,
            salt: seed,
        },
        Command::Verify {
            visit: some,
            salt: seed,
        },
        Command::Touch(common),
    ]
}

/// Runs as many clones as a generation has; their demand faults, and what they taught.
fn generation(
    pasture: &Pasture,
    number: u64,
    engine: Engine,
    learn: Learn,
    root_bytes: Option<u64>,
) -> Result<(u64, Lessons)> {
    let mut herd = Herd::new(pasture, |options| {
        options.engine = engine;
        options.pager.learn = learn;
        options.root = RootOptions {
            budget_bytes: root_bytes,
            ..RootOptions::default()
        };
    })?;
    for clone in 0..CLONES {
        herd.start(&life(number * CLONES + clone));
    }
    herd.grove.all_answer()?;
    herd.grove.stop()?;
    let faults = herd
        .grove
        .supervisor
        .pager_stats
        .counter("pando_pager_faults_total");
    Ok((faults, herd.grove.supervisor.finish_lessons()))
}

/// The measure of a working set: 95 % fewer demand faults, though a tenth of each clone's pages are
/// its own, and though the clones that teach do without some pages to see whether they are needed.
#[test]
fn the_second_generation_takes_a_twentieth_of_the_faults() -> Result<()> {
    for (engine, root_bytes) in [(Engine::Copy, None), (Engine::Root, Some(0))] {
        let pasture = pasture()?;
        let (first, lessons) = generation(&pasture, 0, engine, every(16), root_bytes)?;
        assert!(first > CLONES * TOUCHED_PAGES * 8 / 10, "{engine}: {first}");
        assert_eq!((lessons.learned, lessons.dropped), (2, 0), "{engine}");
        let (second, _) = generation(&pasture, 1, engine, every(16), root_bytes)?;
        println!("{engine}: {first} demand faults, then {second}");
        assert!(second * 20 <= first, "{engine}: {first}, then {second}");
    }
    Ok(())
}

/// Pages that are brought ahead raise no fault, and yet stay known, generation after generation.
#[test]
fn what_is_brought_ahead_is_not_forgotten_for_it() -> Result<()> {
    let pasture = pasture()?;
    generation(&pasture, 0, Engine::Copy, every(1), None)?;
    let common_data = |pasture: &Pasture| -> Result<usize> {
        let template = Template::open(pasture.path())?;
        let Found::Known(set) = WorkingSetFile::of(&template).read() else {
            anyhow::bail!("nothing is known");
        };
        let pages = set.backends()[0].pages().iter();
        Ok(pages.filter(|page| set.is_mostly_touched(page)).count())
    };
    let before = common_data(&pasture)?;
    for number in 1..5 {
        generation(&pasture, number, Engine::Copy, every(1), None)?;
    }
    let after = common_data(&pasture)?;
    // 30 clones later: had they been taken for untouched, all would be gone after 21.
    assert!(after * 100 >= before * 98, "{before}, then {after}");
    Ok(())
}

/// A root without holes has no pager whose faults could tell anything: what its clones wrote does.
#[test]
fn clones_of_a_full_root_teach_what_they_write() -> Result<()> {
    let pasture = pasture()?;
    let (faults, lessons) = generation(&pasture, 0, Engine::Root, every(2), None)?;
    assert_eq!(faults, 0);
    assert_eq!(lessons.learned, 4, "the first two, the third and the fifth");
    let template = Template::open(pasture.path())?;
    let Found::Known(set) = WorkingSetFile::of(&template).read() else {
        anyhow::bail!("nothing is known");
    };
    let pages = set.backends()[0].pages();
    let written = pages.iter().filter(|page| set.is_mostly_written(page));
    let written = u64::try_from(written.count())?;
    let wrote = COMMON_PAGES / 8;
    // A few more are the guest's own: its stack, its tables.
    assert!((wrote..wrote + 16).contains(&written), "{written}");
    assert!(pages.len() < usize::try_from(wrote + 16)?);
    Ok(())
}

#[test]
fn pando_clone_teaches_unless_told_otherwise() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let serial = dir.path().join("serial");
    let run = |learn: &[&str]| -> Result<serde_json::Value> {
        let mut command = pando(&["clone", "--json", "--serial"])?;
        let running = Running::start(command.arg(&serial).args(learn).arg(&template))?;
        let socket = serial.join("clone-0.sock");
        let mut console = None;
        eventually("the clone listens", || {
            console = std::os::unix::net::UnixStream::connect(&socket).ok();
            console.is_some()
        })?;
        let mut console = console.context("no console")?;
        std::io::Write::write_all(&mut console, b"w 800 40 40 0 0 7\n")?;
        let mut answer = [0; 4];
        std::io::Read::read_exact(&mut console, &mut answer)?;
        running.signal(Signal::TERM)?;
        running.finish()?.expect_code(0)?.json()
    };
    assert_eq!(run(&["--learn", "off"])?["lessons"]["learned"], 0);
    assert!(!template.join("working-set").exists());
    assert_eq!(run(&[])?["lessons"]["learned"], 1);
    let shown = finish(pando(&["template", "inspect", "--json"])?.arg(&template))?
        .expect_code(0)?
        .json()?;
    let set = &shown["working_set"];
    assert_eq!(set["runs"], 1, "{set:#}");
    assert!(set["written_pages"].as_u64() >= Some(64), "{set:#}");
    assert!(names(&template)?.contains(&"working-set".to_owned()));
    let refused = pando(&["clone", "--learn", "0"])?.arg(&template).output()?;
    assert_eq!(refused.status.code(), Some(2));
    Ok(())
}

/// Who may not write the template's directory runs clones all the same. Root may write anything, so
/// there the note is not to be had.
#[test]
fn a_template_that_cannot_be_written_is_a_note() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    std::fs::set_permissions(&template, std::fs::Permissions::from_mode(0o555))?;
    let mut command = pando(&["clone", "--count", "2"])?;
    let running = Running::start(command.arg(&template))?;
    eventually("two clones run", || running.children().len() >= 2)?;
    running.signal(Signal::TERM)?;
    let finished = running.finish()?.expect_code(0)?;
    if !rustix::process::geteuid().is_root() {
        finished.expect_error(&["note: clones teach nothing"])?;
    }
    std::fs::set_permissions(&template, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}
