// UNSAFETY: protects and collapses pages of a mapping by raw address, which memmap2 has no call
// for.
#![expect(unsafe_code, reason = "mprotect and madvise of pages of a mapping")]
//! The memory of a clone: anonymous, private, never a huge page unless somebody asks later.

use std::io;

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::mm::{MprotectFlags, mprotect};

use crate::page::PageRange;

/// Memory that pages are installed in.
pub(crate) trait Addressed {
    /// The address of the first byte of `pages`, when they all lie inside.
    fn address_of(&self, pages: PageRange) -> Option<u64>;
}

/// Anonymous memory that a pager fills. It stays mapped while anybody holds it, so that an
/// install can never hit what was mapped at the same address later.
#[derive(Debug)]
pub(crate) struct ServedMapping {
    memory: MmapRaw,
    /// Where the memory begins in it.
    skipped_bytes: usize,
    bytes: u64,
}

/// What huge pages are aligned to.
pub(crate) const HUGE_BYTES: u64 = 2 << 20;

impl ServedMapping {
    /// Maps `bytes` of untouched memory. Nothing is allocated.
    pub(crate) fn new(bytes: u64) -> io::Result<Self> {
        let mapping = Self::map(bytes, 0)?;
        mapping.keep_small_and_own()?;
        Ok(mapping)
    }

    /// Maps `bytes` of untouched memory that a fork inherits and that may be collapsed to huge
    /// pages: it begins where one can. Nothing is allocated.
    pub(crate) fn inherited(bytes: u64) -> io::Result<Self> {
        Self::map(bytes, HUGE_BYTES)
    }

    fn map(bytes: u64, alignment: u64) -> io::Result<Self> {
        let number =
            |bytes| usize::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory));
        let memory = MmapOptions::new()
            .len(number(bytes.saturating_add(alignment))?)
            .no_reserve_swap()
            .map_anon()?;
        let memory = MmapRaw::from(memory);
        let base = memory.as_mut_ptr() as u64;
        let start = base.next_multiple_of(alignment.max(1));
        Ok(Self {
            memory,
            skipped_bytes: number(start - base)?,
            bytes,
        })
    }

    /// From now on no fault makes a huge page here (those that are there stay), and no fork
    /// inherits it.
    pub(crate) fn keep_small_and_own(&self) -> io::Result<()> {
        // With THP each first fault of 2 MiB would clear 2 MiB. EINVAL: a kernel without THP.
        match self.memory.advise(Advice::NoHugePage) {
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => return Err(error),
            _ => {}
        }
        // A forked child is not registered with the uffd: its missing pages would read as zero.
        // Without the mapping it faults loudly instead.
        self.memory.advise(Advice::DontFork)
    }

    /// Puts a huge page in place of `pages`, which are all there.
    pub(crate) fn collapse(&self, pages: PageRange) -> io::Result<()> {
        self.advise(pages, libc::MADV_COLLAPSE)
    }

    /// Gives this process pages of its own in place of `pages`, with what they hold: as many writes
    /// would, in one call. Holes fault, one after the other.
    pub(crate) fn make_private(&self, pages: PageRange) -> io::Result<()> {
        self.advise(pages, libc::MADV_POPULATE_WRITE)
    }

    /// Gives `pages` back to the host: they are missing from now on. Only for pages that are registered
    /// with a userfaultfd; others would read as zeros.
    pub(crate) fn discard(&self, pages: PageRange) -> io::Result<()> {
        self.advise(pages, libc::MADV_DONTNEED)
    }

    fn advise(&self, pages: PageRange, advice: libc::c_int) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let address = self.address_of(pages).ok_or_else(invalid)?;
        let length = usize::try_from(pages.bytes()).map_err(|_| invalid())?;
        // SAFETY: the range lies in this mapping, as `address_of` proved, and no reference into it
        // exists, whatever the advice does to what the pages are made of or hold.
        let result = unsafe { libc::madvise(address as *mut _, length, advice) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// First address.
    pub(crate) fn address(&self) -> *mut u8 {
        self.memory.as_mut_ptr().wrapping_add(self.skipped_bytes)
    }

    /// Length in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The address of the first byte of `pages`, when they all lie inside.
    pub(crate) fn address_of(&self, pages: PageRange) -> Option<u64> {
        let end = pages.offset().get().checked_add(pages.bytes())?;
        (end <= self.bytes()).then(|| self.address() as u64 + pages.offset().get())
    }

    /// Makes `pages` a kernel mapping apart from their neighbours, as advice of others may.
    #[cfg(test)]
    pub(crate) fn split(&self, pages: PageRange) -> io::Result<()> {
        let number = |bytes| usize::try_from(bytes).unwrap();
        let (offset, length) = (number(pages.offset().get()), number(pages.bytes()));
        self.memory.advise_range(Advice::Sequential, offset, length)
    }

    /// The first byte of `page` as a system call reads it: one that cannot be had is an error.
    #[cfg(test)]
    pub(crate) fn touch(&self, page: crate::page::PageIndex) -> io::Result<u8> {
        let mut byte = 0_u8;
        let of = |base: *mut libc::c_void| libc::iovec {
            iov_base: base,
            iov_len: 1,
        };
        let address = self.address_of(PageRange::single(page)).unwrap();
        let (own, remote) = (of((&raw mut byte).cast()), of(address as *mut _));
        // SAFETY: getpid() cannot fail. The kernel writes one byte to `byte`, which outlives the
        // call, and only reads a byte of this mapping.
        let read = unsafe { libc::process_vm_readv(libc::getpid(), &own, 1, &remote, 1, 0) };
        if read == 1 {
            Ok(byte)
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Takes every right to `pages` away: what touches them gets SIGSEGV, or EFAULT in KVM.
    pub(crate) fn forbid(&self, pages: PageRange) -> io::Result<()> {
        let address = self
            .address_of(pages)
            .ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        let length = usize::try_from(pages.bytes())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: `address_of` proved that the range lies in this mapping, which is mapped as
        // long as `self`. No reference into it exists: all access is by raw address, and losing
        // the right to it is what the caller wants to happen.
        unsafe { mprotect(address as *mut _, length, MprotectFlags::empty()) }?;
        Ok(())
    }
}

impl Addressed for ServedMapping {
    fn address_of(&self, pages: PageRange) -> Option<u64> {
        ServedMapping::address_of(self, pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PageCount, PageIndex};

    #[test]
    fn addresses_stay_inside() {
        let mapping = ServedMapping::new(8192).unwrap();
        let pages = |start, count| PageRange::new(PageIndex::new(start), PageCount::new(count));
        let base = mapping.address() as u64;
        assert_eq!(mapping.address_of(pages(1, 1)), Some(base + 4096));
        assert_eq!(mapping.address_of(pages(1, 2)), None);
        assert_eq!(mapping.address_of(pages(u64::MAX, 1)), None);
        assert!(mapping.forbid(pages(2, 1)).is_err());
        mapping.forbid(pages(0, 2)).unwrap();
    }
}
