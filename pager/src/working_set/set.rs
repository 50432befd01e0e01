#![forbid(unsafe_code)]
//! A working set in memory.

use crate::image::Index;
use crate::page::{PageCount, PageIndex};

/// What one run adds to the hits of a page that it touched.
pub const HIT: u32 = 1 << 16;
/// Most pages of a working set, all backends together: 1 GiB of guest memory, a file of 5 MiB.
pub const MAX_PAGES: usize = 1 << 18;
/// What decay takes at each run: one part in so many.
pub(super) const DECAY: u32 = 8;
/// The weight of all runs never gets beyond this, nor do the hits of a page: there decay takes
/// what a run adds.
pub(super) const MAX_WEIGHT: u32 = HIT * DECAY + DECAY - 1;

/// A page that clones touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownPage {
    /// Which.
    pub page: PageIndex,
    /// In how many runs it was touched, in units of [`HIT`], decayed; never zero.
    pub hits: u32,
    /// In how many it was written; at most `hits`.
    pub written: u32,
    /// Its usual place in a run's order of touches, in sixteenths of a place.
    pub rank: u32,
}

/// What is known of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendSet {
    pub(super) id: String,
    pub(super) image_pages: PageCount,
    /// In ascending order, each page once.
    pub(super) pages: Vec<KnownPage>,
}

impl BackendSet {
    /// The backend's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The pages that clones touch, in ascending order.
    pub fn pages(&self) -> &[KnownPage] {
        &self.pages
    }
}

/// Which pages clones of one template touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    pub(super) template_mark: u64,
    pub(super) runs: u64,
    pub(super) cut_runs: u64,
    pub(super) weight: u32,
    pub(super) backends: Vec<BackendSet>,
}

impl WorkingSet {
    /// A working set of no runs for a template with this `index`. `template_mark` is any number
    /// that tells templates apart whose backends look alike.
    pub fn new(template_mark: u64, index: &Index) -> Self {
        let backends = index
            .backends()
            .iter()
            .map(|(id, index)| BackendSet {
                id: id.clone(),
                image_pages: index.pages(),
                pages: Vec::new(),
            })
            .collect();
        Self {
            template_mark,
            runs: 0,
            cut_runs: 0,
            weight: 0,
            backends,
        }
    }

    /// Whether it was recorded with this very template.
    pub fn is_of(&self, template_mark: u64, index: &Index) -> bool {
        let backends = index.backends();
        self.template_mark == template_mark
            && self.backends.len() == backends.len()
            && self
                .backends
                .iter()
                .zip(backends)
                .all(|(own, (id, index))| own.id == *id && own.image_pages == index.pages())
    }

    /// How many runs it was learned from.
    pub fn runs(&self) -> u64 {
        self.runs
    }

    /// How many of them touched more than was recorded.
    pub fn cut_runs(&self) -> u64 {
        self.cut_runs
    }

    /// What the hits of a page that every run touched come to.
    pub fn weight(&self) -> u32 {
        self.weight
    }

    /// The backends, in the template's order.
    pub fn backends(&self) -> &[BackendSet] {
        &self.backends
    }

    /// How many pages it has.
    pub fn page_count(&self) -> PageCount {
        let pages: usize = self
            .backends
            .iter()
            .map(|backend| backend.pages.len())
            .sum();
        PageCount::new(pages as u64)
    }

    /// In how many of a thousand runs a page with so many `hits` is touched, the later runs
    /// counting more.
    pub fn permille(&self, hits: u32) -> u32 {
        let share = u64::from(hits) * 1000 / u64::from(self.weight.max(1));
        u32::try_from(share.min(1000)).unwrap_or(1000)
    }

    /// Whether a page is written in at least half of the runs.
    pub fn is_mostly_written(&self, page: &KnownPage) -> bool {
        self.weight > 0 && 2 * u64::from(page.written) >= u64::from(self.weight)
    }

    /// Whether a page is touched in at least half of the runs.
    pub fn is_mostly_touched(&self, page: &KnownPage) -> bool {
        self.weight > 0 && 2 * u64::from(page.hits) >= u64::from(self.weight)
    }
}
