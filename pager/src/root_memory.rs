#![forbid(unsafe_code)]
//! Memory of a root process, which its clones inherit by `fork`.
//!
//! The root fills its memory from the template before the first fork, 2 MiB at a time: a range
//! that has a page of data is filled whole, zeros and all, so that it can become one huge page,
//! which a fork shares at the cost of one page table entry. A range without data stays empty: the
//! kernel's own zeros are what the template holds there. What does not fit the budget, or cannot
//! be read, stays a hole.
//!
//! A fork does not inherit the registration with userfaultfd: its holes would read as zeros
//! (userfaultfd(2), without `UFFD_FEATURE_EVENT_FORK`). So the type gives a clone its memory only
//! where nothing is missing, or to a pager that registers the holes first.

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use userfaultfd::Uffd;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::PagerError;
use crate::image::{CHUNK_PAGES, ChunkIndex, Image, PageKind};
use crate::install::{Content, PageOps, install};
use crate::memory::CloneMemory;
use crate::page::{PAGE_BYTES, PageCount, PageIndex, PageRange};
use crate::sys::mmap::{HUGE_BYTES, ServedMapping};
use crate::sys::userfaultfd::{self as sys, Answer};

/// Pages of one range that is filled, and collapsed, as a whole.
const UNIT_PAGES: u64 = HUGE_BYTES / PAGE_BYTES;

/// What a root filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Pages that it holds, for all its clones together.
    pub pages: u64,
    /// Pages of ranges with data that it does not hold: its clones' pagers bring them.
    pub hole_pages: u64,
    /// Ranges that could not be read or were not what the index says; holes, too.
    pub failed_ranges: u64,
}

/// Memory of one backend, in the root and in each of its forks.
#[derive(Debug)]
pub struct RootMemory {
    mapping: Arc<ServedMapping>,
    holes: Vec<PageRange>,
}

/// All memory of a root process.
#[derive(Debug)]
pub struct Root {
    // Before the descriptor: with the last one closed, missing pages would read as zeros.
    memories: Vec<RootMemory>,
    /// Filled ranges that are not one huge page yet: backend and range.
    small: VecDeque<(usize, PageRange)>,
    filled: Filled,
    uffd: Uffd,
}

impl Root {
    /// Maps memory for `images` and fills it, at most `budget_pages` of it; with `verify` each
    /// chunk is compared with the index first.
    pub fn fill(images: &[Image], budget_pages: u64, verify: bool) -> Result<Self, PagerError> {
        let (uffd, _) = sys::open().map_err(PagerError::Userfaultfd)?;
        let mut root = Self {
            memories: Vec::new(),
            small: VecDeque::new(),
            filled: Filled::default(),
            uffd,
        };
        let mut left = budget_pages;
        for (backend, image) in images.iter().enumerate() {
            let memory = root.fill_one(backend, image, &mut left, verify)?;
            root.memories.push(memory);
        }
        Ok(root)
    }

    fn fill_one(
        &mut self,
        backend: usize,
        image: &Image,
        left: &mut u64,
        verify: bool,
    ) -> Result<RootMemory, PagerError> {
        let (id, bytes) = (|| image.id().to_owned(), image.bytes());
        if bytes == 0 {
            return Err(PagerError::Empty { image: id() });
        }
        let map = |source| PagerError::Map {
            image: id(),
            bytes,
            source,
        };
        let mapping = ServedMapping::inherited(bytes).map_err(map)?;
        let missing =
            sys::register(&self.uffd, &mapping).map_err(|source| PagerError::Register {
                image: id(),
                bytes,
                source,
            })?;
        if !missing.is_empty() {
            let image = id();
            return Err(PagerError::Ioctls { image, missing });
        }
        let mut holes = Vec::new();
        let mut buffer = Vec::new();
        for unit in units(image.pages()) {
            if !unit.iter().any(|page| is_data(image, page)) {
                continue;
            }
            let count = unit.count().get();
            let fits = count <= *left;
            if fits && self.fill_unit(image, &mapping, unit, &mut buffer, verify) {
                *left -= count;
                self.filled.pages += count;
                if count == UNIT_PAGES {
                    self.small.push_back((backend, unit));
                }
            } else {
                self.filled.hole_pages += count;
                self.filled.failed_ranges += u64::from(fits);
                holes.push(unit);
            }
        }
        Ok(RootMemory {
            mapping: Arc::new(mapping),
            holes: joined(&holes),
        })
    }

