#![forbid(unsafe_code)]
//! What a clone's memory shows when its recording ends: which pages it wrote, and which it had
//! unasked, so that no fault told of them.
//!
//! Where the pager tracks writes the kernel says which pages were written (PAGEMAP_SCAN). Elsewhere
//! a page that this process alone has is compared with the template: it was written if it differs.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use pando_pager::working_set::{Seen, Sight};
use pando_pager::{PageCount, PageIndex, PageRange};

use crate::memory::guest::{GuestRam, place};
use crate::observe::memory::ram::MemoryPlace;
use crate::sys::pagemap::{Categories, Entry, PAGE_BYTES, PageRun, Pagemap, Query};

/// Size of a page in bytes.
const PAGE: usize = 4096;
/// Runs of pages taken from the kernel at once.
const RUNS: usize = 512;
/// Entries of the page map read at once.
const ENTRIES: usize = 4096;
/// Most runs of pages that are told; beyond, what was seen is not complete.
pub const MAX_SEEN: usize = 1 << 16;

/// Pages of a backend that a clone had before it could ask for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unasked {
    /// Which backend, of those that the machine began with.
    pub backend: u32,
    /// Which of its pages.
    pub pages: PageRange,
}

/// What was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sights {
    /// Written pages first, then those that were there unasked.
    pub seen: Vec<Seen>,
    /// Whether that is all.
    pub is_complete: bool,
}

/// The pages that are there now: of a fork, before anything is installed in it, its root's.
pub fn present(map: &Pagemap, places: &[MemoryPlace]) -> io::Result<Vec<Unasked>> {
    let mut present = Vec::new();
    for (backend, place) in (0..).zip(places) {
        let mut keep = |pages: PageRange| present.push(Unasked { backend, pages });
        if map.can_scan()? {
            runs(map, place, &mut |run| {
                keep(pages_at(place, run.start..run.end));
                Ok(())
            })?;
        } else {
            entries(map, place, range_of(place), &mut |page, entry| {
                if entry.is_present() {
                    keep(PageRange::single(page));
                }
            })?;
        }
    }
    Ok(present)
}

/// Looks at the RAM of this process, whose pages are served from `template`. Compares at most
/// `max_compared` pages; where there are more, nothing is known of the rest.
pub fn look(
    ram: &GuestRam,
    template: &[File],
    unasked: &[Unasked],
    max_compared: usize,
) -> io::Result<Sights> {
    let map = Pagemap::of_self()?;
    let mut written = Written::default();
    let mut compare = Compare {
        ram,
        template,
        position: None,
        left: max_compared,
        is_complete: true,
    };
    let view = ram.view();
    for (backend, backing) in ram.first_backings().iter().enumerate() {
        let place = place(backing.as_deref());
        compare.position = backing
            .as_ref()
            .and_then(|backing| view.position_of(backing));
        let mut own = |map: &Pagemap, range: Range<u64>, written: &mut Written| {
            entries(map, &place, range, &mut |page, entry| {
                if entry.is_present() && entry.is_exclusive() && compare.differs(backend, page) {
                    written.add(backend, PageRange::single(page));
                }
            })
        };
        if map.can_scan()? {
            runs(&map, &place, &mut |run| {
                let range = run.start..run.end;
                if !run.categories.has(Categories::WRITE_TRACKED) {
                    return own(&map, range, &mut written);
                }
                if run.categories.has(Categories::WRITTEN) {
                    written.add(backend, pages_at(&place, range));
                }
                Ok(())
            })?;
        } else {
            own(&map, range_of(&place), &mut written)?;
        }
    }
    let sight = if compare.is_complete {
        Sight::Unwritten
    } else {
        Sight::Unknown
    };
    let unasked = unasked.iter().map(|unasked| Seen {
        image: unasked.backend,
        pages: unasked.pages,
        sight,
    });
    let mut seen: Vec<Seen> = written.runs;
    seen.extend(unasked);
    let is_complete = seen.len() <= MAX_SEEN;
    seen.truncate(MAX_SEEN);
    Ok(Sights { seen, is_complete })
}

/// Written pages, neighbours joined.
#[derive(Default)]
struct Written {
    runs: Vec<Seen>,
}

impl Written {
    fn add(&mut self, backend: usize, pages: PageRange) {
        let image = u32::try_from(backend).unwrap_or(u32::MAX);
        match self.runs.last_mut() {
            Some(last) if last.image == image && last.pages.end() == pages.start() => {
                last.pages = PageRange::between(last.pages.start(), pages.end());
            }
            _ => self.runs.push(Seen {
                image,
                pages,
                sight: Sight::Written,
            }),
        }
    }
}

/// Compares pages with the template.
struct Compare<'a> {
    ram: &'a GuestRam,
    template: &'a [File],
    /// Where the backend is among the machine's now.
    position: Option<usize>,
    left: usize,
    /// Whether every page that was to be compared was.
    is_complete: bool,
}

