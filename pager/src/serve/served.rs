#![forbid(unsafe_code)]
//! One region of a client, and the image that its pages come from.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::image::{CHUNK_PAGES, ChunkIndex, Image, PageKind};
use crate::metrics::Metrics;
use crate::page::{PageIndex, PageRange};
use crate::prefetch::plan::Streams;
use crate::range_faults::{FaultCounts, RangeTable};
use crate::region::{Pinned, Region};
use crate::residency::{PageState, Residency};
use crate::stale::StaleFaults;
use crate::sys::discard_map::DiscardMap;

/// An image and what is known of it, for all who serve it.
#[derive(Debug)]
pub(crate) struct ServedImage {
    image: Image,
    /// The pager's number of it.
    number: usize,
    metrics: Arc<Metrics>,
    /// One bit per chunk: its bytes were seen to match the index. The file is held open, so that
    /// holds for every shard.
    verified: Vec<AtomicU64>,
    /// Faults by range, where that is asked for.
    ranges: Option<RangeTable>,
}

impl ServedImage {
    pub(crate) fn new(
        image: Image,
        number: usize,
        metrics: Arc<Metrics>,
        counts: FaultCounts,
    ) -> Self {
        let words = image.pages().get().div_ceil(CHUNK_PAGES).div_ceil(64);
        Self {
            verified: (0..words).map(|_| AtomicU64::new(0)).collect(),
            ranges: (counts == FaultCounts::ByRange).then(|| RangeTable::new(image.pages())),
            image,
            number,
            metrics,
        }
    }

    pub(crate) fn image(&self) -> &Image {
        &self.image
    }

    pub(crate) fn number(&self) -> usize {
        self.number
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Faults by range, where they are counted.
    pub(crate) fn ranges(&self) -> Option<&RangeTable> {
        self.ranges.as_ref()
    }

    fn word(&self, chunk: ChunkIndex) -> Option<&AtomicU64> {
        let word = usize::try_from(chunk.get() / 64).ok()?;
        self.verified.get(word)
    }

    pub(super) fn is_verified(&self, chunk: ChunkIndex) -> bool {
        let word = self.word(chunk);
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (chunk.get() % 64) & 1 != 0)
    }

    pub(super) fn set_verified(&self, chunk: ChunkIndex) {
        if let Some(word) = self.word(chunk) {
            word.fetch_or(1 << (chunk.get() % 64), Ordering::Relaxed);
        }
    }
}

/// One region of a client and what was done with it. All pages are those of the image.
#[derive(Debug)]
pub(crate) struct Served {
    pub(super) image: Arc<ServedImage>,
    pub(super) region: Region,
    residency: Residency,
    pub(super) streams: Streams,
    pub(super) stale: StaleFaults,
    /// Pages that were given back and not brought again since: one bit each. They are brought for
    /// those who ask, never ahead, and are there only once an install really filled them: between
    /// the order to forget a page and its end it is still there.
    forgotten: Option<Vec<u64>>,
    /// Pages that the clone has discarded, where it may: they are zero, whatever the image has.
    pub(crate) discards: Option<DiscardMap>,
}

impl Served {
    pub(crate) fn new(image: Arc<ServedImage>, region: Region) -> Self {
        Self {
            residency: Residency::new(region.pages().count()),
            streams: Streams::default(),
            stale: StaleFaults::default(),
            forgotten: None,
            discards: None,
            image,
            region,
        }
    }

    pub(crate) fn image(&self) -> &Arc<ServedImage> {
        &self.image
    }

    /// Its memory, held mapped; `None` once a clone of this process dropped it.
    pub(crate) fn pin(&self) -> Option<Pinned> {
        self.region.pin()
    }

    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    /// Where `page` is among the region's own.
    fn own(&self, page: PageIndex) -> PageIndex {
        let before = page.get().checked_sub(self.region.pages().start().get());
        PageIndex::new(before.unwrap_or(u64::MAX))
    }

    pub(super) fn state(&self, page: PageIndex) -> PageState {
        self.residency.get(self.own(page))
    }

    pub(super) fn set(&mut self, page: PageIndex, next: PageState) {
        self.residency.set(self.own(page), next);
    }

    /// Moves every page of `pages` that legally can to `next`.
    pub(crate) fn set_all(&mut self, pages: PageRange, next: PageState) {
        pages.iter().for_each(|page| self.set(page, next));
    }

    pub(super) fn kind(&self, page: PageIndex) -> PageKind {
        if self.is_discarded(page) {
            return PageKind::Zero;
        }
        self.image.image.index().kind(page)
    }

    /// Whether the clone has discarded a page for good.
    pub(super) fn is_discarded(&self, page: PageIndex) -> bool {
        let discards = self.discards.as_ref();
        discards.is_some_and(|discards| discards.contains(page))
    }

