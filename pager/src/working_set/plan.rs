#![forbid(unsafe_code)]
//! What to bring ahead of clones.
//!
//! | list | what | for |
//! |---|---|---|
//! | `private` | pages that clones write in at least half of the runs | each clone, before its first instruction |
//! | `whole` | ranges of 2 MiB of which at least a quarter is wanted | the root, every page of them, to be collapsed |
//! | `share` | the other pages with data that clones touch | the root, or, without one, each clone |
//! | `zero` | pages without data near any of these (`near.rs`) | each clone, as the kernel's zero page |
//!
//! No page is in two lists. A page that clones write must stay a hole in the root, or it could not
//! be installed in the clone; so a range that has one is never filled whole (each clone would
//! need page tables of its own there in any case). What does not fit the private budget and has
//! data is shared instead: a copy-on-write fault is dear, one that the pager answers is dearer.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::near::near;
use super::set::{KnownPage, WorkingSet};
use crate::image::{Index, PageKind};
use crate::page::{PageCount, PageIndex, PageRange};

/// Pages of a range that can become one huge page: 2 MiB.
pub const HUGE_RANGE_PAGES: u64 = 512;
/// A range is filled whole when one page of so many is wanted.
const WHOLE_SHARE: u64 = 4;

/// How much to plan for, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanRules {
    /// Most pages of `share` and `whole` together.
    pub share_pages: u64,
    /// Most pages of `private`.
    pub private_pages: u64,
    /// Most pages of `zero`: they take no memory but page tables, and little time.
    pub zero_pages: u64,
    /// Whether ranges are filled whole; a clone without a root has no use for it.
    pub whole_ranges: bool,
}

/// Pages that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedRun {
    /// Which backend, in the template's order.
    pub backend: u32,
    /// Which pages of it.
    pub pages: PageRange,
    /// The lowest rank of its pages: when clones come to need it.
    pub rank: u32,
}

/// What to bring, each list in order of rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Ranges of [`HUGE_RANGE_PAGES`], aligned to that in the image, zero pages included.
    pub whole: Vec<PlannedRun>,
    /// Runs of single pages that are shared.
    pub share: Vec<PlannedRun>,
    /// Runs of pages that each clone needs for itself.
    pub private: Vec<PlannedRun>,
    /// Runs of pages without data, of which each clone gets the kernel's zero page.
    pub zero: Vec<PlannedRun>,
    /// Pages that are worth it and have no room in the budgets.
    pub left_out: u64,
}

/// Backend and page.
pub(super) type Place = (u32, PageIndex);

/// Pages that were chosen, with their ranks.
pub(super) type Chosen = BTreeMap<Place, u32>;

impl Plan {
    /// The plan for a template with this `index`. Pages that the template does not have are left
    /// out quietly.
    pub fn new(set: &WorkingSet, index: &Index, rules: &PlanRules) -> Self {
        let (mut private, mut shared) = candidates(set, index);
        private.sort_unstable_by_key(|(place, known)| (known.rank, *place));
        let room = usize::try_from(rules.private_pages).unwrap_or(usize::MAX);
        let surplus = private.split_off(private.len().min(room));
        let has_data = |(backend, page): Place| kind(index, backend, page) == PageKind::Data;
        let (second_best, nowhere): (Vec<_>, Vec<_>) =
            surplus.into_iter().partition(|(place, _)| has_data(*place));
        shared.extend(second_best);
        shared.sort_unstable_by_key(|(place, known)| {
            (Reverse(set.is_mostly_touched(known)), known.rank, *place)
        });
        let room = usize::try_from(rules.share_pages).unwrap_or(usize::MAX);
        let too_many = shared.split_off(shared.len().min(room));
        let private = ranked(&private);
        let mut shared = ranked(&shared);
        let whole = if rules.whole_ranges {
            take_whole_ranges(&mut shared, &private, index, rules.share_pages)
        } else {
            Vec::new()
        };
        let filled: BTreeSet<_> = whole
            .iter()
            .map(|run| (run.backend, run.pages.start()))
            .collect();
        let is_filled = |(backend, page): Place| filled.contains(&(backend, range_start(page)));
        let left_out = too_many.iter().chain(&nowhere);
        let left_out = left_out.filter(|(place, _)| !is_filled(*place)).count() as u64;
        let mut plan = Self {
            share: runs(&shared),
            private: runs(&private),
            whole,
            zero: Vec::new(),
            left_out,
        };
        plan.zero = near(set, index, &plan, rules.zero_pages);
        plan
    }

