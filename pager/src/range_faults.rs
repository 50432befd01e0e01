#![forbid(unsafe_code)]
//! How often clients asked for pages of an image, by range of 2 MiB: what a root is to fill for the
//! clones to come.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::client::ImageId;
use crate::page::{PageCount, PageIndex};
use crate::root_memory::UNIT_PAGES;

/// Whether faults are counted by range of 2 MiB beside the totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FaultCounts {
    /// Nobody asks for that: nothing is kept, and a fault costs nothing more.
    #[default]
    Total,
    /// They are, until they are taken: 4 bytes for each range of each image.
    ByRange,
}

/// Faults of one range since they were taken last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeFaults {
    /// Of which image.
    pub image: ImageId,
    /// Which range of 2 MiB of it, from 0.
    pub unit: u64,
    /// How often a client asked for a page of it that has data and was not there; at least once.
    pub faults: u32,
}

/// The counts of one image, moved by any shard and taken by anybody.
#[derive(Debug)]
pub(crate) struct RangeTable {
    /// As many as the image has ranges. 4 billion faults between two takes would be as many as none.
    counts: Box<[AtomicU32]>,
    /// Something may have been counted since the last take.
    is_news: AtomicBool,
}

impl RangeTable {
    /// Zeros for an image of `pages`.
    pub(crate) fn new(pages: PageCount) -> Self {
        let units = pages.get().div_ceil(UNIT_PAGES);
        Self {
            counts: (0..units).map(|_| AtomicU32::new(0)).collect(),
            is_news: AtomicBool::new(false),
        }
    }

    /// Counts a fault on `page`.
    pub(crate) fn count(&self, page: PageIndex) {
        let unit = usize::try_from(page.get() / UNIT_PAGES).unwrap_or(usize::MAX);
        if let Some(count) = self.counts.get(unit) {
            count.fetch_add(1, Ordering::Relaxed);
            // Shards share it: it is written once for each take, not for each fault.
            if !self.is_news.load(Ordering::Relaxed) {
                self.is_news.store(true, Ordering::Release);
            }
        }
    }

    /// Takes what was counted since the last time. What is counted meanwhile is taken now or later,
    /// never twice; the very last of it may wait for the next fault.
    pub(crate) fn take(&self, image: ImageId, taken: &mut Vec<RangeFaults>) {
        if !self.is_news.swap(false, Ordering::Acquire) {
            return;
        }
        for (unit, count) in (0..).zip(&self.counts) {
            let faults = count.load(Ordering::Relaxed);
            if faults > 0 {
                let faults = count.swap(0, Ordering::Relaxed);
                taken.push(RangeFaults {
                    image,
                    unit,
                    faults,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_counted_by_range_and_taken_once() {
        let table = RangeTable::new(PageCount::new(2 * UNIT_PAGES + 5));
        let image = ImageId::new(3);
        let take = || {
            let mut taken = Vec::new();
            table.take(image, &mut taken);
            taken
        };
        assert_eq!(take(), []);
        for page in [0, UNIT_PAGES - 1, 2 * UNIT_PAGES + 4] {
            table.count(PageIndex::new(page));
        }
        // Outside of the image: nobody's.
        table.count(PageIndex::new(3 * UNIT_PAGES));
        table.count(PageIndex::new(u64::MAX));
        let of = |unit, faults| RangeFaults {
            image,
            unit,
            faults,
        };
        assert_eq!(take(), [of(0, 2), of(2, 1)]);
        assert_eq!(take(), []);
        table.count(PageIndex::new(UNIT_PAGES));
        assert_eq!(take(), [of(1, 1)]);
    }

    #[test]
    fn nothing_is_lost_between_threads() {
        const EACH: u32 = 20_000;
        let table = RangeTable::new(PageCount::new(4 * UNIT_PAGES));
        let mut taken = Vec::new();
        std::thread::scope(|scope| {
            let counting: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        for fault in 0..EACH {
                            table.count(PageIndex::new(u64::from(fault % 4) * UNIT_PAGES));
                        }
                    })
                })
                .collect();
            while !counting
                .iter()
                .all(std::thread::ScopedJoinHandle::is_finished)
            {
                table.take(ImageId::new(0), &mut taken);
            }
        });
        // One more says that there is news.
        table.count(PageIndex::new(0));
        table.take(ImageId::new(0), &mut taken);
        let sum: u64 = taken.iter().map(|range| u64::from(range.faults)).sum();
        assert_eq!(sum, u64::from(2 * EACH) + 1);
    }
}
