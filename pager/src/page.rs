#![forbid(unsafe_code)]
//! All page arithmetic: where a page starts, which bytes a run of pages covers. Pure.

use std::fmt;

/// Size of every page this crate speaks of, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Number of the last page whose end still fits 64 bits of bytes.
const LAST_PAGE: u64 = u64::MAX / PAGE_BYTES - 1;

/// Position of a page in an image, counted from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(u64);

impl PageIndex {
    /// Page number `index`; numbers whose bytes would not fit 64 bits become the last that do.
    pub const fn new(index: u64) -> Self {
        Self(if index > LAST_PAGE { LAST_PAGE } else { index })
    }

    /// The page that holds byte `offset`.
    pub const fn containing(offset: ByteOffset) -> Self {
        Self::new(offset.0 / PAGE_BYTES)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// First byte of the page.
    pub const fn offset(self) -> ByteOffset {
        ByteOffset(self.0 * PAGE_BYTES)
    }

    /// The page `count` behind this one.
    #[must_use]
    pub const fn plus(self, count: u64) -> Self {
        Self::new(self.0.saturating_add(count))
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {}", self.0)
    }
}

/// A number of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageCount(u64);

impl PageCount {
    /// `count` pages, at most as many as 64 bits of bytes hold.
    pub const fn new(count: u64) -> Self {
        Self(if count > LAST_PAGE { LAST_PAGE } else { count })
    }

    /// As many pages as `bytes` fills exactly; `None` for a partial page.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes.is_multiple_of(PAGE_BYTES) {
            Some(Self::new(bytes / PAGE_BYTES))
        } else {
            None
        }
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Bytes that so many pages hold.
    pub const fn bytes(self) -> u64 {
        self.0 * PAGE_BYTES
    }
}

/// Position of a byte in an image, counted from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteOffset(u64);

impl ByteOffset {
    /// Byte number `offset`.
    pub const fn new(offset: u64) -> Self {
        Self(offset)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {}", self.0)
    }
}

/// A run of pages: `count` of them from `start`. May be empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PageRange {
    start: u64,
    count: u64,
}

impl PageRange {
    /// `count` pages from `start`, cut at the last page there can be.
    pub const fn new(start: PageIndex, count: PageCount) -> Self {
        let room = LAST_PAGE - start.0;
        Self {
            start: start.0,
            count: if count.0 > room { room } else { count.0 },
        }
    }

    /// The pages from `start` up to and without `end`; empty when `end` is not behind `start`.
    pub const fn between(start: PageIndex, end: PageIndex) -> Self {
        Self {
            start: start.0,
            count: end.0.saturating_sub(start.0),
        }
    }

    /// The one page.
    pub const fn single(page: PageIndex) -> Self {
        Self::new(page, PageCount(1))
    }

    /// First page.
    pub const fn start(self) -> PageIndex {
        PageIndex(self.start)
    }

    /// The page behind the last.
    pub const fn end(self) -> PageIndex {
        PageIndex(self.start + self.count)
    }

    /// Number of pages.
    pub const fn count(self) -> PageCount {
        PageCount(self.count)
    }

    /// Whether there is no page in it.
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }

    /// Bytes that the pages hold.
    pub const fn bytes(self) -> u64 {
        self.count * PAGE_BYTES
    }

    /// First byte.
    pub const fn offset(self) -> ByteOffset {
        self.start().offset()
    }

    /// Whether all of `pages` are among them.
    pub const fn contains_all(self, pages: Self) -> bool {
        self.start().get() <= pages.start().get() && pages.end().get() <= self.end().get()
    }

    /// Whether `page` is one of them.
    pub const fn contains(self, page: PageIndex) -> bool {
        page.0 >= self.start && page.0 - self.start < self.count
    }

    /// Grown outwards to multiples of `unit` pages, but not beyond `limit`.
    #[must_use]
    pub fn aligned(self, unit: u64, limit: PageCount) -> Self {
        let start = self.start - self.start % unit;
        let end = (self.start + self.count)
            .div_ceil(unit)
            .saturating_mul(unit);
        Self {
            start,
            count: end.min(limit.0).saturating_sub(start),
        }
    }

    /// Every page in order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = PageIndex> + Clone {
        (self.start..self.start + self.count).map(PageIndex)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {}..{}", self.start, self.start + self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_arithmetic_overflows(start in any::<u64>(), count in any::<u64>(), unit in 1u64..64) {
            let range = PageRange::new(PageIndex::new(start), PageCount::new(count));
            prop_assert!(range.end() >= range.start());
            prop_assert!(range.offset().get().checked_add(range.bytes()).is_some());
            let limit = PageCount::new(range.end().get());
            let wide = range.aligned(unit, limit);
            prop_assert!(wide.start() <= range.start());
            prop_assert_eq!(wide.end(), range.end());
        }

        #[test]
        fn a_byte_lies_in_its_page(offset in 0..u64::MAX - 2 * PAGE_BYTES) {
            let page = PageIndex::containing(ByteOffset::new(offset));
            prop_assert!(page.offset().get() <= offset);
            prop_assert!(offset - page.offset().get() < PAGE_BYTES);
        }

        #[test]
        fn a_range_contains_what_it_iterates(start in 0u64..1000, count in 0u64..50, probe in 0u64..1100) {
            let range = PageRange::new(PageIndex::new(start), PageCount::new(count));
            let listed = range.iter().any(|page| page.get() == probe);
            prop_assert_eq!(range.contains(PageIndex::new(probe)), listed);
        }
    }

    #[test]
    fn a_partial_page_is_no_count() {
        assert_eq!(PageCount::from_bytes(8192), Some(PageCount::new(2)));
        assert_eq!(PageCount::from_bytes(8193), None);
    }
}
