#![forbid(unsafe_code)]
//! The memory of a clone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::install::{Content, PageOps, Stopped, install};
use crate::page::PageRange;
use crate::region::Region;
use crate::sys::discard_map::DiscardMap;
use crate::sys::mmap::ServedMapping;
use crate::sys::userfaultfd::{self as sys, Answer, Tracking};

/// How often pages are discarded anew because they were brought meanwhile.
const DISCARD_TRIES: usize = 64;

/// Pages that are discarded at once: 2 MiB.
const PIECE_PAGES: u64 = 512;

/// Anonymous memory of a clone that its pager fills. It has no way to reach the template's file.
///
/// The memory is unmapped when this is dropped, and only then (or when the pager is done with the
/// page it is just installing). Where pages are missing it holds a descriptor of the userfaultfd of its own: a pager that
/// ends leaves missing pages missing, never zero.
#[derive(Debug)]
pub struct CloneMemory {
    // Before the descriptor: with the last descriptor closed, missing pages would read as zero.
    mapping: Arc<ServedMapping>,
    uffd: Option<OwnedFd>,
    /// Which pages were discarded, where that is allowed.
    discards: Option<DiscardMap>,
}

impl CloneMemory {
    pub(crate) fn new(mapping: Arc<ServedMapping>, uffd: OwnedFd) -> Self {
        Self {
            mapping,
            uffd: Some(uffd),
            discards: None,
        }
    }

    /// Memory without a page that a pager would have to bring.
    pub(crate) fn complete(mapping: Arc<ServedMapping>) -> Self {
        Self {
            mapping,
            uffd: None,
            discards: None,
        }
    }

    /// Where the pages of its image lie; not held mapped.
    pub(crate) fn region(&self) -> Region {
        Region::own(&self.mapping)
    }

    #[cfg(test)]
    pub(crate) fn mapping(&self) -> &ServedMapping {
        &self.mapping
    }

    /// Gives this process copies of its own of pages that it shares with its root, ahead of the
    /// writes that would make them one by one. Where pages are missing, a pager must serve.
    pub fn make_private(&self, pages: PageRange) -> io::Result<()> {
        self.mapping.make_private(pages)
    }

    /// Has the kernel tell, from now on, whether these pages are written: they are there, equal to the
    /// template, and were registered by a pager that tracks writes.
    pub fn track(&self, pages: PageRange) -> io::Result<()> {
        let uffd = self.uffd.as_ref().ok_or_else(unserved)?;
        crate::sys::userfaultfd::protect(uffd.as_fd(), &*self.mapping, pages)
    }

    /// Gives pages back to the host that the pager serves and was told to forget: the next touch
    /// brings the template's bytes. Nothing may touch them between that order and the end of this.
    pub fn discard(&self, pages: PageRange) -> io::Result<()> {
        self.uffd.as_ref().ok_or_else(unserved)?;
        self.mapping.discard(pages)
    }

    /// From now on [`Self::discard_to_zero`] may be used. Whoever brings pages must know this map.
    pub(crate) fn set_discards(&mut self, map: DiscardMap) {
        self.discards = Some(map);
    }

    /// The same for memory without a page that a pager would have to bring; false if there are such pages.
    pub fn allow_discards_alone(&mut self) -> io::Result<bool> {
        if self.uffd.is_some() {
            return Ok(false);
        }
        let pages = self.region().pages().count();
        self.discards = DiscardMap::new(&[pages])?.pop();
        Ok(true)
    }

    /// Whether pages can be discarded for good.
    pub fn discards_to_zero(&self) -> bool {
        self.discards.is_some()
    }

    /// Gives pages back to the host for good: they are zero from now on, never again the template's, whoever
    /// touches them meanwhile and whatever becomes of the pager. Allowed by `Pager::allow_discards` and
    /// `Registration::allow_discards`.
    ///
    /// The map is told first, so that the pager brings zeros for these pages from then on. What it had on its
    /// way before that is found in place of the zero page, and goes as well. After an error some pages may be there
    /// as they were; they are zero once they have gone.
    pub fn discard_to_zero(&self, pages: PageRange) -> io::Result<()> {
        let map = self.discards.as_ref().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "this memory is a template's: it cannot be discarded",
            )
        })?;
        if !self.region().pages().contains_all(pages) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // Piece by piece: what is brought again meanwhile costs no more than its own piece, and one that cannot be
        // discarded leaves the others to be.
        let mut outcome = Ok(());
        let mut start = pages.start();
        while start < pages.end() {
            let end = pages.end().min(start.plus(PIECE_PAGES));
            let piece = PageRange::between(start, end);
            outcome = outcome.and(self.discard_piece(map, piece));
            start = end;
        }
        outcome
    }

    fn discard_piece(&self, map: &DiscardMap, pages: PageRange) -> io::Result<()> {
        map.insert(pages);
        let Some(uffd) = &self.uffd else {
            return self.mapping.discard(pages);
        };
        for _ in 0..DISCARD_TRIES {
            self.mapping.discard(pages)?;
            if self.fill_with_zeros(uffd.as_fd(), pages)? {
                return Ok(());
            }
        }
        Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            "the pages are brought again as fast as they are discarded",
        ))
    }

    /// Puts the zero page at `pages`, which were just discarded; false if some are there again.
    fn fill_with_zeros(&self, uffd: BorrowedFd<'_>, pages: PageRange) -> io::Result<bool> {
        let mut place = Zeroed {
            uffd,
            memory: &self.mapping,
        };
        let mut start = pages.start();
        let mut present = 0;
        while start < pages.end() {
            let rest = PageRange::between(start, pages.end());
            let report = install(&mut place, rest, Content::Zero);
            present += report.present;
            match report.stopped {
                None => break,
                // A page that a root had: without a pager it reads as zero once it is discarded.
                Some(Stopped::Unmapped) => start = start.plus(report.done() + 1),
                // Somebody else changes this memory: from the beginning.
                Some(Stopped::Changing) => return Ok(false),
                Some(stopped) => {
                    return Err(io::Error::other(format!(
                        "the zero page cannot be put there: {stopped:?}"
                    )));
                }
            }
        }
        Ok(present == 0)
    }

    /// First address in this process; page aligned.
    pub fn host_address(&self) -> *mut u8 {
        self.mapping.address()
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.bytes()
    }
}

/// Memory whose pages become zero, and nothing else.
struct Zeroed<'a> {
    uffd: BorrowedFd<'a>,
    memory: &'a ServedMapping,
}

impl PageOps for Zeroed<'_> {
    fn copy(&mut self, pages: PageRange, source: &[u8]) -> Answer {
        sys::copy(self.uffd, self.memory, pages, source, Tracking::Off)
    }

    fn zero(&mut self, pages: PageRange) -> Answer {
        sys::zero(self.uffd, self.memory, pages)
    }

    fn poison(&mut self, pages: PageRange) -> Answer {
        sys::poison(self.uffd, self.memory, pages)
    }

    /// Who installed a page that is there has woken who waited for it.
    fn wake(&mut self, _pages: PageRange) {}

    /// Messages are the pager's.
    fn drain(&mut self) {
        std::thread::yield_now();
    }
}

/// Nobody would bring its pages again.
fn unserved() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "no pager serves this memory")
}
