#![forbid(unsafe_code)]
//! What a run teaches: hits with decay, an order that moves slowly, a bound.
//!
//! All in integers, so that the same runs give the same set everywhere. With `W` the weight of all
//! runs, and for a page `h` its hits, `w` its written hits and `r` its rank, each merged run makes
//!
//! ```text
//! W <- W - floor(W / 8) + 65536
//! h <- h - floor(h / 8) + 65536 if the run touched the page
//! w <- w - floor(w / 8) + 65536 if it wrote it
//! r <- r + (16 p - r) / 4, towards zero, if the run touched it as its p-th page; 16 p at first
//! ```
//!
//! A page that the clone had unasked, because it was brought ahead or inherited, tells only of
//! writes: one that was written counts as touched and keeps its rank. Of one that was not, nobody
//! knows whether it was touched, so its share of the runs stays what it was (`h <- floor(h W' / W)`
//! with `W'` the new weight), and only `w` decays; neither does where not even writes are known.
//! Such pages are put to the test by being held back now and then (`probe.rs`).
//!
//! so `w <= h <= W <= 8 * 65536 + 7`, and `h / W` is the share of runs that touch the page, the
//! last one counting an eighth. A page with `16 h < W` falls out: one that all runs touched does
//! after 21 runs without it, one that a single run touched after 6 once there were many, and
//! nothing does within the first 8 runs.

use super::run::{Run, RunOf, Told};
use super::set::{DECAY, HIT, KnownPage, MAX_PAGES, WorkingSet};
use super::types::Trace;
use crate::image::Index;
use crate::page::PageIndex;

/// Touches of a trace that are looked at; what comes later is not learned.
pub const MAX_TOUCHES: usize = 1 << 20;
/// A page that is touched in less than one of so many runs falls out.
const FORGET: u32 = 16;
/// Parts of a place that ranks are counted in.
const RANK_UNIT: u32 = 16;
/// How slowly a rank moves: by one part in so many of the way.
const RANK_INERTIA: i64 = 4;

/// How runs are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeRules {
    /// Most pages to keep, at most [`MAX_PAGES`]: beyond, those with the fewest hits go, and of
    /// equals those that come last.
    pub max_pages: usize,
}

impl Default for MergeRules {
    fn default() -> Self {
        Self {
            max_pages: MAX_PAGES,
        }
    }
}

/// What merging a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Pages of the run that were known.
    pub known: u64,
    /// Pages of the run that were not.
    pub new: u64,
    /// Pages that were touched too seldom of late.
    pub forgotten: u64,
    /// Pages beyond the bound.
    pub over_bound: u64,
    /// Known pages that were there unasked and not seen to be written: they keep their share.
    pub unseen: u64,
    /// Pages of the run without data that were read only, known or new.
    pub zero_reads: u64,
    /// Touches that name no page of the template, or came behind [`MAX_TOUCHES`].
    pub ignored: u64,
}

impl WorkingSet {
    /// Learns from one run. A trace without any page that counts is no run and changes nothing.
    /// `index` is that of the template, which tells data from zero.
    pub fn merge(&mut self, trace: &Trace, index: &Index, rules: &MergeRules) -> Merged {
        let mut merged = Merged::default();
        let run = Run::of(self, trace, index, &mut merged);
        if run.backends.iter().all(RunOf::is_empty) {
            return merged;
        }
        self.runs = self.runs.saturating_add(1);
        let is_cut = !trace.is_complete || trace.touches.len() > MAX_TOUCHES;
        self.cut_runs = self.cut_runs.saturating_add(u64::from(is_cut));
        let weights = Weights {
            before: self.weight,
            after: decayed(self.weight) + HIT,
        };
        let weight = weights.after;
        self.weight = weight;
        for (backend, mut told) in self.backends.iter_mut().zip(run.backends) {
            for known in &mut backend.pages {
                known.age(told.take(known.page), weights, &mut merged);
            }
            let new = told.rest();
            merged.new += new.len() as u64;
            let new = new.map(|(page, told)| first_seen(page, told, run.places));
            backend.pages.extend(new);
            backend.pages.sort_unstable_by_key(|known| known.page);
            let before = backend.pages.len();
            backend
                .pages
                .retain(|known| known.hits >= weight.div_ceil(FORGET));
            merged.forgotten += (before - backend.pages.len()) as u64;
        }
        merged.over_bound = self.bound(rules.max_pages.min(MAX_PAGES));
        merged
    }

    /// Keeps at most `max_pages` pages; how many went.
    fn bound(&mut self, max_pages: usize) -> u64 {
        let total: usize = self
            .backends
            .iter()
            .map(|backend| backend.pages.len())
            .sum();
        if total <= max_pages {
            return 0;
        }
        let mut order = Vec::with_capacity(total);
        for (backend, set) in self.backends.iter().enumerate() {
            let keys = set.pages.iter().map(|known| {
                let worth = std::cmp::Reverse(known.hits);
                (worth, known.rank, backend, known.page)
            });
            order.extend(keys);
        }
        order.sort_unstable();
        let first_out = order[max_pages];
        for (backend, set) in self.backends.iter_mut().enumerate() {
            set.pages.retain(|known| {
                (
                    std::cmp::Reverse(known.hits),
                    known.rank,
                    backend,
                    known.page,
                ) < first_out
            });
        }
        (total - max_pages) as u64
    }
}

/// The weight of all runs before and after one of them.
#[derive(Clone, Copy)]
struct Weights {
    before: u32,
    after: u32,
}

impl Weights {
    /// Hits that stay the same share of all runs.
    fn carried(self, hits: u32) -> u32 {
        let carried = u64::from(hits) * u64::from(self.after) / u64::from(self.before.max(1));
        u32::try_from(carried).map_or(self.after, |hits| hits.min(self.after))
    }
}

impl KnownPage {
    /// One more run, and what it says of the page.
    fn age(&mut self, told: Told, weights: Weights, merged: &mut Merged) {
        let (hits, written) = (decayed(self.hits), decayed(self.written));
        match told {
            Told::Absent => (self.hits, self.written) = (hits, written),
            Told::Unwritten | Told::Unknown => {
                merged.unseen += 1;
                self.hits = weights.carried(self.hits);
                self.written = if told == Told::Unknown {
                    weights.carried(self.written)
                } else {
                    written
                };
            }
            Told::Written | Told::Touched { .. } => {
                merged.known += 1;
                self.hits = hits + HIT;
                let is_written = !matches!(told, Told::Touched { write: false, .. });
                self.written = if is_written { written + HIT } else { written };
            }
        }
        if let Told::Touched { place, .. } = told {
            let way = i64::from(place * RANK_UNIT) - i64::from(self.rank);
            let moved = i64::from(self.rank) + way / RANK_INERTIA;
            self.rank = u32::try_from(moved).unwrap_or(self.rank);
        }
    }
}

/// A page that no run before had. One that was written unasked comes behind all that have a place.
fn first_seen(page: PageIndex, told: Told, places: u32) -> KnownPage {
    let (place, write) = match told {
        Told::Touched { place, write } => (place, write),
        _ => (places, true),
    };
    KnownPage {
        page,
        hits: HIT,
        written: if write { HIT } else { 0 },
        rank: place * RANK_UNIT,
    }
}

fn decayed(weight: u32) -> u32 {
    weight - weight / DECAY
}
