#![forbid(unsafe_code)]
//! Memory of one backend of a root, as a fork takes it over.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use super::UNIT_PAGES;
use crate::memory::CloneMemory;
use crate::page::{PageCount, PageIndex, PageRange};
use crate::sys::mmap::ServedMapping;

/// Memory of one backend, in the root and in each of its forks.
#[derive(Debug)]
pub struct RootMemory {
    pub(super) mapping: Arc<ServedMapping>,
    pub(super) pages: PageCount,
    /// Ranges with data that are not there, by number.
    pub(super) holes: BTreeSet<u64>,
    /// Pages that are there and are to be registered all the same.
    pub(super) served_too: Vec<PageRange>,
}

impl RootMemory {
    /// The pages of a range; none beyond the last.
    pub(super) fn unit(&self, number: u64) -> PageRange {
        let start = number.saturating_mul(UNIT_PAGES).min(self.pages.get());
        let count = UNIT_PAGES.min(self.pages.get() - start);
        PageRange::new(PageIndex::new(start), PageCount::new(count))
    }

    /// Whether no pager is needed: every page with data is there, and none of them is to be served.
    pub fn is_complete(&self) -> bool {
        self.holes.is_empty() && self.served_too.is_empty()
    }

    /// Pages that are missing and have data, and those that are served too, in ascending order.
    pub fn holes(&self) -> Vec<PageRange> {
        let holes = self.holes.iter().map(|&unit| self.unit(unit));
        let mut all: Vec<PageRange> = holes.chain(self.served_too.iter().copied()).collect();
        all.sort_by_key(|range| range.start());
        joined(&all)
    }

    /// Has a pager serve these pages too, which are there: they can be given back then.
    pub fn serve_too(&mut self, pages: impl IntoIterator<Item = PageRange>) {
        self.served_too.extend(pages);
    }

    /// Where it lies: address and bytes, the same in the root and in each of its forks.
    pub fn place(&self) -> (u64, u64) {
        (self.mapping.address() as u64, self.mapping.bytes())
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
        let holes = self.holes();
        Ok((self.mapping, holes))
    }
}

/// Neighbours made one.
pub(super) fn joined(ranges: &[PageRange]) -> Vec<PageRange> {
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
