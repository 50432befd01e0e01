#![forbid(unsafe_code)]
//! Pages that keep faulting though they were installed: discarded behind the pager's back. Pure.

use crate::page::PageIndex;

/// Faults on one installed page before it is taken to be discarded. Far more than threads can
/// send for one page while it is installed: once they see it there, they fault on it no more.
const STALE_LIMIT: u32 = 4096;
/// Pages that are counted. More than vCPUs, each of which can fault on one page at a time.
const STALE_PAGES: usize = 16;

/// Counts faults on installed pages, page by page: those that alternate must not hide each other.
#[derive(Debug, Default)]
pub(crate) struct StaleFaults {
    pages: [(PageIndex, u32); STALE_PAGES],
}

impl StaleFaults {
    /// One more fault on `page`, which is installed. True when it must have been discarded; then
    /// its count begins anew.
    pub(crate) fn is_discarded(&mut self, page: PageIndex) -> bool {
        // A page that is new here takes the place of the one that faulted least: those that
        // never stop faulting stay.
        let known = self.pages.iter().position(|&(other, _)| other == page);
        let least = || (0..STALE_PAGES).min_by_key(|&at| self.pages[at].1);
        let Some(at) = known.or_else(least) else {
            return false;
        };
        let faults = if known.is_some() {
            self.pages[at].1 + 1
        } else {
            1
        };
        let discarded = faults >= STALE_LIMIT;
        self.pages[at] = (page, if discarded { 0 } else { faults });
        discarded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many rounds of faults on all of `pages` it takes until each was found discarded.
    fn rounds(pages: u64, others: bool) -> u32 {
        let mut stale = StaleFaults::default();
        let mut left: Vec<u64> = (1000..1000 + pages).collect();
        for round in 1..=20 * STALE_LIMIT {
            left.retain(|&page| !stale.is_discarded(PageIndex::new(page)));
            if left.is_empty() {
                return round;
            }
            // A message that was overtaken, of yet another page.
            if others {
                assert!(!stale.is_discarded(PageIndex::new(1_000_000 + u64::from(round))));
            }
        }
        u32::MAX
    }

    #[test]
    fn discarded_pages_do_not_hide_each_other() {
        assert_eq!(rounds(1, false), STALE_LIMIT);
        assert_eq!(rounds(2, false), STALE_LIMIT);
        assert_eq!(rounds(2, true), STALE_LIMIT);
        assert_eq!(rounds(STALE_PAGES as u64, false), STALE_LIMIT);
        // More than there is room for come one group after the other.
        assert!(rounds(40, true) < 4 * STALE_LIMIT);
    }

    #[test]
    fn page_zero_is_a_page_like_any_other() {
        let mut stale = StaleFaults::default();
        let zero = PageIndex::default();
        let before = (1..STALE_LIMIT).any(|_| stale.is_discarded(zero));
        assert!(!before && stale.is_discarded(zero));
    }
}