impl Compare<'_> {
    /// Whether a page differs from the template. What cannot be compared does not: it is a hint.
    fn differs(&mut self, backend: usize, page: PageIndex) -> bool {
        let offset = page.offset().get();
        let layout = self.ram.layout();
        let address = self
            .position
            .and_then(|at| layout.guest_address(at, offset));
        let (Some(file), Some(address)) = (self.template.get(backend), address) else {
            return false;
        };
        let Some(left) = self.left.checked_sub(1) else {
            self.is_complete = false;
            return false;
        };
        self.left = left;
        let (mut own, mut original) = ([0; PAGE], [0; PAGE]);
        file.read_exact_at(&mut original, offset).is_ok()
            && self.ram.read(address, &mut own).is_ok()
            && own != original
    }
}

fn range_of(place: &MemoryPlace) -> Range<u64> {
    place.address..place.address.saturating_add(place.bytes)
}

fn pages_at(place: &MemoryPlace, range: Range<u64>) -> PageRange {
    let first = range.start.saturating_sub(place.address) / PAGE_BYTES;
    let count = range.end.saturating_sub(range.start) / PAGE_BYTES;
    PageRange::new(PageIndex::new(first), PageCount::new(count))
}

/// Runs of anonymous pages in memory, without the zero page.
fn runs(
    map: &Pagemap,
    place: &MemoryPlace,
    found: &mut dyn FnMut(&PageRun) -> io::Result<()>,
) -> io::Result<()> {
    let query = Query {
        all: Categories::PRESENT,
        none: Categories::ZERO.and(Categories::FILE),
        tell: Categories::WRITE_TRACKED.and(Categories::WRITTEN),
        ..Query::default()
    };
    let mut runs = vec![PageRun::default(); RUNS];
    let Range { mut start, end } = range_of(place);
    while start < end {
        let (count, next) = map.scan(start..end, query, &mut runs)?;
        for run in &runs[..count] {
            found(run)?;
        }
        // A kernel that says nothing new must not keep us here.
        start = if next > start { next } else { end };
    }
    Ok(())
}

/// The entries of all pages in `range`, which lies in `place`.
fn entries(
    map: &Pagemap,
    place: &MemoryPlace,
    range: Range<u64>,
    found: &mut dyn FnMut(PageIndex, Entry),
) -> io::Result<()> {
    let mut some = vec![Entry::default(); ENTRIES];
    let mut at = range.start;
    while at < range.end {
        let left = usize::try_from((range.end - at) / PAGE_BYTES).unwrap_or(ENTRIES);
        let wanted = left.min(ENTRIES);
        let count = map.entries(at, &mut some[..wanted])?;
        if count == 0 {
            break;
        }
        let first = pages_at(place, at..at).start();
        for (entry, page) in some[..count].iter().zip(0..) {
            found(first.plus(page), *entry);
        }
        at += count as u64 * PAGE_BYTES;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::guest::RamBacking;
    use crate::memory::layout::RamLayout;

    #[test]
    fn what_differs_from_the_template_was_written_and_what_was_unasked_is_told() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 3 * 4096], 0).unwrap();
        file.set_len(6 * 4096).unwrap();
        let layout = RamLayout::new(&[6 * 4096]).unwrap();
        let backing = RamBacking::private(&file, 6 * 4096).unwrap();
        let ram = GuestRam::new(layout, vec![backing]).unwrap();
        ram.write(4096 + 9, b"x").unwrap();
        ram.write(2 * 4096, &[7]).unwrap();
        ram.write(3 * 4096, b"y").unwrap();
        ram.write(4 * 4096, b"z").unwrap();
        let pages = |start, count| PageRange::new(PageIndex::new(start), PageCount::new(count));
        let unasked = Unasked {
            backend: 0,
            pages: pages(0, 4),
        };
        let seen = |pages, sight| Seen {
            image: 0,
            pages,
            sight,
        };
        let sights = look(&ram, std::slice::from_ref(&file), &[unasked], 10).unwrap();
        let expected = [
            seen(pages(1, 1), Sight::Written),
            seen(pages(3, 2), Sight::Written),
            seen(pages(0, 4), Sight::Unwritten),
        ];
        assert_eq!(sights.seen, expected);
        // Not all could be compared: nobody knows of the rest.
        let sights = look(&ram, &[file], &[unasked], 2).unwrap();
        let expected = [
            seen(pages(1, 1), Sight::Written),
            seen(pages(0, 4), Sight::Unknown),
        ];
        assert_eq!(sights.seen, expected);
        assert!(sights.is_complete);
    }

    #[test]
    fn what_is_there_is_found() {
        let layout = RamLayout::new(&[64 * 4096]).unwrap();
        let ram = GuestRam::new(layout, vec![RamBacking::anonymous(64 * 4096).unwrap()]).unwrap();
        let places = ram.places();
        let map = Pagemap::of_self().unwrap();
        let found = |map: &Pagemap| -> u64 {
            let present = present(map, &places).unwrap();
            present.iter().map(|run| run.pages.count().get()).sum()
        };
        let before = found(&map);
        ram.write(5 * 4096, &[1; 2 * 4096]).unwrap();
        assert!(found(&map) >= before + 2);
    }
}
