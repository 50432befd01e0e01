#![forbid(unsafe_code)]
//! Filling memory of this process that nobody touches meanwhile: proven bytes, and the kernel's calls.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use userfaultfd::Uffd;
use xxhash_rust::xxh3::xxh3_64;

use crate::image::{CHUNK_PAGES, ChunkIndex, Image};
use crate::install::PageOps;
use crate::page::{PageIndex, PageRange};
use crate::sys::mmap::Addressed;
use crate::sys::userfaultfd::{self as sys, Answer, Tracking};

/// Reads whole chunks into `buffer`, made as long as they are. False if they cannot be read, or are
/// not what the index says and that was to be proven.
pub(crate) fn read_proven(
    image: &Image,
    chunks: PageRange,
    buffer: &mut Vec<u8>,
    verify: bool,
) -> bool {
    buffer.resize(usize::try_from(chunks.bytes()).unwrap_or_default(), 0);
    if let Err(error) = image
        .file()
        .read_exact_at(buffer, image.offset_of(chunks).get())
    {
        tracing::warn!(image = image.id(), pages = %chunks, %error, "pages that cannot be read are left out");
        return false;
    }
    if verify && let Some(chunk) = damaged_chunk(image, chunks, buffer) {
        tracing::warn!(image = image.id(), pages = %chunk, "pages that are not what the index says are left out");
        return false;
    }
    true
}

/// The first chunk of `unit` with data whose bytes are not those of the index.
fn damaged_chunk(image: &Image, unit: PageRange, bytes: &[u8]) -> Option<PageRange> {
    let first = unit.start().get() / CHUNK_PAGES;
    let last = unit.end().get().div_ceil(CHUNK_PAGES);
    (first..last)
        .map(|chunk| ChunkIndex::containing(PageIndex::new(chunk * CHUNK_PAGES)))
        .find_map(|chunk| {
            let expected = image.index().checksum(chunk)?;
            let pages = chunk.pages(image.pages());
            let start = usize::try_from(pages.offset().get() - unit.offset().get()).ok()?;
            let length = usize::try_from(pages.bytes()).ok()?;
            let same = bytes
                .get(start..start + length)
                .is_some_and(|bytes| xxh3_64(bytes) == expected);
            (!same).then_some(pages)
        })
}

/// Memory of this process that nobody touches but the install.
pub(crate) struct OwnMemory<'a, M> {
    pub(crate) uffd: &'a Uffd,
    pub(crate) memory: &'a M,
    pub(crate) tracking: Tracking,
}

impl<M: Addressed> PageOps for OwnMemory<'_, M> {
    fn copy(&mut self, pages: PageRange, source: &[u8]) -> Answer {
        sys::copy(self.uffd.as_fd(), self.memory, pages, source, self.tracking)
    }

    fn zero(&mut self, pages: PageRange) -> Answer {
        sys::zero(self.uffd.as_fd(), self.memory, pages)
    }

    fn poison(&mut self, pages: PageRange) -> Answer {
        sys::poison(self.uffd.as_fd(), self.memory, pages)
    }

    fn wake(&mut self, pages: PageRange) {
        sys::wake(self.uffd, self.memory, pages);
    }

    /// Nobody faults here: there is nothing to read.
    fn drain(&mut self) {}
}
