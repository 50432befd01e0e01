#![forbid(unsafe_code)]
//! Memory of an idle clone that equals the template goes back to the host, and comes back by fault.
//!
//! ```text
//! idle, or the host is short of memory      (policy.rs)
//!   scan: how much is clean?                 the guest runs on
//!   pause vCPUs
//!     scan: present, not written, not zero   PAGEMAP_SCAN, and what a root did not give
//!     tell the pager                         from now on it brings these pages again
//!     MADV_DONTNEED
//!   resume
//! ```
//! Pages that the clone wrote are known by asynchronous write protection: the pager installs pages
//! write-protected, and the kernel lifts that by itself at the first write. Between the second scan and
//! MADV_DONTNEED nothing that could write may run; that is what the pause is for.

pub mod keeper;
pub mod policy;
pub mod running;

use std::io;
use std::ops::Range;

use pando_pager::{PageCount, PageIndex, PageRange};
use thiserror::Error;

use crate::machine::MachineError;
use crate::observe::memory::ram::MemoryPlace;
use crate::sys::pagemap::{Categories, PAGE_BYTES, PageRun, Pagemap, Query};

/// Most pages that are given back in one pause: it bounds how long the guest stands still.
const PAGES_PER_PAUSE: u64 = 2048;
/// How much memory is looked at in one pause, for the same reason.
const SPAN_PER_PAUSE: u64 = 128 << 20;
/// Runs of pages taken from the kernel at once; a pause gives back no more of them.
const RUNS: usize = 512;

