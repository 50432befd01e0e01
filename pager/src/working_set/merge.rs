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
//! so `w <= h <= W <= 8 * 65536 + 7`, and `h / W` is the share of runs that touch the page, the
//! last one counting an eighth. A page with `16 h < W` falls out: one that all runs touched does
//! after 21 runs without it, one that a single run touched after 6 once there were many, and
//! nothing does within the first 8 runs.

use std::collections::BTreeMap;

use super::set::{DECAY, HIT, KnownPage, MAX_PAGES, WorkingSet};
use super::types::Trace;
use crate::image::{Index, PageKind};
use crate::page::PageIndex;

/// Touches of a trace that are looked at; what comes later is not learned.
pub const MAX_TOUCHES: usize = 1 << 20;
/// A page that is touched in less than one of so many runs falls out.
const FORGET: u32 = 16;
/// Parts of a place that ranks are counted in.
const RANK_UNIT: u32 = 16;
/// How slowly a rank moves: by one part in so many of the way.
const RANK_INERTIA: i64 = 4;

/// What to do with pages of the template without data, zero or hole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroReads {
    /// Only those that are written count: reading one needs no I/O and no memory.
    #[default]
    Skip,
    /// They count as pages with data do. Each still costs a fault where it is not mapped ahead.
    Keep,
}

/// How runs are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeRules {
    /// Pages without data.
    pub zero_reads: ZeroReads,
    /// Most pages to keep, at most [`MAX_PAGES`]: beyond, those with the fewest hits go, and of
    /// equals those that come last.
    pub max_pages: usize,
}

impl Default for MergeRules {
    fn default() -> Self {
        Self {
            zero_reads: ZeroReads::default(),
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
    /// Touches of pages without data that were read only.
    pub zero_reads: u64,
    /// Touches that name no page of the template, or came behind [`MAX_TOUCHES`].
    pub ignored: u64,
}

/// A page in one run.
#[derive(Clone, Copy, Debug)]
struct Seen {
    place: u32,
    write: bool,
}

/// The pages of a run by backend, each with its place in the order.
type Run = Vec<BTreeMap<PageIndex, Seen>>;

impl WorkingSet {
    /// Learns from one run. A trace without any page that counts is no run and changes nothing.
    /// `index` is that of the template, which tells data from zero.
    pub fn merge(&mut self, trace: &Trace, index: &Index, rules: &MergeRules) -> Merged {
        let mut merged = Merged::default();
        let run = self.run_of(trace, index, rules, &mut merged);
        if run.iter().all(BTreeMap::is_empty) {
            return merged;
        }
        self.runs = self.runs.saturating_add(1);
        let is_cut = !trace.is_complete || trace.touches.len() > MAX_TOUCHES;
        self.cut_runs = self.cut_runs.saturating_add(u64::from(is_cut));
        self.weight = decayed(self.weight) + HIT;
        let weight = self.weight;
        for (backend, mut seen) in self.backends.iter_mut().zip(run) {
            for known in &mut backend.pages {
                known.age(seen.remove(&known.page), &mut merged);
            }
            merged.new += seen.len() as u64;
            backend.pages.extend(seen.into_iter().map(first_seen));
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

    fn run_of(&self, trace: &Trace, index: &Index, rules: &MergeRules, merged: &mut Merged) -> Run {
        let mut run: Run = vec![BTreeMap::new(); self.backends.len()];
        merged.ignored = trace.touches.len().saturating_sub(MAX_TOUCHES) as u64;
        let mut place = 0;
        for touch in trace.touches.iter().take(MAX_TOUCHES) {
            let backend = usize::try_from(touch.image).unwrap_or(usize::MAX);
            let (Some(seen), Some((_, kinds))) =
                (run.get_mut(backend), index.backends().get(backend))
            else {
                merged.ignored += 1;
                continue;
            };
            let pages = self.backends[backend].image_pages.min(kinds.pages());
            if touch.page.get() >= pages.get() {
                merged.ignored += 1;
                continue;
            }
            if let Some(seen) = seen.get_mut(&touch.page) {
                seen.write |= touch.write;
                continue;
            }
            let has_data = kinds.kind(touch.page) == PageKind::Data;
            if !has_data && !touch.write && rules.zero_reads == ZeroReads::Skip {
                merged.zero_reads += 1;
                continue;
            }
            let write = touch.write;
            seen.insert(touch.page, Seen { place, write });
            place += 1;
        }
        run
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

impl KnownPage {
    /// One more run, in which the page was seen or not.
    fn age(&mut self, seen: Option<Seen>, merged: &mut Merged) {
        self.hits = decayed(self.hits);
        self.written = decayed(self.written);
        let Some(Seen { place, write }) = seen else {
            return;
        };
        merged.known += 1;
        self.hits += HIT;
        if write {
            self.written += HIT;
        }
        let way = i64::from(place * RANK_UNIT) - i64::from(self.rank);
        let moved = i64::from(self.rank) + way / RANK_INERTIA;
        self.rank = u32::try_from(moved).unwrap_or(self.rank);
    }
}

fn first_seen((page, Seen { place, write }): (PageIndex, Seen)) -> KnownPage {
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
