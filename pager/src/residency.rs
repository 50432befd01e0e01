#![forbid(unsafe_code)]
//! What the pager knows about each page of a clone. Pure.
//!
//! ```text
//!            start             installed
//!   Absent ---------> Reading -----------> Present
//!     |  ^ <---------    |                   (end)
//!     |      give up     | cannot be read
//!     |                  v
//!     +-------------> Poisoned (end)
//! ```
//! Poisoned is final, and Present too unless the clone says that it gives the page back
//! ([`Residency::forget`]): a page is filled from the template once, and a page that was removed
//! behind the pager's back is never filled again.

use crate::page::{PageCount, PageIndex, PageRange};

const PAGES_PER_WORD: u64 = 32;
/// A word of pages that are all present.
const ALL_PRESENT: u64 = 0xaaaa_aaaa_aaaa_aaaa;

/// State of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PageState {
    /// Nobody asked for it yet.
    Absent,
    /// Some read will bring it.
    Reading,
    /// It was installed.
    Present,
    /// It cannot be had; touching it is an error.
    Poisoned,
}

impl PageState {
    const fn code(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Reading => 1,
            Self::Present => 2,
            Self::Poisoned => 3,
        }
    }

    /// Whether the pager may move a page from this state to `next`.
    pub(crate) const fn may_become(self, next: Self) -> bool {
        match self {
            Self::Absent => matches!(next, Self::Reading | Self::Present | Self::Poisoned),
            Self::Reading => matches!(next, Self::Absent | Self::Present | Self::Poisoned),
            Self::Present | Self::Poisoned => false,
        }
    }
}

/// State of every page of one clone's memory, two bits each.
#[derive(Debug)]
pub(crate) struct Residency {
    pages: PageCount,
    words: Vec<u64>,
}

impl Residency {
    /// All pages absent.
    pub(crate) fn new(pages: PageCount) -> Self {
        let words = pages.get().div_ceil(PAGES_PER_WORD);
        Self {
            pages,
            words: vec![0; usize::try_from(words).unwrap_or(usize::MAX)],
        }
    }

    fn place(&self, page: PageIndex) -> Option<(usize, u64)> {
        if page.get() >= self.pages.get() {
            return None;
        }
        let word = usize::try_from(page.get() / PAGES_PER_WORD).ok()?;
        Some((word, 2 * (page.get() % PAGES_PER_WORD)))
    }

    /// State of `page`. A page behind the end is poisoned: there is nothing to be had.
    pub(crate) fn get(&self, page: PageIndex) -> PageState {
        let Some((word, shift)) = self.place(page) else {
            return PageState::Poisoned;
        };
        match self.words[word] >> shift & 3 {
            0 => PageState::Absent,
            1 => PageState::Reading,
            2 => PageState::Present,
            _ => PageState::Poisoned,
        }
    }

    /// Moves `page` to `next`; false, and nothing happens, where that is no legal step.
    pub(crate) fn set(&mut self, page: PageIndex, next: PageState) -> bool {
        let Some((word, shift)) = self.place(page) else {
            return false;
        };
        if !self.get(page).may_become(next) {
            return false;
        }
        self.words[word] = self.words[word] & !(3 << shift) | next.code() << shift;
        true
    }

    /// Before anything is asked for: `pages` are there already. Whole words at a time: it may be
    /// nearly all of a large memory.
    pub(crate) fn begin_present(&mut self, pages: PageRange) {
        let mut page = pages.start().get();
        while page < pages.end().get() {
            let word = usize::try_from(page / PAGES_PER_WORD).unwrap_or(usize::MAX);
            let is_whole = page.is_multiple_of(PAGES_PER_WORD)
                && page + PAGES_PER_WORD <= pages.end().get().min(self.pages.get());
            match self.words.get_mut(word) {
                Some(word) if is_whole => {
                    *word = ALL_PRESENT;
                    page += PAGES_PER_WORD;
                }
                Some(_) => {
                    self.set(PageIndex::new(page), PageState::Present);
                    page += 1;
                }
                None => return,
            }
        }
    }

    /// A page that is present is to be absent again: its clone gives it back. Others stay.
    pub(crate) fn forget(&mut self, page: PageIndex) {
        if self.get(page) == PageState::Present
            && let Some((word, shift)) = self.place(page)
        {
            self.words[word] &= !(3 << shift);
        }
    }

    /// Moves every page of `pages` that legally can to `next`.
    #[cfg(test)]
    pub(crate) fn set_all(&mut self, pages: PageRange, next: PageState) {
        for page in pages.iter() {
            self.set(page, next);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STATES: [PageState; 4] = [
        PageState::Absent,
        PageState::Reading,
        PageState::Present,
        PageState::Poisoned,
    ];

    #[test]
    fn what_is_there_from_the_beginning_is_present_and_nothing_else() {
        let pages = |start, end| PageRange::between(PageIndex::new(start), PageIndex::new(end));
        for there in [
            pages(0, 100),
            pages(5, 70),
            pages(32, 96),
            pages(40, 41),
            pages(64, 200),
        ] {
            let mut residency = Residency::new(PageCount::new(100));
            residency.begin_present(there);
            for page in (0..100).map(PageIndex::new) {
                let is_present = residency.get(page) == PageState::Present;
                assert_eq!(is_present, there.contains(page), "{there} {page}");
            }
            assert_eq!(residency.get(PageIndex::new(100)), PageState::Poisoned);
        }
    }

    proptest! {
        #[test]
        fn it_behaves_as_a_plain_list_of_states(
            steps in prop::collection::vec((0u64..80, 0usize..4), 0..200),
        ) {
            let mut model = vec![PageState::Absent; 70];
            let mut residency = Residency::new(PageCount::new(70));
            for (page, next) in steps {
                let next = STATES[next];
                let place = model.get_mut(usize::try_from(page).unwrap());
                let legal = place.as_ref().is_some_and(|state| match (**state, next) {
                    (PageState::Present | PageState::Poisoned, _) => false,
                    (from, to) => from != to,
                });
                if let Some(state) = place.filter(|_| legal) {
                    *state = next;
                }
                prop_assert_eq!(residency.set(PageIndex::new(page), next), legal);
            }
            for (page, state) in (0..).zip(&model) {
                prop_assert_eq!(residency.get(PageIndex::new(page)), *state);
            }
        }
    }

    #[test]
    fn nothing_can_be_had_behind_the_end() {
        let mut residency = Residency::new(PageCount::new(3));
        assert_eq!(residency.get(PageIndex::new(3)), PageState::Poisoned);
        assert!(!residency.set(PageIndex::new(3), PageState::Present));
        residency.set_all(
            PageRange::new(PageIndex::new(0), PageCount::new(9)),
            PageState::Present,
        );
        assert_eq!(residency.get(PageIndex::new(2)), PageState::Present);
        residency.forget(PageIndex::new(2));
        residency.forget(PageIndex::new(3));
        assert_eq!(residency.get(PageIndex::new(2)), PageState::Absent);
    }
}
