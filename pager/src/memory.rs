#![forbid(unsafe_code)]
//! The memory of a clone.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::page::PageRange;
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
    _uffd: Option<OwnedFd>,
}

impl CloneMemory {
    pub(crate) fn new(mapping: Arc<ServedMapping>, uffd: OwnedFd) -> Self {
        Self {
            mapping,
            _uffd: Some(uffd),
        }
    }

    /// Memory without a page that a pager would have to bring.
    pub(crate) fn complete(mapping: Arc<ServedMapping>) -> Self {
        Self {
            mapping,
            _uffd: None,
        }
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

    /// First address in this process; page aligned.
    pub fn host_address(&self) -> *mut u8 {
        self.mapping.address()
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.bytes()
    }
}
