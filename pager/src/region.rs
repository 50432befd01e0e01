#![forbid(unsafe_code)]
//! Where pages of an image lie: fault address to page number.

use std::io;
use std::sync::{Arc, Weak};

use crate::page::{ByteOffset, PAGE_BYTES, PageIndex, PageRange};
use crate::sys::mmap::{Addressed, ServedMapping};

/// Whose memory it is.
#[derive(Clone, Debug)]
enum Owner {
    /// Of this process. The clone holds it, the pager only while it installs.
    Own(Weak<ServedMapping>),
    /// Of another process, or of somebody who sees to it himself: nothing to hold. The kernel says
    /// when it is gone.
    Other,
}

/// A run of pages of an image in an address space.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    base: u64,
    pages: PageRange,
    owner: Owner,
}

/// A region while something is installed in it: memory of this process is held mapped.
#[derive(Debug)]
pub(crate) struct Pinned {
    base: u64,
    pages: PageRange,
    own: Option<Arc<ServedMapping>>,
}

impl Region {
    /// The place of `mapping`, which holds all pages of its image.
    pub(crate) fn own(mapping: &Arc<ServedMapping>) -> Self {
        let end = PageIndex::new(mapping.bytes() / PAGE_BYTES);
        Self {
            base: mapping.address() as u64,
            pages: PageRange::between(PageIndex::default(), end),
            owner: Owner::Own(Arc::downgrade(mapping)),
        }
    }

    /// `pages` at `base` of the address space that a client's userfaultfd belongs to. Proven by
    /// the caller: aligned, and not beyond the last address.
    pub(crate) fn other(base: u64, pages: PageRange) -> Self {
        Self {
            base,
            pages,
            owner: Owner::Other,
        }
    }

    /// First address.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// Which pages lie here.
    pub(crate) fn pages(&self) -> PageRange {
        self.pages
    }

    /// The page at `address`, if it lies here.
    pub(crate) fn page_at(&self, address: u64) -> Option<PageIndex> {
        let offset = address.checked_sub(self.base)?;
        (offset < self.pages.bytes()).then(|| {
            let page = PageIndex::containing(ByteOffset::new(offset));
            self.pages.start().plus(page.get())
        })
    }

    /// Keeps the memory mapped while something is installed; `None` once a clone of this process
    /// dropped it.
    pub(crate) fn pin(&self) -> Option<Pinned> {
        let own = match &self.owner {
            Owner::Own(mapping) => Some(mapping.upgrade()?),
            Owner::Other => None,
        };
        Some(Pinned {
            base: self.base,
            pages: self.pages,
            own,
        })
    }
}

impl Pinned {
    /// Takes every right to `pages` away, where they are of this process; false where they are not.
    pub(crate) fn forbid(&self, pages: PageRange) -> io::Result<bool> {
        match &self.own {
            Some(mapping) => mapping.forbid(pages).map(|()| true),
            None => Ok(false),
        }
    }

    /// All its pages.
    pub(crate) fn pages(&self) -> PageRange {
        self.pages
    }
}

impl Addressed for Pinned {
    fn address_of(&self, pages: PageRange) -> Option<u64> {
        let before = pages.start().get().checked_sub(self.pages.start().get())?;
        (pages.end() <= self.pages.end()).then(|| self.base + before * PAGE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageCount;

    #[test]
    fn addresses_become_pages_only_inside() {
        let mapping = Arc::new(ServedMapping::new(8192).unwrap());
        let region = Region::own(&mapping);
        let base = mapping.address() as u64;
        assert_eq!(region.page_at(base - 1), None);
        assert_eq!(region.page_at(base + 4095), Some(PageIndex::new(0)));
        assert_eq!(region.page_at(base + 4096), Some(PageIndex::new(1)));
        assert_eq!(region.page_at(base + 8192), None);
        assert!(region.pin().is_some());
        drop(mapping);
        assert!(region.pin().is_none());
    }

    #[test]
    fn a_part_of_an_image_has_the_pages_of_the_image() {
        let pages = |start, count| PageRange::new(PageIndex::new(start), PageCount::new(count));
        let region = Region::other(0x10_0000, pages(5, 2));
        assert_eq!(region.page_at(0xf_ffff), None);
        assert_eq!(region.page_at(0x10_0000), Some(PageIndex::new(5)));
        assert_eq!(region.page_at(0x10_1fff), Some(PageIndex::new(6)));
        assert_eq!(region.page_at(0x10_2000), None);
        let pinned = region.pin().unwrap();
        assert_eq!(pinned.address_of(pages(6, 1)), Some(0x10_1000));
        assert_eq!(pinned.address_of(pages(4, 2)), None);
        assert_eq!(pinned.address_of(pages(6, 2)), None);
        assert!(!pinned.forbid(pages(5, 1)).unwrap());
    }
}
