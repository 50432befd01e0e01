#![forbid(unsafe_code)]
//! A working set for people and programs: how much, read or written, in which order, and where.

use pando_pager::image::Index;
use pando_pager::working_set::{
    BackendSet, KnownPage, Merged, Plan, PlanRules, PlannedRun, Trace, WorkingSet,
};
use pando_pager::{PAGE_BYTES, PageIndex};
use serde::Serialize;

use super::picture::{self, Panel};
use super::working_set::Found;

/// What a template has for a working set.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum WorkingSetSummary {
    /// None yet.
    Absent,
    /// A file that is of no use.
    Ignored {
        /// Why.
        reason: String,
    },
    /// One.
    Known(Facts),
}

/// A working set in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Facts {
    /// Runs that it was learned from.
    pub runs: u64,
    /// Runs that touched more than was recorded.
    pub cut_runs: u64,
    /// Pages that clones touch.
    pub pages: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// Pages that every run touched.
    pub steady_pages: u64,
    /// Pages that are written in at least half of the runs.
    pub written_pages: u64,
    /// Pages without data.
    pub zero_pages: u64,
    /// What would be brought ahead, had it all the room it wants.
    pub plan: PlanFacts,
    /// All pages, neighbours of one kind joined, in the order in which clones come to them.
    pub touched: Vec<TouchedRun>,
}

/// What would be brought ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PlanFacts {
    /// Ranges of 2 MiB that a root is given whole.
    pub whole_ranges: u64,
    /// Single pages that a root is given.
    pub shared_pages: u64,
    /// Pages that each clone is given for itself.
    pub private_pages: u64,
}

/// What one run did to a working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RunFacts {
    /// Pages that it touched.
    pub touched: u64,
    /// Pages that it wrote, whether at first or later.
    pub written: u64,
    /// Pages without data that it only read, which are not kept.
    pub zero_reads: u64,
    /// Pages that were known from runs before.
    pub known: u64,
    /// Pages that were not.
    pub new: u64,
    /// Pages that fell out: touched too seldom of late, or beyond the bound.
    pub forgotten: u64,
    /// Whether all of its touches were recorded.
    pub is_complete: bool,
}

impl RunFacts {
    /// What the run with this trace did.
    pub fn of(trace: &Trace, merged: &Merged) -> Self {
        Self {
            touched: trace.touches.len() as u64,
            written: trace.touches.iter().filter(|touch| touch.write).count() as u64,
            zero_reads: merged.zero_reads,
            known: merged.known,
            new: merged.new,
            forgotten: merged.forgotten + merged.over_bound,
            is_complete: trace.is_complete,
        }
    }
}

/// Neighbouring pages, all mostly written or all mostly read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TouchedRun {
    /// Which backend, in the template's order.
    pub backend: usize,
    /// First page.
    pub first_page: u64,
    /// How many.
    pub pages: u64,
    /// When clones come to it: a place in the order of their touches.
    pub place: u32,
    /// In how many of a thousand runs its most frequent page is touched.
    pub permille: u32,
    /// Whether they are written in at least half of the runs.
    pub is_written: bool,
}

impl WorkingSetSummary {
    /// Sums up what was found in a template with this `index`.
    pub fn of(found: &Found, index: &Index) -> Self {
        match found {
            Found::Absent => Self::Absent,
            Found::Ignored { reason } => Self::Ignored {
                reason: reason.clone(),
            },
            Found::Known(set) => Self::Known(Facts::of(set, index)),
        }
    }
}

impl Facts {
    /// Bytes of a page.
    pub fn bytes_per_page(&self) -> u64 {
        PAGE_BYTES
    }

    /// Counts.
    pub fn of(set: &WorkingSet, index: &Index) -> Self {
        let count = |counts: &dyn Fn(usize, &KnownPage) -> bool| {
            let backends = set.backends().iter().enumerate();
            let pages = backends.flat_map(|(at, set)| set.pages().iter().map(move |p| (at, p)));
            pages.filter(|(at, page)| counts(*at, page)).count() as u64
        };
        let plan = Plan::new(
            set,
            index,
            &PlanRules {
                share_pages: u64::MAX,
                private_pages: u64::MAX,
                zero_pages: 0,
                whole_ranges: true,
            },
        );
        let pages_of = |runs: &[PlannedRun]| Plan::pages_of(runs);
        Self {
            runs: set.runs(),
            cut_runs: set.cut_runs(),
            pages: set.page_count().get(),
            bytes: set.page_count().bytes(),
            steady_pages: count(&|_, page| page.hits == set.weight()),
            written_pages: count(&|_, page| set.is_mostly_written(page)),
            zero_pages: count(&|at, page| {
                let kind = index.backends().get(at).map(|(_, i)| i.kind(page.page));
                kind != Some(pando_pager::image::PageKind::Data)
            }),
            plan: PlanFacts {
                whole_ranges: plan.whole.len() as u64,
                shared_pages: pages_of(&plan.share),
                private_pages: pages_of(&plan.private),
            },
            touched: touched(set),
        }
    }
}

fn touched(set: &WorkingSet) -> Vec<TouchedRun> {
    let mut runs: Vec<TouchedRun> = Vec::new();
    for (backend, pages) in set.backends().iter().enumerate() {
        for page in pages.pages() {
            let next = TouchedRun {
                backend,
                first_page: page.page.get(),
                pages: 1,
                place: place(page),
                permille: set.permille(page.hits),
                is_written: set.is_mostly_written(page),
            };
            match runs.last_mut() {
                Some(run)
                    if run.backend == backend
                        && run.is_written == next.is_written
                        && run.first_page + run.pages == next.first_page =>
                {
                    run.pages += 1;
                    run.place = run.place.min(next.place);
                    run.permille = run.permille.max(next.permille);
                }
                _ => runs.push(next),
            }
        }
    }
    runs.sort_by_key(|run| (run.place, run.backend, run.first_page));
    runs
}

