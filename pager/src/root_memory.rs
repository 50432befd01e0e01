#![forbid(unsafe_code)]
//! Memory of a root process, which its clones inherit by `fork`.
//!
//! The root fills its memory from the template before the first fork, 2 MiB at a time: a range
//! that has a page of data is filled whole, zeros and all, so that it can become one huge page,
//! which a fork shares at the cost of one page table entry. A range without data stays empty: the
//! kernel's own zeros are what the template holds there. What does not fit the budget, or cannot
//! be read, stays a hole; ranges that the working set knows are filled first. Between forks the root
//! fills more ranges where it is told that clones ask for them, in place of ranges that none is known
//! to need (`promotion`).
//!
//! A fork does not inherit the registration with userfaultfd: its holes would read as zeros
//! (userfaultfd(2), without `UFFD_FEATURE_EVENT_FORK`). So the type gives a clone its memory only
//! where nothing is missing, or to a pager that registers the holes first.

mod inherited;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use userfaultfd::Uffd;

use crate::error::PagerError;
use crate::image::{Image, PageKind};
use crate::install::{Content, install};
use crate::own_memory::{OwnMemory, read_proven};
use crate::page::{PAGE_BYTES, PageCount, PageIndex, PageRange};
use crate::promotion::{self, HoleDemand};
use crate::registration::map_registered;
use crate::sys::mmap::{HUGE_BYTES, ServedMapping};
use crate::sys::userfaultfd::{self as sys, Tracking};

pub use inherited::RootMemory;

/// Pages of one range that is filled, and collapsed, as a whole.
pub(crate) const UNIT_PAGES: u64 = HUGE_BYTES / PAGE_BYTES;

/// What a root filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Pages that it holds, for all its clones together.
    pub pages: u64,
    /// Pages of ranges with data that it does not hold: a pager brings them to its clones.
    pub hole_pages: u64,
    /// Ranges that could not be read or were not what the index says; holes, too.
    pub failed_ranges: u64,
    /// Holes that were filled because clones asked for them.
    pub promoted_ranges: u64,
}

/// A range of 2 MiB (the last may be shorter) of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RootRange {
    /// Which backend, in the machine's order.
    pub backend: u32,
    /// Which range of it, from 0.
    pub unit: u64,
}

/// What a root fills.
#[derive(Clone, Debug, Default)]
pub struct RootPlan {
    /// Most pages that it holds.
    pub budget_pages: u64,
    /// Whether each chunk is compared with the index first.
    pub verify: bool,
    /// Ranges to fill before all others, in this order: what clones are known to need.
    pub first: Vec<RootRange>,
}

/// All memory of a root process.
#[derive(Debug)]
pub struct Root {
    /// Kept while pages may still be read from them.
    images: Vec<Image>,
    plan: RootPlan,
    /// Ranges that clones are known to need: those of the plan, and those that were promoted.
    known: BTreeSet<RootRange>,
    /// Filled ranges that are not among them: what is given up for others, the last one first.
    unknown: BTreeSet<RootRange>,
    /// Ranges to promote, the next one first.
    promote: VecDeque<RootRange>,
    /// Empty between fills: a fork would copy what maps it.
    buffer: Vec<u8>,
    // Before the descriptor: with the last one closed, missing pages would read as zeros.
    memories: Vec<RootMemory>,
    /// Filled ranges that are not one huge page yet: backend and range.
    small: VecDeque<(usize, PageRange)>,
    filled: Filled,
    uffd: Uffd,
}

