#![forbid(unsafe_code)]
//! Pages without data near pages that clones touch. Pure.
//!
//! Clones agree on most pages and not on all. A page with data that one clone alone touches must be
//! read when it is asked for; a page of zeros costs no memory and, in bulk, a tenth of a
//! microsecond, where a fault costs some to a hundred. So zero pages that lie in one block with a
//! known page are mapped ahead, whether a clone was seen to touch them or not.

use std::collections::{BTreeMap, BTreeSet};

use super::plan::{Chosen, Place, kind, runs};
use super::set::WorkingSet;
use super::{Plan, PlannedRun};
use crate::image::{Index, PageKind};
use crate::page::{PageCount, PageIndex, PageRange};

/// Pages of a block: mapping all of them takes about as long as one or two faults.
const BLOCK_PAGES: u64 = 64;

/// Runs of at most `budget` zero pages of the blocks in which `set` knows a page, those first that
/// clones come to first; none that the lists of `plan` have.
pub(super) fn near(set: &WorkingSet, index: &Index, plan: &Plan, budget: u64) -> Vec<PlannedRun> {
    if budget == 0 {
        return Vec::new();
    }
    let mut blocks: BTreeMap<Place, u32> = BTreeMap::new();
    for (number, backend) in (0..).zip(set.backends()) {
        for known in backend.pages() {
            let start = known.page.get() - known.page.get() % BLOCK_PAGES;
            let rank = blocks
                .entry((number, PageIndex::new(start)))
                .or_insert(u32::MAX);
            *rank = (*rank).min(known.rank);
        }
    }
    let mut order: Vec<(u32, Place)> = blocks
        .into_iter()
        .map(|(place, rank)| (rank, place))
        .collect();
    order.sort_unstable();
    let taken = taken(plan);
    let mut chosen = Chosen::new();
    for (rank, (backend, start)) in order {
        let room = budget - chosen.len() as u64;
        if room == 0 {
            break;
        }
        let zeros = block(index, backend, start)
            .iter()
            .filter(|&page| kind(index, backend, page) != PageKind::Data)
            .filter(|&page| !taken.contains(&(backend, page)));
        let zeros = zeros.take(usize::try_from(room).unwrap_or(usize::MAX));
        chosen.extend(zeros.map(|page| ((backend, page), rank)));
    }
    runs(&chosen)
}

/// The pages of a block that its image has.
fn block(index: &Index, backend: u32, start: PageIndex) -> PageRange {
    let number = usize::try_from(backend).unwrap_or(usize::MAX);
    let image = index.backends().get(number);
    let pages = image.map_or(0, |(_, image)| image.pages().get());
    let count = BLOCK_PAGES.min(pages.saturating_sub(start.get()));
    PageRange::new(start, PageCount::new(count))
}

fn taken(plan: &Plan) -> BTreeSet<Place> {
    let lists = [&plan.whole, &plan.share, &plan.private];
    let runs = lists.into_iter().flatten();
    runs.flat_map(|run| run.pages.iter().map(|page| (run.backend, page)))
        .collect()
}
