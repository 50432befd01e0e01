#![forbid(unsafe_code)]
//! Memory of this process that a pager serves, of this process or elsewhere.
//!
//! It is registered here, before anything can touch it, with a userfaultfd of its own, which the
//! pager is given then. What touches the memory meanwhile sleeps until the pager serves it. Each
//! [`CloneMemory`] keeps a descriptor until it is unmapped, so nothing missing ever reads as zeros,
//! whatever becomes of the pager.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use userfaultfd::Uffd;

use crate::client::{ClientRegion, ImageId};
use crate::error::PagerError;
use crate::image::Image;
use crate::memory::CloneMemory;
use crate::page::{PageIndex, PageRange};
use crate::region::Region;
use crate::root_memory::RootMemory;
use crate::sys::discard_map::DiscardMap;
use crate::sys::mmap::ServedMapping;
use crate::sys::userfaultfd::{self as uffd_sys, Opened, Tracking};

/// Most regions of one image that was inherited. Where there are more, one region takes all in: pages
/// between them are there, and raise nothing.
const MAX_INHERITED: usize = 1024;

/// Memory that is registered and not served yet, image after image.
#[derive(Debug)]
pub struct Registration {
    uffd: Uffd,
    tracking: Tracking,
    /// All of each image's memory. The clone's to hold: what it dropped is not there here either.
    memories: Vec<Region>,
    regions: Vec<ClientRegion>,
    /// The map of discarded pages of the first image, and so the file of all.
    discards: Option<DiscardMap>,
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
        Ok(Self::of(opened))
    }

    /// Nothing yet, to be registered with this userfaultfd.
    pub(crate) fn of(opened: Opened) -> Self {
        Self {
            uffd: opened.uffd,
            tracking: opened.tracking,
            memories: Vec::new(),
            regions: Vec::new(),
            discards: None,
        }
    }

    /// Maps and registers memory for `image`. Nothing is read.
    pub fn map(&mut self, image: &Image) -> Result<CloneMemory, PagerError> {
        let mapping = map_registered(&self.uffd, self.tracking, image, ServedMapping::new)?;
        let whole = PageRange::new(PageIndex::default(), image.pages());
        self.keep(mapping, &[whole])
    }

    /// Registers the holes of memory that this process inherited from a root, so that nothing reads
    /// them as zeros. Comes before anything can touch the memory.
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
        for &run in &runs {
            let missing = uffd_sys::register(&self.uffd, &mapping, run, self.tracking);
            all_offered(image, missing.map_err(holes)?)?;
        }
        match (runs.first(), runs.last()) {
            (Some(first), Some(last)) if runs.len() > MAX_INHERITED => {
                let all = PageRange::between(first.start(), last.end());
                self.keep(mapping, &[all])
            }
            _ => self.keep(mapping, &runs),
        }
    }

    fn keep(
        &mut self,
        mapping: Arc<ServedMapping>,
        registered: &[PageRange],
    ) -> Result<CloneMemory, PagerError> {
        let own = uffd_sys::duplicate(&self.uffd).map_err(|source| PagerError::Setup {
            what: "a descriptor of the userfaultfd",
            source,
        })?;
        let image = ImageId::new(u32::try_from(self.memories.len()).unwrap_or(u32::MAX));
        let base = mapping.address() as u64;
        let regions = registered.iter().map(|&pages| ClientRegion {
            image,
            address: base + pages.offset().get(),
            pages,
        });
        self.regions.extend(regions);
        let memory = CloneMemory::new(mapping, own);
        self.memories.push(memory.region());
        Ok(memory)
    }

    /// From now on the clone may discard pages of all its memory for good (`CloneMemory::discard_to_zero`):
    /// whoever serves it is to be given the map ([`Self::discard_map`]). `memories` are in the order in which
    /// they were mapped or inherited.
    pub fn allow_discards<'a>(
        &mut self,
        memories: impl Iterator<Item = &'a mut CloneMemory>,
    ) -> Result<(), PagerError> {
        self.make_discard_maps(memories).map(|_| ())
    }

    /// The same; the maps.
    pub(crate) fn make_discard_maps<'a>(
        &mut self,
        memories: impl Iterator<Item = &'a mut CloneMemory>,
    ) -> Result<Vec<DiscardMap>, PagerError> {
        let images: Vec<_> = self
            .memories
            .iter()
            .map(|memory| memory.pages().count())
            .collect();
        let maps = DiscardMap::new(&images).map_err(|source| PagerError::Setup {
            what: "a map of discarded pages",
            source,
        })?;
        for (memory, map) in memories.zip(&maps) {
            memory.set_discards(map.clone());
        }
        self.discards = maps.first().cloned();
        Ok(maps)
    }

    /// The map of discarded pages, to be handed over: a file without a name; `None` where none may be.
    pub fn discard_map(&self) -> Option<BorrowedFd<'_>> {
        self.discards.as_ref().map(AsFd::as_fd)
    }

    /// Whether the kernel will know which pages were written.
    pub fn tracks_writes(&self) -> bool {
        self.tracking == Tracking::On
    }

    /// Where the images' pages are registered, in the order in which they came, which is how images
    /// are counted: what a pager is to be asked to serve.
    pub fn regions(&self) -> &[ClientRegion] {
        &self.regions
    }

    /// All of the memory of image number `image`.
    pub(crate) fn memory(&self, image: usize) -> Option<&Region> {
        self.memories.get(image)
    }

    pub(crate) fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    pub(crate) fn tracking(&self) -> Tracking {
        self.tracking
    }

    /// The userfaultfd, for a pager of this process.
    pub(crate) fn into_uffd(self) -> Uffd {
        self.uffd
    }
}

/// Maps memory for all of `image` by `new`, and registers it.
pub(crate) fn map_registered(
    uffd: &Uffd,
    tracking: Tracking,
    image: &Image,
    new: impl FnOnce(u64) -> io::Result<ServedMapping>,
) -> Result<Arc<ServedMapping>, PagerError> {
    let (id, bytes) = (|| image.id().to_owned(), image.bytes());
    if bytes == 0 {
        return Err(PagerError::Empty { image: id() });
    }
    let mapping = new(bytes).map_err(|source| PagerError::Map {
        image: id(),
        bytes,
        source,
    })?;
    let whole = PageRange::new(PageIndex::default(), image.pages());
    let missing = uffd_sys::register(uffd, &mapping, whole, tracking);
    let missing = missing.map_err(|source| PagerError::Register {
        image: id(),
        bytes,
        source,
    })?;
    all_offered(image, missing)?;
    Ok(Arc::new(mapping))
}

/// An error if the kernel does not offer all that serving takes.
fn all_offered(image: &Image, missing: Vec<&'static str>) -> Result<(), PagerError> {
    if missing.is_empty() {
        return Ok(());
    }
    let image = image.id().to_owned();
    Err(PagerError::Ioctls { image, missing })
}

impl AsFd for Registration {
    /// The userfaultfd, to be handed over.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}
