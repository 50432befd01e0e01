// UNSAFETY: a clone and its pager, perhaps in two processes, share one map of bits; memmap2 gives its
// address, and only atomic operations touch it.
#![expect(
    unsafe_code,
    reason = "atomic words in memory that two processes share"
)]
//! Which pages of a clone's memory were discarded: one bit each, in memory that clone and pager share.
//!
//! The clone sets a bit before it discards the page, and it is never taken back: from then on the page is
//! the clone's own, whatever the template has there. The pager reads the bit before it installs a page. It is a file
//! without a name that cannot shrink, so that neither side can make the other's reading fail.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};

use crate::page::{PageCount, PageIndex, PageRange};

const WORD_BYTES: u64 = 8;
const WORD_PAGES: u64 = 64;

/// The maps of a client, in one file: those of its images one behind the other.
#[derive(Debug)]
struct MapFile {
    mapping: MmapRaw,
    file: File,
}

/// The map of one image's pages.
#[derive(Debug, Clone)]
pub(crate) struct DiscardMap {
    maps: Arc<MapFile>,
    /// Where its words begin.
    first_word: u64,
    pages: PageCount,
}

impl DiscardMap {
    /// Maps of images of so many pages, none of which was discarded.
    pub(crate) fn new(images: &[PageCount]) -> io::Result<Vec<Self>> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("pando-discarded", flags)?);
        file.set_len(bytes_for(images))?;
        fcntl_add_seals(&file, seals() | SealFlags::SEAL)?;
        Self::map(file, images)
    }

    /// The maps that somebody else made for the same images.
    pub(crate) fn adopt(file: OwnedFd, images: &[PageCount]) -> io::Result<Vec<Self>> {
        let file = File::from(file);
        let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        if !fcntl_get_seals(&file)?.contains(seals()) {
            return Err(invalid("it could shrink"));
        }
        if file.metadata()?.len() != bytes_for(images) {
            return Err(invalid("it is of another size than the images"));
        }
        Self::map(file, images)
    }

    fn map(file: File, images: &[PageCount]) -> io::Result<Vec<Self>> {
        let length = usize::try_from(bytes_for(images))
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let mapping = MmapOptions::new().len(length).map_raw(&file)?;
        let maps = Arc::new(MapFile { mapping, file });
        let mut first_word = 0;
        let each = images.iter().map(|&pages| {
            let map = Self {
                maps: Arc::clone(&maps),
                first_word,
                pages,
            };
            first_word += words_for(pages);
            map
        });
        Ok(each.collect())
    }

    /// These pages are discarded now.
    pub(crate) fn insert(&self, pages: PageRange) {
        let mut page = pages.start().get();
        let end = pages.end().get().min(self.pages.get());
        while page < end {
            let first = page % WORD_PAGES;
            let count = (WORD_PAGES - first).min(end - page);
            let bits = if count == WORD_PAGES {
                u64::MAX
            } else {
                ((1 << count) - 1) << first
            };
            if let Some(word) = self.word(page / WORD_PAGES) {
                word.fetch_or(bits, Ordering::SeqCst);
            }
            page += count;
        }
    }

    /// Whether a page was ever discarded.
    pub(crate) fn contains(&self, page: PageIndex) -> bool {
        let word = (page.get() < self.pages.get()).then(|| self.word(page.get() / WORD_PAGES));
        word.flatten()
            .is_some_and(|word| word.load(Ordering::SeqCst) >> (page.get() % WORD_PAGES) & 1 != 0)
    }

    fn word(&self, number: u64) -> Option<&AtomicU64> {
        let number = self.first_word.checked_add(number)?;
        let offset = usize::try_from(number.checked_mul(WORD_BYTES)?).ok()?;
        let mapping = &self.maps.mapping;
        if offset >= mapping.len() {
            return None;
        }
        let word = mapping.as_mut_ptr().wrapping_add(offset).cast::<u64>();
        // SAFETY: the word lies in the mapping, which begins at a page, is a whole number of words long, and
        // is mapped as long as `self`; the file cannot shrink. Everybody who has it uses atomic words.
        Some(unsafe { AtomicU64::from_ptr(word) })
    }
}

impl AsFd for DiscardMap {
    /// The file of all maps, to be handed over.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.maps.file.as_fd()
    }
}

fn words_for(pages: PageCount) -> u64 {
    pages.get().div_ceil(WORD_PAGES)
}

fn bytes_for(images: &[PageCount]) -> u64 {
    let words: u64 = images.iter().map(|&pages| words_for(pages)).sum();
    words.max(1) * WORD_BYTES
}

fn seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_set_that_two_mappings_see(
            runs in prop::collection::vec((0u64..300, 0u64..140), 0..20),
        ) {
            let images = [PageCount::new(70), PageCount::new(257), PageCount::new(1)];
            let maps = DiscardMap::new(&images).unwrap();
            let file = maps[0].as_fd().try_clone_to_owned().unwrap();
            let others = DiscardMap::adopt(file, &images).unwrap();
            let (map, other) = (&maps[1], &others[1]);
            let mut model = [false; 512];
            for (start, count) in runs {
                map.insert(PageRange::new(PageIndex::new(start), PageCount::new(count)));
                for page in start..start + count {
                    model[usize::try_from(page).unwrap()] |= page < 257;
                }
            }
            for (page, &is_in) in (0..).zip(&model) {
                prop_assert_eq!(other.contains(PageIndex::new(page)), is_in, "{}", page);
                for neighbour in [&others[0], &others[2]] {
                    prop_assert!(!neighbour.contains(PageIndex::new(page)), "{}", page);
                }
            }
        }
    }

    #[test]
    fn a_file_that_could_shrink_or_is_too_small_is_refused() {
        let images = [PageCount::new(1000)];
        let plain = memfd_create("plain", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        let file = File::from(plain.try_clone().unwrap());
        file.set_len(bytes_for(&images)).unwrap();
        let refused = |file, images: &[PageCount]| {
            let refused = DiscardMap::adopt(file, images).unwrap_err();
            refused.to_string()
        };
        assert!(refused(plain, &images).contains("could shrink"));
        let maps = DiscardMap::new(&images).unwrap();
        let file = maps[0].as_fd().try_clone_to_owned().unwrap();
        assert!(refused(file, &[PageCount::new(1025)]).contains("another size"));
        let not_sealable = tempfile::tempfile().unwrap();
        DiscardMap::adopt(not_sealable.into(), &images).unwrap_err();
    }
}
