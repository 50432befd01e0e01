#![forbid(unsafe_code)]
//! Engine `root` with a small budget: what clones ask their pagers for is there for the clones to
//! come, wherever the pager runs.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pando_tests::grove::Grove;
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::{PagerConfig, PagerPlace};
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::RootOptions;
use pando_vmm::demo::plan::{Step, lines};
use pando_vmm::payload::protocol::{Command, Outcome, Pattern, Visit};

/// Room for the first three ranges: the payload's, and two of data.
const BUDGET_BYTES: u64 = 6 << 20;
const RANGE_PAGES: u64 = 512;
/// What all clones ask for: two ranges of data that do not fit.
const HOT_RANGES: u64 = 2;
const HOT_PAGE: u64 = 5 * RANGE_PAGES;
const CLONES: usize = 5;
/// Pagers report each second: when nothing came for longer, all has come.
const QUIET: Duration = Duration::from_millis(2500);

/// Looks at what clones ask for again and again, in an order of its own.
fn look(grove: &Grove, seed: u64) -> Result<Step> {
    let first = grove.plan.clone(0).into_iter().nth(1);
    let Some((Command::Verify { salt, .. }, _)) = first else {
        bail!("the plan does not begin with a look at the template: {first:?}");
    };
    let count = HOT_RANGES * RANGE_PAGES;
    let visit = Visit {
        first_page: HOT_PAGE,
        range_pages: count,
        count,
        pattern: Pattern::Random { seed },
    };
    let expected = Outcome::Verified {
        count,
        mismatches: 0,
        first_mismatch: None,
    };
    Ok((Command::Verify { visit, salt }, Some(expected)))
}

/// Clones that look, and what their pagers reported of holes until they said no more.
fn generation(grove: &mut Grove) -> Result<u64> {
    let before = grove.supervisor.forks().hole_faults_heard();
    for _ in 0..CLONES {
        let number = grove.supervisor.clones().len();
        let steps = [look(grove, number as u64)?];
        grove
            .supervisor
            .start(&SerialPlan::Supervisor, &lines(&steps));
        grove.open.insert(number, steps.into());
    }
    grove.all_answer()?;
    let last = Cell::new((before, Instant::now()));
    grove.run(&[], |grove| {
        let forks = grove.supervisor.forks();
        if let Some((filled, _)) = forks.filled {
            assert!(filled <= BUDGET_BYTES, "{filled}");
        }
        let heard = forks.hole_faults_heard();
        if heard != last.get().0 {
            last.set((heard, Instant::now()));
        }
        last.get().1.elapsed() > QUIET
    })?;
    Ok(grove.supervisor.forks().hole_faults_heard() - before)
}

/// Anonymous memory of the root, of which its guest memory is a part.
fn root_bytes(grove: &Grove) -> Result<u64> {
    let pid = grove.supervisor.forks().root_pid().context("no root")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("no RssAnon")?.parse::<u64>()? << 10)
}

fn later_clones_find_it(place: PagerPlace) -> Result<()> {
    let pager = PagerConfig {
        place,
        ..PagerConfig::default()
    };
    let root = RootOptions {
        budget_bytes: Some(BUDGET_BYTES),
        ..RootOptions::default()
    };
    let mut grove = Grove::new(Engine::Root, pager, root)?;
    grove.supervisor.prepare();
    grove.run(&[], |grove| grove.supervisor.forks().filled.is_some())?;
    let before = root_bytes(&grove)?;
    let first = generation(&mut grove)?;
    assert!(first >= CLONES as u64 * 2 * 64, "{first}");
    grove.run(&[], |grove| {
        grove.supervisor.forks().promoted_ranges() == HOT_RANGES
    })?;
    assert_eq!(grove.supervisor.forks().roots_started, 1);
    let after = root_bytes(&grove)?;
    assert!(after <= before + (1 << 20), "{before} {after}");

    let later = generation(&mut grove)?;
    ensure!(later * 20 < first, "{first} faults, then {later}");
    assert_eq!(grove.supervisor.forks().promoted_ranges(), HOT_RANGES);
    eprintln!("{place:?}: {first} faults, then {later}; root {before} then {after} bytes");
    // All that the template holds is right, in what was given up too, for old clones and new ones.
    let again = look(&grove, 99)?;
    grove.ask(0, &[again])?;
    (0..2).for_each(|_| {
        grove.start();
    });
    grove.all_answer()?;
    grove.stop()
}

#[test]
fn later_clones_find_what_earlier_ones_asked_the_pager_process_for() -> Result<()> {
    later_clones_find_it(PagerPlace::Shared)
}

#[test]
fn later_clones_find_what_earlier_ones_asked_their_own_pagers_for() -> Result<()> {
    later_clones_find_it(PagerPlace::Own)
}
