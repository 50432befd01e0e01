#![forbid(unsafe_code)]
//! Installing what clones are known to need, before the pager serves and the guest runs: in bulk,
//! without a message and without a waiter.

use crate::image::{CHUNK_PAGES, Image, PageKind};
use crate::install::{Content, Installed, install};
use crate::metrics::{Metrics, Origin};
use crate::own_memory::{OwnMemory, read_proven};
use crate::page::{PAGE_BYTES, PageCount, PageIndex, PageRange};
use crate::region::Region;
use crate::registration::Registration;
use crate::working_set::{Plan, PlannedRun};

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

/// What bringing a plan came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Brought {
    pub(crate) ahead: Ahead,
    /// Pages that were not there before.
    pub(crate) fresh: u64,
    /// Pages without data that were not.
    pub(crate) fresh_zeros: u64,
}

impl Brought {
    pub(crate) fn count(&self, metrics: &Metrics) {
        metrics.installed(Origin::Cache, self.fresh);
        metrics.installed(Origin::Zero, self.fresh_zeros);
        metrics.ahead(self.fresh);
    }
}

impl Registration {
    /// Installs every page of `plan`, in the plan's order, its zero pages last, read from `images`,
    /// which are those that were registered. With `verify` each chunk is compared with its index
    /// first. Pages that cannot be had are left to the pager. `template` is the label in metrics.
    pub fn install_ahead(
        &self,
        images: &[Image],
        plan: &Plan,
        verify: bool,
        template: &str,
    ) -> Ahead {
        let brought = self.bring(plan, verify, |number| images.get(number), |_, _| ());
        if brought.fresh + brought.fresh_zeros > 0 {
            brought.count(&Metrics::new(template));
        }
        brought.ahead
    }

    /// The same. `image` gives images by number, `there` hears which pages of which are there.
    pub(crate) fn bring<'a>(
        &self,
        plan: &Plan,
        verify: bool,
        image: impl Fn(usize) -> Option<&'a Image>,
        mut there: impl FnMut(usize, PageRange),
    ) -> Brought {
        let mut brought = Brought::default();
        let mut buffer = Vec::new();
        for run in plan.private.iter().chain(&plan.share).chain(&plan.whole) {
            let number = number_of(run);
            for batch in batches(run.pages) {
                let report = image(number).map_or_else(Installed::default, |image| {
                    self.install_batch(number, image, batch, verify, &mut buffer)
                });
                there(number, first(batch, report.done()));
                brought.fresh += report.fresh;
                brought.ahead.pages += report.done();
                brought.ahead.failed_pages += batch.count().get() - report.done();
            }
        }
        for run in &plan.zero {
            let number = number_of(run);
            let report = image(number).map_or_else(Installed::default, |image| {
                self.install_zeros(number, image, run.pages)
            });
            there(number, first(run.pages, report.done()));
            brought.fresh_zeros += report.fresh;
            brought.ahead.zero_pages += report.done();
        }
        brought
    }

    /// Maps the kernel's zero page at `pages`, if none of them has data.
    fn install_zeros(&self, number: usize, image: &Image, pages: PageRange) -> Installed {
        if !are_zeros(image, pages) {
            return Installed::default();
        }
        self.install(number, pages, Content::Zero)
    }

    /// Reads `batch` and installs it from its first page on.
    fn install_batch(
        &self,
        number: usize,
        image: &Image,
        batch: PageRange,
        verify: bool,
        buffer: &mut Vec<u8>,
    ) -> Installed {
        let read = batch.aligned(CHUNK_PAGES, image.pages());
        if !is_inside(image, batch) || !read_proven(image, read, buffer, verify) {
            return Installed::default();
        }
        let before = (batch.start().get() - read.start().get()) * PAGE_BYTES;
        let bytes = usize::try_from(before).ok().and_then(|at| buffer.get(at..));
        self.install(number, batch, Content::Bytes(bytes.unwrap_or(&[])))
    }

    /// Nothing is done where the memory was dropped.
    fn install(&self, number: usize, pages: PageRange, content: Content<'_>) -> Installed {
        let Some(memory) = self.memory(number).and_then(Region::pin) else {
            return Installed::default();
        };
        let mut place = OwnMemory {
            uffd: self.uffd(),
            memory: &memory,
            tracking: self.tracking(),
        };
        install(&mut place, pages, content)
    }
}

