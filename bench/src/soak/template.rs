#![forbid(unsafe_code)]
//! A template that is changed while it is served: every clone answers rightly or ends by its own error.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::Ending;
use pando_vmm::demo::plan::Step;
use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::{Pattern, Visit};
use pando_vmm::report::exit;

use super::{Found, Stage};
use crate::clone::workload::{DATA_PAGES, TEMPLATE_SALT};
use crate::footprint::Footprint;
use crate::grove::{Grove, echo, verify};
use crate::seed::Random;

/// Clones that are served, and how often each change is made; full and small.
const FULL: (u32, u32) = (20, 5);
const SMALL: (u32, u32) = (4, 1);
/// The template is changed at most so long after its clones were asked.
const DELAY_US: u64 = 100_000;
/// Bytes that a damaged file has where it had others.
const DAMAGE: [u8; 4096] = [0xee; 4096];

/// What is done to the RAM file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Half of it is cut off.
    Truncate,
    /// Another file takes its name.
    Replace,
    /// Its pages get other bytes.
    Overwrite,
}

/// Runs the scenario.
pub(super) fn run(stage: &Stage<'_>, engine: Engine) -> Result<Found> {
    let (clones, rounds) = stage.sizes(FULL, SMALL);
    let mut random = stage.random();
    let mut all = Found::default();
    for _ in 0..rounds {
        for change in [Change::Truncate, Change::Replace, Change::Overwrite] {
            let found = one(stage, engine, change, clones, &mut random)
                .with_context(|| format!("{change:?}"))?;
            all.wrong += found.wrong;
            let named = found
                .complaints
                .into_iter()
                .map(|text| format!("{change:?}: {text}"));
            all.complaints.extend(named);
            for (name, count) in found.done {
                *all.done.entry(name).or_default() += count;
            }
            all.left = found.left;
        }
    }
    Ok(all)
}

fn one(
    stage: &Stage<'_>,
    engine: Engine,
    change: Change,
    clones: u32,
    random: &mut Random,
) -> Result<Found> {
    let subject = stage.template()?;
    let mut options = stage.options(&subject, engine);
    options.pager.working_set = false;
    options.root.budget_bytes = Some(0);
    let mut grove = Grove::new(options)?;
    let before = Footprint::take()?;
    let served: Vec<usize> = (0..clones).map(|_| grove.start(vec![echo(1)])).collect();
    grove.all_answer()?;
    for &number in &served {
        if change != Change::Replace {
            grove.may_end(number);
        }
        grove.ask(number, everything(random));
    }
    grove.pass(Duration::from_micros(random.below(DELAY_US)))?;
    for path in subject.ram() {
        make(change, path)?;
    }
    // Nothing hangs: each has answered, or has ended.
    grove.all_answer()?;
    let mut ended = 0;
    for &number in &served {
        match grove.ending(number).cloned() {
            None => (),
            Some(Ending::Failed { code, .. }) if code == exit::MEMORY => ended += 1,
            other => grove.complain(format!("clone {number} ended with {other:?}")),
        }
    }
    // A changed template is refused by name. A root may have what it needs.
    let late = grove.start(vec![echo(1)]);
    grove.may_end(late);
    grove.all_answer()?;
    if engine == Engine::Copy {
        grove.until("the late clone has ended", |grove| {
            grove.has_ended(late) || !grove.owes(late)
        })?;
        match grove.ending(late).cloned() {
            Some(Ending::Failed { code, .. }) if code == exit::TEMPLATE => (),
            other => grove.complain(format!(
                "a clone of a template after {change:?} was not refused: {other:?}"
            )),
        }
    }
    let done = [
        ("changes", 1),
        ("clones", u64::from(clones)),
        ("of them ended by their own error", ended),
    ];
    stage.finish(grove, &before, done.into())
}

/// Every page of the template, in random order.
fn everything(random: &mut Random) -> Vec<Step> {
    let visit = Visit {
        first_page: LAYOUT.first_data_page,
        range_pages: DATA_PAGES,
        count: DATA_PAGES,
        pattern: Pattern::Random {
            seed: random.next(),
        },
    };
    vec![verify(visit, TEMPLATE_SALT)]
}

fn make(change: Change, path: &Path) -> Result<()> {
    let act = || -> Result<()> {
        if change == Change::Replace {
            let other = path.with_extension("other");
            let bytes = fs::metadata(path)?.len();
            fs::File::create(&other)?.set_len(bytes)?;
            return Ok(fs::rename(&other, path)?);
        }
        let mut permissions = fs::metadata(path)?.permissions();
        permissions.set_mode(0o600);
        fs::set_permissions(path, permissions)?;
        let file = OpenOptions::new().write(true).open(path)?;
        if change == Change::Truncate {
            return Ok(file.set_len(fs::metadata(path)?.len() / 8)?);
        }
        // Every fourth page: each chunk has one.
        for page in (0..LAYOUT.first_data_page + DATA_PAGES).step_by(4) {
            file.write_all_at(&DAMAGE, page * 4096)?;
        }
        Ok(())
    };
    act().with_context(|| format!("cannot {change:?} {}", path.display()))
}
