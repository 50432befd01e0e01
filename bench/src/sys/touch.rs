// UNSAFETY: memory that a pager fills, or that is a file's, is touched by raw address: a reference
// into it would promise that nobody else changes it. `Memory` owns the mapping and checks each
// page number; what is read or written is one byte, volatile.
#![expect(unsafe_code, reason = "touches mapped memory by raw address")]
//! Memory that faults when it is touched.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use memmap2::{MmapOptions, MmapRaw};
use pando_pager::{CloneMemory, PAGE_BYTES};
use userfaultfd::{Uffd, UffdBuilder};

/// What is mapped.
#[derive(Debug)]
enum Mapping {
    /// A pager fills it.
    Served(CloneMemory),
    /// The kernel does.
    Private(MmapRaw),
}

/// Memory of a clone, without the clone.
#[derive(Debug)]
pub(crate) struct Memory(Mapping);

impl Memory {
    /// Memory that a pager fills.
    pub(crate) fn served(memory: CloneMemory) -> Self {
        Self(Mapping::Served(memory))
    }

    /// Memory of which nothing is present, and the userfaultfd that tells of its faults. Whoever has
    /// that descriptor is to serve them; until then, what touches the memory sleeps. Keep the
    /// descriptor as long as the memory, or missing pages are zeros.
    pub(crate) fn missing(bytes: u64) -> Result<(Self, OwnedFd)> {
        let length = usize::try_from(bytes)?;
        let mapping = MmapOptions::new().len(length).map_anon()?;
        mapping.advise(memmap2::Advice::NoHugePage)?;
        let range = MmapRaw::from(mapping);
        // Only this program's own code faults: the right to the kernel's faults is not needed.
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(true)
            .create()
            .context("cannot get a userfaultfd")?;
        uffd.register(range.as_mut_ptr().cast(), length)
            .context("cannot register memory with the userfaultfd")?;
        let uffd = fd_of(&uffd)?;
        Ok((Self(Mapping::Private(range)), uffd))
    }

    /// Where it begins.
    pub(crate) fn address(&self) -> u64 {
        match &self.0 {
            Mapping::Served(memory) => memory.host_address() as u64,
            Mapping::Private(mapping) => mapping.as_mut_ptr() as u64,
        }
    }

    /// A private mapping of a file, which others may only read.
    pub(crate) fn private(file: &File) -> Result<Self> {
        // SAFETY: the mapping is used by raw address and by single bytes alone; no reference to
        // its content exists, so that a change of the file by others breaks no promise.
        let mapping = unsafe { MmapOptions::new().no_reserve_swap().map_copy(file) };
        let mapping = mapping.context("cannot map the image")?;
        Ok(Self(Mapping::Private(mapping.into())))
    }

    fn address_of(&self, page: u64) -> Result<*mut u8> {
        let (base, bytes) = match &self.0 {
            Mapping::Served(memory) => (memory.host_address(), memory.bytes()),
            Mapping::Private(mapping) => (mapping.as_mut_ptr(), mapping.len() as u64),
        };
        ensure!(page < bytes / PAGE_BYTES, "no page {page} is mapped");
        Ok(base.wrapping_add(usize::try_from(page * PAGE_BYTES)?))
    }

    /// Reads the first byte of a page.
    pub(crate) fn read(&self, page: u64) -> Result<u8> {
        let address = self.address_of(page)?;
        // SAFETY: the address lies in the mapping, which is readable and owned by `self`.
        Ok(unsafe { address.read_volatile() })
    }

    /// Writes the first byte of a page. A page may be touched by one thread at a time.
    pub(crate) fn write(&self, page: u64, value: u8) -> Result<()> {
        let address = self.address_of(page)?;
        // SAFETY: the address lies in the mapping, which is private, writable and owned by `self`;
        // nobody holds a reference into it.
        unsafe { address.write_volatile(value) };
        Ok(())
    }
}

/// A descriptor of its own.
fn fd_of(uffd: &Uffd) -> Result<OwnedFd> {
    // SAFETY: `uffd` owns the descriptor and is borrowed while this one is used.
    let borrowed = unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) };
    borrowed
        .try_clone_to_owned()
        .context("cannot duplicate the userfaultfd")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_memory_sleeps_until_it_is_served() {
        let (memory, uffd) = Memory::missing(2 * PAGE_BYTES).unwrap();
        let address = memory.address() + PAGE_BYTES;
        let served = std::thread::scope(|scope| {
            let toucher = scope.spawn(|| memory.read(1).unwrap());
            let uffd = userfaultfd_of(uffd);
            let event = loop {
                if let Some(event) = uffd.read_event().unwrap() {
                    break event;
                }
                std::thread::yield_now();
            };
            let userfaultfd::Event::Pagefault { addr, .. } = event else {
                panic!("{event:?}");
            };
            assert_eq!(addr as u64, address);
            // SAFETY: the page is missing memory of this test; nothing refers to it.
            unsafe { uffd.zeropage(addr, 4096, true) }.unwrap();
            toucher.join().unwrap()
        });
        assert_eq!(served, 0);
    }

    fn userfaultfd_of(fd: OwnedFd) -> Uffd {
        use std::os::fd::{FromRawFd, IntoRawFd};
        // SAFETY: the descriptor is a userfaultfd, and its ownership goes over.
        unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) }
    }

    #[test]
    fn a_private_mapping_is_read_and_written_and_the_file_stays() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7], 4096).unwrap();
        file.set_len(8192).unwrap();
        let memory = Memory::private(&file).unwrap();
        assert_eq!((memory.read(0).unwrap(), memory.read(1).unwrap()), (0, 7));
        memory.write(1, 9).unwrap();
        assert_eq!(memory.read(1).unwrap(), 9);
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 4096).unwrap();
        assert_eq!(byte, [7]);
        memory.read(2).unwrap_err();
        memory.read(u64::MAX).unwrap_err();
    }
}
