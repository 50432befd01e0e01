#![forbid(unsafe_code)]
//! Memory of this process that a pager elsewhere serves.
//!
//! It is registered here, before anything can touch it, with a userfaultfd of its own, which is
//! then handed over. What touches the memory meanwhile sleeps until the pager serves it. Each
//! [`CloneMemory`] keeps a descriptor until it is unmapped, so nothing missing ever reads as zeros,
//! whatever becomes of the pager.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};

use userfaultfd::Uffd;

use crate::ahead::{Ahead, are_zeros, batches, is_inside};
use crate::error::PagerError;
use crate::image::{CHUNK_PAGES, Image};
use crate::install::{Content, install};
use crate::memory::CloneMemory;
use crate::metrics::{Metrics, Origin};
use crate::own_memory::{OwnMemory, read_proven};
use crate::page::{PAGE_BYTES, PageIndex, PageRange};
use crate::root_memory::RootMemory;
use crate::sys::mmap::ServedMapping;
use crate::sys::userfaultfd::{self as uffd_sys, Tracking};
use crate::working_set::Plan;

/// Where pages of an image are registered in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisteredPlace {
    /// Which image: they are counted from 0 as they came.
    pub image: u32,
    /// Address of the first of the pages.
    pub address: u64,
    /// Which pages.
    pub pages: PageRange,
}

/// Most places of one image that was inherited. Where there are more, one place takes all in: pages
/// between them are there, and raise nothing.
const MAX_PLACES: usize = 1024;

/// Memory that is registered and not served yet, image after image.
#[derive(Debug)]
pub struct Registration {
    uffd: Uffd,
    tracking: Tracking,
    // The clone's to hold: dropped memory is dropped here too.
    mappings: Vec<Weak<ServedMapping>>,
    places: Vec<RegisteredPlace>,
}

impl Registration {
    /// Gets a userfaultfd.
    pub fn new() -> Result<Self, PagerError> {
        Self::with(Tracking::Off)
    }

    /// The same; and the kernel will know which pages were written, where it can: see
    /// `PagerOptions::track_writes`.
    pub fn tracking_writes() -> Result<Self, PagerError> {
        Self::with(Tracking::On)
    }

    fn with(wanted: Tracking) -> Result<Self, PagerError> {
        let opened = uffd_sys::open(wanted).map_err(PagerError::Userfaultfd)?;
        Ok(Self {
            uffd: opened.uffd,
            tracking: if opened.tracks {
                Tracking::On
            } else {
                Tracking::Off
            },
            mappings: Vec::new(),
            places: Vec::new(),
        })
    }

    /// Maps and registers memory for `image`.
    pub fn map(&mut self, image: &Image) -> Result<CloneMemory, PagerError> {
        let bytes = image.bytes();
        if bytes == 0 {
            let image = image.id().to_owned();
            return Err(PagerError::Empty { image });
        }
        let map = |source| PagerError::Map {
            image: image.id().to_owned(),
            bytes,
            source,
        };
        let mapping = Arc::new(ServedMapping::new(bytes).map_err(map)?);
        let whole = PageRange::new(PageIndex::default(), image.pages());
        let missing = uffd_sys::register(&self.uffd, &mapping, whole, self.tracking);
        let missing = missing.map_err(|source| PagerError::Register {
            image: image.id().to_owned(),
            bytes,
            source,
        })?;
        self.keep(image, mapping, &[whole], missing)
    }

    /// Registers the holes of memory that this process inherited from a root.
    pub fn inherit(
        &mut self,
        image: &Image,
        memory: RootMemory,
    ) -> Result<CloneMemory, PagerError> {
        let holes = |source| PagerError::Holes {
            image: image.id().to_owned(),
            source,
        };
        let (mapping, runs) = memory.into_parts().map_err(holes)?;
        let mut missing = Vec::new();
        for &run in &runs {
            let found = uffd_sys::register(&self.uffd, &mapping, run, self.tracking);
            missing.extend(found.map_err(holes)?);
        }
        match (runs.first(), runs.last()) {
            (Some(first), Some(last)) if runs.len() > MAX_PLACES => {
                let all = PageRange::between(first.start(), last.end());
                self.keep(image, mapping, &[all], missing)
            }
            _ => self.keep(image, mapping, &runs, missing),
        }
    }

    fn keep(
        &mut self,
        image: &Image,
        mapping: Arc<ServedMapping>,
        registered: &[PageRange],
        missing: Vec<&'static str>,
    ) -> Result<CloneMemory, PagerError> {
        if !missing.is_empty() {
            let image = image.id().to_owned();
            return Err(PagerError::Ioctls { image, missing });
        }
        let own = uffd_sys::duplicate(&self.uffd).map_err(|source| PagerError::Setup {
            what: "a descriptor of the userfaultfd",
            source,
        })?;
        let number = u32::try_from(self.mappings.len()).unwrap_or(u32::MAX);
        self.mappings.push(Arc::downgrade(&mapping));
        self.places
            .extend(registered.iter().map(|&pages| RegisteredPlace {
                image: number,
                address: mapping.address() as u64 + pages.offset().get(),
                pages,
            }));
        Ok(CloneMemory::new(mapping, own))
    }