    /// Pages of this fork's memory outside of `registered`, ascending runs of it, are there already:
    /// nothing is to be brought there.
    pub(crate) fn inherits_all_but(&mut self, registered: &[PageRange]) {
        let mut start = self.region.pages().start();
        let end = PageRange::between(self.region.pages().end(), self.region.pages().end());
        for run in registered.iter().chain([&end]) {
            if start < run.start() {
                let there = PageRange::between(self.own(start), self.own(run.start()));
                self.residency.begin_present(there);
            }
            start = run.end();
        }
    }

    /// Whether `page` may be brought though nobody asked for it.
    pub(super) fn may_bring_ahead(&self, page: PageIndex) -> bool {
        self.region.pages().contains(page)
            && self.state(page) == PageState::Absent
            && !self.is_forgotten(page)
    }

    pub(super) fn is_forgotten(&self, page: PageIndex) -> bool {
        let Some(words) = &self.forgotten else {
            return false;
        };
        let page = self.own(page).get();
        let word = usize::try_from(page / 64).ok().and_then(|at| words.get(at));
        word.is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// Whether any page was ever forgotten.
    pub(super) fn has_forgotten(&self) -> bool {
        self.forgotten.is_some()
    }

    /// Makes those of `pages` absent that are not on their way and can be had.
    pub(super) fn forget(&mut self, pages: PageRange) {
        let count = self.region.pages().count().get();
        let mut words = self
            .forgotten
            .take()
            .unwrap_or_else(|| vec![0; usize::try_from(count.div_ceil(64)).unwrap_or_default()]);
        for page in pages.iter() {
            let page = self.own(page);
            self.residency.forget(page);
            let word = usize::try_from(page.get() / 64).ok();
            if let Some(word) = word.and_then(|at| words.get_mut(at))
                && page.get() < count
            {
                *word |= 1 << (page.get() % 64);
            }
        }
        self.forgotten = Some(words);
    }

    /// An install of `pages` did `done` of them, of which it really filled `fresh`.
    pub(super) fn installed(&mut self, pages: PageRange, fresh: u64) {
        for page in pages.iter() {
            if self.is_forgotten(page) {
                // Installed one by one: either it was filled, or it was still there.
                if fresh == 0 {
                    self.set(page, PageState::Absent);
                    continue;
                }
                self.remember(page);
            }
            self.set(page, PageState::Present);
        }
    }

    fn remember(&mut self, page: PageIndex) {
        let page = self.own(page).get();
        let word = usize::try_from(page / 64).ok();
        let words = self.forgotten.as_mut();
        if let Some((words, at)) = words.zip(word)
            && let Some(word) = words.get_mut(at)
        {
            *word &= !(1 << (page % 64));
        }
    }
}

/// An image of holes.
#[cfg(test)]
pub(super) fn empty_image(pages: u64) -> Arc<ServedImage> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes = pages * crate::page::PAGE_BYTES;
    file.as_file().set_len(bytes).unwrap();
    let index = crate::image::BackendIndex::scan(file.as_file(), bytes, &mut |_, _| ()).unwrap();
    let image = Image::open(file.path(), "ram", index).unwrap();
    let metrics = Arc::new(Metrics::new("test"));
    Arc::new(ServedImage::new(image, 0, metrics, FaultCounts::Total))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageCount;

    fn pages(start: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex::new(start), PageCount::new(count))
    }

    /// Pages 10..20 of an image of 32.
    fn served() -> Served {
        let image = empty_image(32);
        Served::new(image, Region::other(0x1000, pages(10, 10)))
    }

    #[test]
    fn pages_are_those_of_the_image() {
        let mut served = served();
        assert_eq!(served.state(PageIndex::new(9)), PageState::Poisoned);
        assert_eq!(served.state(PageIndex::new(20)), PageState::Poisoned);
        served.set_all(pages(8, 4), PageState::Present);
        assert_eq!(served.state(PageIndex::new(11)), PageState::Present);
        assert!(!served.may_bring_ahead(PageIndex::new(9)));
        assert!(served.may_bring_ahead(PageIndex::new(12)));
    }

    #[test]
    fn a_forgotten_page_is_there_again_only_when_it_was_filled() {
        let mut served = served();
        let page = PageIndex::new(12);
        served.set(page, PageState::Present);
        served.forget(pages(12, 1));
        assert_eq!(served.state(page), PageState::Absent);
        assert!(served.is_forgotten(page) && !served.may_bring_ahead(page));
        served.set(page, PageState::Reading);
        // It was still there: its owner has not discarded it yet.
        served.installed(pages(12, 1), 0);
        assert_eq!(served.state(page), PageState::Absent);
        served.installed(pages(12, 1), 1);
        assert_eq!(served.state(page), PageState::Present);
        assert!(!served.is_forgotten(page) && served.has_forgotten());
    }

    #[test]
    fn what_cannot_be_had_is_not_forgotten() {
        let mut served = served();
        served.set(PageIndex::new(13), PageState::Poisoned);
        served.set(PageIndex::new(14), PageState::Reading);
        served.forget(pages(10, 10));
        assert_eq!(served.state(PageIndex::new(13)), PageState::Poisoned);
        assert_eq!(served.state(PageIndex::new(14)), PageState::Reading);
    }
}
