#![forbid(unsafe_code)]
//! A working set that is installed before anything runs.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pando_pager::working_set::{Plan, PlannedRun};
use pando_pager::{PageCount, PageIndex, PageRange, Pager, PagerOptions, Verify};

use crate::fault::touch::Subject;

/// Installs all `pages` with data of a new memory ahead, in runs of `run_pages` with a gap after each
/// but the last, where there is more than one; the time of a page.
pub(super) fn install(
    subject: &Subject,
    pages: u64,
    run_pages: u64,
    verify: bool,
) -> Result<Duration> {
    let run_pages = run_pages.min(pages).max(1);
    let is_whole = run_pages == pages;
    // Every other run, so that no two of them are one.
    let step = if is_whole { run_pages } else { 2 * run_pages };
    let mut private = Vec::new();
    let mut start = 0;
    while start < pages {
        private.push(PlannedRun {
            backend: 0,
            pages: PageRange::new(
                PageIndex::new(start),
                PageCount::new(run_pages.min(pages - start)),
            ),
            rank: 0,
        });
        start += step;
    }
    let wanted: u64 = private.iter().map(|run| run.pages.count().get()).sum();
    let plan = Plan {
        private,
        ..Plan::default()
    };
    let mut pager = Pager::new(PagerOptions {
        template: "bench".to_owned(),
        verify: if verify { Verify::OnRead } else { Verify::Off },
        ..PagerOptions::default()
    })?;
    let memory = pager.attach(subject.image()?)?;
    let begun = Instant::now();
    let ahead = pager.install_ahead(&plan);
    let took = begun.elapsed();
    drop(memory);
    ensure!(
        ahead.pages == wanted && ahead.failed_pages == 0,
        "of {wanted} pages {} were installed ahead",
        ahead.pages
    );
    Ok(took / u32::try_from(wanted.max(1))?)
}