    /// Reads, compares and installs one range. False, and nothing is there, if it cannot be had:
    /// whoever touches it meets the pager's error instead.
    fn fill_unit(
        &self,
        image: &Image,
        mapping: &ServedMapping,
        unit: PageRange,
        buffer: &mut Vec<u8>,
        verify: bool,
    ) -> bool {
        if !read_proven(image, unit, buffer, verify) {
            return false;
        }
        let mut place = OwnMemory {
            uffd: &self.uffd,
            mapping,
        };
        let report = install(&mut place, unit, Content::Bytes(buffer));
        if let Some(stopped) = report.stopped {
            tracing::warn!(image = image.id(), %unit, ?stopped, "a root leaves out pages that cannot be installed");
            // What was installed of it is right; the rest is missing here and in every fork.
            return false;
        }
        true
    }

    /// What it holds.
    pub fn filled(&self) -> Filled {
        self.filled
    }

    /// Where each backend lies: address and bytes, the same in every fork.
    pub fn places(&self) -> Vec<(u64, u64)> {
        let memories = self.memories.iter();
        memories
            .map(|memory| (memory.mapping.address() as u64, memory.mapping.bytes()))
            .collect()
    }

    /// Makes one more filled range a huge page, some milliseconds of work; false when all were
    /// tried. A kernel that will not (no THP, no memory) leaves them small, which costs forks time.
    pub fn collapse_next(&mut self) -> bool {
        let Some((backend, range)) = self.small.pop_front() else {
            return false;
        };
        if let Some(memory) = self.memories.get(backend)
            && let Err(error) = memory.mapping.collapse(range)
        {
            tracing::debug!(%range, %error, "a range of a root stays small pages");
        }
        true
    }

    /// In a fork: the memory, for a clone to be made of it.
    pub fn into_memories(self) -> Vec<RootMemory> {
        self.memories
    }
}

impl RootMemory {
    /// Whether every page with data is there.
    pub fn is_complete(&self) -> bool {
        self.holes.is_empty()
    }

    /// The memory of a clone that needs no pager; gives it back if pages are missing.
    pub fn into_complete(self) -> Result<CloneMemory, Self> {
        if !self.is_complete() {
            return Err(self);
        }
        if let Err(error) = self.mapping.keep_small_and_own() {
            tracing::warn!(%error, "memory of a clone keeps the advice of its root");
        }
        Ok(CloneMemory::complete(self.mapping))
    }

    /// The mapping and its holes, for a pager to register.
    pub(crate) fn into_parts(self) -> io::Result<(Arc<ServedMapping>, Vec<PageRange>)> {
        self.mapping.keep_small_and_own()?;
        Ok((self.mapping, self.holes))
    }
}

/// The ranges of an image; the last may be short.
fn units(pages: PageCount) -> impl Iterator<Item = PageRange> {
    (0..pages.get().div_ceil(UNIT_PAGES)).map(move |unit| {
        let start = unit * UNIT_PAGES;
        let count = UNIT_PAGES.min(pages.get() - start);
        PageRange::new(PageIndex::new(start), PageCount::new(count))
    })
}

fn is_data(image: &Image, page: PageIndex) -> bool {
    image.index().kind(page) == PageKind::Data
}

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

/// Neighbours made one.
fn joined(ranges: &[PageRange]) -> Vec<PageRange> {
    let mut all: Vec<PageRange> = Vec::new();
    for &range in ranges {
        match all.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = PageRange::between(last.start(), range.end());
            }
            _ => all.push(range),
        }
    }
    all
}

/// Memory of this process that nobody touches but the install.
pub(crate) struct OwnMemory<'a> {
    pub(crate) uffd: &'a Uffd,
    pub(crate) mapping: &'a ServedMapping,
}

