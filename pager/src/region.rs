#![forbid(unsafe_code)]
//! Where the pages of an image are mapped: fault address to page number.

use std::sync::{Arc, Weak};

use crate::page::{ByteOffset, PageIndex};
use crate::sys::mmap::ServedMapping;

/// One image's place in this process. Holds no memory: the clone does.
#[derive(Debug)]
pub(crate) struct Region {
    base: u64,
    bytes: u64,
    mapping: Weak<ServedMapping>,
}

impl Region {
    /// The place of `mapping`.
    pub(crate) fn new(mapping: &Arc<ServedMapping>) -> Self {
        Self {
            base: mapping.address() as u64,
            bytes: mapping.bytes(),
            mapping: Arc::downgrade(mapping),
        }
    }

    /// The page at `address`, if it lies here.
    pub(crate) fn page_at(&self, address: u64) -> Option<PageIndex> {
        let offset = address.checked_sub(self.base)?;
        (offset < self.bytes).then(|| PageIndex::containing(ByteOffset::new(offset)))
    }

    /// Keeps the memory mapped while something is installed; `None` once the clone dropped it.
    pub(crate) fn pin(&self) -> Option<Arc<ServedMapping>> {
        self.mapping.upgrade()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_pages_only_inside() {
        let mapping = Arc::new(ServedMapping::new(8192).unwrap());
        let region = Region::new(&mapping);
        let base = mapping.address() as u64;
        assert_eq!(region.page_at(base - 1), None);
        assert_eq!(region.page_at(base + 4095), Some(PageIndex::new(0)));
        assert_eq!(region.page_at(base + 4096), Some(PageIndex::new(1)));
        assert_eq!(region.page_at(base + 8192), None);
        assert!(region.pin().is_some());
        drop(mapping);
        assert!(region.pin().is_none());
    }
}