/// A rank in whole places.
fn place(page: &KnownPage) -> u32 {
    page.rank / 16
}

/// A part of an image: how many of its pages clones touch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Cell {
    pages: u64,
    touched: u64,
    written: u64,
    /// The tenth of the order in which clones come to it.
    tenth: Option<u32>,
}

/// The working set of one backend drawn over its image, in two maps: where clones touch it, and
/// when they come to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TouchMap {
    columns: usize,
    cell_pages: u64,
    cells: Vec<Cell>,
}

impl TouchMap {
    /// Maps a backend of `image_pages` pages to at most `columns` times `rows` cells.
    pub fn new(
        set: &WorkingSet,
        backend: &BackendSet,
        image_pages: u64,
        columns: usize,
        rows: usize,
    ) -> Self {
        let most = (columns * rows).max(1) as u64;
        let cell_pages = image_pages.div_ceil(most).max(1);
        let mut cells: Vec<Cell> = (0..image_pages.div_ceil(cell_pages))
            .map(|cell| Cell {
                pages: cell_pages.min(image_pages - cell * cell_pages),
                ..Cell::default()
            })
            .collect();
        let last = set.backends().iter().flat_map(|set| set.pages());
        let last = last.map(place).max().unwrap_or(0);
        for page in backend.pages() {
            let Some(cell) = cell_of(page.page, cell_pages).and_then(|at| cells.get_mut(at)) else {
                continue;
            };
            cell.touched += 1;
            cell.written += u64::from(set.is_mostly_written(page));
            let tenth = u64::from(place(page)) * 10 / (u64::from(last) + 1);
            let tenth = u32::try_from(tenth).unwrap_or(9);
            cell.tenth = Some(cell.tenth.map_or(tenth, |earlier| earlier.min(tenth)));
        }
        Self {
            columns: columns.max(1),
            cell_pages,
            cells,
        }
    }

    /// Bytes of a cell.
    pub fn cell_bytes(&self) -> u64 {
        self.cell_pages * PAGE_BYTES
    }

    /// Where clones touch the image, as lines of text.
    pub fn where_text(&self) -> String {
        let glyphs: Vec<char> = self.cells.iter().map(|cell| cell.where_glyph()).collect();
        picture::text(&glyphs, self.columns, self.cell_bytes())
    }

    /// When clones come to each part, as lines of text.
    pub fn when_text(&self) -> String {
        let glyph = |cell: &Cell| {
            let digit = cell.tenth.and_then(|tenth| char::from_digit(tenth, 10));
            digit.unwrap_or('·')
        };
        let glyphs: Vec<char> = self.cells.iter().map(glyph).collect();
        picture::text(&glyphs, self.columns, self.cell_bytes())
    }

    /// Both maps, to be drawn; `title` is that of the backend.
    pub fn panels(&self, title: &str) -> [Panel; 2] {
        let panel = |what: &str, legend, colour: fn(&Cell) -> &'static str| Panel {
            title: format!("{title}: {what}"),
            legend,
            columns: self.columns,
            cell_bytes: self.cell_bytes(),
            colours: self.cells.iter().map(colour).collect(),
        };
        let places = vec![
            ("mostly read", READ[3]),
            ("some", READ[0]),
            ("mostly written", WRITTEN[3]),
            ("some", WRITTEN[0]),
            ("not touched", NONE),
        ];
        let order = vec![
            ("first", ORDER[0]),
            ("half way", ORDER[5]),
            ("last", ORDER[9]),
            ("not touched", NONE),
        ];
        [
            panel("what clones touch", places, Cell::where_colour),
            panel("when they come to it", order, Cell::when_colour),
        ]
    }
}

/// Colours by the share of pages that are touched, of cells that are mostly read.
const READ: [&str; 4] = ["#bcd7ee", "#86b6dd", "#4f93c8", "#2368a0"];
/// The same of cells that are mostly written.
const WRITTEN: [&str; 4] = ["#f6cfae", "#eda969", "#dd8233", "#b45a10"];
/// From first to last.
const ORDER: [&str; 10] = [
    "#2c0f4a", "#471767", "#642283", "#82309a", "#a03fa9", "#bc50ad", "#d362a8", "#e4779c",
    "#ef8f8f", "#f5ab86",
];
const NONE: &str = "#eceff1";

impl Cell {
    /// How much of it is touched: nothing, or a quarter, from 0.
    fn quarter(&self) -> Option<usize> {
        let quarters = (self.touched * 4).div_ceil(self.pages.max(1)).min(4);
        usize::try_from(quarters).ok()?.checked_sub(1)
    }

    fn is_written(&self) -> bool {
        self.written * 2 >= self.touched
    }

    fn where_glyph(&self) -> char {
        match self.quarter() {
            None => '·',
            Some(quarter) if self.is_written() => ['w', 'w', 'W', 'W'][quarter.min(3)],
            Some(quarter) => ['░', '▒', '▓', '█'][quarter.min(3)],
        }
    }

    fn where_colour(&self) -> &'static str {
        match self.quarter() {
            None => NONE,
            Some(quarter) if self.is_written() => WRITTEN[quarter.min(3)],
            Some(quarter) => READ[quarter.min(3)],
        }
    }

    fn when_colour(&self) -> &'static str {
        let tenth = self.tenth.and_then(|tenth| usize::try_from(tenth).ok());
        tenth.map_or(NONE, |tenth| ORDER[tenth.min(9)])
    }
}

fn cell_of(page: PageIndex, cell_pages: u64) -> Option<usize> {
    usize::try_from(page.get() / cell_pages).ok()
}

#[cfg(test)]
mod tests;