impl PageOps for OwnMemory<'_> {
    fn copy(&mut self, pages: PageRange, source: &[u8]) -> Answer {
        use std::os::fd::AsFd;
        sys::copy(self.uffd.as_fd(), self.mapping, pages, source)
    }

    fn zero(&mut self, pages: PageRange) -> Answer {
        use std::os::fd::AsFd;
        sys::zero(self.uffd.as_fd(), self.mapping, pages)
    }

    fn poison(&mut self, pages: PageRange) -> Answer {
        use std::os::fd::AsFd;
        sys::poison(self.uffd.as_fd(), self.mapping, pages)
    }

    fn wake(&mut self, pages: PageRange) {
        sys::wake(self.uffd, self.mapping, pages);
    }

    /// Nobody faults here: there is nothing to read.
    fn drain(&mut self) {}
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::image::BackendIndex;

    const UNITS: u64 = 6;

    /// Six ranges: data in 0 (one page), 2 (all) and 5 (short, last page); zeros elsewhere.
    fn image() -> (tempfile::NamedTempFile, Image) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let pages = UNITS * UNIT_PAGES - 100;
        let mut bytes = vec![0_u8; usize::try_from(pages * PAGE_BYTES).unwrap()];
        let mut put = |page: u64, value: u8| {
            let start = usize::try_from(page * PAGE_BYTES).unwrap();
            bytes[start..start + 4096].fill(value);
        };
        put(7, 1);
        (2 * UNIT_PAGES..3 * UNIT_PAGES).for_each(|page| put(page, 2));
        put(pages - 1, 3);
        file.write_all(&bytes).unwrap();
        let index = BackendIndex::scan(file.as_file(), bytes.len() as u64, &mut |_, _| ()).unwrap();
        let image = Image::open(file.path(), "ram0", index).unwrap();
        (file, image)
    }

    fn byte(memory: &RootMemory, page: u64) -> u8 {
        memory.mapping.touch(PageIndex::new(page)).unwrap()
    }

    #[test]
    fn a_root_holds_what_has_data_and_leaves_the_rest_to_the_kernel() {
        let (_file, image) = image();
        let mut root = Root::fill(&[image], u64::MAX, true).unwrap();
        let expected = Filled {
            pages: 3 * UNIT_PAGES - 100,
            ..Filled::default()
        };
        assert_eq!(root.filled(), expected);
        while root.collapse_next() {}
        let memory = &root.memories[0];
        assert!(memory.is_complete());
        let last = UNITS * UNIT_PAGES - 101;
        let seen: Vec<u8> = [7, 8, 2 * UNIT_PAGES, 3 * UNIT_PAGES - 1, last]
            .map(|page| byte(memory, page))
            .to_vec();
        assert_eq!(seen, [1, 0, 2, 2, 3]);
    }

    #[test]
    fn what_is_beyond_the_budget_or_damaged_is_a_hole() {
        let (file, image) = image();
        let root = Root::fill(&[image], UNIT_PAGES + 5, true).unwrap();
        // The first range fits, the second does not, nor does the last.
        assert_eq!(root.filled().pages, UNIT_PAGES);
        assert_eq!(root.filled().hole_pages, 2 * UNIT_PAGES - 100);
        assert_eq!(root.memories[0].holes.len(), 2);
        drop(root);
        // One byte of the second range is another now.
        let index = {
            let file = std::fs::File::open(file.path()).unwrap();
            let bytes = file.metadata().unwrap().len();
            BackendIndex::scan(&file, bytes, &mut |_, _| ()).unwrap()
        };
        let offset = 2 * HUGE_BYTES + 12345;
        file.as_file().write_all_at(&[9], offset).unwrap();
        let image = Image::open(file.path(), "ram0", index).unwrap();
        let root = Root::fill(&[image], u64::MAX, true).unwrap();
        assert_eq!(root.filled().failed_ranges, 1);
        assert_eq!(root.filled().hole_pages, UNIT_PAGES);
        let range = PageRange::new(PageIndex::new(2 * UNIT_PAGES), PageCount::new(UNIT_PAGES));
        assert_eq!(root.memories[0].holes, [range]);
        let memory = root.into_memories().remove(0);
        memory.into_complete().unwrap_err();
    }

    #[test]
    fn neighbours_are_one_range() {
        let range = |start, count| PageRange::new(PageIndex::new(start), PageCount::new(count));
        let all = joined(&[range(0, 2), range(2, 3), range(9, 1)]);
        assert_eq!(all, [range(0, 5), range(9, 1)]);
    }
}
