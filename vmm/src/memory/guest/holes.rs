#![forbid(unsafe_code)]
//! Where memory has nothing: what is read there is zero, and costs to be read.

use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, fstatfs, seek};
use rustix::io::Errno;

use super::{GuestRam, RamBacking, SharedMapping};
use crate::memory::layout::PAGE_BYTES;
use crate::sys::pagemap::{Entry, Pagemap};

/// `TMPFS_MAGIC` of `linux/magic.h`, which memfds have as well.
const TMPFS: u64 = 0x0102_1994;

/// Entries of the page map that are looked at at once: those of 2 MiB.
const ENTRIES: usize = 512;

impl RamBacking {
    /// The first bytes from `offset_bytes` on that can be other than zero; `None` where there are none.
    ///
    /// In files they are looked for only where to read a hole is to have memory for it from then on: in files
    /// that are memory (tmpfs, memfd). There the file knows at once what is written to its mapping, unlike elsewhere.
    fn next_data(&self, offset_bytes: u64) -> Option<Range<u64>> {
        let all = offset_bytes..self.bytes();
        match self {
            Self::Anonymous(_) => self.next_of_pages(all.clone()).unwrap_or(Some(all)),
            Self::Shared(shared) if shared.is_in_memory() => shared.next_data(all),
            // What a pager brings, or a file that is mapped, is found by looking.
            Self::Shared(_) | Self::Rom(_) | Self::Private(_) | Self::Paged(_) => Some(all),
        }
    }

    /// The same of private anonymous memory: a page that was never written is nowhere.
    fn next_of_pages(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let map = Pagemap::of_self()?;
        let host = self.host_address() as u64;
        let is_there = |entry: &Entry| entry.is_present() || entry.is_swapped();
        let mut entries = vec![Entry::default(); ENTRIES];
        let mut at = range.start - range.start % PAGE_BYTES;
        while at < range.end {
            let left = usize::try_from((range.end - at).div_ceil(PAGE_BYTES)).unwrap_or(ENTRIES);
            let most = left.min(ENTRIES);
            let count = map.entries(host + at, &mut entries[..most])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let found = &entries[..count];
            if let Some(first) = found.iter().position(is_there) {
                let pages = found[first..].iter().take_while(|entry| is_there(entry));
                let start = at + first as u64 * PAGE_BYTES;
                let end = start + pages.count() as u64 * PAGE_BYTES;
                return Ok(Some(start.max(range.start)..end));
            }
            at += count as u64 * PAGE_BYTES;
        }
        Ok(None)
    }
}

impl SharedMapping {
    fn is_in_memory(&self) -> bool {
        let facts = fstatfs(self.file.file());
        facts.is_ok_and(|facts| u64::try_from(facts.f_type) == Ok(TMPFS))
    }

    fn next_data(&self, all: Range<u64>) -> Option<Range<u64>> {
        let (file, start) = (self.file.file(), self.file.start());
        let find = |from: SeekFrom| seek(file, from).map(|at| at.saturating_sub(start));
        match find(SeekFrom::Data(start.saturating_add(all.start))) {
            Ok(first) => match find(SeekFrom::Hole(start.saturating_add(first))) {
                Ok(end) => Some(first..end),
                Err(_) => Some(first..all.end),
            },
            // Nothing but a hole to its end.
            Err(Errno::NXIO) => None,
            Err(_) => Some(all),
        }
    }
}

impl GuestRam {
    /// The first bytes of a backend from `offset_bytes` on that can be other than zero, without having memory
    /// for those before them; `None` where there are none. They may end behind the backend.
    pub fn next_data(&self, backend: usize, offset_bytes: u64) -> Option<Range<u64>> {
        let data = self
            .view()
            .backings()
            .get(backend)?
            .next_data(offset_bytes)?;
        (!data.is_empty()).then_some(data)
    }
}
