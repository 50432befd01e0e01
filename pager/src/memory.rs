#![forbid(unsafe_code)]
//! The memory of a clone.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::page::PageRange;
use crate::region::Region;
use crate::sys::mmap::ServedMapping;

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
}

impl CloneMemory {
    pub(crate) fn new(mapping: Arc<ServedMapping>, uffd: OwnedFd) -> Self {
        Self {
            mapping,
            uffd: Some(uffd),
        }
    }

    /// Memory without a page that a pager would have to bring.
    pub(crate) fn complete(mapping: Arc<ServedMapping>) -> Self {
        Self {
            mapping,
            uffd: None,
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
    pub fn make_private(&self, pages: PageRange) -> std::io::Result<()> {
        self.mapping.make_private(pages)
    }

    /// Has the kernel tell, from now on, whether these pages are written: they are there, equal to the
    /// template, and were registered by a pager that tracks writes.
    pub fn track(&self, pages: PageRange) -> std::io::Result<()> {
        let uffd = self.uffd.as_ref().ok_or_else(unserved)?;
        crate::sys::userfaultfd::protect(uffd.as_fd(), &*self.mapping, pages)
    }

    /// Gives pages back to the host that the pager serves and was told to forget: the next touch
    /// brings the template's bytes. Nothing may touch them between that order and the end of this.
    pub fn discard(&self, pages: PageRange) -> std::io::Result<()> {
        self.uffd.as_ref().ok_or_else(unserved)?;
        self.mapping.discard(pages)
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

/// Nobody would bring its pages again.
fn unserved() -> std::io::Error {
    std::io::Error::new(
        std::io::ErrorKind::InvalidInput,
        "no pager serves this memory",
    )
}