    /// How many pages a list has.
    pub fn pages_of(list: &[PlannedRun]) -> u64 {
        list.iter().map(|run| run.pages.count().get()).sum()
    }
}

pub(super) fn kind(index: &Index, backend: u32, page: PageIndex) -> PageKind {
    let backend = usize::try_from(backend).unwrap_or(usize::MAX);
    let backend = index.backends().get(backend);
    backend.map_or(PageKind::Hole, |(_, index)| index.kind(page))
}

type Candidates = Vec<(Place, KnownPage)>;

/// The pages that clones mostly write, and the others that are worth sharing.
fn candidates(set: &WorkingSet, index: &Index) -> (Candidates, Candidates) {
    let (mut private, mut shared) = (Vec::new(), Vec::new());
    for (number, (backend, (_, image))) in (0..).zip(set.backends().iter().zip(index.backends())) {
        for known in backend.pages() {
            if known.page.get() >= image.pages().get() {
                continue;
            }
            let has_data = image.kind(known.page) == PageKind::Data;
            if set.is_mostly_written(known) {
                private.push(((number, known.page), *known));
            } else if has_data {
                shared.push(((number, known.page), *known));
            }
        }
    }
    (private, shared)
}

/// First page of the range that could be one huge page.
fn range_start(page: PageIndex) -> PageIndex {
    PageIndex::new(page.get() - page.get() % HUGE_RANGE_PAGES)
}

fn ranked(pages: &Candidates) -> Chosen {
    let ranks = pages.iter().map(|(place, known)| (*place, known.rank));
    ranks.collect()
}

/// Moves the pages of ranges that are worth filling whole out of `shared`, the first in rank
/// first, as long as all of it stays within `budget` pages.
fn take_whole_ranges(
    shared: &mut Chosen,
    private: &Chosen,
    index: &Index,
    budget: u64,
) -> Vec<PlannedRun> {
    let written: BTreeSet<Place> = private
        .keys()
        .map(|&(backend, page)| (backend, range_start(page)))
        .collect();
    // Wanted pages and lowest rank of each range.
    let mut ranges: BTreeMap<Place, (u64, u32)> = BTreeMap::new();
    for (&(backend, page), &rank) in &*shared {
        let range = ranges
            .entry((backend, range_start(page)))
            .or_insert((0, u32::MAX));
        *range = (range.0 + 1, range.1.min(rank));
    }
    let mut order: Vec<(u32, PlannedRun, u64)> = ranges
        .into_iter()
        .filter(|&(range, (wanted, _))| {
            wanted * WHOLE_SHARE >= HUGE_RANGE_PAGES && !written.contains(&range)
        })
        .filter_map(|((backend, start), (wanted, rank))| {
            let pages = PageRange::new(start, PageCount::new(HUGE_RANGE_PAGES));
            let (_, image) = index.backends().get(usize::try_from(backend).ok()?)?;
            let run = PlannedRun {
                backend,
                pages,
                rank,
            };
            (pages.end().get() <= image.pages().get()).then_some((rank, run, wanted))
        })
        .collect();
    order.sort_by_key(|(rank, run, _)| (*rank, run.backend, run.pages.start()));
    let mut room = budget.saturating_sub(shared.len() as u64);
    let mut whole = Vec::new();
    for (_, run, wanted) in order {
        let more = HUGE_RANGE_PAGES - wanted;
        if more > room {
            continue;
        }
        room -= more;
        for page in run.pages.iter() {
            shared.remove(&(run.backend, page));
        }
        whole.push(run);
    }
    whole
}

/// Neighbours joined to runs, the first in rank first.
pub(super) fn runs(pages: &Chosen) -> Vec<PlannedRun> {
    let mut runs: Vec<PlannedRun> = Vec::new();
    for (&(backend, page), &rank) in pages {
        match runs.last_mut() {
            Some(run) if run.backend == backend && run.pages.end() == page => {
                run.pages = PageRange::between(run.pages.start(), page.plus(1));
                run.rank = run.rank.min(rank);
            }
            _ => runs.push(PlannedRun {
                backend,
                pages: PageRange::single(page),
                rank,
            }),
        }
    }
    runs.sort_by_key(|run| (run.rank, run.backend, run.pages.start()));
    runs
}