/// Why a clone cannot give memory back.
#[derive(Debug, Error)]
pub enum GiveBackError {
    /// The kernel cannot say what was written.
    #[error("give-back is off: {lack}")]
    Off {
        /// What is missing.
        lack: &'static str,
    },
    /// The pages could not be looked at.
    #[error("cannot look for pages to give back")]
    Scan(#[source] io::Error),
    /// The machine could not be paused or resumed.
    #[error("cannot pause the machine to give pages back")]
    Machine(#[from] MachineError),
    /// The pager cannot bring them again.
    #[error("the pager does not answer, so no page is given back")]
    Pager,
    /// The kernel kept a page.
    #[error("cannot give {pages} of backend {backend} back")]
    Discard {
        /// Which backend.
        backend: usize,
        /// Which of its pages.
        pages: PageRange,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Pages of a backend that are given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GivenRun {
    /// Which backend, of those that the machine began with: the number of its image.
    pub backend: usize,
    /// Which of its pages.
    pub pages: PageRange,
}

/// A clone, as far as giving memory back goes.
pub trait Subject {
    /// Where each backend lies in this process.
    fn places(&self) -> Vec<MemoryPlace>;
    /// Stops everything that could write the memory, and waits until it stands.
    fn pause(&mut self) -> Result<(), GiveBackError>;
    /// Lets it go on.
    fn resume(&mut self) -> Result<(), GiveBackError>;
    /// Tells the pager, between pause and resume, that it is to bring these pages again. It is in
    /// force when this returns; `false` when that cannot be had.
    fn forget(&mut self, runs: &[GivenRun]) -> bool;
    /// Gives pages back to the host, after [`Self::forget`] and before [`Self::resume`].
    fn discard(&mut self, run: &GivenRun) -> io::Result<()>;
}

/// What came of giving back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Given {
    /// Private clean memory that was found.
    pub clean_bytes: u64,
    /// How much of it went.
    pub given_bytes: u64,
    /// How often the guest was paused.
    pub pauses: u64,
}

/// Whether this kernel has what it takes: `wp_async` is the userfaultfd's feature of that name.
pub fn require(wp_async: bool, map: &Pagemap) -> Result<(), GiveBackError> {
    let off = |lack| Err(GiveBackError::Off { lack });
    if !wp_async {
        return off(
            "this kernel has no asynchronous write protection (UFFD_FEATURE_WP_ASYNC, Linux 6.7)",
        );
    }
    match map.can_scan() {
        Ok(true) => Ok(()),
        Ok(false) => off("this kernel has no PAGEMAP_SCAN (Linux 6.7)"),
        Err(error) => Err(GiveBackError::Scan(error)),
    }
}

/// The mechanism of one clone.
#[derive(Debug)]
pub struct GiveBack {
    map: Pagemap,
    /// Host addresses of pages that came from a root, ascending: they cost this clone nothing.
    inherited: Vec<Range<u64>>,
    /// Where the next search begins, so that not always the same pages go.
    hand: u64,
    runs: Vec<PageRun>,
}

impl GiveBack {
    /// For a clone of this process with its memory at `places`. Of a fork, called before anything
    /// was installed in it: what is present now is the root's.
    pub fn new(map: Pagemap, places: &[MemoryPlace]) -> Result<Self, GiveBackError> {
        let mut give_back = Self {
            map,
            inherited: Vec::new(),
            hand: 0,
            runs: vec![PageRun::default(); RUNS],
        };
        let query = Query {
            all: Categories::PRESENT,
            ..Query::default()
        };
        let mut inherited = Vec::new();
        for place in places {
            give_back.search(range_of(place), query, &mut |found| {
                inherited.extend(found.iter().map(|run| run.start..run.end));
                true
            })?;
        }
        give_back.inherited = inherited;
        Ok(give_back)
    }

    /// Gives back what exceeds `keep_bytes` of clean memory.
    pub fn give_back(
        &mut self,
        subject: &mut dyn Subject,
        keep_bytes: u64,
    ) -> Result<Given, GiveBackError> {
        let places = subject.places();
        let clean_bytes = self.clean_bytes(&places)?;
        let mut given = Given {
            clean_bytes,
            ..Given::default()
        };
        let mut excess = clean_bytes.saturating_sub(keep_bytes);
        // One sweep from the hand to the hand, and every turn of the loop comes further: pages that
        // were clean may be written meanwhile.
        let mut ahead = self.sweep(&places);
        while let Some(whole) = ahead.pop()
            && excess >= PAGE_BYTES
        {
            let Some(start) = self.first_clean(whole.clone())? else {
                continue;
            };
            let end = whole.end.min(start.saturating_add(SPAN_PER_PAUSE));
            let range = start..end;
            subject.pause()?;
            let paused = self.give_back_paused(subject, &places, range.clone(), excess);
            // Whatever went wrong, the guest goes on.
            subject.resume()?;
            let (bytes, next) = paused?;
            given.pauses += 1;
            given.given_bytes += bytes;
            excess = excess.saturating_sub(bytes);
            self.hand = next;
            if next < whole.end {
                ahead.push(next..whole.end);
            }
        }
        Ok(given)
    }

    /// Gives back of `range` while the guest stands: bytes, and where to go on.
    fn give_back_paused(
        &mut self,
        subject: &mut dyn Subject,
        places: &[MemoryPlace],
        range: Range<u64>,
        excess: u64,
    ) -> Result<(u64, u64), GiveBackError> {
        let most = excess.min(PAGES_PER_PAUSE * PAGE_BYTES) / PAGE_BYTES * PAGE_BYTES;
        let mut taken: Vec<Range<u64>> = Vec::new();
        let mut bytes = 0;
        let inherited = std::mem::take(&mut self.inherited);
        let searched = self.search(range.clone(), CLEAN, &mut |found| {
            for run in found {
                for part in without(run.start..run.end, &inherited) {
                    let length = (part.end - part.start).min(most - bytes);
                    if length > 0 {
                        taken.push(part.start..part.start + length);
                        bytes += length;
                    }
                }
            }
            bytes < most && taken.len() < RUNS
        });
        self.inherited = inherited;
        let searched = searched?;
        let next = match taken.last() {
            Some(last) if bytes >= most => last.end,
            _ => searched,
        };
        if taken.is_empty() {
            return Ok((0, next));
        }
        let runs: Vec<GivenRun> = taken
            .iter()
            .filter_map(|range| run_at(places, range))
            .collect();
        if !subject.forget(&runs) {
            return Err(GiveBackError::Pager);
        }
        for run in &runs {
            subject
                .discard(run)
                .map_err(|source| GiveBackError::Discard {
                    backend: run.backend,
                    pages: run.pages,
                    source,
                })?;
        }
        Ok((bytes, next))
    }

    /// Private clean memory, without what came from a root.
    fn clean_bytes(&mut self, places: &[MemoryPlace]) -> Result<u64, GiveBackError> {
        let inherited = std::mem::take(&mut self.inherited);
        let mut bytes = 0;
        let mut result = Ok(0);
        for place in places {
            result = self.search(range_of(place), CLEAN, &mut |found| {
                let parts = found
                    .iter()
                    .flat_map(|run| without(run.start..run.end, &inherited));
                bytes += parts.map(|part| part.end - part.start).sum::<u64>();
                true
            });
            if result.is_err() {
                break;
            }
        }
        self.inherited = inherited;
        result.map(|_| bytes)
    }

    /// Where the first clean page of `range` lies, as far as that holds while the guest runs.
    fn first_clean(&mut self, range: Range<u64>) -> Result<Option<u64>, GiveBackError> {
        let inherited = std::mem::take(&mut self.inherited);
        let mut first = None;
        let searched = self.search(range, CLEAN, &mut |found| {
            let mut parts = found
                .iter()
                .flat_map(|run| without(run.start..run.end, &inherited));
            first = parts.next().map(|part| part.start);
            first.is_none()
        });
        self.inherited = inherited;
        searched.map(|_| first)
    }

    /// All places from the hand on and around to it; the next one last.
    fn sweep(&self, places: &[MemoryPlace]) -> Vec<Range<u64>> {
        let mut ranges: Vec<_> = places.iter().map(range_of).collect();
        let with_hand = ranges.iter().position(|range| range.contains(&self.hand));
        if let Some(at) = with_hand {
            ranges.rotate_left(at);
            let before = ranges[0].start..self.hand;
            ranges[0].start = self.hand;
            ranges.push(before);
        }
        ranges.retain(|range| range.start < range.end);
        ranges.reverse();
        ranges
    }

    /// Hands runs of pages in `range` to `found`, some at a time, until it has enough. Returns where
    /// the search ended.
    fn search(
        &mut self,
        range: Range<u64>,
        query: Query,
        found: &mut dyn FnMut(&[PageRun]) -> bool,
    ) -> Result<u64, GiveBackError> {
        let mut at = range.start;
        while at < range.end {
            let (count, next) = self
                .map
                .scan(at..range.end, query, &mut self.runs)
                .map_err(GiveBackError::Scan)?;
            // A kernel that says nothing new must not keep us here.
            let next = if next > at { next } else { range.end };
            at = next;
            if !found(&self.runs[..count]) {
                break;
            }
        }
        Ok(at)
    }
}

/// Present, as the pager installed it, and not the zero page, which costs nothing.
const CLEAN: Query = Query {
    all: Categories::PRESENT.and(Categories::WRITE_TRACKED),
    none: Categories::WRITTEN
        .and(Categories::ZERO)
        .and(Categories::FILE),
    any: Categories::NONE,
    tell: Categories::PRESENT,
};

fn range_of(place: &MemoryPlace) -> Range<u64> {
    place.address..place.address.saturating_add(place.bytes)
}

/// The parts of `range` that are in none of `holes`, which ascend.
fn without(range: Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    let mut start = range.start;
    let first = holes.partition_point(|hole| hole.end <= range.start);
    for hole in &holes[first..] {
        if hole.start >= range.end {
            break;
        }
        if start < hole.start {
            parts.push(start..hole.start);
        }
        start = start.max(hole.end);
    }
    if start < range.end {
        parts.push(start..range.end);
    }
    parts
}

/// The pages that lie at `range`, which is in one place.
fn run_at(places: &[MemoryPlace], range: &Range<u64>) -> Option<GivenRun> {
    let backend = places
        .iter()
        .position(|place| range_of(place).contains(&range.start))?;
    let first = (range.start - places[backend].address) / PAGE_BYTES;
    let count = (range.end - range.start) / PAGE_BYTES;
    Some(GivenRun {
        backend,
        pages: PageRange::new(PageIndex::new(first), PageCount::new(count)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_root_gave_is_left_out() {
        let holes = [10..20, 30..40, 40..45];
        let parts = |range: Range<u64>| -> Vec<(u64, u64)> {
            let parts = without(range, &holes).into_iter();
            parts.map(|part| (part.start, part.end)).collect()
        };
        assert_eq!(parts(0..5), [(0, 5)]);
        assert_eq!(parts(0..50), [(0, 10), (20, 30), (45, 50)]);
        assert_eq!(parts(12..18), []);
        assert_eq!(parts(15..35), [(20, 30)]);
        assert_eq!(parts(42..60), [(45, 60)]);
        assert_eq!(without(3..4, &[]).len(), 1);
    }

    #[test]
    fn a_sweep_goes_all_around_once() {
        let place = |address, bytes| MemoryPlace { address, bytes };
        let places = [place(0x1000, 0x4000), place(0x10_000, 0x2000)];
        let mut give_back = GiveBack::new(Pagemap::of_self().unwrap(), &[]).unwrap();
        assert_eq!(
            give_back.sweep(&places),
            [0x10_000..0x12_000, 0x1000..0x5000]
        );
        give_back.hand = 0x3000;
        let around = [0x1000..0x3000, 0x10_000..0x12_000, 0x3000..0x5000];
        assert_eq!(give_back.sweep(&places), around);
        give_back.hand = 0x1000;
        assert_eq!(
            give_back.sweep(&places),
            [0x10_000..0x12_000, 0x1000..0x5000]
        );
    }

    #[test]
    fn a_kernel_that_cannot_is_said_to() {
        let map = Pagemap::of_self().unwrap();
        let error = require(false, &map).unwrap_err().to_string();
        assert!(
            error.contains("give-back is off") && error.contains("WP_ASYNC"),
            "{error}"
        );
    }
}
