#![forbid(unsafe_code)]
//! A read under way, and all who wait for its bytes.

use std::sync::Arc;
use std::time::Instant;

use super::served::ServedImage;

use crate::page::{PageIndex, PageRange};
use crate::queue::{ClientKey, RegionKey};

/// Most pages of one read: its wanted pages are bits of a word.
pub(super) const READ_PAGES_LIMIT: u64 = 64;

/// Pages of a read that one region is to get.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) region: RegionKey,
    /// Bit 0 is the first page of the read.
    pub(super) wanted: u64,
    /// They are of the client's plan: nobody asked for them when the read was chosen.
    pub(super) is_planned: bool,
}

/// A read under way.
#[derive(Clone, Debug)]
pub(super) struct ActiveRead {
    pub(super) image: Arc<ServedImage>,
    /// Whom it was started for.
    pub(super) owner: ClientKey,
    /// What is read.
    pub(super) covers: PageRange,
    /// Who gets what of it.
    pub(super) targets: Vec<Target>,
    /// It was started for more than the page that was asked for.
    pub(super) ahead: bool,
    /// It was started for a plan.
    pub(super) is_planned: bool,
    pub(super) started: Instant,
    /// The pass of the loop that started it.
    pub(super) pass: u64,
}

impl ActiveRead {
    /// The bit of a page; none for one that is not read.
    pub(super) fn bit(&self, page: PageIndex) -> u64 {
        if self.covers.contains(page) {
            1 << (page.get() - self.covers.start().get())
        } else {
            0
        }
    }

    /// The bits of pages.
    pub(super) fn bits(&self, pages: PageRange) -> u64 {
        pages.iter().fold(0, |bits, page| bits | self.bit(page))
    }

    /// The pages of bits.
    pub(super) fn pages(&self, bits: u64) -> impl Iterator<Item = PageIndex> + use<> {
        let covers = self.covers;
        let pages = (0u64..).zip(covers.iter());
        pages
            .filter(move |(at, _)| bits >> at & 1 != 0)
            .map(|(_, page)| page)
    }

    /// The first page at or behind `at` of these bits.
    pub(super) fn next_of(&self, bits: u64, at: PageIndex) -> Option<PageIndex> {
        let from = at.get().checked_sub(self.covers.start().get())?;
        let left = bits.checked_shr(u32::try_from(from).ok()?)?;
        (left != 0).then(|| at.plus(left.trailing_zeros().into()))
    }

    /// Lets `region` have `pages` too.
    pub(super) fn add(&mut self, region: RegionKey, pages: PageRange, is_planned: bool) {
        let wanted = self.bits(pages);
        // Neighbours come one after the other: joined, they are installed at once. Batches of a plan
        // are counted one by one.
        match self.targets.last_mut() {
            Some(last) if last.region == region && !last.is_planned && !is_planned => {
                last.wanted |= wanted;
            }
            _ => self.targets.push(Target {
                region,
                wanted,
                is_planned,
            }),
        }
    }

    /// What `region` gets of it that includes `page`.
    pub(super) fn target_of(&self, region: RegionKey, page: PageIndex) -> Option<&Target> {
        let bit = self.bit(page);
        let mut targets = self.targets.iter();
        targets.find(|target| target.region == region && target.wanted & bit != 0)
    }

    /// Nobody gets `page` in `region` any more.
    pub(super) fn leave_out(&mut self, region: RegionKey, page: PageIndex) {
        let bit = self.bit(page);
        for target in &mut self.targets {
            if target.region == region {
                target.wanted &= !bit;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageCount;
    use crate::token::ClientSlot;

    #[test]
    fn bits_are_pages_of_what_is_read() {
        let client = ClientKey {
            slot: ClientSlot::new(0),
            generation: 0,
        };
        let region = |region| RegionKey { client, region };
        let range = |start, count| PageRange::new(PageIndex::new(start), PageCount::new(count));
        let page = PageIndex::new;
        let mut read = ActiveRead {
            image: crate::serve::served::empty_image(100),
            owner: client,
            covers: range(8, READ_PAGES_LIMIT),
            targets: Vec::new(),
            ahead: false,
            is_planned: false,
            started: Instant::now(),
            pass: 0,
        };
        read.add(region(0), range(8, 2), false);
        read.add(region(0), range(71, 9), false);
        read.add(region(1), range(9, 1), true);
        read.add(region(1), range(10, 1), true);
        assert_eq!(read.targets.len(), 3);
        let bits = read.targets[0].wanted;
        let listed: Vec<u64> = read.pages(bits).map(PageIndex::get).collect();
        assert_eq!(listed, [8, 9, 71]);
        assert_eq!(read.next_of(bits, page(10)), Some(page(71)));
        assert_eq!(read.next_of(bits, page(72)), None);
        assert_eq!(read.next_of(bits, page(7)), None);
        assert!(
            read.target_of(region(1), page(9))
                .is_some_and(|t| t.is_planned)
        );
        read.leave_out(region(0), page(9));
        assert!(read.target_of(region(0), page(9)).is_none());
        assert!(read.target_of(region(1), page(9)).is_some());
    }
}
