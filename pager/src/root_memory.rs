#![forbid(unsafe_code)]
//! Memory of a root process, which its clones inherit by `fork`.
//!
//! The kernel shares what is filled, copy-on-write. It does not hand a registration on: in a fork
//! every hole would read as zeros (userfaultfd(2), without `UFFD_FEATURE_EVENT_FORK`). So the type
//! has no way to a clone's memory but through [`register`], which each process calls for itself
//! before anything can touch the memory.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::error::PagerError;
use crate::memory::CloneMemory;
use crate::page::PageRange;
use crate::sys::mmap::ServedMapping;
use crate::sys::userfaultfd as uffd_sys;

/// Memory of one backend, as long as its process is a root.
#[derive(Debug)]
pub struct RootMemory {
    image: String,
    mapping: Arc<ServedMapping>,
}

/// A userfaultfd of this process with all of its memory registered.
#[derive(Debug)]
pub struct Registration {
    /// Non-blocking, close-on-exec. With its last descriptor closed, holes read as zeros: whoever
    /// has the memory keeps one.
    pub uffd: OwnedFd,
    /// It can mark pages as unreadable (`UFFDIO_POISON`).
    pub poison: bool,
}

impl RootMemory {
    /// Maps `bytes` of untouched memory for backend `image`.
    pub fn new(image: &str, bytes: u64) -> Result<Self, PagerError> {
        let image = image.to_owned();
        if bytes == 0 {
            return Err(PagerError::Empty { image });
        }
        match ServedMapping::inherited(bytes) {
            Ok(mapping) => Ok(Self {
                image,
                mapping: Arc::new(mapping),
            }),
            Err(source) => Err(PagerError::Map {
                image,
                bytes,
                source,
            }),
        }
    }

    /// First address; the same in every process that inherits it.
    pub fn address(&self) -> u64 {
        self.mapping.address() as u64
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.bytes()
    }

    /// Puts a huge page where 2 MiB of pages are, all of them filled. A range with a hole or a
    /// mapped zero page stays as it is and is an error (`EBUSY`, or `EINVAL`).
    pub fn collapse(&self, pages: PageRange) -> io::Result<()> {
        self.mapping.collapse(pages)
    }
}

/// Registers `memories` with a new userfaultfd of this process.
///
/// In a fork this must come before anything can touch the memory, KVM included.
pub fn register(memories: &[RootMemory]) -> Result<Registration, PagerError> {
    let (uffd, poison) = uffd_sys::open().map_err(PagerError::Userfaultfd)?;
    for memory in memories {
        let missing =
            uffd_sys::register(&uffd, &memory.mapping).map_err(|source| PagerError::Register {
                image: memory.image.clone(),
                bytes: memory.bytes(),
                source,
            })?;
        if !missing.is_empty() {
            let image = memory.image.clone();
            return Err(PagerError::Ioctls { image, missing });
        }
    }
    // A second descriptor: the crate's `into_raw_fd` gives one away that it closes.
    let uffd = uffd_sys::duplicate(&uffd).map_err(|source| PagerError::Setup {
        what: "a descriptor of the userfaultfd",
        source,
    })?;
    Ok(Registration { uffd, poison })
}

/// Makes the memory that a fork inherited the memory of a clone. `registration` is the fork's own.
pub fn into_clone(
    memories: Vec<RootMemory>,
    registration: &Registration,
) -> Result<Vec<CloneMemory>, PagerError> {
    let setup = |source| PagerError::Setup {
        what: "the memory of a fork",
        source,
    };
    memories
        .into_iter()
        .map(|memory| {
            memory.mapping.keep_small_and_own().map_err(setup)?;
            let own = registration.uffd.try_clone().map_err(setup)?;
            Ok(CloneMemory::new(memory.mapping, own))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PageCount, PageIndex};

    const HUGE_PAGES: u64 = 512;

    #[test]
    fn memory_of_a_root_is_registered_and_becomes_a_clones() {
        let memory = RootMemory::new("ram0", 8 << 20).unwrap();
        let (address, bytes) = (memory.address(), memory.bytes());
        let registration = register(std::slice::from_ref(&memory)).unwrap();
        // A second registration of the same memory belongs to somebody else.
        assert!(matches!(
            register(std::slice::from_ref(&memory)),
            Err(PagerError::Register { .. })
        ));
        let clones = into_clone(vec![memory], &registration).unwrap();
        assert_eq!(clones[0].host_address() as u64, address);
        assert_eq!(clones[0].bytes(), bytes);
    }

    #[test]
    fn a_range_with_holes_is_not_collapsed() {
        let memory = RootMemory::new("ram0", 8 << 20).unwrap();
        let _registration = register(std::slice::from_ref(&memory)).unwrap();
        let start =
            (memory.address() / 4096).next_multiple_of(HUGE_PAGES) - memory.address() / 4096;
        let range = PageRange::new(PageIndex::new(start), PageCount::new(HUGE_PAGES));
        assert!(memory.collapse(range).is_err());
        let behind = PageRange::new(PageIndex::new(4096), PageCount::new(HUGE_PAGES));
        assert!(memory.collapse(behind).is_err());
        assert!(RootMemory::new("ram0", 0).is_err());
    }
}
