#![forbid(unsafe_code)]
//! Installing what clones are known to need, before the pager serves and the guest runs: in bulk,
//! without a message and without a waiter.

use crate::handle::{Idle, Pager};
use crate::image::{CHUNK_PAGES, Image, PageKind};
use crate::install::{Content, install};
use crate::own_memory::{OwnMemory, read_proven};
use crate::page::{PAGE_BYTES, PageCount, PageIndex, PageRange};
use crate::residency::PageState;
use crate::working_set::Plan;

/// Pages that are read and installed at a time; a whole number of chunks.
const BATCH_PAGES: u64 = 64;

/// What was installed ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ahead {
    /// Pages that are there now.
    pub pages: u64,
    /// Pages without data that are mapped now.
    pub zero_pages: u64,
    /// Pages that could not be had; whoever touches them meets the pager's own tries.
    pub failed_pages: u64,
}

impl Pager<Idle> {
    /// Installs every page of `plan` in the memory that was attached, in the plan's order, its zero
    /// pages last. Images are counted as they were attached; pages of others are left out.
    pub fn install_ahead(&mut self, plan: &Plan) -> Ahead {
        let mut ahead = Ahead::default();
        let mut buffer = Vec::new();
        for run in plan.private.iter().chain(&plan.share).chain(&plan.whole) {
            let backend = usize::try_from(run.backend).unwrap_or(usize::MAX);
            for batch in batches(run.pages) {
                let done = self.install_batch(backend, batch, &mut buffer);
                ahead.pages += done;
                ahead.failed_pages += batch.count().get() - done;
            }
        }
        for run in &plan.zero {
            let backend = usize::try_from(run.backend).unwrap_or(usize::MAX);
            ahead.zero_pages += self.install_zeros(backend, run.pages);
        }
        ahead
    }

    /// Maps the kernel's zero page at `pages`, none of which has data. How many there are now.
    fn install_zeros(&mut self, backend: usize, pages: PageRange) -> u64 {
        let (uffd, tracking, regions) = self.for_installing();
        let Some(served) = regions.get_mut(backend) else {
            return 0;
        };
        if !are_zeros(served.image().image(), pages) {
            return 0;
        }
        let Some(memory) = served.pin() else {
            return 0;
        };
        let mut place = OwnMemory {
            uffd,
            memory: &memory,
            tracking,
        };
        let report = install(&mut place, pages, Content::Zero);
        let done = PageRange::new(pages.start(), PageCount::new(report.done()));
        served.set_all(done, PageState::Present);
        self.zeros_ahead(report.fresh);
        report.done()
    }

    /// How many pages of `batch`, from its first on, are there now.
    fn install_batch(&mut self, backend: usize, batch: PageRange, buffer: &mut Vec<u8>) -> u64 {
        let verify = self.verifies();
        let (uffd, tracking, regions) = self.for_installing();
        let Some(served) = regions.get_mut(backend) else {
            return 0;
        };
        let Some(memory) = served.pin() else {
            return 0;
        };
        let image = served.image().image();
        let read = batch.aligned(CHUNK_PAGES, image.pages());
        if !is_inside(image, batch) || !read_proven(image, read, buffer, verify) {
            return 0;
        }
        let before = (batch.start().get() - read.start().get()) * PAGE_BYTES;
        let bytes = usize::try_from(before).ok().and_then(|at| buffer.get(at..));
        let mut place = OwnMemory {
            uffd,
            memory: &memory,
            tracking,
        };
        let report = install(&mut place, batch, Content::Bytes(bytes.unwrap_or(&[])));
        let done = PageRange::new(batch.start(), PageCount::new(report.done()));
        served.set_all(done, PageState::Present);
        self.installed_ahead(report.fresh);
        report.done()
    }
}

pub(crate) fn is_inside(image: &Image, pages: PageRange) -> bool {
    pages.end().get() <= image.pages().get()
}

/// Whether `image` has all of `pages`, and no data in any of them.
pub(crate) fn are_zeros(image: &Image, pages: PageRange) -> bool {
    let has_data = |page| image.index().kind(page) == PageKind::Data;
    is_inside(image, pages) && !pages.iter().any(has_data)
}

/// Pieces that begin and end at multiples of [`BATCH_PAGES`], but for the ends of the whole.
pub(crate) fn batches(pages: PageRange) -> impl Iterator<Item = PageRange> {
    let (first, end) = (pages.start().get(), pages.end().get());
    (first / BATCH_PAGES..end.div_ceil(BATCH_PAGES)).map(move |batch| {
        let start = (batch * BATCH_PAGES).max(first);
        let stop = ((batch + 1) * BATCH_PAGES).min(end);
        PageRange::between(PageIndex::new(start), PageIndex::new(stop))
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::image::BackendIndex;
    use crate::options::PagerOptions;
    use crate::working_set::PlannedRun;

    #[test]
    fn planned_pages_are_there_before_anybody_asks() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for page in 0..200_u8 {
            file.write_all(&[page.max(1); 4096]).unwrap();
        }
        file.as_file().set_len(240 * 4096).unwrap();
        let index = BackendIndex::scan(file.as_file(), 240 * 4096, &mut |_, _| ()).unwrap();
        let image = Image::open(file.path(), "ram0", index).unwrap();
        let mut pager = Pager::new(PagerOptions::default()).unwrap();
        let memory = pager.attach(image).unwrap();
        let run = |start, count| PlannedRun {
            backend: 0,
            pages: PageRange::new(PageIndex::new(start), PageCount::new(count)),
            rank: 0,
        };
        let elsewhere = PlannedRun {
            backend: 9,
            ..run(0, 3)
        };
        let plan = Plan {
            private: vec![run(5, 130), elsewhere],
            share: vec![run(190, 10), run(230, 20)],
            // The first has data, the last reaches over the end.
            zero: vec![run(199, 2), run(205, 30), run(236, 10)],
            ..Plan::default()
        };
        let ahead = pager.install_ahead(&plan);
        assert_eq!((ahead.pages, ahead.failed_pages), (140, 23), "{ahead:?}");
        assert_eq!(ahead.zero_pages, 30);
        // Nobody serves: a page that is missing would hang.
        for page in [5, 6, 70, 134, 190, 199] {
            let byte = memory.mapping().touch(PageIndex::new(page)).unwrap();
            assert_eq!(u64::from(byte), page);
        }
        for page in [205, 234] {
            assert_eq!(memory.mapping().touch(PageIndex::new(page)).unwrap(), 0);
        }
        let pager = pager.serve().unwrap();
        assert_eq!(memory.mapping().touch(PageIndex::new(150)).unwrap(), 150);
        assert_eq!(memory.mapping().touch(PageIndex::new(6)).unwrap(), 6);
        let counts = pager.counts();
        assert_eq!((counts.faults, counts.pages_zero), (1, 30));
    }

    #[test]
    fn batches_cover_a_run_exactly() {
        let run = PageRange::between(PageIndex::new(60), PageIndex::new(200));
        let pieces: Vec<(u64, u64)> = batches(run)
            .map(|piece| (piece.start().get(), piece.end().get()))
            .collect();
        assert_eq!(pieces, [(60, 64), (64, 128), (128, 192), (192, 200)]);
    }
}