    /// Whether the kernel will know which pages were written.
    pub fn tracks_writes(&self) -> bool {
        self.tracking == Tracking::On
    }

    /// Where the images' pages are registered, in the order in which they came.
    pub fn places(&self) -> &[RegisteredPlace] {
        &self.places
    }

    /// Installs every page of `plan`, in the plan's order, read from `images`, which are those that
    /// were mapped. With `verify` each chunk is compared with its index first. Pages that cannot be
    /// had are left to the pager. `template` is the label in metrics.
    pub fn install_ahead(
        &self,
        images: &[Image],
        plan: &Plan,
        verify: bool,
        template: &str,
    ) -> Ahead {
        let mut ahead = Ahead::default();
        let (mut fresh, mut buffer) = (0, Vec::new());
        for run in plan.private.iter().chain(&plan.share).chain(&plan.whole) {
            let backend = usize::try_from(run.backend).unwrap_or(usize::MAX);
            let mapping = self.mappings.get(backend).and_then(Weak::upgrade);
            for batch in batches(run.pages) {
                let done = match (images.get(backend), &mapping) {
                    (Some(image), Some(mapping)) => {
                        self.install_batch(image, mapping, batch, verify, &mut buffer)
                    }
                    _ => (0, 0),
                };
                fresh += done.1;
                ahead.pages += done.0;
                ahead.failed_pages += batch.count().get() - done.0;
            }
        }
        let mut fresh_zeros = 0;
        for run in &plan.zero {
            let backend = usize::try_from(run.backend).unwrap_or(usize::MAX);
            let mapping = self.mappings.get(backend).and_then(Weak::upgrade);
            if let (Some(image), Some(mapping)) = (images.get(backend), &mapping) {
                let done = self.install_zeros(image, mapping, run.pages);
                ahead.zero_pages += done.0;
                fresh_zeros += done.1;
            }
        }
        if fresh + fresh_zeros > 0 {
            let metrics = Metrics::new(template);
            metrics.installed(Origin::Cache, fresh);
            metrics.installed(Origin::Zero, fresh_zeros);
            metrics.ahead(fresh);
        }
        ahead
    }

    /// Maps the kernel's zero page at `pages`, none of which has data. How many are there now, and
    /// how many of them were not before.
    fn install_zeros(
        &self,
        image: &Image,
        mapping: &ServedMapping,
        pages: PageRange,
    ) -> (u64, u64) {
        if !are_zeros(image, pages) {
            return (0, 0);
        }
        let mut place = OwnMemory {
            uffd: &self.uffd,
            memory: mapping,
            tracking: self.tracking,
        };
        let report = install(&mut place, pages, Content::Zero);
        (report.done(), report.fresh)
    }

    /// How many pages of `batch`, from its first on, are there now, and how many of them were not
    /// before.
    fn install_batch(
        &self,
        image: &Image,
        mapping: &ServedMapping,
        batch: PageRange,
        verify: bool,
        buffer: &mut Vec<u8>,
    ) -> (u64, u64) {
        let read = batch.aligned(CHUNK_PAGES, image.pages());
        if !is_inside(image, batch) || !read_proven(image, read, buffer, verify) {
            return (0, 0);
        }
        let before = (batch.start().get() - read.start().get()) * PAGE_BYTES;
        let bytes = usize::try_from(before).ok().and_then(|at| buffer.get(at..));
        let mut place = OwnMemory {
            uffd: &self.uffd,
            memory: mapping,
            tracking: self.tracking,
        };
        let report = install(&mut place, batch, Content::Bytes(bytes.unwrap_or(&[])));
        (report.done(), report.fresh)
    }
}

impl AsFd for Registration {
    /// The userfaultfd, to be handed over.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::image::BackendIndex;
    use crate::page::PageCount;
    use crate::working_set::PlannedRun;

    #[test]
    fn planned_pages_are_there_and_the_others_wait_for_a_pager() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for page in 0..200_u8 {
            file.write_all(&[page.max(1); 4096]).unwrap();
        }
        let index = BackendIndex::scan(file.as_file(), 200 * 4096, &mut |_, _| ()).unwrap();
        let images = [Image::open(file.path(), "ram0", index).unwrap()];
        let mut registration = Registration::new().unwrap();
        let memory = registration.map(&images[0]).unwrap();
        let place = registration.places()[0];
        assert_eq!(place.address, memory.host_address() as u64);
        assert_eq!((place.image, place.pages.count().get()), (0, 200));
        let run = |backend, start, count| PlannedRun {
            backend,
            pages: PageRange::new(PageIndex::new(start), PageCount::new(count)),
            rank: 0,
        };
        let plan = Plan {
            private: vec![run(0, 5, 130), run(9, 0, 3)],
            share: vec![run(0, 190, 10), run(0, 195, 20)],
            ..Plan::default()
        };
        let ahead = registration.install_ahead(&images, &plan, true, "t");
        assert_eq!((ahead.pages, ahead.failed_pages), (140, 23), "{ahead:?}");
        for page in [5, 70, 134, 199] {
            let byte = memory.mapping().touch(PageIndex::new(page)).unwrap();
            assert_eq!(u64::from(byte), page);
        }
    }
}