impl Root {
    /// Maps memory for `images` and fills it as `plan` says. `progress` hears of each range, with the
    /// pages that are filled so far.
    pub fn fill(
        images: Vec<Image>,
        plan: RootPlan,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, PagerError> {
        let uffd = sys::open(Tracking::Off)
            .map_err(PagerError::Userfaultfd)?
            .uffd;
        let mut root = Self {
            images: Vec::new(),
            known: plan.first.iter().copied().collect(),
            plan,
            unknown: BTreeSet::new(),
            promote: VecDeque::new(),
            buffer: Vec::new(),
            memories: Vec::new(),
            small: VecDeque::new(),
            filled: Filled::default(),
            uffd,
        };
        for image in &images {
            let memory = root.map_one(image)?;
            root.memories.push(memory);
        }
        root.images = images;
        for range in root.plan.first.clone() {
            root.fill_range(range);
            progress(root.filled.pages);
        }
        for range in root.ranges_with_data() {
            root.fill_range(range);
            progress(root.filled.pages);
        }
        root.count_holes();
        root.buffer = Vec::new();
        Ok(root)
    }

    /// Maps the memory of one backend; all of it with data is a hole.
    fn map_one(&self, image: &Image) -> Result<RootMemory, PagerError> {
        let mapping = map_registered(&self.uffd, Tracking::Off, image, ServedMapping::inherited)?;
        let with_data = units(image.pages())
            .enumerate()
            .filter(|(_, unit)| unit.iter().any(|page| is_data(image, page)))
            .map(|(number, _)| number as u64);
        Ok(RootMemory {
            mapping,
            pages: image.pages(),
            holes: with_data.collect(),
            served_too: Vec::new(),
        })
    }

    /// All holes, in order.
    fn ranges_with_data(&self) -> Vec<RootRange> {
        let backends = (0_u32..).zip(&self.memories);
        backends
            .flat_map(|(backend, memory)| {
                let holes = memory.holes.iter();
                holes.map(move |&unit| RootRange { backend, unit })
            })
            .collect()
    }

    fn count_holes(&mut self) {
        let pages = |memory: &RootMemory| -> u64 {
            let holes = memory.holes.iter();
            holes.map(|&unit| memory.unit(unit).count().get()).sum()
        };
        self.filled.hole_pages = self.memories.iter().map(pages).sum();
    }

    /// Fills a hole, if the budget has room for it. False if it stays one.
    fn fill_range(&mut self, range: RootRange) -> bool {
        let backend = usize::try_from(range.backend).unwrap_or(usize::MAX);
        let Some(memory) = self.memories.get(backend) else {
            return false;
        };
        let unit = memory.unit(range.unit);
        let count = unit.count().get();
        let is_hole = memory.holes.contains(&range.unit);
        if !is_hole || self.filled.pages + count > self.plan.budget_pages {
            return false;
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        let is_filled = self.fill_unit(backend, unit, &mut buffer);
        self.buffer = buffer;
        if !is_filled {
            self.filled.failed_ranges += 1;
            return false;
        }
        self.filled.pages += count;
        self.memories[backend].holes.remove(&range.unit);
        if !self.known.contains(&range) {
            self.unknown.insert(range);
        }
        if count == UNIT_PAGES {
            self.small.push_back((backend, unit));
        }
        true
    }

    /// Makes a filled range a hole for forks to come. False if it stays.
    fn drop_range(&mut self, range: RootRange) -> bool {
        let backend = usize::try_from(range.backend).unwrap_or(usize::MAX);
        let Some(memory) = self.memories.get_mut(backend) else {
            return false;
        };
        let unit = memory.unit(range.unit);
        // A hole first: no fork comes between, and one that came would ask for what is there.
        if let Err(error) = memory.mapping.discard(unit) {
            tracing::warn!(%unit, %error, "a range of a root stays, though another needs its room");
            return false;
        }
        memory.holes.insert(range.unit);
        self.unknown.remove(&range);
        self.filled.pages -= unit.count().get();
        self.small.retain(|&small| small != (backend, unit));
        true
    }

    /// Says how often clones asked pagers for pages of holes, by range. What is worth it is filled by
    /// [`Self::promote_next`].
    pub fn note_faults(&mut self, faults: &BTreeMap<RootRange, u64>) {
        let pages = |range: RootRange| {
            let memory = self.memories.get(usize::try_from(range.backend).ok()?)?;
            let is_hole = memory.holes.contains(&range.unit);
            is_hole.then(|| memory.unit(range.unit).count().get())
        };
        let holes = faults
            .iter()
            .filter_map(|(&range, &faults)| {
                let pages = pages(range)?;
                Some(HoleDemand {
                    range,
                    pages,
                    faults,
                })
            })
            .collect::<Vec<_>>();
        self.promote = promotion::worth_it(&holes).into();
    }

    /// Fills one more range that clones ask for, a few milliseconds of work, and gives up ranges that
    /// none is known to need where the budget asks for that; false when nothing is to be done.
    pub fn promote_next(&mut self) -> bool {
        let Some(range) = self.promote.pop_front() else {
            return false;
        };
        let Some(memory) = self
            .memories
            .get(usize::try_from(range.backend).unwrap_or(usize::MAX))
        else {
            return true;
        };
        let needed = self.filled.pages + memory.unit(range.unit).count().get();
        let excess = needed.saturating_sub(self.plan.budget_pages);
        for victim in promotion::victims(excess, self.unknown()) {
            self.drop_range(victim);
        }
        if self.fill_range(range) {
            self.known.insert(range);
            self.unknown.remove(&range);
            self.filled.promoted_ranges += 1;
        }
        self.count_holes();
        if self.promote.is_empty() {
            self.buffer = Vec::new();
        }
        true
    }

    /// Filled ranges that no clone is known to need, with their pages; the last ones first.
    fn unknown(&self) -> impl Iterator<Item = (RootRange, u64)> {
        self.unknown.iter().rev().filter_map(|&range| {
            let memory = self.memories.get(usize::try_from(range.backend).ok()?)?;
            Some((range, memory.unit(range.unit).count().get()))
        })
    }

    /// Reads, compares and installs one range. False, and nothing is there, if it cannot be had:
    /// whoever touches it meets the pager's error instead.
    fn fill_unit(&self, backend: usize, unit: PageRange, buffer: &mut Vec<u8>) -> bool {
        let (Some(image), Some(memory)) = (self.images.get(backend), self.memories.get(backend))
        else {
            return false;
        };
        if !read_proven(image, unit, buffer, self.plan.verify) {
            return false;
        }
        let mut place = OwnMemory {
            uffd: &self.uffd,
            memory: &*memory.mapping,
            tracking: Tracking::Off,
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

    /// In a fork: the memory, for a clone to be made of it. Files and descriptors of the root are closed;
    /// its lists are left as they are: to free them would copy their pages first.
    pub fn into_memories(self) -> Vec<RootMemory> {
        let Self {
            images,
            plan,
            known,
            unknown,
            promote,
            buffer,
            memories,
            small,
            filled: _,
            uffd,
        } = self;
        images.into_iter().for_each(Image::close);
        drop(uffd);
        std::mem::forget((plan, known, unknown, promote, buffer, small));
        memories
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

#[cfg(test)]
mod tests;