fn number_of(run: &PlannedRun) -> usize {
    usize::try_from(run.backend).unwrap_or(usize::MAX)
}

/// The first `count` of `pages`.
fn first(pages: PageRange, count: u64) -> PageRange {
    PageRange::new(pages.start(), PageCount::new(count))
}

fn is_inside(image: &Image, pages: PageRange) -> bool {
    pages.end().get() <= image.pages().get()
}

/// Whether `image` has all of `pages`, and no data in any of them.
fn are_zeros(image: &Image, pages: PageRange) -> bool {
    let has_data = |page| image.index().kind(page) == PageKind::Data;
    is_inside(image, pages) && !pages.iter().any(has_data)
}

/// Pieces that begin and end at multiples of [`BATCH_PAGES`], but for the ends of the whole.
fn batches(pages: PageRange) -> impl Iterator<Item = PageRange> {
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
    use crate::handle::Pager;
    use crate::image::BackendIndex;
    use crate::memory::CloneMemory;
    use crate::options::PagerOptions;

    /// 200 pages whose first byte is their number (but for page 0), then 40 of zeros.
    fn image() -> Image {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for page in 0..200_u8 {
            file.write_all(&[page.max(1); 4096]).unwrap();
        }
        file.as_file().set_len(240 * 4096).unwrap();
        let index = BackendIndex::scan(file.as_file(), 240 * 4096, &mut |_, _| ()).unwrap();
        Image::open(file.path(), "ram0", index).unwrap()
    }

    fn plan() -> Plan {
        let run = |backend, start, count| PlannedRun {
            backend,
            pages: PageRange::new(PageIndex::new(start), PageCount::new(count)),
            rank: 0,
        };
        Plan {
            private: vec![run(0, 5, 130), run(9, 0, 3)],
            share: vec![run(0, 190, 10), run(0, 230, 20)],
            // The first has data, the last reaches over the end.
            zero: vec![run(0, 199, 2), run(0, 205, 30), run(0, 236, 10)],
            ..Plan::default()
        }
    }

    /// Nobody serves `memory`: a page that is missing would hang.
    fn is_there(ahead: Ahead, memory: &CloneMemory) {
        assert_eq!((ahead.pages, ahead.failed_pages), (140, 23), "{ahead:?}");
        assert_eq!(ahead.zero_pages, 30);
        for page in [5, 6, 70, 134, 190, 199] {
            let byte = memory.mapping().touch(PageIndex::new(page)).unwrap();
            assert_eq!(u64::from(byte), page);
        }
        for page in [205, 234] {
            assert_eq!(memory.mapping().touch(PageIndex::new(page)).unwrap(), 0);
        }
    }

    #[test]
    fn planned_pages_are_there_before_anybody_asks() {
        let mut pager = Pager::new(PagerOptions::default()).unwrap();
        let memory = pager.attach(image()).unwrap();
        is_there(pager.install_ahead(&plan()), &memory);
        let pager = pager.serve().unwrap();
        assert_eq!(memory.mapping().touch(PageIndex::new(150)).unwrap(), 150);
        assert_eq!(memory.mapping().touch(PageIndex::new(6)).unwrap(), 6);
        let counts = pager.counts();
        assert_eq!((counts.faults, counts.pages_zero), (1, 30));
    }

    #[test]
    fn planned_pages_are_there_and_the_others_wait_for_a_pager() {
        let images = [image()];
        let mut registration = Registration::new().unwrap();
        let memory = registration.map(&images[0]).unwrap();
        let region = registration.regions()[0];
        assert_eq!(region.address, memory.host_address() as u64);
        assert_eq!(
            (region.image.number(), region.pages.count().get()),
            (0, 240)
        );
        is_there(
            registration.install_ahead(&images, &plan(), true, "t"),
            &memory,
        );
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
